"""Executes a layout: streams every tensor to its place in windows, several at once, and publishes the whole.

Memory does not depend on how large the checkpoint or a single tensor is (`ckptconv.workers`). One pass reads
a tensor, checks the source's checksum, computes the target's, and writes (`ckptconv.jobs`).
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import Executor
from dataclasses import dataclass
from pathlib import Path

from ckptconv.finished import run_once
from ckptconv.formats.base import Layout
from ckptconv.jobs import Job, JobResult, plan_steps, pwrite, run_job
from ckptconv.publish import Publication, no_space, reported, target_error
from ckptconv.tensor import Checksum, FileSource
from ckptconv.workers import Progress, Workers

_FLUSH_NBYTES = 64 << 20


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
    at a time.

    An `executor` of the caller's is given a picklable job for every file, and is not shut down. Its workers
    must see the target's directory and the sources under the same paths. Where one is lost, files that were
    finished stay, and the next call to the same target with an executor takes them as they are
    (`ckptconv.finished`).

    Raises: target-exists, target-busy, target-unwritable, no-space, worker-lost; usage where the target is a
    source; checksum-mismatch, truncated-tensor, source-changed, precision-loss for what the sources hold: all
    that are found, together.
    """
    workers = Workers(jobs=jobs, executor=executor)
    publication = Publication.of(
        layout.kind,
        target,
        [file.name for file in layout.files],
        force,
        replaces=layout.replaces,
        resumable=executor is not None,
    )
    publication.clear_leftovers()
    publication.check()
    _refuse_sources(layout, publication)
    needed = sum(
        max((p.offset + p.tensor.spec.nbytes for p in file.placements), default=0) for file in layout.files
    )
    if needed > shutil.disk_usage(publication.target.parent).free:
        raise no_space(publication.target, needed)
    with reported(publication.target, needed), publication.staged_files():
        todo = _jobs(layout, publication, workers, verify is not None or executor is not None, digests)
        work = run_job if executor is None else run_once
        done = workers.run(work, todo, lambda job: job.nbytes, progress=progress, done=_Flusher())
        result = _finish(layout, publication, done)
        if verify is not None:
            verify(publication.staged, result)
        publication.commit()
        for step in layout.bookkeeping:
            step(publication.target, publication.staging)
    return result


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


def _jobs(
    layout: Layout, publication: Publication, workers: Workers, contents: bool, digests: bool
) -> list[Job]:
    window_nbytes, panel_nbytes = workers.sizes
    steps = plan_steps([placement for file in layout.files for placement in file.placements])
    return [
        Job(
            path=str(publication.path(file.name)),
            record=str(publication.record(number)),
            steps=tuple(steps[placement.key] for placement in portion),
            window_nbytes=window_nbytes,
            panel_nbytes=panel_nbytes,
            contents=contents,
            digests=digests,
        )
        for number, file in enumerate(layout.files)
        for portion in workers.portions(
            sorted(file.placements, key=lambda placement: placement.offset),
            lambda placement: placement.tensor.spec.nbytes,
        )
    ]


class _Flusher:
    """Has the disk begin while workers go on, so that little is left to wait for at the end."""

    def __init__(self) -> None:
        self._unflushed = 0

    def __call__(self, job: Job) -> None:
        self._unflushed += job.nbytes
        if self._unflushed >= _FLUSH_NBYTES:
            _flush(job.path)
            self._unflushed = 0


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
