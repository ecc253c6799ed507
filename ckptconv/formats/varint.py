"""Base-128 integers as protobuf and LevelDB write them: seven bits a byte, least significant first."""

from __future__ import annotations

from ckptconv.errors import FormatError, Loc
from ckptconv.formats.peek import Peek

_MAX_NBYTES = 10


def read_varint(data: bytes | memoryview | Peek, position: int, loc: Loc) -> tuple[int, int]:
    """The unsigned 64-bit integer at `position`, and the position after it.

    Raises: corrupt-file where it does not end within the data, or does not fit 64 bits.
    """
    value = shift = 0
    for index in range(position, min(position + _MAX_NBYTES, len(data))):
        byte = data[index]
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            if value >> 64:
                break
            return value, index + 1
        shift += 7
    raise FormatError.of(
        "corrupt-file",
        f"no 64-bit varint at byte {position} of {len(data)}",
        "Copy the file again.",
        loc=loc,
    )


def write_varint(value: int) -> bytes:
    """An unsigned integer, in as few bytes as it needs."""
    if value < 0x80:
        return bytes((value,))
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)
