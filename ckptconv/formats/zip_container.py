"""The zip container below PyTorch files: its records as extents.

Byte layout, little-endian. Each record is a local header (30 bytes, signature `PK\\3\\4`, name, extra
field), its data, and a data descriptor (`PK\\7\\b`, crc32, two sizes; 24 bytes instead of 16 where zip64
applies). The central directory (46 bytes per record, `PK\\1\\2`) follows, then the zip64 end record
(56 bytes, `PK\\6\\6`), its locator (20 bytes, `PK\\6\\7`) and the end record (22 bytes, `PK\\5\\6`).

Reading takes sizes and checksums from the central directory, since PyTorch leaves them zero in the local
header, and the data offset from the local header, whose extra field is the longer one. Stored and deflated
records are read; a deflated one is inflated as a stream into an unnamed temporary file when it is first
asked for. Zeros after the end record are accepted.

Refused: encrypted records, other methods, several disks, overlapping records, names that differ between
header and directory, names that leave the archive, repeated names, sizes beyond the file, and archives
that inflate to more than `_MAX_RATIO` times their size.

Source: PKWARE APPNOTE 6.3.10; torch 2.13 `torch/serialization.py`, `third_party/miniz-3.0.2/miniz.c`.
"""

from __future__ import annotations

import itertools
import struct
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from ckptconv.errors import FormatError
from ckptconv.formats.zip_inflate import InflatedSource, Scratch
from ckptconv.formats.zip_record import Record, problem
from ckptconv.source import ByteSource, Distant
from ckptconv.tensor import Extent

LOCAL_SIGNATURE = b"PK\x03\x04"
CENTRAL_SIGNATURE = b"PK\x01\x02"
DESCRIPTOR_SIGNATURE = b"PK\x07\x08"
END64_SIGNATURE = b"PK\x06\x06"
LOCATOR_SIGNATURE = b"PK\x06\x07"
END_SIGNATURE = b"PK\x05\x06"

LOCAL = struct.Struct("<4s5H3L2H")
CENTRAL = struct.Struct("<4s6H3L5H2L")
END64 = struct.Struct("<4sQ2H2L4Q")
LOCATOR = struct.Struct("<4sLQL")
END = struct.Struct("<4s4H2LH")

U32 = 0xFFFFFFFF

STORED, DEFLATED = 0, 8
FLAG_ENCRYPTED = 0x1 | 0x40 | 0x2000
FLAG_DESCRIPTOR, FLAG_UTF8 = 0x8, 0x800

_PAGE_NBYTES = 4 << 10
_MAX_RATIO = 100
_MAX_INFLATED_FLOOR = 64 << 20
"""Inflated bytes that any archive may have, however small it is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Archive:
    """A zip file's records, by name, in the order of its directory."""

    source: ByteSource
    records: Mapping[str, Record]
    _scratch: Scratch

    def extent(self, record: Record, *, big_endian: bool = False) -> Extent:
        """Where the record's data lie; reads nothing."""
        if record.method == STORED:
            source, offset = self.source, record.offset
        else:
            source, offset = InflatedSource(self.source, record, self._scratch), 0
        return Extent(
            source=source,
            offset=offset,
            nbytes=record.nbytes,
            big_endian=big_endian,
            checksum=record.checksum,
        )

    def data(self, record: Record) -> bytes:
        """The record's bytes, for records that are no tensors.

        Raises: checksum-mismatch where a checksum is recorded and differs.
        """
        data = bytearray(record.nbytes)
        self.extent(record).read_into(0, memoryview(data))
        found = zlib.crc32(data)
        if record.checksum is not None and found != record.crc:
            raise problem(
                "checksum-mismatch",
                self.source,
                record.name,
                f"crc32 of '{record.name}': recorded is {record.crc:08x}, the data give {found:08x}",
            )
        return bytes(data)


def _read(source: ByteSource, offset: int, nbytes: int, what: str) -> bytes:
    if offset < 0 or offset + nbytes > source.nbytes:
        raise problem(
            "truncated-file",
            source,
            "",
            f"{what} needs bytes {offset}..{offset + nbytes}, the file has {source.nbytes}",
        )
    data = bytearray(nbytes)
    source.read_into(offset, memoryview(data))
    return bytes(data)


def mentions(source: ByteSource, names: Iterable[str]) -> bool:
    """Whether all these names stand in the directory, as records or as parts of their names.

    Raises: those of `read_archive` that concern the end of the file.
    """
    start, nbytes, _ = _find_directory(source)
    directory = _read(source, start, nbytes, "the central directory")
    return all(name.encode() in directory for name in names)


def read_archive(source: ByteSource) -> Archive:
    """The records of a zip file; reads the directory and the local headers.

    Raises: truncated-file, corrupt-file, duplicate-key, unsafe-path, unsupported-feature, limit-exceeded.
    """
    start, nbytes, count = _find_directory(source)
    directory = _read(source, start, nbytes, "the central directory")
    entries: list[_Entry] = []
    at = 0
    for _ in range(count):
        entry, at = _entry(source, directory, at)
        entries.append(entry)
    if at != nbytes:
        raise problem(
            "corrupt-file", source, "", f"the directory has {nbytes} bytes, its {count} entries {at}"
        )
    _check_names(source, entries)
    headers = _Headers(source, start, entries)
    records: dict[str, Record] = {}
    spans: list[tuple[int, int, str]] = []
    inflated = 0
    for entry in entries:
        name, _, method, crc, packed, nbytes, header = entry
        if name in records:
            raise problem("duplicate-key", source, name, f"'{name}' stands twice in the directory")
        offset = headers.check(entry)
        records[name] = Record(name, method, crc, packed, nbytes, offset)
        spans.append((header, offset + packed, name))
        if method == DEFLATED:
            inflated += nbytes
    if inflated > max(_MAX_INFLATED_FLOOR, _MAX_RATIO * source.nbytes):
        raise FormatError.of(
            "limit-exceeded",
            f"deflated records claim {inflated} bytes in a file of {source.nbytes} [{source.name}]",
            f"At most {_MAX_RATIO} times the file is inflated: repack it uncompressed if you trust it.",
            loc=(source.name,),
        )
    spans.sort()
    for (_, end, first), (begin, _, second) in itertools.pairwise(spans):
        if begin < end:
            raise problem(
                "corrupt-file",
                source,
                second,
                f"'{first}' ends at {end}, '{second}' begins at {begin}: they overlap",
            )
    return Archive(source=source, records=records, _scratch=Scratch())


def _find_directory(source: ByteSource) -> tuple[int, int, int]:
    """Offset, bytes and number of entries of the central directory."""
    for most in (_PAGE_NBYTES, END.size + 0xFFFF):  # few archives have a comment
        tail_nbytes = min(source.nbytes, most)
        tail = _read(source, source.nbytes - tail_nbytes, tail_nbytes, "the end of the archive")
        found = tail.rfind(END_SIGNATURE)
        if found >= 0:
            break
    if found < 0 or found + END.size > len(tail):
        raise problem(
            "truncated-file", source, "", f"the archive has no end record in its {source.nbytes} bytes"
        )
    end = source.nbytes - tail_nbytes + found
    fields = END.unpack_from(tail, found)
    disks, here, total, nbytes, start, comment = fields[1:3], fields[3], fields[4], *fields[5:8]
    if tail[found + END.size + comment :].strip(b"\0"):
        raise problem("corrupt-file", source, "", f"bytes stand after the end record at {end}")
    locator = end - LOCATOR.size
    if locator >= 0 and (raw := _read(source, locator, LOCATOR.size, "the locator")).startswith(
        LOCATOR_SIGNATURE
    ):
        end = LOCATOR.unpack(raw)[2]
        wide = END64.unpack(_read(source, end, END64.size, "the zip64 end record"))
        if wide[0] != END64_SIGNATURE or end + END64.size > locator:
            raise problem("corrupt-file", source, "", f"there is no zip64 end record at {end}")
        for narrow, exact, limit in (
            (here, wide[6], 0xFFFF),
            (total, wide[7], 0xFFFF), (nbytes, wide[8], U32), (start, wide[9], U32)
        ):  # fmt: skip
            if narrow not in (exact, limit):
                raise problem("corrupt-file", source, "", f"the end records disagree: {narrow} and {exact}")
        disks, here, total, nbytes, start = wide[4:6], *wide[6:10]
    if any(disks) or here != total:
        raise problem("unsupported-feature", source, "", "the archive is spread over several files")
    if start + nbytes > end or total * CENTRAL.size > nbytes:
        raise problem(
            "corrupt-file",
            source,
            "",
            f"the directory ({total} entries) lies at {start}..{start + nbytes}, the end record at {end}",
        )
    return start, nbytes, total


class _Entry(NamedTuple):
    """What the directory says of a record."""

    name: str
    raw_name: bytes
    method: int
    crc: int
    packed_nbytes: int
    nbytes: int
    header: int
    """Where its local header stands."""


def _entry(source: ByteSource, directory: bytes, at: int) -> tuple[_Entry, int]:
    """The entry at `at`, and where the next one begins."""
    if at + CENTRAL.size > len(directory):
        raise problem("corrupt-file", source, "", f"the directory ends inside its entry at {at}")
    (
        signature, _, _, flags, method, _, _, crc, packed, nbytes,
        name_nbytes, extra_nbytes, comment_nbytes, disk, _, _, header,
    ) = CENTRAL.unpack_from(directory, at)  # fmt: skip
    names = at + CENTRAL.size
    extras = names + name_nbytes
    after = extras + extra_nbytes + comment_nbytes
    if signature != CENTRAL_SIGNATURE or after > len(directory):
        raise problem("corrupt-file", source, "", f"there is no directory entry at {at} of the directory")
    raw_name = directory[names:extras]
    try:
        name = raw_name.decode("utf-8")
    except UnicodeDecodeError:
        raise problem(
            "corrupt-file", source, "", f"a record's name is not UTF-8: {raw_name[:80]!r}"
        ) from None
    if flags & FLAG_ENCRYPTED:
        raise problem("unsupported-feature", source, name, f"'{name}' is encrypted")
    if method not in (STORED, DEFLATED):
        raise problem("unsupported-feature", source, name, f"'{name}' is compressed by method {method}")
    if U32 in (nbytes, packed, header):
        wide = _zip64(source, name, directory[extras : extras + extra_nbytes])
        try:
            nbytes = next(wide) if nbytes == U32 else nbytes
            packed = next(wide) if packed == U32 else packed
            header = next(wide) if header == U32 else header
        except StopIteration:
            raise problem("corrupt-file", source, name, f"'{name}' lacks its zip64 sizes") from None
    if disk:
        raise problem(
            "unsupported-feature", source, name, f"'{name}' lies in another file of a split archive"
        )
    if method == STORED and packed != nbytes:
        raise problem("corrupt-file", source, name, f"'{name}' is stored with {packed} bytes for {nbytes}")
    return _Entry(name, raw_name, method, crc, packed, nbytes, header), after


def _zip64(source: ByteSource, name: str, extra: bytes) -> Iterator[int]:
    """The 64-bit numbers of an entry's extra field, in their order."""
    at = 0
    while at + 4 <= len(extra):
        tag, nbytes = struct.unpack_from("<2H", extra, at)
        if at + 4 + nbytes > len(extra):
            raise problem("corrupt-file", source, name, f"the extra field of '{name}' ends inside a block")
        if tag == 1:
            yield from (struct.unpack_from("<Q", extra, at + 4 + i)[0] for i in range(0, nbytes - 7, 8))
            return
        at += 4 + nbytes


def _check_names(source: ByteSource, entries: Sequence[_Entry]) -> None:
    """Raises: unsafe-path for a name that is no plain relative path."""
    if _is_plain("/\n/".join([entry.name for entry in entries])):  # all at once: most archives are harmless
        return
    for name in [entry.name for entry in entries]:
        if not _is_plain(name.removesuffix("/")):
            raise problem("unsafe-path", source, name, f"the record name {name!r} is no plain relative path")


def _is_plain(name: str) -> bool:
    closed = f"/{name}/"
    return not any(part in closed for part in ("\\", "\0", "//", "/./", "/../"))


class _Headers:
    """The local headers, read by pages, as the disk is: those of small records stand close together.

    Those of a distant source are fetched together, and no more of it.
    """

    __slots__ = ("_end", "_page_nbytes", "_source", "_start", "_window")

    def __init__(self, source: ByteSource, end: int, entries: Sequence[_Entry]) -> None:
        self._source, self._end = source, end
        self._start, self._window = 0, b""
        self._page_nbytes = _PAGE_NBYTES
        if isinstance(source, Distant):
            needed = [(entry.header, LOCAL.size + len(entry.raw_name)) for entry in entries]
            source.want([(at, nbytes) for at, nbytes in needed if at + nbytes <= end])
            self._page_nbytes = 1

    def check(self, entry: _Entry) -> int:
        """Where the record's data begin. Raises: truncated-file, corrupt-file."""
        name, raw_name, method, _, packed, _, header = entry
        source, needed = self._source, LOCAL.size + len(raw_name)
        at = header - self._start
        if at < 0 or at + needed > len(self._window):
            page = min(self._page_nbytes - header % self._page_nbytes, source.nbytes - header)
            there = max(page, needed)
            self._start, at = header, 0
            self._window = _read(source, header, there, f"the header of '{name}'")
        window = self._window
        signature, _, flags, local, _, _, _, _, _, name_nbytes, extra_nbytes = LOCAL.unpack_from(window, at)
        if (
            signature != LOCAL_SIGNATURE
            or name_nbytes != len(raw_name)
            or window[at + LOCAL.size : at + needed] != raw_name
        ):
            raise problem("corrupt-file", source, name, f"there is no header of '{name}' at {header}")
        if local != method or flags & FLAG_ENCRYPTED:
            raise problem("corrupt-file", source, name, f"header and directory of '{name}' disagree")
        offset: int = header + needed + extra_nbytes
        if offset + packed > self._end:
            raise problem(
                "corrupt-file",
                source,
                name,
                f"'{name}' needs bytes {offset}..{offset + packed}, the directory is at {self._end}",
            )
        return offset
