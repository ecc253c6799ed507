"""Keras 2 (tf_keras) under `tf.train.Checkpoint` or `save_weights(prefix)`, with either kind of optimizers.

Models: `layer_with_weights-N` (and `layer-N` beside it) for Sequential and Functional, attributes for
subclassed ones; lists and dictionaries are tracked. `tf-keras` has the optimizers of TensorFlow 2.11 and
later; `tf-keras-legacy` the older ones, whose slots the graph names and whose scalar hyperparameters are
variables: `beta_1`, `beta_2`, `decay`, `momentum`; epsilon, nesterov and amsgrad are not stored.

Source: tf_keras 2.21 `tf_keras/src/engine/functional.py`; see `object_paths`, `keras_optimizers`.
"""

from __future__ import annotations

from ckptconv.dialects import graph_lower
from ckptconv.dialects.base import Detection, register
from ckptconv.dialects.graph_detect import survey
from ckptconv.dialects.graph_document import lift
from ckptconv.document import Checkpoint
from ckptconv.errors import Problem
from ckptconv.formats.object_graph import SAVE_COUNTER_KEY
from ckptconv.rawtree import RawTree


class TfKeras:
    """The object graph of tf_keras with optimizers of TensorFlow 2.11 and later, or with none."""

    name = "tf-keras"
    format = "tensorflow"
    framework: str | None = "tf_keras"
    needs_template = True
    save_counter: str | None = SAVE_COUNTER_KEY
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
        return None

    def lift(self, raw: RawTree) -> Checkpoint:
        """The run. I/O: reads the object graph and counters."""
        detected = self.detect(raw)
        return lift(raw, self.name, detected.evidence if detected else "named by the caller", "tf_keras")

    def lower(self, checkpoint: Checkpoint) -> RawTree:
        """The bundle of the residue's object graph."""
        return graph_lower.lower(checkpoint, self.name)

    def template_problems(self, template: Checkpoint) -> tuple[Problem, ...]:
        """What model or optimizer were saved without."""
        return graph_lower.unbuilt(template)

    def restore_code(self, checkpoint: Checkpoint, target: str) -> str:
        """`tf.train.Checkpoint(...).restore(...)` with the template's keywords."""
        return graph_lower.restore_lines(checkpoint, target, "tf_keras")


class TfKerasLegacy:
    """The object graph of tf_keras with legacy optimizers."""

    name = "tf-keras-legacy"
    format = "tensorflow"
    framework: str | None = "tf_keras_legacy"
    needs_template = True
    save_counter: str | None = SAVE_COUNTER_KEY
    summary = "tf_keras model and legacy optimizer (TF <= 2.10, tf_keras.optimizers.legacy)"

    def detect(self, raw: RawTree) -> Detection | None:
        """By an optimizer with `iter` or slot variables."""
        found = survey(raw)
        if found is None or "tf_keras_legacy" not in found.generations:
            return None
        return Detection(
            score=90, evidence=f"a legacy tf_keras optimizer at '{found.generations['tf_keras_legacy']}'"
        )

    def lift(self, raw: RawTree) -> Checkpoint:
        """The run. I/O: reads the object graph and counters."""
        detected = self.detect(raw)
        return lift(raw, self.name, detected.evidence if detected else "named by the caller", "tf_keras")

    def lower(self, checkpoint: Checkpoint) -> RawTree:
        """The bundle of the residue's object graph."""
        return graph_lower.lower(checkpoint, self.name)

    def template_problems(self, template: Checkpoint) -> tuple[Problem, ...]:
        """What model or optimizer were saved without."""
        return graph_lower.unbuilt(template)

    def restore_code(self, checkpoint: Checkpoint, target: str) -> str:
        """`tf.train.Checkpoint(...).restore(...)` with the template's keywords."""
        return graph_lower.restore_lines(checkpoint, target, "tf_keras_legacy")


register(TfKeras())
register(TfKerasLegacy())
