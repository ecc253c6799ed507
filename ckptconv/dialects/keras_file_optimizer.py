"""The optimizer of a Keras file: its variables in one row, told apart by their order.

    counter             of updates (of batches, where gradients are accumulated)
    learning rate       Keras 3 alone; not there under a schedule
    ...                 averages of `use_ema`, accumulated gradients (one per parameter each)
    slots and numbers   see `keras_file_slots`

Class and arguments stand in a config and are *recorded*; without one the name that the optimizer gives
itself tells the class, and nothing tells the arguments. An optimizer inside a LossScaleOptimizer is the one
that is meant: the counter of the wrapper of Keras 3 stays 0, that of tf_keras is the same one once more.
Where the variables are others than the class makes, they stay extra arrays. Where nothing tells the class,
every class that makes such variables is a candidate; if all of them part these alike, the slots are numbered
in the order of the class's own.

Source: keras 3.15.1 `keras/src/optimizers/base_optimizer.py` (`build`), tf_keras 2.21
`tf_keras/src/optimizers`, keras 2.0.9 to 2.3.1 `keras/optimizers.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from ckptconv.catalog.completion import row_of_class
from ckptconv.catalog.optimizers import Row, algorithms, row
from ckptconv.catalog.schedule_rates import flat
from ckptconv.catalog.schedules import CUSTOM, UNKNOWN
from ckptconv.catalog.wrappers import ACCUMULATED
from ckptconv.dialects.keras_config import flags, is_of_keras, plain_class
from ckptconv.dialects.keras_file_around import Around, lists_before, scaling_of, settings_of
from ckptconv.dialects.keras_file_model import Found
from ckptconv.dialects.keras_file_schedule import declared
from ckptconv.dialects.keras_file_slots import Assigned, assigned, has_slots
from ckptconv.dialects.keras_file_stored import (
    INNER,
    NAME,
    Path,
    Stored,
    Taken,
    Variables,
    number_in,
)
from ckptconv.document import (
    NOT_RECORDED,
    Absent,
    Candidate,
    Fact,
    Group,
    Known,
    Optimizer,
    Schedule,
    Unknown,
    Value,
    value_of,
)
from ckptconv.errors import FormatError
from ckptconv.rawtree import DictNode, Node
from ckptconv.tensor import TensorRef

_RATE_IS_A_VARIABLE = frozenset({"keras3"})
_OLDER_NAMES = {"learning_rate": "lr", "schedule_decay": "decay", "decay": "schedule_decay"}
"""Argument -> the name that another version of its class has for it in a config."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Lifted:
    """An optimizer with what it brings along."""

    optimizer: Optimizer
    schedule: Schedule | None
    micro_steps: Fact
    accumulation: Fact
    taken: tuple[Taken, ...]
    loss_scale: Fact
    loss_scaling: Mapping[str, Fact]
    oddities: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Class:
    at: Path = ()
    row: Row | None = None
    arguments: Mapping[str, Node] = field(default_factory=dict)
    declared: bool = False
    outer: Mapping[str, Node] | None = None
    """Arguments of the LossScaleOptimizer around it."""


def lift_optimizer(stored: Stored, params: Sequence[Found], *, ordered: bool) -> Lifted:
    """The optimizer with its slots by the names of their parameters.

    `ordered`: whether the parameters are in the order in which they are trained.
    Raises: corrupt-file where counter or learning rate is no single number.
    """
    known = _class_of(stored)
    facts, config = _hyperparameters(known)
    rest = list(stored.variables)
    taken: list[Taken] = []
    rest = rest[1:] if stored.counter else rest
    rate = False
    if rest and stored.framework in _RATE_IS_A_VARIABLE and rest[0][1].shape == ():
        rate = not isinstance(known.arguments.get("learning_rate"), DictNode)
    if rate:
        path, tensor = rest.pop(0)
        current = float(number_in(tensor, path))
        facts["learning_rate"] = Known(value=current, source="/".join(path))
        taken.append(Taken(path=path, to=("hyperparameter", NAME, 0, "learning_rate"), number=tensor))
        if known.arguments.get("learning_rate") != current:
            config = [one for one in config if one.path[-1] != "learning_rate"]
    followed = isinstance(known.arguments.get("learning_rate"), DictNode)
    followed = followed or (stored.framework in _RATE_IS_A_VARIABLE and not rate)
    trained = [one for one in params if one.trainable is not False]
    around = lists_before(
        known.row,
        stored.framework,
        known.arguments if known.declared else None,
        _values(facts),
        trained,
        rest,
        taken,
        ordered=ordered,
    )
    rest = rest[around.count :]
    step, micro, accumulation = _step(stored, known, around, taken)
    schedule = _schedule(known, facts, step, micro) if followed else None
    if "learning_rate" not in facts and schedule is None:
        facts["learning_rate"] = Unknown(reason="neither a config nor a variable of the file tells it")
    state = _state(known, stored.framework, _values(facts), trained, rest, taken, ordered=ordered)
    scale, scaling = scaling_of(stored, known.outer, known.at[:-2], taken)
    for name, fact, path in settings_of(stored.framework, known.arguments, known.at):
        facts[name] = fact
        taken.append(Taken(path=path, to=("hyperparameter", NAME, 0, name), nullable=True))
    return Lifted(
        optimizer=Optimizer(
            name=NAME,
            algorithm=known.row.algorithm if known.row is not None else "unknown",
            algorithm_candidates=state.candidates,
            framework=stored.framework,
            form=known.row.form(_values(facts)) if known.row is not None and known.declared else {},
            step=step,
            groups=(Group(params=tuple(one.name for one in trained), hyperparameters=facts),),
            slots={**state.slots, **around.slots},
            scalars=state.scalars,
            param_order="declaration-order" if state.slots or around.slots else "unknown",
        ),
        schedule=schedule,
        micro_steps=micro,
        accumulation=accumulation,
        taken=(*taken, *config, *_again(stored, taken)),
        loss_scale=scale,
        loss_scaling=scaling,
        oddities=(*around.oddities, *state.oddities),
    )


def _class_of(stored: Stored) -> _Class:
    """The optimizer's class: of the config, else by the name that it gives itself."""
    config, at, outer = stored.config, stored.at, None
    while isinstance(inner := flags(flags(config).get("config")).get(INNER), DictNode):
        config, at, outer = inner, (*at, "config", INNER), flags(flags(config).get("config"))
    if isinstance(config, DictNode):
        name = plain_class(config).rpartition(".")[2]
        found = row_of_class(stored.framework, name) if is_of_keras(config) else None
        return _Class(
            at=(*at, "config"),
            row=found,
            arguments=flags(config.get("config")),
            declared=True,
            outer=outer,
        )
    rows = [one for name in algorithms() if (one := row(name, stored.framework)) is not None]
    if isinstance(config, str):
        named = [one for one in rows if one.class_name.rpartition(".")[2].lower() == config.lower()]
    else:
        named = [one for one in rows if one.is_called(stored.scope)]
    return _Class(row=named[0] if len(named) == 1 else None)


def _values(facts: Mapping[str, Fact]) -> dict[str, Value]:
    return {name: value for name, one in facts.items() if (value := value_of(one)) is not None}


def _hyperparameters(known: _Class) -> tuple[dict[str, Fact], list[Taken]]:
    """What the config records under the canonical names; what is null there stands for having none."""
    facts: dict[str, Fact] = {}
    taken = []
    for name, entry in known.row.hyperparameters.items() if known.row is not None else ():
        argument = entry.argument
        if argument is not None and argument not in known.arguments:
            argument = _OLDER_NAMES.get(argument)
        if argument is None or argument not in known.arguments or known.row is None:
            continue
        value = known.arguments[argument]
        path = (*known.at, argument)
        if isinstance(value, (bool, int, float)):
            facts[name] = Known(value=value, source="/".join(path))
            taken.append(Taken(path=path, to=("hyperparameter", NAME, 0, name)))
        elif value is None and name in known.row.neutral:
            facts[name] = Known(value=known.row.neutral[name], source="/".join(path))
    return facts, taken


def _step(stored: Stored, known: _Class, around: Around, taken: list[Taken]) -> tuple[Fact, Fact, Fact]:
    """Completed updates, batches, and batches per update."""
    micro: Fact = Absent(reason="gradients are not accumulated")
    if not stored.counter:
        return Unknown(reason="this class of Keras before 2.3 saves no counter"), micro, micro
    path, tensor = stored.variables[0]
    count = number_in(tensor, path)
    if count < 0 or not float(count).is_integer():
        raise FormatError.of(
            "corrupt-file",
            f"'{'/'.join(path)}' is {count}, which is no count of updates",
            "Save the model again.",
            loc=path,
        )
    per_update = known.arguments.get("gradient_accumulation_steps")
    source = "/".join(path)
    if isinstance(per_update, int) and not isinstance(per_update, bool) and per_update > 0:
        taken.append(Taken(path=path, to=("progress", "micro_steps"), number=tensor))
        step = Known(
            value=int(count) // per_update,
            status="derived",
            source=source,
            formula="micro_steps // gradient_accumulation_steps",
        )
        there = "/".join((*known.at, "gradient_accumulation_steps"))
        return step, Known(value=int(count), source=source), Known(value=per_update, source=there)
    counted = Known(value=int(count), source=source)
    if ACCUMULATED in around.slots:
        taken.append(Taken(path=path, to=("progress", "micro_steps"), number=tensor))
        reason = f"'{source}' is {int(count)} batches; batches per update are not stored"
        return Unknown(reason=reason), counted, Unknown(reason="gradient_accumulation_steps is not stored")
    if around.untold:
        taken.append(Taken(path=path, to=("progress", "micro_steps"), number=tensor))
        reading = Candidate(value=int(count), source=source, condition="it keeps averages (use_ema)")
        reason = (
            f"whether the optimizer keeps averages, or accumulates and '{source}' is batches, is not told"
        )
        return Unknown(reason=reason, candidates=(reading,)), counted, NOT_RECORDED
    taken.append(Taken(path=path, to=("step", NAME), number=tensor, was=int(count)))
    return counted, micro, micro


def _schedule(known: _Class, facts: dict[str, Fact], step: Fact, micro: Fact) -> Schedule:
    """The schedule of a file without a learning rate, as far as the config tells it."""
    facts["learning_rate"] = Unknown(reason="the optimizer follows a schedule")
    config = known.arguments.get("learning_rate")
    told, family = declared(config), CUSTOM if isinstance(config, DictNode) else UNKNOWN
    parameters: dict[str, Fact] = {}
    if told is not None:
        source = "/".join((*known.at, "learning_rate"))
        rates = {"base_learning_rate": told.base, **told.named}
        facts.update({name: Known(value=rate, source=source) for name, rate in rates.items()})
        parameters = {name: Known(value=v, source=source) for name, v in flat(told.curve).items()}
    return Schedule(
        name=f"{NAME}.learning_rate",
        family=told.curve.family if told is not None else family,
        position=micro if isinstance(micro, Known) else step,
        unit="micro-step" if isinstance(micro, Known) else "update",
        parameters=parameters,
        optimizer=NAME,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _State:
    """What the variables after counter and learning rate mean."""

    slots: Mapping[str, Mapping[str, TensorRef]] = field(default_factory=dict)
    scalars: Mapping[str, Fact] = field(default_factory=dict)
    candidates: tuple[str, ...] = ()
    oddities: tuple[str, ...] = ()


def _state(
    known: _Class,
    framework: str,
    values: Mapping[str, Value],
    trained: Sequence[Found],
    rest: Variables,
    taken: list[Taken],
    *,
    ordered: bool,
) -> _State:
    if known.row is None and known.declared:
        return _State(
            oddities=("the optimizer's class is not in the catalog: its state stays as extra arrays",)
        )
    if not ordered:
        said = "the order in which this model trains is not in the file: slots stay as extra arrays"
        return _State(oddities=(said,) if rest else ())
    params, shapes = [one.tensor.shape for one in trained], [tensor.shape for _, tensor in rest]
    if known.row is None:
        return _of_no_class(framework, params, shapes, trained, rest, taken)
    found = assigned(known.row, params, shapes, values)
    if found is None and rest:
        said = f"the {len(rest)} variables of the optimizer are not those of {known.row.class_name}"
        return _State(oddities=(f"{said}: they stay as extra arrays",))
    if found is None:
        said = "the optimizer was saved before it was built: it has no slots"
        return _State(oddities=(said,) if has_slots(known.row, values) else ())
    scalars: dict[str, Fact] = {}
    for scalar, number in found.scalars:
        path, tensor = rest[number]
        scalars[scalar] = Known(value=number_in(tensor, path), source="/".join(path))
        taken.append(Taken(path=path, to=("scalar", NAME, scalar), number=tensor))
    lacking = [f"'{name}' of {known.row.class_name} is not in the file" for name in known.row.scalars]
    return _State(
        slots=_slots(found, trained, rest, taken),
        scalars=scalars,
        oddities=tuple(lacking) if found.slots and not scalars else (),
    )


def _of_no_class(
    framework: str,
    params: Sequence[tuple[int, ...]],
    shapes: Sequence[tuple[int, ...]],
    trained: Sequence[Found],
    rest: Variables,
    taken: list[Taken],
) -> _State:
    """The state of a class that nothing names, as far as all that fit agree on it."""
    if not rest:
        return _State()
    readings = {
        name: found
        for name in algorithms()
        if (one := row(name, framework)) is not None
        and (found := assigned(one, params, shapes, {}, numbered=True)) is not None
    }
    said = "nothing in the file tells the optimizer's class"
    if not readings:
        return _State(oddities=(f"{said}: its state stays as extra arrays",))
    said += f"; its state fits {', '.join(readings)}: --set optimizer=NAME says which"
    first, *others = readings.values()
    if any(other.slots != first.slots for other in others):
        return _State(candidates=tuple(readings), oddities=(f"{said}, in different orders",))
    return _State(slots=_slots(first, trained, rest, taken), candidates=tuple(readings), oddities=(said,))


def _slots(
    found: Assigned, trained: Sequence[Found], rest: Variables, taken: list[Taken]
) -> dict[str, dict[str, TensorRef]]:
    slots: dict[str, dict[str, TensorRef]] = {}
    for slot, param, number in found.slots:
        path, tensor = rest[number]
        slots.setdefault(slot, {})[trained[param].name] = tensor
        taken.append(Taken(path=path, to=("slot", NAME, slot, trained[param].name)))
    return slots


def _again(stored: Stored, taken: Sequence[Taken]) -> list[Taken]:
    """What was taken, at the other places where it stands too."""
    found = []
    for row_ in stored.again:
        others = {path: other for (path, _), other in zip(stored.variables, row_, strict=True)}
        found += [replace(one, path=others[one.path]) for one in taken if one.path in others]
    return found
