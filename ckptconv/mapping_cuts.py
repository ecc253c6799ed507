"""How a rule of a mapping file cuts one parameter into several: along an axis of its file, or part of one."""

from __future__ import annotations

import math
from collections.abc import Mapping

from ckptconv.catalog.axes import Axes, Shape, atoms, bind, entries
from ckptconv.pieces import Cut, Piece

Shapes = Mapping[str, Shape]
"""The several, in their order."""


def cut_at(whole: str, shape: Shape, axis: int, several: Shapes) -> Cut | str:
    """The cut along an axis of the file, or why there is none; each has as many entries as its size says."""
    if axis >= len(shape):
        return f"'{whole}' {list(shape)} has no axis {axis} to be cut along"
    slab = math.prod(shape[:axis]) * math.prod(shape[axis + 1 :])
    numels = list(map(math.prod, several.values()))
    if not slab or any(n % slab for n in numels) or sum(numels) != slab * shape[axis]:
        return f"'{whole}' {list(shape)}, cut along axis {axis}, does not make {_listed(several)}"
    pieces = tuple(Piece(name=f"{whole}[{n}]", size=numel // slab) for n, numel in enumerate(numels))
    return Cut(whole=whole, axis=axis, pieces=pieces)


def cut_within(whole: str, shape: Shape, name: str, axes: tuple[Axes, Axes], several: Shapes) -> Cut | str:
    """The cut along an axis that is part of another one, or why there is none; one entry is each one's.

    `axes`: of the one, and of each of the several.
    """
    sized = tuple(_sized(axis, name, len(several)) for axis in axes[0])
    sizes = bind([(sized, shape), *((axes[1], other) for other in several.values())]) or {}
    within: list[int] = []
    position = 0
    for axis, size in zip(sized, shape, strict=False):
        inner = [entries(atom)[0] for atom in atoms(axis)]
        if name in inner:
            position = len(within) + inner.index(name)
            within += [sizes.get(atom.rstrip("'"), 0) for atom in inner]
        else:
            within.append(size)
    if not sizes or len(sized) != len(shape) or math.prod(within) != math.prod(shape):
        return f"'{whole}' {list(shape)}, cut along '{name}', does not make {_listed(several)}"
    pieces = tuple(Piece(name=f"{whole}[{n}]", size=1) for n in range(len(several)))
    return Cut(whole=whole, axis=position, pieces=pieces, within=tuple(within))


def piece_axes(axes: Axes, name: str) -> Axes:
    """The axes of the one as a piece has them that is cut along that part of an axis."""
    pieces: list[str] = []
    for axis in axes:
        inner = [entries(atom)[0] for atom in atoms(axis)]
        split = ["1" if a == name else part for a, part in zip(inner, axis.split("*"), strict=False)]
        pieces += split if name in inner else [axis]
    return tuple(pieces)


def _sized(axis: str, name: str, size: int) -> str:
    """The axis with the size of its part of that name."""
    return "*".join(f"{name}={size}" if entries(atom)[0] == name else atom for atom in axis.split("*"))


def _listed(several: Shapes) -> str:
    return ", ".join(f"'{name}' {list(shape)}" for name, shape in several.items())
