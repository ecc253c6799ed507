"""The LevelDB table ("SSTable") that a bundle's `.index` is: sorted keys with values.

Layout, all fixed integers little-endian:
- data blocks, a metaindex block (empty), an index block, a footer of 48 bytes;
- block = entries, `u32` offset of each restart, `u32` number of restarts; behind it a trailer of 5 bytes:
  `u8` compression (0 none, 1 snappy) and the `u32` masked crc32c of block and compression byte;
- entry = varint shared, varint unshared, varint value length, the key's last `unshared` bytes, the value; the
  first `shared` bytes are the previous key's; `shared` is 0 at each restart;
- index block: per data block a key >= its last and < the next one's first, and its handle (varint offset,
  varint size without trailer);
- footer = metaindex handle, index handle, zeros to byte 40, magic `57 fb 80 8b 24 75 47 db`.

Producers: TensorFlow 1 and 2 (uncompressed, blocks of 256 KiB, 16 entries a restart; a larger value has a
block to itself), LevelDB (snappy).
Written: byte for byte what TensorFlow's `TableBuilder` writes.
Refused: checksums that do not match, keys that do not increase, blocks that overlap, restarts or separators
that contradict the entries, a filled metaindex, keys that expand beyond what 16 entries a restart can.

Source: tensorflow `tsl/lib/io/{format,table_builder,block,block_builder}.cc`, leveldb `doc/table_format.md`.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from ckptconv.errors import CkptError, Code, FormatError, Loc
from ckptconv.formats import crc, snappy
from ckptconv.formats.peek import Peek
from ckptconv.formats.varint import read_varint, write_varint
from ckptconv.tensor import ByteSource, Checksum, Extent

MAGIC = bytes.fromhex("57fb808b247547db")
FOOTER_NBYTES = 48

_TRAILER_NBYTES = 5
_HANDLES_NBYTES = FOOTER_NBYTES - len(MAGIC)
_BLOCK_NBYTES = 262_144
_DATA_RESTART, _INDEX_RESTART = 16, 1
_COUNT_NBYTES = 4
_MAX_BLOCK_NBYTES = 256 << 20
_KEY_EXPANSION = 64
"""Bytes of keys per byte of table; with a full key every 16 entries it stays below 16."""

Entry = tuple[bytes, bytes]
Handle = tuple[int, int]
V = TypeVar("V")


def read_table(source: ByteSource) -> list[Entry]:
    """All keys with their values, in order; every block's checksum is verified.

    I/O: reads the whole table, a block at a time.
    Raises: truncated-file, corrupt-file, checksum-mismatch, duplicate-key, limit-exceeded,
    unsupported-feature.
    """
    return _table(source, _Reader.entries)


def places(source: ByteSource) -> list[tuple[bytes, Extent]]:
    """All keys in order with where their values lie; each is within its block, whose checksum is recorded.

    I/O: reads keys, and as much of the values as lies near them; the checksums of the blocks are left to
    whoever reads the values.
    Raises: as `read_table`; unsupported-feature for a compressed block.
    """
    return _table(source, _Reader.places)


def _table(
    source: ByteSource, load: Callable[[_Reader, Handle], list[tuple[bytes, V]]]
) -> list[tuple[bytes, V]]:
    loc = (source.name,)
    metaindex, index = _footer(source, loc)
    if _Reader(source, loc).entries(metaindex):
        raise _error(
            "unsupported-feature", "the table's metaindex is not empty", loc, "Write it with TensorFlow."
        )
    reader = _Reader(source, loc)
    entries: list[tuple[bytes, V]] = []
    separator: bytes | None = None
    end = 0
    for upper, value in _Reader(source, loc).entries(index):
        offset, size = _handle(value, 0, loc)[0]
        if offset < end:
            raise _error("corrupt-file", f"a block at {offset} overlaps the one that ends at {end}", loc)
        end = offset + size + _TRAILER_NBYTES
        before = len(entries)
        entries += load(reader, (offset, size))
        if (
            len(entries) == before
            or entries[-1][0] > upper
            or (separator and entries[before][0] <= separator)
        ):
            raise _error(
                "corrupt-file", f"the index entry of the block at {offset} does not bound its keys", loc
            )
        separator = upper
    return entries


def _footer(source: ByteSource, loc: Loc) -> tuple[Handle, Handle]:
    if source.nbytes < FOOTER_NBYTES:
        raise _error(
            "truncated-file",
            f"a table needs {FOOTER_NBYTES} bytes of footer, the file has {source.nbytes}",
            loc,
        )
    footer = _read(source, source.nbytes - FOOTER_NBYTES, FOOTER_NBYTES)
    if footer[_HANDLES_NBYTES:] != MAGIC:
        raise _error(
            "corrupt-file",
            f"a table ends with {MAGIC.hex()}, this file with {footer[_HANDLES_NBYTES:].hex()}",
            loc,
        )
    metaindex, position = _handle(footer[:_HANDLES_NBYTES], 0, loc)
    index, position = _handle(footer[:_HANDLES_NBYTES], position, loc)
    if any(footer[position:_HANDLES_NBYTES]):
        raise _error("corrupt-file", "the footer's padding is not zero", loc)
    return metaindex, index


def _handle(data: bytes, position: int, loc: Loc) -> tuple[Handle, int]:
    offset, position = read_varint(data, position, loc)
    size, position = read_varint(data, position, loc)
    return (offset, size), position


class _Reader:
    """Decodes blocks whose keys go on from one to the next."""

    def __init__(self, source: ByteSource, loc: Loc) -> None:
        self._source = source
        self._loc = loc
        self._last: bytes | None = None
        self._budget = _KEY_EXPANSION * source.nbytes
        """Bytes of keys that may still come: shared prefixes must not multiply."""

    def entries(self, handle: Handle) -> list[Entry]:
        """The entries of one block, which is verified."""
        block = self._block(*handle)
        return [(key, block[start:stop]) for key, start, stop in self._walk(block)]

    def places(self, handle: Handle) -> list[tuple[bytes, Extent]]:
        """The entries of one block, which is not read."""
        offset, size = handle
        self._check_bounds(offset, size)
        trailer = _read(self._source, offset + size, _TRAILER_NBYTES)
        if trailer[0] != 0:
            raise _error("unsupported-feature", f"block at {offset} has compression {trailer[0]}", self._loc)
        (stored,) = struct.unpack_from("<I", trailer, 1)
        recorded = Checksum(kind="crc32c", value=crc.unmask(stored))
        whole = Extent(source=self._source, offset=offset, nbytes=size + 1, checksum=recorded)
        return [
            (key, Extent(source=self._source, offset=offset + start, nbytes=stop - start, within=whole))
            for key, start, stop in self._walk(Peek(self._source, offset, size))
        ]

    def _walk(self, block: bytes | Peek) -> list[tuple[bytes, int, int]]:
        """Keys of a block, and where in it their values begin and end."""
        loc = self._loc
        if len(block) < _COUNT_NBYTES:
            raise _error("corrupt-file", f"a block of {len(block)} bytes has no room for its restarts", loc)
        (restarts,) = struct.unpack("<I", block[len(block) - _COUNT_NBYTES : len(block)])
        end = len(block) - _COUNT_NBYTES * (restarts + 1)
        if end < 0 or restarts == 0:
            raise _error("corrupt-file", f"a block of {len(block)} bytes states {restarts} restarts", loc)
        unseen = struct.unpack(f"<{restarts}I", block[end : len(block) - _COUNT_NBYTES])
        result: list[tuple[bytes, int, int]] = []
        if unseen[0] != 0:
            raise _error("corrupt-file", f"a block's first restart is at {unseen[0]}, not 0", loc)
        points, reached = set(unseen), 0
        position, key, last = 0, b"", self._last
        while position < end:
            start = position
            shared, unshared, size = (
                block[position : position + 3] if position + 3 <= end else b"\xff\xff\xff"
            )
            if (shared | unshared | size) < 0x80:
                position += 3
            else:
                shared, position = read_varint(block, position, loc)
                unshared, position = read_varint(block, position, loc)
                size, position = read_varint(block, position, loc)
            value_at = position + unshared
            next_at = value_at + size
            if next_at > end or shared > len(key):
                raise _error(
                    "corrupt-file",
                    f"an entry at {start} needs {shared} shared and {next_at - position} own bytes, "
                    f"{len(key)} and {end - position} are there",
                    loc,
                )
            if start in points:
                reached += 1
                if shared:
                    raise _error("corrupt-file", f"the entry at restart {start} shares {shared} bytes", loc)
            self._budget -= shared + unshared
            if self._budget < 0:
                raise _error("limit-exceeded", f"keys expand to over {_KEY_EXPANSION} times the file", loc)
            key = key[:shared] + block[position:value_at]
            if last is not None and key <= last:
                raise _unordered(last, key, loc)
            last = key
            result.append((key, value_at, next_at))
            position = next_at
        if reached != len(points) and not (end == 0 and points == {0}):
            raise _error("corrupt-file", f"{len(points) - reached} restarts of a block are at no entry", loc)
        self._last = last
        return result

    def _block(self, offset: int, size: int) -> bytes:
        loc = self._loc
        self._check_bounds(offset, size)
        if size > _MAX_BLOCK_NBYTES:
            raise _error(
                "limit-exceeded", f"a block of {size} bytes, at most {_MAX_BLOCK_NBYTES} are read", loc
            )
        raw = _read(self._source, offset, size + _TRAILER_NBYTES)
        (stored,) = struct.unpack_from("<I", raw, size + 1)
        found = crc.mask(crc.crc32c(memoryview(raw)[: size + 1]))
        if found != stored:
            raise _error(
                "checksum-mismatch",
                f"block at {offset}: {stored:#010x} recorded, {found:#010x} computed",
                loc,
            )
        block, compression = raw[:size], raw[size]
        if compression == 1:
            block = snappy.decode(block, loc)
        elif compression != 0:
            raise _error("unsupported-feature", f"block at {offset} has compression {compression}", loc)
        return block

    def _check_bounds(self, offset: int, size: int) -> None:
        """Raises: truncated-file."""
        end, limit = offset + size + _TRAILER_NBYTES, self._source.nbytes - FOOTER_NBYTES
        if end > limit:
            message = f"a block needs bytes {offset}..{end}, the blocks end at {limit}"
            raise _error("truncated-file", message, self._loc)


def _read(source: ByteSource, offset: int, nbytes: int) -> bytes:
    out = bytearray(nbytes)
    source.read_into(offset, memoryview(out))
    return bytes(out)


def _error(code: Code, message: str, loc: Loc, hint: str = "Copy the file again.") -> CkptError:
    return FormatError.of(code, f"{message} [{loc[0]}]", hint, loc=loc)


def _unordered(last: bytes, key: bytes, loc: Loc) -> CkptError:
    text = key.decode("utf-8", "backslashreplace")
    if key == last:
        return FormatError.of(
            "duplicate-key", f"'{text}' stands twice [{loc[0]}]", "Save it again.", loc=(*loc, text)
        )
    return _error("corrupt-file", f"key {key!r} stands behind {last!r}", loc)


def write_table(entries: Iterable[Entry]) -> Iterator[bytes]:
    """The bytes of a table, block by block; keys must come in strictly increasing order."""
    index = _BlockBuilder(_INDEX_RESTART)
    offset, last, handle = 0, b"", b""
    for first, block_last, data in _data_blocks(entries):
        if offset:
            index.add(_separator(last, first), handle)
        last, handle = block_last, _handle_bytes(offset, len(data))
        yield _with_trailer(data)
        offset += len(data) + _TRAILER_NBYTES
    if offset:
        index.add(_successor(last), handle)
    footer = b""
    for data in (_BlockBuilder(_DATA_RESTART).finish(), index.finish()):
        yield _with_trailer(data)
        footer += _handle_bytes(offset, len(data))
        offset += len(data) + _TRAILER_NBYTES
    yield footer.ljust(_HANDLES_NBYTES, b"\0") + MAGIC


def _data_blocks(entries: Iterable[Entry]) -> Iterator[tuple[bytes, bytes, bytes]]:
    """First key, last key and bytes of each data block, cut where TensorFlow cuts them."""
    block = _BlockBuilder(_DATA_RESTART)
    first = last = b""
    for key, value in entries:
        if block.count and len(key) + len(value) >= 2 * _BLOCK_NBYTES:
            yield first, last, block.finish()
        if not block.count:
            first = key
        block.add(key, value)
        last = key
        if block.nbytes >= _BLOCK_NBYTES:
            yield first, last, block.finish()
    if block.count:
        yield first, last, block.finish()


class _BlockBuilder:
    """One block while it grows."""

    def __init__(self, restart_interval: int) -> None:
        self._interval = restart_interval
        self._clear()

    def _clear(self) -> None:
        self._parts: list[bytes] = []
        self._size = 0
        self._restarts = [0]
        self._last = b""
        self.count = 0

    @property
    def nbytes(self) -> int:
        return self._size + 4 * len(self._restarts) + 4

    def add(self, key: bytes, value: bytes) -> None:
        shared = 0
        if self.count % self._interval == 0:
            if self.count:
                self._restarts.append(self._size)
        else:
            shared = _shared_nbytes(self._last, key)
        unshared = len(key) - shared
        if max(shared, unshared, len(value)) < 0x80:
            head = bytes((shared, unshared, len(value)))
        else:
            head = write_varint(shared) + write_varint(unshared) + write_varint(len(value))
        self._parts += (head, key[shared:], value)
        self._size += len(head) + unshared + len(value)
        self._last = key
        self.count += 1

    def finish(self) -> bytes:
        """The block's bytes; the builder is empty again."""
        restarts = struct.pack(f"<{len(self._restarts) + 1}I", *self._restarts, len(self._restarts))
        data = b"".join((*self._parts, restarts))
        self._clear()
        return data


def _shared_nbytes(a: bytes, b: bytes) -> int:
    """Length of the common prefix."""
    limit = min(len(a), len(b))
    if a[:limit] == b[:limit]:
        return limit
    low, high = 0, limit
    while high - low > 1:
        middle = (low + high) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle
    return low


def _separator(last: bytes, following: bytes) -> bytes:
    """A short key that is >= `last` and < `following`."""
    at = _shared_nbytes(last, following)
    if at < min(len(last), len(following)) and last[at] < 0xFF and last[at] + 1 < following[at]:
        return last[:at] + bytes((last[at] + 1,))
    return last


def _successor(last: bytes) -> bytes:
    """A short key that is >= `last`."""
    for at, byte in enumerate(last):
        if byte != 0xFF:
            return last[:at] + bytes((byte + 1,))
    return last


def _handle_bytes(offset: int, size: int) -> bytes:
    return write_varint(offset) + write_varint(size)


def _with_trailer(block: bytes) -> bytes:
    tagged = block + b"\0"
    return tagged + struct.pack("<I", crc.mask(crc.crc32c(tagged)))
