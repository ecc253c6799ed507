"""Checkpoints behind URLs (`s3://`, `gs://`, `hf://`): paths and bytes of any file system of fsspec.

A `RemotePath` answers what readers ask of a local path. Each directory is listed once, each file is read by
ranges. Reads that follow one another are fetched a little ahead, by an eighth of what was read so far: so
headers take few requests and hardly more than their bytes. Scattered reads that are announced (`want`) are
fetched together.
Source: fsspec's `AbstractFileSystem` (`ls`, `info`, `cat_file`, `cat_ranges`).
"""

from __future__ import annotations

import io
import os
import posixpath
import re
import threading
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, NamedTuple, TypeGuard, cast

from ckptconv.errors import CkptError, FormatError, missing_extra
from ckptconv.source import ends_early

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")
_LEAST_AHEAD = 1 << 16
_AHEAD_SHARE = 8
_MOST_AHEAD = 1 << 23
_FEW = 1 << 20
"""Reads of fewer bytes than these are headers; larger ones are a tensor's and are asked for as they are."""


def is_url(path: object) -> TypeGuard[str]:
    """Whether a path is one of a remote file system."""
    return isinstance(path, str) and _URL.match(path) is not None


def place(path: str | os.PathLike[str] | Path) -> Path:
    """The local path, or the remote one that a URL names. Looks at nothing; any text is a place."""
    if isinstance(path, RemotePath) or not is_url(path):
        return cast("Path", path) if isinstance(path, RemotePath) else Path(path)
    # Readers are written for local paths, and this one answers the same questions.
    return cast("Path", RemotePath(_Store(path), path.rstrip("/")))


def _file_system(url: str) -> AbstractFileSystem:
    """Raises: missing-dependency for fsspec or a protocol's own package, usage for a protocol it has not."""
    try:
        from fsspec.core import url_to_fs
    except ImportError:
        raise missing_extra("fsspec", "remote", f"reaching '{url}'") from None
    try:
        fs, _ = url_to_fs(url)
    except ImportError as error:
        raise CkptError.of(
            "missing-dependency",
            f"'{url}' needs a package that is not installed: {error}",
            "Install it: s3fs for s3://, gcsfs for gs://, huggingface_hub for hf://, adlfs for abfs://.",
            loc=(url,),
        ) from None
    except ValueError as error:
        raise CkptError.of(
            "usage", f"'{url}' is no URL of a known file system: {error}", "Check its beginning.", loc=(url,)
        ) from None
    return fs


class _Info(NamedTuple):
    is_file: bool
    nbytes: int
    version: str


class Stat(NamedTuple):
    """What readers ask of a file's state."""

    st_size: int


class _Store:
    """One file system, with the directories that were listed."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._listed: dict[str, Mapping[str, _Info]] = {}

    @cached_property
    def fs(self) -> AbstractFileSystem:
        """Raises: see `_file_system`."""
        return _file_system(self._url)

    @cached_property
    def _lists(self) -> bool:
        """Whether directories can be listed; over HTTP a page of links would be guessed at."""
        protocols = {self.fs.protocol} if isinstance(self.fs.protocol, str) else set(self.fs.protocol)
        return not protocols & {"http", "https"}

    def key(self, url: str) -> str:
        """The file system's own name of what a URL means."""
        return str(self.fs._strip_protocol(url))

    def entries(self, directory: str) -> Mapping[str, _Info]:
        """Names in a directory; none where there is none. Raises: missing-file where it cannot be asked."""
        found = self._listed.get(directory)
        if found is None:
            found = self._listed[directory] = dict(self._list(directory))
        return found

    def info(self, url: str) -> _Info | None:
        """What stands there, or None."""
        if not self._lists:
            return self._asked(url)
        above = parent_of(url)
        return self.entries(above).get(posixpath.basename(url)) if above != url else None

    def again(self, url: str) -> _Info | None:
        """What stands there now, asked as it was the first time: answers differ in what they tell."""
        self.fs.invalidate_cache()
        return (
            dict(self._list(parent_of(url))).get(posixpath.basename(url)) if self._lists else self._asked(url)
        )

    def _list(self, directory: str) -> Iterator[tuple[str, _Info]]:
        if not self._lists:
            return
        key = self.key(directory)
        try:
            found = self.fs.ls(key, detail=True)
        except (FileNotFoundError, NotADirectoryError):
            return
        except Exception as error:  # each file system has errors of its own
            raise unreachable(directory, error) from error
        for info in found:
            name = str(info["name"]).rstrip("/")
            if name != key.rstrip("/"):  # a file, listed as itself
                yield posixpath.basename(name), _info(info)

    def _asked(self, url: str) -> _Info | None:
        try:
            return _info(self.fs.info(self.key(url)))
        except FileNotFoundError:
            return None
        except Exception as error:
            raise unreachable(url, error) from error


def parent_of(url: str) -> str:
    """The URL of the directory; a bucket is its own."""
    above, _, _ = url.rpartition("/")
    return url if ":" not in above or above.endswith(("/", ":")) else above


def _info(info: Mapping[str, Any]) -> _Info:
    marks = ("ETag", "etag", "md5Hash", "sha256", "blob_id", "version_id", "mtime", "LastModified", "created")
    version = next((str(info[mark]) for mark in marks if info.get(mark)), "")
    return _Info(info.get("type") == "file", int(info.get("size") or 0), version)


def _told(info: _Info | None) -> str:
    return f"{info.nbytes} bytes, version {info.version or 'unknown'}" if info else "no file"


def unreachable(url: str, error: Exception) -> FormatError:
    """The error for what a file system does not let us see."""
    failure = FormatError.of(
        "missing-file",
        f"cannot look at '{url}': {error or type(error).__name__}",
        "Check the URL, the network and the credentials.",
        loc=(url,),
    )
    assert isinstance(failure, FormatError)
    return failure


class RemotePath:
    """A URL, with the parts of `pathlib.Path` that readers use."""

    __slots__ = ("_store", "_url")

    def __init__(self, store: _Store, url: str) -> None:
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
        found = self._store.info(self._url)
        if found is None or not found.is_file:
            raise unreachable(self._url, FileNotFoundError("there is no such file"))
        return RemoteSource(self._store, self._url, found)

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


class RemoteSource:
    """The bytes of one remote file; safe to read from several threads, pickled by URL."""

    def __init__(self, store: _Store, key: str, info: _Info) -> None:
        self._store, self._key, self._info = store, key, info
        self.name = posixpath.basename(key)
        self.path = str(store.fs.unstrip_protocol(key))
        self._lock = threading.Lock()
        self._ahead = (0, b"")
        self._run = (0, 0)
        """Where reads that follow one another began and have come to."""
        self._wanted: dict[int, bytes] = {}

    @property
    def nbytes(self) -> int:
        return self._info.nbytes

    @property
    def identity(self) -> tuple[str, str]:
        """Equal for two paths of one file."""
        return self.path, self._info.version

    def read_into(self, offset: int, out: memoryview) -> None:
        stop = offset + len(out)
        if stop > self.nbytes:
            raise ends_early(self.name, offset, len(out), self.nbytes)
        if not len(out):
            return
        if len(out) >= _FEW:
            out[:] = self._fetch(offset, stop)
            return
        with self._lock:
            wanted = self._wanted.get(offset)
            if wanted is not None and len(wanted) >= len(out):
                out[:] = wanted[: len(out)]
                return
            start, held = self._ahead
            if not (start <= offset and stop <= start + len(held)):
                start, held = self._ahead = offset, self._fetch(offset, max(stop, self._foreseen(offset)))
            out[:] = held[offset - start : stop - start]

    def _foreseen(self, offset: int) -> int:
        """How far to fetch: beyond what is asked for where reads follow one another."""
        begun, _ = self._run
        start, held = self._ahead
        follows = held and start <= offset <= start + len(held)
        begun = begun if follows else offset
        self._run = begun, offset
        if not follows:
            return offset
        ahead = max(_LEAST_AHEAD, min((offset - begun) // _AHEAD_SHARE, _MOST_AHEAD))
        return min(offset + ahead, self.nbytes)

    def _fetch(self, start: int, stop: int) -> bytes:
        try:
            data = self._store.fs.cat_file(self._key, start=start, end=stop)
        except Exception as error:  # each file system has errors of its own
            raise unreachable(self.path, error) from error
        if len(data) != stop - start:
            raise ends_early(self.name, start, stop - start, start + len(data))
        return bytes(data)

    def want(self, ranges: Sequence[tuple[int, int]]) -> None:
        """Fetch these (offset, bytes) together: they will be read, in an order that nobody can foresee."""
        starts = [offset for offset, _ in ranges]
        stops = [min(offset + nbytes, self.nbytes) for offset, nbytes in ranges]
        try:
            found = self._store.fs.cat_ranges([self._key] * len(starts), starts, stops, on_error="raise")
        except Exception as error:
            raise unreachable(self.path, error) from error
        with self._lock:
            self._wanted = {start: bytes(data) for start, data in zip(starts, found, strict=True)}

    def prefetch(self, offset: int, nbytes: int) -> None:
        """Nothing: what is read ahead of time is bytes on the wire."""

    def check_unchanged(self) -> None:
        """Raises: source-changed where the file's size or version is another one than when it was opened."""
        now = self._store.again(self.path)
        if now != self._info:
            raise FormatError.of(
                "source-changed",
                f"expected {_told(self._info)}, as when it was opened; got {_told(now)} [{self.name}]",
                "Wait until whoever writes it is done, and run again; nothing was written.",
                loc=(self.name,),
            )

    def __reduce__(self) -> tuple[object, ...]:
        return _reopened, (self.path, self._info)

    def __repr__(self) -> str:
        return f"RemoteSource({self.path!r})"


def _reopened(url: str, info: _Info) -> RemoteSource:
    source = RemotePath(_Store(url), url).source()
    if source._info != info:
        source._info = info
        source.check_unchanged()
    return source
