"""What a run that was killed leaves beside its target, and how the next run to that target takes it away.

A run writes into a staging directory `.<target>.ckptconv-<word>.tmp`, and holds a lock in it for as long as
it lives: a directory whose lock is free is a dead run's, and is deleted. Where that run had begun to put its
files in the target's place and not come to the end, as its journal `moves.json` tells, its renames are undone
first: the old target stands again. Where the system has no such locks (Windows) nobody knows who lives, and
nothing is deleted.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path, PurePosixPath

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

JOURNAL, REPLACED = "moves.json", "replaced"
_LOCK = "lock"
_NEW_SECONDS = 60
"""A directory without a lock that is younger may be of a run that has just made it."""

Moves = Sequence[tuple[Path, Path]]


def staging_path(target: Path, word: str) -> Path:
    """The directory in which a run to the target writes."""
    return target.with_name(f".{target.name}.ckptconv-{word}.tmp")


def leftovers(target: Path) -> tuple[Path, ...]:
    """Staging directories of runs to this target, those that are running now too."""
    prefix, suffix = staging_path(target, "\0").name.split("\0")
    try:
        names = sorted(os.listdir(target.parent))
    except OSError:
        return ()
    return tuple(target.parent / n for n in names if n.startswith(prefix) and n.endswith(suffix))


@contextlib.contextmanager
def locked(staging: Path) -> Iterator[bool]:
    """Hold the lock of a staging directory; False where a running process has it."""
    if fcntl is None:
        yield True
        return
    with (staging / _LOCK).open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            yield False
            return
        yield True


@contextlib.contextmanager
def alone_in(directory: Path) -> Iterator[None]:
    """Wait until no other run is putting a target into its place in the directory, and keep others waiting.

    Where the file system has no such locks of directories (NFS), nobody waits.
    """
    if fcntl is None:
        yield
        return
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def clear(target: Path, *, keep: Path | None = None) -> None:
    """Undo what dead runs to the target had half done, and delete what they left; not `keep`.

    I/O: lists the target's directory.
    """
    for staging in leftovers(target) if fcntl is not None else ():
        # Another run may take it away at the same moment; it may be another user's, or none of ours.
        with contextlib.suppress(OSError):
            if staging.is_symlink():
                continue
            if not (staging / _LOCK).exists() and time.time() - staging.stat().st_mtime < _NEW_SECONDS:
                continue
            with locked(staging) as alone:
                if alone:
                    _undo_journal(staging)
                    if staging != keep:
                        shutil.rmtree(staging, ignore_errors=True)


def move(moves: Moves, staging: Path, before: Callable[[int], None]) -> None:
    """Rename each source to its destination, or none; `before` is told the position of each.

    The journal is on the disk before the first one is done.
    """
    parent = staging.parent
    written = staging / f"{JOURNAL}.new"
    with written.open("w", encoding="utf-8") as file:
        json.dump([[os.path.relpath(path, parent) for path in pair] for pair in moves], file)
        file.flush()
        os.fsync(file.fileno())
    os.rename(written, staging / JOURNAL)
    fsync_directory(staging)
    try:
        for position, (source, destination) in enumerate(moves):
            before(position)
            os.rename(source, destination)
    except BaseException:
        _undo(moves)
        raise


def _undo(moves: Moves) -> None:
    for source, destination in reversed(moves):
        if not os.path.lexists(source) and os.path.lexists(destination):
            os.rename(destination, source)


def _undo_journal(staging: Path) -> None:
    """Bring the old target back, unless the new one is there whole."""
    moves = _journal(staging)
    if moves and (os.path.lexists(moves[-1][0]) or not os.path.lexists(moves[-1][1])):
        _undo(moves)
        fsync_directory(staging.parent)
    (staging / JOURNAL).unlink(missing_ok=True)
    shutil.rmtree(staging / REPLACED, ignore_errors=True)


def _journal(staging: Path) -> Moves:
    """The renames that were begun; none of a journal that is not of this directory."""
    try:
        told = json.loads((staging / JOURNAL).read_text(encoding="utf-8"))
        pairs = [(PurePosixPath(source), PurePosixPath(destination)) for source, destination in told]
    except (OSError, ValueError, TypeError):
        return ()
    if any(path.is_absolute() or ".." in path.parts for pair in pairs for path in pair):
        return ()
    return [(staging.parent / source, staging.parent / destination) for source, destination in pairs]


def fsync_directory(path: Path) -> None:
    """Make renames in the directory survive a power failure."""
    if os.name == "nt":
        return
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
