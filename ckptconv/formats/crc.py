"""CRC-32C (Castagnoli) and the masked form in which LevelDB tables and TensorFlow bundles store it.

A stored value is `rotate_right(crc, 15) + 0xa282ead8 mod 2^32`, so that a checksum of bytes that hold
checksums stays strong. The computation itself is the `google-crc32c` wheel's.

Checksums of neighbouring pieces give that of the whole without another look at the bytes: a checksum is a
polynomial over GF(2), and n bytes behind a piece multiply its own by x^8n modulo the generator.

Source: leveldb `util/crc32c.h`, tensorflow `tsl/lib/hash/crc32c.h`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import google_crc32c
import numpy as np
import numpy.typing as npt

from ckptconv.tensor import Bytes

_DELTA = 0xA282EAD8
_U32 = 0xFFFFFFFF
_GENERATOR = 0x82F63B78
"""Castagnoli's polynomial without x^32, the coefficient of x^0 in the highest bit, as in every checksum."""
_ZIP_GENERATOR = 0xEDB88320
"""The polynomial of CRC-32 in the same form."""


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


def crc32c_combine(crc1: int, crc2: int, len2: int) -> int:
    """The checksum of two pieces one after the other, from those of each.

    Units: `len2` in bytes.
    """
    return crc32c_joined((crc1, crc2), (0, len2))


def crc32c_joined(crcs: npt.ArrayLike, nbytes: npt.ArrayLike) -> int:
    """The checksum of pieces one after the other, from the checksum and the number of bytes of each."""
    return _joined(crcs, nbytes, _GENERATOR)


def crc32_joined(crcs: npt.ArrayLike, nbytes: npt.ArrayLike) -> int:
    """The same of the checksum of zip archives."""
    return _joined(crcs, nbytes, _ZIP_GENERATOR)


JOINED: dict[str, Callable[[npt.ArrayLike, npt.ArrayLike], int]] = {
    "crc32c": crc32c_joined,
    "crc32": crc32_joined,
}
"""By the kinds of `tensor.Checksum`."""


def _joined(crcs: npt.ArrayLike, nbytes: npt.ArrayLike, generator: int) -> int:
    sizes = np.asarray(nbytes, np.uint64)
    behind = np.zeros(len(sizes), np.uint64)
    behind[:-1] = np.cumsum(sizes[:0:-1])[::-1]
    terms = np.array(crcs, np.uint32)
    for k in range(int(behind.max(initial=0)).bit_length()):
        moved = (behind >> np.uint64(k) & np.uint64(1)).astype(bool)
        terms[moved] = _product(_matrix(k, generator), terms[moved])
    return int(np.bitwise_xor.reduce(terms))


_Words = npt.NDArray[np.uint32]


@cache
def _matrix(k: int, generator: int) -> _Words:
    """Multiplies by x^(8 * 2^k): for each byte of a checksum, lowest first, the products of 256 values."""
    column = (
        1 << 23
        if k == 0
        else int(_product(_matrix(k - 1, generator), _matrix(k - 1, generator)[3, 128:129])[0])
    )
    matrix = np.zeros((4, 256), np.uint32)
    for bit in reversed(range(32)):
        byte, power = bit >> 3, 1 << (bit & 7)
        for low in range(power, 256, 2 * power):
            matrix[byte, low : low + power] ^= np.uint32(column)
        column = column >> 1 ^ (generator if column & 1 else 0)
    return matrix


def _product(matrix: _Words, crcs: _Words) -> _Words:
    product: _Words = matrix[0][crcs & 255]
    for byte in range(1, 4):
        product = product ^ matrix[byte][crcs >> np.uint32(8 * byte) & 255]
    return product
