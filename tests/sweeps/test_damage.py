"""Checkpoints of every container, cut and flipped: an error with a code, or every tensor as it was.

The long run is `python -m tests.sweeps.damage PATH --flips 1000`.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

import ckptconv

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parent.parent.parent
FIXTURES = ROOT / "fixtures"


def _neutral(folder: Path) -> Path:
    ckptconv.convert(FIXTURES / "plain/mlp-adamw/run.pt", folder / "archived", to="neutral")
    return folder / "archived"


def _safetensors(folder: Path) -> Path:
    save_file({"a": np.arange(12.0).reshape(3, 4), "b": np.ones(3, np.int64)}, folder / "w.safetensors")
    return folder / "w.safetensors"


def _legacy(folder: Path) -> Path:
    torch = pytest.importorskip("torch")
    held = {"a": torch.arange(12.0).reshape(3, 4), "b": torch.ones(3)}
    torch.save(held, folder / "legacy.pt", _use_new_zipfile_serialization=False)
    return folder / "legacy.pt"


CHECKED: dict[str, Callable[[Path], Path]] = {
    "pytorch": lambda _: FIXTURES / "plain/mlp-adamw/run.pt",
    "tensorflow": lambda _: FIXTURES / "keras3/mlp-adamw-fresh/ckpt-1",
    "tensorflow-v1": lambda _: FIXTURES / "tf1/v1-adam/artifact/model.ckpt-5",
    "keras": lambda _: FIXTURES / "keras-file/keras3-adam/artifact/model.keras",
    "neutral": _neutral,
}
UNCHECKED: dict[str, Callable[[Path], Path]] = {
    "safetensors": _safetensors,
    "legacy": _legacy,
    "h5": lambda _: FIXTURES / "h5/keras3-adam/artifact/model.h5",
}
"""Their containers hold no checksums: a flipped value cannot be told, but nothing else may happen."""


@pytest.mark.parametrize("name", [*CHECKED, *UNCHECKED])
def test_damage_is_told_or_does_none(name: str, tmp_path: Path) -> None:
    path = {**CHECKED, **UNCHECKED}[name](tmp_path)
    command = [sys.executable, "-m", "tests.sweeps.damage", str(path), "--flips", "40", "--cuts", "40"]
    if name in UNCHECKED:
        command.append("--unchecked")
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    counts = json.loads(done.stdout.splitlines()[-1])
    assert counts["error"] > 20
