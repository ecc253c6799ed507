"""The Lightning dialect on what Lightning wrote: progress, the way back, edits, carried runs. Needs none."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import ckptconv
from ckptconv.detect import read_raw
from ckptconv.dialects.lightning import Lightning
from ckptconv.document import Candidate, Checkpoint, Known, Unknown, value_of
from ckptconv.errors import CkptError
from ckptconv.rawtree import DictNode, ListNode, Node, Opaque, RawTree, at, transform, walk
from ckptconv.rawtree import Path as Where
from ckptconv.supply import set_fields
from ckptconv.tensor import TensorRef
from tests.support.command import convert_here, inspect_here, refused_here

FIXTURES = Path(__file__).parents[2] / "fixtures"
LIGHTNING = FIXTURES / "lightning"
CASES = sorted(path.parent.name for path in LIGHTNING.glob("*/run.ckpt"))
TRAINING = [case for case in CASES if case != "weights-only"]
FIT: Where = ("loops", "fit_loop")
UPDATES: Where = (*FIT, "epoch_loop.automatic_optimization.optim_progress", "optimizer", "step", "total")
BATCHES: Where = (*FIT, "epoch_loop.batch_progress")
EPOCHS: Where = (*FIT, "epoch_progress", "current")


def raw_of(case: str) -> RawTree:
    return read_raw(LIGHTNING / case / "run.ckpt", "pytorch")


def lifted(case: str) -> Checkpoint:
    return Lightning().lift(raw_of(case))


def expected(case: str) -> dict[str, Any]:
    truth: dict[str, Any] = json.loads((LIGHTNING / case / "expected.json").read_text(encoding="utf-8"))
    return truth


def flat(root: Node) -> list[tuple[Where, object]]:
    """Every leaf, tensors as their bits."""
    leaves = []
    for path, leaf in walk(root):
        bits = (leaf.spec, leaf.read().tobytes()) if isinstance(leaf, TensorRef) else leaf
        leaves.append((path, bits if not isinstance(leaf, Opaque) else leaf.name))
    return leaves


def changed(raw: RawTree, values: dict[Where, Node]) -> RawTree:
    """The tree with other leaves."""
    return replace(raw, root=transform(raw.root, lambda path, node: values.get(path, node)))


def without(raw: RawTree, key: str) -> RawTree:
    root = raw.root
    assert isinstance(root, DictNode)
    return replace(raw, root=replace(root, items=tuple((k, v) for k, v in root.items if k != key)))


def tracker(root: Node, path: Where) -> dict[str, object]:
    node = at(root, path)
    assert isinstance(node, DictNode)
    return {str(key): value for key, value in node.items}


def edited(checkpoint: Checkpoint, **values: float) -> Node:
    return Lightning().lower(set_fields(checkpoint, values)).root


@pytest.mark.parametrize("case", CASES)
def test_progress_is_what_lightning_goes_on_from(case: str) -> None:
    checkpoint, truth = lifted(case), expected(case)
    facts = {name: value_of(getattr(checkpoint.progress, name)) for name in truth["progress"]}
    assert facts == truth["progress"]
    assert [value_of(o.step) for o in checkpoint.optimizers] == truth["optimizers"]
    assert checkpoint.kind == ("training" if truth["optimizers"] else "weights")
    assert all(o.param_order == "declaration-order" for o in checkpoint.optimizers)


@pytest.mark.parametrize("case", CASES)
def test_it_is_detected_and_says_who_wrote_it(case: str) -> None:
    provenance = ckptconv.open(LIGHTNING / case / "run.ckpt").provenance
    assert (provenance.format, provenance.dialect) == ("pytorch", "lightning")
    assert provenance.producer.startswith(("Lightning 2.", "Lightning 1."))


@pytest.mark.parametrize("case", CASES)
def test_the_way_back_is_exact(case: str) -> None:
    raw = raw_of(case)
    lowered = Lightning().lower(Lightning().lift(raw))
    assert flat(lowered.root) == flat(raw.root)
    assert lowered.attributes == raw.attributes


@pytest.mark.parametrize("case", CASES)
def test_every_tensor_is_what_torch_saved(case: str) -> None:
    checkpoint = lifted(case)
    found = {
        (tuple(t.shape), hashlib.sha256(t.read().tobytes()).hexdigest()) for _, t in checkpoint.tensors()
    }
    for name, (_, shape, digest) in expected(case)["tensors"].items():
        if not name.endswith("/step"):
            assert (tuple(shape), digest) in found, name


def test_an_edited_step_reaches_every_counter() -> None:
    before = raw_of("mid-epoch").root
    root = edited(lifted("mid-epoch"), step=100, learning_rate=0.01 * 0.5**25)
    assert at(root, ("global_step",)) == 100
    assert tracker(root, UPDATES) == {"ready": 100, "completed": 100}
    zeroed = tracker(root, (*UPDATES[:-2], "zero_grad", "total"))
    assert zeroed == {"ready": 100, "started": 100, "completed": 100}
    assert tracker(root, (*BATCHES, "total")) == {
        "ready": 100, "started": 100, "processed": 100, "completed": 99,
    }  # fmt: skip
    assert at(root, (*FIT, "epoch_loop.state_dict", "_batches_that_stepped")) == 99
    assert tracker(root, (*FIT, "epoch_loop.scheduler_progress", "total")) == {"ready": 100, "completed": 100}
    scheduler = tracker(root, ("lr_schedulers", 0))
    assert (scheduler["last_epoch"], scheduler["_step_count"]) == (100, 101)
    steps = [at(root, ("optimizer_states", 0, "state", n, "step")) for n in range(4)]
    assert [step.read().item() for step in steps if isinstance(step, TensorRef)] == [100.0] * 4
    for path in ((*BATCHES, "current"), EPOCHS, (*FIT, "epoch_progress", "total")):
        assert tracker(root, path) == tracker(before, path)
    other = edited(lifted("sgd"), step=12, learning_rate=0.05 * 0.5**3)
    assert at(other, ("global_step",)) == tracker(other, UPDATES)["completed"] == 12
    assert tracker(other, ("lr_schedulers", 0))["last_epoch"] == 12


def test_the_learning_rate_follows_an_edited_step() -> None:
    root = edited(lifted("mid-epoch"), step=100)
    assert at(root, ("optimizer_states", 0, "param_groups", 0, "lr")) == pytest.approx(0.01 * 0.5**25)
    checkpoint = lifted("mid-epoch")
    (optimizer,) = checkpoint.optimizers
    facts = {**optimizer.groups[0].hyperparameters, "learning_rate": Known(value=0.3)}
    other = replace(optimizer, groups=(replace(optimizer.groups[0], hyperparameters=facts),))
    with pytest.raises(CkptError) as caught:
        edited(replace(checkpoint, optimizers=(other,)), step=100)
    assert [p.code for p in caught.value.problems] == ["residue-stale"]
    assert caught.value.problems[0].loc[-1] == "learning_rate"


def test_a_schedule_of_epochs_stays_when_the_step_is_edited_and_moves_with_the_epochs() -> None:
    root = edited(lifted("after-fit"), step=60)
    assert at(root, ("global_step",)) == 60
    assert tracker(root, ("lr_schedulers", 0))["last_epoch"] == 2
    moved = edited(lifted("after-fit"), epochs=7)
    scheduler = tracker(moved, ("lr_schedulers", 0))
    (base,), (rate,) = scheduler["base_lrs"].items, scheduler["_last_lr"].items
    assert (scheduler["last_epoch"], rate) == (7, base * 0.5)  # halved every fourth epoch
    assert at(moved, ("optimizer_states", 0, "param_groups", 0, "lr")) == rate


def test_the_batches_of_an_accumulating_run_must_be_told() -> None:
    with pytest.raises(CkptError) as caught:
        edited(lifted("accumulating"), step=40, learning_rate=0.01 * 0.5**10)
    assert (caught.value.problems[0].code, caught.value.problems[0].loc) == (
        "residue-stale",
        ("progress", "micro_steps"),
    )
    root = edited(lifted("accumulating"), step=40, learning_rate=0.01 * 0.5**10, micro_steps=60)
    assert (at(root, ("global_step",)), tracker(root, (*BATCHES, "total"))["processed"]) == (40, 60)


def test_optimizers_count_for_themselves_and_global_step_for_all() -> None:
    checkpoint = lifted("gan")
    assert isinstance(checkpoint.progress.step, Unknown)
    assert {c.value for c in checkpoint.progress.step.candidates} == {4, 8}
    generator, discriminator = checkpoint.optimizers
    steps = dict.fromkeys(discriminator.param_steps, 11)
    more = replace(discriminator, step=Known(value=11), param_steps=steps)
    fact = Known(value=4, status="supplied", source="--set")
    progress = replace(checkpoint.progress, micro_steps=fact)
    with pytest.raises(CkptError) as caught:
        Lightning().lower(replace(checkpoint, optimizers=(generator, more)))
    assert caught.value.problems[0].code == "residue-stale"
    root = Lightning().lower(replace(checkpoint, optimizers=(generator, more), progress=progress)).root
    manual: Where = (*FIT, "epoch_loop.manual_optimization.optim_step_progress", "total")
    assert at(root, ("global_step",)) == tracker(root, manual)["completed"] == 15
    assert tracker(root, UPDATES)["completed"] == 0
    assert at(root, (*FIT, "epoch_loop.state_dict", "_batches_that_stepped")) == 3


@pytest.mark.parametrize("case", ["mid-epoch", "epoch-end", "validated", "last-batch", "accumulating", "sgd"])
def test_edited_epochs_and_batches_leave_the_loops_between_two_hooks(case: str) -> None:
    root = edited(lifted(case), epochs=5, batch_in_epoch=2)
    begun = {"ready": 6, "started": 6, "processed": 5, "completed": 5}
    assert tracker(root, EPOCHS) == tracker(root, (*FIT, "epoch_progress", "total")) == begun
    assert set(tracker(root, (*BATCHES, "current")).values()) == {2}
    assert at(root, (*BATCHES, "is_last_batch")) is False
    assert len(set(tracker(root, (*BATCHES, "total")).values())) == 1
    assert at(root, ("epoch",)) == 5
    root = edited(lifted(case), epochs=5, batch_in_epoch=0)
    assert set(tracker(root, EPOCHS).values()) == {5}
    assert set(tracker(root, (*BATCHES, "current")).values()) == {0}
    steps = value_of(lifted(case).optimizers[0].step)
    assert at(root, (*FIT, "epoch_loop.state_dict", "_batches_that_stepped")) == steps


def test_fractional_epochs_have_no_place_in_loops() -> None:
    with pytest.raises(CkptError) as caught:
        edited(lifted("epoch-end"), epochs=1.5)
    assert caught.value.problems[0].code == "progress-range"


def older(case: str, version: str, epoch: int, step: int) -> RawTree:
    """As Lightning before 1.6 wrote it: no loops, the running epoch plus 1."""
    raw = without(raw_of(case), "loops")
    values: dict[Where, Node] = {
        ("pytorch-lightning_version",): version,
        ("epoch",): epoch,
        ("global_step",): step,
    }
    return changed(raw, values)


@pytest.mark.parametrize("version", ["0.9.0", "1.0.8", "1.5.10"])
def test_before_1_6_epoch_and_global_step_are_ambiguous(version: str) -> None:
    raw = older("sgd", version, 2, 6)
    checkpoint = Lightning().lift(raw)
    step = checkpoint.progress.step
    assert step == checkpoint.optimizers[0].step
    assert isinstance(step, Unknown)
    assert [c.value for c in step.candidates] == [6, 5]
    epochs = checkpoint.progress.epochs
    assert isinstance(epochs, Unknown)
    assert [c.value for c in epochs.candidates] == [2, 1]
    assert flat(Lightning().lower(checkpoint).root) == flat(raw.root)
    for reading in (1, 2):
        assert at(edited(checkpoint, epochs=reading), ("epoch",)) == 2
    with pytest.raises(CkptError) as caught:
        edited(checkpoint, epochs=3)
    assert (caught.value.problems[0].code, caught.value.problems[0].loc) == ("residue-stale", ("epoch",))
    for reading in (5, 6):
        assert at(edited(checkpoint, step=reading), ("global_step",)) == 6
    with pytest.raises(CkptError) as caught:
        edited(checkpoint, step=8)
    assert (caught.value.problems[0].code, caught.value.problems[0].loc) == (
        "residue-stale",
        ("global_step",),
    )


def test_before_1_6_weights_alone_leave_the_step_open() -> None:
    raw = changed(without(raw_of("weights-only"), "loops"), {("pytorch-lightning_version",): "1.5.10"})
    checkpoint = Lightning().lift(raw)
    assert isinstance(checkpoint.progress.step, Unknown)
    assert [c.value for c in checkpoint.progress.step.candidates] == [3, 2]
    assert flat(Lightning().lower(checkpoint).root) == flat(raw.root)


def test_an_own_step_wins_over_global_step_of_before_1_6() -> None:
    checkpoint = lifted("before-1.6")
    assert at(raw_of("before-1.6").root, ("global_step",)) == 7
    assert value_of(checkpoint.progress.step) == 6
    assert at(edited(checkpoint, step=40), ("global_step",)) == 41


def test_before_1_6_two_optimizers_share_a_count_of_batches() -> None:
    raw = older("gan", "1.4.0", 2, 4)
    checkpoint = Lightning().lift(raw)
    assert [value_of(o.step) for o in checkpoint.optimizers] == [4, 8]
    assert flat(Lightning().lower(checkpoint).root) == flat(raw.root)


def test_the_layout_of_1_6_to_1_9() -> None:
    now = ("automatic_optimization.optim_progress", "manual_optimization.optim_step_progress")
    then = ("batch_loop.optimizer_loop.optim_progress", "batch_loop.manual_loop.optim_step_progress")
    names = {f"epoch_loop.{a}": f"epoch_loop.{b}" for a, b in zip(now, then, strict=True)}

    def renamed(path: Where, node: Node) -> Node:
        if path == FIT and isinstance(node, DictNode):
            return replace(node, items=tuple((names.get(str(k), k), v) for k, v in node.items))
        return "1.8.6" if path == ("pytorch-lightning_version",) else node

    raw = raw_of("mid-epoch")
    raw = replace(raw, root=transform(raw.root, renamed))
    checkpoint = Lightning().lift(raw)
    assert value_of(checkpoint.progress.epochs) == 1
    root = edited(checkpoint, step=8, learning_rate=0.0025)
    there: Where = (*FIT, "epoch_loop.batch_loop.optimizer_loop.optim_progress", "optimizer", "step", "total")
    assert tracker(root, there)["completed"] == 8


def test_an_edited_step_of_two_optimizers_in_turn_counts_twice() -> None:
    root = edited(lifted("two-optimizers-1.9"), step=20)
    there: Where = (*FIT, "epoch_loop.batch_loop.optimizer_loop.optim_progress", "optimizer", "step", "total")
    assert at(root, ("global_step",)) == tracker(root, there)["completed"] == 40
    assert tracker(root, (*BATCHES, "total"))["processed"] == 20
    assert at(root, (*FIT, "epoch_loop.state_dict", "_batches_that_stepped")) == 19


def test_without_loops_the_epoch_is_open() -> None:
    raw = without(raw_of("mid-epoch"), "loops")
    checkpoint = Lightning().lift(raw)
    assert isinstance(checkpoint.progress.epochs, Unknown)
    assert [c.value for c in checkpoint.progress.epochs.candidates] == [1, 2]
    assert value_of(checkpoint.progress.step) == 5
    assert flat(Lightning().lower(checkpoint).root) == flat(raw.root)


def test_what_loss_scaling_skipped_is_in_global_step_only() -> None:
    raw = changed(
        raw_of("epoch-end"), {("global_step",): 5, (*UPDATES, "completed"): 5, (*UPDATES, "ready"): 5}
    )
    root = raw.root
    assert isinstance(root, DictNode)
    scaler = DictNode(items=(("scale", 4096.0), ("growth_factor", 2.0), ("_growth_tracker", 3)))
    raw = replace(raw, root=replace(root, items=(*root.items, ("MixedPrecision", scaler))))
    checkpoint = Lightning().lift(raw)
    progress = checkpoint.progress
    assert (value_of(progress.step), value_of(progress.skipped_steps)) == (3, 2)
    assert value_of(progress.loss_scale) == 4096.0
    assert flat(Lightning().lower(checkpoint).root) == flat(raw.root)
    written = edited(checkpoint, step=8, micro_steps=10, learning_rate=0.0025)
    assert at(written, ("global_step",)) == tracker(written, UPDATES)["completed"] == 10


def test_a_loss_scaled_run_without_own_steps_leaves_the_step_open() -> None:
    raw = raw_of("sgd")
    root = raw.root
    assert isinstance(root, DictNode)
    scaler = DictNode(items=(("scale", 2.0),))
    raw = replace(raw, root=replace(root, items=(*root.items, ("native_amp_scaling_state", scaler))))
    step = Lightning().lift(raw).progress.step
    assert isinstance(step, Unknown)
    assert {c.value for c in step.candidates} == {6}
    assert all(isinstance(c, Candidate) for c in step.candidates)


def test_a_schedule_of_no_certain_optimizer_does_not_stay_behind_silently() -> None:
    raw = raw_of("gan")
    node = DictNode(items=(("base_lrs", ListNode(items=(0.5,))), ("last_epoch", 4), ("_step_count", 5)))
    raw = changed(raw, {("lr_schedulers",): ListNode(items=(node,))})
    checkpoint = Lightning().lift(raw)
    assert checkpoint.schedules[0].optimizer == "unknown"
    with pytest.raises(CkptError) as caught:
        edited(checkpoint, step=9, micro_steps=9)
    assert (caught.value.problems[0].code, caught.value.problems[0].loc) == (
        "residue-stale",
        ("lr_schedulers", 0, "last_epoch"),
    )


@pytest.mark.parametrize("odd", [-1, 1 << 63, 1.5, "3", None, True, ListNode(items=(1, 2)), DictNode()])
@pytest.mark.parametrize("case", ["mid-epoch", "gan", "weights-only"])
def test_what_is_no_count_is_kept_and_told_by_nothing(case: str, odd: Node) -> None:
    processed: Where = (*EPOCHS, "processed")
    places = [
        ("epoch",), ("global_step",), ("loops",), FIT, processed, EPOCHS, BATCHES, (*BATCHES, "total"),
        (*BATCHES, "current", "processed"), UPDATES, (*UPDATES, "completed"), (*BATCHES, "is_last_batch"),
    ]  # fmt: skip
    for place in places:
        raw = changed(raw_of(case), {place: odd})
        checkpoint = Lightning().lift(raw)
        assert flat(Lightning().lower(checkpoint).root) == flat(raw.root), place
        facts = [checkpoint.progress.epochs, checkpoint.progress.step, checkpoint.progress.micro_steps]
        assert all(isinstance(n := value_of(f), int | None) and 0 <= (n or 0) < 1 << 63 for f in facts), place
        if place == processed:
            assert isinstance(checkpoint.progress.epochs, Unknown)


def test_objects_of_the_user_are_named_and_kept() -> None:
    raw = raw_of("epoch-end")
    space = Opaque(kind="global", name="argparse.Namespace")
    checkpoint = Lightning().lift(changed(raw, {("hyper_parameters", "width"): space}))
    assert any("argparse.Namespace" in text for text in checkpoint.oddities)
    assert at(Lightning().lower(checkpoint).root, ("hyper_parameters", "width")) == space


def test_by_neutral_and_back_is_exact(tmp_path: Path) -> None:
    source = LIGHTNING / "mid-epoch" / "run.ckpt"
    neutral = convert_here(source, tmp_path / "neutral", "--to", "neutral")
    back = convert_here(neutral, tmp_path / "run.ckpt", "--to", "pytorch:lightning")
    assert flat(read_raw(back, "pytorch").root) == flat(read_raw(source, "pytorch").root)


def test_keras_and_back_onto_another_run(tmp_path: Path) -> None:
    """The template is of another moment, of which nothing stays."""
    source = LIGHTNING / "mid-epoch" / "run.ckpt"
    template = FIXTURES / "keras3" / "lightning-net" / "artifact" / "ckpt-1"
    keras = convert_here(source, tmp_path / "ckpt-1", "--template", template)
    assert inspect_here(keras)["progress"]["step"]["value"] == 5
    for case in ("epoch-end", "validated", "last-batch"):
        back = convert_here(keras, tmp_path / f"{case}.ckpt", "--template", LIGHTNING / case / "run.ckpt")
        checkpoint, before = ckptconv.open(back), lifted("mid-epoch")
        for name in ("step", "epochs", "batch_in_epoch", "micro_steps"):
            assert value_of(getattr(checkpoint.progress, name)) == value_of(getattr(before.progress, name))
        root = read_raw(back, "pytorch").root
        assert at(root, ("global_step",)) == tracker(root, UPDATES)["completed"] == 5
        assert tracker(root, EPOCHS) == {"ready": 2, "started": 2, "processed": 1, "completed": 1}
        assert set(tracker(root, (*BATCHES, "current")).values()) == {2}
        assert tracker(root, ("lr_schedulers", 0))["last_epoch"] == 5
        for name, param in before.params.items():
            assert param.read().tobytes() == checkpoint.params[name].read().tobytes()
        for slot, by_param in before.optimizers[0].slots.items():
            for name, tensor in by_param.items():
                assert tensor.read().tobytes() == checkpoint.optimizers[0].slots[slot][name].read().tobytes()


def test_a_schedule_of_updates_does_not_go_into_one_of_epochs(tmp_path: Path) -> None:
    source, template = LIGHTNING / "mid-epoch" / "run.ckpt", LIGHTNING / "after-fit" / "run.ckpt"
    problems = refused_here("convert", source, tmp_path / "run.ckpt", "--template", template)
    assert [(problem["code"], tuple(problem["loc"])) for problem in problems] == [
        ("schedule-unsupported", ("schedules", "scheduler"))
    ]


def test_a_run_that_tells_no_batches_cannot_fill_the_loops(tmp_path: Path) -> None:
    source = FIXTURES / "keras3" / "lightning-net" / "artifact" / "ckpt-1"
    problems = refused_here(
        "convert", source, tmp_path / "run.ckpt", "--template", LIGHTNING / "epoch-end" / "run.ckpt"
    )
    assert {problem["code"] for problem in problems} <= {"progress-unknown", "schedule-unsupported"}


def test_lightning_needs_a_template(tmp_path: Path) -> None:
    source = FIXTURES / "plain" / "mlp-adamw" / "run.pt"
    problems = refused_here("convert", source, tmp_path / "run.ckpt", "--to", "pytorch:lightning")
    assert [problem["code"] for problem in problems] == ["template-required"]
