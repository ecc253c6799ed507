"""Files that appear whole or not at all: written in a staging directory beside the target, then renamed.

The staging directory stands in the target's own directory, so that a rename is within one file system. In it
the files have their final names: a reader takes `<staging>/<target>` for the target itself. What a killed
process leaves behind is taken away by the next run to the target (`ckptconv.leftovers`).

Replacing (`force`): one file is replaced by one rename, a directory by one exchange where the system has
that call. Several files cannot be replaced in one step; so the old commit (index, manifest; a directory as
a whole) is first moved into the staging directory, then the rest of the old files, then the new files are
moved out, the new commit last. A process that is killed in between leaves no target, never a mixture, and
no file of either is lost: the next run puts the old one back. Any other failure does so at once. Windows
has no fsync of directories: there a power failure may undo a publication that was reported.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import re
import secrets
import shlex
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ckptconv.errors import Code, Problem, TargetError
from ckptconv.leftovers import (
    REPLACED,
    alone_in,
    clear,
    fsync_directory,
    leftovers,
    locked,
    move,
    staging_path,
)

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_SHARD = re.compile(r"-\d{5}-of-\d{5}")


def target_error(code: Code, target: Path, message: str, hint: str) -> TargetError:
    """The error about one target."""
    return TargetError(Problem(code=code, loc=(target.name,), message=message, hint=hint))


@contextlib.contextmanager
def reported(target: Path, needed_nbytes: int) -> Iterator[None]:
    """Turn what the system says while the target is written into no-space or target-unwritable."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise no_space(target, needed_nbytes, error.strerror) from error
        raise target_error(
            "target-unwritable",
            target,
            f"cannot write '{error.filename or target}': {error.strerror}",
            "Check the path and its permissions, or choose another target; nothing was written.",
        ) from error


def no_space(target: Path, needed_nbytes: int, reason: str | None = None) -> TargetError:
    """The error of a full disk, with both numbers and what earlier runs left behind."""
    free = shutil.disk_usage(target.parent).free
    stale = [path.name for path in leftovers(target)]
    left = f", and perhaps delete what a killed run left: {', '.join(stale)}" if stale else ""
    return target_error(
        "no-space",
        target,
        f"the target needs {needed_nbytes} bytes, {free} are free in '{target.parent}'"
        + (f" ({reason})" if reason else ""),
        f"Free some space{left}; nothing was written.",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Publication:
    """One target on its way: where its files are written, and how they become the target."""

    kind: Literal["file", "prefix", "directory"]
    target: Path
    names: tuple[str, ...]
    """Final names in the order of publication, relative as in `Layout`; the last one is the commit."""
    force: bool
    staging: Path
    replaces: tuple[str, ...] = ()
    """As in `Layout`."""
    resumable: bool = False
    """Whether a failure leaves finished files for the next run to the same target, which looks for them."""

    @classmethod
    def of(
        cls,
        kind: Literal["file", "prefix", "directory"],
        target: Path,
        names: Iterable[str],
        force: bool,
        *,
        replaces: tuple[str, ...] = (),
        resumable: bool = False,
    ) -> Publication:
        """A publication that has not begun; touches nothing."""
        target = Path(os.path.abspath(target))
        return cls(
            kind=kind,
            target=target,
            names=tuple(names),
            force=force,
            staging=staging_path(target, "resumable" if resumable else secrets.token_hex(4)),
            replaces=replaces,
            resumable=resumable,
        )

    @property
    def staged(self) -> Path:
        """Where the target stands before it is published."""
        return self.staging / self.target.name

    def path(self, name: str) -> Path:
        """Where the file of that name is written."""
        return below(self.kind, self.staged, name)

    def record(self, number: int) -> Path:
        """Where it is kept that the file of that number is finished."""
        return self.staging / f"done-{number:05d}.json"

    def clear_leftovers(self) -> None:
        """Take away what runs to this target left that were killed, all but finished files to go on with."""
        clear(self.target, keep=self.staging)

    def check(self) -> None:
        """Refuse a target that exists, or that could not be put in its place.

        Raises: target-exists, target-unwritable.
        """
        parent = self.target.parent
        if not parent.is_dir():
            raise target_error(
                "target-unwritable",
                self.target,
                f"there is no directory '{parent}'",
                _how_to_make(parent),
            )
        if not os.access(parent, os.W_OK | os.X_OK):
            raise target_error(
                "target-unwritable",
                self.target,
                f"no permission to create files in '{parent}'",
                "Choose another target, or change the permissions.",
            )
        existing = self.existing()
        if existing and not self.force:
            raise self._exists(existing[0])
        for path in existing:
            self._check_replaceable(path)

    def _check_replaceable(self, path: Path) -> None:
        if path.is_symlink() or path.is_file():
            return
        if not path.is_dir():
            raise target_error(
                "target-exists",
                self.target,
                f"'{path}' is a device, a pipe or a socket, no checkpoint to replace",
                "Choose another target.",
            )
        if self.kind == "directory" and (not any(path.iterdir()) or (path / self.names[-1]).exists()):
            return
        raise target_error(
            "target-exists",
            self.target,
            f"'{path}' is a directory without a '{self.names[-1]}', no checkpoint to replace"
            if self.kind == "directory"
            else f"'{path}' is a directory, the target is a file",
            "Delete it yourself, or choose another target.",
        )

    def _exists(self, path: Path) -> TargetError:
        return target_error(
            "target-exists",
            self.target,
            f"'{path}' exists",
            "Pass --force to replace it, or choose another target.",
        )

    def existing(self) -> list[Path]:
        """What the target replaces, its commit first; shards of an older, larger set too."""
        if self.kind != "prefix":
            return [self.target] if os.path.lexists(self.target) else []
        parent = self.target.parent
        there = sorted(os.listdir(parent))
        finals = [below(self.kind, self.target, name) for name in reversed(self.names)]
        paths = [path for path in finals if path.parent != parent or path.name in there]
        for stem in {_SHARD.sub("\0", path.name) for path in finals if _SHARD.search(path.name)}:
            before, after = (re.escape(part) for part in stem.split("\0", 1))
            shard = re.compile(before + _SHARD.pattern + after)
            paths += [parent / name for name in there if shard.fullmatch(name)]
        paths += [parent / name for name in self.replaces]
        return [path for path in dict.fromkeys(paths) if os.path.lexists(path)]

    @contextlib.contextmanager
    def staged_files(self) -> Iterator[None]:
        """Make the staging directory and every file in it; afterwards delete it and what is still there.

        Raises: target-busy where another run writes the same target with an executor.
        """
        self.staging.mkdir(mode=0o700, exist_ok=self.resumable and not self.staging.is_symlink())
        with locked(self.staging) as alone:
            if not alone:
                message = f"another run is writing '{self.target}' at this moment"
                raise target_error("target-busy", self.target, message, "Wait until it is done.")
            try:
                for name in self.names:
                    self.path(name).parent.mkdir(parents=True, exist_ok=True)
                    self.path(name).touch()
                yield
            except BaseException:
                if not self.resumable or not any(self.staging.glob("done-*.json")):
                    self._end()
                raise
            self._end()

    def commit(self) -> None:
        """Put the written files in the target's place; the staged files are fsynced already."""
        for directory in {self.staging, *(self.path(name).parent for name in self.names)}:
            fsync_directory(directory)
        with alone_in(self.target.parent):
            if self.kind == "file":
                self._commit_file()
            else:
                self._commit_several()
            fsync_directory(self.target.parent)

    def _commit_file(self) -> None:
        if self.force:
            os.replace(self.staged, self.target)
            return
        try:
            os.link(self.staged, self.target)  # unlike a rename it never replaces
        except FileExistsError:
            raise self._exists(self.target) from None
        except OSError:  # a file system without hard links
            if os.path.lexists(self.target):
                raise self._exists(self.target) from None
            os.rename(self.staged, self.target)

    def _commit_several(self) -> None:
        existing = self.existing()
        if existing and not self.force:
            raise self._exists(existing[0])
        if self.kind == "directory" and existing and _exchanged(self.staged, self.target):
            return
        old = self.staging / REPLACED
        old.mkdir()
        moves = [(path, old / path.name) for path in existing]
        if self.kind == "directory":
            moves.append((self.staged, self.target))
        else:
            moves += [(self.path(name), below(self.kind, self.target, name)) for name in self.names]
        # No commit on the disk beside files that are not its own, and none before what it speaks of.
        sync_before = {1, len(existing)} if existing else set()

        def sync(position: int) -> None:
            if position in sync_before or position == len(moves) - 1:
                fsync_directory(self.target.parent)

        move(moves, self.staging, sync)

    def _end(self) -> None:
        shutil.rmtree(self.staging, ignore_errors=True)


def _exchanged(one: Path, other: Path) -> bool:
    """Whether the system gave two directories each other's names in one step (Linux, `renameat2`)."""
    try:
        exchange = ctypes.CDLL(None).renameat2
    except (AttributeError, OSError, TypeError):
        return False
    here, swap = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return bool(exchange(here, os.fsencode(one), here, os.fsencode(other), swap) == 0)


def _how_to_make(directory: Path) -> str:
    """What to do about a target's directory that is not there."""
    if re.search(r"(^|/)[A-Za-z][A-Za-z0-9+.-]+:/", str(directory)):
        return "Pass a URL as text: a Path makes a local directory of it."
    above = next(path for path in (directory, *directory.parents) if os.path.lexists(path))
    if not above.is_dir():
        return f"'{above}' is no directory: choose another target."
    return f"Run: mkdir -p {shlex.quote(str(directory))}"


def below(kind: str, target: Path, name: str) -> Path:
    """Where a layout's file of that name stands."""
    if not name:
        return target
    return (target if kind == "directory" else target.parent) / name
