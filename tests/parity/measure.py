"""Runs the dense model's half of the matrix and writes what came of it: `python -m tests.parity.measure`.

`docs/optimizers.md` shows `results.json`; `python -m tests.test_optimizers_page` writes that page.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

from tests.parity.matrix import Runs, cases, pairs

RESULTS = Path(__file__).parent / "results.json"


def measured() -> Iterator[tuple[str, dict[str, dict[str, object]]]]:
    """Case by case: pair of frameworks -> verdict and difference in each dtype."""
    with tempfile.TemporaryDirectory() as directory:
        runs = Runs(Path(directory))
        for name, case in cases().items():
            found: dict[str, dict[str, object]] = {}
            for source, target in pairs(case):
                entry: dict[str, object] = {}
                for dtype in case.dtypes:
                    cell = runs.cell(case, source, target, "mlp", dtype)
                    entry["verdict"] = cell.report.verdicts[0].verdict
                    entry[dtype] = float(f"{cell.error:.1e}")
                found[f"{source} -> {target}"] = entry
            yield name, found


def main() -> None:
    lines = []
    for name, found in measured():
        inner = ",\n".join(f"    {json.dumps(pair)}: {json.dumps(entry)}" for pair, entry in found.items())
        lines.append(f"  {json.dumps(name)}: {{\n{inner}\n  }}")
    RESULTS.write_text("{\n" + ",\n".join(lines) + "\n}\n", "utf-8")


if __name__ == "__main__":
    main()
