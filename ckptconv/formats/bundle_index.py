"""The entries of a bundle's `.index`: what is stored of each tensor, and in which shard.

Layout: a table (see `sstable`) from the empty key to a BundleHeaderProto and from every other key to a
BundleEntryProto: dtype, shape, shard, offset, size, masked crc32c of the raw bytes; or, of a partitioned
variable, dtype, full shape and the extents of its slices, each of which has an entry under a key of its own
(see `ordered_code`).

Producers: TensorFlow 1.0 to 2.21 (producer version 1). Written: byte for byte what `SaveV2` writes.
Refused: newer minimum versions, unknown fields, unknown dtypes, named or unknown dimensions, sizes that are
not shape times itemsize, shards that are not counted, more axes than an array can have.

Source: tensorflow v2.21 `core/protobuf/tensor_bundle.proto`, `core/util/tensor_bundle/tensor_bundle.cc`.
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Iterable
from functools import lru_cache
from typing import NamedTuple

from google.protobuf.message import DecodeError

from ckptconv import dtypes
from ckptconv.dtypes import DType
from ckptconv.errors import CkptError, Code, FormatError, Loc, Problem
from ckptconv.formats import crc, protos
from ckptconv.formats.ordered_code import FULL, SliceExtent
from ckptconv.formats.sstable import read_table, write_table
from ckptconv.formats.varint import write_varint
from ckptconv.tensor import ByteSource

PRODUCER = 1
"""The format version that is written and read."""
_MAX_RANK = 32
_MAX_NBYTES = 2**63 - 1
_MAX_SHARDS = 99_999
_MOST_SPECS = 10_000
_NUMBERS = re.compile(
    rb"(?:\x18([\x80-\xff]{0,3}[\0-\x7f]))?(?:\x20(V))?(?:\x28(V))?\x35(.{4})".replace(
        b"V", rb"[\x80-\xff]{0,8}[\0-\x7f]"
    ),
    re.DOTALL,
)
"""Shard, offset, size and checksum as every producer writes them; none of the numbers is negative."""
_COPY_AGAIN = "Copy the file again."

Slice = tuple[SliceExtent, ...]


class Entry(NamedTuple):
    """One entry as it stands in the index."""

    dtype: DType
    shape: tuple[int, ...]
    shard: int = 0
    offset: int = 0
    nbytes: int = 0
    crc32c: int = 0
    """Unmasked."""
    slices: tuple[Slice, ...] = ()
    """Of a partitioned variable, which has no bytes of its own."""


class Index(NamedTuple):
    """The whole index."""

    num_shards: int
    big_endian: bool
    entries: dict[bytes, Entry]
    """By key, in key order; slices among them."""


def read_index(source: ByteSource) -> Index:
    """Every entry, checked against itself; whether the shards hold it is for the caller.

    I/O: reads the whole index.
    Raises: as `read_table`; unknown-dtype, limit-exceeded, unsupported-feature, with every problem found.
    """
    table = read_table(source)
    if not table or table[0][0] != b"":
        raise FormatError.of(
            "corrupt-file", f"the index has no header entry [{source.name}]", _COPY_AGAIN, loc=(source.name,)
        )
    num_shards, big_endian = _header(table[0][1], (source.name,))
    reading = _Entries(num_shards)
    entries: dict[bytes, Entry] = {}
    problems: list[Problem] = []
    for key, value in table[1:]:
        try:
            entries[key] = reading.entry(value, key)
        except DecodeError:
            problems.append(_problem("corrupt-file", f"{len(value)} bytes are no BundleEntryProto", key))
        except CkptError as error:
            problems.extend(error.problems)
    if problems:
        raise FormatError(*problems)
    return Index(num_shards, big_endian, entries)


def _header(data: bytes, loc: Loc) -> tuple[int, bool]:
    header = protos.parse(protos.BundleHeaderProto, data, loc)
    if header.version.min_consumer > PRODUCER or PRODUCER in header.version.bad_consumers:
        raise FormatError.of(
            "unsupported-feature",
            f"the bundle wants a reader of version {header.version.min_consumer}, this one is {PRODUCER}",
            "Save it with TensorFlow 2.21 or older.",
            loc=loc,
        )
    if header.endianness not in (0, 1):
        raise FormatError.of(
            "corrupt-file", f"endianness {header.endianness}, expected 0 or 1", _COPY_AGAIN, loc=loc
        )
    if not 0 < header.num_shards <= _MAX_SHARDS:
        raise FormatError.of(
            "corrupt-file", f"{header.num_shards} shards, expected 1 to {_MAX_SHARDS}", _COPY_AGAIN, loc=loc
        )
    return header.num_shards, header.endianness == 1


class _Entries:
    """Reads the entries of one index.

    Most begin with the same bytes as one before, the fields of dtype and shape; of them the numbers behind
    these are all that is read.
    """

    __slots__ = ("_num_shards", "_parse", "_specs")

    def __init__(self, num_shards: int) -> None:
        self._num_shards = num_shards
        self._parse = protos.decoder(protos.BundleEntryProto)
        self._specs: dict[bytes, tuple[DType, tuple[int, ...], int]] = {}

    def entry(self, value: bytes, key: bytes) -> Entry:
        """An entry from its message. Raises: DecodeError where it is none, and what `read_index` raises."""
        head = value[: 4 + value[3]] if _begins_plain(value) else b""
        numbers = _NUMBERS.fullmatch(value, len(head)) if head else None
        if numbers is None:
            return self._parsed(value, key)
        spec = self._specs.get(head)
        if spec is None:
            entry = self._parsed(value, key)
            if len(self._specs) < _MOST_SPECS:
                self._specs[head] = entry.dtype, entry.shape, math.prod(entry.shape) * entry.dtype.itemsize
            return entry
        shard, offset, nbytes, crc32c = numbers.groups()
        return self._placed(
            *spec, _varint(shard), _varint(offset), _varint(nbytes), int.from_bytes(crc32c, "little"), key
        )

    def _parsed(self, value: bytes, key: bytes) -> Entry:
        proto = self._parse(value)
        protos.refuse_unknown(proto, protos.BundleEntryProto, (_text(key),))
        shape_proto = proto.shape
        shape = tuple([dim.size for dim in shape_proto.dim])
        if shape_proto.unknown_rank or any(dim.name for dim in shape_proto.dim):
            raise _refuse("unsupported-feature", "named dimensions or an unknown rank", key)
        checked = checked_spec(proto.dtype, shape)
        if isinstance(checked[1], str):
            raise _refuse(checked[0], checked[1], key)
        if proto.slices:
            if proto.shard_id or proto.offset or proto.size or proto.crc32c:
                raise _refuse("corrupt-file", "a partitioned variable has bytes of its own", key)
            slices = tuple(slice_of(part, shape, key) for part in proto.slices)
            return Entry(checked[0], shape, slices=slices)
        dtype, expected = checked
        return self._placed(
            dtype, shape, expected, proto.shard_id, proto.offset, proto.size, proto.crc32c, key
        )

    def _placed(
        self,
        dtype: DType,
        shape: tuple[int, ...],
        expected: int,
        shard: int,
        offset: int,
        nbytes: int,
        masked: int,
        key: bytes,
    ) -> Entry:
        """The entry of a tensor with bytes of its own, `expected` as many if they are not encoded."""
        if not 0 <= shard < self._num_shards:
            raise _refuse("corrupt-file", f"shard {shard} of {self._num_shards}", key)
        if offset < 0 or nbytes < 0 or (dtype.itemsize and nbytes != expected):
            raise _refuse(
                "corrupt-file",
                f"{dtype.name}{list(shape)} needs {expected} bytes, {nbytes} at offset {offset} are stated",
                key,
            )
        if dtype.itemsize == 0 and nbytes < math.prod(shape):
            # An element's length is at least one byte.
            raise _refuse("corrupt-file", f"{math.prod(shape)} elements in {nbytes} bytes", key)
        return Entry(dtype, shape, shard, offset, nbytes, crc.unmask(masked))


def _begins_plain(value: bytes) -> bool:
    """Whether the first fields are a dtype and a shape, each with its number or length in one byte."""
    return len(value) > 4 and value[0] == 0x08 and value[1] < 0x80 and value[2] == 0x12 and value[3] < 0x80


def _varint(raw: bytes | None) -> int:
    """The number of a field, 0 where there is none."""
    value = 0
    for byte in reversed(raw or b""):
        value = value << 7 | byte & 0x7F
    return value


@lru_cache(maxsize=4096)
def checked_spec(enum: int, shape: tuple[int, ...]) -> tuple[DType, int] | tuple[Code, str]:
    """The dtype and the bytes of a dense tensor (0 for encoded ones), or what is wrong with a spec.

    A large checkpoint has few specs, and to check them is most of the time that an entry would take.
    """
    dtype = dtypes.BY_TENSORFLOW.get(enum)
    if dtype is None:
        return "unknown-dtype", f"dtype {enum} is none of TensorFlow's that are stored"
    if len(shape) > _MAX_RANK:
        return "limit-exceeded", f"{len(shape)} axes, at most {_MAX_RANK} are read"
    if shape and min(shape) < 0:
        return "corrupt-file", f"shape {list(shape)}"
    # An axis of 0 elements must not hide an overflow of the others from whoever computes strides.
    if math.prod(size or 1 for size in shape) * max(dtype.itemsize, 1) > _MAX_NBYTES:
        return "limit-exceeded", f"shape {list(shape)} has over 2^63 bytes"
    return dtype, math.prod(shape) * dtype.itemsize


def slice_of(proto: protos.TensorSliceProto, shape: tuple[int, ...], key: bytes) -> Slice:
    """The extents of a slice of a tensor. Raises: corrupt-file."""
    extents = []
    for extent in proto.extent:
        full = not extent.HasField("length")
        if extent.start < 0 or (extent.start if full else extent.length) < 0 or (full and extent.start):
            raise _refuse("corrupt-file", f"a slice of {extent.length} from {extent.start} on", key)
        extents.append(FULL if full else (extent.start, extent.length))
    if len(extents) != len(shape) or any(
        start + max(length, 0) > size for (start, length), size in zip(extents, shape, strict=True)
    ):
        raise _refuse("corrupt-file", f"slice {extents} does not lie in shape {list(shape)}", key)
    return tuple(extents)


def write_index(num_shards: int, entries: Iterable[tuple[bytes, Entry]]) -> list[bytes]:
    """The bytes of an index, in pieces; the entries may come in any order."""
    header = protos.new(protos.BundleHeaderProto)
    header.num_shards = num_shards
    header.version.producer = PRODUCER
    rows = sorted((key, _entry_bytes(entry)) for key, entry in entries)
    return list(write_table([(b"", header.SerializeToString()), *rows]))


@lru_cache(maxsize=4096)
def _entry_head(dtype: DType, shape: tuple[int, ...], slices: tuple[Slice, ...]) -> bytes:
    proto = protos.new(protos.BundleEntryProto)
    assert dtype.tensorflow is not None
    proto.dtype = dtype.tensorflow
    proto.shape.SetInParent()
    for size in shape:
        proto.shape.dim.add().size = size
    for extents in slices:
        part = proto.slices.add()
        for start, length in extents:
            extent = part.extent.add()
            if (start, length) != FULL:
                extent.start, extent.length = start, length
    return proto.SerializeToString(deterministic=True)


def _entry_bytes(entry: Entry) -> bytes:
    """As the message would serialize; most entries share their first fields, the rest is numbers."""
    head = _entry_head(entry.dtype, entry.shape, entry.slices)
    if entry.slices:
        return head
    numbers = ((b"\x18", entry.shard), (b"\x20", entry.offset), (b"\x28", entry.nbytes))
    tail = b"".join(tag + write_varint(value) for tag, value in numbers if value)
    return head + tail + b"\x35" + struct.pack("<I", crc.mask(entry.crc32c))


def _text(key: bytes) -> str:
    return key.decode("utf-8", "backslashreplace")


def _problem(code: Code, message: str, key: bytes) -> Problem:
    return Problem(code=code, loc=(_text(key),), message=f"'{_text(key)}': {message}", hint=_COPY_AGAIN)


def _refuse(code: Code, message: str, key: bytes) -> CkptError:
    return FormatError(_problem(code, message, key))
