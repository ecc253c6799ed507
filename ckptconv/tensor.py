"""Tensors that are not read yet: a spec, and either the place where the bytes lie or an op on other tensors.

A `TensorRef` is a value. It can be sliced, permuted, scaled and concatenated without reading a byte;
`read()` gives the array, `windows()` streams it in pieces of bounded size. Whatever the source's byte
order and strides, what comes out is C-order and little-endian.

A tensor whose axes lie in another order than in the file is streamed in panels: as much of it as
`panel_nbytes` holds is read in the file's order, in runs as long as the panel allows, and is turned in
memory. A long matrix leaves runs of a few elements whichever panel is taken: `tiles` cuts it into boxes about
as wide as high, for a writer that can put down their rows one by one.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator
from dataclasses import dataclass, field, replace
from typing import ClassVar, Protocol

import numpy as np

from ckptconv import dtypes
from ckptconv.dtypes import DType
from ckptconv.errors import FormatError, Problem
from ckptconv.extent import Checksum, Extent, gather
from ckptconv.source import BufferSource, ByteSource, FileSource
from ckptconv.strided import (
    Array,
    Bytes,
    Index,
    as_bytes,
    blocks,
    box_shape,
    box_slices,
    dense,
    dense_strides,
    same_layout,
)

__all__ = [
    "WINDOW_NBYTES",
    "Array",
    "BufferSource",
    "ByteSource",
    "Bytes",
    "Checksum",
    "DerivedTensor",
    "Extent",
    "FileSource",
    "FilledTensor",
    "Index",
    "MissingTensor",
    "Op",
    "PlainOp",
    "StoredTensor",
    "TensorRef",
    "TensorSpec",
    "as_bytes",
    "blocks",
    "dense_strides",
]

WINDOW_NBYTES = 4 << 20
"""Default size of a streamed piece, in bytes."""
PANEL_NBYTES = 32 << 20
"""Default size of what is read at once of a tensor whose axes do not lie in the file's order."""

_SHORT_NBYTES = 4 << 10
"""Runs shorter than this cost more to read than a box's rows cost to write."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorSpec:
    """What is known of a tensor without reading it."""

    dtype: DType
    shape: tuple[int, ...]
    encoded_nbytes: int | None = None
    """Bytes of the whole encoded tensor where elements differ in length (strings), else None."""

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor, C-order and dense."""
        if self.encoded_nbytes is not None:
            return self.encoded_nbytes
        return self.numel * self.dtype.itemsize


class Op(Protocol):
    """A pure function of tensors; the operations themselves are in `ckptconv.ops`."""

    elementwise: ClassVar[bool]
    """Whether it makes each element of one, wherever it stands."""

    def spec(self, inputs: tuple[TensorSpec, ...]) -> TensorSpec:
        """Spec of the result. Raises shape-mismatch where the inputs do not fit."""

    def view(self, tensor: StoredTensor) -> StoredTensor | None:
        """The result as another view of the same bytes, where strides can express it."""

    def inward(self, tensor: DerivedTensor) -> TensorRef | None:
        """The result with this op moved below `tensor`'s own, nearer to the bytes, where the two commute."""

    def block(self, inputs: tuple[TensorRef, ...], start: Index, stop: Index) -> Array:
        """Elements `start` to `stop` (exclusive, per axis) of the result."""

    def windows(
        self, inputs: tuple[TensorRef, ...], nbytes: int, panel_nbytes: int
    ) -> Iterator[Bytes] | None:
        """The result's bytes in order, where they follow from the inputs' bytes in order; else None.

        Every window holds whole elements.
        """

    def to_json(self) -> dict[str, object]:
        """For reports and plans: `{"op": name, ...}`."""


class PlainOp:
    """What holds for an op unless it says otherwise."""

    __slots__ = ()
    elementwise: ClassVar[bool] = False

    def inward(self, tensor: DerivedTensor) -> TensorRef | None:
        return None

    def windows(
        self, inputs: tuple[TensorRef, ...], nbytes: int, panel_nbytes: int
    ) -> Iterator[Bytes] | None:
        return None


class TensorRef:
    """A lazy tensor. Subclasses say where the elements come from."""

    __slots__ = ()
    spec: TensorSpec

    def block(self, start: Index, stop: Index) -> Array:
        """Elements `start` to `stop` (exclusive, per axis): C-order, little-endian."""
        raise NotImplementedError

    @property
    def inputs(self) -> tuple[TensorRef, ...]:
        """The tensors that this one is made of; none for a leaf."""
        return ()

    @property
    def extents(self) -> tuple[Extent, ...]:
        """Every run of stored bytes below this tensor."""
        return tuple(extent for tensor in self.inputs for extent in tensor.extents)

    @property
    def storage_id(self) -> Hashable | None:
        """Equal for two tensors that share memory; None where there is no memory yet."""
        return None

    @property
    def shape(self) -> tuple[int, ...]:
        return self.spec.shape

    def as_it_lies(self) -> TensorRef:
        """The same elements in the order that is read best, for who does not ask for their order."""
        return self

    @property
    def dtype(self) -> DType:
        return self.spec.dtype

    def read(self) -> Array:
        """The whole tensor as an array of its own.

        Shapes: `spec.shape`; for strings and variants the encoded bytes, `(encoded_nbytes,)`.
        """
        if self.spec.encoded_nbytes is not None:
            return np.concatenate([np.zeros(0, np.uint8), *self.windows()])
        return self.block((0,) * len(self.shape), self.shape)

    def windows(self, nbytes: int = WINDOW_NBYTES, panel_nbytes: int = PANEL_NBYTES) -> Iterator[Bytes]:
        """The tensor's C-order little-endian bytes in consecutive pieces of at most `nbytes`.

        Holds about `panel_nbytes` more where the bytes have to be rearranged.
        """
        for start, stop in blocks(self.shape, self.dtype.itemsize, nbytes):
            yield as_bytes(self.block(start, stop))

    def tiles(self, panel_nbytes: int = PANEL_NBYTES) -> list[tuple[Index, Index]] | None:
        """Boxes of about `panel_nbytes` with what they are made of, where these are read in far longer runs
        than windows are; together they are the tensor, in no order. None where windows are as good.
        """
        return None

    def apply(self, op: Op, *others: TensorRef) -> TensorRef:
        """The op's result on this tensor (and `others`), not computed yet."""
        if not others and isinstance(self, StoredTensor):
            viewed = op.view(self)
            if viewed is not None:
                return viewed
        if not others and isinstance(self, DerivedTensor):
            moved = op.inward(self)
            if moved is not None:
                return moved
        inputs = (self, *others)
        return DerivedTensor(op=op, parts=inputs, spec=op.spec(tuple(t.spec for t in inputs)))


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredTensor(TensorRef):
    """A strided view of stored bytes."""

    spec: TensorSpec
    extent: Extent
    offset: int = 0
    """First element, in elements from the start of the extent."""
    strides: tuple[int, ...] = field(default=())
    """Per axis, in elements; 0 repeats. Never negative."""

    @classmethod
    def dense(cls, spec: TensorSpec, extent: Extent, offset: int = 0) -> StoredTensor:
        """A C-order tensor that starts `offset` elements into the extent."""
        return cls(spec=spec, extent=extent, offset=offset, strides=dense_strides(spec.shape))

    @classmethod
    def raw(cls, extent: Extent) -> StoredTensor:
        """The extent's bytes as they are, as uint8."""
        return cls.dense(TensorSpec(dtype=dtypes.BY_NAME["uint8"], shape=(extent.nbytes,)), extent)

    @classmethod
    def of_array(cls, array: Array, name: str = "<memory>") -> StoredTensor:
        """A tensor of an array's values; the memory is shared where it is C-order already."""
        dense = np.ascontiguousarray(array).reshape(array.shape)
        little = dense.astype(dense.dtype.newbyteorder("<"), copy=False)
        spec = TensorSpec(dtype=dtypes.of_array(little), shape=array.shape)
        data = as_bytes(little)
        source = BufferSource(data.data, name)
        return cls.dense(spec, Extent(source=source, offset=0, nbytes=data.nbytes))

    @property
    def extents(self) -> tuple[Extent, ...]:
        return (self.extent,)

    @property
    def storage_id(self) -> Hashable:
        return self.extent.id

    def as_it_lies(self) -> StoredTensor:
        order = sorted(range(len(self.strides)), key=lambda axis: -self.strides[axis])
        spec = replace(self.spec, shape=tuple(self.shape[axis] for axis in order))
        return replace(self, spec=spec, strides=tuple(self.strides[axis] for axis in order))

    @property
    def is_dense(self) -> bool:
        """Whether the bytes lie in C order without gaps."""
        return self.spec.encoded_nbytes is not None or same_layout(
            self.shape, self.strides, dense_strides(self.shape)
        )

    def windows(self, nbytes: int = WINDOW_NBYTES, panel_nbytes: int = PANEL_NBYTES) -> Iterator[Bytes]:
        item = max(self.dtype.itemsize, 1)
        if not self.is_dense:
            yield from self._panels(nbytes, panel_nbytes)
            return
        start, total = self.offset * item, self.spec.nbytes
        step = max(nbytes - nbytes % item, item)
        for done in range(0, total, step):
            piece = np.empty(min(step, total - done), np.uint8)
            self.extent.read_into(start + done, piece.data)
            self._to_little(piece)
            yield piece

    def _panels(self, nbytes: int, panel_nbytes: int) -> Iterator[Bytes]:
        item = self.dtype.itemsize
        if self.spec.nbytes > panel_nbytes:
            self.extent.prefetch()
        for start, stop in blocks(self.shape, item, panel_nbytes):
            panel = self._view(start, stop)
            for low, high in blocks(panel.shape, item, nbytes):
                yield as_bytes(dense(panel[box_slices(low, high)]))
            del panel  # before the next one is read, not after

    def tiles(self, panel_nbytes: int = PANEL_NBYTES) -> list[tuple[Index, Index]] | None:
        item = self.dtype.itemsize
        if len(self.shape) != 2 or self.strides[0] != 1 or self.spec.nbytes <= panel_nbytes:
            return None
        rows, columns = self.shape
        if panel_nbytes // columns >= _SHORT_NBYTES:
            return None
        room = panel_nbytes // 2 // item  # the elements as they lie, and turned
        width = min(columns, max(math.isqrt(room), room // rows))
        height = min(rows, max(room // width, 1))
        return [
            ((top, left), (min(top + height, rows), min(left + width, columns)))
            for left in range(0, columns, width)
            for top in range(0, rows, height)
        ]

    def block(self, start: Index, stop: Index) -> Array:
        return dense(self._view(start, stop))

    def _view(self, start: Index, stop: Index) -> Array:
        """The elements `start` to `stop` as a view of memory in which they lie as they do in the file."""
        shape = box_shape(start, stop)
        if 0 in shape:  # its offset may be behind the end of an empty extent
            return np.empty(shape, self.dtype.numpy)
        if shape == self.shape and self.strides == dense_strides(shape):
            whole = np.empty(self.spec.nbytes, np.uint8)
            self.extent.read_into(self.offset * self.dtype.itemsize, whole.data)
            self._to_little(whole)
            return np.ndarray(shape, self.dtype.numpy, whole.data)
        item = self.dtype.itemsize
        first = sum(i * s for i, s in zip(start, self.strides, strict=True)) + self.offset
        order = [axis for axis, step in enumerate(self.strides) if step and shape[axis] > 1]
        order.sort(key=lambda axis: -self.strides[axis])
        sizes, steps = [shape[a] for a in order], [self.strides[a] for a in order]
        raw = np.empty(math.prod(sizes) * item, np.uint8)
        gather(self.extent, raw, item, first, sizes, steps)
        self._to_little(raw)
        strides = [0] * len(shape)
        for axis, step in zip(order, dense_strides(tuple(sizes)), strict=True):
            strides[axis] = step * item
        return np.ndarray(shape, self.dtype.numpy, raw.data, 0, strides)

    def _to_little(self, raw: Bytes) -> None:
        if self.extent.big_endian and self.dtype.swap > 1:
            raw.view(f"u{self.dtype.swap}").byteswap(inplace=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class FilledTensor(TensorRef):
    """The same value everywhere: what a catalog row gives where the source has nothing."""

    spec: TensorSpec
    value: float = 0.0

    def block(self, start: Index, stop: Index) -> Array:
        return np.full(
            box_shape(start, stop), np.array(self.value).astype(self.dtype.numpy), self.dtype.numpy
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class MissingTensor(TensorRef):
    """A tensor of a skeleton: its spec is known, its values are not."""

    spec: TensorSpec
    name: str = ""

    def block(self, start: Index, stop: Index) -> Array:
        raise FormatError(
            Problem(
                code="reference-broken",
                loc=(self.name,),
                message=f"'{self.name}' has no values: the document is a skeleton",
                hint="Use the checkpoint itself as the source.",
            )
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class DerivedTensor(TensorRef):
    """An op that waits for its result to be asked for."""

    op: Op
    parts: tuple[TensorRef, ...]
    spec: TensorSpec

    @property
    def inputs(self) -> tuple[TensorRef, ...]:
        return self.parts

    def block(self, start: Index, stop: Index) -> Array:
        return self.op.block(self.parts, start, stop)

    def tiles(self, panel_nbytes: int = PANEL_NBYTES) -> list[tuple[Index, Index]] | None:
        # A quarter, as below.
        return self.parts[0].tiles(panel_nbytes // 4) if self.op.elementwise else None

    def windows(self, nbytes: int = WINDOW_NBYTES, panel_nbytes: int = PANEL_NBYTES) -> Iterator[Bytes]:
        in_order = self.op.windows(self.parts, nbytes, panel_nbytes)
        if in_order is not None:
            yield from in_order
            return
        # A quarter: the inputs' blocks and what the op needs for itself are held at the same time.
        for start, stop in blocks(self.shape, self.dtype.itemsize, max(panel_nbytes // 4, nbytes)):
            block = as_bytes(self.block(start, stop))
            for low in range(0, len(block), nbytes):
                yield block[low : low + nbytes]
