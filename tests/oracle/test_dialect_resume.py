"""Ignite, timm and torch's own loader go on from what is written, where the document says the run stands."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

torch = pytest.importorskip("torch")

import ckptconv  # noqa: E402
from ckptconv.conversion import convert  # noqa: E402
from ckptconv.document import Unknown, value_of  # noqa: E402
from ckptconv.errors import CkptError  # noqa: E402
from tests.support.producers import Net, Run, composer  # noqa: E402
from tests.support.torch_equal import assert_same  # noqa: E402

LENGTH = 5
"""Iterations of an epoch."""


class Training:
    """An Ignite trainer with its handler of checkpoints."""

    def __init__(self, folder: Path, algorithm: str = "Adam", stop: int | None = None) -> None:
        from ignite.engine import Engine, Events
        from ignite.handlers import Checkpoint, DiskSaver

        torch.manual_seed(0)
        self.model = Net()
        options: dict[str, Any] = {"momentum": 0.9} if algorithm == "SGD" else {}
        self.optimizer = getattr(torch.optim, algorithm)(self.model.parameters(), lr=0.05, **options)
        self.lr_scheduler = torch.optim.lr_scheduler.StepLR(self.optimizer, 3, 0.5)
        self.seen: list[tuple[int, int]] = []
        self.trainer = Engine(self._update)
        self.parts = {name: getattr(self, name) for name in ("trainer", "model", "optimizer", "lr_scheduler")}
        saver = DiskSaver(str(folder), create_dir=True, require_empty=False)
        self.handler = Checkpoint(self.parts, saver, n_saved=None)
        if stop is not None:
            self.trainer.add_event_handler(Events.ITERATION_COMPLETED(once=stop), self.handler)
            self.trainer.add_event_handler(Events.ITERATION_COMPLETED(once=stop), self.trainer.terminate)

    def _update(self, engine: Any, batch: torch.Tensor) -> None:
        self.optimizer.zero_grad()
        self.model(batch).pow(2).mean().backward()
        self.optimizer.step()
        self.lr_scheduler.step()
        self.seen.append((engine.state.epoch, engine.state.iteration))

    def run(self, epochs: int) -> None:
        torch.manual_seed(1)
        batches = [torch.randn(4, 3) for _ in range(LENGTH)]
        self.trainer.run(batches, max_epochs=epochs, epoch_length=LENGTH)

    def resume(self, path: Path) -> None:
        from ignite.handlers import Checkpoint

        Checkpoint.load_objects(self.parts, torch.load(path, weights_only=True))


@pytest.fixture
def ignite() -> None:
    pytest.importorskip("ignite", reason="needs PyTorch-Ignite to go on from the file")


def saved_by_ignite(folder: Path, iterations: int, algorithm: str = "Adam") -> tuple[Path, Training]:
    training = Training(folder, algorithm, stop=iterations)
    training.run(4)
    (path,) = folder.glob("*.pt")
    return path, training


@pytest.mark.usefixtures("ignite")
@pytest.mark.parametrize("iterations", [3, 5, 8])
def test_ignite_goes_on_where_the_document_says(iterations: int, tmp_path: Path) -> None:
    path, before = saved_by_ignite(tmp_path / "a", iterations)
    checkpoint = ckptconv.open(path)
    assert (checkpoint.provenance.dialect, checkpoint.oddities) == ("ignite", ())
    progress = checkpoint.progress
    told = [value_of(fact) for fact in (progress.step, progress.epochs, progress.batch_in_epoch)]
    assert told == [iterations, iterations // LENGTH, iterations % LENGTH]
    assert checkpoint.schedules[0].unit == "update"
    assert set(checkpoint.params) == set(before.model.state_dict())
    convert(path, tmp_path / "run.neutral", to="neutral")
    convert(tmp_path / "run.neutral", tmp_path / "back.pt", to="pytorch:ignite")
    assert_same(torch.load(path, weights_only=True), torch.load(tmp_path / "back.pt", weights_only=True))
    straight, again = Training(tmp_path / "b"), Training(tmp_path / "c")
    straight.resume(path)
    again.resume(tmp_path / "back.pt")
    for training in (straight, again):
        training.run(4)
    assert again.seen == straight.seen
    assert again.seen[0] == (iterations // LENGTH + 1, iterations + 1)
    assert_same(dict(straight.model.state_dict()), dict(again.model.state_dict()))


@pytest.mark.usefixtures("ignite")
@pytest.mark.parametrize(
    ("edits", "iteration", "steps"),
    [
        ({"step": "12"}, 12, 12),
        ({"epochs": "2", "batch_in_epoch": "1"}, 11, 8),
        ({"step": "11", "epochs": "2"}, 11, 11),
        ({"step": "11", "epochs": "2", "batch_in_epoch": "1"}, 11, 11),
    ],
)
def test_an_edited_step_or_epoch_is_where_ignite_resumes(
    edits: dict[str, str], iteration: int, steps: int, tmp_path: Path
) -> None:
    path, _ = saved_by_ignite(tmp_path / "a", 8)
    convert(path, tmp_path / "run.neutral", to="neutral")
    convert(tmp_path / "run.neutral", tmp_path / "back.pt", to="pytorch:ignite", set_=edits)
    training = Training(tmp_path / "b")
    training.resume(tmp_path / "back.pt")
    training.run(4)
    assert training.seen[0] == (iteration // LENGTH + 1, iteration + 1)
    ends = {float(state["step"]) for state in training.optimizer.state.values()}
    assert ends == {steps + 4 * LENGTH - iteration}
    assert training.lr_scheduler.last_epoch == ends.pop()
    checkpoint = ckptconv.open(tmp_path / "back.pt")
    assert value_of(checkpoint.progress.epochs) == iteration // LENGTH


@pytest.mark.usefixtures("ignite")
def test_an_edited_step_and_epochs_that_disagree_are_refused(tmp_path: Path) -> None:
    path, _ = saved_by_ignite(tmp_path / "a", 8)
    with pytest.raises(CkptError) as caught:
        convert(path, tmp_path / "no.pt", set_={"step": "12", "epochs": "1", "batch_in_epoch": "3"})
    assert [(p.code, p.loc) for p in caught.value.problems] == [
        ("progress-conflict", ("trainer", "iteration"))
    ]


@pytest.mark.usefixtures("ignite")
def test_ignite_with_an_optimizer_that_stores_no_step(tmp_path: Path) -> None:
    path, _ = saved_by_ignite(tmp_path / "a", 8, "SGD")
    progress = ckptconv.open(path).progress
    assert isinstance(progress.step, Unknown)  # an iteration is what the user's function does
    assert [c.value for c in progress.step.candidates] == [8]
    assert value_of(progress.micro_steps) == 8
    assert (value_of(progress.epochs), value_of(progress.batch_in_epoch)) == (1, 3)


def torchtitan_folder(folder: Path, run: Run) -> Path:
    """torchtitan/components/checkpoint.py: weights at the root, a flat optimizer, `train_state`."""
    from torch.distributed import checkpoint
    from torch.distributed.checkpoint import state_dict

    flat = state_dict.StateDictOptions(flatten_optimizer_state_dict=True)
    saved = {
        **state_dict.get_model_state_dict(run.model),
        "optimizer": state_dict.get_optimizer_state_dict(run.model, run.optimizer, options=flat),
        "lr_scheduler": run.scheduler.state_dict(),
        "dataloader": {"dp_rank_0": b"state", "world_size": 1},
        "train_state": {"step": run.updates, "ntokens_seen": 99},
    }
    checkpoint.save(saved, checkpoint_id=str(folder), no_dist=True)
    return folder


def torchtitan_resumed(folder: Path) -> tuple[Run, int]:
    """What torch itself loads of a folder."""
    from torch.distributed import checkpoint
    from torch.distributed.checkpoint import state_dict

    run = Run(seed=5, per_epoch=False)
    run.update()
    flat = state_dict.StateDictOptions(flatten_optimizer_state_dict=True)
    state = {
        **state_dict.get_model_state_dict(run.model),
        "optimizer": state_dict.get_optimizer_state_dict(run.model, run.optimizer, options=flat),
        "train_state": {"step": 0, "ntokens_seen": 0},
    }
    checkpoint.load(state, checkpoint_id=str(folder), no_dist=True)
    run.model.load_state_dict({name: state[name] for name in run.model.state_dict()})
    state_dict.set_optimizer_state_dict(run.model, run.optimizer, state["optimizer"], options=flat)
    return run, state["train_state"]["step"]


@pytest.mark.filterwarnings("ignore")
def test_torchtitan_in_a_folder_and_in_the_file_that_torch_makes_of_it(tmp_path: Path) -> None:
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    run = Run(per_epoch=False)
    for _ in range(4):
        run.update()
    folder, file = torchtitan_folder(tmp_path / "step-4", run), tmp_path / "step-4.pt"
    dcp_to_torch_save(folder, file)
    for path in (folder, file):
        checkpoint = ckptconv.open(path)
        assert checkpoint.provenance.dialect == "torchtitan"
        assert (value_of(checkpoint.progress.step), checkpoint.optimizers[0].param_order) == (4, "named")
        assert list(checkpoint.params) == list(run.model.state_dict())
    convert(file, tmp_path / "run.neutral", to="neutral")
    convert(tmp_path / "run.neutral", tmp_path / "same.pt", to="pytorch:torchtitan")
    whole = torch.load(file, weights_only=True)
    assert_same(whole, torch.load(tmp_path / "same.pt", weights_only=True))
    for set_, wanted in (({}, 4), ({"step": "40"}, 40)):
        back = tmp_path / f"step-{wanted}-again"
        convert(tmp_path / "run.neutral", back, to="dcp:torchtitan", set_=set_)
        again, step = torchtitan_resumed(back)
        assert step == wanted
        assert_same(dict(run.model.state_dict()), dict(again.model.state_dict()))
        for mine, theirs in zip(run.model.parameters(), again.model.parameters(), strict=True):
            state, resumed = run.optimizer.state[mine], again.optimizer.state[theirs]
            assert torch.equal(state["exp_avg"], resumed["exp_avg"])
            assert float(resumed["step"]) == wanted
        assert again.optimizer.param_groups[0]["lr"] == pytest.approx(0.1 * 0.5**wanted)


@pytest.mark.filterwarnings("ignore")
def test_a_folder_of_composer_is_read_and_written_as_torch_loads_it(tmp_path: Path) -> None:
    from torch.distributed import checkpoint

    run = Run(per_epoch=False)
    saved = torch.load(composer(run, tmp_path), weights_only=False)
    checkpoint.save(saved, checkpoint_id=str(tmp_path / "ep1"), no_dist=True)
    progress = ckptconv.open(tmp_path / "ep1").progress
    told = [value_of(fact) for fact in (progress.step, progress.epochs, progress.batch_in_epoch)]
    assert told == [run.updates, run.epochs, run.batch] == [4, 1, 1]
    edits = {"step": "40", "samples": "160"}
    convert(tmp_path / "ep1", tmp_path / "back", to="dcp:composer", set_=edits, allow=["opaque-globals"])
    timestamp = {"batch": 0, "sample": 0, "epoch": 0, "batch_in_epoch": 0}
    moment = torch.zeros_like(run.model.last.weight)
    state: dict[str, Any] = {
        "timestamp": {"Timestamp": timestamp},
        "optimizers": {"AdamW": {"state": {"last.weight": {"exp_avg": moment, "step": torch.tensor(0.0)}}}},
    }
    checkpoint.load({"state": state}, checkpoint_id=str(tmp_path / "back"), no_dist=True)
    assert timestamp == {"batch": 40, "sample": 160, "epoch": 1, "batch_in_epoch": 1}
    resumed = state["optimizers"]["AdamW"]["state"]["last.weight"]
    assert float(resumed["step"]) == 40.0
    assert torch.equal(moment, run.optimizer.state[run.model.last.weight]["exp_avg"])


def alone(name: str, *path: str, **stubs: Any) -> ModuleType:
    """One file of timm, which as a whole needs torchvision."""
    found = importlib.util.find_spec("timm")
    if found is None or found.origin is None:
        pytest.skip("needs timm")
    for stub, content in stubs.items():
        sys.modules[f"timm_alone.{stub}"] = content
    sys.modules.setdefault("timm_alone", ModuleType("timm_alone")).__path__ = []
    file = Path(found.origin).parent.joinpath(*path)
    spec = importlib.util.spec_from_file_location(f"timm_alone.{name}", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def timm_files() -> Iterator[tuple[Any, Any]]:
    """`CheckpointSaver` and `resume_checkpoint` of timm."""
    model = ModuleType("timm_alone.model")
    model.unwrap_model = lambda module: module  # type: ignore[attr-defined]
    model.get_state_dict = lambda module, unwrap: unwrap(module).state_dict()  # type: ignore[attr-defined]
    saver = alone("checkpoint_saver", "utils", "checkpoint_saver.py", model=model)
    yield saver.CheckpointSaver, alone("_helpers", "models", "_helpers.py").resume_checkpoint
    for name in [name for name in sys.modules if name.startswith("timm_alone")]:
        del sys.modules[name]


class Scaler:
    """As timm's NativeScaler tells its state."""

    state_dict_key = "amp_scaler"

    def __init__(self) -> None:
        self.state = {"scale": 2048.0, "growth_factor": 2.0, "_growth_tracker": 1}

    def state_dict(self) -> dict[str, float]:
        return self.state

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.state = state


@pytest.mark.parametrize("epochs", [1, 3])
def test_timm_resumes_at_the_epoch_of_the_document_and_at_an_edited_one(
    timm_files: tuple[Any, Any], epochs: int, tmp_path: Path
) -> None:
    saver_class, resume_checkpoint = timm_files
    torch.manual_seed(0)
    model, ema = Net(), Net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    saver = saver_class(
        model,
        optimizer,
        model_ema=ema,
        amp_scaler=Scaler(),
        checkpoint_dir=str(tmp_path),
        recovery_dir=str(tmp_path),
    )
    for epoch in range(epochs):
        for _ in range(2):
            optimizer.zero_grad()
            model(torch.randn(4, 3)).pow(2).mean().backward()
            optimizer.step()
        saver.save_checkpoint(epoch, metric=70.0 + epoch)
    path = tmp_path / "last.pth.tar"
    checkpoint = ckptconv.open(path)
    assert checkpoint.provenance.dialect == "timm"
    progress = checkpoint.progress
    told = [value_of(fact) for fact in (progress.step, progress.epochs, progress.loss_scale)]
    assert told == [2 * epochs, epochs, 2048.0]
    convert(path, tmp_path / "run.neutral", to="neutral")
    for set_, wanted in (({}, epochs), ({"epochs": "9", "step": "40"}, 9)):
        back = tmp_path / f"back-{wanted}.pth.tar"
        convert(tmp_path / "run.neutral", back, to="pytorch:timm", set_=set_)
        fresh = Net()
        again = torch.optim.AdamW(fresh.parameters())
        assert resume_checkpoint(fresh, str(back), again, Scaler(), log_info=False) == wanted
        assert_same(dict(model.state_dict()), dict(fresh.state_dict()))
        assert {float(state["step"]) for state in again.state.values()} == {40.0 if set_ else 2.0 * epochs}
        assert torch.load(back, weights_only=True)["saver"]["pending"][0] == wanted - 1
    averaged = ckptconv.open(path, select=["ema"])
    assert averaged.params["last.weight"].read().tobytes() == ema.last.weight.detach().numpy().tobytes()
