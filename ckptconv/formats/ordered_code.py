"""Keys of the slices of partitioned variables: names and numbers as bytes that sort as they do.

A slice's key is number 0 (a key's first byte 0 hides it from listings), the variable's name, the rank, and
per axis start and length, where a full axis is start 0 and length -1:
- number: count of its minimal big-endian bytes, then these; 0 is `00`;
- string: `00` as `00 ff`, `ff` as `ff 00`, then the end `00 01`;
- signed number: n bytes for |x| < 2^(7n-1), big-endian below n leading one-bits; negative ones inverted.

Source: tensorflow v2.21 `tsl/lib/strings/ordered_code.cc`, `core/util/saved_tensor_slice_util.cc`.
"""

from __future__ import annotations

import re

SliceExtent = tuple[int, int]
"""Start and length along one axis; (0, -1) where the slice is as wide as the tensor."""
FULL: SliceExtent = (0, -1)

_ESCAPES = {b"\x00": b"\x00\xff", b"\xff": b"\xff\x00"}


def slice_key(name: str, extents: tuple[SliceExtent, ...]) -> bytes:
    """The key of a slice, from its extents exactly as the variable's entry states them."""
    numbers = b"".join(signed(start) + signed(length) for start, length in extents)
    return unsigned(0) + string(name.encode()) + unsigned(len(extents)) + numbers


def unsigned(value: int) -> bytes:
    body = value.to_bytes((value.bit_length() + 7) // 8, "big")
    return bytes((len(body),)) + body


def string(value: bytes) -> bytes:
    return re.sub(rb"[\x00\xff]", lambda byte: _ESCAPES[byte[0]], value) + b"\x00\x01"


def signed(value: int) -> bytes:
    magnitude = ~value if value < 0 else value
    nbytes = magnitude.bit_length() // 7 + 1
    header = ((1 << nbytes) - 1) << 7 * nbytes
    code = (header | magnitude).to_bytes(nbytes, "big")
    return bytes(byte ^ 0xFF for byte in code) if value < 0 else code
