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


def run(*arguments: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "ckptconv", *map(str, arguments)],
        cwd=cwd,
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


def convert_here(source: object, target: Path, *arguments: object) -> Path:
    """As `convert`, without a process of its own."""
    code, shown = invoke("convert", source, target, *arguments)
    assert code == 0, shown
    return target


def refused_here(*arguments: object) -> list[dict[str, Any]]:
    """As `refused`, without a process of its own."""
    code, shown = invoke(*arguments, "--json")
    assert code == 1, shown
    problems: list[dict[str, Any]] = json.loads(shown)["problems"]
    assert problems
    return problems


def inspect_here(path: object) -> dict[str, Any]:
    """As `inspect`, without a process of its own."""
    code, shown = invoke("inspect", path, "--json")
    assert code == 0, shown
    document: dict[str, Any] = json.loads(shown)
    return document


def invoke(*arguments: object) -> tuple[int, str]:
    """(exit code, everything shown) of a command in this process; what escapes it is raised here."""
    from typer.testing import CliRunner

    from ckptconv.cli import app

    done = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done.exit_code, done.output
