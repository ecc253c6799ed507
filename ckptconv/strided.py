"""Boxes, strides and copies of n-dimensional arrays: the arithmetic below lazy tensors. Knows no file."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import lru_cache

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.generic]
Bytes = npt.NDArray[np.uint8]
Index = tuple[int, ...]

_TILE_WIDTH = 64
_TILE_NUMEL = 1 << 14
"""A tile of a transposition: elements of the result's last axis, and of all; has to fit the L2 cache."""
_WORDS: dict[int, np.dtype[np.generic]] = {
    1: np.dtype("u1"),
    2: np.dtype("u2"),
    4: np.dtype("u4"),
    8: np.dtype("u8"),
    16: np.dtype("c16"),
}


@lru_cache(maxsize=4096)  # a model repeats its shapes
def dense_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Strides in elements of a C-order tensor."""
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= max(size, 1)
    return tuple(reversed(strides))


def word_of(itemsize: int) -> np.dtype[np.generic]:
    """A plain type of that many bytes; numpy copies those faster than element types of other packages."""
    return _WORDS[itemsize]


def same_layout(shape: tuple[int, ...], a: tuple[int, ...], b: tuple[int, ...]) -> bool:
    """Whether two strides put every element in the same place."""
    return a == b or 0 in shape or all(n <= 1 or x == y for n, x, y in zip(shape, a, b, strict=True))


def as_bytes(array: Array) -> Bytes:
    """A C-order array's memory as flat bytes, for dtypes that have no buffer of their own too."""
    return array.reshape(-1).view(np.uint8) if array.size else np.zeros(0, np.uint8)


def box_shape(start: Index, stop: Index) -> tuple[int, ...]:
    """Shape of the box from `start` to `stop` (exclusive)."""
    return tuple(high - low for low, high in zip(start, stop, strict=True))


def box_slices(start: Index, stop: Index) -> tuple[slice, ...]:
    """The box as an index of an array."""
    return tuple(slice(low, high) for low, high in zip(start, stop, strict=True))


def blocks(shape: tuple[int, ...], itemsize: int, nbytes: int) -> Iterator[tuple[Index, Index]]:
    """Consecutive boxes that cover a tensor in C order, each of at most `nbytes` (one element at least)."""
    if math.prod(shape) == 0:
        return
    rank, inner = len(shape), itemsize
    axis = rank
    while axis > 0 and inner * shape[axis - 1] <= nbytes:
        axis -= 1
        inner *= shape[axis]
    if axis == 0:
        yield (0,) * rank, shape
        return
    step = max(nbytes // inner, 1)
    lead = shape[: axis - 1]
    for prefix in np.ndindex(*lead):
        for low in range(0, shape[axis - 1], step):
            high = min(low + step, shape[axis - 1])
            start = (*prefix, low, *(0,) * (rank - axis))
            stop = (*(i + 1 for i in prefix), high, *shape[axis:])
            yield start, stop


def flat_boxes(shape: tuple[int, ...], low: int, high: int) -> Iterator[tuple[Index, Index]]:
    """Elements `low` to `high` of the flattened tensor as consecutive boxes: two per axis at most."""
    if low >= high:
        return
    if not shape:
        yield (), ()
        return
    row = math.prod(shape[1:])
    first, last = low // row, high // row
    if first == last:
        for start, stop in flat_boxes(shape[1:], low - first * row, high - first * row):
            yield (first, *start), (first + 1, *stop)
        return
    if low > first * row:
        for start, stop in flat_boxes(shape[1:], low - first * row, row):
            yield (first, *start), (first + 1, *stop)
        first += 1
    if first < last:
        yield (first, *(0,) * (len(shape) - 1)), (last, *shape[1:])
    for start, stop in flat_boxes(shape[1:], 0, high - last * row):
        yield (last, *start), (last + 1, *stop)


def copy(out: Array, view: Array) -> None:
    """`out[...] = view` for arrays of one shape and dtype, in cache-sized tiles where axes change places.

    A plain assignment walks one side with a stride of whole rows and misses the cache at every element;
    tiles are about four to ten times as fast on large matrices.
    """
    word = word_of(out.itemsize)
    out, view = out.view(word), view.view(word)
    steps = [abs(step) for step in view.strides]
    moving = [axis for axis in range(out.ndim) if out.shape[axis] > 1 and steps[axis]]
    if out.size <= _TILE_NUMEL or not moving or min(moving, key=lambda a: steps[a]) == moving[-1]:
        out[...] = view
        return
    tile = [1] * out.ndim
    tile[-1] = min(out.shape[-1], _TILE_WIDTH)
    room = _TILE_NUMEL // tile[-1]
    for axis in sorted(range(out.ndim - 1), key=lambda a: (steps[a], -a)):
        tile[axis] = max(min(out.shape[axis], room), 1)
        room //= tile[axis]
    ranges = [range(0, size, step) for size, step in zip(out.shape, tile, strict=True)]
    for corner in np.ndindex(*map(len, ranges)):
        index = tuple(slice(r[i], r[i] + t) for r, i, t in zip(ranges, corner, tile, strict=True))
        out[index] = view[index]


def dense(view: Array) -> Array:
    """The same elements in C order: `view` itself where it is that already."""
    if view.flags.c_contiguous:
        return view
    out = np.empty(view.shape, view.dtype)
    copy(out, view)
    return out
