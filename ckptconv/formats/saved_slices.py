"""TensorFlow's first checkpoint format ("V1"): a table whose values are the tensors, sliced.

Layout: a table (see `sstable`) from the empty key to a SavedTensorSlices with the field 1, `meta`: of every
tensor its name, shape, dtype and slices; and from the key of every slice (see `ordered_code`; a tensor that
is not partitioned is one slice of full axes) to a SavedTensorSlices with the field 2, `data`: a SavedSlice of
1 name, 2 slice, 3 TensorProto. The latter has one typed field only, packed, and neither dtype nor shape:
5 float, 6 double, 9 complex64 and 12 complex128 (two each): fixed-width, little-endian, which is a tensor's
bytes as they lie; 7 all small integers, quantized ones too, 10 int64, 11 bool, 13 half (its bits): varints
(see `varint_tensor`); 8 string: one field for each element. A value's only checksum is its block's.

Files: one, with the checkpoint's own name and no suffix; of a sharded Saver `P-00000-of-00002` and so on,
each with a `meta` of its own. Producers: TensorFlow 0.5 to 2.21, with `Saver(write_version=V1)`. Read only:
what is written is a TensorBundle, which every `Saver.restore` since TensorFlow 0.12 takes as well.

Refused: what `sstable` refuses, compressed blocks, slices that only one of `meta` and the table has, that
stand in two shards, leave gaps or overlap, values of another name, slice, dtype or number of elements than
is stated, fields that are not packed in one run, dtypes that TensorFlow never saved so.

Source: tensorflow v2.21 `core/util/{saved_tensor_slice.proto,tensor_slice_writer.h,tensor_slice_reader.cc}`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from ckptconv.dtypes import DType
from ckptconv.errors import CkptError, Code, FormatError, Problem
from ckptconv.formats import crc, protos
from ckptconv.formats.bundle_index import PRODUCER, Slice, checked_spec, slice_of
from ckptconv.formats.bundle_origin import Attributes, Partition, attributes_of
from ckptconv.formats.bundle_slices import Box, assemble, bounds
from ckptconv.formats.ordered_code import FULL, slice_key
from ckptconv.formats.peek import Peek
from ckptconv.formats.sstable import places
from ckptconv.formats.string_tensor import of_strings
from ckptconv.formats.varint import read_varint
from ckptconv.formats.varint_tensor import VarintTensor, may_hold
from ckptconv.source import ByteSource, open_source
from ckptconv.tensor import (
    PANEL_NBYTES,
    WINDOW_NBYTES,
    Bytes,
    Extent,
    StoredTensor,
    TensorRef,
    TensorSpec,
)

_FIELDS: Mapping[str, int] = {
    "float32": 5,
    "float64": 6,
    **dict.fromkeys(("int32", "int16", "int8", "uint16", "uint8", "qint32", "qint8", "quint8"), 7),
    "string": 8,
    "complex64": 9,
    "int64": 10,
    "bool": 11,
    "complex128": 12,
    "float16": 13,
}
"""Field of a TensorProto that holds the elements, of every dtype that was ever saved so."""
_FIXED = frozenset({5, 6, 9, 12})
_STRINGS = _FIELDS["string"]
_META, _DATA = 1, 2
_NAME, _SLICE, _TENSOR = 1, 2, 3
_LENGTH_DELIMITED = 2
_CRC_NBYTES = 4


class _Field(NamedTuple):
    """Number of a field, and where its content begins and ends."""

    number: int
    start: int
    stop: int


class _Stated(NamedTuple):
    """A tensor as the metas describe it."""

    dtype: DType
    shape: tuple[int, ...]
    slices: list[Slice]
    shards: list[int]


@dataclass(frozen=True, slots=True, kw_only=True)
class ProtoStrings(TensorRef):
    """Strings, one field each; read as a bundle encodes them (see `string_tensor`)."""

    spec: TensorSpec
    extent: Extent
    name: str = ""

    @property
    def extents(self) -> tuple[Extent, ...]:
        return (self.extent,)

    def windows(self, nbytes: int = WINDOW_NBYTES, panel_nbytes: int = PANEL_NBYTES) -> Iterator[Bytes]:
        """Holds all the strings, whose lengths come before them.

        Raises: corrupt-file.
        """
        data = StoredTensor.raw(self.extent).read().tobytes()
        fields = list(_fields(data, 0, len(data), self.name))
        if len(fields) != self.spec.numel or any(field.number != _STRINGS for field in fields):
            raise _error("corrupt-file", self.name, f"{len(fields)} fields for {self.spec.numel} strings")
        encoded = of_strings([data[field.start : field.stop] for field in fields], self.shape, self.name)
        if encoded.spec != self.spec:
            raise _error("corrupt-file", self.name, "lengths that take more bytes than they need")
        yield from encoded.windows(nbytes, panel_nbytes)


class SliceReading:
    """Makes tensors of the files of one checkpoint."""

    def __init__(self, files: Sequence[Path]) -> None:
        self._sources = [open_source(path) for path in files]
        self._stated: dict[str, _Stated] = {}
        self._values: dict[bytes, tuple[int, Extent]] = {}
        """Slice key -> shard and value."""
        self._problems: list[Problem] = []

    def tensors(self) -> tuple[dict[str, TensorRef], Attributes]:
        """Tensors by name, and the attributes that say where they were.

        I/O: reads the metas and what lies around the tensors.
        Raises: those of `sstable.places`; corrupt-file, checksum-mismatch, unknown-dtype, duplicate-key,
        limit-exceeded, unsupported-feature, with every problem found.
        """
        for shard, source in enumerate(self._sources):
            self._read_table(shard, source)
        result: dict[str, TensorRef] = {}
        shards: dict[str, int] = {}
        partitions: dict[str, Partition] = {}
        for name, stated in sorted(self._stated.items(), key=lambda item: item[0].encode()):
            before = len(self._problems)
            boxes = [self._box(name, stated, number) for number in range(len(stated.slices))]
            if stated.slices == [(FULL,) * len(stated.shape)]:
                shards[name] = stated.shards[0]
            else:
                partitions[name] = Partition(stated.shape, tuple(stated.slices), tuple(stated.shards))
            if len(self._problems) > before:
                continue
            try:
                result[name] = assemble([box for box in boxes if box], stated.shape, (name,))
            except CkptError as error:
                self._problems.extend(error.problems)
        for key in self._values:
            self._complain("corrupt-file", repr(key), "a slice that no meta describes")
        if self._problems:
            raise FormatError(*self._problems)
        return result, attributes_of(len(self._sources), shards, partitions)

    def _read_table(self, shard: int, source: ByteSource) -> None:
        table = places(source)
        if not table or table[0][0] != b"":
            raise _error("corrupt-file", source.name, "no entry that describes its tensors")
        meta = protos.parse(protos.SavedTensorSlices, _verified(table[0][1]), (source.name,)).meta
        if meta.versions.min_consumer > PRODUCER or PRODUCER in meta.versions.bad_consumers:
            raise FormatError.of(
                "unsupported-feature",
                f"the checkpoint wants a reader of version {meta.versions.min_consumer}, this is {PRODUCER}",
                "Save it with TensorFlow 2.21 or older.",
                loc=(source.name,),
            )
        for described in meta.tensor:
            try:
                self._describe(shard, described)
            except CkptError as error:
                self._problems.extend(error.problems)
        for key, value in table[1:]:
            if key in self._values:
                self._complain("duplicate-key", repr(key), "the slice stands in two shards")
            self._values[key] = shard, value

    def _describe(self, shard: int, described: protos.SavedSliceMeta) -> None:
        """Raises: corrupt-file, unknown-dtype, limit-exceeded, unsupported-feature."""
        name, key = described.name, described.name.encode()
        shape = tuple([dim.size for dim in described.shape.dim])
        checked = checked_spec(described.type, shape)
        if isinstance(checked[1], str):
            self._complain(checked[0], name, checked[1])
            return
        dtype = checked[0]
        if dtype.name not in _FIELDS or described.shape.unknown_rank:
            what = "an unknown rank" if described.shape.unknown_rank else f"elements of {dtype.name}"
            self._complain("unsupported-feature", name, f"{what}, which no TensorFlow saves in this format")
            return
        stated = self._stated.setdefault(name, _Stated(dtype, shape, [], []))
        if (stated.dtype, stated.shape) != (dtype, shape):
            self._complain(
                "corrupt-file",
                name,
                f"{dtype.name}{list(shape)} in one shard, {stated.dtype.name}{list(stated.shape)} in another",
            )
            return
        stated.slices.extend(slice_of(part, shape, key) for part in described.slice)
        stated.shards.extend([shard] * len(described.slice))

    def _box(self, name: str, stated: _Stated, number: int) -> Box | None:
        extents = stated.slices[number]
        found = self._values.pop(slice_key(name, extents), None)
        start, stop = bounds(extents, stated.shape)
        if found is None:
            self._complain("corrupt-file", name, f"the slice {start} to {stop} is not there, or stated twice")
            return None
        try:
            return Box(start, stop, _tensor(name, stated, extents, found[1]))
        except CkptError as error:
            self._problems.extend(error.problems)
            return None

    def _complain(self, code: Code, name: str, what: str) -> None:
        self._problems.append(_problem(code, name, what))


def _tensor(name: str, stated: _Stated, extents: Slice, value: Extent) -> TensorRef:
    """The tensor of one value. Raises: corrupt-file, unsupported-feature."""
    data = Peek(value.source, value.offset, value.nbytes)
    ((_, start, stop),) = _exactly((_DATA,), data, 0, len(data), name)
    title, box, tensor = _exactly((_NAME, _SLICE, _TENSOR), data, start, stop, name)
    if data[title.start : title.stop] != name.encode():
        raise _error("corrupt-file", name, f"its value is that of {data[title.start : title.stop]!r}")
    proto = protos.parse(protos.TensorSliceProto, data[box.start : box.stop], (name,))
    if slice_of(proto, stated.shape, name.encode()) != extents:
        raise _error("corrupt-file", name, "its value is that of another slice")
    dtype, field = stated.dtype, _FIELDS[stated.dtype.name]
    shape = tuple(high - low for low, high in zip(*bounds(extents, stated.shape), strict=True))
    numel = math.prod(shape)
    if field == _STRINGS:
        if shape != stated.shape:
            raise _error("unsupported-feature", name, "slices of strings", "Save it unpartitioned.")
        # A tag for each string stands where a bundle has one checksum.
        nbytes = tensor.stop - tensor.start - numel + _CRC_NBYTES
        if nbytes < numel + _CRC_NBYTES:
            raise _error("corrupt-file", name, f"{tensor.stop - tensor.start} bytes for {numel} strings")
        spec = TensorSpec(dtype=dtype, shape=shape, encoded_nbytes=nbytes)
        return ProtoStrings(spec=spec, extent=_part(value, tensor), name=name)
    if numel:
        (tensor,) = _exactly((field,), data, tensor.start, tensor.stop, name)
    spec, extent = TensorSpec(dtype=dtype, shape=shape), _part(value, tensor)
    if field not in _FIXED:
        if not may_hold(extent.nbytes, shape):
            raise _error("corrupt-file", name, f"{extent.nbytes} bytes for {numel} elements")
        return VarintTensor(spec=spec, extent=extent, name=name)
    if extent.nbytes != spec.nbytes:
        needed = f"{dtype.name}{list(shape)} needs {spec.nbytes}"
        raise _error("corrupt-file", name, f"{extent.nbytes} bytes, {needed}")
    return StoredTensor.dense(spec, extent)


def _exactly(fields: tuple[int, ...], data: Peek, start: int, stop: int, name: str) -> list[_Field]:
    """The fields of a message, which must be these, each once. Raises: corrupt-file, unsupported-feature."""
    found = list(islice(_fields(data, start, stop, name), len(fields) + 1))
    numbers = tuple(field.number for field in found)
    if numbers != fields:
        raise _error("corrupt-file", name, f"fields {numbers} of a message, expected {fields}")
    return found


def _fields(data: bytes | Peek, start: int, stop: int, name: str) -> Iterator[_Field]:
    """The fields of a message, all of which must have their length before them, as packed numbers have."""
    while start < stop:
        tag, start = read_varint(data, start, (name,))
        if tag & 7 != _LENGTH_DELIMITED:
            what = f"a field {tag >> 3} that is not packed"
            raise _error("unsupported-feature", name, what, "Save it with TensorFlow.")
        nbytes, start = read_varint(data, start, (name,))
        if nbytes > stop - start:
            raise _error("corrupt-file", name, f"a field of {nbytes} bytes, {stop - start} are there")
        yield _Field(tag >> 3, start, start + nbytes)
        start += nbytes


def _part(value: Extent, field: _Field) -> Extent:
    nbytes = field.stop - field.start
    return Extent(source=value.source, offset=value.offset + field.start, nbytes=nbytes, within=value.within)


def _verified(value: Extent) -> bytes:
    """The bytes of a value whose block has the checksum that is recorded of it. Raises: checksum-mismatch."""
    block = value.checked
    found = 0
    for piece in StoredTensor.raw(block).windows():
        found = crc.extend(found, piece.tobytes())
    if block.checksum is not None and found != block.checksum.value:
        raise _error(
            "checksum-mismatch",
            value.source.name,
            f"block at {block.offset}: {block.checksum.value:#010x} recorded, {found:#010x} computed",
        )
    return StoredTensor.raw(value).read().tobytes()


def _problem(code: Code, name: str, what: str, hint: str = "Copy the file again.") -> Problem:
    return Problem(code=code, loc=(name,), message=f"'{name}': {what}", hint=hint)


def _error(code: Code, name: str, what: str, hint: str = "Copy the file again.") -> CkptError:
    return FormatError(_problem(code, name, what, hint))
