"""The files of a run of eight updates, as each generation of framework leaves them, and what is in them."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

STEPS = 8
X = np.random.default_rng(0).normal(size=(16, 4)).astype(np.float32)
Y = np.random.default_rng(1).normal(size=(16, 4)).astype(np.float32)


@dataclass(slots=True)
class Run:
    """A model with its optimizer; the weights and moments are those of the moment it was saved."""

    model: Any
    optimizer: Any
    weights: list[np.ndarray] = field(default_factory=list)
    slots: list[np.ndarray] = field(default_factory=list)


def keras_of(generation: str) -> Any:
    """`keras3` or `tf_keras`, the module."""
    if generation == "keras3":
        import keras

        return keras
    import tf_keras

    return tf_keras


def adam(generation: str) -> Any:
    """A fresh Adam of the generation, `tf_keras_legacy` for tf_keras' old one."""
    if generation == "tf_keras_legacy":
        return keras_of("tf_keras").optimizers.legacy.Adam(0.01)
    return keras_of(generation).optimizers.Adam(0.01)


def fresh(generation: str, seed: int = 1, *, compiled: bool = False, built: bool = False) -> Run:
    """Another model of the same shape, with a fresh optimizer."""
    keras = keras_of("keras3" if generation == "keras3" else "tf_keras")
    keras.utils.set_random_seed(seed)
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(5), keras.layers.Dense(4)])
    optimizer = adam(generation)
    if compiled:
        model.compile(optimizer, keras.losses.MeanSquaredError())
    if built:
        build(Run(model, optimizer))
    return Run(model, optimizer)


def build(run: Run) -> None:
    """Make the optimizer's slots."""
    if hasattr(run.optimizer, "build"):
        run.optimizer.build(run.model.trainable_variables)
    else:
        run.optimizer._create_all_weights(run.model.trainable_variables)


def trained(generation: str, steps: int = STEPS) -> Run:
    """A compiled model after that many updates."""
    run = fresh(generation, 0, compiled=True)
    if steps:
        run.model.fit(X, Y, batch_size=16, epochs=steps, verbose=0)
    run.weights = [np.array(v) for v in run.model.get_weights()]
    run.slots = slots(run)
    return run


def slots(run: Run) -> list[np.ndarray]:
    """Adam's first moments and then its second ones, in the model's order; empty where there are none."""
    optimizer = run.optimizer
    if hasattr(optimizer, "get_slot"):
        if not optimizer.weights[1:]:
            return []
        trained = run.model.trainable_variables
        return [np.array(optimizer.get_slot(v, slot)) for slot in ("m", "v") for v in trained]
    if hasattr(optimizer, "_momentums"):
        return [np.array(v) for v in (*optimizer._momentums, *optimizer._velocities)]
    return []


def checkpoint(generation: str, steps: int = STEPS) -> Callable[[Path], tuple[Path, Run]]:
    """`tf.train.Checkpoint(model=, optimizer=)`."""

    def make(here: Path) -> tuple[Path, Run]:
        import tensorflow as tf

        run = trained(generation, steps)
        return Path(
            tf.train.Checkpoint(model=run.model, optimizer=run.optimizer).write(str(here / "ckpt"))
        ), run

    return make


def weights_prefix(generation: str) -> Callable[[Path], tuple[Path, Run]]:
    """tf_keras' `model.save_weights(prefix)` of a compiled model."""

    def make(here: Path) -> tuple[Path, Run]:
        run = trained(generation)
        run.model.save_weights(str(here / "weights"))
        return here / "weights", run

    return make


def saved(generation: str, name: str, method: str = "save") -> Callable[[Path], tuple[Path, Run]]:
    """A file of Keras' own."""

    def make(here: Path) -> tuple[Path, Run]:
        run = trained(generation)
        getattr(run.model, method)(str(here / name))
        return here / name, run

    return make


FILES: Mapping[str, Callable[[Path], tuple[Path, Run]]] = {
    "checkpoint-legacy": checkpoint("tf_keras_legacy"),
    "checkpoint-legacy-unstepped": checkpoint("tf_keras_legacy", 0),
    "checkpoint-tf-keras": checkpoint("tf_keras"),
    "checkpoint-keras3": checkpoint("keras3"),
    "weights-prefix-legacy": weights_prefix("tf_keras_legacy"),
    "weights-prefix-tf-keras": weights_prefix("tf_keras"),
    "weights-h5-keras3": saved("keras3", "run.weights.h5", "save_weights"),
    "archive-keras3": saved("keras3", "run.keras"),
    "h5-keras3": saved("keras3", "run.h5"),
    "h5-tf-keras": saved("tf_keras", "run.h5"),
    "h5-legacy": saved("tf_keras_legacy", "run.h5"),
    "weights-only-h5": saved("tf_keras", "run.weights.only.h5", "save_weights"),
    "archive-tf-keras": saved("tf_keras", "run.keras"),
    "archive-legacy": saved("tf_keras_legacy", "run.keras"),
}
"""What a file is called here -> how it is made."""
