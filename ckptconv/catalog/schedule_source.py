"""What a document tells of its schedules and optimizers together: units, rates, what torch keeps of a place.

A torch scheduler counts what its loop calls it for, which no file says: where its position is the optimizer's
step it is taken for updates, where it is that of the epochs for these; else the caller says it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Literal, cast

from ckptconv.catalog.schedule_rates import (
    ONE_CYCLE_MOMENTA,
    TABLED,
    Curve,
    curve_of,
    flat,
    rate,
    state_at,
)
from ckptconv.catalog.schedule_settings import UNIT, UNITS
from ckptconv.catalog.schedules import UNKNOWN
from ckptconv.document import Checkpoint, Fact, Known, Optimizer, Progress, Schedule, Unknown, value_of

_STATE = ("position", "calls", "last_rate", "base_rate", "since_restart", "cycle")
"""Parameters that follow from where a torch scheduler stands."""

ONE_CYCLE_RATES = ("max_lr", "min_lr")
"""Rates that OneCycleLR keeps in each group, beside `initial_lr`."""

KEPT_IN_GROUPS = ("base_learning_rate", *ONE_CYCLE_RATES, "swa_lr", *ONE_CYCLE_MOMENTA)
"""What torch's schedulers keep in each group."""


def with_rates(source: Checkpoint, template: Checkpoint, conventions: Mapping[str, str]) -> Checkpoint:
    """The source with what its schedules tell: units, a step counted by one, the rate of the next update.

    A schedule that the source names but does not describe is described by the torch template's scheduler.
    `conventions`: `schedule_unit`, as the caller says it.
    """
    source = _with_decays(source, template)
    optimizers = {optimizer.name: optimizer for optimizer in source.optimizers}
    schedules = []
    for schedule in source.schedules:
        optimizer = optimizers.get(schedule.optimizer)
        schedule = _in_epochs(_with_unit(schedule, optimizer, source, conventions), source.progress)
        if optimizer is None:
            schedules.append(schedule)
            continue
        optimizer = _counted(optimizer, schedule)
        described, base = _described(schedule, optimizer, source, template)
        optimizers[optimizer.name] = _rated(optimizer, described, base)
        schedules.append(described)
    step = source.progress.step
    if len(optimizers) == 1 and not isinstance(step, Known):
        step = next(iter(optimizers.values())).step
    return replace(
        source,
        schedules=tuple(schedules),
        optimizers=tuple(optimizers.values()),
        progress=replace(source.progress, step=step),
    )


def _with_decays(source: Checkpoint, template: Checkpoint) -> Checkpoint:
    """The source whose optimizers' own decay is a schedule, where the template's optimizers follow one.

    The legacy classes' `decay` divides the rate by 1 + decay * step, which is an inverse-time schedule.
    """
    if not template.schedules or source.schedules:
        return source
    optimizers, schedules = [], []
    for optimizer in source.optimizers:
        decay, rates = _decay_of(optimizer), None
        step = value_of(optimizer.step)
        if decay and isinstance(step, int):
            rates = [value_of(group.hyperparameters.get("learning_rate")) for group in optimizer.groups]
        if not rates or not all(isinstance(base, (int, float)) for base in rates):
            optimizers.append(optimizer)
            continue
        groups = tuple(
            replace(
                group,
                hyperparameters={
                    **group.hyperparameters,
                    "learning_rate": Unknown(reason="it falls by the optimizer's decay"),
                    "base_learning_rate": group.hyperparameters["learning_rate"],
                    "learning_rate_decay": Known(
                        value=0.0, status="derived", formula="a schedule of its own"
                    ),
                },
            )
            for group in optimizer.groups
        )
        optimizers.append(replace(optimizer, groups=groups))
        schedules.append(
            Schedule(
                name=f"{optimizer.name}.decay",
                family="inverse-time",
                position=optimizer.step,
                unit="update",
                parameters={
                    "interval": Known(value=1, status="derived", formula="decay counts updates"),
                    "rate": Known(value=decay, status="derived", source=f"{optimizer.name}.decay"),
                },
                optimizer=optimizer.name,
            )
        )
    return replace(source, optimizers=tuple(optimizers), schedules=tuple(schedules))


def _decay_of(optimizer: Optimizer) -> float | None:
    """The decay that all groups of a class share that has one; None where there is none."""
    values = {value_of(group.hyperparameters.get("learning_rate_decay")) for group in optimizer.groups}
    value = values.pop() if len(values) == 1 else None
    return (
        float(value)
        if isinstance(value, (int, float)) and not isinstance(value, bool) and value > 0
        else None
    )


def described_as(
    checkpoint: Checkpoint, curve: Curve, base: float, who: str, named: Mapping[str, float] | None = None
) -> Checkpoint:
    """The document whose only schedule is this one, as a live object tells; `who` supplies it.

    `named`: see `schedule_rates.rate`.
    """
    if len(checkpoint.schedules) != 1:
        return checkpoint
    schedule = checkpoint.schedules[0]
    facts: dict[str, Fact] = {
        name: Known(value=value, status="supplied", source=who) for name, value in flat(curve).items()
    }
    told = {
        name: Known(value=value, status="supplied", source=who)
        for name, value in {"base_learning_rate": base, **(named or {})}.items()
    }
    optimizers = tuple(
        replace(
            optimizer,
            groups=tuple(
                replace(group, hyperparameters={**group.hyperparameters, **told})
                for group in optimizer.groups
            ),
        )
        if optimizer.name == schedule.optimizer
        else optimizer
        for optimizer in checkpoint.optimizers
    )
    return replace(
        checkpoint,
        schedules=(replace(schedule, family=curve.family, parameters=facts),),
        optimizers=optimizers,
    )


def beside_it(checkpoint: Checkpoint, curve: Curve, who: str) -> Checkpoint:
    """The document with the plateau that a callback follows, which is in no file of its framework."""
    if len(checkpoint.optimizers) != 1 or checkpoint.schedules:
        return checkpoint
    schedule = Schedule(
        name=curve.family,
        family=curve.family,
        position=Unknown(reason="a callback does not count its epochs"),
        unit="epoch",
        parameters={
            name: Known(value=value, status="supplied", source=who) for name, value in flat(curve).items()
        },
        optimizer=checkpoint.optimizers[0].name,
    )
    return replace(checkpoint, schedules=(schedule,))


def _with_unit(
    schedule: Schedule, optimizer: Optimizer | None, source: Checkpoint, conventions: Mapping[str, str]
) -> Schedule:
    if schedule.unit != "unknown":
        return schedule
    told = conventions.get(UNIT)
    if told in UNITS:
        return replace(schedule, unit=cast("Literal['update', 'epoch', 'micro-step']", told))
    position = value_of(schedule.position)
    if position and optimizer is not None and value_of(optimizer.step) == position:
        return replace(schedule, unit="update")
    return with_epochs(schedule, source.progress)


def _in_epochs(schedule: Schedule, progress: Progress) -> Schedule:
    """The schedule that counts epochs and does not say how many, at the run's epoch."""
    epochs = value_of(progress.epochs)
    if (
        schedule.unit != "epoch"
        or isinstance(schedule.position, Known)
        or not isinstance(epochs, (int, float))
    ):
        return schedule
    if not float(epochs).is_integer():
        return schedule
    return replace(
        schedule, position=Known(value=int(epochs), status="derived", formula="the run's finished epochs")
    )


def _counted(optimizer: Optimizer, schedule: Schedule) -> Optimizer:
    """The optimizer with the step that its schedule counts, where it counts none itself."""
    if isinstance(optimizer.step, Known) or schedule.unit != "update":
        return optimizer
    position = value_of(schedule.position)
    if not isinstance(position, int):
        return optimizer
    step = Known(value=position, status="derived", source=schedule.name, formula="the schedule's position")
    return replace(optimizer, step=step)


def _described(
    schedule: Schedule, optimizer: Optimizer, source: Checkpoint, template: Checkpoint
) -> tuple[Schedule, Known | None]:
    """The schedule with family and parameters, its own or the torch template's, and the base rate."""
    own = optimizer.groups[0].hyperparameters.get("base_learning_rate") if optimizer.groups else None
    base = own if isinstance(own, Known) else None
    if schedule.family != UNKNOWN:
        return schedule, base
    offered = partner(schedule, template.schedules, source.schedules)
    driven = driven_by(offered, template) if offered is not None else None
    if offered is None or driven is None or driven.framework != "torch" or optimizer.framework == "torch":
        return schedule, base
    if offered.family in TABLED:
        return schedule, base
    bases = {value_of(group.hyperparameters.get("base_learning_rate")) for group in driven.groups}
    if len(bases) != 1 or not isinstance(value := bases.pop(), (int, float)):
        return schedule, base
    parameters: dict[str, Fact] = {
        name: Known(value=value_of(fact), status="supplied", source="template")
        for name, fact in offered.parameters.items()
        if isinstance(fact, Known) and not is_state(name)
    }
    described = replace(schedule, family=offered.family, parameters=parameters)
    return described, base or Known(value=value, status="supplied", source="template")


def _rated(optimizer: Optimizer, schedule: Schedule, base: Known | None) -> Optimizer:
    """The optimizer whose groups know the rate of the next update, where the schedule tells it."""
    index = value_of(schedule.position)
    if base is None or not isinstance(base.value, (int, float)) or not isinstance(index, int):
        return optimizer
    curve, groups = curve_of(schedule), []
    for group in optimizer.groups:
        due = rate(curve, float(base.value), index, named_rates(group.hyperparameters))
        facts = dict(group.hyperparameters)
        if due is not None and not isinstance(facts.get("learning_rate"), Known):
            facts["learning_rate"] = Known(
                value=due, status="derived", source=schedule.name, formula=f"{schedule.family} at {index}"
            )
            facts["base_learning_rate"] = base
        groups.append(replace(group, hyperparameters=facts))
    return replace(optimizer, groups=tuple(groups))


def partner(schedule: Schedule, others: tuple[Schedule, ...], own: tuple[Schedule, ...]) -> Schedule | None:
    """The one of the other side that is this one of `own`: each the only one, else by name or optimizer."""
    if len(others) == len(own) == 1:
        return others[0]
    named = [other for other in others if other.name == schedule.name]
    named = named or [other for other in others if other.optimizer == schedule.optimizer]
    return named[0] if len(named) == 1 else None


def driven_by(schedule: Schedule, checkpoint: Checkpoint) -> Optimizer | None:
    found = [o for o in checkpoint.optimizers if o.name == schedule.optimizer]
    return found[0] if found else None


def is_state(name: str) -> bool:
    return any(part in _STATE for part in name.split("."))


def with_epochs(schedule: Schedule, progress: Progress) -> Schedule:
    """The schedule, counted in epochs where it stands where they do and the updates do not."""
    position, epochs = value_of(schedule.position), progress.epochs
    if schedule.unit != "unknown" or not position or not isinstance(progress.step, Known):
        return schedule
    readings = {c.value for c in epochs.candidates} if isinstance(epochs, Unknown) else {value_of(epochs)}
    return replace(schedule, unit="epoch") if position in readings else schedule


def named_rates(group: Mapping[str, Fact]) -> dict[str, float]:
    """The rates and momenta of a group that a one-cycle schedule goes by."""
    values = {name: value_of(group.get(name)) for name in (*ONE_CYCLE_RATES, *ONE_CYCLE_MOMENTA)}
    return {name: float(value) for name, value in values.items() if isinstance(value, (int, float))}


def placed(schedule: Schedule, optimizer: Optimizer | None) -> Schedule:
    """The schedule with everything that torch keeps of where it stands as its position says."""
    position = value_of(schedule.position)
    if not isinstance(position, int):
        return schedule
    groups = [group.hyperparameters for group in optimizer.groups] if optimizer is not None else []
    bases = [value_of(group.get("base_learning_rate")) for group in groups]
    state = state_at(
        schedule,
        position,
        [float(base) if isinstance(base, (int, float)) else None for base in bases],
        [named_rates(group) for group in groups],
    )
    facts = {
        name: Known(value=value, status="derived", formula="follows from the position")
        for name, value in state.items()
    }
    return replace(schedule, parameters={**schedule.parameters, **facts})
