"""The same bytes under another dtype: how a container stores element types that it has no name for."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from ckptconv import dtypes
from ckptconv.errors import MappingError
from ckptconv.tensor import (
    Array,
    Bytes,
    Index,
    PlainOp,
    StoredTensor,
    TensorRef,
    TensorSpec,
    as_bytes,
    dense_strides,
)

_U8 = dtypes.BY_NAME["uint8"]


@dataclass(frozen=True, slots=True)
class AsBytes(PlainOp):
    """A tensor's little-endian bytes as U8, with the bytes of one element as one more axis.

    Encoded tensors (strings) become one axis of `encoded_nbytes`.
    """

    def spec(self, inputs: tuple[TensorSpec, ...]) -> TensorSpec:
        (spec,) = inputs
        if spec.encoded_nbytes is not None:
            return TensorSpec(dtype=_U8, shape=(spec.encoded_nbytes,))
        return TensorSpec(dtype=_U8, shape=(*spec.shape, spec.dtype.itemsize))

    def view(self, tensor: StoredTensor) -> StoredTensor | None:
        if not tensor.is_dense or (tensor.extent.big_endian and tensor.dtype.swap > 1):
            return None
        offset = tensor.offset * max(tensor.dtype.itemsize, 1)
        return StoredTensor.dense(self.spec((tensor.spec,)), tensor.extent, offset)

    def block(self, inputs: tuple[TensorRef, ...], start: Index, stop: Index) -> Array:
        (tensor,) = inputs
        if tensor.spec.encoded_nbytes is not None:
            return tensor.read()[start[0] : stop[0]]
        part = tensor.block(start[:-1], stop[:-1])
        flat = as_bytes(np.ascontiguousarray(part))
        rows = flat.reshape(*part.shape, tensor.dtype.itemsize)
        return np.ascontiguousarray(rows[..., start[-1] : stop[-1]])

    def windows(self, inputs: tuple[TensorRef, ...], nbytes: int, panel_nbytes: int) -> Iterator[Bytes]:
        return inputs[0].windows(nbytes, panel_nbytes)

    def to_json(self) -> dict[str, object]:
        return {"op": "as-bytes"}


@dataclass(frozen=True, slots=True)
class FromBytes(PlainOp):
    """The inverse of `AsBytes`."""

    dtype: str
    shape: tuple[int, ...]
    encoded_nbytes: int | None = None

    @property
    def result(self) -> TensorSpec:
        return TensorSpec(
            dtype=dtypes.BY_NAME[self.dtype], shape=self.shape, encoded_nbytes=self.encoded_nbytes
        )

    def spec(self, inputs: tuple[TensorSpec, ...]) -> TensorSpec:
        (spec,) = inputs
        if spec != AsBytes().spec((self.result,)):
            raise MappingError.of(
                "shape-mismatch",
                f"{self.dtype} {list(self.shape)} cannot be read from {spec.dtype.name} {list(spec.shape)}",
                "The manifest and the tensor file do not belong together.",
            )
        return self.result

    def view(self, tensor: StoredTensor) -> StoredTensor | None:
        spec = self.spec((tensor.spec,))
        item = max(spec.dtype.itemsize, 1)
        if not tensor.is_dense or tensor.offset % item:
            return None
        return StoredTensor(
            spec=spec, extent=tensor.extent, offset=tensor.offset // item, strides=dense_strides(spec.shape)
        )

    def block(self, inputs: tuple[TensorRef, ...], start: Index, stop: Index) -> Array:
        dtype = self.result.dtype
        raw = inputs[0].block((*start, 0), (*stop, dtype.itemsize))
        shape = tuple(hi - lo for lo, hi in zip(start, stop, strict=True))
        return raw.reshape(-1).view(dtype.numpy).reshape(shape) if raw.size else np.empty(shape, dtype.numpy)

    def windows(self, inputs: tuple[TensorRef, ...], nbytes: int, panel_nbytes: int) -> Iterator[Bytes]:
        item = max(self.result.dtype.itemsize, 1)
        return inputs[0].windows(max(nbytes - nbytes % item, item), panel_nbytes)

    def to_json(self) -> dict[str, object]:
        return {"op": "from-bytes", "dtype": self.dtype, "shape": list(self.shape)}
