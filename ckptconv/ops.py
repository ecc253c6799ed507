"""What may happen to a tensor on its way: values that say what they do, their inverse, or what they lose."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from ckptconv import dtypes
from ckptconv.errors import CkptError, MappingError
from ckptconv.tensor import Array, Index, StoredTensor, TensorRef, TensorSpec, dense_strides


def _misfit(op: object, spec: TensorSpec) -> CkptError:
    return MappingError.of(
        "shape-mismatch", f"{op} does not fit shape {list(spec.shape)}", "Check the mapping or the template."
    )


@dataclass(frozen=True, slots=True)
class Permute:
    """Reorder axes: axis `i` of the result is axis `order[i]` of the input."""

    order: tuple[int, ...]

    def inverse(self) -> Permute:
        return Permute(tuple(int(i) for i in np.argsort(self.order)))

    def spec(self, inputs: tuple[TensorSpec, ...]) -> TensorSpec:
        (spec,) = inputs
        if sorted(self.order) != list(range(len(spec.shape))):
            raise _misfit(self, spec)
        return TensorSpec(dtype=spec.dtype, shape=tuple(spec.shape[i] for i in self.order))

    def view(self, tensor: StoredTensor) -> StoredTensor:
        return StoredTensor(
            spec=self.spec((tensor.spec,)),
            extent=tensor.extent,
            offset=tensor.offset,
            strides=tuple(tensor.strides[i] for i in self.order),
        )

    def block(self, inputs: tuple[TensorRef, ...], start: Index, stop: Index) -> Array:
        back = self.inverse().order
        part = inputs[0].block(tuple(start[i] for i in back), tuple(stop[i] for i in back))
        return np.ascontiguousarray(part.transpose(self.order))

    def to_json(self) -> dict[str, object]:
        return {"op": "permute", "order": list(self.order)}


@dataclass(frozen=True, slots=True)
class Reshape:
    """The same elements in C order under another shape; `before` is the input's shape."""

    before: tuple[int, ...]
    after: tuple[int, ...]

    def inverse(self) -> Reshape:
        return Reshape(self.after, self.before)

    def spec(self, inputs: tuple[TensorSpec, ...]) -> TensorSpec:
        (spec,) = inputs
        if spec.shape != self.before or math.prod(self.before) != math.prod(self.after):
            raise _misfit(self, spec)
        return TensorSpec(dtype=spec.dtype, shape=self.after)

    def view(self, tensor: StoredTensor) -> StoredTensor | None:
        spec = self.spec((tensor.spec,))
        if tensor.is_dense:
            return StoredTensor.dense(spec, tensor.extent, tensor.offset)
        strides = _reshaped_strides(tensor.shape, tensor.strides, self.after)
        if strides is None:
            return None
        return StoredTensor(spec=spec, extent=tensor.extent, offset=tensor.offset, strides=strides)

    def block(self, inputs: tuple[TensorRef, ...], start: Index, stop: Index) -> Array:
        """Reads the whole rows of the input's first axis that hold the elements."""
        shape = tuple(hi - lo for lo, hi in zip(start, stop, strict=True))
        if 0 in shape:
            return np.empty(shape, inputs[0].dtype.numpy)
        strides = dense_strides(self.after)
        low = sum(i * s for i, s in zip(start, strides, strict=True))
        high = 1 + sum((i - 1) * s for i, s in zip(stop, strides, strict=True))
        row = max(math.prod(self.before[1:]), 1)
        first, last = low // row, -(-high // row)
        rank = len(self.before)
        part = inputs[0].block((first, *(0,) * (rank - 1))[:rank], (last, *self.before[1:])[:rank])
        flat = part.reshape(-1)[low - first * row :]
        item = flat.itemsize
        view = np.lib.stride_tricks.as_strided(
            flat.view(np.dtype(("V", item))), shape, tuple(s * item for s in strides)
        )
        return np.ascontiguousarray(view).view(flat.dtype).reshape(shape)

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
class Slice:
    """Elements `start` to `stop` (exclusive) of one axis: one part of a split."""

    axis: int
    start: int
    stop: int

    def spec(self, inputs: tuple[TensorSpec, ...]) -> TensorSpec:
        (spec,) = inputs
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

    def block(self, inputs: tuple[TensorRef, ...], start: Index, stop: Index) -> Array:
        def shifted(index: Index) -> Index:
            return tuple(i + self.start if a == self.axis else i for a, i in enumerate(index))

        return inputs[0].block(shifted(start), shifted(stop))

    def to_json(self) -> dict[str, object]:
        return {"op": "slice", "axis": self.axis, "start": self.start, "stop": self.stop}


@dataclass(frozen=True, slots=True)
class Concat:
    """Join tensors along one axis; `Slice` of each part's range is the inverse."""

    axis: int

    def spec(self, inputs: tuple[TensorSpec, ...]) -> TensorSpec:
        first = inputs[0]
        for other in inputs[1:]:
            same = [n for a, n in enumerate(other.shape) if a != self.axis]
            if other.dtype != first.dtype or same != [
                n for a, n in enumerate(first.shape) if a != self.axis
            ]:
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

    def to_json(self) -> dict[str, object]:
        return {"op": "concat", "axis": self.axis}


@dataclass(frozen=True, slots=True)
class Scale:
    """Multiply by a number; the product is rounded once, to the tensor's dtype."""

    factor: float

    def inverse(self) -> Scale:
        return Scale(1.0 / self.factor)

    def spec(self, inputs: tuple[TensorSpec, ...]) -> TensorSpec:
        return inputs[0]

    def view(self, tensor: StoredTensor) -> StoredTensor | None:
        return tensor if self.factor == 1.0 else None

    def block(self, inputs: tuple[TensorRef, ...], start: Index, stop: Index) -> Array:
        part = inputs[0].block(start, stop)
        wide = np.complex128 if inputs[0].dtype.kind == "complex" else np.float64
        return np.asarray(part.astype(wide) * self.factor).astype(part.dtype)

    def to_json(self) -> dict[str, object]:
        return {"op": "scale", "factor": self.factor}


@dataclass(frozen=True, slots=True)
class Cast:
    """Convert to another dtype; exact where the target holds every value of the source."""

    dtype: str

    @property
    def target(self) -> dtypes.DType:
        return dtypes.BY_NAME[self.dtype]

    def is_exact(self, source: dtypes.DType) -> bool:
        """Whether every value of the source dtype survives."""
        if source.kind in ("quantized", "packed", "bytes") or self.target.kind in ("quantized", "packed", "bytes"):
            return source == self.target
        return bool(np.can_cast(source.numpy, self.target.numpy, "safe"))

    def spec(self, inputs: tuple[TensorSpec, ...]) -> TensorSpec:
        return TensorSpec(dtype=self.target, shape=inputs[0].shape)

    def view(self, tensor: StoredTensor) -> StoredTensor | None:
        return tensor if tensor.dtype == self.target else None

    def block(self, inputs: tuple[TensorRef, ...], start: Index, stop: Index) -> Array:
        return inputs[0].block(start, stop).astype(self.target.numpy)

    def to_json(self) -> dict[str, object]:
        return {"op": "cast", "dtype": self.dtype}
