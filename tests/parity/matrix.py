"""The cells of the parity matrix: train, convert through files, go on in both, compare."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import MappingProxyType

import numpy as np

from ckptconv.catalog.optimizer_rows import FRAMEWORKS, row
from ckptconv.conversion import convert
from ckptconv.document import Value
from ckptconv.report import Report
from tests.parity.sides import Array, arguments, rounded, side

STEPS = 20
FLOOR = {"float64": 1e-12, "float32": 2e-5}
FLOAT32_SCALAR = 1e-7
"""Floor of float64 runs where a framework keeps a scalar of the rule in float32 (torch's `mu_product`)."""
CONVOLUTION = 3.0
NO_CONVOLUTION = frozenset({"adafactor"})
"""Refused there: the frameworks factor the second moments of a convolution's kernel over different axes."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """An optimizer with its hyperparameters, and what was measured of it."""

    name: str
    algorithm: str
    hypers: Mapping[str, Value]
    reads_step: bool
    measured: Mapping[str, list[float | None]]
    only: tuple[str, ...] = FRAMEWORKS
    """Frameworks that can train the models of this harness with it (torch's Muon takes matrices alone)."""
    dtypes: tuple[str, ...] = tuple(FLOOR)
    """What the classes compute in: Keras' Muon fails in float64 models."""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """What one conversion came to."""

    report: Report
    error: float
    controls: Mapping[str, float] = field(default_factory=dict)


@cache
def cases() -> Mapping[str, Case]:
    data = json.loads((Path(__file__).parent / "cases.json").read_text("utf-8"))
    return {
        name: Case(
            name=name,
            algorithm=item["algorithm"],
            hypers=item["hyperparameters"],
            reads_step=item["reads_step"],
            measured=item["measured"],
            only=tuple(item.get("only", FRAMEWORKS)),
            dtypes=tuple(item.get("dtypes", FLOOR)),
        )
        for name, item in data["cases"].items()
    }


def pairs(case: Case) -> list[tuple[str, str]]:
    """Ordered pairs of frameworks that have the class and can be given these hyperparameters."""
    have = [f for f in case.only if row(case.algorithm, f) is not None]
    found = [(a, b) for a in have for b in have if a != b or len(have) == 1]
    return [(a, b) for a, b in found if _makes(a, case)]


def _makes(framework: str, case: Case) -> bool:
    """Whether the source's class can be told everything that the case says."""
    known = row(case.algorithm, framework)
    assert known is not None
    told = {**known.neutral, **{n: h.default for n, h in known.hyperparameters.items()}}
    return all(
        name in known.hyperparameters or told.get(name) == value for name, value in case.hypers.items()
    )


def cells() -> list[tuple[str, str, str, str, str]]:
    """Every cell: case, source, target, model, dtype; the convolutional model for one case of each."""
    first: dict[str, str] = {}
    for name, case in cases().items():
        if name != "sgd plain":
            first.setdefault(case.algorithm, name)
    return [
        (name, source, target, model, dtype)
        for name, case in cases().items()
        for source, target in pairs(case)
        for model in ("mlp", "cnn")
        for dtype in case.dtypes
        if model == "mlp" or (name in first.values() and case.algorithm not in NO_CONVOLUTION)
    ]


def limit(case: Case, source: str, target: str, dtype: str, model: str = "mlp") -> float:
    """The largest difference that a cell may show.

    The numbers are the dense model's. Behind a normalization gradients are smaller and an epsilon weighs
    more: Adam was measured at 1e-4 there against 3e-5, hence the factor. Float32 sums are longer, too.
    """
    numbers = case.measured.get(f"{source} -> {target}")
    number = numbers[0 if dtype == "float64" else 1] if numbers else 0.0
    floor = FLOOR[dtype]
    if dtype == "float64" and case.algorithm == "nadam":
        floor = FLOAT32_SCALAR
    return (CONVOLUTION if model == "cnn" else 1.0) * max(3 * (number or 0.0), floor)


def allowed(case: Case, source: str, target: str) -> tuple[str, ...]:
    """Codes that the pair needs, because the target's class cannot be told something."""
    known = row(case.algorithm, target)
    assert known is not None
    lacks = [
        name
        for name, value in case.hypers.items()
        if name not in known.hyperparameters and known.neutral.get(name, value) != value
    ]
    return ("hyperparameter-unsupported",) if lacks and "dampening" not in lacks else ()


class Runs:
    """Source runs, each trained once."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._done: dict[tuple[str, str, str, str], tuple[Path, dict[str, Array], dict[str, Array]]] = {}

    def of(
        self, case: Case, source: str, model: str, dtype: str
    ) -> tuple[Path, dict[str, Array], dict[str, Array]]:
        """(checkpoint after `STEPS`, weights there, weights after as many again)."""
        key = (case.name, source, model, dtype)
        if key not in self._done:
            place = self._place("-".join(key))
            run = side(source, model, case.algorithm, case.hypers, seed=1, dtype=dtype)
            run.train(0, STEPS)
            switch = run.weights()
            saved = run.save(place)
            run.train(STEPS, STEPS)
            self._done[key] = saved, switch, run.weights()
        return self._done[key]

    def _place(self, name: str) -> Path:
        place = self.directory / name.replace(" ", "_")
        place.mkdir(parents=True, exist_ok=True)
        return place

    def cell(
        self,
        case: Case,
        source: str,
        target: str,
        model: str,
        dtype: str,
        *,
        controls: bool = False,
        set_: Mapping[str, str] = MappingProxyType({}),
        allow: tuple[str, ...] = (),
    ) -> Cell:
        """Convert the source's run onto a fresh template of the target, and go on."""
        saved, switch, reached = self.of(case, source, model, dtype)
        place = self._place(f"{case.name}-{source}-{target}-{model}-{dtype}")
        template = side(target, model, case.algorithm, case.hypers, seed=2, dtype=dtype).save(place)
        converted = place / ("out.pt" if target == "torch" else "out-1")
        report = convert(
            saved,
            converted,
            template=template,
            set_={**supplied(case, source), **set_},
            allow=(*allowed(case, source, target), *allow),
            force=True,
        )
        code = [] if target == "torch" else report.target_requires

        def resumed(*, cold: bool = False, stepless: bool = False) -> float:
            run = side(target, model, case.algorithm, case.hypers, seed=3, dtype=dtype, code=code)
            if cold:
                run.put(switch)
            else:
                run.restore(converted)
            if stepless:
                run.forget_step()
            run.train(STEPS, STEPS)
            return difference(run.weights(), reached, switch)

        error = resumed()
        withheld = {}
        if controls:
            if case.name != "sgd plain":  # it has no state
                withheld["cold"] = resumed(cold=True)
            if case.reads_step:
                withheld["no step"] = resumed(stepless=True)
        return Cell(report=report, error=error, controls=withheld)


def supplied(case: Case, source: str) -> dict[str, str]:
    """What the source's file does not hold and its user knows."""
    known = row(case.algorithm, source)
    assert known is not None
    told = {} if known.step_key else {"step": str(STEPS)}
    if source != "torch":
        for name, value in case.hypers.items():
            entry = known.hyperparameters.get(name)
            if entry is not None and not entry.stored:
                told[name] = json.dumps(rounded(value))
    return told


def difference(ours: Mapping[str, Array], theirs: Mapping[str, Array], before: Mapping[str, Array]) -> float:
    """Largest weight difference relative to the largest distance travelled since the switch."""
    travelled = max(float(np.abs(theirs[name] - before[name]).max()) for name in theirs)
    return max(float(np.abs(ours[name] - theirs[name]).max()) for name in theirs) / travelled


__all__ = ["STEPS", "Case", "Cell", "Runs", "arguments", "cases", "limit", "pairs"]
