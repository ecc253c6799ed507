"""Train in one framework, convert on the command line, go on in both: the runs must stay together.

The metric: largest weight difference after the continuation, relative to the largest distance that a weight
travels in it. Controls withhold what a converter tends to lose, and must be far worse.
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

from tests.resume.nets import Side, side

STEPS = 20
KERAS = ("keras3", "tf_keras", "tf_keras_legacy")
TIGHT, EPSILON_PLACE = 2e-5, 2e-4
CONTROL_FACTOR = 100


def bound(optimizer: str, *kinds: str) -> float:
    """`TIGHT` where the update rules can be made equal, `EPSILON_PLACE` where epsilon stands elsewhere."""
    if optimizer in ("sgd", "momentum", "nesterov"):
        return TIGHT
    return TIGHT if optimizer == "adam" and "tf_keras" in kinds else EPSILON_PLACE


def convert(source: Path, target: Path, *arguments: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "ckptconv", "convert", str(source), str(target), *arguments],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr + done.stdout


def moved(reached: Side, reference: Side, before: dict[str, np.ndarray]) -> float:
    ours, theirs = reached.weights(), reference.weights()
    travelled = max(float(np.abs(theirs[name] - before[name]).max()) for name in theirs)
    return max(float(np.abs(ours[name] - theirs[name]).max()) for name in theirs) / travelled


def cases() -> list[tuple[str, str, str, str]]:
    return [
        (source, target, model, optimizer)
        for model in ("mlp", "cnn")
        for optimizer in ("sgd", "momentum", "nesterov", "adam", "adamw")
        for keras in KERAS
        for source, target in (("torch", keras), (keras, "torch"))
        if not (optimizer == "adamw" and keras == "tf_keras_legacy")
    ]


@pytest.mark.parametrize(("source", "target", "model", "optimizer"), cases())
def test_a_converted_run_goes_on_as_if_nothing_had_happened(
    source: str, target: str, model: str, optimizer: str, tmp_path: Path
) -> None:
    origin = side(source, model, optimizer, seed=1)
    origin.train(0, STEPS)
    at_switch = origin.weights()
    saved = origin.save(tmp_path)
    losses = origin.train(STEPS, STEPS)

    (tmp_path / "fresh").mkdir()
    template = side(target, model, optimizer, seed=2).save(tmp_path / "fresh")
    converted = tmp_path / ("out.pt" if target == "torch" else "out-1")
    supplied = () if optimizer in ("adam", "adamw") or source != "torch" else (f"step={STEPS}",)
    convert(
        saved,
        converted,
        "--template",
        str(template),
        *(argument for text in supplied for argument in ("--set", text)),
    )

    resumed = side(target, model, optimizer, seed=3)
    resumed.restore(converted)
    if not (target == "torch" and optimizer in ("sgd", "momentum", "nesterov")):
        assert resumed.step() == STEPS
    for name, value in resumed.weights().items():
        np.testing.assert_array_equal(value, at_switch[name], err_msg=name)
    continued = resumed.train(STEPS, STEPS)
    error = moved(resumed, origin, at_switch)
    assert error <= bound(optimizer, source, target)
    np.testing.assert_allclose(continued, losses, rtol=1e-3)

    for control in controls(target, optimizer):
        withheld = side(target, model, optimizer, seed=4)
        withheld.restore(converted)
        getattr(withheld, control)()
        withheld.train(STEPS, STEPS)
        assert moved(withheld, origin, at_switch) >= CONTROL_FACTOR * error, control


def controls(target: str, optimizer: str) -> tuple[str, ...]:
    """What the update rule reads, so that withholding it must show."""
    if optimizer == "sgd":
        return ()
    return ("forget_slots",) if optimizer in ("momentum", "nesterov") else ("forget_slots", "forget_step")
