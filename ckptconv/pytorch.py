"""Live PyTorch objects: `describe`, `capture`, `restore`; what the lines of a report call."""

from ckptconv.adapters.pytorch import capture, describe, restore
from ckptconv.adapters.pytorch_exact import (
    after_max_epsilon,
    decoupled_decay,
    full_orthogonalization,
    inside_epsilon,
    lion,
    raw_epsilon,
    velocity_momentum,
)
from ckptconv.adapters.torch_recurrent import freeze_recurrent_bias

__all__ = [
    "after_max_epsilon",
    "capture",
    "decoupled_decay",
    "describe",
    "freeze_recurrent_bias",
    "full_orthogonalization",
    "inside_epsilon",
    "lion",
    "raw_epsilon",
    "restore",
    "velocity_momentum",
]
