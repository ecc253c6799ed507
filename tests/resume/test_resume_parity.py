"""Train in one framework, convert on the command line, go on in both: the runs must stay together.

The metric: largest weight difference after the continuation, relative to the largest distance that a weight
travels in it. Controls withhold what a converter tends to lose, and must be far worse. `tests/parity` has
every optimizer, through the library.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("tensorflow")
pytest.importorskip("tf_keras")

from tests.parity.matrix import STEPS, Case, Place, cases, difference, limit, supplied
from tests.parity.sides import Side, side

KERAS = ("keras3", "tf_keras", "tf_keras_legacy")
FLOAT32 = ("sgd plain", "sgd momentum", "sgd nesterov", "adam eps1e-7", "adamw wd.05")
FLOAT64 = ("sgd momentum", "adam eps1e-7")
CONTROL_FACTOR = 100
LOSS = {"float32": 1e-3, "float64": 1e-4}
"""How far a loss may be from the source's, relative to it."""


def convert(source: Path, target: Path, *arguments: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "ckptconv", "convert", str(source), str(target), *arguments],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr + done.stdout


def places() -> list[Place]:
    return [
        Place(name, *way, model, dtype)
        for model in ("mlp", "cnn")
        for dtype, names in (("float32", FLOAT32), ("float64", FLOAT64))
        for name in names
        for keras in KERAS
        for way in (("torch", keras), (keras, "torch"))
        if not (name == "adamw wd.05" and keras == "tf_keras_legacy")
    ]


def made(case: Case, kind: str, other: str, place: Place, seed: int) -> Side:
    """One side; tf_keras' Adam with the epsilon that a run of PyTorch needs."""
    hypers = dict(case.hypers)
    if case.algorithm == "adam" and (kind, other) == ("tf_keras", "torch"):
        hypers["adaptive_epsilon"] = True
    return side(kind, place.model, case.algorithm, hypers, seed=seed, dtype=place.dtype)


@pytest.mark.parametrize("place", places(), ids="-".join)
def test_a_converted_run_goes_on_as_if_nothing_had_happened(place: Place, tmp_path: Path) -> None:
    case, source, target = cases()[place.case], place.source, place.target
    origin = made(case, source, target, place, seed=1)
    origin.train(0, STEPS)
    at_switch = origin.weights()
    saved = origin.save(tmp_path)
    losses = origin.train(STEPS, STEPS)
    reached = origin.weights()

    (tmp_path / "fresh").mkdir()
    template = made(case, target, source, place, seed=2).save(tmp_path / "fresh")
    converted = tmp_path / ("out.pt" if target == "torch" else "out-1")
    known = supplied(case, source)
    if (case.algorithm, source) == ("adam", "tf_keras"):
        known["adaptive_epsilon"] = "true"
    arguments = (part for name, value in known.items() for part in ("--set", f"{name}={value}"))
    convert(saved, converted, "--template", str(template), *arguments)

    resumed = made(case, target, source, place, seed=3)
    resumed.restore(converted)
    assert resumed.steps() <= {STEPS}
    for name, value in resumed.weights().items():
        np.testing.assert_array_equal(value, at_switch[name], err_msg=name)
    continued = resumed.train(STEPS, STEPS)
    error = difference(resumed.weights(), reached, at_switch)
    adaptive = case.algorithm == "adam" and "tf_keras" in (source, target)
    assert error <= limit(case, place, "exact" if adaptive else "approximate")
    np.testing.assert_allclose(continued, losses, rtol=LOSS[place.dtype])

    for control in controls(case):
        withheld = made(case, target, source, place, seed=4)
        withheld.restore(converted)
        getattr(withheld, control)()
        withheld.train(STEPS, STEPS)
        assert difference(withheld.weights(), reached, at_switch) >= CONTROL_FACTOR * error, control


def controls(case: Case) -> tuple[str, ...]:
    """What the update rule reads, so that withholding it must show."""
    return (*("forget_slots",) * case.has_state, *("forget_step",) * case.reads_step)
