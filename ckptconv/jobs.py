"""What one worker does: streams neighbouring tensors into one file, with their checksums in the same pass.

A `Job` is a value that can be pickled: any `concurrent.futures.Executor` whose workers see the same files
can run it.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeGuard

import google_crc32c
import numpy as np
from isal import isal_zlib

from ckptconv.errors import CkptError, Code, FormatError, Problem
from ckptconv.formats.base import ChecksumKind, Placement
from ckptconv.formats.crc import JOINED
from ckptconv.source import FileSource, Watched
from ckptconv.tensor import Bytes, Checksum, Extent, Index, StoredTensor, TensorRef, as_bytes

_CRC32C_NBYTES = 64 << 10
"""crc32c takes only `bytes`: windows are handed over in copies small enough to stay in the cache."""

_COPIED_NBYTES = 64 << 20
"""What the system is asked to copy at once: it cannot be interrupted meanwhile."""

Advance = Callable[[int], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One placement, and the source checksums that are checked with it."""

    placement: Placement
    inline: Checksum | None = None
    """Of the extent that the placement streams whole and in order: checked on the way."""
    before: tuple[Extent, ...] = ()
    """Checked in a pass of their own, which brings them into the system's cache too."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """Neighbouring placements of one file."""

    path: str
    """The file, which exists."""
    record: str = ""
    """Where it is kept that the file is finished, see `ckptconv.finished`."""
    steps: tuple[Step, ...]
    window_nbytes: int
    panel_nbytes: int
    contents: bool = True
    """Whether a checksum of every tensor is asked for, also where the file records none."""
    digests: bool = False

    @property
    def nbytes(self) -> int:
        return sum(step.placement.tensor.spec.nbytes for step in self.steps)


@dataclass(frozen=True, slots=True, kw_only=True)
class JobResult:
    """What a worker computed, by placement key."""

    contents: dict[str, Checksum] = field(default_factory=dict)
    digests: dict[str, str] = field(default_factory=dict)


def plan_steps(placements: Sequence[Placement]) -> dict[str, Step]:
    """By placement key: each source extent is checked exactly once, on the way where that is possible."""
    inline: dict[Hashable, str] = {}
    recorded_by = [recorded_whole(placement.tensor) for placement in placements]
    for placement, recorded in zip(placements, recorded_by, strict=True):
        if recorded is not None:
            inline.setdefault(placement.tensor.extents[0].id, placement.key)
    seen = set(inline)
    steps = {}
    for placement, recorded in zip(placements, recorded_by, strict=True):
        before = []
        for extent in (part.checked for part in placement.tensor.extents):
            if extent.checksum is not None and extent.id not in seen:
                seen.add(extent.id)
                before.append(extent)
        if recorded is not None and inline[placement.tensor.extents[0].id] != placement.key:
            recorded = None
        assert placement.key not in steps, f"two placements have the key {placement.key!r}"
        steps[placement.key] = Step(placement=placement, inline=recorded, before=tuple(before))
    return steps


def is_as_stored(tensor: TensorRef) -> TypeGuard[StoredTensor]:
    """Whether the tensor's windows are bytes of its extent, in their order."""
    return (
        isinstance(tensor, StoredTensor)
        and tensor.is_dense
        and not (tensor.extent.big_endian and tensor.dtype.swap > 1)
    )


def recorded_whole(tensor: TensorRef) -> Checksum | None:
    """The recorded checksum of a tensor whose windows are its extent's bytes, all of them."""
    if not is_as_stored(tensor) or tensor.offset or tensor.extent.nbytes != tensor.spec.nbytes:
        return None
    return tensor.extent.checksum


def checksum(kind: ChecksumKind, window: Bytes, value: int = 0) -> int:
    """Continue a running checksum."""
    if kind == "crc32":
        return int(isal_zlib.crc32(window.data, value))
    for low in range(0, len(window), _CRC32C_NBYTES):
        value = google_crc32c.extend(value, window[low : low + _CRC32C_NBYTES].tobytes())
    return value


def running_checksum(
    kind: ChecksumKind,
    tensor: TensorRef,
    window_nbytes: int,
    panel_nbytes: int,
    advance: Advance | None = None,
) -> int:
    """Checksum of the tensor's C-order little-endian bytes, streamed."""
    value = 0
    for window in tensor.windows(window_nbytes, panel_nbytes):
        value = checksum(kind, window, value)
        if advance is not None:
            advance(len(window))
    return value


def run_job(job: Job, advance: Advance | None = None) -> JobResult:
    """Write the job's tensors; problems of all of them are collected.

    Raises: checksum-mismatch, truncated-tensor, source-changed, and what the tensors' ops raise.
    """
    result = JobResult()
    failures: list[CkptError] = []
    sources: dict[int, Watched] = {}
    fd = os.open(job.path, os.O_WRONLY | getattr(os, "O_BINARY", 0))
    try:
        for step in job.steps:
            tensor, key = step.placement.tensor, step.placement.key
            sources.update((id(e.source), e.source) for e in tensor.extents if isinstance(e.source, Watched))
            try:
                for extent in step.before:
                    check_extent(extent, key, job.window_nbytes)
                _write(step, fd, job, result, advance)
            except CkptError as error:
                failures.append(_located(error, key))
    finally:
        os.close(fd)
    for source in sources.values():
        source.check_unchanged()
    if failures:
        raise type(failures[0])(*(problem for failure in failures for problem in failure.problems))
    return result


def _located(error: CkptError, key: str) -> CkptError:
    """The error with the tensor's key in each location: an op does not know whose it is."""
    return type(error)(*(p if key in p.loc else replace(p, loc=(*p.loc, key)) for p in error.problems))


def _write(step: Step, fd: int, job: Job, result: JobResult, advance: Advance | None) -> None:
    placement = step.placement
    kind = placement.checksum or ("crc32c" if job.contents else None)
    if kind is None and step.inline is None and not job.digests and _copied(placement, fd, advance):
        return
    tiles = None if step.inline or job.digests else placement.tensor.tiles(job.panel_nbytes)
    if tiles is not None:
        content = _write_tiles(placement, tiles, fd, kind, advance)
    else:
        content = _write_windows(step, fd, job, result, kind, advance)
    if kind is not None:
        result.contents[placement.key] = Checksum(kind=kind, value=content)


def _copied(placement: Placement, fd: int, advance: Advance | None) -> bool:
    """Whether the system copied the tensor, whose bytes are in the source as they are in the target."""
    tensor = placement.tensor
    if not is_as_stored(tensor) or not isinstance(tensor.extent.source, FileSource):
        return False
    start, nbytes = tensor.extent.offset + tensor.offset * max(tensor.dtype.itemsize, 1), tensor.spec.nbytes
    for done in range(0, nbytes, _COPIED_NBYTES):
        count = min(_COPIED_NBYTES, nbytes - done)
        if not tensor.extent.source.copy_into(start + done, count, fd, placement.offset + done):
            return False
        if advance is not None:
            advance(0)  # nobody may want it any more
    if advance is not None:
        advance(nbytes)
    return True


def _write_windows(
    step: Step, fd: int, job: Job, result: JobResult, kind: ChecksumKind | None, advance: Advance | None
) -> int:
    """Write the bytes in order, and return their checksum (0 where none is asked for)."""
    placement, inline = step.placement, step.inline
    sha = hashlib.sha256() if job.digests else None
    offset, content, recorded = placement.offset, 0, 0
    for window in placement.tensor.windows(job.window_nbytes, job.panel_nbytes):
        if kind is not None:
            content = checksum(kind, window, content)
        if inline is not None and inline.kind != kind:
            recorded = checksum(inline.kind, window, recorded)
        if sha is not None:
            sha.update(window.data)
        pwrite(fd, window.data, offset)
        offset += len(window)
        if advance is not None:
            advance(len(window))
    got, expected = offset - placement.offset, placement.tensor.spec.nbytes
    if got != expected:
        raise _damaged(
            "truncated-tensor", (placement.key,), f"'{placement.key}': expected {expected} bytes, got {got}"
        )
    if inline is not None:
        _compare(
            inline, content if inline.kind == kind else recorded, placement.tensor.extents[0], placement.key
        )
    if sha is not None:
        result.digests[placement.key] = sha.hexdigest()
    return content


def _write_tiles(
    placement: Placement,
    tiles: Sequence[tuple[Index, Index]],
    fd: int,
    kind: ChecksumKind | None,
    advance: Advance | None,
) -> int:
    """Write a matrix box by box, each row of a box in its place; the checksum is joined from theirs."""
    (rows, columns), item = placement.tensor.shape, placement.tensor.dtype.itemsize
    lefts = sorted({start[1] for start, _ in tiles})
    sums = np.zeros((rows, len(lefts)), np.uint32)
    for (top, left), stop in tiles:
        block = placement.tensor.block((top, left), stop)
        place = lefts.index(left)
        for row, data in enumerate(as_bytes(block).reshape(len(block), -1), top):
            pwrite(fd, data.data, placement.offset + (row * columns + left) * item)
            if kind is not None:
                sums[row, place] = checksum(kind, data)
        if advance is not None:
            advance(block.nbytes)
    if kind is None:
        return 0
    widths = np.diff([*lefts, columns]) * item
    return JOINED[kind](sums.reshape(-1), np.tile(widths, rows))


def pwrite(fd: int, data: memoryview, offset: int) -> None:
    """Write all of `data` at `offset`."""
    done = 0
    while done < len(data):
        done += os.pwrite(fd, data[done:] if done else data, offset + done)


def check_extent(extent: Extent, key: str, window_nbytes: int) -> None:
    """Stream an extent and compare its checksum, if it has one; `key` names a tensor that uses it.

    Raises: checksum-mismatch, truncated-tensor.
    """
    if extent.checksum is not None:
        raw = StoredTensor.raw(extent)
        value = running_checksum(extent.checksum.kind, raw, window_nbytes, window_nbytes)
        _compare(extent.checksum, value, extent, key)


def _compare(recorded: Checksum, value: int, extent: Extent, key: str) -> None:
    if value == recorded.value:
        return
    name = extent.source.name
    what = f"{recorded.kind} of '{key}'" if key else recorded.kind
    where = f"{name}@{extent.offset}..{extent.offset + extent.nbytes}"
    raise _damaged(
        "checksum-mismatch",
        (name, key) if key else (name,),
        f"{what}: expected {recorded.value:#010x}, got {value:#010x} [{where}]",
    )


def _damaged(code: Code, loc: tuple[str, ...], message: str) -> FormatError:
    hint = "The source is damaged: copy the file again; nothing was written."
    return FormatError(Problem(code=code, loc=loc, message=message, hint=hint))
