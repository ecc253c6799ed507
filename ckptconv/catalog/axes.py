"""Named axes against shapes: which sizes they have, and the ops that lead from one layout to another.

An axis is one atom, or several that are merged (`in*multiplier`, outermost first), or `1`. An atom may list
its entries: `gate(reset,update,new)` has three, in this order, and another order is another layout.
`units'` is another axis than `units` and of its size; `-h` is `h` counted from its end.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from functools import lru_cache

from ckptconv.ops import Permute, Reorder, Reshape
from ckptconv.tensor import Op

Shape = tuple[int, ...]
Axes = tuple[str, ...]


def atoms(axis: str) -> tuple[str, ...]:
    """The atoms of an axis: `in*multiplier` has two, `in*h=2*w=3` three, `1` none."""
    return () if axis == "1" else tuple(part.partition("=")[0] for part in axis.split("*"))


def sizes_in(axis: str) -> dict[str, int]:
    """The sizes of atoms that an axis tells itself: `in*h=2*w=3` those of `h` and `w`."""
    said = (part.partition("=") for part in axis.split("*"))
    return {name: int(size) for name, equals, size in said if equals}


_LISTED = re.compile(r"(\w+)\((\w+(?:,\w+)*)\)")


def entries(atom: str) -> tuple[str, tuple[str, ...]]:
    """The atom's name and its entries, none where it does not list them."""
    found = _LISTED.fullmatch(atom)
    return (found[1], tuple(found[2].split(","))) if found else (atom, ())


def _sized(atom: str) -> str:
    """The name under which the atom's size is known."""
    return entries(atom)[0].removeprefix("-").rstrip("'")


def expand(axes: Axes, rank: int) -> Axes | None:
    """The axes for a tensor of that rank: `x...` becomes as many as there are; None where it cannot."""
    open_ended = [i for i, axis in enumerate(axes) if axis.endswith("...")]
    if not open_ended:
        return axes if len(axes) == rank else None
    position, count = open_ended[0], rank - len(axes) + 1
    if count < 0:
        return None
    name = axes[position][:-3] or "axis"
    several = (name,) if count == 1 else tuple(f"{name}_{i}" for i in range(count))
    return (*axes[:position], *several, *axes[position + 1 :])


def bind(pairs: Iterable[tuple[Axes, Shape]]) -> Mapping[str, int] | None:
    """The size of every atom by its name, as far as the shapes tell; None where they contradict."""
    pairs = tuple(pairs)
    listed = (atom for axes, _ in pairs for axis in axes if "(" in axis for atom in atoms(axis))
    sizes = {_sized(atom): len(entries(atom)[1]) for atom in listed if entries(atom)[1]}
    merged: list[tuple[tuple[str, ...], int]] = []
    for axes, shape in pairs:
        full = expand(axes, len(shape))
        if full is None:
            return None
        for axis, size in zip(full, shape, strict=True):
            if any(sizes.setdefault(atom, told) != told for atom, told in sizes_in(axis).items()):
                return None
            parts = tuple(map(_sized, atoms(axis)))
            if len(parts) == 1:
                if sizes.setdefault(parts[0], size) != size:
                    return None
            else:
                merged.append((parts, size))
    for _ in range(len(merged) + 1):
        for parts, size in merged:
            unknown = [part for part in parts if part not in sizes]
            known = math.prod(sizes[part] for part in parts if part in sizes)
            if not unknown and known != size:
                return None
            if len(unknown) == 1 and known:
                if size % known:
                    return None
                sizes[unknown[0]] = size // known
    return sizes


@lru_cache(maxsize=4096)  # a model repeats its layers
def layout_ops(
    source_axes: Axes, source_shape: Shape, target_axes: Axes, target_shape: Shape
) -> tuple[Op, ...] | None:
    """The ops from one layout to the other, at most split, permute, merge; None where the shapes do not fit.

    Sizes are taken from both shapes. An axis that only one side has must have size 1.
    """
    source_full, target_full = expand(source_axes, len(source_shape)), expand(target_axes, len(target_shape))
    if source_full is None or target_full is None:
        return None
    # An axis that is merged on both sides need not be split, and its atoms' sizes need not be known.
    whole = {axis: axis.replace("*", "&").replace("=", ":") for axis in set(source_full) & set(target_full)}
    source_full = tuple(whole.get(axis, axis) for axis in source_full)
    target_full = tuple(whole.get(axis, axis) for axis in target_full)
    sizes = bind([(source_full, source_shape), (target_full, target_shape)])
    if sizes is None:
        return None
    before, had = _named(source_full)
    after, wants = _named(target_full)
    if any(sorted(had.get(a, ())) != sorted(wants.get(a, ())) for a in set(before) & set(after)):
        return None
    sizes = {atom: sizes[_sized(atom)] for atom in (*before, *after) if _sized(atom) in sizes}
    if len(set(before)) != len(before) or len(set(after)) != len(after):
        return None
    if any(atom not in sizes for atom in (*before, *after)):
        return None
    if any(sizes[atom] != 1 for atom in set(before) ^ set(after)):
        return None
    shared = set(before) & set(after)
    for atom in shared & (_turned(source_full) ^ _turned(target_full)):
        had[atom] = tuple(map(str, range(sizes[atom])))
        wants[atom] = had[atom][::-1]
    kept, wanted = [a for a in before if a in shared], [a for a in after if a in shared]
    ops: list[Op] = []
    shape = source_shape
    split = tuple(sizes[atom] for atom in kept)
    order = tuple(kept.index(atom) for atom in wanted)
    # Axes of size 1 move without moving an element: layouts that differ only in them are one.
    moved = [place for place in order if split[place] != 1]
    reordered = [atom for atom in kept if had.get(atom) != wants.get(atom)]
    if moved != sorted(moved) or reordered:
        if shape != split or len(source_full) != len(kept):
            ops.append(Reshape(shape, split))
        for atom in reordered:
            ops.append(Reorder(kept.index(atom), tuple(had[atom].index(entry) for entry in wants[atom])))
        if moved != sorted(moved):
            ops.append(Permute(order))
            split = tuple(split[i] for i in order)
        shape = split
    if shape != target_shape:
        ops.append(Reshape(shape, target_shape))
    return tuple(ops) if math.prod(source_shape) == math.prod(target_shape) else None


def _named(axes: Axes) -> tuple[list[str], dict[str, tuple[str, ...]]]:
    """Names of the atoms in their order, and the entries of those that list them."""
    found = [entries(atom.removeprefix("-")) for axis in axes for atom in atoms(axis)]
    return [name for name, _ in found], {name: listed for name, listed in found if listed}


def _turned(axes: Axes) -> set[str]:
    """Names of the atoms that are counted from their end."""
    return {atom[1:] for axis in axes for atom in atoms(axis) if atom.startswith("-")}


def element_order(ops: Iterable[Op], shape: Shape) -> tuple[object, ...]:
    """In which order ops leave a tensor's elements: equal for ops that do the same to this shape.

    A sequence of (size, stride in elements of the source), outermost first; for other ops than permuting and
    reshaping, and reshapings that cut across axes, the ops themselves.
    """
    ops = tuple(ops)
    # Every axis as its factors, those of size 1 left out.
    now = [[(size, math.prod(shape[i + 1 :]))] if size != 1 else [] for i, size in enumerate(shape)]
    for op in ops:
        if isinstance(op, Permute) and len(op.order) == len(now):
            now = [now[axis] for axis in op.order]
            continue
        parts = (
            _cut([factor for axis in now for factor in axis], op.after) if isinstance(op, Reshape) else None
        )
        if parts is None:
            return ops
        now = parts
    result: list[tuple[int, int]] = []
    for size, stride in (factor for axis in now for factor in axis):
        if result and result[-1][1] == size * stride:
            size *= result.pop()[0]
        result.append((size, stride))
    return tuple(result)


def _cut(factors: list[tuple[int, int]], shape: Shape) -> list[list[tuple[int, int]]] | None:
    """The factors dealt out to axes of these sizes, cut where needed; None where they do not divide."""
    rest = factors[::-1]
    axes = []
    for size in shape:
        axis: list[tuple[int, int]] = []
        while size != 1:
            if not rest or not size:
                return None
            have, stride = rest.pop()
            if not have or (size % have and have % size):
                return None
            if have > size:
                rest.append((have // size, stride))
                have, stride = size, stride * (have // size)
            axis.append((have, stride))
            size //= have
        axes.append(axis)
    return axes
