"""What the dialects of TensorFlow object graphs share; they differ in how they are recognised."""

from __future__ import annotations

from abc import ABC, abstractmethod

from ckptconv.dialects import graph_lower
from ckptconv.dialects.base import Detection
from ckptconv.dialects.graph_document import lift
from ckptconv.dialects.keras_optimizers import Generation
from ckptconv.document import Checkpoint
from ckptconv.errors import Problem
from ckptconv.formats.object_graph import SAVE_COUNTER_KEY
from ckptconv.rawtree import RawTree


class GraphDialect(ABC):
    """A convention for the edges of an object graph; subclasses name and recognise it."""

    name: str
    summary: str
    format = "tensorflow"
    framework: Generation | None
    layers: str | None
    """Column of the layer catalog."""
    needs_template = True
    save_counter: str | None = SAVE_COUNTER_KEY

    @abstractmethod
    def detect(self, raw: RawTree) -> Detection | None:
        """Whether this convention made the graph."""

    def lift(self, raw: RawTree) -> Checkpoint:
        """The run. I/O: reads the object graph and counters."""
        detected = self.detect(raw)
        evidence = detected.evidence if detected else "named by the caller"
        return lift(raw, self.name, evidence, self.layers)

    def lower(self, checkpoint: Checkpoint) -> RawTree:
        """The bundle of the residue's object graph."""
        return graph_lower.lower(checkpoint, self.name)

    def template_problems(self, template: Checkpoint) -> tuple[Problem, ...]:
        """What model or optimizer were saved without."""
        return graph_lower.unbuilt(template)

    def restore_code(self, checkpoint: Checkpoint, target: str) -> str:
        """`tf.train.Checkpoint(...).restore(...)` with the template's keywords."""
        return graph_lower.restore_lines(checkpoint, target, self.framework)
