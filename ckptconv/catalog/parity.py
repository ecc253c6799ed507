"""What each direction came to when it was tried: `data/parity.json`, written by the parity matrix itself.

A run was trained, converted through its files and trained on in both frameworks. Its error is the largest
difference of a weight at the end, relative to the largest distance that one has travelled since.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import get_args

from ckptconv.catalog.loading import Record, load
from ckptconv.document import Value
from ckptconv.report import Verdict


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """One run in one direction."""

    run: str
    """E.g. `adam eps1e-7`."""
    algorithm: str
    hyperparameters: Mapping[str, Value]
    source: str
    target: str
    verdict: Verdict
    """What its report said."""
    stated: float | None
    """The largest relative difference of the next update that its reports stated."""
    errors: Mapping[str, Mapping[str, float]]
    """Dtype -> model -> error."""

    def worst(self, dtype: str) -> float | None:
        """The largest error in a dtype; None where the classes do not compute in it."""
        return max(self.errors.get(dtype, {}).values(), default=None)


@cache
def measured() -> tuple[Measured, ...]:
    """Every run in every direction, in the order of the matrix."""
    record = load("parity.json")
    record.text("source")
    found = tuple(each for name, run in record.records("runs") for each in _directions(name, run))
    record.close()
    return found


def _directions(name: str, run: Record) -> list[Measured]:
    algorithm, hyperparameters = run.text("algorithm"), run.scalar_map("hyperparameters")
    found = []
    for pair, entry in run.records("directions"):
        source, _, target = pair.partition(" -> ")
        verdict = entry.text("verdict")
        if verdict not in get_args(Verdict):
            raise ValueError(f"{entry.where}: unknown verdict '{verdict}'")
        found.append(
            Measured(
                run=name,
                algorithm=algorithm,
                hyperparameters=hyperparameters,
                source=source,
                target=target,
                verdict=verdict,  # type: ignore[arg-type]  # checked above
                stated=entry.number("stated") if entry.has("stated") else None,
                errors={d: entry.number_map(d) for d in ("float64", "float32") if entry.has(d)},
            )
        )
        entry.close()
    run.close()
    return found
