"""A schedule that the target's file holds: torch's scheduler, with the rates of its optimizer's groups."""

from __future__ import annotations

from dataclasses import replace

from ckptconv.catalog.schedule_forms import as_family, check_ends, into, lambda_code
from ckptconv.catalog.schedule_rates import (
    TICK,
    Curve,
    NotExpressibleError,
    curve_of,
    is_known,
    momentum,
    rate,
)
from ckptconv.catalog.schedule_settings import PLATEAU, UNIT
from ckptconv.catalog.schedule_source import KEPT_IN_GROUPS, driven_by, named_rates, placed
from ckptconv.catalog.schedules import family
from ckptconv.document import Fact, Known, Optimizer, Schedule, value_of
from ckptconv.errors import Problem
from ckptconv.report import Entry
from ckptconv.schedule_account import ALIKE, ScheduleAccount

_TABLE = frozenset({"factors", "start"})
"""Parameters that a live scheduler tells and no file holds."""


def in_file(
    account: ScheduleAccount, origin: Schedule, target: Schedule, driven: Optimizer | None
) -> Schedule:
    """A schedule that the target's file holds."""
    index = value_of(origin.position)
    theirs = driven_by(origin, account.source)
    native = theirs is None or theirs.framework == "torch"
    if not isinstance(index, int) and origin.unit == "epoch":
        account.problems.append(_no_position(origin))
        account.taken.add(origin.name)
        return target
    if not isinstance(index, int):
        raise NotExpressibleError("where it stands is not known")
    origin, index = _by_its_ticks(origin, index)
    if origin.unit == "micro-step":
        raise NotExpressibleError("it counts backward passes; how many make an update is not recorded")
    if "unknown" not in (origin.unit, target.unit) and origin.unit != target.unit:
        raise NotExpressibleError(
            f"it counts {origin.unit}s, the target's loop steps it by the {target.unit}"
        )
    if native and _same_state(origin, target):
        made = replace(target, position=origin.position, unit=origin.unit, parameters=dict(origin.parameters))
        if target.family == "lambda":
            account.requires.append("# LambdaLR: the function that the source's code has")
        _keep_rates(account, origin, driven)
    else:
        made = _converted(account, origin, target, driven, index)
    account.take(origin, target, "")
    if native and _same_state(origin, target):
        return made
    return placed(made, account.optimizers.get(target.optimizer))


def beside(account: ScheduleAccount, target: Schedule, driven: Optimizer | None) -> Schedule:
    """A schedule of the template alone, where the source's recorded rate is the one that it gives."""
    if driven is None:
        raise NotExpressibleError("it drives no optimizer of the target")
    if target.family == "plateau":
        return _plateau(account, target)
    unit = account.conventions.get(UNIT)
    curve = curve_of(target)
    if unit not in ("update", "epoch") or not is_known(curve):
        raise NotExpressibleError(
            "the source has none; if its loop set the rates of this schedule, say what it counts with "
            f"--set {UNIT}=update or epoch"
        )
    counted = driven.step if unit == "update" else account.source.progress.epochs
    index = value_of(counted)
    if not isinstance(index, int):
        raise NotExpressibleError(f"the source does not tell how many {unit}s it has done")
    for place, group in enumerate(driven.groups):
        offered = account.template.optimizer(driven.name).groups[place].hyperparameters
        root = value_of(offered.get("base_learning_rate"))
        base = float(root) if isinstance(root, (int, float)) else 0.0
        own, due = (
            value_of(group.hyperparameters.get("learning_rate")),
            rate(curve, base, index, named_rates(offered)),
        )
        if due is None or not isinstance(own, (int, float)) or abs(due - own) > ALIKE * abs(base):
            raise NotExpressibleError(f"at {index} it gives the rate {due}, the source has {own}")
    position = Known(value=index, status="derived", source=f"progress: {unit}s")
    made = replace(target, position=position, unit="update" if unit == "update" else "epoch")
    account.ledger.append(
        Entry(
            item=("template", target.name),
            fate="supplied",
            target=target.name,
            detail=f"{target.family} of the template at {index} {unit}s",
        )
    )
    return placed(made, account.optimizers[target.optimizer])


def _by_its_ticks(origin: Schedule, index: int) -> tuple[Schedule, int]:
    """The schedule in its own ticks, where it counts updates and moves only every so many of them."""
    ticks = value_of(origin.parameters.get(TICK))
    if not isinstance(ticks, int):
        return origin, index
    position = Known(value=index // ticks, status="derived", formula=f"{index} updates, {ticks} in a tick")
    parameters = {name: fact for name, fact in origin.parameters.items() if name != TICK}
    return replace(origin, position=position, unit="epoch", parameters=parameters), index // ticks


def _plateau(account: ScheduleAccount, target: Schedule) -> Schedule:
    """The template's plateau with the state that the caller tells: the source's file holds none of it."""
    epochs = account.source.progress.epochs
    told = {name: account.conventions[key] for key, name in PLATEAU.items() if key in account.conventions}
    if value_of(target.parameters.get("cooldown")) == 0:
        told.setdefault("cooling", "0")
    lacking = [f"--set {key}=..." for key, name in PLATEAU.items() if name not in told]
    if not isinstance(value_of(epochs), int):
        lacking.append("--set epochs=...")
    if lacking:
        raise NotExpressibleError(
            "what it has seen is in no file of the source's framework. Describe the live callback as source "
            f"spec (ckptconv.keras.describe(model, callback=callback)), or pass {' '.join(lacking)}"
        )
    facts: dict[str, Fact] = {
        name: Known(value=float(text) if name == "best" else int(text), status="supplied", source="--set")
        for name, text in told.items()
    }
    account.ledger.append(
        Entry(
            item=("template", target.name),
            fate="supplied",
            target=target.name,
            detail=f"plateau of the template, its state by --set, at {value_of(epochs)} epochs",
        )
    )
    position = Known(value=value_of(epochs), status="derived", source="progress: epochs")
    return replace(target, position=position, unit="epoch", parameters={**target.parameters, **facts})


def _no_position(schedule: Schedule) -> Problem:
    return Problem(
        code="progress-unknown",
        loc=("progress", "epochs"),
        message=f"the schedule ({schedule.family}) counts epochs, and how many the run has finished is not "
        "recorded",
        hint="Pass --set epochs=N.",
    )


def _converted(
    account: ScheduleAccount, origin: Schedule, target: Schedule, driven: Optimizer | None, index: int
) -> Schedule:
    curve, base = curve_of(origin), value_of(account.base(origin))
    if not is_known(curve):
        raise NotExpressibleError("the source's file does not tell what it is")
    if curve.family == target.family == "plateau":
        parameters = into(target, _for_groups(curve, target), origin)
        return replace(target, position=origin.position, unit=origin.unit, parameters=parameters)
    if not isinstance(base, (int, float)):
        raise NotExpressibleError("its base rate is not recorded")
    if target.family == "lambda":
        code, made, root = lambda_code(curve, float(base)), curve, float(base)
        if "bisect." in code:
            account.requires.append("import bisect")
        account.requires.append(f"torch.optim.lr_scheduler.LambdaLR(optimizer, {code})")
        parameters = dict(target.parameters)
    else:
        curve = _as_the_target_cycles(curve, target)
        parts = [part.family for part in curve_of(target).parts]
        made, root = as_family(curve, float(base), target.family, parts)
        if remark := check_ends(made, index):
            account.requires.append(f"# {target.name}: {remark}")
        parameters = into(target, made, origin)
    if driven is not None:
        _set_rates(account, driven, made, root, index, origin)
    return replace(target, position=origin.position, unit=origin.unit, parameters=parameters)


def _as_the_target_cycles(curve: Curve, target: Schedule) -> Curve:
    """The curve that moves a momentum, which Keras does not name, of that name in the target's class.

    Raises: NotExpressibleError where the target moves none.
    """
    if not curve.moves_momentum:
        return curve
    which = value_of(target.parameters.get("beta_1_cycles"))
    if which is None:
        raise NotExpressibleError("it moves the momentum, the template's has cycle_momentum=False")
    return replace(curve, parameters={**curve.parameters, "beta_1_cycles": which})


def _for_groups(curve: Curve, target: Schedule) -> Curve:
    """The plateau with the lowest rate of its one group for every group of the target."""
    lowest = curve.parameters.get("minimum.0")
    kept = {name: v for name, v in curve.parameters.items() if "minimum" not in name}
    minima = {name: lowest for name in target.parameters if "minimum" in name}
    return replace(curve, parameters={**kept, **minima})


def _set_rates(
    account: ScheduleAccount, driven: Optimizer, curve: Curve, base: float, index: int, origin: Schedule
) -> None:
    """Base rate and rate of the next update in each group of a torch optimizer."""
    groups = []
    told = {
        name: Known(value=value, status="derived", source=origin.name)
        for name, value in account.named(origin).items()
    }
    for group in driven.groups:
        facts = {**group.hyperparameters, **told}
        due = rate(curve, base, index, named_rates(facts))
        if due is None:
            raise NotExpressibleError(f"its rate at {index} has no closed form")
        formula = f"{curve.family} at {index}"
        facts["learning_rate"] = Known(value=due, status="derived", source=origin.name, formula=formula)
        facts["base_learning_rate"] = Known(value=base, status="derived", source=origin.name)
        cycled = momentum(curve, index, named_rates(facts))
        if cycled is not None:
            name = "beta_1" if curve.parameters["beta_1_cycles"] else "momentum"
            facts[name] = Known(value=cycled, status="derived", source=origin.name, formula=formula)
        groups.append(replace(group, hyperparameters=facts))
    account.optimizers[driven.name] = replace(driven, groups=tuple(groups))


def _keep_rates(account: ScheduleAccount, origin: Schedule, driven: Optimizer | None) -> None:
    """The rates that torch's groups keep for their schedule, from the source's groups."""
    theirs = driven_by(origin, account.source)
    if driven is None or theirs is None or not theirs.groups:
        return
    groups = []
    for place, group in enumerate(driven.groups):
        own = theirs.groups[place if len(theirs.groups) == len(driven.groups) else 0].hyperparameters
        kept = {name: own[name] for name in KEPT_IN_GROUPS if name in own}
        groups.append(replace(group, hyperparameters={**group.hyperparameters, **kept}))
    account.optimizers[driven.name] = replace(driven, groups=tuple(groups))


def _same_state(origin: Schedule, target: Schedule) -> bool:
    """Whether both are of one torch class whose whole state the document holds."""
    known = family(origin.family)
    return (
        known is not None
        and origin.family == target.family
        and origin.parameters.keys() - _TABLE == target.parameters.keys() - _TABLE
        and isinstance(origin.position, Known)
        and (known.is_numeric or origin.family not in ("cyclic", "swa"))
    )
