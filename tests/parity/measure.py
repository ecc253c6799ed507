"""Runs the matrix and writes what came of it: `python -m tests.parity.measure [pytest's options]`.

`ckptconv formats --optimizers` and `docs/optimizers.md` show it; the page is made anew by
`python -m tests.test_optimizers_page`. A cell that is not what it should be is not written; of a cell
that is not run (`-k adam`) what was written before stays.
"""

from __future__ import annotations

import json
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

import ckptconv
from tests.parity.matrix import Place, cases, cells

RESULTS = Path(ckptconv.__file__).parent / "catalog" / "data" / "parity.json"
Found = dict[Place, dict[str, Any]]


class Recorder:
    """What each cell's test has recorded, whichever process it ran in."""

    def __init__(self) -> None:
        self.found: Found = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        recorded: dict[str, Any] = dict(report.user_properties)
        if report.when == "call" and report.passed and "place" in recorded:
            self.found[Place(*recorded.pop("place"))] = recorded


def written() -> Found:
    """What was measured before."""
    found: Found = {}
    for name, run in json.loads(RESULTS.read_text("utf-8"))["runs"].items() if RESULTS.exists() else ():
        for pair, entry in run["directions"].items():
            for dtype in ("float64", "float32"):
                for model, error in entry.get(dtype, {}).items():
                    cell = {"verdict": entry["verdict"], "stated": entry.get("stated"), "error": error}
                    found[Place(name, *pair.split(" -> "), model, dtype)] = cell
    return found


def table(found: Found) -> dict[str, object]:
    """Case -> what it is, and per direction its verdict, its stated difference and its error in each cell."""
    result: dict[str, object] = {}
    for name, case in cases().items():
        directions: dict[str, dict[str, Any]] = {}
        for place in (each for each in cells() if each.case == name and each in found):
            cell = found[place]
            entry = directions.setdefault(f"{place.source} -> {place.target}", {"verdict": cell["verdict"]})
            if cell["stated"] is not None:
                entry["stated"] = max(cell["stated"], entry.get("stated", 0.0))
            entry.setdefault(place.dtype, {})[place.model] = float(f"{cell['error']:.1e}")
        hypers = dict(case.hypers)
        result[name] = {"algorithm": case.algorithm, "hyperparameters": hypers, "directions": directions}
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "keras", "tf_keras", "tensorflow"))
    return {"source": f"python -m tests.parity.measure with {versions}", "runs": result}


def text(value: object, depth: int = 4) -> str:
    """JSON with one line per direction."""
    if not isinstance(value, dict) or depth == 0:
        return json.dumps(value)
    pad = "  " * (5 - depth)
    inner = ",\n".join(f"{pad}{json.dumps(key)}: {text(item, depth - 1)}" for key, item in value.items())
    return "{\n" + inner + "\n" + pad[2:] + "}"


def main() -> int:
    recorder = Recorder()
    tests = str(Path(__file__).parent / "test_parity.py")
    code = pytest.main([tests, "-m", "parity", *sys.argv[1:]], plugins=[recorder])
    RESULTS.write_text(text(table({**written(), **recorder.found})) + "\n", "utf-8")
    return int(code)


if __name__ == "__main__":
    raise SystemExit(main())
