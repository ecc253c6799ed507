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

from ckptconv import convert, difference
from ckptconv.detect import open
from ckptconv.difference import Tolerance, compare
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
    monkeypatch.setattr(difference, "WINDOW_ELEMENTS", 7)
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
