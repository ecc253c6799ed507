"""Keras 3 under `tf.train.Checkpoint`: layers below `_operations` or attributes, optimizer `_variables`.

What the file holds: every variable that the model tracks, the optimizer's counter, learning rate (not under a
schedule) and slots. What it lacks: hyperparameters other than the learning rate; layers in a plain list or
dictionary, except their trainable variables, which the optimizer saves; states of seed generators.
Covered: keras 3.1 to 3.15 (up to 3.4 the counter's edge is `iterations`).

Source: keras 3.15.1 `keras/src/backend/tensorflow/trackable.py`; see `object_paths`, `keras_optimizers`.
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


class Keras3:
    """The object graph of Keras 3."""

    name = "keras3"
    format = "tensorflow"
    framework: str | None = "keras3"
    needs_template = True
    save_counter: str | None = SAVE_COUNTER_KEY
    summary = "Keras 3 model and optimizer saved with tf.train.Checkpoint"

    def detect(self, raw: RawTree) -> Detection | None:
        """By an optimizer's edges, else by those of layers."""
        found = survey(raw)
        if found is None:
            return None
        if "keras3" in found.generations:
            return Detection(score=90, evidence=f"a Keras 3 optimizer at '{found.generations['keras3']}'")
        if found.keras3_edge and not found.generations:
            return Detection(score=70, evidence=f"Keras 3 edges in the object graph ({found.keras3_edge})")
        return None

    def lift(self, raw: RawTree) -> Checkpoint:
        """The run. I/O: reads the object graph and counters."""
        detected = self.detect(raw)
        return lift(raw, self.name, detected.evidence if detected else "named by the caller", "keras3")

    def lower(self, checkpoint: Checkpoint) -> RawTree:
        """The bundle of the residue's object graph."""
        return graph_lower.lower(checkpoint, self.name)

    def template_problems(self, template: Checkpoint) -> tuple[Problem, ...]:
        """What model or optimizer were saved without."""
        return graph_lower.unbuilt(template)

    def restore_code(self, checkpoint: Checkpoint, target: str) -> str:
        """`tf.train.Checkpoint(...).restore(...)` with the template's keywords."""
        return graph_lower.restore_lines(checkpoint, target, "keras3")


register(Keras3())
