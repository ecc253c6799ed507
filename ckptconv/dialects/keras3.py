"""Keras 3 under `tf.train.Checkpoint`: layers below `_operations` or attributes, optimizer `_variables`.

What the file holds: every variable that the model tracks, the optimizer's counter, learning rate (not under a
schedule) and slots. What it lacks: hyperparameters other than the learning rate; layers in a plain list or
dictionary, except their trainable variables, which the optimizer saves; states of seed generators.
Covered: keras 3.1 to 3.15 (up to 3.4 the counter's edge is `iterations`).

Source: keras 3.15.1 `keras/src/backend/tensorflow/trackable.py`; see `object_paths`, `keras_optimizers`.
"""

from __future__ import annotations

from ckptconv.dialects.base import Detection, register
from ckptconv.dialects.graph_detect import survey
from ckptconv.dialects.graph_dialect import GraphDialect
from ckptconv.dialects.keras_optimizers import Generation
from ckptconv.rawtree import RawTree


class Keras3(GraphDialect):
    """The object graph of Keras 3."""

    name = "keras3"
    framework: Generation | None = "keras3"
    layers: str | None = "keras3"
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
        if found.export == "keras3":
            return Detection(score=70, evidence="the lists of variables of Keras 3's model.export()")
        return None


register(Keras3())
