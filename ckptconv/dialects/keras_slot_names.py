"""Which variable each slot variable of tf_keras belongs to, by its full name.

`Adam/m/dense/kernel` is the slot `m` of `dense/kernel`. tf_keras numbers its slot variables in one list and
names them; the numbers alone tell nothing. Source: tf_keras 2.21 `tf_keras/src/optimizers/optimizer.py`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Literal

from ckptconv.catalog.optimizer_rows import shape_of_slot
from ckptconv.catalog.slot_lists import slot_kinds
from ckptconv.dialects.object_paths import Graph
from ckptconv.errors import CkptError, MappingError

Shapes = Mapping[int, tuple[int, ...]]
"""Shape of every variable node."""
Order = Literal["named", "declaration-order", "unknown"]
"""The evidence by which slots were given to variables."""
Matches = dict[int, tuple[str, int]]
"""Slot variable -> (name of the slot, the variable it belongs to)."""


def match_by_name(
    graph: Graph, own: Sequence[int], model_variables: Sequence[int], shapes: Shapes
) -> tuple[Matches, str | None, Order]:
    """Give each slot variable to the variable whose full name its own ends with.

    Variables of one name are told apart by order: slots follow the model's variables. That needs as many
    slots as variables, and equal shapes.

    Raises: order-ambiguous.
    """
    by_name: dict[str, list[int]] = {}
    for variable in model_variables:
        full_name = graph.variables[variable].full_name
        if full_name:
            by_name.setdefault(full_name, []).append(variable)
    named: dict[tuple[str, str], list[int]] = {}
    scopes: Counter[str] = Counter()
    for slot in own:
        parsed = _parse_slot_name(graph.variables[slot].full_name, by_name)
        if parsed is None:
            continue
        scope, name, variable_name = parsed
        scopes[scope] += 1
        named.setdefault((name, variable_name), []).append(slot)
    kinds = slot_kinds("tf_keras")
    matched: Matches = {}
    order: Order = "named"
    for (name, variable_name), slots in named.items():
        variables = by_name[variable_name]
        if len(variables) > 1:
            order = "declaration-order"
        same = len(slots) == len(variables) and all(
            shapes.get(slot) in {shape_of_slot(kind, shapes[variable]) for kind in kinds.get(name, {"param"})}
            for slot, variable in zip(slots, variables, strict=True)
        )
        if not same:
            raise _ambiguous(name, variable_name, len(slots), len(variables))
        matched.update({slot: (name, variable) for slot, variable in zip(slots, variables, strict=True)})
    ordered = {slot: matched[slot] for slot in own if slot in matched}
    scope = scopes.most_common(1)[0][0] if scopes else ""
    return ordered, scope or None, order


def _parse_slot_name(full_name: str, by_name: Mapping[str, list[int]]) -> tuple[str, str, str] | None:
    """`Adam/m/dense/kernel` -> (`Adam`, `m`, `dense/kernel`), by the longest variable name at its end."""
    parts = full_name.split("/")
    for start in range(1, len(parts)):
        rest = "/".join(parts[start:])
        if rest in by_name:
            return "/".join(parts[: start - 1]).rpartition("/")[2], parts[start - 1], rest
    return None


def _ambiguous(slot: str, variable: str, slots: int, variables: int) -> CkptError:
    return MappingError.of(
        "order-ambiguous",
        f"{slots} slots '{slot}' are named after '{variable}', which is the name of {variables} variables",
        "Give the model's layers distinct names and save again.",
        loc=("optimizer", slot, variable),
    )
