"""The table of PyTorch dialects, against generators that follow each producer's source."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

import ckptconv  # noqa: E402
from ckptconv.conversion import convert  # noqa: E402
from ckptconv.dialects.torch_rows import Row  # noqa: E402
from ckptconv.dialects.torch_table import ROWS  # noqa: E402
from ckptconv.document import Known, Unknown, value_of  # noqa: E402
from ckptconv.errors import CkptError  # noqa: E402
from tests.support import producers  # noqa: E402
from tests.support.producers import PRODUCERS, Run  # noqa: E402
from tests.support.torch_equal import assert_same  # noqa: E402

CASES = sorted(PRODUCERS)
OPAQUE = ("opaque-globals",)


def saved(case: str, folder: Path, optimizer: str = "AdamW") -> tuple[Path, Run]:
    _, save, _, per_epoch = PRODUCERS[case]
    run = Run(optimizer, per_epoch=per_epoch)
    return save(run, folder), run


def loaded(path: Path) -> dict[str, Any]:
    result: dict[str, Any] = torch.load(path, weights_only=False)
    return result


def visible(node: Any) -> Any:
    """The value with what can be compared in the place of modules."""
    if isinstance(node, torch.nn.Module):
        buffers = {name: buffer for name, buffer in node.named_buffers() if name not in node.state_dict()}
        return {"class": type(node).__name__, **node.state_dict(), **buffers, "training": node.training}
    return {key: visible(value) for key, value in node.items()} if isinstance(node, dict) else node


def through_neutral(source: Path, folder: Path, **set_: str) -> Path:
    """The same dialect again, by way of neutral, edited there."""
    convert(source, folder / "run.neutral", to="neutral", allow=OPAQUE)
    dialect = ckptconv.open(source).provenance.dialect
    back = folder / f"back-{source.name}"
    convert(folder / "run.neutral", back, to=f"pytorch:{dialect}", set_=set_, allow=OPAQUE)
    return back


def test_every_row_has_a_case_and_names_are_told_once() -> None:
    names = [row.name for row in ROWS]
    assert len(set(names)) == len(names)
    assert {dialect for dialect, *_ in PRODUCERS.values()} == set(names) - {"ignite"}  # ignite: tests/oracle
    assert all(row.source.startswith("https://") and row.counters for row in ROWS)
    assert {f.name for f in fields(Row)} >= {"signature", "counters", "source"}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("optimizer", ["AdamW", "SGD"])
def test_progress_is_the_true_one_and_where_the_producer_resumes(
    case: str, optimizer: str, tmp_path: Path
) -> None:
    dialect, _, resume, _ = PRODUCERS[case]
    path, run = saved(case, tmp_path, optimizer)
    checkpoint = ckptconv.open(path)
    assert checkpoint.provenance.dialect == dialect
    progress = checkpoint.progress
    truth = {"epochs": run.epochs, "batch_in_epoch": run.batch, "samples": run.samples, "step": run.updates}
    resumed = resume(loaded(path))
    assert resumed.items() <= truth.items()
    if optimizer == "AdamW":
        assert value_of(progress.step) == run.updates
        assert set(checkpoint.optimizers[0].param_steps.values()) == {run.updates}
    for name, value in resumed.items():
        fact = getattr(progress, name)
        if isinstance(fact, Unknown):  # batches may be several to an update, or skipped by a loss scaler
            assert name == "step"
            assert [c.value for c in fact.candidates] == [value]
            assert value_of(progress.micro_steps) == value
        else:
            assert value_of(fact) == value
    for name in ("epochs", "batch_in_epoch", "samples"):
        assert value_of(getattr(progress, name)) in (truth[name], None)


@pytest.mark.parametrize("case", CASES)
def test_parameters_slots_and_order_are_those_of_the_run(case: str, tmp_path: Path) -> None:
    path, run = saved(case, tmp_path)
    checkpoint = ckptconv.open(path)
    model = run.ema.half() if case == "ultralytics" else run.model
    state = model.state_dict()
    assert list(checkpoint.params) == list(state)
    for name, tensor in state.items():
        assert checkpoint.params[name].read().tobytes() == tensor.numpy().tobytes(), name
    (optimizer,) = checkpoint.optimizers
    assert optimizer.param_order == ("named" if case == "composer" else "declaration-order")
    assert optimizer.params == tuple(name for name, _ in run.model.named_parameters())
    for name, parameter in run.model.named_parameters():
        moment = run.optimizer.state[parameter]["exp_avg"]
        assert optimizer.slots["first_moment"][name].read().tobytes() == moment.numpy().tobytes(), name
    if "scaler" in str(loaded(path).keys()) or case.startswith("mmengine"):
        assert value_of(checkpoint.progress.loss_scale) == 1024.0


@pytest.mark.parametrize("case", CASES)
def test_the_way_through_neutral_is_exact_and_needs_consent_for_objects(case: str, tmp_path: Path) -> None:
    path, _ = saved(case, tmp_path)
    assert_same(visible(loaded(path)), visible(loaded(through_neutral(path, tmp_path))))
    if any("names" in odd for odd in ckptconv.open(path).oddities):
        with pytest.raises(CkptError) as caught:
            convert(path, tmp_path / "no.pt", to=f"pytorch:{ckptconv.open(path).provenance.dialect}")
        assert {p.code for p in caught.value.problems} == {"opaque-globals"}


@pytest.mark.parametrize("case", CASES)
def test_edited_progress_is_where_the_producer_resumes(case: str, tmp_path: Path) -> None:
    path, _ = saved(case, tmp_path)
    _, _, resume, per_epoch = PRODUCERS[case]
    edits = {"epochs": 5, "step": 40, "batch_in_epoch": 1, "samples": 160}
    wanted = {name: edits[name] for name in resume(loaded(path))}
    rate = 0.1 * 0.5 ** (5 if per_epoch else 40)
    texts = {name: str(value) for name, value in wanted.items()}
    edited = loaded(through_neutral(path, tmp_path, **texts, learning_rate=repr(rate)))
    assert resume(edited) == wanted
    assert {float(step) for step in steps_in(edited)} == {40.0 if "step" in wanted else 6.0}
    for warmup, main in [edited["param_schedulers"]] if "param_schedulers" in edited else ():
        assert (warmup["last_step"], warmup["_global_step"], warmup["_last_value"]) == (40, 41, [rate])
        assert (main["last_step"], main["_global_step"]) == (5, 6)
    for scheduler in [v for k, v in edited.items() if "scheduler" in k and isinstance(v, dict)]:
        assert (scheduler["last_epoch"], scheduler["_last_lr"]) == (5 if per_epoch else 40, [rate])


def steps_in(node: Any) -> list[Any]:
    if isinstance(node, dict):
        here = [v for k, v in node.items() if k == "step" and isinstance(v, torch.Tensor)]
        return here + [s for v in node.values() for s in steps_in(v)]
    return []


def test_a_recovery_file_of_timm_is_of_an_unfinished_epoch(tmp_path: Path) -> None:
    run = Run()
    checkpoint = ckptconv.open(producers.timm_recovery(run, tmp_path))
    assert value_of(checkpoint.progress.epochs) == run.epochs == 1


def test_a_file_of_mmcvs_iteration_runner_counts_otherwise(tmp_path: Path) -> None:
    run = Run("SGD")
    progress = ckptconv.open(producers.mmcv_by_iteration(run, tmp_path)).progress
    assert (value_of(progress.epochs), value_of(progress.micro_steps)) == (run.epochs, run.updates) == (1, 4)


def test_a_stripped_yolo_has_no_progress(tmp_path: Path) -> None:
    saved_ = loaded(producers.ultralytics(Run(), tmp_path))
    saved_ |= {"model": saved_["ema"], "ema": None, "optimizer": None, "updates": None, "epoch": -1}
    torch.save(saved_, tmp_path / "best.pt")
    checkpoint = ckptconv.open(tmp_path / "best.pt")
    assert checkpoint.kind == "weights"
    assert list(checkpoint.params) == list(saved_["model"].state_dict())
    assert not isinstance(checkpoint.progress.epochs, Known)
    assert not isinstance(checkpoint.progress.step, Known)


def test_updates_that_a_loss_scaler_skipped_are_told_and_kept_apart(tmp_path: Path) -> None:
    run = Run(per_epoch=False)
    run.update()
    run.update(skipped=True)
    path = PRODUCERS["detectron2"][1](run, tmp_path)
    saved_ = loaded(path)
    for trainer in (saved_, saved_["trainer"], saved_["trainer"]["_trainer"]):
        trainer["iteration"] += 2
    saved_["trainer"]["_trainer"]["grad_scaler"] = {"scale": 512.0}
    torch.save(saved_, path)
    progress = ckptconv.open(path).progress
    told = (progress.step, progress.micro_steps, progress.skipped_steps, progress.loss_scale)
    assert [value_of(fact) for fact in told] == [6, 7, 1, 512.0]
    assert_same(saved_, loaded(through_neutral(path, tmp_path)))
    with pytest.raises(CkptError) as caught:
        convert(path, tmp_path / "no.pth", set_={"step": "40", "learning_rate": "0.01"})
    assert {p.code for p in caught.value.problems} == {"residue-stale"}


def test_a_schedule_of_mmengine_past_its_end_is_not_moved(tmp_path: Path) -> None:
    path, _ = saved("mmengine-epoch", tmp_path)
    saved_ = loaded(path)
    saved_["param_schedulers"][0].update(end=3, last_step=2)
    torch.save(saved_, path)
    assert_same(saved_, loaded(through_neutral(path, tmp_path)))
    with pytest.raises(CkptError) as caught:
        convert(path, tmp_path / "no.pth", set_={"step": "40", "learning_rate": "0.1"})
    assert [(p.code, p.loc) for p in caught.value.problems] == [
        ("residue-stale", ("param_schedulers", 0, "_global_step"))
    ]


def test_a_whole_module_is_its_state_dict_and_comes_back_whole(tmp_path: Path) -> None:
    run = Run()
    run.update()
    torch.save(run.model, tmp_path / "model.pt")
    checkpoint = ckptconv.open(tmp_path / "model.pt")
    assert checkpoint.provenance.dialect == "module"
    assert list(checkpoint.params) == list(run.model.state_dict())
    assert [p.name for p in checkpoint.params.values() if p.trainable] == [
        name for name, _ in run.model.named_parameters()
    ]
    assert list(checkpoint.extras) == ["@state/_buffers/seen"]
    again = through_neutral(tmp_path / "model.pt", tmp_path)
    assert_same(visible(run.model), visible(torch.load(again, weights_only=False)))
    convert(tmp_path / "model.pt", tmp_path / "weights.pt", to="pytorch:state-dict")
    weights = torch.load(tmp_path / "weights.pt", weights_only=True)
    assert_same(dict(run.model.state_dict()), dict(weights))


def test_another_order_of_the_optimizer_is_told_or_left_open_and_never_swapped(tmp_path: Path) -> None:
    fresh = Run()
    template = tmp_path / "fresh.pt"
    torch.save({"model": fresh.model.state_dict(), "optimizer": fresh.optimizer.state_dict()}, template)
    for case in CASES:
        if case == "composer":
            continue
        path, _ = saved(case, tmp_path)
        saved_ = loaded(path)
        where = saved_
        for step in {"detectron2": ["trainer", "_trainer"]}.get(case, []):
            where = where[step]
        key = "last_optimizer_state" if "last_optimizer_state" in where else "optimizer"
        state = where[key]["state"]
        count = len(state)
        where[key]["state"] = {i: state[count - 1 - i] for i in range(count)}
        torch.save(saved_, path)
        (optimizer,) = ckptconv.open(path).optimizers
        assert optimizer.param_order == "unknown", case
        assert set(optimizer.params) == {f"#{i}" for i in range(count)}, case
        with pytest.raises(CkptError) as caught:
            convert(path, tmp_path / "run.pt", template=template)
        assert "order-ambiguous" in {p.code for p in caught.value.problems}, case


@pytest.mark.parametrize(("case", "key"), [("torchvision", "lr_scheduler"), ("imagenet", "scheduler")])
def test_a_copy_that_counts_otherwise_is_not_believed(case: str, key: str, tmp_path: Path) -> None:
    path, run = saved(case, tmp_path)
    saved_ = loaded(path)
    saved_["epoch"] += 1 if case == "torchvision" else -1
    assert saved_[key]["last_epoch"] == run.epochs
    torch.save(saved_, path)
    epochs = ckptconv.open(path).progress.epochs
    assert isinstance(epochs, Unknown)
    assert run.epochs in [c.value for c in epochs.candidates]
    assert_same(saved_, loaded(through_neutral(path, tmp_path)))
    convert(path, tmp_path / "told.pth", set_={"epochs": str(run.epochs)}, allow=OPAQUE)
    assert loaded(tmp_path / "told.pth")["epoch"] == saved_["epoch"]
    assert value_of(ckptconv.open(tmp_path / "told.pth").progress.epochs) == run.epochs


@pytest.mark.parametrize(
    ("keys", "name"),
    [
        ({"model": "model", "epoch": 1, "args": {"lr": 0.1}}, "run.pt"),
        ({"model": "model", "iteration": 5}, "run.pth"),
        ({"state_dict": "model", "arch": "net", "epoch": 1}, "run.pt"),
        ({"state_dict": "model", "name": "run", "epoch": 1, "best": 0.5}, "run.pt"),
        ({"model": "model", "iter_num": 3}, "ckpt.pt"),
        ({"model": "model", "trainer": {"iteration": 4}}, "run.pt"),
        ({"state_dict": "model", "meta": {"epoch": 3}}, "run.pt"),
        ({"model": "model", "epoch": 3, "updates": 4}, "last.pt"),
    ],
)
def test_what_anybody_writes_is_taken_for_no_program_of_the_table(
    keys: dict[str, Any], name: str, tmp_path: Path
) -> None:
    run = Run()
    run.update()
    value = {key: run.model.state_dict() if part == "model" else part for key, part in keys.items()}
    torch.save({**value, "optimizer": run.optimizer.state_dict()}, tmp_path / name)
    checkpoint = ckptconv.open(tmp_path / name)
    assert checkpoint.provenance.dialect == "plain"
    assert isinstance(checkpoint.progress.epochs, Unknown)


def test_samples_within_an_epoch_end_with_it_and_stop_another_batch(tmp_path: Path) -> None:
    path, _ = saved("composer", tmp_path)
    edited = loaded(through_neutral(path, tmp_path, epochs="2", batch_in_epoch="0"))
    timestamp = edited["state"]["timestamp"]["Timestamp"]
    assert [timestamp[key] for key in ("epoch", "epoch_in_iteration", "sample_in_epoch")] == [2, 2, 0]
    with pytest.raises(CkptError) as caught:
        convert(path, tmp_path / "no.pt", set_={"batch_in_epoch": "2"}, allow=OPAQUE)
    assert [p.code for p in caught.value.problems] == ["residue-stale"]
    assert caught.value.problems[0].loc[-1] == "sample_in_epoch"


def test_totals_that_move_with_the_step_must_be_told(tmp_path: Path) -> None:
    path, _ = saved("composer", tmp_path)
    with pytest.raises(CkptError) as caught:
        convert(path, tmp_path / "no.pt", set_={"step": "40"}, allow=OPAQUE)
    assert [(p.code, p.loc[-1]) for p in caught.value.problems] == [("residue-stale", "sample")]
