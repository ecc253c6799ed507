"""`diff`: what is the same is, what is not is named with its size and place, in any two formats."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from ckptconv import convert, differing_values
from ckptconv.detect import open
from ckptconv.difference import compare
from ckptconv.differing_values import Tolerance
from ckptconv.document import Checkpoint, Known, Param, Progress, Unknown
from ckptconv.errors import CkptError
from ckptconv.schema import schema_problems
from ckptconv.skeleton import skeleton_of
from ckptconv.tensor import StoredTensor
from tests.support.command import FIXTURES, invoke, run

RUN = FIXTURES / "plain" / "mlp-adamw" / "run.pt"
TEMPLATE = FIXTURES / "keras3" / "mlp-adamw-fresh" / "ckpt-1"


def document(**tensors: np.ndarray) -> Checkpoint:
    provenance = replace(open(RUN).provenance, source="made")
    params = {name: Param(name=name, tensor=StoredTensor.of_array(array)) for name, array in tensors.items()}
    return Checkpoint(progress=Progress(step=Unknown(reason="none")), params=params, provenance=provenance)


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("converted") / "ckpt-1"
    convert(RUN, target, template=TEMPLATE)
    return target


def test_a_run_and_its_conversion_to_another_framework_are_the_same(converted: Path) -> None:
    for first, second in ((RUN, converted), (converted, RUN)):
        found = compare(first, second)
        assert found.same
        assert found.carried
        assert found.compared == found.equal == 12


def test_a_run_and_its_archive_are_the_same_under_their_own_names(tmp_path: Path) -> None:
    convert(RUN, tmp_path / "run", to="neutral")
    found = compare(RUN, tmp_path / "run")
    assert found.same
    assert not found.carried
    assert found.compared == found.equal == 12


def test_the_first_element_that_differs_is_named() -> None:
    ours = np.arange(12, dtype=np.float32).reshape(3, 4)
    theirs = ours.copy()
    theirs[1, 2], theirs[2, 0] = 7, 8.5
    (found,) = compare(document(w=ours), document(w=theirs)).tensors
    assert (found.address, found.kind, found.at, found.differing) == (("param", "w"), "values", (1, 2), 2)
    assert (found.max_abs, found.max_rel) == (1.0, pytest.approx(1 / 7))


def test_values_within_the_tolerance_are_the_same_and_said_not_to_be_bit_equal() -> None:
    ours = np.array([1, 2, 3], np.float32)
    found = compare(document(w=ours), document(w=ours + np.float32(1e-6)), tolerance=Tolerance(relative=1e-5))
    assert found.same
    assert [t.kind for t in found.tensors] == ["within"]
    assert not compare(document(w=ours), document(w=ours + 1), tolerance=Tolerance(absolute=0.5)).same


def test_bits_decide_where_no_tolerance_is_given() -> None:
    ours, theirs = np.array([0.0, np.nan], np.float32), np.array([-0.0, np.nan], np.float32)
    (found,) = compare(document(w=ours), document(w=theirs)).tensors
    assert (found.kind, found.at, found.differing, found.max_abs) == ("values", (0,), 1, 0.0)
    assert compare(document(w=ours), document(w=theirs), tolerance=Tolerance(absolute=1e-9)).same
    payload = np.array([0x7FC00001], np.uint32).view(np.float32)
    assert not compare(document(w=payload), document(w=np.array([np.nan], np.float32))).same


def test_another_dtype_is_a_difference_unless_a_tolerance_is_given() -> None:
    ours = np.array([1.0, 2.5], np.float32)
    theirs = ours.astype(ml_dtypes.bfloat16)
    (found,) = compare(document(w=ours), document(w=theirs)).tensors
    assert (found.kind, found.first, found.second) == ("dtype", "float32 [2]", "bfloat16 [2]")
    assert compare(document(w=ours), document(w=theirs), tolerance=Tolerance(absolute=1e-9)).same


def test_shapes_and_names_that_only_one_side_has_are_named() -> None:
    one = document(a=np.zeros((2, 3)), b=np.ones(2))
    other = document(a=np.zeros((3, 2)), c=np.ones(2))
    found = {t.address[1]: t.kind for t in compare(one, other).tensors}
    assert found == {"a": "shape", "b": "only-first", "c": "only-second"}


def test_a_step_that_was_lost_is_a_difference() -> None:
    kept = document(w=np.ones(2))
    kept = replace(kept, progress=Progress(step=Known(value=9)))
    found = compare(kept, document(w=np.ones(2)))
    assert [(f.field, f.first, f.second) for f in found.fields] == [("step", 9, None)]
    assert not found.same


def test_windows_of_both_sides_meet_whatever_their_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(differing_values, "WINDOW_ELEMENTS", 7)
    ours = np.arange(60, dtype=np.float64).reshape(5, 12)
    turned = StoredTensor.of_array(np.ascontiguousarray(ours.T))
    from ckptconv.ops import Permute

    one, other = document(w=ours), document(w=ours)
    other = replace(other, params={"w": replace(other.params["w"], tensor=turned.apply(Permute((1, 0))))})
    assert compare(one, other).equal == 1
    changed = ours.copy()
    changed[3, 11] += 1
    (found,) = compare(one, document(w=changed)).tensors
    assert found.at == (3, 11)


@settings(max_examples=60, deadline=None)
@given(
    arrays.array_shapes(max_dims=3, max_side=4).flatmap(
        lambda shape: st.tuples(
            *[arrays.arrays(np.float32, shape, elements=st.floats(-8, 8, width=32)) for _ in range(2)]
        )
    )
)
def test_what_numpy_finds(pair: tuple[np.ndarray, np.ndarray]) -> None:
    ours, theirs = pair
    found = compare(document(w=ours), document(w=theirs)).tensors
    differing = ours.view(np.uint32) != theirs.view(np.uint32)
    if not differing.any():
        assert found == ()
        return
    (tensor,) = found
    assert tensor.differing == differing.sum()
    assert tensor.at == tuple(np.argwhere(differing)[0])
    assert tensor.max_abs == np.abs(ours.astype(np.float64) - theirs).max()


def test_a_description_has_no_values_to_compare() -> None:
    with pytest.raises(CkptError) as caught:
        compare(skeleton_of(open(RUN)), RUN)
    assert caught.value.problems[0].code == "usage"


def test_the_command_line_tells_same_different_and_trouble_apart(converted: Path, tmp_path: Path) -> None:
    assert invoke("diff", RUN, converted)[0] == 0
    code, shown = invoke("diff", converted, TEMPLATE, "--json")
    assert code == 1
    told = json.loads(shown)
    assert schema_problems(told, "report", "difference") == []
    assert told["fields"][0] == {"field": "step", "first": 9, "second": 0}
    assert {tensor["kind"] for tensor in told["tensors"]} == {"values"}
    assert run("diff", RUN, tmp_path / "nothing.pt").returncode == 2
    stopped = run("diff", FIXTURES / "plain" / "conv-bn-embedding" / "run.pt", converted)
    assert stopped.returncode == 2
    assert "Traceback" not in stopped.stderr


def with_optimizer(checkpoint: Checkpoint, **changes: object) -> Checkpoint:
    (optimizer,) = checkpoint.optimizers
    return replace(checkpoint, optimizers=(replace(optimizer, **changes),), residue=None)


def fields_of(one: Checkpoint | Path, other: Checkpoint | Path) -> dict[str, tuple[object, object]]:
    return {field.field: (field.first, field.second) for field in compare(one, other).fields}


def test_what_an_optimizer_does_otherwise_is_told() -> None:
    run, (optimizer,) = open(RUN), open(RUN).optimizers
    (group,) = optimizer.groups
    halves = tuple(replace(group, params=names) for names in (group.params[:2], group.params[2:]))
    other = replace(group, hyperparameters={**group.hyperparameters, "beta_1": Known(value=0.5)})
    steps = dict.fromkeys(group.params, 9)
    for changes, expected in (
        ({"groups": (other,)}, {"optimizer.group 0.beta_1": (0.9, 0.5)}),
        ({"groups": halves}, {"optimizer.group 0.parameters": (", ".join(sorted(group.params[2:])), "")}),
        ({"algorithm": "adam"}, {"optimizer.algorithm": ("adamw", "adam")}),
        (
            {"step": Known(value=7), "param_steps": {**steps, "fc1.bias": 7}},
            {"optimizer.step": (9, 7), "optimizer.step of fc1.bias": (9, 7)},
        ),
    ):
        ours = with_optimizer(run, param_steps=steps)
        assert fields_of(ours, with_optimizer(ours, **changes)) == expected


def test_an_optimizer_without_slots_that_one_side_lacks_is_a_difference() -> None:
    sgd = open(FIXTURES / "plain" / "linear-sgd-9-steps" / "run.pt")
    (optimizer,) = sgd.optimizers
    bare = replace(sgd, optimizers=(replace(optimizer, slots={}),), residue=None)
    without = replace(bare, optimizers=())
    assert fields_of(bare, without)["optimizer.algorithm"] == ("sgd", None)
    assert not compare(bare, without).same


def test_where_a_schedule_stands_is_told() -> None:
    scheduled = next(
        path
        for path in sorted((FIXTURES / "plain").glob("*/run.pt"))
        if any(isinstance(schedule.position, Known) for schedule in open(path).schedules)
    )
    ours = open(scheduled)
    moved = tuple(replace(schedule, position=Known(value=1234)) for schedule in ours.schedules)
    found = fields_of(ours, replace(ours, schedules=moved))
    assert found["schedule 0.position"][1] == 1234


def test_names_that_nothing_brings_together_are_paired_by_a_mapping_file(tmp_path: Path) -> None:
    """Two layers of one size in another order: by order alone each would be taken for the other."""
    rng = np.random.default_rng(0)
    arrays_ = {f"{layer}.weight": rng.standard_normal((4, 4)).astype(np.float32) for layer in ("a", "b")}
    one = document(**arrays_)
    other = document(**{"second/kernel": arrays_["a.weight"], "first/kernel": arrays_["b.weight"]})
    other = replace(
        other,
        params={name: other.params[name] for name in ("first/kernel", "second/kernel")},
    )
    with pytest.raises(CkptError):
        compare(one, other)
    rules = {
        "schema": "ckptconv/mapping",
        "schema_version": "1.0.0",
        "rules": [
            {"left": "a.weight", "right": "second/kernel", "axes": "x y -> x y"},
            {"left": "b.weight", "right": "first/kernel", "axes": "x y -> x y"},
        ],
    }
    found = compare(one, other, mapping=rules)
    assert found.same, found
    assert (found.carried, found.equal) == (True, 2)
    rules["rules"][0]["axes"] = "x y -> y x"
    assert [t.kind for t in compare(one, other, mapping=rules).tensors] == ["values"]


def test_both_are_carried_onto_a_template(converted: Path, tmp_path: Path) -> None:
    """A skeleton of the Keras model says what neither a torch file nor another torch file does."""
    skeleton = skeleton_of(open(TEMPLATE))
    found = compare(RUN, converted, template=skeleton)
    assert found.same, found
    assert (found.carried, found.compared) == (True, 12)
    different = compare(RUN, TEMPLATE, template=skeleton).tensors
    assert {t.address[-1] for t in different} == set(open(TEMPLATE).params)
    twice = compare(RUN, RUN, template=skeleton)
    assert twice.same
    assert twice.equal == 12
    with pytest.raises(CkptError) as caught:
        compare(RUN, RUN, template=skeleton, mapping={})
    assert caught.value.problems[0].code in ("usage", "schema-invalid")


def test_what_is_allowed_to_be_left_behind_is_still_a_difference() -> None:
    ours, theirs = open(RUN), open(TEMPLATE)
    one = Param(name="extra.weight", tensor=StoredTensor.of_array(np.ones((5, 7), np.float32)))
    bigger = replace(ours, params={**ours.params, "extra.weight": one}, residue=None)
    with pytest.raises(CkptError) as caught:
        compare(bigger, theirs)
    assert caught.value.problems[0].code == "param-unmatched"
    found = compare(bigger, theirs, allow=["param-unmatched"])
    assert [t.address for t in found.tensors if t.kind == "only-first"] == [("param", "extra.weight")]


def test_parts_of_both_sides_are_selected(tmp_path: Path) -> None:
    folder = tmp_path / "runs"
    folder.mkdir()
    (folder / "checkpoint-1.pt").write_bytes(RUN.read_bytes())
    convert(RUN, folder / "checkpoint-2.pt", set_={"step": "12"})
    assert compare(folder, RUN, selects=(["checkpoint-1"], [])).same
    moved = compare(folder, folder, selects=(["checkpoint-1"], ["checkpoint-2"])).fields
    assert ("step", 9, 12) in [(field.field, field.first, field.second) for field in moved]
    assert invoke("diff", folder, folder, "--select", "checkpoint-1")[0] == 0
    assert invoke("diff", folder, RUN, "--select-a", "checkpoint-1")[0] == 0
    assert run("diff", folder, RUN, "--select-a", "checkpoint-7").returncode == 2


def test_optimizers_that_do_not_convert_are_a_difference_and_no_trouble() -> None:
    theirs = replace(open(TEMPLATE), residue=None)
    (optimizer,) = theirs.optimizers
    sgd = replace(theirs, optimizers=(replace(optimizer, algorithm="sgd", slots={}),))
    found = compare(RUN, sgd)
    assert {field.field for field in found.fields} >= {"optimizer.algorithm", "step"}
    kinds = {(t.address[0], t.kind) for t in found.tensors}
    assert kinds == {("param", "values"), ("slot", "only-first")}
    without = compare(RUN, replace(theirs, optimizers=()))
    assert ("optimizer.algorithm", "adamw", None) in [(f.field, f.first, f.second) for f in without.fields]
    assert {t.kind for t in without.tensors if t.address[0] == "slot"} == {"only-first"}


def test_an_unknown_step_is_compared_as_it_stands(converted: Path) -> None:
    run, unknown = open(RUN), Unknown(reason="not stored")
    (optimizer,) = run.optimizers
    uncounted = replace(
        run,
        progress=replace(run.progress, step=unknown),
        optimizers=(replace(optimizer, step=unknown, param_steps={}),),
        residue=None,
    )
    found = compare(uncounted, converted)
    assert [(f.field, f.first, f.second) for f in found.fields] == [("step", None, 9)]
    assert found.compared == found.equal == 12
