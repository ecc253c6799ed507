"""Which variable of a Keras 3 optimizer is which slot, where the graph's slot lists are empty.

Keras before 3.10 saves `_momentums` and the like empty, but those of an optimizer inside a wrapper; later
ones do so of Adafactor and Muon alone. The variables then stand in `_variables` only, in the order in which
the class makes them (see `keras_file_slots`), and the end of a variable's name tells its slot:
`adam/sequential_dense_kernel_momentum`. Adagrad, Ftrl and Adafactor of those versions name their slots alike
(`adagrad/accumulator`): there the order is all that tells.

Source: `keras/src/optimizers/base_optimizer.py` of keras 3.3.3, 3.6.0, 3.10.0 and 3.15.1, measured.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ckptconv.catalog.optimizer_rows import Row, rows_of_framework
from ckptconv.catalog.slot_lists import interleaved
from ckptconv.dialects.keras_file_slots import assigned
from ckptconv.dialects.keras_slot_names import Shapes
from ckptconv.dialects.object_paths import Graph

_KERAS3 = "keras3"
Dealt = dict[str, dict[int, int]]
"""List edge -> number of the variable -> its slot."""


def in_one_row(
    graph: Graph,
    own: Sequence[int],
    variables: Sequence[int],
    lists: Mapping[str, Sequence[int]],
    shapes: Shapes,
) -> Dealt:
    """The slots that stand in `_variables` alone; nothing where no class, or classes differently, fit.

    `own`: the optimizer's variables but counter, learning rate, single numbers and lists that are filled.
    """
    for order in interleaved(_KERAS3):
        if variables and all(edge in lists and not lists[edge] for edge in order):
            return _by_ending(graph, own, variables, order)
    if not variables or not own:
        return {}
    due, held = [shapes[variable] for variable in variables], [shapes[variable] for variable in own]
    endings = [graph.variables[variable].full_name for variable in own]
    rows = rows_of_framework(_KERAS3)
    empty = {key for row in rows for key in row.slots.values() if key in lists and not lists[key]}
    readings: list[Dealt] = []
    for row in rows:
        made = {row.slots[slot] for slot in row.slots if slot not in row.slot_conditions}
        if not made <= empty or not empty <= set(row.slots.values()):
            continue
        values = {
            condition: any(name.endswith(f"_{row.slot_variables[slot]}") for name in endings)
            for slot, condition in row.slot_conditions.items()
        }
        found = assigned(row, due, held, values)
        if found is None or found.scalars or not _agree(row, found.slots, endings):
            continue
        dealt: Dealt = {}
        for slot, place, number in found.slots:
            dealt.setdefault(row.slots[slot], {})[place] = own[number]
        readings.append(dealt)
    return readings[0] if readings and all(one == readings[0] for one in readings) else {}


def _agree(row: Row, slots: Sequence[tuple[str, int, int]], names: Sequence[str]) -> bool:
    """Whether no variable's name ends with that of another slot of the class than its own."""
    for slot, _, number in slots:
        told = {one for one, ending in row.slot_variables.items() if names[number].endswith(f"_{ending}")}
        if told and slot not in told:
            return False
    return True


def _by_ending(
    graph: Graph, own: Sequence[int], variables: Sequence[int], order: Mapping[str, str | None]
) -> Dealt:
    """Slots dealt parameter by parameter, those that some lack by name; nothing where the row differs."""
    found: Dealt = {edge: {} for edge in order}
    number = 0
    for place in range(len(variables)):
        for edge, ending in order.items():
            if number < len(own) and (
                ending is None or graph.variables[own[number]].full_name.endswith(ending)
            ):
                found[edge][place] = own[number]
                number += 1
    return found if number == len(own) else {}
