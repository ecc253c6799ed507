"""Between the generations of Keras: what today's own restore loses arrives whole after a conversion.

The models have several layers of equal shape and every value is its own, so that a swap cannot hide.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

tf = pytest.importorskip("tensorflow")
keras = pytest.importorskip("keras")
tf_keras = pytest.importorskip("tf_keras")

from tests.support.command import convert, convert_here, inspect_here  # noqa: E402

WIDTH = 4
STEPS = 7
SLOTS = {
    "adam": ("first_moment", "second_moment"),
    "adamw": ("first_moment", "second_moment"),
    "momentum": ("momentum",),
}


class Run:
    """A model, its optimizer and their checkpoint, of one generation."""

    def __init__(self, generation: str, algorithm: str, seed: int, *, bias: bool = True) -> None:
        library = keras if generation == "keras3" else tf_keras
        classes = library.optimizers.legacy if generation == "legacy" else library.optimizers
        keras.utils.set_random_seed(seed)
        tf_keras.utils.set_random_seed(seed)
        self.generation, self.algorithm = generation, algorithm
        self.model = library.Sequential(
            [library.layers.Dense(WIDTH, "tanh", use_bias=bias, name=f"d{n}") for n in range(4)]
        )
        self.model.build((None, WIDTH))
        # epsilon is no part of any of these checkpoints: the target's code has to say it
        self.optimizer = {
            "adam": lambda: classes.Adam(0.01, epsilon=1e-7),
            "adamw": lambda: classes.AdamW(0.01, epsilon=1e-7, weight_decay=0.02),
            "momentum": lambda: classes.SGD(0.01, momentum=0.9),
        }[algorithm]()
        if generation == "legacy":
            self.optimizer.iterations  # noqa: B018  makes the counter
            self.optimizer._create_all_weights(self.variables)
        else:
            self.optimizer.build(self.variables)
        self.checkpoint = tf.train.Checkpoint(model=self.model, optimizer=self.optimizer)

    @property
    def variables(self) -> list[Any]:
        return list(self.model.trainable_variables)

    def train(self, steps: int) -> None:
        for number in range(steps):
            x = tf.random.stateless_normal((8, WIDTH), (number, 1))
            with tf.GradientTape() as tape:
                loss = tf.reduce_mean(tf.square(self.model(x) - tf.roll(x, 1, 1) * 3.0))
            gradients = tape.gradient(loss, self.variables)
            self.optimizer.apply_gradients(zip(gradients, self.variables, strict=True))

    def slot(self, slot: str) -> list[np.ndarray]:
        """A slot's value of every variable, in the variables' order, as the live optimizer names it."""
        if self.generation == "legacy":
            key = {"first_moment": "m", "second_moment": "v", "momentum": "momentum"}[slot]
            return [self.optimizer.get_slot(v, key).numpy() for v in self.variables]
        key = {"first_moment": "_momentums", "second_moment": "_velocities", "momentum": "momentums"}[slot]
        return [np.asarray(v) for v in getattr(self.optimizer, key)]

    def state(self) -> dict[str, list[np.ndarray]]:
        weights = [np.asarray(v) for v in self.variables]
        return {"weights": weights, **{slot: self.slot(slot) for slot in SLOTS[self.algorithm]}}

    def iterations(self) -> int:
        return int(self.optimizer.iterations)

    def save(self, folder: Path) -> str:
        return str(self.checkpoint.save(str(folder / "ckpt")))


def differences(a: Run, b: Run) -> Iterator[str]:
    """Which weights and slots of two runs are not bit for bit the same."""
    theirs = b.state()
    for kind, values in a.state().items():
        for position, (x, y) in enumerate(zip(values, theirs[kind], strict=True)):
            if x.tobytes() != y.tobytes():
                yield f"{kind} {position}"


CASES = [
    ("legacy", "keras3", "adam"),
    ("legacy", "keras3", "momentum"),
    ("tf_keras", "keras3", "adam"),
    ("tf_keras", "keras3", "adamw"),
    ("tf_keras", "keras3", "momentum"),
    ("keras3", "tf_keras", "adam"),
    ("keras3", "tf_keras", "adamw"),
    ("keras3", "tf_keras", "momentum"),
    ("keras3", "legacy", "adam"),
    ("keras3", "legacy", "momentum"),
    ("legacy", "tf_keras", "adam"),
    ("tf_keras", "legacy", "momentum"),
]


@pytest.mark.parametrize(("source", "target", "algorithm"), CASES)
def test_everything_arrives(source: str, target: str, algorithm: str, tmp_path: Path) -> None:
    trained = Run(source, algorithm, seed=1)
    trained.train(STEPS)
    flat = [value.tobytes() for values in trained.state().values() for value in values]
    assert len(set(flat)) == len(flat)
    assert all(np.any(value) for values in trained.state().values() for value in values)
    saved = trained.save(tmp_path / "run")
    fresh = Run(target, algorithm, seed=2).save(tmp_path / "fresh")
    run = convert if (source, target) == ("legacy", "keras3") else convert_here
    converted = run(saved, tmp_path / "out-1", "--template", fresh)
    assert inspect_here(converted)["progress"]["step"]["value"] == STEPS

    resumed = Run(target, algorithm, seed=3)
    assert len(list(differences(trained, resumed))) > 4
    resumed.checkpoint.restore(str(converted)).assert_consumed()
    assert resumed.iterations() == STEPS
    assert list(differences(trained, resumed)) == []


def where(run: Run, value: np.ndarray) -> str:
    """Which weight or slot of a run has exactly this value."""
    for kind, values in run.state().items():
        for position, candidate in enumerate(values):
            if candidate.tobytes() == value.tobytes():
                return f"{kind} {position}"
    return "zero" if not value.any() else "nowhere"


def restored_natively(source: str, target: str, algorithm: str, folder: Path) -> tuple[Run, Run]:
    """(the trained run, one that restored its checkpoint unconverted); only matrices, all of one shape."""
    trained = Run(source, algorithm, seed=1, bias=False)
    trained.train(STEPS)
    control = Run(target, algorithm, seed=4, bias=False)
    control.checkpoint.restore(trained.save(folder)).expect_partial()
    return trained, control


@pytest.mark.parametrize("algorithm", ["adam", "momentum"])
def test_control_keras_3_forgets_a_legacy_run(algorithm: str, tmp_path: Path) -> None:
    trained, control = restored_natively("legacy", "keras3", algorithm, tmp_path)
    assert (trained.iterations(), control.iterations()) == (STEPS, 0)
    assert {where(trained, v) for slot in SLOTS[algorithm] for v in control.slot(slot)} == {"zero"}


@pytest.mark.parametrize(("source", "target"), [("tf_keras", "keras3"), ("keras3", "tf_keras")])
def test_control_the_new_ones_shift_the_moments(source: str, target: str, tmp_path: Path) -> None:
    trained, control = restored_natively(source, target, "adam", tmp_path)
    assert control.iterations() == STEPS
    found = [where(trained, value) for value in control.slot("second_moment")]
    assert sum(name.startswith("first_moment") for name in found) >= len(found) - 1
    found = [where(trained, value) for value in control.slot("first_moment")]
    assert sum(name.startswith("second_moment") for name in found) >= len(found) - 1


@pytest.mark.parametrize("source", ["legacy", "tf_keras"])
def test_the_resumed_run_goes_on_alike(source: str, tmp_path: Path) -> None:
    trained = Run(source, "adam", seed=1)
    trained.train(STEPS)
    saved = trained.save(tmp_path / "run")
    converted = convert_here(
        saved, tmp_path / "out-1", "--template", Run("keras3", "adam", seed=2).save(tmp_path / "fresh")
    )
    resumed = Run("keras3", "adam", seed=3)
    resumed.checkpoint.restore(str(converted)).assert_consumed()
    trained.train(STEPS)
    resumed.train(STEPS)
    for mine, theirs in zip(resumed.variables, trained.variables, strict=True):
        np.testing.assert_allclose(np.asarray(mine), np.asarray(theirs), rtol=0, atol=2e-6)
