"""Tensors whose elements are stored as varints, as protobuf packs integers: decoded while they are streamed.

An element takes one byte to ten, so that none can be found without a pass over those before it. Signed
numbers are the 64 bits of their two's complement (-1 is ten bytes); a half stands as its 16 bits.

Refused, in the pass that reads them: more or fewer elements than the shape has, numbers beyond 64 bits or the
dtype's range.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ckptconv.errors import CkptError, FormatError
from ckptconv.strided import box_shape
from ckptconv.tensor import (
    PANEL_NBYTES,
    WINDOW_NBYTES,
    Array,
    Bytes,
    Extent,
    Index,
    StoredTensor,
    TensorRef,
    TensorSpec,
    as_bytes,
)

MAX_NBYTES = 10
"""Of one element."""
_WORDS: Mapping[int, npt.DTypeLike] = {1: "u1", 2: "<u2", 4: "<u4", 8: "<u8"}


@dataclass(frozen=True, slots=True, kw_only=True)
class VarintTensor(TensorRef):
    """A tensor of integers, bools or halves, in C order."""

    spec: TensorSpec
    extent: Extent
    name: str = ""

    @property
    def extents(self) -> tuple[Extent, ...]:
        return (self.extent,)

    def windows(self, nbytes: int = WINDOW_NBYTES, panel_nbytes: int = PANEL_NBYTES) -> Iterator[Bytes]:
        """Raises: corrupt-file, when it is seen."""
        for _, piece in self._pieces(nbytes):
            yield as_bytes(piece)

    def block(self, start: Index, stop: Index) -> Array:
        """I/O: a pass over the whole tensor."""
        shape = box_shape(start, stop)
        out = np.empty(shape, self.dtype.numpy)
        for first, piece in self._pieces(WINDOW_NBYTES):
            if not self.shape:
                out[()] = piece[0]
                continue
            flat = np.arange(first, first + len(piece))
            indices = np.unravel_index(flat, self.shape)
            inside = np.ones(len(piece), bool)
            for axis, low, high in zip(indices, start, stop, strict=True):
                inside &= (axis >= low) & (axis < high)
            place = tuple(axis[inside] - low for axis, low in zip(indices, start, strict=True))
            out[place] = piece[inside]
        return out

    def _pieces(self, nbytes: int) -> Iterator[tuple[int, Array]]:
        """Consecutive elements, with the number of the first; at most `nbytes` decoded at once."""
        left = np.zeros(0, np.uint8)
        done, numel = 0, self.spec.numel
        for raw in StoredTensor.raw(self.extent).windows(max(nbytes // self.dtype.itemsize, 1)):
            data = np.concatenate((left, raw))
            ends = np.flatnonzero(data < 0x80)
            cut = int(ends[-1]) + 1 if len(ends) else 0
            left = data[cut:]
            if len(left) >= MAX_NBYTES:
                raise self._corrupt(f"a number of over {MAX_NBYTES} bytes")
            if done + len(ends) > numel:
                raise self._corrupt(f"over {numel} elements, its shape has {numel}")
            if len(ends):
                yield done, self._decoded(data[:cut], ends)
            done += len(ends)
        if len(left) or done != numel:
            raise self._corrupt(f"{done} elements, its shape has {numel}")

    def _decoded(self, data: Bytes, ends: npt.NDArray[np.intp]) -> Array:
        starts = np.concatenate((np.zeros(1, np.intp), ends[:-1] + 1))
        lengths = ends - starts + 1
        values = np.zeros(len(ends), np.uint64)
        for place in range(int(lengths.max())):
            long = np.flatnonzero(lengths > place)
            digits = data[starts[long] + place]
            if place >= MAX_NBYTES - 1 and (place >= MAX_NBYTES or digits.max() > 1):
                raise self._corrupt("a number of over 64 bits")
            values[long] |= (digits & 0x7F).astype(np.uint64) << np.uint64(7 * place)
        return self._cast(values)

    def _cast(self, values: npt.NDArray[np.uint64]) -> Array:
        """The numbers as elements, each of which must be one."""
        wide, bits = values.view(np.int64), values.astype(_WORDS[self.dtype.itemsize])
        if self.dtype.kind == "bool":
            fits = values <= 1
        elif self.dtype.numpy.kind == "i":
            fits = bits.view(f"<i{self.dtype.itemsize}").astype(np.int64) == wide
        else:
            fits = bits.astype(np.uint64) == values
        if not fits.all():
            raise self._corrupt(f"{wide[np.flatnonzero(~fits)[0]]}, which is no {self.dtype.name}")
        elements: Array = bits.view(self.dtype.numpy)
        return elements

    def _corrupt(self, what: str) -> CkptError:
        return FormatError.of(
            "corrupt-file",
            f"'{self.name}' ({self.dtype.name}{list(self.shape)}) has {what} [{self.extent.source.name}]",
            "Copy the file again.",
            loc=(self.name,),
        )


def may_hold(nbytes: int, shape: tuple[int, ...]) -> bool:
    """Whether so many bytes may be the elements of a tensor."""
    numel = math.prod(shape)
    return numel <= nbytes <= MAX_NBYTES * numel
