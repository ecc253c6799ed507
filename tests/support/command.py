"""The command line as a user runs it: a process of its own, its exit code, its JSON."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
FIXTURES = ROOT / "fixtures"


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "ckptconv", *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )


def convert(source: object, target: Path, *arguments: object) -> Path:
    """The target, converted; the command must succeed."""
    done = run("convert", source, target, *arguments)
    assert done.returncode == 0, done.stderr + done.stdout
    return target


def refused(*arguments: object) -> list[dict[str, Any]]:
    """The problems for which a command, run with `--json`, leaves with 1."""
    done = run(*arguments, "--json")
    assert done.returncode == 1, done.stdout + done.stderr
    problems: list[dict[str, Any]] = json.loads(done.stdout)["problems"]
    assert problems
    return problems


def inspect(path: object) -> dict[str, Any]:
    """The document that `inspect --json` prints."""
    done = run("inspect", path, "--json")
    assert done.returncode == 0, done.stderr
    document: dict[str, Any] = json.loads(done.stdout)
    return document
