"""Ops that make a weight of what its reparametrization keeps: torch's weight norm and spectral norm.

Source: torch 2.13.0 `torch/nn/utils/parametrizations.py`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ckptconv.ops.arithmetic import within
from ckptconv.ops.checks import misfit
from ckptconv.tensor import Array, Index, PlainOp, StoredTensor, TensorRef, TensorSpec

_PANEL_NBYTES = 8 << 20
_Wide = npt.NDArray[np.float64]


def _panels(tensor: TensorRef, start: Index, stop: Index) -> Iterator[tuple[Index, Index]]:
    """The box in boxes of a bounded size, cut along its longest axis."""
    sizes = [high - low for low, high in zip(start, stop, strict=True)]
    if not sizes or 0 in sizes:
        return
    axis = sizes.index(max(sizes))
    each = math.prod(sizes) // sizes[axis] * tensor.dtype.itemsize
    step = max(_PANEL_NBYTES // max(each, 1), 1)
    for low in range(start[axis], stop[axis], step):
        high = min(low + step, stop[axis])
        yield (*start[:axis], low, *start[axis + 1 :]), (*stop[:axis], high, *stop[axis + 1 :])


class _Normalized(PlainOp):
    __slots__ = ()

    def view(self, tensor: StoredTensor) -> StoredTensor | None:
        return None

    def _scaled(self, weight: TensorRef, start: Index, stop: Index, factor: _Wide | float) -> Array:
        part = weight.block(start, stop)
        with np.errstate(all="ignore"):
            return within(self, part, (part.astype(np.float64) * factor).astype(part.dtype))


@dataclass(frozen=True, slots=True)
class WeightNorm(_Normalized):
    """`g * v / |v|` of g and v, the norm over the axes along which g has one element; rounded once.

    g has more than one along one axis at most.
    """

    def spec(self, inputs: tuple[TensorSpec, ...]) -> TensorSpec:
        g, v = inputs
        fits = not g.shape or (
            len(g.shape) == len(v.shape)
            and all(one in (1, size) for one, size in zip(g.shape, v.shape, strict=True))
            and sum(size != 1 for size in g.shape) <= 1
        )
        if not fits or g.dtype != v.dtype or v.dtype.kind != "float":
            raise misfit(self, g)
        return v

    def block(self, inputs: tuple[TensorRef, ...], start: Index, stop: Index) -> Array:
        """I/O: reads every row that the block has a part of. Raises: precision-loss."""
        g, v = inputs
        kept = [size != 1 for size in g.shape] or [False] * len(v.shape)
        low = tuple(at if keep else 0 for at, keep in zip(start, kept, strict=True))
        high = tuple(at if keep else size for at, keep, size in zip(stop, kept, v.shape, strict=True))
        others = tuple(axis for axis, keep in enumerate(kept) if not keep)
        squares = np.zeros([b - a if keep else 1 for a, b, keep in zip(low, high, kept, strict=True)])
        for first, last in _panels(v, low, high):
            part = np.square(v.block(first, last).astype(np.float64)).sum(axis=others, keepdims=True)
            at = tuple(
                slice(a - b, c - b) if keep else slice(None)
                for a, b, c, keep in zip(first, low, last, kept, strict=True)
            )
            squares[at] += part
        ends = tuple(at if keep else 1 for at, keep in zip(high, kept, strict=True))
        scale = g.block(low[: len(g.shape)], ends[: len(g.shape)])
        with np.errstate(all="ignore"):
            factor = scale.astype(np.float64) / np.sqrt(squares)
        return self._scaled(v, start, stop, factor)

    def to_json(self) -> dict[str, object]:
        return {"op": "weight-norm"}


@dataclass(frozen=True, slots=True)
class SpectralNorm(_Normalized):
    """A weight over its largest singular value, as two singular vectors tell it: `w / (u @ w @ v)`.

    `w` is taken as a matrix, `axis` its rows and all others its columns.
    """

    axis: int

    def spec(self, inputs: tuple[TensorSpec, ...]) -> TensorSpec:
        w, u, v = inputs
        rows = w.shape[self.axis] if self.axis < len(w.shape) else 0
        if (*u.shape, *v.shape) != (rows, math.prod(w.shape) // max(rows, 1)) or w.dtype.kind != "float":
            raise misfit(self, w)
        return w

    def block(self, inputs: tuple[TensorRef, ...], start: Index, stop: Index) -> Array:
        """I/O: reads the whole weight. Raises: precision-loss."""
        w, u, v = inputs
        rows = [size if axis == self.axis else 1 for axis, size in enumerate(w.shape)]
        columns = [1 if axis == self.axis else size for axis, size in enumerate(w.shape)]
        left = u.read().astype(np.float64).reshape(rows)
        right = v.read().astype(np.float64).reshape(columns)
        value = 0.0
        for first, last in _panels(w, (0,) * len(w.shape), w.shape):
            box = tuple(slice(a, b) for a, b in zip(first, last, strict=True))
            row = tuple(at if axis == self.axis else slice(None) for axis, at in enumerate(box))
            column = tuple(slice(None) if axis == self.axis else at for axis, at in enumerate(box))
            part = w.block(first, last).astype(np.float64)
            value += float((part * left[row] * right[column]).sum())
        return self._scaled(w, start, stop, 1 / value if value else math.inf)

    def to_json(self) -> dict[str, object]:
        return {"op": "spectral-norm", "axis": self.axis}
