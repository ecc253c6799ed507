"""Live Keras objects: `describe`, `capture`, `restore`; what the lines of a report call."""

from ckptconv.adapters.keras import capture, describe, restore
from ckptconv.adapters.keras_schedules import chained, one_cycle, resumed, sequential, table

__all__ = ["capture", "chained", "describe", "one_cycle", "restore", "resumed", "sequential", "table"]
