"""What the tables say of each direction, before any state is seen: the verdict of an algorithm from one
framework to another, with and without what its options add, and what was measured of it.

A conversion may still be worse than its direction: groups, steps or decays that the target cannot hold.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import chain, combinations

from ckptconv.catalog.conversion import nearest_form
from ckptconv.catalog.findings import worst
from ckptconv.catalog.optimizer_rows import COLUMNS, Row, algorithms, row
from ckptconv.catalog.parity import Measured, measured
from ckptconv.catalog.transitions import between
from ckptconv.document import Value
from ckptconv.report import Verdict


@dataclass(frozen=True, slots=True, kw_only=True)
class Direction:
    """One algorithm from one framework to another."""

    algorithm: str
    source: str
    target: str
    options: tuple[str, ...]
    """Options that the run has, of those that add a slot; empty where none of them matters, or none is on."""
    verdict: Verdict
    remains: tuple[str, ...] = ()
    """What stays different."""
    needs: tuple[str, ...] = ()
    """What the run must have been, because the target's class cannot be told it: `momentum_decay = 1.0`."""
    measured: tuple[Measured, ...] = ()
    """The runs that were tried in it."""


def directions() -> Iterator[Direction]:
    """Every ordered pair of frameworks that both have an algorithm, in the order of the tables."""
    for algorithm in algorithms():
        for source in COLUMNS:
            for target in COLUMNS:
                ours, theirs = row(algorithm, source), row(algorithm, target)
                if ours is not None and theirs is not None and source != target:
                    yield from _of(ours, theirs)


def _of(ours: Row, theirs: Row) -> Iterator[Direction]:
    """One direction for all options that come to the same."""
    options = tuple(dict.fromkeys((*ours.slot_conditions.values(), *theirs.slot_conditions.values())))
    subsets = chain.from_iterable(combinations(options, size) for size in range(len(options) + 1))
    alike: dict[object, list[Direction]] = {}
    for chosen in subsets:
        each = _direction(ours, theirs, chosen)
        alike.setdefault((each.verdict, each.remains), []).append(each)
    for found in alike.values():
        held = {frozenset(each.options) for each in found}
        yield replace(found[0], measured=tuple(m for m in _runs(found[0]) if _options(m, options) in held))


def _runs(direction: Direction) -> Iterator[Measured]:
    wanted = (direction.algorithm, direction.source, direction.target)
    return (each for each in measured() if (each.algorithm, each.source, each.target) == wanted)


def _options(run: Measured, options: tuple[str, ...]) -> frozenset[str]:
    return frozenset(name for name in options if run.hyperparameters.get(name))


def _direction(ours: Row, theirs: Row, options: tuple[str, ...]) -> Direction:
    hypers: dict[str, Value] = dict.fromkeys(options, True)
    meant = ours.form(hypers)
    nearest, form = nearest_form(meant, theirs, hypers)
    readers = ours.slot_readers
    slots = {s for s in ours.slots_present(hypers) if s not in readers or readers[s] in options}
    steps, lacking = between(theirs.family, meant, form)
    steps = tuple(step for step in steps if all(slot in slots for slot in step.slots))
    verdict: Verdict = "exact"
    remains = []
    for step in steps:
        verdict = worst(verdict, step.verdict)
        if step.text:
            remains.append(f"{step.point}: {step.text}")
    for point in lacking:
        verdict = "refused"
        remains.append(f"{point}: '{meant.get(point)}' and '{form.get(point)}' are two rules")
    return Direction(
        algorithm=ours.algorithm,
        source=ours.framework,
        target=nearest.framework,
        options=options,
        verdict=verdict,
        remains=tuple(remains),
        needs=_needs(ours, theirs),
    )


def _needs(ours: Row, theirs: Row) -> tuple[str, ...]:
    """Hyperparameters of the source that must stand where the target's class has them fixed."""
    fixed: Mapping[str, Value] = theirs.neutral
    mine, other = (each.base_form.get("weight_decay", "none") for each in (ours, theirs))
    switched = any(change.get("weight_decay") == mine for change in theirs.switches.values())
    decay = ("weight_decay = 0.0",) if mine not in (other, "none") and not switched else ()
    return decay + tuple(
        f"{name} = {fixed[name]}"
        for name, entry in ours.hyperparameters.items()
        if name not in theirs.hyperparameters
        and name in fixed
        and entry.default != fixed[name]
        and name not in (*ours.switches, "weight_decay")
    )
