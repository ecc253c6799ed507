"""Ops that move elements and change none: their inverse gives every bit back."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import chain

import numpy as np

from ckptconv.ops.checks import fixed, misfit
from ckptconv.strided import box_shape, dense, flat_boxes
from ckptconv.tensor import (
    Array,
    Bytes,
    DerivedTensor,
    Index,
    Op,
    PlainOp,
    StoredTensor,
    TensorRef,
    TensorSpec,
    dense_strides,
)

_BATCH_NBYTES = 4 << 20


@dataclass(frozen=True, slots=True)
class Permute(PlainOp):
    """Reorder axes: axis `i` of the result is axis `order[i]` of the input."""

    order: tuple[int, ...]

    def inverse(self) -> Permute:
        return Permute(tuple(int(i) for i in np.argsort(self.order)))

    def spec(self, inputs: tuple[TensorSpec, ...]) -> TensorSpec:
        (spec,) = inputs
        if sorted(self.order) != list(range(len(spec.shape))):
            raise misfit(self, spec)
        fixed(self, spec)
        return TensorSpec(dtype=spec.dtype, shape=tuple(spec.shape[i] for i in self.order))

    def view(self, tensor: StoredTensor) -> StoredTensor:
        return StoredTensor(
            spec=self.spec((tensor.spec,)),
            extent=tensor.extent,
            offset=tensor.offset,
            strides=tuple(tensor.strides[i] for i in self.order),
        )

    def inward(self, tensor: DerivedTensor) -> TensorRef | None:
        if isinstance(tensor.op, Concat):
            op = Concat(self.order.index(tensor.op.axis))
            first, *others = (part.apply(self) for part in tensor.parts)
            return first.apply(op, *others)
        return _below_elementwise(self, tensor)

    def block(self, inputs: tuple[TensorRef, ...], start: Index, stop: Index) -> Array:
        back = self.inverse().order
        part = inputs[0].block(tuple(start[i] for i in back), tuple(stop[i] for i in back))
        return dense(part.transpose(self.order))

    def to_json(self) -> dict[str, object]:
        return {"op": "permute", "order": list(self.order)}


@dataclass(frozen=True, slots=True)
class Reshape(PlainOp):
    """The same elements in C order under another shape; `before` is the input's shape."""

    before: tuple[int, ...]
    after: tuple[int, ...]

    def inverse(self) -> Reshape:
        return Reshape(self.after, self.before)

    def spec(self, inputs: tuple[TensorSpec, ...]) -> TensorSpec:
        (spec,) = inputs
        if spec.shape != self.before or math.prod(self.before) != math.prod(self.after):
            raise misfit(self, spec)
        return replace(spec, shape=self.after)

    def view(self, tensor: StoredTensor) -> StoredTensor | None:
        spec = self.spec((tensor.spec,))
        if tensor.is_dense:
            return StoredTensor.dense(spec, tensor.extent, tensor.offset)
        strides = _reshaped_strides(tensor.shape, tensor.strides, self.after)
        if strides is None:
            return None
        return StoredTensor(spec=spec, extent=tensor.extent, offset=tensor.offset, strides=strides)

    def inward(self, tensor: DerivedTensor) -> TensorRef | None:
        return _below_elementwise(self, tensor)

    def block(self, inputs: tuple[TensorRef, ...], start: Index, stop: Index) -> Array:
        """Takes the runs of the flattened tensor that make up the box, several with the gaps between them."""
        shape, item = box_shape(start, stop), inputs[0].dtype.itemsize
        out = np.empty(shape, inputs[0].dtype.numpy)
        if not out.size:
            return out
        strides = dense_strides(self.after)
        # The box is `len(lows)` runs of `run` elements: all axes after the first that is taken whole.
        axis = len(shape)
        while axis > 0 and shape[axis - 1] == self.after[axis - 1]:
            axis -= 1
        axis = max(axis - 1, 0)
        run = math.prod(shape[axis:])
        tail = sum(i * s for i, s in zip(start[axis:], strides[axis:], strict=True))
        lead = [range(lo, hi) for lo, hi in zip(start[:axis], stop[:axis], strict=True)]
        rows = out.reshape(-1, run)
        limit = max(_BATCH_NBYTES // item, run)
        lows = np.zeros(1, np.int64)
        for indices, step in zip(lead, strides, strict=False):
            lows = (lows[:, None] + np.asarray(indices, np.int64) * step).reshape(-1)
        lows += tail
        done = 0
        while done < len(lows):
            low = int(lows[done])
            end = int(np.searchsorted(lows, low + limit - run, side="right"))
            flat = _flat(inputs[0], low, int(lows[end - 1]) + run)
            for row in range(done, end):
                at = int(lows[row]) - low
                rows[row] = flat[at : at + run]
            done = end
        return out

    def windows(
        self, inputs: tuple[TensorRef, ...], nbytes: int, panel_nbytes: int
    ) -> Iterator[Bytes] | None:
        return inputs[0].windows(nbytes, panel_nbytes)

    def to_json(self) -> dict[str, object]:
        return {"op": "reshape", "before": list(self.before), "after": list(self.after)}


def _reshaped_strides(
    shape: tuple[int, ...], strides: tuple[int, ...], after: tuple[int, ...]
) -> tuple[int, ...] | None:
    """Strides of the reshaped view, or None where only a copy can do it."""
    if math.prod(shape) == 0:
        return dense_strides(after)
    old = [(n, s) for n, s in zip(shape, strides, strict=True) if n != 1]
    result: list[int] = []
    i = 0
    pending: list[tuple[int, int]] = []  # the axes of the current group, outermost first
    group = 1
    for size in after:
        if size == 1:
            result.append(1)
            continue
        while group % size or group < size:
            if i == len(old):
                return None
            if pending and pending[-1][1] != old[i][0] * old[i][1]:
                if group == 1:
                    pending = []
                else:
                    return None
            pending.append(old[i])
            group *= old[i][0]
            i += 1
        group //= size
        result.append(group * pending[-1][1])
        if group == 1:
            pending = []
    return tuple(result)


@dataclass(frozen=True, slots=True)
class Slice(PlainOp):
    """Elements `start` to `stop` (exclusive) of one axis: one part of a split."""

    axis: int
    start: int
    stop: int

    def spec(self, inputs: tuple[TensorSpec, ...]) -> TensorSpec:
        (spec,) = inputs
        fixed(self, spec)
        if self.axis >= len(spec.shape) or not 0 <= self.start <= self.stop <= spec.shape[self.axis]:
            raise misfit(self, spec)
        shape = list(spec.shape)
        shape[self.axis] = self.stop - self.start
        return TensorSpec(dtype=spec.dtype, shape=tuple(shape))

    def view(self, tensor: StoredTensor) -> StoredTensor:
        return StoredTensor(
            spec=self.spec((tensor.spec,)),
            extent=tensor.extent,
            offset=tensor.offset + self.start * tensor.strides[self.axis],
            strides=tensor.strides,
        )

    def inward(self, tensor: DerivedTensor) -> TensorRef | None:
        return _below_elementwise(self, tensor)

    def block(self, inputs: tuple[TensorRef, ...], start: Index, stop: Index) -> Array:
        def shifted(index: Index) -> Index:
            return tuple(i + self.start if a == self.axis else i for a, i in enumerate(index))

        return inputs[0].block(shifted(start), shifted(stop))

    def to_json(self) -> dict[str, object]:
        return {"op": "slice", "axis": self.axis, "start": self.start, "stop": self.stop}


@dataclass(frozen=True, slots=True)
class Reorder(PlainOp):
    """Reorder the entries of one axis: entry `i` of the result is entry `order[i]` of the input."""

    axis: int
    order: tuple[int, ...]

    def inverse(self) -> Reorder:
        return Reorder(self.axis, tuple(int(i) for i in np.argsort(self.order)))

    def spec(self, inputs: tuple[TensorSpec, ...]) -> TensorSpec:
        (spec,) = inputs
        fixed(self, spec)
        if self.axis >= len(spec.shape) or sorted(self.order) != list(range(spec.shape[self.axis])):
            raise misfit(self, spec)
        return spec

    def view(self, tensor: StoredTensor) -> StoredTensor | None:
        self.spec((tensor.spec,))
        return tensor if list(self.order) == sorted(self.order) else None

    def inward(self, tensor: DerivedTensor) -> TensorRef | None:
        return _below_elementwise(self, tensor)

    def block(self, inputs: tuple[TensorRef, ...], start: Index, stop: Index) -> Array:
        """Reads the runs of entries that stand together on both sides."""
        out = np.empty(box_shape(start, stop), inputs[0].dtype.numpy)
        if not out.size:
            return out
        wanted = self.order[start[self.axis] : stop[self.axis]]
        low = 0
        while low < len(wanted):
            high = low + 1
            while high < len(wanted) and wanted[high] == wanted[low] + high - low:
                high += 1
            begin, end, into = list(start), list(stop), [slice(None)] * out.ndim
            begin[self.axis], end[self.axis] = wanted[low], wanted[low] + high - low
            into[self.axis] = slice(low, high)
            out[tuple(into)] = inputs[0].block(tuple(begin), tuple(end))
            low = high
        return out

    def to_json(self) -> dict[str, object]:
        return {"op": "reorder", "axis": self.axis, "order": list(self.order)}


@dataclass(frozen=True, slots=True)
class Concat(PlainOp):
    """Join tensors along one axis; `Slice` of each part's range is the inverse."""

    axis: int

    def spec(self, inputs: tuple[TensorSpec, ...]) -> TensorSpec:
        first = inputs[0]
        if self.axis >= len(fixed(self, first).shape):
            raise misfit(self, first)
        for other in inputs[1:]:
            same = [n for a, n in enumerate(other.shape) if a != self.axis]
            if other.dtype != first.dtype or same != [n for a, n in enumerate(first.shape) if a != self.axis]:
                raise misfit(self, other)
        shape = list(first.shape)
        shape[self.axis] = sum(spec.shape[self.axis] for spec in inputs)
        return TensorSpec(dtype=first.dtype, shape=tuple(shape))

    def view(self, tensor: StoredTensor) -> StoredTensor:
        return tensor

    def block(self, inputs: tuple[TensorRef, ...], start: Index, stop: Index) -> Array:
        pieces, base = [], 0
        for tensor in inputs:
            size = tensor.shape[self.axis]
            low, high = max(start[self.axis] - base, 0), min(stop[self.axis] - base, size)
            if low < high:
                begin = tuple(low if a == self.axis else i for a, i in enumerate(start))
                end = tuple(high if a == self.axis else i for a, i in enumerate(stop))
                pieces.append(tensor.block(begin, end))
            base += size
        if not pieces:
            shape = tuple(hi - lo for lo, hi in zip(start, stop, strict=True))
            return np.empty(shape, inputs[0].dtype.numpy)
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces, axis=self.axis)

    def windows(
        self, inputs: tuple[TensorRef, ...], nbytes: int, panel_nbytes: int
    ) -> Iterator[Bytes] | None:
        if math.prod(inputs[0].shape[: self.axis]) != 1:
            return None
        return chain.from_iterable(tensor.windows(nbytes, panel_nbytes) for tensor in inputs)

    def to_json(self) -> dict[str, object]:
        return {"op": "concat", "axis": self.axis}


def _below_elementwise(op: Op, tensor: DerivedTensor) -> TensorRef | None:
    """Move `op` below an op that treats every element alike: there it can become a view of stored bytes."""
    if not tensor.op.elementwise:
        return None
    (part,) = tensor.parts
    return part.apply(op).apply(tensor.op)


def _flat(tensor: TensorRef, low: int, high: int) -> Array:
    """Elements `low` to `high` of the tensor in C order."""
    parts = [tensor.block(start, stop).reshape(-1) for start, stop in flat_boxes(tensor.shape, low, high)]
    return parts[0] if len(parts) == 1 else np.concatenate(parts)
