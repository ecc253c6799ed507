"""String and variant tensors as a bundle stores them: one encoding of the whole tensor.

String (DT_STRING): varint length of each element, `u32` masked crc32c of the lengths, the elements' bytes.
Variant (DT_VARIANT): per element varint length, the serialized VariantTensorDataProto, `u32` masked checksum
of everything so far. In every checksum, the entry's too, a string's length counts as `u32` (`u64` above
2^32 - 1) and a variant's as `u64`, little-endian, not as its varint; all else as it is stored.

Refused: lengths that do not add up to the bytes that are there, checksums that do not match.

Source: tensorflow v2.21 `core/util/tensor_bundle/tensor_bundle.cc` (WriteStringTensor, WriteVariantTensor).
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ckptconv import dtypes
from ckptconv.errors import CkptError, FormatError, Loc
from ckptconv.formats import crc
from ckptconv.formats.varint import write_varint
from ckptconv.tensor import (
    PANEL_NBYTES,
    WINDOW_NBYTES,
    BufferSource,
    Bytes,
    Checksum,
    Extent,
    StoredTensor,
    TensorRef,
    TensorSpec,
)

STRING, VARIANT = dtypes.BY_NAME["string"], dtypes.BY_NAME["variant"]
_LENGTHS_CRC_NBYTES = 4
_MAX_VARINT_SHIFT = 63
_U32 = 0xFFFFFFFF


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodedTensor(StoredTensor):
    """A stored string or variant tensor; every pass over its bytes verifies them."""

    entry_checksum: Checksum | None = None
    """What the bundle's entry records. It does not cover the raw bytes, so it cannot stand in the extent."""
    name: str = ""

    def windows(self, nbytes: int = WINDOW_NBYTES, panel_nbytes: int = PANEL_NBYTES) -> Iterator[Bytes]:
        """Raises: checksum-mismatch, corrupt-file; the latter as soon as it is seen."""
        scan = Scan(self.spec, (self.name,))
        for piece in StoredTensor.windows(self, nbytes, panel_nbytes):
            scan.update(piece.tobytes())
            yield piece
        found = scan.finish()
        if self.entry_checksum is not None and found != self.entry_checksum.value:
            raise _mismatch("the elements", self.entry_checksum.value, found, (self.name,))


class Scan:
    """Checks an encoding piece by piece, and computes the checksum that the bundle's entry records."""

    def __init__(self, spec: TensorSpec, loc: Loc) -> None:
        if spec.encoded_nbytes is None or spec.dtype not in (STRING, VARIANT):
            raise TypeError(f"not an encoded tensor: {spec}")
        self._loc = loc
        self._interleaved = spec.dtype == VARIANT
        self._remaining = spec.numel
        """Lengths that are still to come."""
        self._left = spec.encoded_nbytes
        self._crc = 0
        self._value = self._shift = 0
        self._body = 0
        """Element bytes that are still to come."""
        self._stored = b""
        self._want_crc = False
        if not self._interleaved and not self._remaining:
            self._want_crc = True

    def update(self, data: bytes) -> None:
        """Go on with the next bytes.

        Raises: corrupt-file, checksum-mismatch.
        """
        position = 0
        while position < len(data):
            if self._want_crc:
                position = self._checksum(data, position)
            elif self._remaining and not (self._interleaved and self._body):
                position = self._lengths(data, position)
            else:
                position = self._elements(data, position)

    def finish(self) -> int:
        """The unmasked checksum over everything.

        Raises: corrupt-file where the encoding is not complete.
        """
        if self._remaining or self._body or self._want_crc or self._left:
            raise self._corrupt("the bytes end before the elements do")
        return self._crc

    def _lengths(self, data: bytes, position: int) -> int:
        """Lengths as far as they go: all of a string tensor's, one of a variant's."""
        start = position
        short: list[int] = []
        while position < len(data) and self._remaining:
            byte = data[position]
            position += 1
            self._value |= (byte & 0x7F) << self._shift
            self._shift += 7
            if byte >= 0x80:
                if self._shift > _MAX_VARINT_SHIFT:
                    raise self._corrupt("a length is no 64-bit varint")
                continue
            self._body += self._value
            self._remaining -= 1
            short.append(self._value)
            self._value = self._shift = 0
            if self._interleaved:
                break
        self._left -= position - start
        if self._body > self._left:
            raise self._corrupt(f"elements of {self._body} bytes are stated, {self._left} are there")
        self._crc = crc.extend(self._crc, _counted(short, wide=self._interleaved))
        if short and (self._interleaved or not self._remaining):
            self._want_crc = not self._interleaved or not self._body
        return position

    def _checksum(self, data: bytes, position: int) -> int:
        piece = data[position : position + _LENGTHS_CRC_NBYTES - len(self._stored)]
        self._stored += piece
        self._left -= len(piece)
        if len(self._stored) == _LENGTHS_CRC_NBYTES:
            (stored,) = struct.unpack("<I", self._stored)
            if stored != crc.mask(self._crc):
                raise _mismatch("the lengths", crc.unmask(stored), self._crc, self._loc)
            self._crc = crc.extend(self._crc, self._stored)
            self._stored, self._want_crc = b"", False
        return position + len(piece)

    def _elements(self, data: bytes, position: int) -> int:
        if not self._body:
            raise self._corrupt(f"{self._left} bytes are left behind the last element")
        piece = memoryview(data)[position : position + self._body]
        self._crc = crc.extend(self._crc, piece)
        self._body -= len(piece)
        self._left -= len(piece)
        self._want_crc = self._interleaved and not self._body
        return position + len(piece)

    def _corrupt(self, what: str) -> CkptError:
        return FormatError.of(
            "corrupt-file", f"encoded tensor: {what}", "Copy the file again.", loc=self._loc
        )


def _mismatch(what: str, stored: int, found: int, loc: Loc) -> CkptError:
    return FormatError.of(
        "checksum-mismatch",
        f"encoded tensor, {what}: crc32c {stored:#010x} recorded, {found:#010x} computed",
        "Copy the file again.",
        loc=loc,
    )


def _counted(lengths: list[int], *, wide: bool = False) -> bytes:
    """Lengths as the checksums see them."""
    if wide:
        return struct.pack(f"<{len(lengths)}Q", *lengths)
    if max(lengths, default=0) <= _U32:
        return struct.pack(f"<{len(lengths)}I", *lengths)
    return b"".join(struct.pack("<I" if length <= _U32 else "<Q", length) for length in lengths)


def decode(data: bytes, numel: int, loc: Loc = ()) -> list[bytes]:
    """The elements of an encoded string tensor, in C order.

    Raises: corrupt-file, checksum-mismatch.
    """
    scan = Scan(TensorSpec(dtype=STRING, shape=(numel,), encoded_nbytes=len(data)), loc)
    scan.update(data)
    scan.finish()
    lengths, position = [], 0
    for _ in range(numel):
        length = shift = 0
        while True:
            byte = data[position]
            position += 1
            length |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                break
        lengths.append(length)
    position += _LENGTHS_CRC_NBYTES
    elements = []
    for length in lengths:
        elements.append(data[position : position + length])
        position += length
    return elements


def encode(elements: Sequence[bytes]) -> bytes:
    """The stored form of strings, as TensorFlow writes it."""
    lengths = crc.crc32c(_counted([len(element) for element in elements]))
    return b"".join(
        (*(write_varint(len(e)) for e in elements), struct.pack("<I", crc.mask(lengths)), *elements)
    )


def read_strings(tensor: TensorRef, loc: Loc = ()) -> list[bytes]:
    """The elements of a string tensor of any source, verified; in C order.

    I/O: reads the whole tensor.
    Raises: corrupt-file, checksum-mismatch.
    """
    return decode(tensor.read().tobytes(), tensor.spec.numel, loc)


def of_strings(elements: Sequence[bytes], shape: tuple[int, ...] = (), name: str = "<memory>") -> TensorRef:
    """A string tensor of elements in C order."""
    data = encode(elements)
    spec = TensorSpec(dtype=STRING, shape=shape, encoded_nbytes=len(data))
    if spec.numel != len(elements):
        raise TypeError(f"{len(elements)} elements do not fill shape {shape}")
    return StoredTensor(spec=spec, extent=Extent(source=BufferSource(data, name), offset=0, nbytes=len(data)))


def entry_crc(tensor: TensorRef, loc: Loc) -> int:
    """The unmasked checksum that a bundle's entry records of an encoded tensor.

    I/O: streams the tensor.
    Raises: corrupt-file, checksum-mismatch.
    """
    scan = Scan(tensor.spec, loc)
    for piece in tensor.windows():
        scan.update(piece.tobytes())
    return scan.finish()
