"""Folders of accelerate's `save_state`: read as the run stands; `load_state` goes on from what is written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
accelerate = pytest.importorskip("accelerate", reason="needs accelerate to go on from the folder")

import ckptconv  # noqa: E402
from ckptconv.document import Known, Unknown, value_of  # noqa: E402
from tests.support.torch_equal import assert_same  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")
SAMPLES, BATCH = 20, 4
PER_EPOCH = SAMPLES // BATCH
AT = 7
"""Batches after which no gradient waits for another batch: nothing saves those."""


class Counter:
    """What a loop registers for itself."""

    def __init__(self) -> None:
        self.batches = 0

    def state_dict(self) -> dict[str, int]:
        return {"batches": self.batches}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.batches = state["batches"]


class Loop:
    """A regression in an accelerate loop, with one or several models of their own optimizers."""

    def __init__(
        self, seed: int, accumulation: int = 1, widths: tuple[int, ...] = (4,), **options: Any
    ) -> None:
        from accelerate.state import AcceleratorState, GradientState

        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        torch.set_num_threads(1)
        torch.manual_seed(seed)
        self.accelerator = accelerate.Accelerator(
            cpu=True, gradient_accumulation_steps=accumulation, **options
        )
        self.counter = Counter()
        models = [
            torch.nn.Sequential(torch.nn.Linear(3, width), torch.nn.Tanh(), torch.nn.Linear(width, 2))
            for width in widths
        ]
        optimizers = [torch.optim.AdamW(model.parameters(), lr=0.02) for model in models]
        schedulers = [torch.optim.lr_scheduler.StepLR(optimizer, 3, 0.7) for optimizer in optimizers]
        generator = torch.Generator().manual_seed(1)
        data = [torch.randn(SAMPLES, n, generator=generator) for n in (3, 2)]
        loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*data), batch_size=BATCH)
        prepared = self.accelerator.prepare(*models, *optimizers, *schedulers, loader)
        count = len(models)
        self.models, self.optimizers = prepared[:count], prepared[count : 2 * count]
        self.schedulers, self.loader = prepared[2 * count : 3 * count], prepared[-1]
        self.accelerator.register_for_checkpointing(self.counter)

    def train(self, batches: int, save_at: int | None = None, folder: Path | None = None) -> None:
        while batches > 0:
            done = self.counter.batches % PER_EPOCH
            loader = self.accelerator.skip_first_batches(self.loader, done) if done else self.loader
            for x, y in loader:
                for model, optimizer, scheduler in zip(
                    self.models, self.optimizers, self.schedulers, strict=True
                ):
                    with self.accelerator.accumulate(model):
                        self.accelerator.backward(torch.nn.functional.mse_loss(model(x), y))
                        optimizer.step()
                        scheduler.step()
                        optimizer.zero_grad()
                self.counter.batches += 1
                batches -= 1
                if self.counter.batches == save_at:
                    self.accelerator.save_state(str(folder))
                if not batches:
                    break

    def standing(self) -> dict[str, Any]:
        return {
            "models": [dict(model.state_dict()) for model in self.models],
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "schedulers": [scheduler.state_dict() for scheduler in self.schedulers],
            "batches": self.counter.batches,
        }


def through_neutral(source: Path, scratch: Path, **settings: str) -> Path:
    ckptconv.convert(source, scratch / "neutral", to="neutral", set_=settings)
    ckptconv.convert(scratch / "neutral", scratch / "back", to="pytorch:accelerate")
    return scratch / "back"


@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_optimizer_counts_and_accelerates_step_does_not(accumulation: int, tmp_path: Path) -> None:
    loop = Loop(0, accumulation)
    loop.train(8, save_at=8, folder=tmp_path / "state")
    checkpoint = ckptconv.open(tmp_path / "state")
    assert checkpoint.provenance.dialect == "accelerate"
    held = loop.optimizers[0].state_dict()["state"][0]["step"]
    assert checkpoint.progress.step == Known(value=int(held), source="optimizer.bin.state.0.step")
    theirs = torch.load(tmp_path / "state" / "random_states_0.pkl", weights_only=False)["step"]
    assert theirs != int(held)
    batch = checkpoint.progress.batch_in_epoch
    assert isinstance(batch, Unknown)
    assert [c.value for c in batch.candidates] == [theirs] == [8 % PER_EPOCH]
    (schedule,) = checkpoint.schedules
    assert (value_of(schedule.position), schedule.unit) == (int(held), "update")
    (optimizer,) = checkpoint.optimizers
    for name, parameter in loop.models[0].named_parameters():
        assert torch.equal(torch.from_numpy(checkpoint.params[name].read()), parameter.detach())
        state = loop.optimizers[0].state[parameter]
        assert torch.equal(torch.from_numpy(optimizer.slots["first_moment"][name].read()), state["exp_avg"])


@pytest.mark.parametrize("safe", [True, False])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_load_state_goes_on(accumulation: int, safe: bool, tmp_path: Path) -> None:
    loop = Loop(0, accumulation)
    loop.train(AT)
    loop.accelerator.save_state(str(tmp_path / "state"), safe_serialization=safe)
    loop.train(6)
    back = through_neutral(tmp_path / "state", tmp_path)
    assert {f.name for f in back.iterdir()} == {f.name for f in (tmp_path / "state").iterdir()}
    again = Loop(5, accumulation)
    again.accelerator.load_state(str(back))
    assert again.counter.batches == AT
    again.train(6)
    assert_same(loop.standing(), again.standing())


def test_an_edited_step_is_in_every_place(tmp_path: Path) -> None:
    loop = Loop(0)
    loop.train(7, save_at=7, folder=tmp_path / "state")
    again = Loop(5)
    again.accelerator.load_state(str(through_neutral(tmp_path / "state", tmp_path, step="11")))
    steps = [float(s["step"]) for s in again.optimizers[0].state_dict()["state"].values()]
    assert steps == [11.0] * 4
    scheduler = again.schedulers[0].state_dict()
    assert (scheduler["last_epoch"], scheduler["_step_count"]) == (11, 12)
    rate = again.optimizers[0].param_groups[0]["lr"]
    assert rate == pytest.approx(0.02 * 0.7 ** (11 // 3), rel=1e-12)


def test_two_models_with_an_optimizer_each(tmp_path: Path) -> None:
    loop = Loop(0, widths=(4, 5))
    loop.train(6, save_at=6, folder=tmp_path / "state")
    checkpoint = ckptconv.open(tmp_path / "state")
    assert [o.name for o in checkpoint.optimizers] == ["optimizer.bin", "optimizer_1.bin"]
    assert [set(o.params) for o in checkpoint.optimizers] == [
        {f"{prefix}{n}.{kind}" for n in (0, 2) for kind in ("weight", "bias")} for prefix in ("", "model_1.")
    ]
    assert [s.optimizer for s in checkpoint.schedules] == ["optimizer.bin", "optimizer_1.bin"]
    loop.train(4)
    again = Loop(5, widths=(4, 5))
    again.accelerator.load_state(str(through_neutral(tmp_path / "state", tmp_path)))
    again.train(4)
    assert_same(loop.standing(), again.standing())


def test_models_that_nothing_tells_apart_need_a_skeleton(tmp_path: Path) -> None:
    loop = Loop(0, widths=(4, 4))
    loop.train(2, save_at=2, folder=tmp_path / "state")
    checkpoint = ckptconv.open(tmp_path / "state")
    assert {o.param_order for o in checkpoint.optimizers} == {"unknown"}


def test_without_a_step_the_scheduler_is_a_candidate(tmp_path: Path) -> None:
    loop = Loop(0)
    loop.train(5, save_at=5, folder=tmp_path / "state")
    sgd = torch.optim.SGD(
        [torch.nn.Parameter(p.detach().clone()) for p in loop.models[0].parameters()], lr=0.1
    )
    torch.save(sgd.state_dict(), tmp_path / "state" / "optimizer.bin")
    states = (tmp_path / "state" / "random_states_0.pkl").read_bytes()
    (tmp_path / "state" / "random_states_1.pkl").write_bytes(states)
    scheduler = torch.load(tmp_path / "state" / "scheduler.bin")
    torch.save({**scheduler, "last_epoch": 10, "_step_count": 11}, tmp_path / "state" / "scheduler.bin")
    step = ckptconv.open(tmp_path / "state").progress.step
    assert isinstance(step, Unknown)
    assert [candidate.value for candidate in step.candidates] == [10, 5]


def test_the_loaders_state_tells_the_batch(tmp_path: Path) -> None:
    loop = Loop(0)
    loop.train(2, save_at=2, folder=tmp_path / "state")
    cases = [
        ({"_num_yielded": 3, "_iterator_finished": False}, 3),
        ({"_num_yielded": 5, "_iterator_finished": True}, 0),
        (
            {
                "_snapshot": {"_snapshot_step": 2},
                "_steps_since_snapshot": 1,
                "_iterator_finished": False,
            },
            3,
        ),
    ]
    for state, batches in cases:
        torch.save(state, tmp_path / "state" / "dl_state_dict.bin")
        assert value_of(ckptconv.open(tmp_path / "state").progress.batch_in_epoch) == batches


@pytest.mark.parametrize("workers", [0, 1])
def test_a_stateful_loader_is_really_resumed(workers: int, tmp_path: Path) -> None:
    stateful = pytest.importorskip("torchdata.stateful_dataloader", reason="needs torchdata")
    loop = Loop(0)
    loop.train(2, save_at=2, folder=tmp_path / "state")

    def made() -> Any:
        return stateful.StatefulDataLoader(list(range(20)), batch_size=2, num_workers=workers)

    loader = made()
    batches = iter(loader)
    taken = [next(batches).tolist() for _ in range(4)]
    torch.save(loader.state_dict(), tmp_path / "state" / "dl_state_dict.bin")
    checkpoint = ckptconv.open(tmp_path / "state")
    assert value_of(checkpoint.progress.batch_in_epoch) == len(taken)
    assert any(block.name.startswith("dl_state_dict.bin") for block in checkpoint.data)
    back = through_neutral(tmp_path / "state", tmp_path)
    again = made()
    again.load_state_dict(torch.load(back / "dl_state_dict.bin", weights_only=False))
    rest = [batch.tolist() for batch in again]
    assert taken + rest == [[n, n + 1] for n in range(0, 20, 2)]
    torch.save(again.state_dict(), tmp_path / "state" / "dl_state_dict.bin")
    assert value_of(ckptconv.open(tmp_path / "state").progress.batch_in_epoch) == 0
