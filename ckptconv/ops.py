"""What may happen to a tensor on its way: values that say what they do, their inverse, or what they lose."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import chain

import numpy as np

from ckptconv import dtypes
from ckptconv.errors import LossError, MappingError, Problem
from ckptconv.strided import box_shape, dense, flat_boxes
from ckptconv.tensor import (
    Array,
    Bytes,
    DerivedTensor,
    Index,
    PlainOp,
    StoredTensor,
    TensorRef,
    TensorSpec,
    as_bytes,
    dense_strides,
)

_BATCH_NBYTES = 4 << 20


def _misfit(op: object, spec: TensorSpec, hint: str = "Check the mapping or the template.") -> MappingError:
    what = f"{spec.dtype.name} of shape {list(spec.shape)}"
    return MappingError(
        Problem(code="shape-mismatch", loc=(), message=f"{op} does not fit {what}", hint=hint)
    )


def _fixed(op: object, spec: TensorSpec) -> TensorSpec:
    """The spec, if its elements are of one length, so that they can be taken apart."""
    if spec.encoded_nbytes is not None:
        raise _misfit(op, spec, "Strings and variants can only be copied whole.")
    return spec


def _within(op: Scale | Shift | Cast, before: Array, after: Array) -> Array:
    """`after`, if no finite value of `before` has left the range of its dtype."""
    lost = int(np.count_nonzero(np.isfinite(before) & ~np.isfinite(after)))
    if lost:
        raise LossError(
            Problem(
                code="precision-loss",
                loc=(),
                message=f"{lost} of {before.size} values leave the range of {after.dtype.name} by {op}",
                hint="Choose a wider dtype.",
            )
        )
    return after


@dataclass(frozen=True, slots=True)
class Permute(PlainOp):
    """Reorder axes: axis `i` of the result is axis `order[i]` of the input."""

    order: tuple[int, ...]

    def inverse(self) -> Permute:
        return Permute(tuple(int(i) for i in np.argsort(self.order)))

    def spec(self, inputs: tuple[TensorSpec, ...]) -> TensorSpec:
        (spec,) = inputs
        if sorted(self.order) != list(range(len(spec.shape))):
            raise _misfit(self, spec)
        _fixed(self, spec)
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
            raise _misfit(self, spec)
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
        _fixed(self, spec)
        if self.axis >= len(spec.shape) or not 0 <= self.start <= self.stop <= spec.shape[self.axis]:
            raise _misfit(self, spec)
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
class Concat(PlainOp):
    """Join tensors along one axis; `Slice` of each part's range is the inverse."""

    axis: int

    def spec(self, inputs: tuple[TensorSpec, ...]) -> TensorSpec:
        first = inputs[0]
        if self.axis >= len(_fixed(self, first).shape):
            raise _misfit(self, first)
        for other in inputs[1:]:
            same = [n for a, n in enumerate(other.shape) if a != self.axis]
            if other.dtype != first.dtype or same != [n for a, n in enumerate(first.shape) if a != self.axis]:
                raise _misfit(self, other)
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


@dataclass(frozen=True, slots=True)
class Scale(PlainOp):
    """Multiply by a number; the product is rounded once, to the tensor's dtype."""

    factor: float

    def inverse(self) -> Scale:
        return Scale(1.0 / self.factor)

    def spec(self, inputs: tuple[TensorSpec, ...]) -> TensorSpec:
        (spec,) = inputs
        if spec.dtype.kind not in ("float", "complex") or spec.dtype.name == "complex32":
            raise _misfit(self, spec, "Only floating-point numbers are scaled.")
        return spec

    def view(self, tensor: StoredTensor) -> StoredTensor | None:
        return tensor if self.factor == 1.0 else None

    def block(self, inputs: tuple[TensorRef, ...], start: Index, stop: Index) -> Array:
        return self.of(inputs[0].block(start, stop))

    def of(self, part: Array) -> Array:
        """The product of each element.

        Raises: precision-loss where a finite value would become infinite.
        """
        wide = np.complex128 if part.dtype.kind == "c" else np.float64
        with np.errstate(all="ignore"):
            product = np.asarray(part.astype(wide) * self.factor).astype(part.dtype)
        return _within(self, part, product)

    def windows(
        self, inputs: tuple[TensorRef, ...], nbytes: int, panel_nbytes: int
    ) -> Iterator[Bytes] | None:
        return _elementwise_windows(self, inputs[0], nbytes, panel_nbytes)

    def to_json(self) -> dict[str, object]:
        return {"op": "scale", "factor": self.factor}


@dataclass(frozen=True, slots=True)
class Shift(PlainOp):
    """Add a number; the sum is rounded once, to the tensor's dtype."""

    offset: float

    def inverse(self) -> Shift:
        return Shift(-self.offset)

    def spec(self, inputs: tuple[TensorSpec, ...]) -> TensorSpec:
        (spec,) = inputs
        if spec.dtype.kind not in ("float", "complex") or spec.dtype.name == "complex32":
            raise _misfit(self, spec, "Only floating-point numbers are shifted.")
        return spec

    def view(self, tensor: StoredTensor) -> StoredTensor | None:
        return tensor if self.offset == 0.0 else None

    def block(self, inputs: tuple[TensorRef, ...], start: Index, stop: Index) -> Array:
        return self.of(inputs[0].block(start, stop))

    def of(self, part: Array) -> Array:
        """The sum of each element and the offset.

        Raises: precision-loss where a finite value would become infinite.
        """
        wide = np.complex128 if part.dtype.kind == "c" else np.float64
        with np.errstate(all="ignore"):
            total = np.asarray(part.astype(wide) + self.offset).astype(part.dtype)
        return _within(self, part, total)

    def windows(
        self, inputs: tuple[TensorRef, ...], nbytes: int, panel_nbytes: int
    ) -> Iterator[Bytes] | None:
        return _elementwise_windows(self, inputs[0], nbytes, panel_nbytes)

    def to_json(self) -> dict[str, object]:
        return {"op": "shift", "offset": self.offset}


@dataclass(frozen=True, slots=True)
class Cast(PlainOp):
    """Convert to another dtype; exact where the target holds every value of the source."""

    dtype: str

    @property
    def target(self) -> dtypes.DType:
        return dtypes.BY_NAME[self.dtype]

    def is_exact(self, source: dtypes.DType) -> bool:
        """Whether every value of the source dtype survives."""
        if source.kind in ("quantized", "packed", "bytes") or self.target.kind in (
            "quantized",
            "packed",
            "bytes",
        ):
            return source == self.target
        return bool(np.can_cast(source.numpy, self.target.numpy, "safe"))

    def spec(self, inputs: tuple[TensorSpec, ...]) -> TensorSpec:
        (spec,) = inputs
        if spec.dtype != self.target:
            for row in (_fixed(self, spec).dtype, self.target):
                if row.kind in ("quantized", "packed", "bytes") or row.name == "complex32":
                    raise _misfit(self, spec, "Such elements are not numbers; they can only be copied.")
            if spec.dtype.kind == "complex" and self.target.kind != "complex":
                raise _misfit(self, spec, "An imaginary part cannot be dropped.")
        return replace(spec, dtype=self.target)

    def view(self, tensor: StoredTensor) -> StoredTensor | None:
        return tensor if tensor.dtype == self.target else None

    def block(self, inputs: tuple[TensorRef, ...], start: Index, stop: Index) -> Array:
        return self.of(inputs[0].block(start, stop))

    def of(self, part: Array) -> Array:
        """Each element in the target's dtype; floats are rounded to nearest even.

        Raises: precision-loss where a value leaves the range, or where an integer would not come back equal.
        """
        if part.dtype == self.target.numpy:
            return part
        with np.errstate(all="ignore"):
            result = part.astype(self.target.numpy)
            if self.is_exact(dtypes.of_array(part)):
                return result
            if self.target.kind in ("float", "complex") and dtypes.of_array(part).kind in (
                "float",
                "complex",
            ):
                return _within(self, part, result)
            back = result.astype(part.dtype)
            # The signs too: -1 comes back equal from the largest unsigned integer.
            changed = int(np.count_nonzero((back != part) | (np.less(result, 0) != np.less(part, 0))))
        if changed:
            raise LossError(
                Problem(
                    code="precision-loss",
                    loc=(),
                    message=f"{changed} values of {part.dtype.name} have no equal in {self.dtype}",
                    hint="Choose a dtype that holds them.",
                )
            )
        return result

    def windows(
        self, inputs: tuple[TensorRef, ...], nbytes: int, panel_nbytes: int
    ) -> Iterator[Bytes] | None:
        return _elementwise_windows(self, inputs[0], nbytes, panel_nbytes)

    def to_json(self) -> dict[str, object]:
        return {"op": "cast", "dtype": self.dtype}


def _below_elementwise(op: Permute | Reshape | Slice, tensor: DerivedTensor) -> TensorRef | None:
    """Move `op` below an op that treats every element alike: there it can become a view of stored bytes."""
    if not isinstance(tensor.op, (Scale, Shift, Cast)):
        return None
    (part,) = tensor.parts
    return part.apply(op).apply(tensor.op)


def _elementwise_windows(
    op: Scale | Shift | Cast, tensor: TensorRef, nbytes: int, panel_nbytes: int
) -> Iterator[Bytes]:
    after = op.spec((tensor.spec,)).dtype.itemsize
    room = max(min(nbytes, nbytes * tensor.dtype.itemsize // after), 1)
    for window in tensor.windows(room, panel_nbytes):
        yield as_bytes(op.of(window.view(tensor.dtype.numpy)))


def _flat(tensor: TensorRef, low: int, high: int) -> Array:
    """Elements `low` to `high` of the tensor in C order."""
    parts = [tensor.block(start, stop).reshape(-1) for start, stop in flat_boxes(tensor.shape, low, high)]
    return parts[0] if len(parts) == 1 else np.concatenate(parts)
