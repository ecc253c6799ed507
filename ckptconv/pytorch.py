"""Live PyTorch objects: `describe`, `capture`, `restore`; what the lines of a report call."""

from ckptconv.adapters.pytorch import capture, describe, restore
from ckptconv.adapters.pytorch_exact import decoupled_decay, inside_epsilon, raw_epsilon, velocity_momentum

__all__ = [
    "capture",
    "decoupled_decay",
    "describe",
    "inside_epsilon",
    "raw_epsilon",
    "restore",
    "velocity_momentum",
]
