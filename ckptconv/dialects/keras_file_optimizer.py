"""The optimizer of a Keras 3 file: `optimizer/vars/<i>`, counter, learning rate, then the slots by order.

    0                counter of updates (of batches, where gradients are accumulated)
    1                learning rate; not there under a schedule
    2 ...            averages of `use_ema`, accumulated gradients (one per variable each), then the slots:
                     those that every optimizer of the class has, variable by variable; those that an argument
                     asks for (`amsgrad`, `momentum`, `centered`), list by list; numbers kept once

Class and arguments stand in `config.json` and are *recorded*; without a config the name that the optimizer
gives itself tells the class, and nothing tells the arguments. Where the number or shapes of the variables are
others than that order makes (Adafactor, Muon), they stay extra arrays and the algorithm is unknown.

Source: keras 3.15.1 `keras/src/optimizers/base_optimizer.py` (`build`) and the classes; measured for each.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from ckptconv.catalog.completion import row_of_class
from ckptconv.catalog.optimizers import Row, algorithms, row
from ckptconv.catalog.schedule_rates import flat
from ckptconv.dialects.keras_file_model import Found, below, flags, numbered, text
from ckptconv.dialects.keras_file_schedule import declared
from ckptconv.document import Absent, Fact, Group, Known, Optimizer, Schedule, Unknown, Value, value_of
from ckptconv.errors import FormatError
from ckptconv.rawtree import DictNode, Node
from ckptconv.tensor import TensorRef

FRAMEWORK = "keras3"
NAME = "optimizer"
CONFIG_PATH = ("compile_config", "optimizer")
Path = tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Taken:
    """A leaf that became part of the document."""

    path: Path
    to: tuple[str | int, ...]
    number: TensorRef | None = None
    """The variable, where it is a counter or a hyperparameter."""
    was: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Lifted:
    """An optimizer with what it brings along."""

    optimizer: Optimizer
    schedule: Schedule | None
    micro_steps: Fact
    accumulation: Fact
    weights: tuple[Taken, ...]
    """Leaves below the root of the weights."""
    config: tuple[Taken, ...]
    """Leaves below the config's arguments of the optimizer."""
    at: Path
    """Where those arguments stand in the config."""
    oddities: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Class:
    at: Path
    row: Row | None
    arguments: Mapping[str, Node] = field(default_factory=dict)
    declared: bool = False


def lift_optimizer(
    weights: DictNode, config: DictNode | None, params: Sequence[Found], *, ordered: bool
) -> Lifted | None:
    """The file's optimizer; None where it has none.

    Raises: corrupt-file where counter or learning rate is no single number.
    """
    at: Path = (NAME, "inner_optimizer") if below(weights, NAME, "inner_optimizer") else (NAME,)
    own = numbered(below(weights, *at, "vars"))
    if not own:
        return None
    where = (*at, "vars")
    known = _class_of(below(weights, *where), config)
    arguments = known.arguments
    step = _number(own[0][1], (*where, own[0][0]))
    per_update = arguments.get("gradient_accumulation_steps")
    micro: Fact = Absent(reason="gradients are not accumulated")
    accumulation: Fact = micro
    source = "/".join((*where, own[0][0]))
    fact: Fact = Known(value=int(step), source=source)
    taken = [Taken(path=(*where, own[0][0]), to=("step", NAME), number=own[0][1], was=int(step))]
    if isinstance(per_update, int) and per_update > 0:
        micro, accumulation = fact, Known(value=per_update, source="compile_config")
        formula = "micro_steps // gradient_accumulation_steps"
        fact = Known(value=int(step) // per_update, status="derived", source=source, formula=formula)
        taken = [Taken(path=(*where, own[0][0]), to=("progress", "micro_steps"), number=own[0][1])]
    facts, told = _hyperparameters(known)
    rest = own[1:]
    rate: TensorRef | None = None
    if rest and rest[0][1].shape == () and not isinstance(arguments.get("learning_rate"), DictNode):
        number, rate = rest[0]
        current = float(_number(rate, (*where, number)))
        facts["learning_rate"] = Known(value=current, source="/".join((*where, number)))
        taken.append(
            Taken(path=(*where, number), to=("hyperparameter", NAME, 0, "learning_rate"), number=rate)
        )
        rest = rest[1:]
        told = [
            one for one in told if one.path != ("learning_rate",) or arguments["learning_rate"] == current
        ]
    schedule = None if rate is not None else _schedule(known, facts, fact)
    trained = [one for one in params if one.trainable is not False]
    rest = rest[_beside(arguments) * len(trained) :]
    slots, scalars, oddities = _slots(known, facts, trained, rest, where, taken, ordered=ordered)
    algorithm = known.row.algorithm if known.row is not None else "unknown"
    values = {name: value for name, one in facts.items() if (value := value_of(one)) is not None}
    return Lifted(
        optimizer=Optimizer(
            name=NAME,
            algorithm=algorithm,
            framework=FRAMEWORK,
            form=known.row.form(values) if known.row is not None and known.declared else {},
            step=fact,
            groups=(Group(params=tuple(one.name for one in trained), hyperparameters=facts),),
            slots=slots,
            scalars=scalars,
            param_order="declaration-order" if slots else "unknown",
        ),
        schedule=schedule,
        micro_steps=micro,
        accumulation=accumulation,
        weights=tuple(taken),
        config=tuple(told),
        at=known.at,
        oddities=tuple(oddities),
    )


def _class_of(group: Node, config: DictNode | None) -> _Class:
    """The optimizer's class: of the config, else by the name that its variables' group has."""
    declared = below(config, *CONFIG_PATH) if config is not None else None
    at: Path = (*CONFIG_PATH, "config")
    inner = below(declared, "config", "inner_optimizer")
    if isinstance(inner, DictNode):
        declared, at = inner, (*CONFIG_PATH, "config", "inner_optimizer", "config")
    if isinstance(declared, DictNode):
        ours = text(declared.get("module")).split(".")[0] == "keras"
        found = row_of_class(FRAMEWORK, text(declared.get("class_name"))) if ours else None
        return _Class(at=at, row=found, arguments=flags(declared.get("config")), declared=True)
    state = group.state if isinstance(group, DictNode) else None
    scope = re.sub(r"_\d+$", "", text(state.get("name")) if isinstance(state, DictNode) else "")
    rows = [one for name in algorithms() if (one := row(name, FRAMEWORK)) is not None]
    named = [one for one in rows if scope and one.scope == scope]
    return _Class(at=at, row=named[0] if len(named) == 1 else None)


def _hyperparameters(known: _Class) -> tuple[dict[str, Fact], list[Taken]]:
    """What the config records under the canonical names; what is null there stands for having none."""
    facts: dict[str, Fact] = {}
    taken = []
    for name, entry in known.row.hyperparameters.items() if known.row is not None else ():
        if entry.argument is None or entry.argument not in known.arguments:
            continue
        value = known.arguments[entry.argument]
        source = "/".join((*known.at, entry.argument))
        if isinstance(value, (bool, int, float)):
            facts[name] = Known(value=value, source=source)
            taken.append(Taken(path=(entry.argument,), to=("hyperparameter", NAME, 0, name)))
        elif value is None and known.row is not None and name in known.row.neutral:
            facts[name] = Known(value=known.row.neutral[name], source=source)
    return facts, taken


def _schedule(known: _Class, facts: dict[str, Fact], step: Fact) -> Schedule:
    """The schedule of a file without a learning rate, as far as the config tells it."""
    facts["learning_rate"] = Unknown(reason="the optimizer follows a schedule")
    config = known.arguments.get("learning_rate")
    told = declared(config)
    parameters: dict[str, Fact] = {}
    if told is not None:
        source = "/".join((*known.at, "learning_rate"))
        rates = {"base_learning_rate": told.base, **told.named}
        facts.update({name: Known(value=rate, source=source) for name, rate in rates.items()})
        parameters = {name: Known(value=v, source=source) for name, v in flat(told.curve).items()}
    return Schedule(
        name=f"{NAME}.learning_rate",
        family=told.curve.family if told is not None else "unknown",
        position=step,
        unit="update",
        parameters=parameters,
        optimizer=NAME,
    )


def _beside(arguments: Mapping[str, Node]) -> int:
    """Lists, one entry per variable, that stand before the slots."""
    return sum(bool(arguments.get(name)) for name in ("use_ema", "gradient_accumulation_steps"))


Slots = dict[str, dict[str, TensorRef]]


def _slots(
    known: _Class,
    facts: Mapping[str, Fact],
    trained: Sequence[Found],
    rest: Sequence[tuple[str, TensorRef]],
    where: Path,
    taken: list[Taken],
    *,
    ordered: bool,
) -> tuple[Slots, dict[str, Fact], list[str]]:
    if known.row is None:
        return {}, {}, ["the optimizer's class is not in the catalog: its state stays as extra arrays"]
    if not ordered:
        if not rest:
            return {}, {}, []
        said = "the order in which this model trains is not in the file: slots stay as extra arrays"
        return {}, {}, [said]
    orders = _orders(known, facts, trained)
    scalars = tuple(known.row.scalars)
    for order in orders:
        if len(rest) not in (len(order), len(order) + len(scalars)):
            continue
        pairs = list(zip(order, rest[: len(order)], strict=True))
        if any(tensor.shape != one.tensor.shape for (_, one), (_, tensor) in pairs):
            continue
        slots: Slots = {}
        for (slot, one), (number, tensor) in pairs:
            slots.setdefault(slot, {})[one.name] = tensor
            taken.append(Taken(path=(*where, number), to=("slot", NAME, slot, one.name)))
        numbers: dict[str, Fact] = {}
        for scalar, (number, tensor) in zip(scalars, rest[len(order) :], strict=False):
            numbers[scalar] = Known(
                value=_number(tensor, (*where, number)), source="/".join((*where, number))
            )
            taken.append(Taken(path=(*where, number), to=("scalar", NAME, scalar), number=tensor))
        return slots, numbers, []
    if not rest:
        return {}, {}, ["the optimizer was saved before it was built: it has no slots"] if orders[0] else []
    said = f"the {len(rest)} variables of the optimizer are not those of {known.row.class_name}: extra arrays"
    return {}, {}, [said]


def _orders(
    known: _Class, facts: Mapping[str, Fact], trained: Sequence[Found]
) -> list[list[tuple[str, Found]]]:
    """The (slot, variable) in the order in which the class makes them; one order per set of slots."""
    assert known.row is not None
    conditions = known.row.slot_conditions
    values: dict[str, Value] = {name: value_of(fact) for name, fact in facts.items()}
    every = [slot for slot in known.row.slots if slot not in conditions]
    asked = [slot for slot in conditions if values.get(conditions[slot])]
    choices = [asked] if known.declared else [[], list(conditions)]
    return [
        [(slot, one) for one in trained for slot in every]
        + [(slot, one) for slot in choice for one in trained]
        for choice in choices
    ]


def _number(tensor: TensorRef, path: Path) -> int | float:
    if tensor.spec.numel != 1 or tensor.dtype.kind not in ("int", "uint", "float"):
        raise FormatError.of(
            "corrupt-file",
            f"'{'/'.join(path)}' is {tensor.dtype.name} {list(tensor.shape)}, expected one number",
            "Save the model again.",
            loc=path,
        )
    value: Value = tensor.read().reshape(-1)[0].item()
    assert isinstance(value, (int, float))
    return value
