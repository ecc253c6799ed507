"""What is collected while a target's schedules find their places; what the source tells of rates."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace

from ckptconv import errors
from ckptconv.catalog.schedule_rates import curve_of, is_known
from ckptconv.catalog.schedule_source import driven_by, named_rates
from ckptconv.document import Checkpoint, Fact, Group, Known, Optimizer, Schedule, value_of
from ckptconv.errors import Problem
from ckptconv.report import Entry

_CODE: errors.Code = "schedule-unsupported"

FROZEN = "the learning rate is frozen"
IN_CODE = "the target's code says the schedule, its file only counts for one"
ANEW = "the template's goes on from its own state, with the source's learning rate"

RATE_OF_TEMPLATE = "the learning rate that it gives is not told: the template's stands"

ALIKE = 1e-6
"""Relative difference within which two rates are the same."""


class ScheduleAccount:
    """The account of one target's schedules; its optimizers change with them."""

    def __init__(
        self,
        source: Checkpoint,
        template: Checkpoint,
        optimizers: tuple[Optimizer, ...],
        allow: Collection[str],
        conventions: Mapping[str, str],
    ) -> None:
        self.source, self.template, self.allow = source, template, allow
        self.conventions = conventions
        self.optimizers = {optimizer.name: optimizer for optimizer in optimizers}
        self.ledger: list[Entry] = []
        self.problems: list[Problem] = []
        self.requires: list[str] = []
        self.helpers: list[str] = []
        self.codes: dict[str, str] = {}
        self.taken: set[str] = set()

    def refuse(self, schedule: Schedule, side: str, why: str, fate: str = FROZEN) -> None:
        """A schedule that cannot go on. `fate`: what becomes of it where the caller allows that."""
        if _CODE not in self.allow:
            self.problems.append(_refused(schedule, side, why))
        elif side == "source" and not self._tells_rate(schedule):
            self.ledger.append(_left(schedule, side, RATE_OF_TEMPLATE))
        else:
            self.ledger.append(_left(schedule, side, fate))

    def _tells_rate(self, schedule: Schedule) -> bool:
        driven = driven_by(schedule, self.source)
        groups = driven.groups if driven is not None else ()
        return all(isinstance(g.hyperparameters.get("learning_rate"), Known) for g in groups)

    def take(self, origin: Schedule, target: Schedule, remark: str) -> None:
        self.taken.add(origin.name)
        said = [f"{origin.family} at {value_of(origin.position)} {origin.unit}s"]
        supplied = any(getattr(fact, "status", "") == "supplied" for fact in origin.parameters.values())
        self.ledger.append(
            Entry(
                item=("position", origin.name),
                fate="copied",
                target=target.name,
                detail="; ".join(
                    [*said, *([remark] if remark else []), *(["parameters supplied"] if supplied else [])]
                ),
            )
        )

    def base(self, origin: Schedule) -> Fact | None:
        theirs = driven_by(origin, self.source)
        return (
            theirs.groups[0].hyperparameters.get("base_learning_rate") if theirs and theirs.groups else None
        )

    def named(self, origin: Schedule) -> dict[str, float]:
        theirs = driven_by(origin, self.source)
        return named_rates(theirs.groups[0].hyperparameters) if theirs and theirs.groups else {}

    def group(self, driven: Optimizer) -> Group:
        return driven.groups[0] if driven.groups else Group(params=())

    def scale(self, origin: Schedule, group: Group) -> float:
        """What the conversion multiplied the source's rate with: what dampening leaves of it."""
        theirs = driven_by(origin, self.source)
        own = (
            value_of(theirs.groups[0].hyperparameters.get("learning_rate"))
            if theirs and theirs.groups
            else None
        )
        new = value_of(group.hyperparameters.get("learning_rate"))
        damped = (
            value_of(theirs.groups[0].hyperparameters.get("dampening")) if theirs and theirs.groups else None
        )
        if not damped or not isinstance(own, (int, float)) or not isinstance(new, (int, float)) or not own:
            return 1.0
        return float(new) / float(own)

    def set_rates(self, driven: Optimizer, rates: Mapping[str, float], origin: Schedule) -> None:
        """Rates that a schedule goes by, in every group."""
        told = {
            name: Known(value=value, status="derived", source=origin.name) for name, value in rates.items()
        }
        groups = tuple(
            replace(group, hyperparameters={**group.hyperparameters, **told}) for group in driven.groups
        )
        self.optimizers[driven.name] = replace(driven, groups=groups)


def _refused(schedule: Schedule, side: str, why: str) -> Problem:
    what = f"the {side}'s learning-rate schedule ({schedule.family}, position {value_of(schedule.position)})"
    fails, hint = _SIDES["untold" if side == "source" and not is_known(curve_of(schedule)) else side]
    return Problem(code=_CODE, loc=("schedules", schedule.name), message=f"{what} {fails}: {why}", hint=hint)


_SIDES = {
    "source": (
        "cannot go on in the target",
        "Use a template whose optimizer follows this schedule, or --allow schedule-unsupported: the "
        "learning rate of the next update is carried and the schedule left to the target's code.",
    ),
    "untold": (
        "cannot go on in the target",
        "Tell what it is by --source-spec: a skeleton that describe() makes of the live objects, with "
        "remaining=N for a function or a class of your own. Or --allow schedule-unsupported: it is "
        "left to the target's code, and a learning rate that is not told to the template.",
    ),
    "template": (
        "has no counterpart in the source",
        "Use a template without it, or --allow schedule-unsupported: it keeps the state that it has in the "
        "template, and the source's learning rate.",
    ),
}
"""Side -> what its schedule cannot do, and the next step."""


def _left(schedule: Schedule, side: str, fate: str) -> Entry:
    return Entry(
        item=("position" if side == "source" else "template", schedule.name),
        fate="noted" if side == "source" else "supplied",
        detail=f"{schedule.family} at {value_of(schedule.position)}; {fate}",
        allowed_by=_CODE,
    )
