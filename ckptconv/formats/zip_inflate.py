"""Deflated zip records as byte sources: inflated as a stream into a temporary file, never into memory."""

from __future__ import annotations

import tempfile
import threading
import weakref
import zlib
from collections.abc import Iterator
from typing import IO

from ckptconv.errors import FormatError
from ckptconv.formats.zip_record import Record, problem
from ckptconv.source import ByteSource

_CHUNK = 1 << 20


class Scratch:
    """One unnamed temporary file for all of an archive's deflated records, opened when the first is read."""

    __slots__ = ("__weakref__", "_end", "_file", "lock")

    def __init__(self) -> None:
        self._file: IO[bytes] | None = None
        self._end = 0
        self.lock = threading.Lock()

    def append(self, pieces: Iterator[bytes]) -> int:
        """Write the pieces behind what is there; where they begin."""
        if self._file is None:
            self._file = tempfile.TemporaryFile()  # noqa: SIM115  # lives as long as the scratch
            weakref.finalize(self, self._file.close)
        start, end = self._end, self._end
        for piece in pieces:
            self._file.seek(end)
            self._file.write(piece)
            end += len(piece)
        self._end = end
        return start

    def read_into(self, offset: int, out: memoryview) -> int:
        """Bytes that could be read."""
        assert self._file is not None
        self._file.seek(offset)
        data = self._file.read(len(out))
        out[: len(data)] = data
        return len(data)


class InflatedSource:
    """A deflated record's data, inflated into its archive's temporary file at the first read."""

    __slots__ = ("_record", "_scratch", "_source", "_start", "name", "nbytes")

    def __init__(self, source: ByteSource, record: Record, scratch: Scratch | None = None) -> None:
        self._source = source
        self._record = record
        self._scratch = scratch or Scratch()
        self._start: int | None = None
        self.name = f"{source.name}!{record.name}"
        self.nbytes = record.nbytes

    def __reduce__(self) -> tuple[type[InflatedSource], tuple[ByteSource, Record]]:
        """Another process inflates for itself."""
        return InflatedSource, (self._source, self._record)

    def read_into(self, offset: int, out: memoryview) -> None:
        got = 0
        if offset >= 0 and offset + len(out) <= self.nbytes:
            try:
                with self._scratch.lock:
                    if self._start is None:
                        self._start = self._scratch.append(self._inflated())
                    got = self._scratch.read_into(self._start + offset, out)
            except OSError as error:
                raise FormatError.of(
                    "no-space",
                    f"'{self.name}' cannot be inflated to {self.nbytes} bytes: {error}",
                    "Set TMPDIR to a place with room, or repack the file without compression.",
                    loc=(self._source.name, self._record.name),
                ) from error
        if got != len(out):
            raise problem(
                "truncated-tensor",
                self._source,
                self._record.name,
                f"bytes {offset}..{offset + len(out)} are needed, the record ends at {self.nbytes}",
            )

    def _inflated(self) -> Iterator[bytes]:
        """The record's data in pieces, exactly as many bytes as are recorded."""
        record, inflater, done = self._record, zlib.decompressobj(-zlib.MAX_WBITS), 0
        for start in range(0, record.packed_nbytes, _CHUNK):
            packed = bytearray(min(_CHUNK, record.packed_nbytes - start))
            self._source.read_into(record.offset + start, memoryview(packed))
            pending, more = bytes(packed), True
            # A full piece may mean that there is more inside the inflater, with nothing pending.
            while more and not inflater.eof:
                try:
                    piece = inflater.decompress(pending, _CHUNK)
                except zlib.error as error:
                    raise self._damaged(f"the deflated data are damaged ({error})") from None
                pending = inflater.unconsumed_tail
                more = bool(pending) or len(piece) == _CHUNK
                done += len(piece)
                if done > record.nbytes:
                    raise self._damaged(f"it inflates beyond the {record.nbytes} bytes that are recorded")
                yield piece
        if done != record.nbytes or not inflater.eof:
            raise self._damaged(f"it inflates to {done} bytes, the directory records {record.nbytes}")

    def _damaged(self, what: str) -> FormatError:
        return problem("corrupt-file", self._source, self._record.name, f"'{self._record.name}': {what}")
