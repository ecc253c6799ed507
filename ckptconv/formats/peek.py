"""A run of a source's bytes that is read where it is looked at: for headers that lie between large values."""

from __future__ import annotations

from typing import overload

from ckptconv.tensor import ByteSource

_PIECE_NBYTES = 4096


class Peek:
    """As `bytes` are indexed and sliced, without negative numbers; holds the piece that was read last."""

    __slots__ = ("_at", "_nbytes", "_offset", "_piece", "_source")

    def __init__(self, source: ByteSource, offset: int, nbytes: int) -> None:
        """The run must lie within the source."""
        self._source, self._offset, self._nbytes = source, offset, nbytes
        self._at, self._piece = 0, b""

    def __len__(self) -> int:
        return self._nbytes

    @overload
    def __getitem__(self, index: int) -> int: ...
    @overload
    def __getitem__(self, index: slice) -> bytes: ...
    def __getitem__(self, index: int | slice) -> int | bytes:
        if isinstance(index, int):
            return self._bytes(index, index + 1)[0]
        start, stop, _ = index.indices(self._nbytes)
        return self._bytes(start, max(start, stop))

    def _bytes(self, start: int, stop: int) -> bytes:
        low = start - self._at
        if low < 0 or stop - self._at > len(self._piece):
            nbytes = min(max(stop - start, _PIECE_NBYTES), self._nbytes - start)
            piece = bytearray(nbytes)
            self._source.read_into(self._offset + start, memoryview(piece))
            self._at, self._piece, low = start, bytes(piece), 0
        return self._piece[low : low + stop - start]
