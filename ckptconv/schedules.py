"""Where the target's learning-rate schedules stand.

A schedule crosses to another framework only when the catalog can rebuild it, which it cannot yet: the caller
says so by code, and the learning rate of the next update is what goes on. Another object of the same class
in the same framework takes the whole state over.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace

from ckptconv.catalog.schedules import family
from ckptconv.document import Checkpoint, Known, Schedule, value_of
from ckptconv.errors import Problem
from ckptconv.report import Entry

_CODE = "schedule-unsupported"


@dataclass(frozen=True, slots=True, kw_only=True)
class Placed:
    """The target's schedules, and the account."""

    schedules: tuple[Schedule, ...]
    ledger: tuple[Entry, ...]
    problems: tuple[Problem, ...]


def place_schedules(source: Checkpoint, template: Checkpoint, allow: Collection[str]) -> Placed:
    """The template's schedules with the source's state where both are of one class; all others refused."""
    partners = _partners(source, template)
    taken = {partner.name for partner in partners.values()}
    ledger = [
        Entry(item=("position", partner.name), fate="copied", target=name, detail=partner.family)
        for name, partner in partners.items()
    ]
    lost = [schedule for schedule in source.schedules if schedule.name not in taken]
    fresh = [schedule for schedule in template.schedules if schedule.name not in partners]
    if _CODE in allow:
        problems = []
        ledger += [_frozen(schedule) for schedule in lost]
    else:
        problems = [_refused(schedule, "source") for schedule in lost]
        problems += [_refused(schedule, "template") for schedule in fresh]
    return Placed(
        schedules=tuple(
            replace(partners[schedule.name], name=schedule.name, optimizer=schedule.optimizer)
            if schedule.name in partners
            else schedule
            for schedule in template.schedules
        ),
        ledger=tuple(ledger),
        problems=tuple(problems),
    )


def _partners(source: Checkpoint, template: Checkpoint) -> dict[str, Schedule]:
    """The template's schedule -> the source's of the same class, whose whole state is in the document."""
    if source.provenance.format != template.provenance.format:
        return {}
    alone = len(source.schedules) == len(template.schedules) == 1
    return {
        target.name: origin
        for target in template.schedules
        for origin in source.schedules
        if (alone or origin.name == target.name) and _is_same(origin, target)
    }


def _is_same(origin: Schedule, target: Schedule) -> bool:
    known = family(origin.family)
    return (
        known is not None
        and known.is_numeric
        and origin.family == target.family
        and origin.parameters.keys() == target.parameters.keys()
        and isinstance(origin.position, Known)
    )


def _refused(schedule: Schedule, side: str) -> Problem:
    return Problem(
        code="schedule-unsupported",
        loc=("schedules", schedule.name),
        message=f"the {side} has a learning-rate schedule ({schedule.family}, "
        f"position {value_of(schedule.position)}), the other side none like it; schedules do not cross yet",
        hint="--allow schedule-unsupported carries the learning rate of the next update and leaves the "
        "schedule itself to the target's code; its position stays in the embedded note.",
    )


def _frozen(schedule: Schedule) -> Entry:
    return Entry(
        item=("position", schedule.name),
        fate="noted",
        detail=f"{schedule.family} at {value_of(schedule.position)}; the learning rate is frozen",
        allowed_by=_CODE,
    )
