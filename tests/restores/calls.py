"""The calls of Keras 2 and 3 in the catalog's table, made for real, and what they left behind."""

from __future__ import annotations

import gc
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tests.restores.files import Run, build, fresh, keras_of, slots
from tests.restores.outcome import REFUSED, STEPS, Outcome, state_is, weights_are

Call = Callable[[Path, "Kept"], Run]


@dataclass(slots=True)
class Kept:
    """What must live until the outcome is read, as in a training script."""

    status: Any = None


def restore(generation: str, *, built: bool, roots: Mapping[str, str] | None = None, below: str = "") -> Call:
    """`tf.train.Checkpoint(...).restore`; `roots` gives the names, of model and optimizer by default."""
    names = roots or {"model": "model", "optimizer": "optimizer"}

    def call(path: Path, kept: Kept) -> Run:
        import tensorflow as tf

        run = fresh(generation, built=built)
        objects = {name: getattr(run, what) for name, what in names.items()}
        kept.status = tf.train.Checkpoint(**objects).restore(str(path / below))
        return run

    return call


def restore_counter(path: Path, kept: Kept) -> Run:
    """`tf.train.Checkpoint(...).restore` into the model, and into the counter of the optimizer alone."""
    import tensorflow as tf

    run = fresh("keras3", built=True)
    alone = tf.train.Checkpoint(iterations=run.optimizer.iterations)
    kept.status = tf.train.Checkpoint(model=run.model, optimizer=alone).restore(str(path))
    return run


def load_weights(
    generation: str, *, compiled: bool = True, built: bool = False, compile_after: bool = False
) -> Call:
    """`model.load_weights`."""

    def call(path: Path, kept: Kept) -> Run:
        run = fresh(generation, compiled=compiled, built=built)
        kept.status = run.model.load_weights(str(path))
        if compile_after:
            keras = keras_of("keras3" if generation == "keras3" else "tf_keras")
            run.model.compile(run.optimizer, keras.losses.MeanSquaredError())
        return run

    return call


def load_model(generation: str) -> Call:
    """`models.load_model`."""

    def call(path: Path, kept: Kept) -> Run:
        model = keras_of(generation).models.load_model(str(path))
        return Run(model, getattr(model, "optimizer", None))

    return call


def inference_layer(endpoint: str) -> Call:
    """Keras 3's layer of a SavedModel; its variables, which have no order, are put in that of the model."""

    def call(path: Path, kept: Kept) -> Run:
        layer = keras_of("keras3").layers.TFSMLayer(str(path), call_endpoint=endpoint)
        by_shape = {array.shape: array for array in layer.get_weights()}
        order = [array.shape for array in fresh("keras3").model.get_weights()]
        return Run(None, None, weights=[by_shape[shape] for shape in order])

    return call


def exported_weights(generation: str) -> Call:
    """`model.set_weights` from what `tf.saved_model.load` returns."""

    def call(path: Path, kept: Kept) -> Run:
        import tensorflow as tf

        run = fresh(generation, built=True)
        run.model.set_weights([variable.numpy() for variable in tf.saved_model.load(str(path)).variables])
        return run

    return call


def exported_object(path: Path, kept: Kept) -> Run:
    """tf_keras' `load_model` of an export: an object without `fit`, with the model's variables."""
    loaded = keras_of("tf_keras").models.load_model(str(path))
    assert not hasattr(loaded, "fit")
    return Run(None, None, weights=[variable.numpy() for variable in loaded.variables])


MODEL_ONLY = {"model": "model"}
RENAMED = {"model": "model", "opt": "optimizer"}

CALLS: Mapping[str, tuple[str, Call]] = {
    "legacy-same": ("checkpoint-legacy", restore("tf_keras_legacy", built=True)),
    "legacy-unbuilt": ("checkpoint-legacy", restore("tf_keras_legacy", built=False)),
    "legacy-renamed": ("checkpoint-legacy", restore("tf_keras_legacy", built=True, roots=RENAMED)),
    "legacy-model-only": ("checkpoint-legacy", restore("tf_keras_legacy", built=True, roots=MODEL_ONLY)),
    "legacy-into-new": ("checkpoint-legacy", restore("tf_keras", built=True)),
    "legacy-into-keras3": ("checkpoint-legacy", restore("keras3", built=True)),
    "legacy-load-weights-keras3": ("checkpoint-legacy", load_weights("keras3")),
    "no-optimizer-tf-keras": ("checkpoint-without-optimizer", restore("tf_keras", built=True)),
    "no-optimizer-keras3": ("checkpoint-without-optimizer", restore("keras3", built=True)),
    "tf-keras-same": ("checkpoint-tf-keras", restore("tf_keras", built=True)),
    "tf-keras-unbuilt": ("checkpoint-tf-keras", restore("tf_keras", built=False)),
    "tf-keras-renamed": ("checkpoint-tf-keras", restore("tf_keras", built=True, roots=RENAMED)),
    "tf-keras-model-only": ("checkpoint-tf-keras", restore("tf_keras", built=True, roots=MODEL_ONLY)),
    "tf-keras-into-legacy": ("checkpoint-tf-keras", restore("tf_keras_legacy", built=True)),
    "tf-keras-into-keras3-built": ("checkpoint-tf-keras", restore("keras3", built=True)),
    "tf-keras-into-keras3-unbuilt": ("checkpoint-tf-keras", restore("keras3", built=False)),
    "tf-keras-load-weights-keras3": ("checkpoint-tf-keras", load_weights("keras3")),
    "keras3-same": ("checkpoint-keras3", restore("keras3", built=True)),
    "keras3-unbuilt": ("checkpoint-keras3", restore("keras3", built=False)),
    "keras3-renamed": ("checkpoint-keras3", restore("keras3", built=True, roots=RENAMED)),
    "keras3-model-only": ("checkpoint-keras3", restore("keras3", built=True, roots=MODEL_ONLY)),
    "keras3-into-tf-keras-built": ("checkpoint-keras3", restore("tf_keras", built=True)),
    "keras3-into-tf-keras-unbuilt": ("checkpoint-keras3", restore("tf_keras", built=False)),
    "keras3-into-legacy": ("checkpoint-keras3", restore("tf_keras_legacy", built=True)),
    "unlisted-into-tf-keras-unbuilt": ("checkpoint-unlisted", restore("tf_keras", built=False)),
    "counter-alone": ("checkpoint-counter", restore_counter),
    "counter-same": ("checkpoint-counter", restore("keras3", built=True)),
    "counter-unbuilt": ("checkpoint-counter", restore("keras3", built=False)),
    "counter-into-tf-keras": ("checkpoint-counter", restore("tf_keras", built=True)),
    "counter-into-legacy": ("checkpoint-counter", restore("tf_keras_legacy", built=True)),
    "prefix-compiled": ("weights-prefix-legacy", load_weights("tf_keras_legacy")),
    "prefix-uncompiled": ("weights-prefix-legacy", load_weights("tf_keras_legacy", compiled=False)),
    "prefix-compile-after": (
        "weights-prefix-legacy",
        load_weights("tf_keras_legacy", compiled=False, compile_after=True),
    ),
    "prefix-as-checkpoint": ("weights-prefix-legacy", restore("tf_keras_legacy", built=True)),
    "prefix-load-weights-keras3": ("weights-prefix-legacy", load_weights("keras3")),
    "keras3-no-optimizer": ("checkpoint-keras3-without-optimizer", restore("keras3", built=True)),
    "keras3-no-optimizer-tf-keras": ("checkpoint-keras3-without-optimizer", restore("tf_keras", built=True)),
    "new-prefix-compiled": ("weights-prefix-tf-keras", load_weights("tf_keras")),
    "new-prefix-uncompiled": ("weights-prefix-tf-keras", load_weights("tf_keras", compiled=False)),
    "new-prefix-compile-after": (
        "weights-prefix-tf-keras",
        load_weights("tf_keras", compiled=False, compile_after=True),
    ),
    "new-prefix-in-legacy": ("weights-prefix-tf-keras", load_weights("tf_keras_legacy")),
    "new-prefix-as-checkpoint": ("weights-prefix-tf-keras", restore("tf_keras", built=True)),
    "new-prefix-load-weights-keras3": ("weights-prefix-tf-keras", load_weights("keras3")),
    "bare-prefix-load-weights": ("weights-prefix-without-optimizer", load_weights("tf_keras", built=True)),
    "bare-prefix-load-weights-keras3": ("weights-prefix-without-optimizer", load_weights("keras3")),
    "saved-legacy-load-weights": ("saved-model-legacy", load_weights("tf_keras_legacy")),
    "saved-legacy-load-model": ("saved-model-legacy", load_model("tf_keras")),
    "saved-legacy-load-model-keras3": ("saved-model-legacy", load_model("keras3")),
    "saved-legacy-inference-layer": ("saved-model-legacy", inference_layer("serving_default")),
    "saved-new-load-weights": ("saved-model-tf-keras", load_weights("tf_keras")),
    "saved-new-load-model": ("saved-model-tf-keras", load_model("tf_keras")),
    "saved-new-load-model-keras3": ("saved-model-tf-keras", load_model("keras3")),
    "saved-new-inference-layer": ("saved-model-tf-keras", inference_layer("serving_default")),
    "saved-bare-load-model": ("saved-model-without-optimizer", load_model("tf_keras")),
    "saved-bare-load-model-keras3": ("saved-model-without-optimizer", load_model("keras3")),
    "export-weights": ("saved-model-export", exported_weights("keras3")),
    "export-tf-keras-weights": ("saved-model-export-tf-keras", exported_weights("tf_keras")),
    "export-tf-keras-load-model": ("saved-model-export-tf-keras", exported_object),
    "export-tf-keras-load-model-keras3": ("saved-model-export-tf-keras", load_model("keras3")),
    "export-inference-layer": ("saved-model-export", inference_layer("serve")),
    "export-load-model": ("saved-model-export", load_model("keras3")),
    "export-as-checkpoint": (
        "saved-model-export",
        restore("keras3", built=True, below="variables/variables"),
    ),
    "shards-unbuilt": ("weights-h5-shards", load_weights("keras3")),
    "shards-built": ("weights-h5-shards", load_weights("keras3", built=True)),
    "shards-tf-keras": ("weights-h5-shards", load_weights("tf_keras", built=True)),
    "tf-weights-h5-unbuilt": ("weights-h5-tf-keras", load_weights("tf_keras")),
    "tf-weights-h5-built": ("weights-h5-tf-keras", load_weights("tf_keras", built=True)),
    "tf-weights-h5-legacy": ("weights-h5-tf-keras", load_weights("tf_keras_legacy", built=True)),
    "tf-weights-h5-keras3": ("weights-h5-tf-keras", load_weights("keras3", built=True)),
    "bare-weights-h5-keras3": ("weights-h5-without-optimizer", load_weights("keras3", built=True)),
    "bare-weights-h5-tf-keras": ("weights-h5-without-optimizer", load_weights("tf_keras", built=True)),
    "bare-archive-load-model": ("archive-without-optimizer", load_model("keras3")),
    "h5-weights-tf-keras": ("h5-weights", load_weights("tf_keras", built=True)),
    "h5-weights-keras3": ("h5-weights", load_weights("keras3", built=True)),
    "weights-h5-unbuilt": ("weights-h5-keras3", load_weights("keras3")),
    "weights-h5-built": ("weights-h5-keras3", load_weights("keras3", built=True)),
    "weights-h5-tf-keras": ("weights-h5-keras3", load_weights("tf_keras", built=True)),
    "archive-load-model": ("archive-keras3", load_model("keras3")),
    "archive-load-weights": ("archive-keras3", load_weights("keras3")),
    "archive-tf-keras": ("archive-keras3", load_model("tf_keras")),
    "tf-archive-load-model": ("archive-tf-keras", load_model("tf_keras")),
    "tf-archive-keras3": ("archive-tf-keras", load_model("keras3")),
    "tf-archive-load-weights-keras3": ("archive-tf-keras", load_weights("keras3", built=True)),
    "legacy-archive-load-model": ("archive-legacy", load_model("tf_keras")),
    "h5-load-model": ("h5-keras3", load_model("keras3")),
    "h5-load-weights": ("h5-keras3", load_weights("keras3", built=True)),
    "h5-tf-keras": ("h5-keras3", load_model("tf_keras")),
    "tf-h5-load-model": ("h5-tf-keras", load_model("tf_keras")),
    "tf-h5-load-weights": ("h5-tf-keras", load_weights("tf_keras", built=True)),
    "tf-h5-keras3": ("h5-tf-keras", load_model("keras3")),
    "tf-h5-load-weights-keras3": ("h5-tf-keras", load_weights("keras3", built=True)),
}
"""Name of the call -> the file it is made on, and the call."""


class _Log(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


@contextmanager
def _listening() -> Iterator[_Log]:
    log = _Log()
    loggers = [logging.getLogger(name) for name in ("tensorflow", "absl")]
    for logger in loggers:
        logger.addHandler(log)
    try:
        yield log
    finally:
        for logger in loggers:
            logger.removeHandler(log)


def listened(call: Callable[[Path], tuple[Any, Any]], path: Path) -> tuple[Any, str]:
    """What a call gives, and what one is told when its status is deleted."""
    with _listening() as log:
        found, status = call(path)
        at_once = list(log.lines)
        log.lines.clear()
        del status
        gc.collect()
        return found, _signal(at_once, list(log.lines))


_LOSSES = ("Skipping variable loading", "could not be found", "unrestored")


def observed(name: str, path: Path, saved: Run) -> Outcome:
    """Make the call on the file and look at what it did."""
    _, call = CALLS[name]
    kept = Kept()
    gc.collect()  # what earlier calls left behind is logged before anybody listens
    with _listening() as log, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            run = call(path, kept)
        except Exception:  # whatever class the framework has for a refusal
            return REFUSED
        at_once = [*log.lines, *(str(warning.message) for warning in caught)]
        step = 0 if run.optimizer is None else int(np.array(run.optimizer.iterations))
        weights = run.weights or [np.array(v) for v in run.model.get_weights()]
        if run.optimizer is not None and not slots(run):
            build(run)
        state = [] if run.optimizer is None else slots(run)
        log.lines.clear()
        kept.status = None
        del run
        gc.collect()
        later = list(log.lines)
    assert step in (0, STEPS)
    return Outcome(
        step="restored" if step else "zero",
        weights=weights_are(weights, saved.weights),
        state=state_is(state, saved.slots),
        signal=_signal(at_once, later),
    )


def _signal(at_once: list[str], later: list[str]) -> str:
    if any(loss in line for line in at_once for loss in _LOSSES):
        return "warning"
    return "later" if any(loss in line for line in later for loss in _LOSSES) else "none"
