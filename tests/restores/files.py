"""The files of a run of eight updates, as each generation of framework leaves them, and what is in them."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from tests.restores.outcome import STEPS

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

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
    """Adam's first moments and then its second ones, in the model's order; SGD's momentum; else nothing."""
    optimizer = run.optimizer
    if hasattr(optimizer, "get_slot"):
        if not optimizer.weights[1:]:
            return []
        trained = run.model.trainable_variables
        return [optimizer.get_slot(v, slot).numpy() for slot in ("m", "v") for v in trained]
    if hasattr(optimizer, "_momentums"):
        return [v.numpy() for v in (*optimizer._momentums, *optimizer._velocities)]
    if hasattr(optimizer, "momentums"):
        return [v.numpy() for v in optimizer.momentums]
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


def saved(
    generation: str, name: str, method: str = "save", **options: Any
) -> Callable[[Path], tuple[Path, Run]]:
    """A file or folder of Keras' own."""

    def make(here: Path) -> tuple[Path, Run]:
        run = trained(generation)
        getattr(run.model, method)(str(here / name), **options)
        return here / name, run

    return make


def bare(
    generation: str, name: str, method: str = "save", **options: Any
) -> Callable[[Path], tuple[Path, Run]]:
    """The same of a model that was not compiled; `checkpoint` is `tf.train.Checkpoint(model=)`."""

    def make(here: Path) -> tuple[Path, Run]:
        run, model = trained(generation), fresh(generation, 2).model
        model.set_weights(run.weights)
        if method == "checkpoint":
            import tensorflow as tf

            tf.train.Checkpoint(model=model).write(str(here / name))
        else:
            getattr(model, method)(str(here / name), **options)
        return here / name, Run(model, None, run.weights)

    return make


def unlisted(here: Path) -> tuple[Path, Run]:
    """The same with the optimizer's lists empty, as Keras 3.1 to 3.9 left them when it was built."""
    import tensorflow as tf

    run = trained("keras3")
    run.optimizer._momentums, run.optimizer._velocities = [], []
    path = tf.train.Checkpoint(model=run.model, optimizer=run.optimizer).write(str(here / "ckpt"))
    return Path(path), run


def counter(here: Path) -> tuple[Path, Run]:
    """`tf.train.Checkpoint` of a Keras 3 model and of the counter of its optimizer, under its old name."""
    import tensorflow as tf

    run, model = trained("keras3"), fresh("keras3", 2).model
    model.set_weights(run.weights)
    alone = tf.train.Checkpoint(iterations=run.optimizer.iterations)
    path = tf.train.Checkpoint(model=model, optimizer=alone).write(str(here / "ckpt"))
    return Path(path), Run(model, None, run.weights)


FILES: Mapping[str, Callable[[Path], tuple[Path, Run]]] = {
    "checkpoint-legacy": checkpoint("tf_keras_legacy"),
    "checkpoint-without-optimizer": checkpoint("tf_keras_legacy", 0),
    "checkpoint-keras3-without-optimizer": bare("keras3", "ckpt", "checkpoint"),
    "checkpoint-tf-keras": checkpoint("tf_keras"),
    "checkpoint-keras3": checkpoint("keras3"),
    "checkpoint-unlisted": unlisted,
    "checkpoint-counter": counter,
    "weights-prefix-legacy": weights_prefix("tf_keras_legacy"),
    "weights-prefix-tf-keras": weights_prefix("tf_keras"),
    "weights-prefix-without-optimizer": bare("tf_keras", "weights", "save_weights"),
    "saved-model-legacy": saved("tf_keras_legacy", "saved", save_format="tf"),
    "saved-model-tf-keras": saved("tf_keras", "saved", save_format="tf"),
    "saved-model-without-optimizer": bare("tf_keras", "saved", save_format="tf"),
    "saved-model-export": saved("keras3", "exported", "export", verbose=False),
    "saved-model-export-tf-keras": saved("tf_keras", "exported", "export"),
    "weights-h5-keras3": saved("keras3", "run.weights.h5", "save_weights"),
    "weights-h5-shards": saved("keras3", "run.weights.json", "save_weights", max_shard_size=1e-6),
    "weights-h5-tf-keras": saved("tf_keras", "run.weights.h5", "save_weights"),
    "weights-h5-without-optimizer": bare("keras3", "run.weights.h5", "save_weights"),
    "archive-without-optimizer": bare("keras3", "run.keras"),
    "archive-keras3": saved("keras3", "run.keras"),
    "h5-keras3": saved("keras3", "run.h5"),
    "h5-tf-keras": saved("tf_keras", "run.h5"),
    "h5-legacy": saved("tf_keras_legacy", "run.h5"),
    "h5-weights": saved("tf_keras", "weights.h5", "save_weights"),
    "archive-tf-keras": saved("tf_keras", "run.keras"),
    "archive-legacy": saved("tf_keras_legacy", "run.keras"),
}
"""Kind of file, in the catalog's words -> how it is made."""
