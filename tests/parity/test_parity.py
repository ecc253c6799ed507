"""The parity matrix: every optimizer, every ordered pair of frameworks that have it, float64 and float32.

`pytest -m parity` runs the whole; the quick suite a part that has every kind of transition once.
`python -m tests.parity.measure` runs it and writes what came of it into the catalog.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest

pytest.importorskip("torch")
pytest.importorskip("tensorflow")
pytest.importorskip("tf_keras")

from ckptconv.errors import CkptError
from tests.parity.matrix import FACTORED, Place, Runs, cases, cells, complaints, expected

QUICK = [
    ("sgd dampening", "torch", "keras3"),
    ("adam eps1e-7", "torch", "tf_keras"),
    ("adamw wd.05", "keras3", "torch"),
    ("nadam psi.004", "torch", "tf_keras_legacy"),
    ("nadam psi1", "keras3", "torch"),
    ("nadam psi1", "torch", "tf_keras"),
    ("adamax eps1e-7", "tf_keras_legacy", "torch"),
    ("adagrad eps1e-2", "keras3", "torch"),
    ("adagrad eps1e-2", "tf_keras", "tf_keras_legacy"),
    ("adadelta eps1e-6", "tf_keras_legacy", "keras3"),
    ("rmsprop_centered_momentum eps1e-7", "torch", "tf_keras"),
    ("rmsprop_centered_momentum eps1e-7", "keras3", "torch"),
    ("rmsprop eps1e-7", "torch", "tf_keras_legacy"),
    ("lion wd.01", "keras3", "tf_keras"),
    ("ftrl l1l2", "tf_keras_legacy", "keras3"),
    ("asgd default", "torch", "torch"),
    ("adafactor default", "torch", "keras3"),
    ("adafactor default", "keras3", "torch"),
    ("muon nesterov", "torch", "keras3"),
    ("muon full", "keras3", "torch"),
]
REFUSED = [Place("adafactor default", *rest, "float32") for _, *rest in sorted(FACTORED)]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("parity"))


@pytest.mark.parametrize(("name", "source", "target"), QUICK)
def test_a_part(name: str, source: str, target: str, runs: Runs) -> None:
    assert complaints(runs.cell(Place(name, source, target, "mlp", "float64"))) == []


@pytest.mark.parametrize("place", REFUSED)
def test_factors_of_a_convolution_are_refused(place: Place, runs: Runs) -> None:
    with pytest.raises(CkptError) as caught:
        runs.cell(place)
    assert {problem.code for problem in caught.value.problems} == {"form-mismatch"}
    assert {problem.loc[2] for problem in caught.value.problems} == {"row_variance", "column_variance"}


@pytest.mark.parametrize("place", REFUSED)
def test_factors_of_a_convolution_begin_anew_where_that_is_allowed(place: Place, runs: Runs) -> None:
    cell = runs.cell(place, allow=("form-mismatch",), controls=False)
    assert cell.verdict == "lossy"
    assert 1e-5 < cell.error < 10


@pytest.mark.slow
@pytest.mark.parity
@pytest.mark.parametrize("place", cells(), ids="-".join)
def test_goes_on_as_if_nothing_had_happened(
    place: Place, runs: Runs, record_property: Callable[[str, object], None]
) -> None:
    cell = runs.cell(place)
    record_property("place", [*place])
    for name in ("verdict", "error", "stated"):
        record_property(name, getattr(cell, name))
    assert complaints(cell) == []


def test_everything_that_the_catalog_converts_is_in_the_matrix() -> None:
    there = {(cases()[place.case].algorithm, *place[1:4]) for place in cells()}
    assert {*expected()} - there == FACTORED
