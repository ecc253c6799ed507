"""Who does the work on tensors: threads of this process, or an executor of the caller's; and in what parts.

Memory is bounded by `BUDGET_NBYTES` over all threads. Every worker of an executor has that much for itself.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor, as_completed, wait
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol, TypeVar

from ckptconv.errors import CkptError, TargetError

BUDGET_NBYTES = 96 << 20
"""What the windows and panels of all threads hold together."""
_WINDOW_NBYTES = (256 << 10, 2 << 20)
"""Least and most of a window."""
_PORTION_NBYTES = 64 << 20
_PORTION_ITEMS = 1024
"""What a worker takes at once: handing out tensors of a few bytes one by one costs more than reading them."""

Advance = Callable[[int], None]
Progress = Callable[[int, int], None]
Task = TypeVar("Task", contravariant=True)
Result = TypeVar("Result", covariant=True)
T = TypeVar("T")
R = TypeVar("R")


class Work(Protocol[Task, Result]):
    """A function of a task; it can be pickled, and tells how far it is where somebody wants to know."""

    def __call__(self, task: Task, advance: Advance | None = None, /) -> Result: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Workers:
    """Those who share the work. Raises: usage for less than one."""

    jobs: int | None = None
    executor: Executor | None = None

    def __post_init__(self) -> None:
        if self.jobs is not None and self.jobs < 1:
            message = f"expected at least 1 job, got {self.jobs}"
            raise TargetError.of("usage", message, "Pass --jobs 1 or more.", loc=("jobs",))

    @property
    def sizes(self) -> tuple[int, int]:
        """Bytes of a window and of a panel. An op in floating point holds several times its window."""
        share = BUDGET_NBYTES // self._threads
        least, most = _WINDOW_NBYTES
        window = min(max(share // 8, least), most)
        return window - window % 64, max(share * 2 // 3, least)

    @property
    def _threads(self) -> int:
        cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        return self.jobs or (1 if self.executor is not None else min(4, cpus))

    def portions(
        self, items: Iterable[T], nbytes: Callable[[T], int], file: Callable[[T], Hashable] = lambda _: None
    ) -> Iterator[list[T]]:
        """Neighbours that one worker takes together: all of a file for an executor, else about 64 MiB."""
        portion: list[T] = []
        room = _PORTION_NBYTES
        for item in items:
            full = self.executor is None and (room <= 0 or len(portion) == _PORTION_ITEMS)
            if portion and (full or file(item) != file(portion[-1])):
                yield portion
                portion, room = [], _PORTION_NBYTES
            portion.append(item)
            room -= nbytes(item)
        if portion:
            yield portion

    def run(
        self,
        work: Work[T, R],
        tasks: Sequence[T],
        nbytes: Callable[[T], int],
        *,
        progress: Progress | None = None,
        done: Callable[[T], None] | None = None,
    ) -> list[R]:
        """The results, in the order of the tasks; `done` is told of each task, one call at a time.

        Raises: every problem of the tasks, together; worker-lost where an executor does not do its work.
        """
        meter = _Meter(sum(map(nbytes, tasks)), progress)
        with self._pool(meter) as pool:
            own = self.executor is None
            futures = {pool.submit(work, task, *[meter.advance] * own): task for task in tasks}
            try:
                failures: list[CkptError] = []
                lost: list[Exception] = []
                for future in as_completed(futures):
                    try:
                        future.result()
                    except CkptError as error:
                        failures.append(error)
                        continue
                    except Exception as error:
                        if own or isinstance(error, OSError):
                            raise
                        lost.append(error)
                        continue
                    task = futures[future]
                    if not own:
                        meter.advance(nbytes(task))
                    if done is not None:
                        done(task)
            except BaseException:
                for future in futures:
                    future.cancel()
                if not own:
                    wait(futures)
                raise
        if lost:
            failures.append(_lost(lost, len(tasks)))
        if failures:
            problems = [problem for failure in failures for problem in failure.problems]
            raise type(failures[0])(*sorted(problems, key=lambda problem: tuple(map(str, problem.loc))))
        return [future.result() for future in futures]

    @contextmanager
    def _pool(self, meter: _Meter) -> Iterator[Executor]:
        """The executor; or a pool of threads that stop at their next window when an exception leaves."""
        if self.executor is not None:
            yield self.executor
            return
        pool = ThreadPoolExecutor(self._threads, thread_name_prefix="ckptconv")
        try:
            yield pool
        except BaseException:
            meter.cancelled = True
            raise
        finally:
            pool.shutdown(cancel_futures=True)


def _lost(errors: Sequence[Exception], tasks: int) -> CkptError:
    why = f"{type(errors[0]).__name__}: {errors[0]}"
    return TargetError.of(
        "worker-lost",
        f"{len(errors)} of {tasks} files did not come back from the workers: {why}",
        "See the workers' own logs, then run the same again: files that are finished stay, and are not "
        "written twice.",
        loc=("--executor",),
    )


class _Cancelled(Exception):  # noqa: N818 -- ends a thread, is never seen outside
    pass


class _Meter:
    """Adds up bytes from all workers, and is where threads notice that they are not wanted any more."""

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
