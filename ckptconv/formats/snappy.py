"""Snappy's raw block format, decoded: what LevelDB tables may be compressed with.

Layout: varint length of the decoded bytes, then elements. The low two bits of an element's first byte tell
its kind: 0 a literal (length - 1 in the upper six bits, or in the 1 to 4 bytes that follow where those are
60 to 63), 1 a copy of 4 to 11 bytes with an 11-bit offset, 2 a copy of 1 to 64 bytes with a 16-bit offset,
3 the same with a 32-bit offset. Little-endian. TensorFlow reads such blocks and never writes them.

Refused: a stated length that the input cannot expand to (no element makes more than 64 bytes of 3),
literals and copies that reach outside.

Source: google/snappy `format_description.txt`.
"""

from __future__ import annotations

from ckptconv.errors import CkptError, FormatError, Loc
from ckptconv.formats.varint import read_varint

_MAX_EXPANSION = 22
"""The densest element, a copy with a 16-bit offset, makes 64 bytes of 3."""


def decode(data: bytes, loc: Loc) -> bytes:
    """The bytes that a compressed block stands for.

    Raises: corrupt-file, limit-exceeded.
    """
    size, position = read_varint(data, 0, loc)
    if size > _MAX_EXPANSION * len(data):
        raise FormatError.of(
            "limit-exceeded",
            f"a snappy block of {len(data)} bytes states {size} decoded bytes, "
            f"at most {_MAX_EXPANSION * len(data)} are possible",
            "Copy the file again.",
            loc=loc,
        )
    out = bytearray()
    end = len(data)
    while position < end:
        tag = data[position]
        position += 1
        kind = tag & 3
        if kind == 0:
            length = (tag >> 2) + 1
            if length > 60:
                width = length - 60
                length = int.from_bytes(_take(data, position, width, loc), "little") + 1
                position += width
            if len(out) + length > size:
                raise _corrupt(
                    f"a literal of {length} bytes at {position}, {size - len(out)} are wanted", loc
                )
            out += _take(data, position, length, loc)
            position += length
            continue
        if kind == 1:
            length = (tag >> 2 & 7) + 4
            offset = (tag >> 5) << 8 | _take(data, position, 1, loc)[0]
            position += 1
        else:
            width = 2 if kind == 2 else 4
            length = (tag >> 2) + 1
            offset = int.from_bytes(_take(data, position, width, loc), "little")
            position += width
        if not 0 < offset <= len(out) or len(out) + length > size:
            raise _corrupt(
                f"a copy of {length} bytes from {offset} back at {position}, "
                f"{len(out)} bytes are there and {size} are wanted",
                loc,
            )
        # An offset shorter than the length repeats what the copy itself has written.
        start = len(out) - offset
        piece = bytes(out[start : start + length])
        out += (piece * (length // offset + 1))[:length] if offset < length else piece
    if len(out) != size:
        raise _corrupt(f"{len(out)} bytes were decoded, {size} are stated", loc)
    return bytes(out)


def _take(data: bytes, position: int, length: int, loc: Loc) -> bytes:
    piece = data[position : position + length]
    if len(piece) != length:
        raise _corrupt(f"an element needs {length} bytes at {position}, {len(piece)} are there", loc)
    return piece


def _corrupt(what: str, loc: Loc) -> CkptError:
    return FormatError.of("corrupt-file", f"snappy block: {what}", "Copy the file again.", loc=loc)
