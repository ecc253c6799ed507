"""How DeepSpeed cuts parameters into the flat vectors of its ranks, both ways.

- ZeRO 1 and 2: a group's parameters stand one after another in one vector, which is cut into as many equal
  parts as there are ranks. Each parameter may be followed by padding; the last parts end in padding, which
  some of the stored vectors have and others have not.
- ZeRO 3: each parameter is cut into equal parts of `ceil(numel / ranks)`, the last one padded; a rank's
  vector is its parts of all parameters of a group.

Everything here is lazy: a parameter is a `Concat` of `Slice`s of vectors, and a vector one of parameters.
Source: deepspeed 0.19 `runtime/zero/stage_1_and_2.py` (`get_data_parallel_partitions`),
`runtime/zero/partition_parameters.py` (`_partition_param`), `utils/zero_to_fp32.py`.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

from ckptconv.ops import Concat, Reshape, Slice
from ckptconv.tensor import TensorRef

_FACTOR = 2
"""Vectors of ZeRO 1 and 2 are padded to a multiple of this times the ranks, for NCCL."""


@dataclass(frozen=True, slots=True)
class Span:
    """A run of elements of one parameter in the vector of one rank."""

    param: int
    """Position of the parameter in its group."""
    at: int
    """First element in the vector."""
    start: int
    """First element of the parameter."""
    count: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Cut:
    """How one group of parameters is cut."""

    numels: tuple[int, ...]
    """Elements of each parameter."""
    paddings: tuple[int, ...] = ()
    """Elements of padding after each; none where there is no number."""
    ranks: int
    by_param: bool
    """Whether each parameter is cut by itself (ZeRO 3), not the vector of all."""

    @property
    def length(self) -> int:
        """Elements that all ranks have together, at least."""
        if self.by_param:
            return self.ranks * sum(self._part(numel) for numel in self.numels)
        return sum(self.numels) + sum(self.paddings)

    def misfit(self, lengths: Sequence[int]) -> str:
        """Why vectors of these lengths, one per rank, are not those of the group; empty where they are."""
        had = sum(lengths)
        if self.by_param:
            wanted = [self.length // self.ranks] * self.ranks
        else:
            unit = _FACTOR * self.ranks
            if had < self.length or math.ceil(had / unit) != math.ceil(self.length / unit):
                return f"{self.length} elements are needed, the ranks have {had}"
            part = lengths[0]
            wanted = [min(part, max(0, had - rank * part)) for rank in range(self.ranks)]
        if list(lengths) != wanted:
            return f"the ranks have {list(lengths)} elements, expected {wanted}"
        return ""

    def spans(self, rank: int, begin: int, length: int) -> Iterator[Span]:
        """What the vector of a rank is made of, in its order; `begin`: what the ranks before it have."""
        if self.by_param:
            yield from self._parts(rank)
            return
        paddings = self.paddings or (0,) * len(self.numels)
        ends = list(accumulate(n + p for n, p in zip(self.numels, paddings, strict=True)))
        for param in range(bisect_right(ends, begin), len(ends)):
            first = ends[param] - self.numels[param] - paddings[param]
            if first >= begin + length:
                break
            low, high = max(first, begin), min(first + self.numels[param], begin + length)
            if low < high:
                yield Span(param, low - begin, low - first, high - low)

    def _part(self, numel: int) -> int:
        return -(-numel // self.ranks)

    def _parts(self, rank: int) -> Iterator[Span]:
        at = 0
        for param, numel in enumerate(self.numels):
            part = self._part(numel)
            count = max(0, min(part, numel - rank * part))
            if count:
                yield Span(param, at, rank * part, count)
            at += part


def begins(lengths: Sequence[int]) -> list[int]:
    """What the ranks before each have together."""
    return [0, *accumulate(lengths)][: len(lengths)]


def joined(cut: Cut, vectors: Sequence[TensorRef], shapes: Sequence[tuple[int, ...]]) -> list[TensorRef]:
    """The parameters of a group, of its ranks' vectors; these must fit (`misfit`)."""
    parts: list[list[TensorRef]] = [[] for _ in shapes]
    lengths = [vector.spec.numel for vector in vectors]
    for rank, (vector, begin) in enumerate(zip(vectors, begins(lengths), strict=True)):
        for span in cut.spans(rank, begin, lengths[rank]):
            parts[span.param].append(_cut(vector, span.at, span.count))
    made = []
    for shape, pieces in zip(shapes, parts, strict=True):
        flat = concatenated(pieces) if pieces else _cut(vectors[0], 0, 0)
        made.append(flat.apply(Reshape(flat.shape, shape)))
    return made


def vector_of(
    cut: Cut, rank: int, begin: int, length: int, params: Mapping[int, TensorRef], padding: TensorRef
) -> TensorRef:
    """The vector of a rank, of the parameters that it has; `padding`: what stands between them."""
    pieces: list[TensorRef] = []
    done = used = 0

    def pad(until: int) -> None:
        nonlocal done, used
        if until > done:
            pieces.append(_cut(padding, used, until - done))
            used, done = used + until - done, until

    for span in cut.spans(rank, begin, length):
        pad(span.at)
        param = params[span.param]
        flat = param.apply(Reshape(param.shape, (param.spec.numel,)))
        pieces.append(_cut(flat, span.start, span.count))
        done = span.at + span.count
    pad(length)
    return concatenated(pieces) if pieces else padding


def padding_of(cut: Cut, rank: int, begin: int, vector: TensorRef) -> TensorRef:
    """What stands in the vector of a rank beside its parameters."""
    pieces: list[TensorRef] = []
    done, length = 0, vector.spec.numel
    for span in cut.spans(rank, begin, length):
        if span.at > done:
            pieces.append(_cut(vector, done, span.at - done))
        done = span.at + span.count
    if length > done:
        pieces.append(_cut(vector, done, length - done))
    return concatenated(pieces) if pieces else _cut(vector, 0, 0)


def concatenated(parts: Sequence[TensorRef]) -> TensorRef:
    """The vectors one after another."""
    first, *others = parts
    return first.apply(Concat(0), *others) if others else first


def _cut(vector: TensorRef, start: int, count: int) -> TensorRef:
    return vector.apply(Slice(0, start, start + count))
