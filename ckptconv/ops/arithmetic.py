"""Ops that compute new values: what rounding takes is gone, what leaves the range is an error."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import reduce
from typing import ClassVar

import numpy as np

from ckptconv import dtypes
from ckptconv.errors import LossError, Problem
from ckptconv.ops.checks import fixed, misfit
from ckptconv.tensor import (
    Array,
    Bytes,
    Index,
    PlainOp,
    StoredTensor,
    TensorRef,
    TensorSpec,
    as_bytes,
)


def within(op: object, before: Array, after: Array) -> Array:
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


class _ByElement(PlainOp):
    """Computes each element from one of the only input's."""

    __slots__ = ()
    elementwise: ClassVar[bool] = True

    def of(self, part: Array) -> Array:
        """Each element's new value. Raises: precision-loss."""
        raise NotImplementedError

    def spec(self, inputs: tuple[TensorSpec, ...]) -> TensorSpec:
        """What comes out. Raises: shape-mismatch."""
        raise NotImplementedError

    def block(self, inputs: tuple[TensorRef, ...], start: Index, stop: Index) -> Array:
        return self.of(inputs[0].block(start, stop))

    def windows(self, inputs: tuple[TensorRef, ...], nbytes: int, panel_nbytes: int) -> Iterator[Bytes]:
        (tensor,) = inputs
        after = self.spec((tensor.spec,)).dtype.itemsize
        room = max(min(nbytes, nbytes * tensor.dtype.itemsize // after), 1)
        for window in tensor.windows(room, panel_nbytes):
            yield as_bytes(self.of(window.view(tensor.dtype.numpy)))


def _is_computed(spec: TensorSpec) -> bool:
    return spec.dtype.kind in ("float", "complex") and spec.dtype.name != "complex32"


def _wide(part: Array) -> type[np.float64] | type[np.complex128]:
    return np.complex128 if part.dtype.kind == "c" else np.float64


@dataclass(frozen=True, slots=True)
class Scale(_ByElement):
    """Multiply by a number; the product is rounded once, to the tensor's dtype."""

    factor: float

    def inverse(self) -> Scale:
        return Scale(1.0 / self.factor)

    def spec(self, inputs: tuple[TensorSpec, ...]) -> TensorSpec:
        (spec,) = inputs
        if not _is_computed(spec):
            raise misfit(self, spec, "Only floating-point numbers are scaled.")
        return spec

    def view(self, tensor: StoredTensor) -> StoredTensor | None:
        return tensor if self.factor == 1.0 else None

    def of(self, part: Array) -> Array:
        """Raises: precision-loss where a finite value would become infinite."""
        with np.errstate(all="ignore"):
            product = np.asarray(part.astype(_wide(part)) * self.factor).astype(part.dtype)
        return within(self, part, product)

    def to_json(self) -> dict[str, object]:
        return {"op": "scale", "factor": self.factor}


@dataclass(frozen=True, slots=True)
class Shift(_ByElement):
    """Add a number; the sum is rounded once, to the tensor's dtype."""

    offset: float

    def inverse(self) -> Shift:
        return Shift(-self.offset)

    def spec(self, inputs: tuple[TensorSpec, ...]) -> TensorSpec:
        (spec,) = inputs
        if not _is_computed(spec):
            raise misfit(self, spec, "Only floating-point numbers are shifted.")
        return spec

    def view(self, tensor: StoredTensor) -> StoredTensor | None:
        return tensor if self.offset == 0.0 else None

    def of(self, part: Array) -> Array:
        """Raises: precision-loss where a finite value would become infinite."""
        with np.errstate(all="ignore"):
            total = np.asarray(part.astype(_wide(part)) + self.offset).astype(part.dtype)
        return within(self, part, total)

    def to_json(self) -> dict[str, object]:
        return {"op": "shift", "offset": self.offset}


@dataclass(frozen=True, slots=True)
class Cast(_ByElement):
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
        if (
            source.kind in ("int", "uint")
            and source.itemsize == 8
            and self.target.kind in ("float", "complex")
        ):
            return False  # float64 has 53 bits for them, though numpy calls it safe
        return bool(np.can_cast(source.numpy, self.target.numpy, "safe"))

    def spec(self, inputs: tuple[TensorSpec, ...]) -> TensorSpec:
        (spec,) = inputs
        if spec.dtype != self.target:
            for row in (fixed(self, spec).dtype, self.target):
                if row.kind in ("quantized", "packed", "bytes") or row.name == "complex32":
                    raise misfit(self, spec, "Such elements are not numbers; they can only be copied.")
            if spec.dtype.kind == "complex" and self.target.kind != "complex":
                raise misfit(self, spec, "An imaginary part cannot be dropped.")
        return replace(spec, dtype=self.target)

    def view(self, tensor: StoredTensor) -> StoredTensor | None:
        return tensor if tensor.dtype == self.target else None

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
                return within(self, part, result)
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

    def to_json(self) -> dict[str, object]:
        return {"op": "cast", "dtype": self.dtype}


@dataclass(frozen=True, slots=True)
class Add(PlainOp):
    """The sum of tensors, rounded once, to their dtype: which was which cannot be told from it."""

    def spec(self, inputs: tuple[TensorSpec, ...]) -> TensorSpec:
        first = inputs[0]
        for spec in inputs:
            if spec != first or not _is_computed(spec):
                raise misfit(self, spec, "Only floating-point numbers of one shape are added.")
        return first

    def view(self, tensor: StoredTensor) -> StoredTensor | None:
        return tensor

    def block(self, inputs: tuple[TensorRef, ...], start: Index, stop: Index) -> Array:
        """Raises: precision-loss where the sum of finite values would become infinite."""
        parts = [tensor.block(start, stop) for tensor in inputs]
        with np.errstate(all="ignore"):
            total = reduce(np.add, (part.astype(_wide(part)) for part in parts))
            largest = reduce(np.maximum, (np.abs(part) for part in parts))
            return within(self, largest, total.astype(parts[0].dtype))

    def to_json(self) -> dict[str, object]:
        return {"op": "add"}
