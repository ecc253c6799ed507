"""The cells of the parity matrix: train, convert through files, go on in both, compare."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import numpy as np

from ckptconv.catalog.directions import directions
from ckptconv.catalog.optimizer_rows import FRAMEWORKS, algorithms, row
from ckptconv.catalog.transitions import between
from ckptconv.conversion import convert
from ckptconv.document import Value
from ckptconv.report import Report, Verdict
from tests.parity.sides import FIXED, Array, Side, part_of, rounded, side

STEPS = 20
MODELS = ("mlp", "cnn")
FLOOR = {"float64": 1e-12, "float32": 2e-5}
FLOAT32_SCALAR = {"nadam": 1e-7}
"""Floor of float64 runs where a framework keeps a scalar of the rule in float32 (torch's `mu_product`)."""
OTHER_RULE = 1e-2
"""A cell that differs by more compares two rules: what is withheld shows beside the target's own run."""
NOT_IN_THE_MATRIX: Mapping[tuple[str, str], str] = {
    ("lbfgs", "torch"): "its update needs the loss as a function; its state goes to its own class only",
    ("sparse_adam", "torch"): "it takes sparse gradients only; its state goes to its own class only",
    ("schedule_free_adamw", "torch"): "another package's, see tests/oracle/test_schedule_free.py",
}
"""Classes without a case; `tests/oracle/test_torch_only_optimizers.py` shows what there is to show."""


FACTORED = frozenset(
    ("adafactor", *pair, "cnn")
    for framework in ("keras3", "tf_keras")
    for pair in (("torch", framework), (framework, "torch"))
)
"""Refused, and tested so: torch factors a convolution's second moments over other axes than Keras."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """An optimizer with its hyperparameters, and what was measured of it."""

    name: str
    algorithm: str
    hypers: Mapping[str, Value]
    reads_step: bool
    """LAMB's does not: its trust ratio takes the bias correction out again, but for the epsilon."""
    measured: Mapping[str, list[float | None]]
    only: tuple[str, ...] = FRAMEWORKS
    """Frameworks that can train the models of this harness with it."""
    helpers: Mapping[str, str] = field(default_factory=dict)
    """Calls around torch's optimizers, by name, with which its rule is the other one's to the last digit. The
    verdict is that of the stock classes all the same: a file does not tell of a helper."""

    @property
    def has_state(self) -> bool:
        """Whether the rule reads a slot."""
        rows = (row(self.algorithm, framework) for framework in FRAMEWORKS)
        readers = [
            known.slot_readers.get(slot) for known in rows if known is not None for slot in known.slots
        ]
        return any(reader is None or self.hypers.get(reader) for reader in readers)


class Place(NamedTuple):
    """One cell of the matrix."""

    case: str
    source: str
    target: str
    model: str
    dtype: str


@dataclass(frozen=True, kw_only=True)
class Run:
    """The source's run: its checkpoint after `STEPS` and its weights around it and at the end."""

    saved: Path
    before: Mapping[str, Array]
    """One update before the checkpoint."""
    switch: Mapping[str, Array]
    after: Mapping[str, Array]
    """One update after it."""
    end: Mapping[str, Array]


@dataclass(frozen=True, kw_only=True)
class Control:
    """A run of the target from which something was withheld."""

    error: float
    """Distance from the source's run."""
    moved: float
    """Distance from the target's run that has everything."""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """What one conversion came to."""

    place: Place
    report: Report
    error: float
    steps: frozenset[int]
    """What the target's optimizer counted after restoring; none where its class counts nothing."""
    same_weights: bool
    """Whether the converted weights are the source's, bit for bit."""
    excess: float
    """How far an element of the next update is beyond the stated difference, relative to the update."""
    controls: Mapping[str, Control] = field(default_factory=dict)

    @property
    def verdict(self) -> Verdict:
        return self.report.verdicts[0].verdict

    @property
    def stated(self) -> float | None:
        """The report's largest relative difference of the next update; None where it states none."""
        return stated(self.report)


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
            helpers=item.get("helpers", {}),
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
    part = part_of(case.algorithm)
    others = {
        name for same in known.equivalents if same.keys() & known.hyperparameters.keys() for name in same
    }
    others |= part.own if part is not None else set()
    return all(
        name in known.hyperparameters or name in others or told.get(name) == value
        for name, value in case.hypers.items()
    )


def cells() -> list[Place]:
    """Every cell; those that share a source's run or a target's template stand together."""
    return [
        Place(name, source, target, model, dtype)
        for name, case in cases().items()
        for model in MODELS
        for dtype in FLOOR
        for source, target in pairs(case)
        if (case.algorithm, source, target, model) not in FACTORED
    ]


def expected() -> Iterator[tuple[str, str, str, str]]:
    """(algorithm, source, target, model) of everything that the catalog says converts."""
    crossing = {
        (d.algorithm, d.source, d.target)
        for d in directions()
        if d.verdict != "refused" and {d.source, d.target} <= {*FRAMEWORKS}
    }
    alone = {name for name in algorithms() if name not in {algorithm for algorithm, _, _ in crossing}}
    for name in alone:
        own = [f for f in FRAMEWORKS if row(name, f) is not None and (name, f) not in NOT_IN_THE_MATRIX]
        crossing |= {(name, f, f) for f in own}
    yield from ((*each, model) for each in sorted(crossing) for model in MODELS)


def number(case: Case, source: str, target: str, dtype: str) -> float:
    """What was measured of a pair before; 0 where nothing was."""
    return (case.measured.get(f"{source} -> {target}") or [0.0, 0.0])[list(FLOOR).index(dtype)] or 0.0


def floor(case: Case, dtype: str) -> float:
    """What an exact conversion may differ by."""
    return FLOAT32_SCALAR.get(case.algorithm, FLOOR[dtype]) if dtype == "float64" else FLOOR[dtype]


def limit(case: Case, place: Place, verdict: Verdict) -> float:
    """The largest difference that a cell may show."""
    if verdict.startswith("exact"):
        return floor(case, place.dtype)
    return max(3 * number(case, place.source, place.target, place.dtype), floor(case, place.dtype))


def complaints(cell: Cell) -> list[str]:
    """Everything in which a cell is not what the catalog claims."""
    place, case = cell.place, cases()[cell.place.case]
    bound = limit(case, place, cell.verdict)
    found = []
    if not cell.error <= bound:  # nan too
        found.append(f"{cell.verdict}: {cell.error:.1e} apart, may be {bound:.1e}")
    same = place.dtype == "float64" and cell.error <= floor(case, place.dtype) and not case.helpers
    if same and not cell.verdict.startswith("exact"):
        found.append(f"{cell.verdict}: {cell.error:.1e} apart, which is the same")
    if not cell.same_weights:
        found.append("the weights are not the source's")
    if not cell.steps <= {STEPS}:
        found.append(f"counts {sorted(cell.steps)} updates, not {STEPS}")
    if cell.verdict == "approximate" and cell.stated is None:
        found.append("no difference is stated")
    if cell.excess > 0:
        found.append(f"an element of the next update is {cell.excess:.1e} of it beyond what is stated")
    for name, control in cell.controls.items():
        least = 10 * max(cell.error, 1e-6)
        told, shown = (control.moved, 1e-2) if cell.error > OTHER_RULE else (control.error, least)
        if not told > shown:
            found.append(f"{name}: {told:.1e} apart, should be above {shown:.1e}")
    return found


def allowed(case: Case, source: str, target: str) -> tuple[str, ...]:
    """Codes that the pair needs, because the target's class cannot be told something, or has another rule."""
    ours, known = row(case.algorithm, source), row(case.algorithm, target)
    assert ours is not None
    assert known is not None
    if any(step.verdict == "lossy" for step in between(known.family, ours.base_form, known.base_form)[0]):
        return ("form-mismatch",)
    lacks = [
        name
        for name, value in case.hypers.items()
        if name not in known.hyperparameters and known.neutral.get(name, value) != value
    ]
    return ("hyperparameter-unsupported",) if lacks and "dampening" not in lacks else ()


class Runs:
    """Source runs and templates, each made once."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._done: dict[tuple[str, str, str, str], Run] = {}
        self._templates: dict[tuple[str, str, str, str], Path] = {}

    def of(self, case: Case, source: str, model: str, dtype: str) -> Run:
        """The source's run, trained `STEPS` on each side of its checkpoint."""
        key = (case.name, source, model, dtype)
        if key not in self._done:
            run = _side(case, source, model, dtype, seed=1)
            run.train(0, STEPS - 1)
            before = run.weights()
            run.train(STEPS - 1, 1)
            switch = run.weights()
            saved = run.save(self._place("run", *key))
            run.train(STEPS, 1)
            after = run.weights()
            run.train(STEPS + 1, STEPS - 1)
            self._done[key] = Run(saved=saved, before=before, switch=switch, after=after, end=run.weights())
        return self._done[key]

    def template(self, case: Case, target: str, model: str, dtype: str) -> Path:
        """A fresh checkpoint of the target."""
        key = (case.name, target, model, dtype)
        if key not in self._templates:
            fresh = _side(case, target, model, dtype, seed=2)
            self._templates[key] = fresh.save(self._place("template", *key))
        return self._templates[key]

    def _place(self, *names: str) -> Path:
        place = self.directory / "-".join(names).replace(" ", "_")
        place.mkdir(parents=True, exist_ok=True)
        return place

    def cell(
        self,
        place: Place,
        *,
        controls: bool = True,
        set_: Mapping[str, str] = MappingProxyType({}),
        allow: tuple[str, ...] = (),
    ) -> Cell:
        """Convert the source's run onto a fresh template of the target, and go on."""
        case, source, target, model, dtype = cases()[place.case], *place[1:]
        origin = self.of(case, source, model, dtype)
        converted = self._place(*place) / ("out.pt" if target == "torch" else "out-1")
        report = convert(
            origin.saved,
            converted,
            template=self.template(case, target, model, dtype),
            set_={**supplied(case, source), **set_},
            allow=(*allowed(case, source, target), *allow),
            force=True,
        )
        code = [] if target == "torch" else report.target_requires
        run = _side(case, target, model, dtype, seed=3, code=code)
        run.restore(converted)
        restored, steps = run.weights(), frozenset(run.steps())
        run.train(STEPS, 1)
        excess = beyond(origin, run.weights(), case.hypers, stated(report)) if dtype == "float64" else 0.0
        run.train(STEPS + 1, STEPS - 1)
        reached = run.weights()

        def withheld(name: str) -> Control:
            other = run
            if name == "cold":
                other = _side(case, target, model, dtype, seed=3, code=code)
                other.put(origin.switch)
            else:
                other.restore(converted)
                other.forget_step()
            other.train(STEPS, STEPS)
            ends = other.weights()
            return Control(
                error=difference(ends, origin.end, origin.switch),
                moved=difference(ends, reached, origin.switch),
            )

        names = (*("cold",) * case.has_state, *("no step",) * case.reads_step) if controls else ()
        return Cell(
            place=place,
            report=report,
            error=difference(reached, origin.end, origin.switch),
            steps=steps,
            same_weights=all(np.array_equal(restored[name], origin.switch[name]) for name in restored),
            excess=excess,
            controls={name: withheld(name) for name in names},
        )


def _side(case: Case, kind: str, model: str, dtype: str, *, seed: int, code: Sequence[str] = ()) -> Side:
    return side(
        kind, model, case.algorithm, case.hypers, seed=seed, dtype=dtype, code=code, helpers=case.helpers
    )


def supplied(case: Case, source: str) -> dict[str, str]:
    """What the source's file does not hold and its user knows."""
    known = row(case.algorithm, source)
    assert known is not None
    told = {} if known.step_key or part_of(case.algorithm) else {"step": str(STEPS)}
    if source != "torch":
        for name, value in case.hypers.items():
            entry = known.hyperparameters.get(name)
            if entry is not None and not entry.stored:
                told[name] = json.dumps(value if name in FIXED else rounded(value))
    return told


def difference(ours: Mapping[str, Array], theirs: Mapping[str, Array], before: Mapping[str, Array]) -> float:
    """Largest weight difference relative to the largest distance travelled since the switch."""
    travelled = max(float(np.abs(theirs[name] - before[name]).max()) for name in theirs)
    return float(np.max([np.abs(ours[name] - theirs[name]).max() for name in theirs])) / travelled


def stated(report: Report) -> float | None:
    """The largest relative difference of the next update that a report states."""
    texts = [text for text in report.verdicts[0].residuals if "next update" in text]
    return float(re.findall(r"\d\.\de[-+]\d+", texts[0])[0]) if texts else None


def beyond(
    origin: Run, after: Mapping[str, Array], hypers: Mapping[str, Value], largest: float | None
) -> float:
    """How far the next update is beyond the stated difference, at its worst element; 0 where nowhere.

    The difference is stated of what the gradient moves. A buffer of momentum and a decay move the weights by
    the same amount in both and are taken off. The stated number has two digits.
    """
    if largest is None:
        return 0.0
    momentum, decay, rate = (
        float(rounded(hypers.get(n)) or 0) for n in ("momentum", "weight_decay", "learning_rate")
    )
    worst = 0.0
    for name, switch in origin.switch.items():
        common = momentum * (switch - origin.before[name]) - rate * decay * switch
        theirs, ours = (weights[name] - switch - common for weights in (origin.after, after))
        room = 1.06 * largest * np.abs(theirs) + 1e-11 * np.abs(theirs).max()
        worst = max(worst, float(((np.abs(ours - theirs) - room) / np.abs(theirs).max()).max()))
    return worst
