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

from ckptconv import errors
from ckptconv.catalog.schedule_forms import as_family, check_ends, facts_of, held, into, lambda_code, scaled
from ckptconv.catalog.schedule_keras import Code, NotExpressibleError, keras_code, plateau_code
from ckptconv.catalog.schedule_rates import Curve, curve_of, is_known, rate
from ckptconv.catalog.schedule_source import (
    ONE_CYCLE_RATES,
    UNIT,
    driven_by,
    named_rates,
    partner,
    placed,
    with_rates,
)
from ckptconv.catalog.schedules import family
from ckptconv.catalog.texts import number
from ckptconv.document import Checkpoint, Fact, Group, Known, Optimizer, Schedule, value_of
from ckptconv.errors import Problem
from ckptconv.report import Entry

__all__ = ["Placed", "place_schedules", "with_rates"]

_CODE: errors.Code = "schedule-unsupported"
_TABLE = frozenset({"factors", "start"})
"""Parameters that a live scheduler tells and no file holds."""

_SAMPLE = 64
"""Next rates by which two schedules are compared."""

_ALIKE = 1e-6
"""Relative difference within which a recorded rate and a schedule's are the same."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Placed:
    """The target's schedules, its optimizers with the rates that follow, and the account."""

    schedules: tuple[Schedule, ...]
    optimizers: tuple[Optimizer, ...]
    ledger: tuple[Entry, ...]
    problems: tuple[Problem, ...]
    requires: tuple[str, ...] = ()
    """Lines of the target's code."""
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
    placing = _Placing(source, template, template.optimizers if optimizers is None else optimizers, allow)
    for target in template.schedules:
        placing.place(target, conventions)
    placing.rest()
    return Placed(
        schedules=tuple(placing.schedules),
        optimizers=tuple(placing.optimizers.values()),
        ledger=tuple(placing.ledger),
        problems=tuple(placing.problems),
        requires=tuple(placing.requires),
        codes=placing.codes,
    )


class _Placing:
    """One target's schedules on their way."""

    def __init__(
        self,
        source: Checkpoint,
        template: Checkpoint,
        optimizers: tuple[Optimizer, ...],
        allow: Collection[str],
    ) -> None:
        self._source, self._template, self._allow = source, template, allow
        self.optimizers = {optimizer.name: optimizer for optimizer in optimizers}
        self.schedules: list[Schedule] = []
        self.ledger: list[Entry] = []
        self.problems: list[Problem] = []
        self.requires: list[str] = []
        self.codes: dict[str, str] = {}
        self._taken: set[str] = set()

    def place(self, target: Schedule, conventions: Mapping[str, str]) -> None:
        """One schedule of the template."""
        origin = partner(target, self._source.schedules)
        driven = self.optimizers.get(target.optimizer)
        try:
            if driven is not None and driven.framework != "torch":
                made = self._in_code(origin, target, driven)
            elif origin is not None:
                made = self._in_file(origin, target, driven)
            else:
                made = self._beside(target, driven, conventions)
        except NotExpressibleError as error:
            made = target
            self._refuse(origin or target, "source" if origin else "template", str(error))
            if origin is not None:
                self._taken.add(origin.name)
        self.schedules.append(made)

    def rest(self) -> None:
        """The source's schedules that no schedule of the template takes over."""
        for schedule in self._source.schedules:
            if schedule.name not in self._taken:
                self._left(schedule)

    def _in_code(self, origin: Schedule | None, target: Schedule, driven: Optimizer) -> Schedule:
        """A schedule that the target's code says: the counter alone is in the file."""
        if origin is None:
            raise NotExpressibleError(
                "the target's optimizer follows a schedule and the source's has a plain learning rate"
            )
        step = value_of(driven.step)
        if not is_known(curve_of(origin)):
            theirs = driven_by(origin, self._source)
            if theirs is None or theirs.framework == "torch":
                raise NotExpressibleError("the source's schedule is of no known family")
            self._take(origin, target, f"the counter that it follows is {step}")
            self.requires.append("# learning_rate: the schedule that the source's code has")
            return replace(target, position=origin.position, unit=origin.unit)
        step = self._counts_updates(origin, target, step)
        curve, base, code = self._code(origin, driven, step)
        if _goes_by(self._template, target, curve, base, step):
            self.requires += [f"# learning_rate: {code.remark}"] if code.remark else []
        else:
            self._say(code)
            current = value_of(self._group(driven).hyperparameters.get("learning_rate"))
            self.codes[f"learning_rate={number(current)}"] = "learning_rate=learning_rate"
        self._take(origin, target, code.remark)
        self._set_base(driven, Known(value=base, status="derived", source=origin.name))
        return replace(
            target,
            family=curve.family,
            position=Known(value=step, status="derived", formula="the optimizer's step"),
            unit="update",
            parameters=facts_of(curve, origin),
        )

    def _code(self, origin: Schedule, driven: Optimizer, index: int) -> tuple[Curve, float, Code]:
        """A Keras schedule with the source's rates: curve and base as the target has them, and its text."""
        scale, base = self._scale(origin, self._group(driven)), value_of(self._base(origin))
        if not isinstance(base, (int, float)):
            raise NotExpressibleError("its base rate is not recorded")
        curve, root = scaled(curve_of(origin), scale), float(base) * scale
        named = {name: value * scale for name, value in self._named(origin).items()}
        return curve, root, keras_code(curve, root, index, _package(driven), named)

    def _say(self, code: Code) -> None:
        """The lines that make `learning_rate`."""
        if code.remark:
            self.requires.append(f"# learning_rate: {code.remark}")
        if "ckptconv.keras." in code.expression:
            self.requires.append("import ckptconv.keras")
        self.requires.append(f"learning_rate = {code.expression}")

    def _counts_updates(self, origin: Schedule, target: Schedule, step: object) -> int:
        """The target's counter. Raises: NotExpressibleError unless the source's position is that."""
        position = value_of(origin.position)
        if origin.unit == "unknown":
            self.problems.append(_no_unit(origin))
        elif origin.unit != "update" or target.unit not in ("update", "unknown"):
            raise NotExpressibleError(
                f"it counts {origin.unit}s, the target's follows the optimizer's counter, and how many "
                "updates are in one is not recorded; a template with a variable for the learning rate has "
                "room for a callback"
            )
        if not isinstance(step, int) or position != step:
            raise NotExpressibleError(
                f"it stands at {position}, the optimizer's step is {step}; the target has one for both"
            )
        return step

    def _in_file(self, origin: Schedule, target: Schedule, driven: Optimizer | None) -> Schedule:
        """A schedule that the target's file holds."""
        index = value_of(origin.position)
        theirs = driven_by(origin, self._source)
        native = theirs is None or theirs.framework == "torch"
        if not isinstance(index, int):
            raise NotExpressibleError("where it stands is not known")
        if origin.unit == "micro-step":
            raise NotExpressibleError("it counts backward passes; how many make an update is not recorded")
        if native and _same_state(origin, target):
            made = replace(
                target, position=origin.position, unit=origin.unit, parameters=dict(origin.parameters)
            )
            if target.family == "lambda":
                self.requires.append("# LambdaLR: the function that the source's code has")
            self._keep_rates(origin, driven)
        else:
            made = self._converted(origin, target, driven, index)
        self._take(origin, target, "")
        if native and _same_state(origin, target):
            return made
        return placed(made, self.optimizers.get(target.optimizer))

    def _converted(
        self, origin: Schedule, target: Schedule, driven: Optimizer | None, index: int
    ) -> Schedule:
        base = value_of(self._base(origin))
        if not isinstance(base, (int, float)):
            raise NotExpressibleError("its base rate is not recorded")
        curve = curve_of(origin)
        if not is_known(curve):
            raise NotExpressibleError("the source does not tell its family")
        if target.family == "lambda":
            code, made, root = lambda_code(curve, float(base)), curve, float(base)
            if "bisect." in code:
                self.requires.append("import bisect")
            self.requires.append(f"torch.optim.lr_scheduler.LambdaLR(optimizer, {code})")
            parameters = dict(target.parameters)
        else:
            made, root = as_family(curve, float(base), target.family)
            if remark := check_ends(made, index):
                self.requires.append(f"# {target.name}: {remark}")
            parameters = into(target, made, origin)
        if driven is not None:
            self._set_rates(driven, made, root, index, origin)
        return replace(target, position=origin.position, unit=origin.unit, parameters=parameters)

    def _beside(self, target: Schedule, driven: Optimizer | None, conventions: Mapping[str, str]) -> Schedule:
        """A schedule of the template alone, where the source's recorded rate is the one that it gives."""
        if driven is None:
            raise NotExpressibleError("it drives no optimizer of the target")
        unit = conventions.get(UNIT)
        curve = curve_of(target)
        if unit not in ("update", "epoch") or not is_known(curve):
            raise NotExpressibleError(
                "the source has none; if its loop set the rates of this schedule, say what it counts with "
                f"--set {UNIT}=update or epoch"
            )
        counted = driven.step if unit == "update" else self._source.progress.epochs
        index = value_of(counted)
        if not isinstance(index, int):
            raise NotExpressibleError(f"the source does not tell how many {unit}s it has done")
        for place, group in enumerate(driven.groups):
            offered = self._template.optimizer(driven.name).groups[place].hyperparameters
            root = value_of(offered.get("base_learning_rate"))
            base = float(root) if isinstance(root, (int, float)) else 0.0
            own, due = (
                value_of(group.hyperparameters.get("learning_rate")),
                rate(curve, base, index, named_rates(offered)),
            )
            if due is None or not isinstance(own, (int, float)) or abs(due - own) > _ALIKE * abs(base):
                raise NotExpressibleError(f"at {index} it gives the rate {due}, the source has {own}")
        position = Known(value=index, status="derived", source=f"progress: {unit}s")
        made = replace(target, position=position, unit="update" if unit == "update" else "epoch")
        self.ledger.append(
            Entry(
                item=("template", target.name),
                fate="supplied",
                target=target.name,
                detail=f"{target.family} of the template at {index} {unit}s",
            )
        )
        return placed(made, self.optimizers[target.optimizer])

    def _left(self, schedule: Schedule) -> None:
        """A schedule that has no place: its rate is frozen, or a callback's code goes on with it."""
        keras = next((o for o in self.optimizers.values() if o.framework != "torch"), None)
        if keras is not None and (schedule.family == "plateau" or schedule.unit == "epoch"):
            try:
                self._in_callback(schedule, keras)
            except NotExpressibleError as error:
                self._refuse(schedule, "source", str(error))
            return
        self._refuse(
            schedule,
            "source",
            "the target has no schedule"
            + (" but a variable for the learning rate" if self.optimizers else ""),
        )

    def _in_callback(self, schedule: Schedule, driven: Optimizer) -> None:
        """A schedule that counts epochs: a callback of the target's code sets the variable."""
        index = value_of(schedule.position)
        if schedule.family == "plateau":
            self.requires += ["import ckptconv.keras", *plateau_code(curve_of(schedule), _package(driven))]
        elif not isinstance(index, int) or not is_known(curve_of(schedule)):
            raise NotExpressibleError("where it stands, or its family, is not known")
        else:
            self._say(self._code(schedule, driven, index)[2])
            self.requires.append(
                f"callback = {_package(driven)}.callbacks.LearningRateScheduler("
                f"lambda epoch, _: float(learning_rate(epoch)))  # model.fit(initial_epoch={index})"
            )
        self.ledger.append(
            Entry(
                item=("position", schedule.name),
                fate="noted",
                detail=f"{schedule.family} at {index} epochs: a callback of the target's code goes on",
            )
        )

    def _refuse(self, schedule: Schedule, side: str, why: str) -> None:
        if _CODE not in self._allow:
            self.problems.append(_refused(schedule, side, why))
        elif side == "source":
            self.ledger.append(_frozen(schedule))

    def _take(self, origin: Schedule, target: Schedule, remark: str) -> None:
        self._taken.add(origin.name)
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

    def _base(self, origin: Schedule) -> Fact | None:
        theirs = driven_by(origin, self._source)
        return (
            theirs.groups[0].hyperparameters.get("base_learning_rate") if theirs and theirs.groups else None
        )

    def _named(self, origin: Schedule) -> dict[str, float]:
        theirs = driven_by(origin, self._source)
        return named_rates(theirs.groups[0].hyperparameters) if theirs and theirs.groups else {}

    def _group(self, driven: Optimizer) -> Group:
        return driven.groups[0] if driven.groups else Group(params=())

    def _scale(self, origin: Schedule, group: Group) -> float:
        """What the conversion multiplied the source's rate with: what dampening leaves of it."""
        theirs = driven_by(origin, self._source)
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

    def _set_base(self, driven: Optimizer, base: Known) -> None:
        groups = tuple(
            replace(group, hyperparameters={**group.hyperparameters, "base_learning_rate": base})
            for group in driven.groups
        )
        self.optimizers[driven.name] = replace(driven, groups=groups)

    def _set_rates(self, driven: Optimizer, curve: Curve, base: float, index: int, origin: Schedule) -> None:
        """Base rate and rate of the next update in each group of a torch optimizer."""
        groups = []
        for group in driven.groups:
            facts = dict(group.hyperparameters)
            due = rate(curve, base, index, named_rates(facts))
            if due is None:
                raise NotExpressibleError(f"its rate at {index} has no closed form")
            formula = f"{curve.family} at {index}"
            facts["learning_rate"] = Known(value=due, status="derived", source=origin.name, formula=formula)
            facts["base_learning_rate"] = Known(value=base, status="derived", source=origin.name)
            groups.append(replace(group, hyperparameters=facts))
        self.optimizers[driven.name] = replace(driven, groups=tuple(groups))

    def _keep_rates(self, origin: Schedule, driven: Optimizer | None) -> None:
        """The rates that torch's groups keep for their schedule, from the source's groups."""
        theirs = driven_by(origin, self._source)
        if driven is None or theirs is None or not theirs.groups:
            return
        groups = []
        for place, group in enumerate(driven.groups):
            own = theirs.groups[place if len(theirs.groups) == len(driven.groups) else 0].hyperparameters
            kept = {
                name: own[name]
                for name in ("base_learning_rate", *ONE_CYCLE_RATES, "base_momentum", "max_momentum")
                if name in own
            }
            groups.append(replace(group, hyperparameters={**group.hyperparameters, **kept}))
        self.optimizers[driven.name] = replace(driven, groups=tuple(groups))


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
        if due is None or due_there is None or abs(due - due_there) > _ALIKE * abs(base):
            return False
    return True


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


def _no_unit(schedule: Schedule) -> Problem:
    return Problem(
        code="progress-unknown",
        loc=("schedules", schedule.name, "unit"),
        message=f"the schedule stands at {value_of(schedule.position)}, and whether it counts updates or "
        "epochs is not recorded",
        hint=f"Pass --set {UNIT}=update, or epoch.",
    )


def _refused(schedule: Schedule, side: str, why: str) -> Problem:
    return Problem(
        code=_CODE,
        loc=("schedules", schedule.name),
        message=f"the {side}'s learning-rate schedule ({schedule.family}, position "
        f"{value_of(schedule.position)}) cannot go on in the target: {why}",
        hint="Use a template whose optimizer follows this schedule, or --allow schedule-unsupported: the "
        "learning rate of the next update is carried and the schedule left to the target's code.",
    )


def _frozen(schedule: Schedule) -> Entry:
    return Entry(
        item=("position", schedule.name),
        fate="noted",
        detail=f"{schedule.family} at {value_of(schedule.position)}; the learning rate is frozen",
        allowed_by=_CODE,
    )
