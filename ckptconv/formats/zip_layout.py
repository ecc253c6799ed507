"""The layout of a new zip archive, as PyTorch writes one.

The bytes follow PyTorch 2.13 (miniz, caffe2/serialize/inline_container.cc) byte for byte: stored records,
data padded to the alignment with an `FB` extra field of `Z`, zero sizes and checksum in the local header,
no descriptor after an empty record, zip64 from 2**32 - 1 on, and the zip64 end record always.

Source: torch 2.13 `torch/serialization.py` (`_get_offset`), `third_party/miniz-3.0.2/miniz.c`.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from ckptconv.formats import zip_container as z

_ZIP64_FROM = 0xFFFFFFFF
"""Sizes and offsets from here on stand in the zip64 fields; miniz counts the limit itself among them."""

Content = bytes | Callable[[Mapping[str, int]], bytes] | None


@dataclass(frozen=True, slots=True, kw_only=True)
class NewRecord:
    """A record to write."""

    name: str
    nbytes: int
    data: Content = None
    """The bytes; what makes them from the checksums of the placed records; None: the engine places them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedRecord:
    """A record with its place."""

    record: NewRecord
    name: bytes
    """In the archive, prefix included."""
    header: int
    offset: int
    extra: bytes
    """Extra field of the local header: zip64 where needed, then the padding."""


def plan_archive(prefix: str, records: Iterable[NewRecord], alignment: int) -> tuple[PlannedRecord, ...]:
    """Where each record goes when they are written in this order."""
    planned, at = [], 0
    for record in records:
        name = f"{prefix}/{record.name}".removeprefix("/").encode()
        wide = _wide(record.nbytes, at, packed=0)
        begin = at + z.LOCAL.size + len(name) + len(wide) + 4
        padding = -begin % alignment
        extra = wide + b"FB" + struct.pack("<H", padding) + b"Z" * padding
        planned.append(
            PlannedRecord(record=record, name=name, header=at, offset=begin + padding, extra=extra)
        )
        at = begin + padding + record.nbytes + _descriptor_nbytes(record.nbytes, at)
    return tuple(planned)


def _wide(nbytes: int, header: int, packed: int) -> bytes:
    """The zip64 extra field that miniz writes; in a local header the packed size is 0."""
    numbers: tuple[int, ...] = (nbytes, packed) if nbytes >= _ZIP64_FROM else ()
    numbers += (header,) if header >= _ZIP64_FROM else ()
    return struct.pack(f"<2H{len(numbers)}Q", 1, 8 * len(numbers), *numbers) if numbers else b""


def _descriptor_nbytes(nbytes: int, header: int) -> int:
    if nbytes == 0:
        return 0
    return 24 if nbytes >= _ZIP64_FROM or header >= _ZIP64_FROM else 16


def archive_frame(
    planned: Sequence[PlannedRecord], checksums: Mapping[str, int]
) -> Iterator[tuple[int, bytes]]:
    """Every byte but the placed data: headers, small records, descriptors, directory, end records.

    `checksums` has the CRC-32 of each placed record that is not empty, by its name.
    """
    directory = bytearray()
    end = 0
    for place in planned:
        record = place.record
        nbytes, header = record.nbytes, place.header
        data = record.data(checksums) if callable(record.data) else record.data
        crc = zlib.crc32(data) if data is not None else checksums[record.name] if nbytes else 0
        flags = z.FLAG_UTF8 | (z.FLAG_DESCRIPTOR if nbytes else 0)
        local = z.LOCAL.pack(
            z.LOCAL_SIGNATURE, 0, flags, z.STORED, 0, 0, 0, 0, 0, len(place.name), len(place.extra)
        )
        yield header, local + place.name + place.extra
        if data:
            yield place.offset, data
        end = place.offset + nbytes
        if nbytes:
            layout = "<4sLQQ" if _descriptor_nbytes(nbytes, header) == 24 else "<4sLLL"
            yield end, struct.pack(layout, z.DESCRIPTOR_SIGNATURE, crc, nbytes, nbytes)
            end += _descriptor_nbytes(nbytes, header)
        wide = _wide(nbytes, header, packed=nbytes)
        size = min(nbytes, z.U32)
        directory += z.CENTRAL.pack(
            z.CENTRAL_SIGNATURE, 0, 0, flags, z.STORED, 0, 0, crc, size, size,
            len(place.name), len(wide), 0, 0, 0, 0, min(header, z.U32),
        )  # fmt: skip
        directory += place.name + wide
    yield end, bytes(directory)
    count, after = len(planned), end + len(directory)
    ends = z.END64.pack(
        z.END64_SIGNATURE, z.END64.size - 12, 0x031E, 45, 0, 0, count, count, len(directory), end
    )
    ends += z.LOCATOR.pack(z.LOCATOR_SIGNATURE, 0, after, 1)
    narrow = min(count, 0xFFFF)
    ends += z.END.pack(z.END_SIGNATURE, 0, 0, narrow, narrow, min(len(directory), z.U32), min(end, z.U32), 0)
    yield after, ends
