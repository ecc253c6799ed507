"""Partitioned variables: a logical tensor made of the slices that are stored, and cut into the same again."""

from __future__ import annotations

import math
from typing import NamedTuple

from ckptconv.errors import CkptError, FormatError, Loc
from ckptconv.formats.bundle_index import Slice
from ckptconv.formats.ordered_code import FULL
from ckptconv.ops import Concat
from ckptconv.ops import Slice as SliceOp
from ckptconv.tensor import Index, TensorRef

_MAX_CUTS = 64
"""Cuts along alternating axes that lie in one another; a partitioner makes one for each axis."""


class Box(NamedTuple):
    """A slice and where it lies."""

    start: Index
    stop: Index
    tensor: TensorRef


def bounds(extents: Slice, shape: tuple[int, ...]) -> tuple[Index, Index]:
    """First and past-the-last element of a slice, per axis."""
    pairs = [(0, size) if extent == FULL else extent for extent, size in zip(extents, shape, strict=True)]
    return tuple(start for start, _ in pairs), tuple(start + length for start, length in pairs)


def assemble(boxes: list[Box], shape: tuple[int, ...], loc: Loc) -> TensorRef:
    """The tensor that the slices cover, each element exactly once.

    Raises: corrupt-file for gaps and overlaps; unsupported-feature for a cover that no cuts along whole
    axes make.
    """
    if math.prod(shape) == 0:
        whole = [box for box in boxes if box.tensor.shape == shape]
        if not whole:
            raise _misfit("unsupported-feature", f"no slice has the empty tensor's shape {list(shape)}", loc)
        return whole[0].tensor
    filled = [box for box in boxes if 0 not in box.tensor.shape]
    covered = sum(math.prod(box.tensor.shape) for box in filled)
    if covered != math.prod(shape):
        raise _misfit("corrupt-file", f"slices hold {covered} of {math.prod(shape)} elements", loc)
    return _joined(filled, (0,) * len(shape), shape, _MAX_CUTS, loc)


def _joined(boxes: list[Box], start: Index, stop: Index, cuts: int, loc: Loc) -> TensorRef:
    if len(boxes) == 1 and boxes[0][:2] == (start, stop):
        return boxes[0].tensor
    for axis in range(len(start)):
        groups = _groups(boxes, axis)
        if len(groups) < 2 or not cuts:
            continue
        edges = [start[axis], *(min(box.start[axis] for box in group) for group in groups[1:]), stop[axis]]
        parts = []
        for group, low, high in zip(groups, edges[:-1], edges[1:], strict=True):
            begin = tuple(low if a == axis else i for a, i in enumerate(start))
            end = tuple(high if a == axis else i for a, i in enumerate(stop))
            parts.append(_joined(group, begin, end, cuts - 1, loc))
        return parts[0].apply(Concat(axis), *parts[1:])
    raise _misfit("unsupported-feature", f"{len(boxes)} slices overlap, or form no grid of cuts", loc)


def _groups(boxes: list[Box], axis: int) -> list[list[Box]]:
    """Boxes that no cut across the axis separates, along the axis."""
    groups: list[list[Box]] = []
    end = -1
    for box in sorted(boxes, key=lambda box: box.start[axis]):
        if not groups or box.start[axis] >= end:
            groups.append([])
        groups[-1].append(box)
        end = max(end, box.stop[axis])
    return groups


def cut(tensor: TensorRef, extents: Slice) -> TensorRef:
    """One slice of a tensor."""
    for axis, (start, length) in enumerate(extents):
        if (start, length) != FULL:
            tensor = tensor.apply(SliceOp(axis, start, start + length))
    return tensor


def _misfit(code: str, what: str, loc: Loc) -> CkptError:
    name = str(loc[0]) if loc else ""
    if code == "corrupt-file":
        return FormatError.of("corrupt-file", f"'{name}': {what}", "Copy the file again.", loc=loc)
    return FormatError.of("unsupported-feature", f"'{name}': {what}", "Save it unpartitioned.", loc=loc)
