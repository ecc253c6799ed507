"""Paths behind URLs (`s3://`, `gs://`, `hf://`), for every file system of fsspec.

A `RemotePath` answers what readers ask of a local path.
"""

from __future__ import annotations

import io
import os
import posixpath
import re
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple, TypeGuard, cast

from ckptconv.remote_source import RemoteSource, Store, open_remote, parent_of

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")


def is_url(path: object) -> TypeGuard[str]:
    """Whether a path is one of a remote file system."""
    return isinstance(path, str) and _URL.match(path) is not None


def place(path: str | os.PathLike[str] | Path) -> Path:
    """The local path, or the remote one that a URL names. Looks at nothing; any text is a place."""
    if isinstance(path, RemotePath) or not is_url(path):
        return cast("Path", path) if isinstance(path, RemotePath) else Path(path)
    # Readers are written for local paths, and this one answers the same questions.
    return cast("Path", RemotePath(Store(path), path.rstrip("/")))


class Stat(NamedTuple):
    """What readers ask of a file's state."""

    st_size: int


class RemotePath:
    """A URL, with the parts of `pathlib.Path` that readers use."""

    __slots__ = ("_store", "_url")

    def __init__(self, store: Store, url: str) -> None:
        self._store, self._url = store, url

    @property
    def name(self) -> str:
        return posixpath.basename(self._url)

    @property
    def suffix(self) -> str:
        return posixpath.splitext(self.name)[1]

    @property
    def stem(self) -> str:
        return posixpath.splitext(self.name)[0]

    @property
    def parent(self) -> RemotePath:
        return RemotePath(self._store, parent_of(self._url))

    def with_name(self, name: str) -> RemotePath:
        return self.parent / name

    def __truediv__(self, name: object) -> RemotePath:
        inside = posixpath.normpath(str(name))
        return self if inside == "." else RemotePath(self._store, f"{self._url}/{inside}")

    def exists(self) -> bool:
        return self.is_file() or self.is_dir()

    def is_file(self) -> bool:
        found = self._store.info(self._url)
        return found is not None and found.is_file

    def is_dir(self) -> bool:
        return not self.is_file() and bool(self._store.entries(self._url))

    def is_symlink(self) -> bool:
        return False

    def stat(self) -> Stat:
        """Raises: FileNotFoundError, as a local path does."""
        found = self._store.info(self._url)
        if found is None and not self.is_dir():
            raise FileNotFoundError(2, "No such file", self._url)
        return Stat(found.nbytes if found is not None else 0)

    def iterdir(self) -> Iterator[RemotePath]:
        return (self / name for name in self._store.entries(self._url))

    def glob(self, pattern: str) -> Iterator[RemotePath]:
        """Of names in this directory alone."""
        return (path for path in self.iterdir() if fnmatchcase(path.name, pattern))

    def relative_to(self, other: RemotePath) -> PurePosixPath:
        return PurePosixPath(self._url).relative_to(other._url)

    def open(self, mode: str = "rb") -> io.BufferedReader:
        """The file, read by ranges of what is asked for."""
        return io.BufferedReader(_Raw(self.source()), buffer_size=1)

    def read_bytes(self) -> bytes:
        source = self.source()
        data = bytearray(source.nbytes)
        source.read_into(0, memoryview(data))
        return bytes(data)

    def put(self, local: Path) -> None:
        """Upload a file; it appears when it is whole. Raises whatever the file system does."""
        self._store.fs.put_file(str(local), self._store.key(self._url))

    def unlink(self) -> None:
        """Delete the file. Raises whatever the file system does."""
        self._store.fs.rm_file(self._store.key(self._url))

    def source(self) -> RemoteSource:
        """Raises: missing-file."""
        return open_remote(self._store, self._url)

    def __str__(self) -> str:
        return self._url

    def __repr__(self) -> str:
        return f"RemotePath({self._url!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RemotePath) and self._url == other._url

    def __lt__(self, other: RemotePath) -> bool:
        return self._url < other._url

    def __hash__(self) -> int:
        return hash(self._url)


class _Raw(io.RawIOBase):
    def __init__(self, source: RemoteSource) -> None:
        self._source, self._at = source, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._source.nbytes}[whence]
        self._at = base + offset
        return self._at

    def readinto(self, out: Any) -> int:
        view = memoryview(out).cast("B")
        count = max(0, min(len(view), self._source.nbytes - self._at))
        self._source.read_into(self._at, view[:count])
        self._at += count
        return count
