"""Runs of stored bytes, and reading from them what lies in them with strides."""

from __future__ import annotations

import math
from collections.abc import Hashable
from typing import Literal, NamedTuple

import numpy as np

from ckptconv.source import ByteSource, FileSource, ends_early
from ckptconv.strided import Bytes, word_of

_SCRATCH_NBYTES = 1 << 20
_GAP_NBYTES = 8 << 10
"""What a read of its own costs about as much as: gaps up to this are read along, into scratch memory."""


class Checksum(NamedTuple):
    """A checksum that the source records of one extent."""

    kind: Literal["crc32", "crc32c"]
    """`crc32` as in zip; `crc32c` Castagnoli, unmasked."""
    value: int


class Extent(NamedTuple):
    """A run of raw bytes that belongs together: a storage, a record, a tensor."""

    source: ByteSource
    offset: int
    nbytes: int
    big_endian: bool = False
    checksum: Checksum | None = None
    """Covers exactly the extent, in file byte order."""
    within: Extent | None = None
    """The run that this one is a part of, where a checksum is recorded of that alone."""

    @property
    def checked(self) -> Extent:
        """The run to stream for the checksum that covers this one."""
        return self if self.within is None else self.within

    @property
    def id(self) -> Hashable:
        """Equal for tensors that share memory."""
        return (id(self.source), self.offset, self.nbytes)

    def read_into(self, offset: int, out: memoryview) -> None:
        """Fill `out` from `offset` bytes into the extent on."""
        if offset < 0 or offset + len(out) > self.nbytes:
            raise ends_early(self.source.name, offset, len(out), self.nbytes)
        self.source.read_into(self.offset + offset, out)

    def prefetch(self) -> None:
        """Announce that the whole extent will be read, in no order."""
        if isinstance(self.source, FileSource):
            self.source.prefetch(self.offset, self.nbytes)


def gather(extent: Extent, out: Bytes, item: int, first: int, sizes: list[int], steps: list[int]) -> None:
    """Read elements at `first + sum(index * steps)` into `out`, C-order; `steps` do not ascend.

    Runs of bytes too short to be worth a read each are read together with the gaps between them.
    Units: `item` in bytes, all others in elements.
    """
    read = extent.read_into
    outer = len(sizes)
    run = 1
    while outer and steps[outer - 1] == run:
        outer -= 1
        run *= sizes[outer]
    if outer == 0:
        read(first * item, out.data)
        return
    row_span = 1 + sum((n - 1) * s for n, s in zip(sizes[1:], steps[1:], strict=True))
    gaps = row_span + (sizes[0] - 1) * steps[0] - math.prod(sizes)
    row_nbytes = len(out) // sizes[0]
    if gaps * item <= _GAP_NBYTES * math.prod(sizes[:outer]) and row_span * item <= _SCRATCH_NBYTES:
        count = 1 + (_SCRATCH_NBYTES // item - row_span) // steps[0]
        strides = [step * item for step in steps]
        target = out.view(word_of(item)).reshape(sizes)
        for low in range(0, sizes[0], count):
            rows = min(count, sizes[0] - low)
            scratch = np.empty(((rows - 1) * steps[0] + row_span) * item, np.uint8)
            read((first + low * steps[0]) * item, scratch.data)
            target[low : low + rows] = np.ndarray((rows, *sizes[1:]), target.dtype, scratch.data, 0, strides)
        return
    if outer == 1:
        rest = out.data
        for row in range(sizes[0]):
            read((first + row * steps[0]) * item, rest[row * row_nbytes : (row + 1) * row_nbytes])
        return
    for row in range(sizes[0]):
        part = out[row * row_nbytes : (row + 1) * row_nbytes]
        gather(extent, part, item, first + row * steps[0], sizes[1:], steps[1:])
