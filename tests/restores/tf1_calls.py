"""The calls of the catalog's table on checkpoints of TensorFlow 1, and their files."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tests.restores.files import X, Y, fresh, keras_of, slots
from tests.restores.outcome import STEPS, Call, Held, Make, Outcome, judged

_LAYERS = ("dense/kernel", "dense/bias", "dense_1/kernel", "dense_1/bias")
_SLOTS = tuple(f"{name}/{slot}" for slot in ("Adam", "Adam_1") for name in _LAYERS)


class Program:
    """A graph of two dense layers, trained by Adam unless it is for its weights alone."""

    def __init__(self, *, step: bool = True, trained: bool = True, scope: str = "") -> None:
        import tensorflow as tf

        self._tf1 = tf1 = tf.compat.v1
        self.scope = scope
        self._graph = tf.Graph()
        with self._graph.as_default():
            self.x = hidden = tf1.placeholder(tf.float32, (None, 4))
            for name, rows, columns in (("dense", 4, 5), ("dense_1", 5, 4)):
                with tf1.variable_scope(scope + name):
                    kernel = tf1.get_variable("kernel", (rows, columns), use_resource=False)
                    bias = tf1.get_variable("bias", (columns,), use_resource=False)
                hidden = tf.matmul(hidden, kernel) + bias
            self.y = hidden
            if trained:
                counter = tf1.train.get_or_create_global_step() if step else None
                loss = tf.reduce_mean(tf.square(hidden - Y))
                self.update = tf1.train.AdamOptimizer(0.01).minimize(loss, global_step=counter)

    def run(self, work: Callable[[Any], object]) -> Held:
        """What the variables hold after `work` did something to a session of initial values."""
        tf1 = self._tf1
        with self._graph.as_default(), tf1.Session() as session:
            session.run(tf1.global_variables_initializer())
            work(session)
            return held(session.run({v.op.name: v for v in tf1.global_variables()}), self.scope)

    def train(self, session: Any) -> None:
        for _ in range(STEPS):
            session.run(self.update, {self.x: X})


def held(values: Mapping[str, Any], scope: str = "") -> Held:
    step = values.get("global_step")
    return Held(
        None if step is None else int(step),
        [values[scope + name] for name in _LAYERS],
        [values[scope + name] for name in _SLOTS if scope + name in values],
    )


def trained(*, step: bool) -> Make:
    """`Saver.save` after eight updates."""

    def make(here: Path) -> tuple[Path, Held]:
        import tensorflow as tf

        program = Program(step=step)

        def work(session: Any) -> None:
            program.train(session)
            tf.compat.v1.train.Saver().save(session, str(here / "model.ckpt"), write_meta_graph=False)

        return here / "model.ckpt", program.run(work)

    return make


def weights(here: Path) -> tuple[Path, Held]:
    """`Saver.save` of a program without an optimizer."""
    import tensorflow as tf

    program, path = Program(trained=False), str(here / "model.ckpt")
    saver = tf.compat.v1.train.Saver
    saved = program.run(lambda session: saver().save(session, path, write_meta_graph=False))
    return Path(path), saved


def exported(here: Path) -> tuple[Path, Held]:
    """A SavedModel of a program that trains."""
    import tensorflow as tf

    program = Program()

    def work(session: Any) -> None:
        program.train(session)
        tf.compat.v1.saved_model.simple_save(
            session, str(here / "export"), {"x": program.x}, {"y": program.y}
        )

    return here / "export", program.run(work)


FILES: Mapping[str, Make] = {
    "tf1-global-step": trained(step=True),
    "tf1-no-global-step": trained(step=False),
    "tf1-weights": weights,
    "saved-model-tf1": exported,
}


def saver(*, trainable: bool = False, **program: Any) -> Call:
    """`Saver.restore` in a program."""

    def call(path: Path) -> Held:
        import tensorflow as tf

        tf1 = tf.compat.v1

        def work(session: Any) -> None:
            saver = tf1.train.Saver(tf1.trainable_variables()) if trainable else tf1.train.Saver()
            saver.restore(session, str(path))

        return Program(**program).run(work)

    return call


def as_objects(generation: str) -> Call:
    """`tf.train.Checkpoint.restore` into Keras objects whose layers are named as the file's."""

    def call(path: Path) -> Held:
        import tensorflow as tf

        keras = keras_of(generation)
        run = fresh(generation, built=True)
        layers = [keras.layers.Dense(5, name="dense"), keras.layers.Dense(4, name="dense_1")]
        model = keras.Sequential([keras.Input((4,)), *layers])
        tf.train.Checkpoint(model=model, optimizer=run.optimizer).restore(str(path))
        return Held(int(np.array(run.optimizer.iterations)), model.get_weights(), slots(run))

    return call


def load_weights_keras3(path: Path) -> Held:
    fresh("keras3").model.load_weights(str(path))
    raise AssertionError("Keras 3 has learned to read TensorFlow checkpoints")


def load_graph(path: Path) -> Held:
    import tensorflow as tf

    tf1 = tf.compat.v1
    with tf.Graph().as_default(), tf1.Session() as session:
        tf1.saved_model.load(session, ["serve"], str(path))
        return held(session.run({v.op.name: v for v in tf1.global_variables()}))


def inference_layer(path: Path) -> Held:
    """It computes what the weights in the file compute."""
    layer = keras_of("keras3").layers.TFSMLayer(str(path), call_endpoint="serving_default")
    (outputs,) = layer(X).values()
    saved = load_graph(path).weights
    np.testing.assert_allclose(outputs, (X @ saved[0] + saved[1]) @ saved[2] + saved[3], rtol=1e-5)
    return Held(0, saved)


def load_model_keras3(path: Path) -> Held:
    keras_of("keras3").models.load_model(str(path))
    raise AssertionError("Keras 3 has learned to load SavedModels")


CALLS: Mapping[str, tuple[str, Call]] = {
    "tf1-same": ("tf1-global-step", saver()),
    "tf1-trainable-only": ("tf1-global-step", saver(trainable=True)),
    "tf1-program-without-step": ("tf1-global-step", saver(step=False)),
    "tf1-other-names": ("tf1-global-step", saver(scope="net_")),
    "tf1-into-tf-keras": ("tf1-global-step", as_objects("tf_keras")),
    "tf1-into-keras3": ("tf1-global-step", as_objects("keras3")),
    "tf1-load-weights-keras3": ("tf1-global-step", load_weights_keras3),
    "tf1-powers-same": ("tf1-no-global-step", saver(step=False)),
    "tf1-powers-with-step": ("tf1-no-global-step", saver()),
    "tf1-powers-into-keras3": ("tf1-no-global-step", as_objects("keras3")),
    "tf1-weights-trainable": ("tf1-weights", saver(trainable=True)),
    "tf1-weights-all": ("tf1-weights", saver()),
    "tf1-export-load": ("saved-model-tf1", load_graph),
    "tf1-export-inference-layer": ("saved-model-tf1", inference_layer),
    "tf1-export-load-model-keras3": ("saved-model-tf1", load_model_keras3),
}


def observed(name: str, path: Path, saved: Held) -> Outcome:
    return judged(CALLS[name][1], path, saved)
