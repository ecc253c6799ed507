"""A wrong claim in the catalog makes the parity test fail: signs, forms of epsilon, slot order, steps."""

from __future__ import annotations

import pytest

pytest.importorskip("torch")
pytest.importorskip("tensorflow")
pytest.importorskip("tf_keras")

from ckptconv.errors import CkptError
from tests.parity.matrix import STEPS, Runs, cases, limit, pairs
from tests.parity.perturbed import (
    Change,
    claiming,
    no_switch,
    other_amount,
    other_form,
    other_neutral,
    swapped_arguments,
    swapped_slots,
)

MOMENTS = ("first_moment", "second_moment")
CLAIMS: list[tuple[str, str, str, str, Change]] = [
    (
        *("sign", "sgd momentum", "torch", "keras3"),
        other_amount("momentum: gradient <-> velocity", "momentum", "scale", coefficient=1, learning_rate=1),
    ),
    ("no rate", "sgd nesterov", "keras3", "torch", other_form("keras3", "momentum", "gradient")),
    ("epsilon", "adam eps1e-7", "torch", "tf_keras", no_switch("tf_keras", "adaptive_epsilon")),
    ("slots", "adam eps1e-7", "torch", "keras3", swapped_slots("torch", *MOMENTS)),
    ("slots", "adamw wd.05", "keras3", "torch", swapped_slots("keras3", *MOMENTS)),
    ("slots", "nadam psi1", "keras3", "torch", swapped_slots("torch", *MOMENTS)),
    ("decay", "nadam psi1", "keras3", "torch", other_neutral("keras3", "momentum_decay", 0.004)),
    ("slots", "adamax eps1e-7", "torch", "tf_keras", swapped_slots("tf_keras", *MOMENTS)),
    (
        *("shift", "adagrad eps1e-2", "keras3", "torch"),
        other_amount("epsilon: inside -> outside", "accumulator", "shift", coefficient=-1, epsilon=1),
    ),
    ("epsilon", "adagrad eps1e-2", "tf_keras", "torch", other_form("tf_keras", "epsilon", "outside")),
    (
        *("slots", "adadelta eps1e-6", "torch", "keras3"),
        swapped_slots("keras3", "second_moment", "accumulated_update"),
    ),
    ("epsilon", "rmsprop eps1e-7", "torch", "keras3", other_form("keras3", "epsilon", "outside")),
    (
        *("sign", "rmsprop_momentum eps1e-7", "torch", "tf_keras"),
        other_amount("momentum: gradient <-> step", "momentum", "scale", coefficient=-1, learning_rate=1),
    ),
    (
        *("slots", "rmsprop_centered eps1e-7", "tf_keras", "torch"),
        swapped_slots("torch", "second_moment", "average_gradient"),
    ),
    ("betas", "lion wd.01", "keras3", "tf_keras", swapped_arguments("tf_keras", "beta_1", "beta_2")),
    (
        *("slots", "adafactor default", "torch", "keras3"),
        swapped_slots("torch", "row_variance", "column_variance"),
    ),
    ("slots", "ftrl l1l2", "keras3", "tf_keras_legacy", swapped_slots("keras3", "accumulator", "linear")),
]
STEP_READERS = [
    ("adam eps1e-7", "torch", "keras3"),
    ("adamw wd.05", "torch", "tf_keras"),
    ("nadam psi1", "keras3", "tf_keras"),
    ("adamax eps1e-7", "torch", "tf_keras_legacy"),
    ("adafactor default", "torch", "keras3"),
]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("claims"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "source", "target", "change"),
    [claim[1:] for claim in CLAIMS],
    ids=[f"{claim[1]}-{claim[0]}" for claim in CLAIMS],
)
def test_a_wrong_claim_shows(name: str, source: str, target: str, change: Change, runs: Runs) -> None:
    case = cases()[name]
    bound = limit(case, source, target, "float64")
    runs.of(case, source, "mlp", "float64")
    assert runs.cell(case, source, target, "mlp", "float64").error <= bound
    with claiming(case.algorithm, change):
        try:
            error = runs.cell(case, source, target, "mlp", "float64").error
        except CkptError:
            return  # it does not even convert
    assert not error <= bound  # nan too: a root of what is negative


@pytest.mark.slow
@pytest.mark.parametrize(("name", "source", "target"), STEP_READERS)
@pytest.mark.parametrize("off", [-1, 1])
def test_a_step_off_by_one_shows(name: str, source: str, target: str, off: int, runs: Runs) -> None:
    case = cases()[name]
    cell = runs.cell(case, source, target, "mlp", "float64", set_={"step": str(STEPS + off)})
    assert cell.error > limit(case, source, target, "float64")


def test_every_conversion_between_frameworks_has_a_claim_that_is_tried() -> None:
    crossing = {case.algorithm for case in cases().values() if any(a != b for a, b in pairs(case))}
    assert {cases()[claim[1]].algorithm for claim in CLAIMS} == crossing
