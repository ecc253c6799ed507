"""Where the dialects of each format stand, so that only those of the format at hand are imported.

A new dialect is a module that calls `register(...)` at its end, and its name here.
"""

from __future__ import annotations

from ckptconv.dialects.base import REGISTERED, Dialect
from ckptconv.registry import Registry

_MODULES: dict[str, tuple[str, ...]] = {
    "dcp": ("dcp",),
    "h5": ("h5_file",),
    "keras": ("keras_file",),
    "neutral": ("neutral",),
    "pytorch": (
        "accelerate",
        "deepspeed",
        "hf_trainer",
        "hub_folder",
        "lightning",
        "megatron",
        "torch_plain",
        "torch_state_dict",
        "torch_titan",
    ),
    "safetensors": ("safetensors_weights",),
    "tensorflow": ("keras3", "tf1", "tf_keras", "tf_module"),
    "weights-h5": ("keras_file",),
}

DIALECTS: Registry[tuple[str, str], Dialect] = Registry(
    REGISTERED,
    {format_: tuple(f"{__package__}.{name}" for name in names) for format_, names in _MODULES.items()},
    lambda key: key[0],
)
"""Dialects by (format, name)."""


def dialects_of(format_: str) -> tuple[Dialect, ...]:
    """Those of a format, by name in order."""
    return tuple(DIALECTS.group(format_).values())
