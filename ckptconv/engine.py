"""Executes a layout: streams every tensor to its place in windows, several at once, and publishes the whole.

Memory is bounded by `BUDGET_NBYTES` over all workers, however large the checkpoint or a single tensor is.
One pass reads a tensor, checks the source's checksum, computes the target's, and writes (`ckptconv.jobs`).
"""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from concurrent.futures import Executor, Future, ThreadPoolExecutor, as_completed, wait
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from ckptconv.errors import CkptError, FormatError, Problem, TargetError
from ckptconv.formats.base import Layout
from ckptconv.jobs import (
    Job,
    JobResult,
    check_extent,
    plan_steps,
    pwrite,
    recorded_whole,
    run_job,
    running_checksum,
)
from ckptconv.publish import Publication, no_space, reported, target_error
from ckptconv.tensor import Checksum, Extent, FileSource, TensorRef

BUDGET_NBYTES = 96 << 20
"""What the windows and panels of all workers hold together."""
_WINDOW_NBYTES = (256 << 10, 2 << 20)
"""Least and most of a window."""
_JOB_NBYTES = 64 << 20
_FLUSH_NBYTES = 64 << 20
_JOB_STEPS = 1024
"""What a worker takes at once: handing out tensors of a few bytes one by one costs more than reading them."""

Progress = Callable[[int, int], None]
K = TypeVar("K", bound=Hashable)
T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class WriteResult:
    """What was written."""

    files: tuple[tuple[str, int], ...]
    """(name as in the layout, bytes) in the order of publication."""
    bytes_written: int
    contents: Mapping[str, Checksum]
    """Placement key -> checksum of the tensor's C-order little-endian bytes, for `verify_written`; of those
    alone that the target records, where nothing verifies."""
    digests: Mapping[str, str]
    """Placement key -> sha256 of the same bytes, hexadecimal; empty unless asked for."""


def write(
    layout: Layout,
    target: Path,
    *,
    force: bool = False,
    jobs: int | None = None,
    executor: Executor | None = None,
    verify: Callable[[Path, WriteResult], None] | None = None,
    progress: Progress | None = None,
    digests: bool = False,
) -> WriteResult:
    """Write the layout to `target`, whole or not at all.

    `verify` is called with the path under which the written target can be read before it is published, and
    prevents the publication by raising. `progress` gets tensor bytes (done, total), from any thread, one call
    at a time. An `executor` of the caller's is given picklable jobs and is not shut down.

    Raises: target-exists, target-unwritable, no-space; usage where the target is a source; checksum-mismatch,
    truncated-tensor, source-changed, precision-loss for what the sources hold: all that are found, together.
    """
    names = [file.name for file in layout.files]
    publication = Publication.of(layout.kind, target, names, force, layout.replaces)
    publication.check()
    _refuse_sources(layout, publication)
    needed = sum(
        max((p.offset + p.tensor.spec.nbytes for p in file.placements), default=0) for file in layout.files
    )
    if needed > shutil.disk_usage(publication.target.parent).free:
        raise no_space(publication.target, needed)
    with reported(publication.target, needed):
        try:
            publication.begin()
            for file in layout.files:
                publication.path(file.name).touch()
            done = _run(
                _jobs(layout, publication, _workers(jobs, executor), verify is not None, digests),
                jobs,
                executor,
                progress,
            )
            result = _finish(layout, publication, done)
            if verify is not None:
                verify(publication.staged, result)
            publication.commit()
        finally:
            publication.end()
        for step in layout.bookkeeping:
            step(publication.target)
    return result


def verify_written(
    expected: Mapping[K, Checksum],
    tensors: Iterable[tuple[K, TensorRef]],
    *,
    jobs: int | None = None,
    progress: Progress | None = None,
) -> None:
    """Read the tensors again and compare them with what was written, those of the same key.

    Raises: verify-failed with every key that is missing, or whose bytes or recorded checksum differ.
    """
    found = {key: tensor for key, tensor in tensors if key in expected}
    problems = [
        _verify_problem(key, f"'{_name(key)}' was written and is not there when the target is read")
        for key in expected
        if key not in found
    ]
    meter = _Meter(sum(tensor.spec.nbytes for tensor in found.values()), progress)
    workers = _workers(jobs, None)
    window_nbytes, panel_nbytes = _sizes(workers)

    def check(keys: list[K]) -> list[Problem]:
        return [problem for key in keys if (problem := check_one(key)) is not None]

    def check_one(key: K) -> Problem | None:
        tensor, checksum = found[key], expected[key]
        value = running_checksum(checksum.kind, tensor, window_nbytes, panel_nbytes, meter.advance)
        if value != checksum.value:
            numbers = f"{checksum.kind} is {value:#010x}, {checksum.value:#010x} was written"
            return _verify_problem(key, f"'{_name(key)}' does not read back equal: its {numbers}")
        recorded = recorded_whole(tensor)
        if recorded is not None and recorded.kind == checksum.kind and recorded.value != value:
            numbers = f"{recorded.value:#010x}, its bytes have {value:#010x}"
            return _verify_problem(
                key, f"the target records for '{_name(key)}' the {checksum.kind} {numbers}"
            )
        return None

    with _threads(workers, meter) as pool:
        portions = _portions(found, lambda key: found[key].spec.nbytes)
        problems += [problem for some in pool.map(check, portions) for problem in some]
    if problems:
        raise TargetError(*problems)


def check_sources(extents: Iterable[Extent], *, jobs: int | None = None) -> None:
    """Stream every extent that has a recorded checksum, and compare.

    Raises: checksum-mismatch, truncated-tensor; all that are found, together.
    """
    extents = {extent.checked.id: extent.checked for extent in extents}.values()
    workers = _workers(jobs, None)
    window_nbytes, _ = _sizes(workers)

    def check(portion: list[Extent]) -> list[Problem]:
        found: list[Problem] = []
        for extent in portion:
            meter.advance(0)
            try:
                check_extent(extent, "", window_nbytes)
            except FormatError as error:
                found += error.problems
        return found

    meter = _Meter(0, None)
    with _threads(workers, meter) as pool:
        portions = _portions(extents, lambda extent: extent.nbytes)
        problems = [problem for found in pool.map(check, portions) for problem in found]
    if problems:
        raise FormatError(*problems)


def _name(key: object) -> str:
    return "/".join(map(str, key)) if isinstance(key, tuple) else str(key)


def _verify_problem(key: object, message: str) -> Problem:
    hint = "The target was not published. Check disk and memory; if it happens again, report it as a bug."
    return Problem(code="verify-failed", loc=(_name(key),), message=message, hint=hint)


def _refuse_sources(layout: Layout, publication: Publication) -> None:
    """Refuse to replace a file that is read from."""
    sources = {
        id(extent.source): extent.source
        for file in layout.files
        for placement in file.placements
        for extent in placement.tensor.extents
        if isinstance(extent.source, FileSource)
    }
    replaced = publication.existing()
    identities = {(stat.st_dev, stat.st_ino) for stat in (path.stat() for path in replaced if path.exists())}
    for source in sources.values():
        inside = any(path.resolve() in Path(source.path).resolve().parents for path in replaced)
        if inside or source.identity in identities:
            raise target_error(
                "usage",
                publication.target,
                f"'{source.path}' is read from, and would be replaced by the target '{publication.target}'",
                "Choose another target.",
            )


def _workers(jobs: int | None, executor: Executor | None) -> int:
    if jobs is not None and jobs < 1:
        raise TargetError(
            Problem(
                code="usage",
                loc=("jobs",),
                message=f"expected at least 1 job, got {jobs}",
                hint="Pass --jobs 1 or more.",
            )
        )
    # How many workers a foreign executor has cannot be asked; its memory is its own to bound.
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return jobs or (1 if executor is not None else min(4, cpus))


def _sizes(workers: int) -> tuple[int, int]:
    """Bytes of a window and of a panel. An op in floating point holds several times its window."""
    share = BUDGET_NBYTES // workers
    least, most = _WINDOW_NBYTES
    window = min(max(share // 8, least), most)
    return window - window % 64, max(share * 2 // 3, least)


def _portions(items: Iterable[T], nbytes: Callable[[T], int]) -> Iterator[list[T]]:
    """Neighbours that one worker takes together."""
    portion: list[T] = []
    room = _JOB_NBYTES
    for item in items:
        portion.append(item)
        room -= nbytes(item)
        if room <= 0 or len(portion) == _JOB_STEPS:
            yield portion
            portion, room = [], _JOB_NBYTES
    if portion:
        yield portion


def _jobs(layout: Layout, publication: Publication, workers: int, contents: bool, digests: bool) -> list[Job]:
    window_nbytes, panel_nbytes = _sizes(workers)
    steps = plan_steps([placement for file in layout.files for placement in file.placements])
    return [
        Job(
            path=str(publication.path(file.name)),
            steps=tuple(steps[placement.key] for placement in portion),
            window_nbytes=window_nbytes,
            panel_nbytes=panel_nbytes,
            contents=contents,
            digests=digests,
        )
        for file in layout.files
        for portion in _portions(
            sorted(file.placements, key=lambda placement: placement.offset),
            lambda placement: placement.tensor.spec.nbytes,
        )
    ]


class _Cancelled(Exception):  # noqa: N818 -- ends a worker, is never seen outside
    pass


class _Meter:
    """Adds up bytes from all workers, and is where they notice that they are not wanted any more."""

    def __init__(self, total: int, progress: Progress | None) -> None:
        self._done, self._total, self._progress = 0, total, progress
        self._lock = threading.Lock()
        self.cancelled = False

    def advance(self, nbytes: int) -> None:
        if self.cancelled:
            raise _Cancelled
        if self._progress is None:
            return
        with self._lock:
            self._done += nbytes
            self._progress(self._done, self._total)


@contextmanager
def _threads(workers: int, meter: _Meter) -> Iterator[ThreadPoolExecutor]:
    """A pool whose threads stop at their next window when the block is left by an exception."""
    pool = ThreadPoolExecutor(workers, thread_name_prefix="ckptconv")
    try:
        yield pool
    except BaseException:
        meter.cancelled = True
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def _run(
    jobs: list[Job], workers: int | None, executor: Executor | None, progress: Progress | None
) -> list[JobResult]:
    meter = _Meter(sum(job.nbytes for job in jobs), progress)
    if executor is None:
        with _threads(_workers(workers, None), meter) as pool:
            return _collect({pool.submit(run_job, job, meter.advance): job for job in jobs}, None)
    futures = {executor.submit(run_job, job): job for job in jobs}
    try:
        return _collect(futures, meter)
    except BaseException:
        for future in futures:
            future.cancel()
        wait(futures)
        raise


def _collect(futures: Mapping[Future[JobResult], Job], meter: _Meter | None) -> list[JobResult]:
    results: list[JobResult] = []
    failures: list[CkptError] = []
    unflushed = 0
    for future in as_completed(futures):
        try:
            results.append(future.result())
        except CkptError as error:
            failures.append(error)
            continue
        job = futures[future]
        if meter is not None:
            meter.advance(job.nbytes)
        unflushed += job.nbytes
        if unflushed >= _FLUSH_NBYTES:
            # The disk begins while the workers go on: what is left to be waited for at the end is little.
            _flush(job.path)
            unflushed = 0
    if failures:
        problems = [problem for failure in failures for problem in failure.problems]
        raise type(failures[0])(*sorted(problems, key=lambda problem: tuple(map(str, problem.loc))))
    return results


def _flush(path: str) -> None:
    fd = os.open(path, os.O_RDWR | getattr(os, "O_BINARY", 0))
    try:
        getattr(os, "fdatasync", os.fsync)(fd)
    finally:
        os.close(fd)


def _finish(layout: Layout, publication: Publication, done: list[JobResult]) -> WriteResult:
    """Write what depends on checksums, and bring everything to the disk."""
    contents = {key: checksum for result in done for key, checksum in result.contents.items()}
    asked = {p.key for file in layout.files for p in file.placements if p.checksum is not None}
    checksums = {key: checksum.value for key, checksum in contents.items() if key in asked}
    files = []
    for file in layout.files:
        with publication.path(file.name).open("r+b", buffering=0) as stream:
            for offset, data in file.finish(checksums):
                pwrite(stream.fileno(), memoryview(data), offset)
            os.fsync(stream.fileno())
            files.append((file.name, os.fstat(stream.fileno()).st_size))
    return WriteResult(
        files=tuple(files),
        bytes_written=sum(nbytes for _, nbytes in files),
        contents=contents,
        digests={key: digest for result in done for key, digest in result.digests.items()},
    )
