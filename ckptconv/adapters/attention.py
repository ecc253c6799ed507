"""Which projections of an attention are its query, its key and its value, whatever their names.

The product of two tensors that depend on the input has the axes of both. Where one of its axes is normalized,
the tensor that the axis comes from is the key and the other is the query; what the result is multiplied with
is the value. A fused projection makes all three: where its output is split in equal parts, it is told which
part is which.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from typing import NamedTuple

Shape = tuple[int, ...]
Names = frozenset[str]
QUERY, KEY, VALUE = "query", "key", "value"


class Factor(NamedTuple):
    """A tensor that is multiplied, and the parameters that made it."""

    key: Hashable
    givers: Names


class _Axis(NamedTuple):
    """Where an axis of a product comes from."""

    factor: int
    factors: tuple[Factor, Factor]


class Attention:
    """What is known of tensors, by whatever identifies them."""

    def __init__(self) -> None:
        self._axes: dict[Hashable, tuple[_Axis | None, ...]] = {}
        """Product -> where each axis comes from; None for an axis of both factors."""
        self._weights: set[Hashable] = set()
        """Normalized products."""
        self._shares: dict[Hashable, tuple[int, int]] = {}
        """Tensor -> which of how many equal parts of the last axis of what its parameters made."""
        self._made: dict[str, dict[str, set[tuple[int, int] | None]]] = {}
        """Parameter -> what it makes, of which share of its output; None for all of it."""

    def part(self, name: str) -> str:
        """What a parameter makes: one of the three, or several in the order of its output's parts."""
        made = self._made.get(name, {})
        if len(made) == 1:
            return next(iter(made))
        told = {share: part for part, shares in made.items() for share in shares}
        parts = [told.get((i, len(made)), "") for i in range(len(made))]
        return ",".join(parts) if all(parts) and len(told) == len(made) else ""

    def multiplied(
        self, factors: tuple[Factor, Factor], made: Hashable, origins: Sequence[int | None]
    ) -> None:
        """Two tensors make a third. `origins`: of each of its axes the factor, 0 or 1, None for both."""
        for one, other in (factors, factors[::-1]):
            if one.key in self._weights:
                self._name(other, VALUE)
                return
        self._axes[made] = tuple(None if i is None else _Axis(i, factors) for i in origins)

    def attended(self, query: Factor, key: Factor, value: Factor) -> None:
        """One operation does it all."""
        for factor, part in ((query, QUERY), (key, KEY), (value, VALUE)):
            self._name(factor, part)

    def split(self, tensor: Hashable, made: Sequence[Hashable]) -> None:
        """The last axis of a tensor is cut into equal parts."""
        if tensor not in self._shares:
            self._shares.update((one, (i, len(made))) for i, one in enumerate(made))

    def normalized(self, tensor: Hashable, made: Hashable, axis: int) -> None:
        """A softmax along one axis."""
        axes = self._axes.get(tensor)
        along = axes[axis] if axes is not None else None
        if along is not None:
            self._weights.add(made)
            self._name(along.factors[along.factor], KEY)
            self._name(along.factors[1 - along.factor], QUERY)

    def _name(self, factor: Factor, part: str) -> None:
        for name in factor.givers:
            self._made.setdefault(name, {}).setdefault(part, set()).add(self._shares.get(factor.key))

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
        if tensor in self._shares:
            self._shares.setdefault(made, self._shares[tensor])
