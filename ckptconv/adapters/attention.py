"""Which projections of an attention are its query, its key and its value, whatever their names.

The product of two tensors that depend on the input has the axes of both. Where one of its axes is normalized,
the tensor that the axis comes from is the key and the other is the query; what the result is multiplied with
is the value. Parameters of a fused projection are all three, and get no name here.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from typing import NamedTuple

Shape = tuple[int, ...]
Names = frozenset[str]
QUERY, KEY, VALUE = "query", "key", "value"


class _Axis(NamedTuple):
    """Where an axis of a product comes from."""

    factor: int
    givers: tuple[Names, Names]
    """The parameters that made each factor."""


class Attention:
    """What is known of tensors, by whatever identifies them."""

    def __init__(self) -> None:
        self._axes: dict[Hashable, tuple[_Axis | None, ...]] = {}
        """Product -> where each axis comes from; None for an axis of both factors."""
        self._weights: set[Hashable] = set()
        """Normalized products."""
        self.parts: dict[str, str] = {}
        """Parameter -> what it makes; empty for one that makes several."""

    def multiplied(
        self,
        factors: tuple[Hashable, Hashable],
        givers: tuple[Names, Names],
        made: Hashable,
        origins: Sequence[int | None],
    ) -> None:
        """Two tensors make a third. `givers`: the parameters that made each; `origins`: of each axis of the
        product its factor, 0 or 1, None for an axis of both."""
        for one, other in ((0, 1), (1, 0)):
            if factors[one] in self._weights:
                self._name(givers[other], VALUE)
                return
        self._axes[made] = tuple(None if i is None else _Axis(i, givers) for i in origins)

    def attended(self, query: Names, key: Names, value: Names) -> None:
        """One operation does it all."""
        for names, part in ((query, QUERY), (key, KEY), (value, VALUE)):
            self._name(names, part)

    def normalized(self, tensor: Hashable, made: Hashable, axis: int) -> None:
        """A softmax along one axis."""
        axes = self._axes.get(tensor)
        along = axes[axis] if axes is not None else None
        if along is not None:
            self._weights.add(made)
            self._name(along.givers[along.factor], KEY)
            self._name(along.givers[1 - along.factor], QUERY)

    def _name(self, names: Names, part: str) -> None:
        for name in names:
            self.parts[name] = part if self.parts.setdefault(name, part) == part else ""

    def permuted(self, tensor: Hashable, made: Hashable, order: Sequence[int]) -> None:
        """Axis `i` of what is made is axis `order[i]` of the tensor."""
        self._same(tensor, made)
        axes = self._axes.get(tensor)
        if axes is not None and len(axes) == len(order):
            self._axes[made] = tuple(axes[axis] for axis in order)

    def squeezed(self, tensor: Hashable, made: Hashable, dropped: Iterable[int]) -> None:
        """Some axes are left out."""
        self._same(tensor, made)
        axes = self._axes.get(tensor)
        if axes is not None:
            gone = {axis % len(axes) for axis in dropped}
            self._axes[made] = tuple(axis for i, axis in enumerate(axes) if i not in gone)

    def reshaped(self, tensor: Hashable, made: Hashable, before: Shape, after: Shape) -> None:
        """The same elements in another shape: the last axes are kept as far as their sizes are."""
        self._same(tensor, made)
        axes = self._axes.get(tensor)
        if axes is None or len(axes) != len(before):
            return
        kept: list[_Axis | None] = [None] * len(after)
        old = [i for i, size in enumerate(before) if size > 1]
        new = [i for i, size in enumerate(after) if size > 1]
        while old and new and before[old[-1]] == after[new[-1]]:
            kept[new.pop()] = axes[old.pop()]
        self._axes[made] = tuple(kept)

    def passed(self, tensors: Iterable[tuple[Hashable, Shape]], made: Hashable, shape: Shape) -> None:
        """Any other operation: axes are kept where their number is."""
        for tensor, before in tensors:
            if len(before) == len(shape):
                self._same(tensor, made)
                if tensor in self._axes and made not in self._axes:
                    self._axes[made] = self._axes[tensor]

    def _same(self, tensor: Hashable, made: Hashable) -> None:
        if tensor in self._weights:
            self._weights.add(made)
