"""Megatron-LM's checkpoints on their way back: what torch and megatron-core load of ours, and go on from."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from torch.distributed.checkpoint.format_utils import dcp_to_torch_save  # noqa: E402

import ckptconv  # noqa: E402
from tests.support.torch_equal import assert_same, bits  # noqa: E402

MEGATRON = Path(__file__).parents[2] / "fixtures" / "megatron"
FILES = sorted(MEGATRON.glob("mlp*/**/model_optim_rng.pt"))
FOLDERS = [
    MEGATRON / "gpt-2-ranks" / "iter_0000003",
    MEGATRON / "gpt-distributed-optimizer" / "iter_0000002",
    MEGATRON / "gpt-distributed-optimizer" / "in-buckets",
]
ALLOWED = ("opaque-globals",)


def load(path: Path) -> Any:
    return torch.load(path, weights_only=False)


def through_neutral(source: Path, scratch: Path, to: str) -> Path:
    ckptconv.convert(source, scratch / "neutral", to="neutral")
    ckptconv.convert(scratch / "neutral", scratch / "back", to=to, allow=ALLOWED)
    return scratch / "back"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(MEGATRON).parts[0])
def test_a_file_comes_back(path: Path, tmp_path: Path) -> None:
    """Lists of float32 copies with the attributes that Megatron sets on them, arguments, order."""
    before, after = load(path), load(through_neutral(path, tmp_path, "pytorch:megatron"))
    assert vars(before.pop("args")) == vars(after.pop("args"))
    after.pop("ckptconv", None)
    assert_same(before, after)


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda path: path.name)
def test_a_folder_comes_back(folder: Path, tmp_path: Path) -> None:
    again = through_neutral(folder, tmp_path, "dcp")
    before, after = load(folder / "common.pt"), load(again / "common.pt")
    assert vars(before.pop("args")) == vars(after.pop("args"))
    after.pop("ckptconv", None)
    assert before.keys() == after.keys()
    for key, value in before.items():
        assert flat(value) == flat(after[key]), key
    assert (again / "metadata.json").is_file()
    theirs, ours = entries(folder, tmp_path / "theirs.pt"), entries(again, tmp_path / "ours.pt")
    assert {k: v for k, v in ours.items() if not k.startswith("ckptconv.")} == theirs


def entries(folder: Path, scratch: Path) -> dict[str, object]:
    dcp_to_torch_save(folder, scratch)
    return {
        k: (v.dtype, v.shape, bits(v)) if isinstance(v, torch.Tensor) else repr(v)
        for k, v in load(scratch).items()
    }


def flat(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.dtype, value.shape, bits(value)
    if isinstance(value, dict):
        return {key: flat(part) for key, part in value.items()}
    return [flat(part) for part in value] if isinstance(value, (list, tuple)) else value


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("megatron") is None, reason="needs megatron-core to go on")
@pytest.mark.parametrize("path", [FILES[0].parents[1], FOLDERS[0]], ids=["torch", "torch_dist"])
def test_megatron_goes_on_from_ours_as_from_its_own(path: Path, tmp_path: Path) -> None:
    """Model, optimizer and schedule loaded by megatron-core, and trained for three more updates."""
    to = "dcp" if (path / ".metadata").exists() else "pytorch:megatron"
    back = through_neutral(path, tmp_path, to)
    source = path if to == "dcp" else next(path.rglob("*.pt"))
    ends = []
    for number, start in enumerate((source, back)):
        out = tmp_path / f"{number}.pt"
        script = MEGATRON / "resume.py"
        subprocess.run([sys.executable, str(script), str(start), str(out)], check=True, capture_output=True)
        ends.append(load(out))
    assert_same(*ends)
    assert ends[0]["iteration"] == {"dcp": 6, "pytorch:megatron": 8}[to]
