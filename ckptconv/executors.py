"""Clusters that a conversion hands its files to: `KIND:ADDRESS`, as on the command line."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future
from contextlib import AbstractContextManager, contextmanager
from typing import Any, TypeVar

from ckptconv.errors import CkptError, MissingDependencyError, Problem

T = TypeVar("T")


def executor_at(text: str) -> AbstractContextManager[Executor]:
    """The executor of a running cluster, which is left running: `dask:tcp://scheduler:8786`, `ray:auto`.

    Its workers need ckptconv, and the sources and the target's directory under the same paths.
    Raises: usage for another kind or a cluster that does not answer; missing-dependency.
    """
    kind, _, address = text.partition(":")
    if kind not in _KINDS or not address:
        close = difflib.get_close_matches(kind, _KINDS, n=1)
        raise _usage(
            text,
            f"'{text}' names no executor" + (f" (did you mean '{close[0]}'?)" if close else ""),
            "Pass KIND:ADDRESS of a running cluster, as in dask:tcp://10.0.0.5:8786 or ray:auto.",
        )
    try:
        return _KINDS[kind](address)
    except ImportError as error:
        raise MissingDependencyError(
            Problem(
                code="missing-dependency",
                loc=("--executor", text),
                message=f"an executor of the kind '{kind}' needs a package that is not installed: {error}",
                hint=f"Install it: pip install 'ckptconv[{kind}]'.",
            )
        ) from error


def _usage(text: str, message: str, hint: str) -> CkptError:
    return CkptError.of("usage", message, hint, loc=("--executor", text))


def _unreachable(text: str, error: Exception) -> CkptError:
    return _usage(text, f"the cluster does not answer: {error}", "Check the address, and that it runs.")


@contextmanager
def _dask(address: str) -> Iterator[Executor]:
    distributed: Any = importlib.import_module("distributed")
    try:
        client = distributed.Client(address)
    except (OSError, ValueError) as error:
        raise _unreachable(f"dask:{address}", error) from error
    with client:
        # A task is no pure function of its arguments: it writes.
        yield client.get_executor(pure=False)


@contextmanager
def _ray(address: str) -> Iterator[Executor]:
    ray: Any = importlib.import_module("ray")
    ours = not ray.is_initialized()
    try:
        ray.init(address=address, ignore_reinit_error=True, log_to_driver=False)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise _unreachable(f"ray:{address}", error) from error
    try:
        yield _RayExecutor(ray)
    finally:
        if ours:
            ray.shutdown()


class _RayExecutor(Executor):
    """Ray's tasks as futures of the standard library; a task whose worker died is given to another one."""

    def __init__(self, ray: Any) -> None:
        self._ray = ray

    def submit(self, fn: Callable[..., T], /, *args: Any, **kwargs: Any) -> Future[T]:
        future: Future[T] = self._ray.remote(fn).remote(*args, **kwargs).future()
        return future


_KINDS: dict[str, Callable[[str], AbstractContextManager[Executor]]] = {"dask": _dask, "ray": _ray}
