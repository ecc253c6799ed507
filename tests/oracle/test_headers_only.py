"""What a checkpoint of 100 GB costs to look at: its headers and its counters. The files are holes."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

import ckptconv  # noqa: E402
from ckptconv.dialects.table import DIALECTS  # noqa: E402
from ckptconv.formats.table import FORMATS  # noqa: E402

SIDE, LAYERS = 1 << 15, 8
"""One float32 matrix takes 4 GiB; a run has three for each layer."""


def of_torch(folder: Path) -> Path:
    """A training run as `torch.save` leaves it, its data skipped."""

    def matrix() -> Any:
        return torch.empty(SIDE, SIDE)

    moments = [{"step": torch.zeros(()), "exp_avg": matrix(), "exp_avg_sq": matrix()} for _ in range(LAYERS)]
    group = {
        "lr": 0.1, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0, "amsgrad": False,
        "decoupled_weight_decay": False, "params": list(range(LAYERS)),
    }  # fmt: skip
    run = {
        "model": {f"{layer}.weight": matrix() for layer in range(LAYERS)},
        "optimizer": {"state": dict(enumerate(moments)), "param_groups": [group]},
    }
    with torch.serialization.skip_data():
        torch.save(run, folder / "run.pt")
    return folder / "run.pt"


def of_safetensors(folder: Path) -> Path:
    size = 4 * SIDE * SIDE
    header = {
        f"{layer}.weight": {
            "dtype": "F32", "shape": [SIDE, SIDE], "data_offsets": [layer * size, (layer + 1) * size],
        }
        for layer in range(3 * LAYERS)
    }  # fmt: skip
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with (folder / "weights.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + 3 * LAYERS * size)
    return folder / "weights.safetensors"


@pytest.mark.parametrize("make", [of_torch, of_safetensors])
def test_inspecting_reads_headers_and_counters(make: Any, tmp_path: Path) -> None:
    counters = Path("/proc/self/io")
    if not counters.exists():
        pytest.skip("the system does not count what a process reads")

    def read() -> int:
        return int(counters.read_text().split("rchar:")[1].split()[0])

    path = make(tmp_path)
    assert path.stat().st_size > 100e9
    assert len(FORMATS) < len(DIALECTS)  # imports them all: modules are files too
    before = read()
    checkpoint = ckptconv.open(path)
    assert sum(tensor.spec.nbytes for _, tensor in checkpoint.tensors()) > 100e9
    assert read() - before < 1 << 19
