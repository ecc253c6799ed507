"""Where raw bytes come from: files and buffers, without a position, for several threads at once."""

from __future__ import annotations

import os
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

from ckptconv.errors import Code, FormatError, Problem


@runtime_checkable
class ByteSource(Protocol):
    """Where raw bytes come from: a file, a buffer, a remote object. Safe to read from several threads."""

    @property
    def name(self) -> str:
        """What to call it in messages."""

    @property
    def nbytes(self) -> int:
        """Bytes that are there."""

    def read_into(self, offset: int, out: memoryview) -> None:
        """Fill `out` (bytes, writable) from `offset` on.

        Raises: truncated-tensor where the source ends before `out` is full.
        """


@runtime_checkable
class Watched(Protocol):
    """A source that may change while it is read."""

    def check_unchanged(self) -> None:
        """Raises: source-changed where it is not what it was when it was opened."""


@runtime_checkable
class Distant(Protocol):
    """A source that takes long to answer, and answers several questions as fast as one."""

    def want(self, ranges: Sequence[tuple[int, int]]) -> None:
        """Fetch these (offset, bytes) together: each will be read, in an order that nobody can foresee."""


def open_source(path: Path) -> ByteSource:
    """The bytes of a file. A path that is no local one opens itself.

    Raises: missing-file.
    """
    return path.source() if isinstance(path, _Opener) else FileSource(path)


@runtime_checkable
class _Opener(Protocol):
    def source(self) -> ByteSource:
        """The bytes of the file that the path names."""


class FileSource:
    """A local file, open read-only until nothing refers to it any more; pickled by path."""

    __slots__ = ("__weakref__", "_fd", "_mtime_ns", "_nbytes", "name", "path")

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = os.fspath(path)
        self.name = os.path.basename(self.path)
        try:
            self._fd = os.open(self.path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
        except OSError as error:
            raise _format_error(
                "missing-file",
                f"cannot open '{self.path}': {error.strerror}",
                "Check the path and its permissions.",
                self.name,
            ) from error
        weakref.finalize(self, os.close, self._fd)
        stat = os.fstat(self._fd)
        self._nbytes, self._mtime_ns = stat.st_size, stat.st_mtime_ns

    @property
    def nbytes(self) -> int:
        return self._nbytes

    @property
    def identity(self) -> tuple[int, int]:
        """Device and inode: equal for two paths of one file."""
        stat = os.fstat(self._fd)
        return stat.st_dev, stat.st_ino

    def read_into(self, offset: int, out: memoryview) -> None:
        done = 0
        while done < len(out):
            try:
                got = os.preadv(self._fd, [out[done:] if done else out], offset + done)
            except OSError as error:
                raise _format_error(
                    "corrupt-file",
                    f"byte {offset + done} cannot be read: {error.strerror} [{self.name}]",
                    "Check the disk, then copy the file again; nothing was written.",
                    self.name,
                ) from error
            if got == 0:
                raise ends_early(self.name, offset, len(out), offset + done)
            done += got

    def copy_into(self, offset: int, nbytes: int, fd: int, at: int) -> bool:
        """Have the system copy bytes into another file, without a look at them.

        False where it cannot (another system, file systems that do not know each other, a disk that is full
        or broken): who reads and writes them instead learns why.
        Raises: truncated-tensor.
        """
        if not hasattr(os, "copy_file_range"):
            return False
        done = 0
        while done < nbytes:
            try:
                got = os.copy_file_range(self._fd, fd, nbytes - done, offset + done, at + done)
            except OSError:
                return False
            if got == 0:
                raise ends_early(self.name, offset, nbytes, offset + done)
            done += got
        return True

    def prefetch(self, offset: int, nbytes: int) -> None:
        """Tell the system that these bytes will be read soon, in an order that it cannot foresee."""
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._fd, offset, nbytes, os.POSIX_FADV_WILLNEED)

    def check_unchanged(self) -> None:
        """Compare the file with what it was when it was opened.

        Raises: source-changed where its size or modification time is another one.
        """
        stat = os.fstat(self._fd)
        self._compare(stat.st_size, stat.st_mtime_ns)

    def _compare(self, nbytes: int, mtime_ns: int) -> None:
        if (nbytes, mtime_ns) != (self._nbytes, self._mtime_ns):
            raise _format_error(
                "source-changed",
                f"expected {self._nbytes} bytes, modified at {self._mtime_ns} ns, as when it was opened; "
                f"got {nbytes}, modified at {mtime_ns} ns [{self.name}]",
                "Wait until whoever writes it is done, and run again; nothing was written.",
                self.name,
            )

    def __reduce__(self) -> tuple[object, ...]:
        return _reopened, (os.path.abspath(self.path), self._nbytes, self._mtime_ns)

    def __repr__(self) -> str:
        return f"FileSource({self.name!r})"


def _reopened(path: str, nbytes: int, mtime_ns: int) -> FileSource:
    source = FileSource(path)
    source._compare(nbytes, mtime_ns)
    return source


class BufferSource:
    """Bytes that are in memory already."""

    __slots__ = ("_view", "name")

    def __init__(self, data: bytes | bytearray | memoryview, name: str = "<memory>") -> None:
        self._view = memoryview(data).cast("B")
        self.name = name

    @property
    def nbytes(self) -> int:
        return len(self._view)

    def read_into(self, offset: int, out: memoryview) -> None:
        if offset + len(out) > len(self._view):
            raise ends_early(self.name, offset, len(out), len(self._view))
        out[:] = self._view[offset : offset + len(out)]

    def __reduce__(self) -> tuple[object, ...]:
        return BufferSource, (self._view.tobytes(), self.name)

    def __repr__(self) -> str:
        return f"BufferSource({self.name!r}, {len(self._view)} bytes)"


def ends_early(name: str, offset: int, wanted: int, end: int) -> FormatError:
    """The error for a read past the end."""
    return _format_error(
        "truncated-tensor",
        f"bytes {offset}..{offset + wanted} are needed, the file ends at {end} [{name}]",
        "Copy the file again; nothing was written.",
        name,
    )


def _format_error(code: Code, message: str, hint: str, name: str) -> FormatError:
    return FormatError(Problem(code=code, loc=(name,), message=message, hint=hint))
