"""Keras 2 (tf_keras) under `tf.train.Checkpoint` or `save_weights(prefix)`, with either kind of optimizers.

Models: `layer_with_weights-N` (and `layer-N` beside it) for Sequential and Functional, attributes for
subclassed ones; lists and dictionaries are tracked. `tf-keras` has the optimizers of TensorFlow 2.11 and
later; `tf-keras-legacy` the older ones, whose slots the graph names and whose scalar hyperparameters are
variables: `beta_1`, `beta_2`, `decay`, `momentum`; epsilon, nesterov and amsgrad are not stored.

Source: tf_keras 2.21 `tf_keras/src/engine/functional.py`; see `object_paths`, `keras_optimizers`.
"""

from __future__ import annotations

from ckptconv.dialects.base import Detection, register
from ckptconv.dialects.graph_detect import survey
from ckptconv.dialects.graph_dialect import GraphDialect
from ckptconv.dialects.keras_optimizers import Generation
from ckptconv.rawtree import RawTree


class TfKeras(GraphDialect):
    """The object graph of tf_keras with optimizers of TensorFlow 2.11 and later, or with none."""

    name = "tf-keras"
    framework: Generation | None = "tf_keras"
    layers: str | None = "tf_keras"
    summary = "tf_keras model and optimizer (TF >= 2.11) saved with tf.train.Checkpoint or save_weights"

    def detect(self, raw: RawTree) -> Detection | None:
        """By an optimizer whose `_variables` lack the learning rate, else by the edges of layers."""
        found = survey(raw)
        if found is None:
            return None
        if "tf_keras" in found.generations:
            return Detection(score=90, evidence=f"a tf_keras optimizer at '{found.generations['tf_keras']}'")
        if found.tf_keras_edge and not found.generations:
            return Detection(score=75, evidence=f"tf_keras edges in the object graph ({found.tf_keras_edge})")
        if found.export == "tf_keras":
            return Detection(score=75, evidence="the lists of variables of tf_keras' model.export()")
        return None


class TfKerasLegacy(GraphDialect):
    """The object graph of tf_keras with legacy optimizers."""

    name = "tf-keras-legacy"
    framework: Generation | None = "tf_keras_legacy"
    layers: str | None = "tf_keras"
    summary = "tf_keras model and legacy optimizer (TF <= 2.10, tf_keras.optimizers.legacy)"

    def detect(self, raw: RawTree) -> Detection | None:
        """By an optimizer with `iter` or slot variables."""
        found = survey(raw)
        if found is None or "tf_keras_legacy" not in found.generations:
            return None
        return Detection(
            score=90, evidence=f"a legacy tf_keras optimizer at '{found.generations['tf_keras_legacy']}'"
        )


register(TfKeras())
register(TfKerasLegacy())
