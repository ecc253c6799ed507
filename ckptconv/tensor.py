"""Tensors that are not read yet: a spec, and either the place where the bytes lie or an op on other tensors.

A `TensorRef` is a value. It can be sliced, permuted, scaled and concatenated without reading a byte;
`read()` gives the array, `windows()` streams it in pieces of bounded size. Whatever the source's byte
order and strides, what comes out is C-order and little-endian.
"""

from __future__ import annotations

import math
import os
import weakref
from collections.abc import Hashable, Iterator
from dataclasses import dataclass, field
from typing import Literal, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from ckptconv import dtypes
from ckptconv.dtypes import DType
from ckptconv.errors import FormatError

Array = npt.NDArray[np.generic]
Bytes = npt.NDArray[np.uint8]
Index = tuple[int, ...]

WINDOW_NBYTES = 8 << 20
"""Default size of a streamed piece, in bytes."""

_SPARSE_SPAN_NBYTES = 1 << 20
"""A strided read up to this many bytes is one read, however much of it is not wanted."""


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


@runtime_checkable
class ByteSource(Protocol):
    """Where raw bytes come from: a file, a buffer, a remote object. Safe to read from several threads."""

    @property
    def name(self) -> str:
        """What to call it in messages."""

    @property
    def nbytes(self) -> int:
        """Bytes that are there."""

    def read_into(self, offset: int, out: memoryview) -> None:
        """Fill `out` (bytes, writable) from `offset` on.

        Raises: truncated-tensor where the source ends before `out` is full.
        """


class FileSource:
    """A local file, opened read-only at the first read and closed when nothing refers to it any more."""

    __slots__ = ("__weakref__", "_fd", "_nbytes", "name", "path")

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = os.fspath(path)
        self.name = os.path.basename(self.path)
        self._fd = os.open(self.path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
        self._nbytes = os.fstat(self._fd).st_size
        weakref.finalize(self, os.close, self._fd)

    @property
    def nbytes(self) -> int:
        return self._nbytes

    def read_into(self, offset: int, out: memoryview) -> None:
        done = 0
        while done < len(out):
            got = os.preadv(self._fd, [out[done:]], offset + done)
            if got == 0:
                raise _ends_early(self.name, offset, len(out), offset + done)
            done += got

    def __repr__(self) -> str:
        return f"FileSource({self.name!r})"


class BufferSource:
    """Bytes that are in memory already."""

    __slots__ = ("_view", "name")

    def __init__(self, data: bytes | bytearray | memoryview, name: str = "<memory>") -> None:
        self._view = memoryview(data).cast("B")
        self.name = name

    @property
    def nbytes(self) -> int:
        return len(self._view)

    def read_into(self, offset: int, out: memoryview) -> None:
        if offset + len(out) > len(self._view):
            raise _ends_early(self.name, offset, len(out), len(self._view))
        out[:] = self._view[offset : offset + len(out)]

    def __repr__(self) -> str:
        return f"BufferSource({self.name!r}, {len(self._view)} bytes)"


def _ends_early(name: str, offset: int, wanted: int, end: int) -> FormatError:
    error = FormatError.of(
        "truncated-tensor",
        f"bytes {offset}..{offset + wanted} are needed, the file ends at {end} [{name}]",
        "Copy the file again; nothing was written.",
        loc=(name,),
    )
    assert isinstance(error, FormatError)
    return error


@dataclass(frozen=True, slots=True, kw_only=True)
class Checksum:
    """A checksum that the source records of one extent."""

    kind: Literal["crc32", "crc32c"]
    """`crc32` as in zip; `crc32c` Castagnoli, unmasked."""
    value: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Extent:
    """A run of raw bytes that belongs together: a storage, a record, a tensor."""

    source: ByteSource
    offset: int
    nbytes: int
    big_endian: bool = False
    checksum: Checksum | None = None
    """Covers exactly the extent, in file byte order."""

    @property
    def id(self) -> Hashable:
        """Equal for tensors that share memory."""
        return (id(self.source), self.offset, self.nbytes)

    def read_into(self, offset: int, out: memoryview) -> None:
        """Fill `out` from `offset` bytes into the extent on."""
        if offset < 0 or offset + len(out) > self.nbytes:
            raise _ends_early(self.source.name, offset, len(out), self.nbytes)
        self.source.read_into(self.offset + offset, out)


class Op(Protocol):
    """A pure function of tensors; the operations themselves are in `ckptconv.ops`."""

    def spec(self, inputs: tuple[TensorSpec, ...]) -> TensorSpec:
        """Spec of the result. Raises shape-mismatch where the inputs do not fit."""

    def view(self, tensor: StoredTensor) -> StoredTensor | None:
        """The result as another view of the same bytes, where strides can express it."""

    def block(self, inputs: tuple[TensorRef, ...], start: Index, stop: Index) -> Array:
        """Elements `start` to `stop` (exclusive, per axis) of the result."""

    def to_json(self) -> dict[str, object]:
        """For reports and plans: `{"op": name, ...}`."""


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

    def windows(self, nbytes: int = WINDOW_NBYTES) -> Iterator[Bytes]:
        """The tensor's C-order little-endian bytes in consecutive pieces of at most about `nbytes`."""
        for start, stop in blocks(self.shape, self.dtype.itemsize, nbytes):
            yield as_bytes(self.block(start, stop))

    def apply(self, op: Op, *others: TensorRef) -> TensorRef:
        """The op's result on this tensor (and `others`), not computed yet."""
        if not others and isinstance(self, StoredTensor):
            viewed = op.view(self)
            if viewed is not None:
                return viewed
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

    @property
    def is_dense(self) -> bool:
        """Whether the bytes lie in C order without gaps."""
        return self.spec.encoded_nbytes is not None or _same_layout(
            self.shape, self.strides, dense_strides(self.shape)
        )

    def windows(self, nbytes: int = WINDOW_NBYTES) -> Iterator[Bytes]:
        if self.spec.encoded_nbytes is None and not self.is_dense:
            yield from TensorRef.windows(self, nbytes)
            return
        item = max(self.dtype.itemsize, 1)
        start, total = self.offset * item, self.spec.nbytes
        step = max(nbytes - nbytes % item, item)
        for done in range(0, total, step):
            piece = np.empty(min(step, total - done), np.uint8)
            self.extent.read_into(start + done, piece.data)
            yield self._little(piece)

    def block(self, start: Index, stop: Index) -> Array:
        shape = tuple(hi - lo for lo, hi in zip(start, stop, strict=True))
        out = np.empty(shape, self.dtype.numpy)
        if out.size:
            first = self.offset + sum(i * s for i, s in zip(start, self.strides, strict=True))
            self._fill(out, first, self.strides)
        return out

    def _fill(self, out: Array, first: int, strides: tuple[int, ...]) -> None:
        """Read the strided elements into `out`, in as few and as dense reads as its layout allows."""
        item = self.dtype.itemsize
        repeated = [axis for axis, step in enumerate(strides) if step == 0 and out.shape[axis] > 1]
        if repeated:
            once = out[tuple(slice(0, 1) if a in repeated else slice(None) for a in range(out.ndim))]
            unique = np.empty(once.shape, out.dtype)
            self._fill(unique, first, strides)
            out[...] = unique
            return
        span = 1 + sum((n - 1) * s for n, s in zip(out.shape, strides, strict=True))
        if span == out.size and _same_layout(out.shape, strides, dense_strides(out.shape)) and out.flags.c_contiguous:
            raw = as_bytes(out)
            self.extent.read_into(first * item, raw.data)
            if self.extent.big_endian:
                raw[:] = self._little(raw)
            return
        if span * item <= max(_SPARSE_SPAN_NBYTES, 2 * out.nbytes):
            raw = np.empty(span * item, np.uint8)
            self.extent.read_into(first * item, raw.data)
            strides_nbytes = tuple(step * item for step in strides)
            out[...] = np.ndarray(out.shape, out.dtype, self._little(raw).data, 0, strides_nbytes)
            return
        axis = max(range(out.ndim), key=lambda a: strides[a] if out.shape[a] > 1 else -1)
        row = np.delete(np.array(out.shape), axis), tuple(s for a, s in enumerate(strides) if a != axis)
        for position in range(out.shape[axis]):
            piece = np.empty(tuple(int(n) for n in row[0]), out.dtype)
            self._fill(piece, first + position * strides[axis], row[1])
            out[(slice(None),) * axis + (position,)] = piece

    def _little(self, raw: Bytes) -> Bytes:
        if not self.extent.big_endian or self.dtype.swap <= 1:
            return raw
        return raw.reshape(-1, self.dtype.swap)[:, ::-1].reshape(-1)


@dataclass(frozen=True, slots=True, kw_only=True)
class FilledTensor(TensorRef):
    """The same value everywhere: what a catalog row gives where the source has nothing."""

    spec: TensorSpec
    value: float = 0.0

    def block(self, start: Index, stop: Index) -> Array:
        shape = tuple(hi - lo for lo, hi in zip(start, stop, strict=True))
        return np.full(shape, np.array(self.value).astype(self.dtype.numpy), self.dtype.numpy)


@dataclass(frozen=True, slots=True, kw_only=True)
class MissingTensor(TensorRef):
    """A tensor of a skeleton: its spec is known, its values are not."""

    spec: TensorSpec
    name: str = ""

    def block(self, start: Index, stop: Index) -> Array:
        raise FormatError.of(
            "reference-broken",
            f"'{self.name}' has no values: the document is a skeleton",
            "Use the checkpoint itself as the source.",
            loc=(self.name,),
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


def dense_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Strides in elements of a C-order tensor."""
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= max(size, 1)
    return tuple(reversed(strides))


def as_bytes(array: Array) -> Bytes:
    """A C-order array's memory as flat bytes, for dtypes that have no buffer of their own too."""
    return array.reshape(-1).view(np.uint8) if array.size else np.zeros(0, np.uint8)


def blocks(shape: tuple[int, ...], itemsize: int, nbytes: int) -> Iterator[tuple[Index, Index]]:
    """Consecutive boxes that cover a tensor in C order, each of at most about `nbytes`."""
    if math.prod(shape) == 0:
        return
    rank, inner = len(shape), itemsize
    axis = rank
    while axis > 0 and inner * shape[axis - 1] <= nbytes:
        axis -= 1
        inner *= shape[axis]
    if axis == 0:
        yield (0,) * rank, shape
        return
    step = max(nbytes // inner, 1)
    lead = shape[: axis - 1]
    for prefix in np.ndindex(*lead):
        for low in range(0, shape[axis - 1], step):
            high = min(low + step, shape[axis - 1])
            start = (*prefix, low, *(0,) * (rank - axis))
            stop = (*(i + 1 for i in prefix), high, *shape[axis:])
            yield start, stop


def _same_layout(shape: tuple[int, ...], a: tuple[int, ...], b: tuple[int, ...]) -> bool:
    return all(n <= 1 or x == y for n, x, y in zip(shape, a, b, strict=True))
