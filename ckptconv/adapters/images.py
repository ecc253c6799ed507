"""The axes of images on their way through a run of a model, and who takes them flattened.

A convolution gives out images whose axes are known. They stay as they are through operations that keep the
number of axes, and go along with transpositions. Where a reshaping makes all but the batch one axis, the axes
that are merged in it, and their sizes, say in which order a layer behind it takes its input: `c*h=2*w=3`.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Sequence

Shape = tuple[int, ...]
BATCH, CHANNELS = "n", "c"
_SPACE = {3: ("w",), 4: ("h", "w"), 5: ("d", "h", "w")}
"""Number of axes -> those of space."""


class Images:
    """What is known of tensors, by whatever identifies them."""

    def __init__(self) -> None:
        self._axes: dict[Hashable, tuple[str, ...]] = {}
        self.flat: dict[str, str] = {}
        """Parameter -> the axes that are merged in what it is applied to."""

    def convolved(self, tensor: Hashable, rank: int, *, channels_last: bool) -> None:
        """A convolution has made the tensor."""
        if rank in _SPACE:
            inner = (*_SPACE[rank], CHANNELS) if channels_last else (CHANNELS, *_SPACE[rank])
            self._axes[tensor] = (BATCH, *inner)

    def permuted(self, tensor: Hashable, made: Hashable, order: Sequence[int]) -> None:
        """Axis `i` of what is made is axis `order[i]` of the tensor."""
        axes = self._axes.get(tensor)
        if axes is not None and len(axes) == len(order):
            self._axes[made] = tuple(axes[axis] for axis in order)

    def squeezed(self, tensor: Hashable, made: Hashable, dropped: Iterable[int]) -> None:
        """Some axes are left out."""
        axes = self._axes.get(tensor)
        if axes is not None:
            gone = {axis % len(axes) for axis in dropped}
            self._axes[made] = tuple(axis for i, axis in enumerate(axes) if i not in gone)

    def reshaped(self, tensor: Hashable, made: Hashable, before: Shape, after: Shape) -> None:
        """The same elements in another shape."""
        axes = self._axes.get(tensor)
        if axes is None or len(axes) != len(before):
            return
        if before == after:
            self._axes[made] = axes
        elif len(after) == 2 and axes[0] == BATCH and after == (before[0], math.prod(before[1:])):
            inner = zip(axes[1:], before[1:], strict=True)
            self._axes[made] = (BATCH, "*".join(a if a == CHANNELS else f"{a}={n}" for a, n in inner))

    def passed(self, tensors: Iterable[tuple[Hashable, Shape]], made: Hashable, shape: Shape) -> None:
        """Any other operation: axes are kept where their number is; merged ones where their size is, too."""
        for tensor, before in tensors:
            axes = self._axes.get(tensor)
            if axes is not None and len(axes) == len(shape) and (len(shape) > 2 or before == shape):
                self._axes[made] = axes
                return

    def taken(self, tensors: Iterable[Hashable], params: Iterable[str]) -> None:
        """Parameters are applied to the tensors."""
        merged = [axes[-1] for tensor in tensors if (axes := self._axes.get(tensor)) and len(axes) == 2]
        for param in params:
            for axis in merged[:1]:
                self.flat.setdefault(param, axis)
