"""What stands around the rule of a Keras file's optimizer: lists before the slots, loss scaling, clipping.

    use_ema                        one average per parameter
    gradient_accumulation_steps    one sum of gradients per parameter (Keras 3)

Without a config the number of the variables tells how many lists there are. One alone may be either in Keras
3: it stays as extra arrays, and what the counter counts is not known. The variables of Keras 3's
LossScaleOptimizer are a counter and a rate that stay 0, `step_counter` and `dynamic_scale`, then those of the
inner optimizer once more; tf_keras saves neither scale nor counter in these files.

Source: keras 3.15.1 `keras/src/optimizers/base_optimizer.py`, `loss_scale_optimizer.py`; tf_keras 2.21
`tf_keras/src/optimizers/optimizer.py`, `mixed_precision/loss_scale_optimizer.py`; measured.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from ckptconv.catalog.optimizer_rows import rows_of_framework
from ckptconv.catalog.optimizers import Row
from ckptconv.catalog.wrappers import ACCUMULATED, AVERAGE, SCALE, wrappers
from ckptconv.dialects.keras_file_model import Found
from ckptconv.dialects.keras_file_slots import Shape, assigned
from ckptconv.dialects.keras_file_stored import NAME, Path, Stored, Taken, Variables, number_in
from ckptconv.dialects.keras_scaling import UNSCALED, fixed_scaling
from ckptconv.document import Absent, Fact, Known, Unknown, Value
from ckptconv.rawtree import Node
from ckptconv.tensor import TensorRef

UNTOLD = "average or accumulated gradients"
Lists = tuple[str, ...]

_ARGUMENTS = {"use_ema": AVERAGE, "gradient_accumulation_steps": ACCUMULATED}
_WITHOUT_CONFIG: Mapping[str, tuple[Lists, ...]] = {
    "keras3": ((), (UNTOLD,), (AVERAGE, ACCUMULATED)),
    "tf_keras": ((), (AVERAGE,)),
}
"""Lists that a file may have whose config is not there."""


def _lists(
    row: Row | None,
    framework: str,
    arguments: Mapping[str, Node] | None,
    params: Sequence[Shape],
    variables: Sequence[Shape],
    values: Mapping[str, Value],
) -> Lists | None:
    """The lists of one variable per parameter that stand before the slots, by their canonical slots.

    None where more than one reading with lists fits. `arguments`: of the config; None where there is none.
    """
    if arguments is not None:
        return tuple(slot for name, slot in _ARGUMENTS.items() if arguments.get(name))
    possible = _WITHOUT_CONFIG.get(framework, ((),))
    if row is None and (UNTOLD,) not in possible:
        return ()  # lists may be slots of an unknown class, and the counter counts updates in any case
    rows = rows_of_framework(framework) if row is None else (row,)
    count, fits = len(params), []
    for lists in possible:
        rest = variables[len(lists) * count :]
        alike = all(list(variables[i * count :][:count]) == list(params) for i in range(len(lists)))
        whole = len(rest) + len(lists) * count == len(variables)
        if alike and whole and any(assigned(one, params, rest, values) for one in rows):
            fits.append(lists)
    if not fits or () in fits:
        return ()
    return fits[0] if len(fits) == 1 and (row is not None or fits[0] == (UNTOLD,)) else None


def settings_of(
    framework: str, arguments: Mapping[str, Node], at: tuple[str, ...]
) -> Iterator[tuple[str, Fact, tuple[str, ...]]]:
    """(canonical name, value, where it stands) of the settings of averages and clipping in a config."""
    table = wrappers(framework)
    for name, argument in table.arguments.items() if table is not None else ():
        if argument not in arguments or (name.startswith("ema_") and not arguments.get("use_ema")):
            continue
        value, path = arguments[argument], (*at, argument)
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            yield name, Known(value=value, source="/".join(path)), path
        elif value is None:
            yield name, Absent(reason=f"'{argument}' is null in the config"), path


@dataclass(frozen=True, slots=True, kw_only=True)
class Around:
    """The lists before the slots."""

    count: int = 0
    """How many variables they are."""
    slots: Mapping[str, Mapping[str, TensorRef]] = field(default_factory=dict)
    untold: bool = False
    oddities: tuple[str, ...] = ()


def lists_before(
    row: Row | None,
    framework: str,
    arguments: Mapping[str, Node] | None,
    values: Mapping[str, Value],
    trained: Sequence[Found],
    rest: Variables,
    taken: list[Taken],
    *,
    ordered: bool,
) -> Around:
    """The lists of one variable per parameter that stand before the slots.

    `arguments`: of the config; None where there is none. `rest`: the variables after counter and rate.
    """
    params, shapes = [one.tensor.shape for one in trained], [tensor.shape for _, tensor in rest]
    lists = _lists(row, framework, arguments, params, shapes, values)
    if lists is None:
        said = f"its {len(rest)} variables can be read in more than one way: they stay as extra arrays"
        return Around(count=len(rest), untold=True, oddities=(said,))
    count = min(len(lists) * len(trained), len(rest))
    if not lists or not ordered or shapes[:count] != params * len(lists):
        return Around(count=count)
    if lists == (UNTOLD,):
        return Around(count=count, untold=True, oddities=(f"{UNTOLD}: {count} variables stay extra arrays",))
    slots: dict[str, dict[str, TensorRef]] = {}
    for position, (path, tensor) in enumerate(rest[:count]):
        slot, one = lists[position // len(trained)], trained[position % len(trained)]
        slots.setdefault(slot, {})[one.name] = tensor
        taken.append(Taken(path=path, to=("slot", NAME, slot, one.name)))
    return Around(count=count, slots=slots)


_SCALER = (("growth_tracker", 2), ("loss_scale", 3))
"""Numbers of the variables of a LossScaleOptimizer of Keras 3."""
_OWN = 4
"""How many these are."""


def scaling_of(
    stored: Stored, outer: Mapping[str, Node] | None, at: Path, taken: list[Taken]
) -> tuple[Fact, Mapping[str, Fact]]:
    """The scale and what goes with it; `outer`: arguments of a LossScaleOptimizer, which stand at `at`."""
    if outer is None and not stored.scaler:
        return UNSCALED, {}
    facts: dict[str, Fact] = {}
    for name, number in _SCALER if len(stored.scaler) == _OWN else ():
        path, tensor = stored.scaler[number]
        facts[name] = Known(value=number_in(tensor, path), source="/".join(path))
        to = ("progress" if name == SCALE else "loss_scaling", name)
        taken.append(Taken(path=path, to=to, number=tensor))
    argument = "dynamic_growth_steps"
    interval = outer.get(argument) if outer is not None else None
    if isinstance(interval, int):
        path = (*at, argument)
        facts["growth_interval"] = Known(value=interval, source="/".join(path))
        taken.append(Taken(path=path, to=("loss_scaling", "growth_interval")))
    scale = facts.pop(SCALE, Unknown(reason="the file does not hold the scale of its LossScaleOptimizer"))
    return scale, {**facts, **fixed_scaling(stored.framework)}
