"""An HDF5 file opened through h5py on any byte source, and its datasets as lazy tensors.

h5py reads superblock, object headers and symbol tables; the bytes of a contiguous dataset are read by the
engine, from where h5py says that they lie. A dataset that is chunked, compressed or kept in its object header
is read block by block through h5py. The source may be a part of a file: the stored member of an archive.

Whatever the HDF5 library reports, of whatever class, is a `corrupt-file` with its words.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ckptconv.errors import CkptError, Code, FormatError, missing_extra
from ckptconv.tensor import Array, Extent, Index, TensorRef, TensorSpec

if TYPE_CHECKING:
    from types import ModuleType

MAGIC = b"\x89HDF\r\n\x1a\n"
_GLOBAL_HEAP = b"GCOL"
Object = Any
"""A group, dataset or file of h5py, which has no types."""


def h5py() -> ModuleType:
    """The package.

    Raises: missing-dependency.
    """
    try:
        import h5py as package
    except ImportError as error:
        raise missing_extra("h5py", "hdf5", "an HDF5 file (.weights.h5, .keras)") from error
    module: ModuleType = package
    return module


def failure(code: Code, name: str, message: str, *loc: str) -> CkptError:
    """The error for a place of the file."""
    hint = "Copy or save the file again; nothing was written."
    if code in ("unsupported-feature", "unknown-dtype"):
        hint = "Save it with Keras again, or ask for this to be read."
    return FormatError.of(code, f"{message} [{name}]", hint, loc=(name, *loc))


@contextmanager
def reported(name: str, *loc: str) -> Iterator[None]:
    """What the HDF5 library finds wrong as a `corrupt-file`."""
    try:
        yield
    except CkptError:
        raise
    except Exception as error:
        # The library's bindings raise whatever class fits its error stack: OSError, KeyError, ValueError, ...
        said = " ".join(str(error).split()) or type(error).__name__
        raise failure("corrupt-file", name, f"the HDF5 library cannot read it: {said}", *loc) from error


class _Reading(io.RawIOBase):
    """An extent as the file object that h5py reads from."""

    def __init__(self, extent: Extent) -> None:
        self._extent = extent
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + (0, self._at, self._extent.nbytes)[whence]
        return self._at

    def readinto(self, buffer: Any) -> int:
        out = memoryview(buffer).cast("B")
        count = max(min(len(out), self._extent.nbytes - self._at), 0)
        if count:
            self._extent.read_into(self._at, out[:count])
            if out[:4] == _GLOBAL_HEAP and count >= 16:
                self._check_global_heap(nbytes=int.from_bytes(out[8:16], "little"))
        self._at += count
        return count

    def _check_global_heap(self, nbytes: int) -> None:
        """Refuse a collection of texts, here, whose parts do not lie one behind the other.

        The HDF5 library walks from part to part by the sizes that they give, and never ends where free space
        says that it has none. Layout (lengths of 8 bytes, as in Keras' files): signature, version, 3 bytes,
        size; then parts of number (2 bytes, 0 for free space), references (2), 4 bytes, size, data to a
        multiple of 8.
        Source: HDF5 File Format Specification 3.0, III.E "Disk Format: Level 1E - Global Heap".
        """
        start, end = self._at, min(self._at + nbytes, self._extent.nbytes)
        place, part = start + 16, bytearray(16)
        while place + 16 <= end:
            self._extent.read_into(place, memoryview(part))
            number, nbytes = int.from_bytes(part[:2], "little"), int.from_bytes(part[8:], "little")
            step = 16 + (nbytes + 7) // 8 * 8 if number else nbytes
            if step < 16:
                message = f"free space at byte {place} says that it has {nbytes} bytes, it takes at least 16"
                raise failure("corrupt-file", self._extent.source.name, message)
            place += step


class Handle:
    """An HDF5 file that stays open as long as a tensor refers to it; opened anew in another process."""

    def __init__(self, extent: Extent, name: str) -> None:
        self.extent = extent
        self.name = name
        self._file: Object = None

    def __reduce__(self) -> tuple[type[Handle], tuple[Extent, str]]:
        return Handle, (self.extent, self.name)

    @property
    def file(self) -> Object:
        """The open file. Raises: missing-dependency, corrupt-file."""
        if self._file is None:
            package = h5py()
            with reported(self.name):
                self._file = package.File(_Reading(self.extent), "r")
        return self._file


@dataclass(frozen=True, slots=True, kw_only=True)
class LibraryTensor(TensorRef):
    """A dataset whose bytes do not lie as they are: chunked, compressed, or in an object header."""

    spec: TensorSpec
    handle: Handle
    path: str

    @property
    def extents(self) -> tuple[Extent, ...]:
        return (self.handle.extent,)

    def block(self, start: Index, stop: Index) -> Array:
        where = tuple(slice(low, high) for low, high in zip(start, stop, strict=True))
        with reported(self.handle.name, *self.path.split("/")):
            part = np.asarray(self.handle.file[self.path][where])
        return np.ascontiguousarray(native(part, self.spec)).reshape(part.shape)


def native(part: Array, spec: TensorSpec) -> Array:
    """An array as h5py gives it, in the dtype that it is meant to have: opaque elements are only renamed."""
    if part.dtype.kind == "V":
        return part.view(spec.dtype.numpy)
    return part.astype(spec.dtype.numpy, copy=False)


def joined(path: Sequence[str]) -> str:
    return "/".join(path)
