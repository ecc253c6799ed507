"""The benchmarks run, at a small size: what they measure is nobody's business here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PATHS = {"torch to safetensors", "torch to neutral", "torch to bundle", "bundle to torch", "DCP to torch"}


def run(script: str, *arguments: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "benchmarks" / script), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_every_path_is_measured_beside_its_references(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    pytest.importorskip("tensorflow")
    results = tmp_path / "results.json"
    shown = run("bench_paths.py", "--sizes", "4MiB", "--repeat", "1", "--json", str(results))
    rows = json.loads(results.read_text())
    assert {row["way"] for row in rows} == PATHS
    for way in PATHS:
        found = {row["done_by"]: row["figures"] for row in rows if row["way"] == way}
        assert found.keys() >= {"copy and fsync", "ckptconv", "ckptconv --no-verify"}
        nbytes = next(row["nbytes"] for row in rows if row["way"] == way)
        assert found["copy and fsync"]["written"] == nbytes
        assert found["ckptconv"]["written"] > 0.9 * nbytes
        assert all(figures["peak_rss"] > figures["peak_anonymous"] >= 0 for figures in found.values())
    assert len(shown.splitlines()) == len(rows) + 2


@pytest.mark.slow
def test_turning_a_matrix_is_measured() -> None:
    assert len(run("bench_turn.py", "--repeat", "1").splitlines()) == 8
