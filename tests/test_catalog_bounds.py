"""The stated bound of a difference holds element by element in the next update of the real classes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from ckptconv.catalog import optimizers
from ckptconv.document import Value, value_of
from ckptconv.tensor import StoredTensor, TensorRef
from tests.test_catalog_parity import SHAPE, STEPS, document, gradients, make

RATE: dict[str, Value] = {"learning_rate": 0.03125}
MOMENTS: dict[str, Value] = {**RATE, "beta_1": 0.875, "beta_2": 0.96875}
ROOT: dict[str, Value] = {**RATE, "rho": 0.875, "momentum": 0.0, "centered": False}
CASES: list[tuple[str, dict[str, Value]]] = [
    ("adam", {**MOMENTS, "epsilon": 1e-2, "amsgrad": False}),
    ("adamw", {**MOMENTS, "epsilon": 1e-2, "amsgrad": False, "weight_decay": 0.0}),
    ("adamax", {**MOMENTS, "epsilon": 1e-2}),
    ("adagrad", {**RATE, "epsilon": 1e-2, "initial_accumulator": 0.0, "learning_rate_decay": 0.0}),
    ("adam", {**MOMENTS, "epsilon": 1e-2, "amsgrad": True}),
    ("rmsprop", {**ROOT, "epsilon": 1e-2}),
    ("rmsprop", {**ROOT, "epsilon": 1e-2, "centered": True}),
]
IDS = ["adam", "adamw", "adamax", "adagrad", "amsgrad", "rmsprop", "centered"]
KERAS = ("keras3", "tf_keras", "tf_keras_legacy")
PAIRS = [*(("torch", each) for each in KERAS), *((each, "torch") for each in KERAS)]
PAIRS += [("tf_keras_legacy", "keras3"), ("keras3", "tf_keras_legacy")]


def updated(side: Any, gradient: np.ndarray) -> np.ndarray:
    before = side.values().astype(np.float64)
    side.update(gradient)
    return side.values() - before


@pytest.mark.parametrize(("source_kind", "target_kind"), PAIRS)
@pytest.mark.parametrize(("algorithm", "hypers"), CASES, ids=IDS)
def test_the_bound_holds_in_one_update(
    algorithm: str, hypers: dict[str, Value], source_kind: str, target_kind: str
) -> None:
    pytest.importorskip("torch")
    pytest.importorskip("tensorflow")
    if any(optimizers.row(algorithm, each) is None for each in (source_kind, target_kind)):
        return
    source = make(source_kind, algorithm, hypers)
    for gradient in gradients()[:STEPS]:
        source.update(gradient)
    recorded = {**hypers, "weight_decay": 0.0}
    template = make(target_kind, algorithm, hypers)
    skeleton = document(template, algorithm, recorded, 0)
    conversion = optimizers.convert(document(source, algorithm, recorded, STEPS), skeleton)
    assert conversion.problems == ()
    if conversion.residual is None:
        assert conversion.verdict.verdict == "exact"
        bound = 0.0
    else:
        held = {slot: {"w": StoredTensor.of_array(array)} for slot, array in source.slots().items()}
        bound, _ = optimizers.measure(held, conversion.residual)
        assert 1e-4 < bound < 1
    told = {k: value_of(f) for k, f in conversion.hyperparameters[0].items()}
    settled = {k: v for k, v in told.items() if k in hypers}
    if any("adaptive_epsilon=True" in line for line in conversion.target_requires):
        algorithm, settled = "adam", {**settled, "adaptive_epsilon": True}
    target = make(target_kind, algorithm, settled)
    slots = {}
    for slot in conversion.slots:
        tensor: TensorRef = StoredTensor.of_array(source.slots()[slot.slot])
        for op in conversion.ops(slot.slot, 0):
            tensor = tensor.apply(op)
        slots[slot.slot] = tensor.read()
    target.load(source.values(), slots, conversion)
    gradient = (gradients()[STEPS] * 1e-2).astype(np.float32)
    ours, theirs = updated(source, gradient), updated(target, gradient)
    assert ours.shape == SHAPE
    rounding = 2.0**-23 / np.abs(ours)  # a weight of about 1 in float32
    relative = np.abs(theirs / ours - 1)
    assert (relative <= bound + rounding + 1e-5).all()
    if bound:
        assert relative.max() > 0.5 * bound  # and is no idle one
