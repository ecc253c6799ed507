"""The bytes of one file behind a URL, and what its file system tells of it.

Each directory is listed once, each file is read by ranges. Reads that follow one another are fetched a little
ahead, by an eighth of what was read so far: so headers take few requests and hardly more than their bytes.
Scattered reads that are announced (`want`) are fetched together.
Source: fsspec's `AbstractFileSystem` (`ls`, `info`, `cat_file`, `cat_ranges`).
"""

from __future__ import annotations

import posixpath
import threading
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

from ckptconv.errors import CkptError, FormatError, missing_extra
from ckptconv.source import ends_early

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

_LEAST_AHEAD = 1 << 16
_AHEAD_SHARE = 8
_MOST_AHEAD = 1 << 23
_FEW = 1 << 20
"""Reads of fewer bytes than these are headers; larger ones are a tensor's and are asked for as they are."""
_WINDOWS = 4
"""So many fetched headers are kept: several formats look at the same before one reads them."""


class Info(NamedTuple):
    """What stands under a name."""

    is_file: bool
    nbytes: int
    version: str


class Store:
    """One file system, with the directories that were listed and the files that were opened."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._listed: dict[str, Mapping[str, Info]] = {}
        self.opened: dict[str, RemoteSource] = {}

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

    def entries(self, directory: str) -> Mapping[str, Info]:
        """Names in a directory; none where there is none. Raises: missing-file where it cannot be asked."""
        found = self._listed.get(directory)
        if found is None:
            found = self._listed[directory] = dict(self._list(directory))
        return found

    def info(self, url: str) -> Info | None:
        """What stands there, or None."""
        if not self._lists:
            return self._asked(url)
        above = parent_of(url)
        return self.entries(above).get(posixpath.basename(url)) if above != url else None

    def again(self, url: str) -> Info | None:
        """What stands there now, asked as it was the first time: answers differ in what they tell."""
        self.fs.invalidate_cache()
        return (
            dict(self._list(parent_of(url))).get(posixpath.basename(url)) if self._lists else self._asked(url)
        )

    def _list(self, directory: str) -> Iterator[tuple[str, Info]]:
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

    def _asked(self, url: str) -> Info | None:
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


def _info(info: Mapping[str, Any]) -> Info:
    marks = ("ETag", "etag", "md5Hash", "sha256", "blob_id", "version_id", "mtime", "LastModified", "created")
    version = next((str(info[mark]) for mark in marks if info.get(mark)), "")
    return Info(info.get("type") == "file", int(info.get("size") or 0), version)


def _told(info: Info | None) -> str:
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


class _Window(NamedTuple):
    """What was fetched at once."""

    run: int
    """Where the reads that follow one another began."""
    start: int
    data: bytes

    @property
    def stop(self) -> int:
        return self.start + len(self.data)


class RemoteSource:
    """The bytes of one remote file; safe to read from several threads, pickled by URL."""

    def __init__(self, store: Store, url: str, info: Info) -> None:
        self._store, self._info = store, info
        self.path, self.name = url, posixpath.basename(url)
        self._key = store.key(url)
        self._lock = threading.Lock()
        self._held: deque[_Window] = deque(maxlen=_WINDOWS)
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
            window = next((w for w in self._held if w.start <= offset and stop <= w.stop), None)
            if window is None:
                run = next((w.run for w in self._held if w.start <= offset <= w.stop), None)
                data = self._fetch(offset, max(stop, self._foreseen(offset, run)))
                window = _Window(offset if run is None else run, offset, data)
                self._held.append(window)
            out[:] = window.data[offset - window.start : stop - window.start]

    def _foreseen(self, offset: int, run: int | None) -> int:
        """How far to fetch: beyond what is asked for where a run of reads follow one another."""
        if run is None:
            return offset
        ahead = max(_LEAST_AHEAD, min((offset - run) // _AHEAD_SHARE, _MOST_AHEAD))
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


def open_remote(store: Store, url: str) -> RemoteSource:
    """The bytes of a file. Raises: missing-file."""
    source = store.opened.get(url)
    if source is None:
        found = store.info(url)
        if found is None or not found.is_file:
            raise unreachable(url, FileNotFoundError("there is no such file"))
        source = store.opened[url] = RemoteSource(store, url, found)
    return source


def _reopened(url: str, info: Info) -> RemoteSource:
    source = open_remote(Store(url), url)
    if source._info != info:
        source._info = info
        source.check_unchanged()
    return source
