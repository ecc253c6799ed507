"""Live Keras objects: `describe`, `capture`, `restore`."""

from ckptconv.adapters.keras import capture, describe, restore

__all__ = ["capture", "describe", "restore"]
