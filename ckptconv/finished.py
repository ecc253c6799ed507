"""Files of a target that are written once, however often they are asked for: after a worker was lost.

Of a file that is whole there is a record: what was asked for, and a checksum of every tensor. A job that
finds the record of its own question, and the bytes that it speaks of, is done. Anything else, a record of
another source or another plan, a file cut short, is written anew.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator
from typing import Any

from ckptconv.errors import FormatError
from ckptconv.jobs import Advance, Job, JobResult, run_job, running_checksum
from ckptconv.source import ByteSource, FileSource
from ckptconv.tensor import Checksum, DerivedTensor, Extent, FilledTensor, StoredTensor, TensorRef


def run_once(job: Job, advance: Advance | None = None) -> JobResult:
    """What the job of a whole file computes, from its record where it is done already.

    Raises: as `run_job`.
    """
    asked = _question(job)
    done = _recorded(job, asked)
    if done is None:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(job.record)
        done = run_job(job, advance)
        _record(job, asked, done)
    return done


def _record(job: Job, asked: str, done: JobResult) -> None:
    """Put the record beside a file whose bytes are on the disk; it appears whole or not at all."""
    fd = os.open(job.path, os.O_RDWR | getattr(os, "O_BINARY", 0))
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
    contents = {key: (content.kind, content.value) for key, content in done.contents.items()}
    written = f"{job.record}.{os.getpid()}"
    with open(written, "w", encoding="utf-8") as file:
        json.dump({"asked": asked, "contents": contents, "digests": done.digests}, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(written, job.record)


def _recorded(job: Job, asked: str) -> JobResult | None:
    """What is recorded of this very job, if the file still has those bytes."""
    try:
        with open(job.record, encoding="utf-8") as file:
            told = json.load(file)
        if told["asked"] != asked:
            return None
        contents = {key: Checksum(kind=k, value=v) for key, (k, v) in told["contents"].items()}
        result = JobResult(contents=contents, digests=dict(told["digests"]))
        return result if all(_is_there(job, result)) else None
    except (OSError, ValueError, TypeError, KeyError, FormatError):
        return None  # cut short, or none of ours: the file is written again, and a record with it


def _is_there(job: Job, result: JobResult) -> Iterator[bool]:
    source = FileSource(job.path)
    for step in job.steps:
        placement = step.placement
        content = result.contents[placement.key]
        extent = Extent(source=source, offset=placement.offset, nbytes=placement.tensor.spec.nbytes)
        window = job.window_nbytes
        yield running_checksum(content.kind, StoredTensor.raw(extent), window, window) == content.value


def _question(job: Job) -> str:
    """A digest of all that decides the file's bytes: equal questions have equal answers."""
    told = [[p.key, p.offset, p.checksum, _tensor(p.tensor)] for p in (step.placement for step in job.steps)]
    return hashlib.sha256(json.dumps([job.digests, told]).encode()).hexdigest()


def _tensor(tensor: TensorRef) -> list[Any]:
    spec = [tensor.dtype.name, tensor.shape]
    match tensor:
        case StoredTensor():
            extent = tensor.extent
            place = [extent.offset, extent.nbytes, extent.big_endian, tensor.offset, tensor.strides]
            return [*spec, _source(extent.source), place]
        case DerivedTensor():
            return [*spec, tensor.op.to_json(), [_tensor(part) for part in tensor.parts]]
        case FilledTensor():
            return [*spec, repr(tensor.value)]
    digest = hashlib.sha256()  # a text or another small thing that has its values at hand
    for window in tensor.windows():
        digest.update(window.data)
    return [*spec, digest.hexdigest()]


def _source(source: ByteSource) -> list[Any]:
    """By what a source is sent to another process: a path with its time and size, bytes, another source."""
    reduced = source.__reduce__()
    assert isinstance(reduced, tuple)
    kind, arguments = reduced[:2]
    return [kind.__qualname__, *map(_argument, arguments)]


def _argument(value: object) -> object:
    if isinstance(value, ByteSource):
        return _source(value)
    return hashlib.sha256(value).hexdigest() if isinstance(value, bytes) else repr(value)
