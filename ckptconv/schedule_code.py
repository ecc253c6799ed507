"""A schedule that the target's code says: Keras' constructor, or a callback.

A Keras optimizer under a schedule has no variable for the learning rate; its schedule follows the counter of
updates, which is in the file. A schedule that counts epochs, or follows a metric, sets the variable of an
optimizer that has one, through a callback.
"""

from __future__ import annotations

from dataclasses import replace

from ckptconv.catalog.conversion import in_float64
from ckptconv.catalog.schedule_forms import facts_of, held, scaled
from ckptconv.catalog.schedule_keras import HELPERS, Code, keras_code
from ckptconv.catalog.schedule_plateau import plateau_code
from ckptconv.catalog.schedule_rates import (
    ONE_CYCLE_MOMENTA,
    TICK,
    Curve,
    NotExpressibleError,
    curve_of,
    is_known,
    rate,
)
from ckptconv.catalog.schedule_settings import STEPS_PER_EPOCH, UNIT
from ckptconv.catalog.schedule_source import driven_by, named_rates
from ckptconv.catalog.texts import number
from ckptconv.document import Checkpoint, Known, Optimizer, Schedule, value_of
from ckptconv.errors import Problem
from ckptconv.report import Entry
from ckptconv.schedule_account import ALIKE, ScheduleAccount

_SAMPLE = 64
"""Next rates by which two schedules are compared."""


def in_code(
    account: ScheduleAccount, origin: Schedule | None, target: Schedule, driven: Optimizer
) -> Schedule:
    """A schedule that the target's code says: the counter alone is in the file."""
    if origin is None:
        raise NotExpressibleError(
            "the target's optimizer follows a schedule and the source's has a plain learning rate"
        )
    if origin.family == "plateau":
        raise NotExpressibleError(
            "it follows a metric: that is a callback's, which needs an optimizer with a plain learning rate"
        )
    step = value_of(driven.step)
    if not is_known(curve_of(origin)):
        theirs = driven_by(origin, account.source)
        if theirs is None or theirs.framework == "torch":
            raise NotExpressibleError("the source's schedule is of no known family")
        account.take(origin, target, f"the counter that it follows is {step}")
        account.requires.append("# learning_rate: the schedule that the source's code has")
        return replace(target, position=origin.position, unit=origin.unit)
    if origin.unit == "epoch" and STEPS_PER_EPOCH not in account.conventions:
        account.problems.append(_no_epoch(origin, step))
        account.taken.add(origin.name)
        return target
    step = _counts_updates(account, origin, target, step)
    curve, base, code = _code(account, origin, driven, step)
    if curve.moves_momentum:
        _check_cycle(account, origin, driven)
    if _goes_by(account.template, target, curve, base, step):
        account.requires += [f"# learning_rate: {code.remark}"] if code.remark else []
    else:
        _say(account, code, driven)
        current = value_of(account.group(driven).hyperparameters.get("learning_rate"))
        account.codes[f"learning_rate={number(current)}"] = "learning_rate=learning_rate"
        if curve.moves_momentum:
            account.helpers.append("optimizer = ckptconv.keras.cycled_momentum(optimizer)")
    account.take(origin, target, code.remark)
    account.set_rates(driven, {"base_learning_rate": base, **account.named(origin)}, origin)
    return replace(
        target,
        family=curve.family,
        position=Known(value=step, status="derived", formula="the optimizer's step"),
        unit="update",
        parameters=facts_of(curve, origin),
    )


def left(account: ScheduleAccount, schedule: Schedule) -> None:
    """A schedule that has no place: its rate is frozen, or a callback's code goes on with it."""
    others = [o for o in account.optimizers.values() if o.framework != "torch"]
    keras = next((o for o in others if o.name == schedule.optimizer), others[0] if len(others) == 1 else None)
    if keras is not None and (schedule.family == "plateau" or schedule.unit == "epoch"):
        try:
            _in_callback(account, schedule, keras)
        except NotExpressibleError as error:
            account.refuse(schedule, "source", str(error))
        return
    account.refuse(
        schedule,
        "source",
        "the target has no schedule"
        + (" but a variable for the learning rate" if account.optimizers else ""),
    )


def _code(
    account: ScheduleAccount, origin: Schedule, driven: Optimizer, index: int, *, by_epoch: bool = False
) -> tuple[Curve, float, Code]:
    """A Keras schedule with the source's rates: curve and base as the target has them, and its text.

    `by_epoch`: whether its index is the epoch, too, instead of the optimizer's counter.
    """
    scale, base = account.scale(origin, account.group(driven)), value_of(account.base(origin))
    if not isinstance(base, (int, float)):
        raise NotExpressibleError("its base rate is not recorded")
    curve, root = scaled(curve_of(origin), scale), float(base) * scale
    if origin.unit == "epoch" and not by_epoch:
        ticks = int(account.conventions[STEPS_PER_EPOCH])
        curve = replace(curve, parameters={**curve.parameters, TICK: ticks})
    named = {n: v if n in ONE_CYCLE_MOMENTA else v * scale for n, v in account.named(origin).items()}
    return curve, root, keras_code(curve, root, index, named)


def _say(account: ScheduleAccount, code: Code, driven: Optimizer) -> None:
    """The lines that make `learning_rate`."""
    if code.remark:
        account.requires.append(f"# learning_rate: {code.remark}")
    if code.call.name in HELPERS:
        account.requires.append("import ckptconv.keras")
    text = code.call.text(_package(driven), precise=in_float64(driven))
    if "numpy." in text:
        account.requires.append("import numpy")
    account.requires.append(f"learning_rate = {text}")


def _counts_updates(account: ScheduleAccount, origin: Schedule, target: Schedule, step: object) -> int:
    """The target's counter. Raises: NotExpressibleError unless the source's position is that."""
    if target.unit not in ("update", "unknown") or origin.unit == "micro-step":
        raise NotExpressibleError(
            f"it counts {origin.unit}s, the target's {target.unit}s, and how many of these make an update is "
            "not recorded"
        )
    if origin.unit == "unknown":
        account.problems.append(_no_unit(origin))
    ticks = int(account.conventions[STEPS_PER_EPOCH]) if origin.unit == "epoch" else 1
    position = value_of(origin.position)
    if not isinstance(step, int) or position != step // ticks:
        each = f", with {ticks} of them in an epoch" if ticks > 1 else ""
        raise NotExpressibleError(
            f"it stands at {position}, the optimizer's step is {step}{each}; the target counts both"
        )
    return step


def _in_callback(account: ScheduleAccount, schedule: Schedule, driven: Optimizer) -> None:
    """A schedule that counts epochs: a callback of the target's code sets the variable."""
    index = value_of(schedule.position)
    if schedule.family == "plateau":
        rate = value_of(account.group(driven).hyperparameters.get("learning_rate"))
        code = plateau_code(curve_of(schedule), rate, _package(driven))
        account.requires += ["import ckptconv.keras", *code]
    elif not isinstance(index, int) or not is_known(curve_of(schedule)):
        raise NotExpressibleError("where it stands, or its family, is not known")
    else:
        curve, _, made = _code(account, schedule, driven, index, by_epoch=True)
        if curve.moves_momentum:
            raise NotExpressibleError("cycle_momentum=True moves momentum or beta_1, which no callback does")
        _say(account, made, driven)
        account.requires.append(
            f"callback = {_package(driven)}.callbacks.LearningRateScheduler("
            f"lambda epoch, _: float(learning_rate(epoch)))  # model.fit(initial_epoch={index})"
        )
    account.ledger.append(
        Entry(
            item=("position", schedule.name),
            fate="noted",
            detail=f"{schedule.family} at {index} epochs: a callback of the target's code goes on",
        )
    )


_CYCLED = frozenset({"adam", "adamw", "sgd"})
"""Algorithms that `ckptconv.keras.cycled_momentum` is for."""


def _check_cycle(account: ScheduleAccount, origin: Schedule, driven: Optimizer) -> None:
    """Raises: NotExpressibleError where no helper moves the target's momentum as the source's does."""
    if driven.framework not in ("keras3", "tf_keras") or driven.algorithm not in _CYCLED:
        raise NotExpressibleError(
            f"cycle_momentum=True moves momentum or beta_1; of {driven.algorithm} ({driven.framework}) "
            f"nothing does, of Keras 3's and tf_keras' {', '.join(sorted(_CYCLED))} a helper"
        )
    theirs = driven_by(origin, account.source)
    groups = [named_rates(group.hyperparameters) for group in theirs.groups] if theirs is not None else []
    if len({tuple(group.get(name) for name in ONE_CYCLE_MOMENTA) for group in groups}) > 1:
        raise NotExpressibleError("its groups move between different momenta")


def _package(driven: Optimizer) -> str:
    return "keras" if driven.framework == "keras3" else "tf_keras"


def _goes_by(template: Checkpoint, target: Schedule, curve: Curve, base: float, step: int) -> bool:
    """Whether the template's live optimizer follows these rates already, as far as a sample tells."""
    theirs, driven = curve_of(target), driven_by(target, template)
    own = (
        value_of(driven.groups[0].hyperparameters.get("base_learning_rate"))
        if driven and driven.groups
        else None
    )
    if not is_known(theirs) or not isinstance(own, (int, float)):
        return False
    for index in (*range(step, step + _SAMPLE), *(step + (1 << power) for power in range(6, 20))):
        due, due_there = rate(held(curve), base, index), rate(held(theirs), float(own), index)
        if due is None or due_there is None or abs(due - due_there) > ALIKE * abs(base):
            return False
    return True


def _no_epoch(schedule: Schedule, step: object) -> Problem:
    position = value_of(schedule.position)
    return Problem(
        code="progress-unknown",
        loc=("schedules", schedule.name, STEPS_PER_EPOCH),
        message=f"the schedule counts epochs and stands at {position}, the target's follows the optimizer's "
        f"counter, which is {step}: how many updates an epoch has is not recorded",
        hint=f"Pass --set {STEPS_PER_EPOCH}=N, or use a template whose optimizer has a variable for the "
        "learning rate: a callback goes on with that.",
    )


def _no_unit(schedule: Schedule) -> Problem:
    return Problem(
        code="progress-unknown",
        loc=("schedules", schedule.name, "unit"),
        message=f"the schedule stands at {value_of(schedule.position)}, and whether it counts updates or "
        "epochs is not recorded",
        hint=f"Pass --set {UNIT}=update, or epoch.",
    )
