"""A conversion that is killed at any moment leaves the old target or the new one, the source as it was."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

import ckptconv

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parent.parent.parent
COUNT = 25
TARGETS = {
    "pytorch": ("out/run.pt", "pytorch:state-dict"),
    "safetensors": ("out/weights.safetensors", ""),
    "shards": ("out/weights.safetensors.index.json", ""),
    "neutral": ("out/archived", "neutral"),
    "tensorflow": ("out/ckpt-1", "tensorflow:tf-module"),
    "dcp": ("out/folder", "dcp"),
    "keras": ("out/model.keras", ""),
    "h5": ("out/model.h5", ""),
}
"""Eight kinds of targets times 25 deaths."""
SEVERAL = {"shards", "tensorflow", "neutral", "dcp"}
"""Those of several files, which cannot all be replaced in one step."""


RUNS = {"keras": "keras-file/keras3-adam/artifact/model.keras", "h5": "h5/keras3-adam/artifact/model.h5"}
"""Fixtures that are archived first: these targets take their structure from what they were."""


def make_sources(kind: str, folder: Path) -> Path:
    """A state_dict of 24 MB, or an archived run; and an older one beside it."""
    if kind in RUNS:
        run = ROOT / "fixtures" / RUNS[kind]
        ckptconv.convert(run, folder / "run", to="neutral")
        ckptconv.convert(run, folder / "run.old", to="neutral", set_={"step": "12345"})
        return folder / "run"
    for name, seed in (("weights.safetensors", 1), ("weights.safetensors.old", 2)):
        generator = np.random.default_rng(seed)
        arrays = {f"layers.{i}.weight": generator.random((512, 512), np.float32) for i in range(24)}
        save_file(arrays, folder / f"{name}.tmp.safetensors")
        (folder / f"{name}.tmp.safetensors").rename(folder / name)
    return folder / "weights.safetensors"


def digest(path: Path) -> str:
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files if file.is_file())).hexdigest()


@pytest.mark.parametrize("kind", TARGETS)
def test_a_death_leaves_the_old_target_or_the_new_one(kind: str, tmp_path: Path) -> None:
    source = make_sources(kind, tmp_path)
    name, to = TARGETS[kind]
    target = tmp_path / name
    target.parent.mkdir()
    before = digest(source)
    command = [
        sys.executable, "-m", "tests.faults.killing", str(source), str(target), to, str(COUNT), "7",
    ]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    told, *deaths = [json.loads(line) for line in done.stdout.splitlines()]
    assert told["old"] != told["new"]
    assert len(deaths) == COUNT
    assert sum(death["killed"] for death in deaths) > COUNT // 4
    for death in deaths:
        seen = {name: sha for name, sha in death["after"].items() if ".ckptconv-" not in name}
        whole = seen in (told["old"], told["new"])
        assert whole or (kind in SEVERAL and not _is_readable(kind, seen)), seen.keys()
        assert death["refused"] == ["target-exists"]
        assert death["cleared"] in (told["old"], told["new"])
    assert digest(source) == before
    assert ckptconv.open(target).params


def _is_readable(kind: str, seen: dict[str, str]) -> bool:
    """Whether the file that makes a checkpoint of the others is there."""
    commit = {
        "shards": "weights.safetensors.index.json", "tensorflow": "ckpt-1.index",
        "neutral": "archived/manifest.json", "dcp": "folder/.metadata",
    }[kind]  # fmt: skip
    return commit in seen
