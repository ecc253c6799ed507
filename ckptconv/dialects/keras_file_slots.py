"""Which variable of an optimizer is which slot of which parameter, where a file keeps them in one row.

    Keras 3, tf_keras   the slots that every optimizer of the class has, parameter by parameter; those that an
                        argument asks for (`amsgrad`, `momentum`, `centered`), slot by slot; numbers kept
                        once, which before Keras 3.10 stand first
    legacy, Keras 2     numbers kept once; slot by slot (Ftrl: parameter by parameter)

An order counts as the file's where it makes as many variables, each of the right shape. Variables that stand
for none are left: Adafactor's placeholders, those of one element that Keras 2.1 to 2.3 makes for an Adam
without amsgrad. Muon has a second slot for some of its parameters; which, must follow from the shapes.

Source: the `build` of keras 3.15.1 and tf_keras 2.21, `_create_slots` of tf_keras 2.21 its legacy classes,
`get_updates` of keras 2.0.9 to 2.3.1; measured for each class but those of Keras 2.0 to 2.3.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from ckptconv.catalog.factored import FACTORS
from ckptconv.catalog.optimizer_rows import Row, shape_of_slot
from ckptconv.document import Value

Shape = tuple[int, ...]
_MOST_READINGS = 64
"""Of one place: a row of equal shapes could be read in as many ways as it is long."""
_BY_PARAMETER = frozenset({("tf_keras_legacy", "ftrl")})
"""Legacy classes that make all slots of a parameter together."""
_SLOT_BY_SLOT = frozenset({"tf_keras_legacy"})
_ALWAYS_OPTIONAL = "part"


@dataclass(frozen=True, slots=True)
class _Place:
    """One variable that the class makes, or may make."""

    slot: str
    param: int
    """Number of its parameter among those that are trained."""
    shape: Shape | None
    """None where any will do, since it is no slot."""
    kept: bool = True
    """Whether it is a slot."""
    optional: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Assigned:
    """The variables that have a meaning."""

    slots: tuple[tuple[str, int, int], ...]
    """(slot, number of the parameter, number of the variable)."""
    scalars: tuple[tuple[str, int], ...] = ()
    """(number kept once, number of the variable)."""


def assigned(
    row: Row,
    params: Sequence[Shape],
    variables: Sequence[Shape],
    values: Mapping[str, Value],
    *,
    numbered: bool = False,
) -> Assigned | None:
    """The slots of the trained parameters among an optimizer's variables; None where no order fits.

    `variables`: those after counter, learning rate and what is no slot. `values`: hyperparameters as far as
    they are known. `numbered`: slots are named by their numbers in the row.
    """
    names = {slot: str(number) if numbered else slot for number, slot in enumerate(row.slots)}
    for order in _orders(row, params, values):
        for scalars in (tuple(row.scalars), ()) if row.scalars else ((),):
            fits = [
                Assigned(
                    slots=tuple(
                        (names[place.slot], place.param, begin + number)
                        for place, number in found
                        if place.kept
                    ),
                    scalars=tuple(zip(scalars, numbers, strict=True)),
                )
                for begin, end, numbers in _around(row, len(scalars), variables)
                if (found := _matched(order, variables[begin:end])) is not None
            ]
            if fits:
                return fits[0] if len(fits) == 1 else None
    return None


def _around(row: Row, count: int, variables: Sequence[Shape]) -> Iterator[tuple[int, int, range]]:
    """(begin, end, numbers): where the slots may stand beside the numbers that are kept once."""
    last = len(variables) - count
    if last < 0:
        return
    ways = [(count, len(variables), range(count))]
    if count and row.framework not in _SLOT_BY_SLOT:
        ways.append((0, last, range(last, len(variables))))
    yield from (way for way in ways if all(variables[number] == () for number in way[2]))


def has_slots(row: Row, values: Mapping[str, Value]) -> bool:
    """Whether the class keeps something for each parameter under these hyperparameters."""
    return any(slot not in row.slot_conditions or values.get(row.slot_conditions[slot]) for slot in row.slots)


def _orders(row: Row, params: Sequence[Shape], values: Mapping[str, Value]) -> Iterator[list[_Place]]:
    """The orders that the class can make, likeliest first."""
    conditions = row.slot_conditions
    every = [slot for slot in row.slots if slot not in conditions]
    asked = [slot for slot in conditions if values.get(conditions[slot])]
    others = [slot for slot in conditions if slot not in asked]
    numbers = range(len(params))
    lists = row.framework in _SLOT_BY_SLOT and (row.framework, row.algorithm) not in _BY_PARAMETER
    pairs = [(s, n) for s in every for n in numbers] if lists else [(s, n) for n in numbers for s in every]
    common = [_place(row, slot, n, params[n]) for slot, n in pairs if _makes(row, slot, params[n])]
    common += [_place(row, slot, n, params[n]) for slot in asked for n in numbers]
    yield common
    if others:
        yield [*common, *(_place(row, slot, n, params[n]) for slot in others for n in numbers)]
        if lists:
            yield [*common, *(_Place(slot, n, (1,), kept=False) for slot in others for n in numbers)]


def _makes(row: Row, slot: str, shape: Shape) -> bool:
    """Whether there is a variable: of a factor that a parameter has not, where there are placeholders."""
    kind = row.slot_shapes.get(slot, "param")
    return row.placeholders or kind not in FACTORS or shape_of_slot(kind, shape) is not None


def _place(row: Row, slot: str, number: int, shape: Shape) -> _Place:
    kind = row.slot_shapes.get(slot, "param")
    due = shape_of_slot(kind, shape)
    optional = kind == _ALWAYS_OPTIONAL and len(shape) in (2, 3)
    return _Place(slot, number, due, kept=due is not None, optional=optional)


def _matched(order: Sequence[_Place], shapes: Sequence[Shape]) -> list[tuple[_Place, int]] | None:
    """The places with the numbers of their variables; None where no reading fits, or more than one."""
    if not any(place.optional for place in order):
        if len(order) != len(shapes):
            return None
        fits = all(place.shape in (None, shape) for place, shape in zip(order, shapes, strict=True))
        return list(zip(order, range(len(shapes)), strict=True)) if fits else None
    ways: list[dict[int, int]] = [{0: 1}]
    for place in order:
        after: dict[int, int] = {}
        for number, count in ways[-1].items():
            if number < len(shapes) and place.shape in (None, shapes[number]):
                after[number + 1] = min(after.get(number + 1, 0) + count, 2)
            if place.optional:
                after[number] = min(after.get(number, 0) + count, 2)
        if not after or len(after) > _MOST_READINGS:
            return None
        ways.append(after)
    if ways[-1].get(len(shapes)) != 1:
        return None
    found: list[tuple[_Place, int]] = []
    number = len(shapes)
    for position in range(len(order) - 1, -1, -1):
        place, before = order[position], ways[position]
        if number > 0 and number - 1 in before and place.shape in (None, shapes[number - 1]):
            number -= 1
            found.append((place, number))
    return found[::-1]
