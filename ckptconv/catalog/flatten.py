"""Layers behind a flattened image: in which order they take its channels and positions.

A merged axis says it: `in*h=2*w=3` is an image with its channels first, `h=2*w=3*in` with its channels last.
Where one side says so and the other has the plain axis of that name, the order of its framework's images is
meant.
"""

from __future__ import annotations

import math

from ckptconv.catalog.axes import Axes, Shape, atoms, sizes_in

CHANNELS_FIRST = frozenset({"torch"})
"""Frameworks whose images have the channels before their positions; the others' have them behind."""
_TAKEN = ("in", "features")
"""Axes of a layer's parameters that its input has, too."""


def flattened(axes: Axes, shape: Shape, merged: str) -> Axes:
    """A layer's axes where its input is a flattened image; `merged` has `c` for the channels: `c*h=2*w=3`."""
    space = sizes_in(merged)
    positions = math.prod(space.values())
    return tuple(
        "*".join(axis if atom == "c" else f"{atom}={space[atom]}" for atom in atoms(merged))
        if axis in _TAKEN and size % positions == 0 and positions > 1
        else axis
        for axis, size in zip(axes, shape, strict=True)
    )


def tells_image(axes: Axes) -> bool:
    """Whether an axis says that it is a flattened image."""
    return any(map(sizes_in, axes))


def alike(axes: Axes, framework: str, others: Axes) -> Axes:
    """The axes, one that the other side says to be a flattened image in this framework's order."""
    return tuple(_alike(axis, framework, others) for axis in axes)


def _alike(axis: str, framework: str, others: Axes) -> str:
    for other in others:
        space = sizes_in(other)
        if space and axis in atoms(other) and axis not in space:
            inner = [f"{atom}={size}" for atom, size in space.items()]
            return "*".join([axis, *inner] if framework in CHANNELS_FIRST else [*inner, axis])
    return axis
