"""Live Keras objects: `describe`, `capture`, `restore`; what the lines of a report call."""

from ckptconv.adapters.keras import capture, describe, restore
from ckptconv.adapters.keras_callback import better_by_fraction
from ckptconv.adapters.keras_exact import (
    corrected_epsilon,
    coupled_decay,
    cycled_momentum,
    densified,
    gradient_momentum,
    in_max_epsilon,
    momentum_decay,
    outside_epsilon,
)
from ckptconv.adapters.keras_schedules import chained, epochs, one_cycle, resumed, sequential, table

__all__ = [
    "better_by_fraction",
    "capture",
    "chained",
    "corrected_epsilon",
    "coupled_decay",
    "cycled_momentum",
    "densified",
    "describe",
    "epochs",
    "gradient_momentum",
    "in_max_epsilon",
    "momentum_decay",
    "one_cycle",
    "outside_epsilon",
    "restore",
    "resumed",
    "sequential",
    "table",
]
