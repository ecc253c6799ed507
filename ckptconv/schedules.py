"""Where the target's learning-rate schedules stand, and what they are.

A torch file holds its scheduler, a TensorFlow checkpoint only the counter that a schedule follows: there the
target's code has to say it, and its form decides. A Keras optimizer under a schedule has no variable for the
learning rate; one that has the variable can only be given the rate of the next update, which the caller
allows by code. What the source does not tell of its schedule a torch template's scheduler supplies. A
position counts updates, epochs or backward passes: only updates are what Keras' counter counts.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType

from ckptconv.catalog.schedule_rates import NotExpressibleError
from ckptconv.catalog.schedule_source import KEPT_IN_GROUPS, partner, with_rates
from ckptconv.document import Checkpoint, Known, Optimizer, Schedule
from ckptconv.errors import Problem
from ckptconv.report import Entry
from ckptconv.schedule_account import ANEW, IN_CODE, ScheduleAccount
from ckptconv.schedule_code import in_code, left
from ckptconv.schedule_file import beside, in_file

__all__ = ["Placed", "place_schedules", "with_rates"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Placed:
    """The target's schedules, its optimizers with the rates that follow, and the account."""

    schedules: tuple[Schedule, ...]
    optimizers: tuple[Optimizer, ...]
    ledger: tuple[Entry, ...]
    problems: tuple[Problem, ...]
    requires: tuple[str, ...] = ()
    """Lines of the target's code."""
    helpers: tuple[str, ...] = ()
    """Lines behind the constructor of the optimizer: what makes it follow the schedule."""
    codes: Mapping[str, str] = field(default_factory=dict)
    """The learning rate of a constructor's text -> the schedule that stands in its place."""


def place_schedules(
    source: Checkpoint,
    template: Checkpoint,
    allow: Collection[str],
    *,
    optimizers: tuple[Optimizer, ...] | None = None,
    conventions: Mapping[str, str] = MappingProxyType({}),
) -> Placed:
    """The template's schedules with the source's families, parameters and positions; the rest refused.

    `source`: as `with_rates` gives it. `optimizers`: the target's, with the source's state.
    """
    targets = template.optimizers if optimizers is None else optimizers
    account = ScheduleAccount(source, template, targets, allow, conventions)
    schedules = tuple(_placed(account, target) for target in template.schedules)
    for schedule in source.schedules:
        if schedule.name not in account.taken:
            left(account, schedule)
    theirs = {optimizer.name: optimizer for optimizer in template.optimizers}
    return Placed(
        schedules=schedules,
        optimizers=tuple(_complete(o, theirs.get(o.name)) for o in account.optimizers.values()),
        ledger=tuple(account.ledger),
        problems=tuple(account.problems),
        requires=tuple(account.requires),
        helpers=tuple(account.helpers),
        codes=account.codes,
    )


def _placed(account: ScheduleAccount, target: Schedule) -> Schedule:
    """One schedule of the template; as it is where nothing can take its place."""
    origin = partner(target, account.source.schedules, account.template.schedules)
    driven = account.optimizers.get(target.optimizer)
    in_the_code = driven is not None and driven.framework != "torch"
    try:
        if driven is not None and in_the_code:
            return in_code(account, origin, target, driven)
        if origin is not None:
            return in_file(account, origin, target, driven)
        return beside(account, target, driven)
    except NotExpressibleError as error:
        fate = IN_CODE if in_the_code else ANEW
        account.refuse(origin or target, "source" if origin else "template", str(error), fate)
        if origin is not None:
            account.taken.add(origin.name)
        return target


def _complete(optimizer: Optimizer, template: Optimizer | None) -> Optimizer:
    """The optimizer whose groups have what the template's keep for a scheduler that has no partner."""
    if template is None or len(template.groups) != len(optimizer.groups):
        return optimizer
    groups = []
    for group, offered in zip(optimizer.groups, template.groups, strict=True):
        kept = {
            name: Known(value=fact.value, status="supplied", source="template")
            for name in KEPT_IN_GROUPS
            if name not in group.hyperparameters
            and isinstance(fact := offered.hyperparameters.get(name), Known)
        }
        groups.append(replace(group, hyperparameters={**group.hyperparameters, **kept}))
    return replace(optimizer, groups=tuple(groups))
