"""How the slots of a framework's optimizers stand in its object graphs, over all of its classes."""

from __future__ import annotations

from collections.abc import Mapping

from ckptconv.catalog.optimizer_rows import rows_of_framework


def slot_shapes(framework: str) -> Mapping[str, str]:
    """Native slot key -> kind of its shape, of slots that are not each parameter's in its shape."""
    rows = rows_of_framework(framework)
    return {found.slots[slot]: kind for found in rows for slot, kind in found.slot_shapes.items()}


def slot_kinds(framework: str) -> Mapping[str, frozenset[str]]:
    """What names a slot's variables -> the kinds of shape that it has in the framework's classes."""
    kinds: dict[str, set[str]] = {}
    for found in rows_of_framework(framework):
        for slot, variable in found.slot_variables.items():
            kinds.setdefault(variable, set()).add(found.slot_shapes.get(slot, "param"))
    return {variable: frozenset(found) for variable, found in kinds.items()}


def interleaved(framework: str) -> tuple[Mapping[str, str | None], ...]:
    """Of the classes whose slots stand in `_variables` alone, native slot keys in their order.

    Each with the end of its variables' names where a parameter may have none, else None.
    """
    return tuple(
        {
            key: f"_{found.slot_variables[slot]}" if found.slot_shapes.get(slot) == "part" else None
            for slot, key in found.slots.items()
        }
        for found in rows_of_framework(framework)
        if found.interleaved
    )
