"""Live PyTorch objects: `describe`, `capture`, `restore`."""

from ckptconv.adapters.pytorch import capture, describe, restore

__all__ = ["capture", "describe", "restore"]
