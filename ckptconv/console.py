"""Where the command line's output goes: results to stdout, problems and progress to stderr, exit codes."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from types import FrameType
from typing import TYPE_CHECKING, NoReturn

import typer

from ckptconv.errors import CkptError, Problem

if TYPE_CHECKING:
    from ckptconv.rendering.text import View

DONE, PROBLEMS, USAGE, INTERRUPTED = 0, 1, 2, 130


def prepare_streams() -> None:
    """Make sure that neither a closed stream nor a narrow encoding stops the work."""
    # A stream that the caller closed (`>&-`) is None, and lasts as long as the process.
    if sys.stdout is None:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


class Terminated(KeyboardInterrupt):
    """The system or a job scheduler asked the process to end; it cleans up as after Ctrl-C."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.code = 128 + number


def end_cleanly_on_signals() -> None:
    """Let the signals that end a process by default unwind it instead, unless the caller ignores them."""

    def terminate(number: int, frame: FrameType | None) -> None:
        raise Terminated(number)

    for name in ("SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) is signal.SIG_DFL:
            signal.signal(number, terminate)


def write(text: str) -> None:
    """Text to stdout. A reader that went away (`| head`) is no failure of ours."""
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:
        _silence_stdout()
    except OSError as error:
        _silence_stdout()
        sys.stderr.write(f"cannot write to standard output: {error.strerror}\n")
        raise typer.Exit(PROBLEMS) from None


def _silence_stdout() -> None:
    """Python flushes the stream once more when it ends, and would complain again."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def print_json(value: object) -> None:
    write(json.dumps(value, indent=2, allow_nan=False) + "\n")


def show(views: Iterable[View]) -> None:
    from rich.console import Console

    from ckptconv.rendering.text import plain

    if not sys.stdout.isatty():
        write(plain(views))
        return
    console = Console(highlight=False, emoji=False, markup=False)
    with contextlib.suppress(BrokenPipeError):
        for view in views:
            console.print(view)


def show_problems(problems: Sequence[Problem], *, as_json: bool) -> None:
    if as_json:
        from ckptconv.schema import problem_to_json

        print_json({"problems": [problem_to_json(problem) for problem in problems]})
        return
    from rich.console import Console

    from ckptconv.rendering.problems import problems_view
    from ckptconv.rendering.text import plain

    views = problems_view(problems)
    if not sys.stderr.isatty():
        sys.stderr.write(plain(views))
        return
    console = Console(stderr=True, highlight=False, emoji=False, markup=False)
    for view in views:
        console.print(view)


def stop(problems: Sequence[Problem], *, as_json: bool, code: int = PROBLEMS) -> NoReturn:
    """Shows the problems and leaves with `code`, or that of wrong usage where that is all they are."""
    show_problems(problems, as_json=as_json)
    raise typer.Exit(USAGE if all(problem.code == "usage" for problem in problems) else code)


@contextlib.contextmanager
def outcome(*, as_json: bool, code: int = PROBLEMS) -> Iterator[None]:
    """Turns what the library raises into text and an exit code."""
    try:
        yield
    except CkptError as error:
        stop(error.problems, as_json=as_json, code=code)
    except KeyboardInterrupt as interrupt:
        sys.stderr.write("interrupted; nothing was written\n")
        raise typer.Exit(interrupt.code if isinstance(interrupt, Terminated) else INTERRUPTED) from None


@contextlib.contextmanager
def progress_bar(label: str) -> Iterator[Callable[[int, int], None] | None]:
    """A callback (bytes done, bytes in all) that draws a bar; None where stderr is no terminal."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(label, total=None)

        def update(done: int, total: int) -> None:
            progress.update(task, completed=done, total=total)

        yield update
