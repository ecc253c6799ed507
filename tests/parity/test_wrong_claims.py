"""A wrong claim in the catalog makes the parity test fail: signs, forms, slot order, steps, amounts.

Every claim that the tables make of an algorithm that crosses is tried where it may show, until it does.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

pytest.importorskip("torch")
pytest.importorskip("tensorflow")
pytest.importorskip("tf_keras")

from ckptconv.errors import CkptError
from tests.parity.matrix import STEPS, Case, Place, Runs, cases, complaints, limit, number, pairs
from tests.parity.perturbed import KINDS, Claim, claiming, claims, crossing

NOT_CLAIMED = {
    ("sgd", "slots"): "it has one slot",
    ("sgd", "betas"): "it has none",
    ("adam", "amount"): "its transitions change no number",
    ("adamw", "amount"): "its transitions are Adam's",
    ("adadelta", "form"): "all four classes follow one rule",
    ("adadelta", "betas"): "it has none",
    ("adadelta", "amount"): "it has no transition",
    ("adafactor", "betas"): "it has none",
    ("adafactor", "form"): "its epsilon_1 is below the square of every gradient, wherever it stands",
    ("adagrad", "slots"): "it has one slot",
    ("adagrad", "betas"): "it has none",
    ("adamax", "amount"): "its transition changes no number",
    ("ftrl", "form"): "all three classes follow one rule",
    ("ftrl", "betas"): "it has none",
    ("ftrl", "amount"): "it has no transition",
    ("lion", "form"): "all three classes follow one rule",
    ("lion", "slots"): "it has one slot",
    ("lion", "amount"): "it has no transition",
    ("nadam", "form"): "all four classes follow one rule where nothing decays",
    ("rmsprop", "betas"): "it has none",
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("claims"))


def ready(case: Case, source: str, target: str, runs: Runs) -> Place:
    """A cell whose run and template are made with the right claims."""
    runs.of(case, source, "mlp", "float64")
    runs.template(case, target, "mlp", "float64")
    return Place(case.name, source, target, "mlp", "float64")


def shown(claim: Claim, runs: Runs) -> Iterator[bool]:
    """Cell by cell: whether it is refused, or is not what it should be."""
    for case, source, target in claim.places():
        place = ready(case, source, target, runs)
        with claiming(claim):
            try:
                cell = runs.cell(place, controls=False)
            except CkptError:
                yield True  # it does not even convert
            else:
                yield complaints(cell) != []


@pytest.mark.slow
@pytest.mark.parametrize("claim", [*claims()], ids=str)
def test_a_wrong_claim_shows(claim: Claim, runs: Runs) -> None:
    assert any(shown(claim, runs))


@pytest.mark.slow
@pytest.mark.parametrize("off", [-1, 1])
@pytest.mark.parametrize("algorithm", crossing())
def test_a_step_off_by_one_shows(algorithm: str, off: int, runs: Runs) -> None:
    case, source, target = min(
        ((c, *way) for c in cases().values() if c.algorithm == algorithm for way in pairs(c)),
        key=lambda found: (found[2] == "torch", number(*found, "float64")),
    )
    place = ready(case, source, target, runs)
    assert complaints(runs.cell(place, controls=False)) == []
    cell = runs.cell(place, controls=False, set_={"step": str(STEPS + off)})
    assert complaints(cell) != []
    assert not case.reads_step or cell.error > limit(case, place, cell.verdict)


def test_each_algorithm_is_tried_with_each_kind_of_wrong_claim() -> None:
    tried = {(claim.algorithm, claim.kind) for claim in claims()} | {(name, "step") for name in crossing()}
    assert tried.isdisjoint(NOT_CLAIMED)
    assert tried | NOT_CLAIMED.keys() == {(name, kind) for name in crossing() for kind in KINDS}
