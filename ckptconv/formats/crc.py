"""CRC-32C (Castagnoli) and the masked form in which LevelDB tables and TensorFlow bundles store it.

A stored value is `rotate_right(crc, 15) + 0xa282ead8 mod 2^32`, so that a checksum of bytes that hold
checksums stays strong. The computation itself is the `google-crc32c` wheel's.

Source: leveldb `util/crc32c.h`, tensorflow `tsl/lib/hash/crc32c.h`.
"""

from __future__ import annotations

import google_crc32c
import numpy as np

from ckptconv.tensor import Bytes

_DELTA = 0xA282EAD8
_U32 = 0xFFFFFFFF


def extend(crc: int, data: bytes | bytearray | memoryview | Bytes) -> int:
    """The checksum of what `crc` covers followed by `data`; nothing is copied."""
    if isinstance(data, (bytearray, memoryview)):
        # The wheel takes `bytes` and arrays, but no buffer that may be released.
        data = np.frombuffer(data, np.uint8) if len(data) else b""
    return int(google_crc32c.extend(crc, data))


def crc32c(data: bytes | bytearray | memoryview | Bytes) -> int:
    """The unmasked checksum of `data`."""
    return extend(0, data)


def mask(crc: int) -> int:
    """The form in which a checksum is stored."""
    return ((crc >> 15 | crc << 17) + _DELTA) & _U32


def unmask(stored: int) -> int:
    """The checksum that a stored value stands for."""
    rotated = (stored - _DELTA) & _U32
    return (rotated >> 17 | rotated << 15) & _U32
