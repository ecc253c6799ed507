"""Reads tensors again, for their checksums: of a target that was written, of a source that records some."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Generic, TypeVar

from ckptconv.errors import FormatError, Problem, TargetError
from ckptconv.jobs import check_extent, recorded_whole, running_checksum
from ckptconv.tensor import Checksum, Extent, TensorRef
from ckptconv.workers import Advance, Progress, Workers

K = TypeVar("K", bound=Hashable)


@dataclass(frozen=True, slots=True)
class _Written(Generic[K]):
    key: K
    tensor: TensorRef
    content: Checksum

    @property
    def nbytes(self) -> int:
        return self.tensor.spec.nbytes

    @property
    def file(self) -> Hashable:
        return next((id(extent.source) for extent in self.tensor.extents), None)


def verify_written(
    expected: Mapping[K, Checksum],
    tensors: Iterable[tuple[K, TensorRef]],
    *,
    workers: Workers | None = None,
    progress: Progress | None = None,
) -> None:
    """Read the tensors again and compare them with what was written, those of the same key.

    Raises: verify-failed with every key that is missing, or whose bytes or recorded checksum differ.
    """
    workers = workers or Workers()
    found = [_Written(key, tensor, expected[key]) for key, tensor in tensors if key in expected]
    missing = expected.keys() - {written.key for written in found}
    problems = [
        _verify_problem(key, f"'{_name(key)}' was written and is not there when the target is read")
        for key in expected
        if key in missing
    ]
    portions = list(workers.portions(found, lambda written: written.nbytes, lambda written: written.file))
    work = partial(_verified, sizes=workers.sizes)
    results = workers.run(work, portions, lambda some: sum(w.nbytes for w in some), progress=progress)
    problems += [problem for some in results for problem in some]
    if problems:
        raise TargetError(*problems)


def _verified(
    portion: Sequence[_Written[K]], advance: Advance | None = None, /, *, sizes: tuple[int, int]
) -> list[Problem]:
    return [problem for written in portion if (problem := _difference(written, sizes, advance)) is not None]


def _difference(written: _Written[K], sizes: tuple[int, int], advance: Advance | None) -> Problem | None:
    key, tensor, content = written.key, written.tensor, written.content
    value = running_checksum(content.kind, tensor, *sizes, advance)
    if value != content.value:
        numbers = f"{content.kind} is {value:#010x}, {content.value:#010x} was written"
        return _verify_problem(key, f"'{_name(key)}' does not read back equal: its {numbers}")
    recorded = recorded_whole(tensor)
    if recorded is not None and recorded.kind == content.kind and recorded.value != value:
        numbers = f"{recorded.value:#010x}, its bytes have {value:#010x}"
        return _verify_problem(key, f"the target records for '{_name(key)}' the {content.kind} {numbers}")
    return None


def _name(key: object) -> str:
    return "/".join(map(str, key)) if isinstance(key, tuple) else str(key)


def _verify_problem(key: object, message: str) -> Problem:
    hint = "The target was not published. Check disk and memory; if it happens again, report it as a bug."
    return Problem(code="verify-failed", loc=(_name(key),), message=message, hint=hint)


def check_sources(extents: Iterable[Extent], *, jobs: int | None = None) -> None:
    """Stream every extent that has a recorded checksum, and compare.

    Raises: checksum-mismatch, truncated-tensor; all that are found, together.
    """
    workers = Workers(jobs=jobs)
    once = {extent.checked.id: extent.checked for extent in extents}.values()
    portions = list(workers.portions(once, lambda extent: extent.nbytes, lambda extent: id(extent.source)))
    work = partial(_checked, window_nbytes=workers.sizes[0])
    results = workers.run(work, portions, lambda some: sum(extent.nbytes for extent in some))
    if problems := [problem for some in results for problem in some]:
        raise FormatError(*problems)


def _checked(
    portion: Sequence[Extent], advance: Advance | None = None, /, *, window_nbytes: int
) -> list[Problem]:
    problems: list[Problem] = []
    for extent in portion:
        if advance is not None:
            advance(0)
        try:
            check_extent(extent, "", window_nbytes)
        except FormatError as error:
            problems += error.problems
    return problems
