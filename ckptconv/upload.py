"""Targets behind URLs: written and verified on the local disk, then uploaded.

One object appears whole, by the completion of its upload. Of several files the one that makes a checkpoint of
them (an index, a manifest) is uploaded last, an older one is deleted first: whoever reads in between finds no
checkpoint, never a mixture of two. The local disk must hold the target; `TMPDIR` chooses which one.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import cast

from ckptconv.errors import TargetError
from ckptconv.formats.base import Layout
from ckptconv.formats.checkpoint_state import STATE_FILE
from ckptconv.publish import below, target_error
from ckptconv.remote import RemotePath

_PREFIX = "ckptconv-upload-"


@contextmanager
def destination(
    target: Path, layout: Layout, *, force: bool, progress: Callable[[int, int], None] | None = None
) -> Iterator[Path]:
    """The local path to write to: the target itself, or a place from which it is uploaded afterwards.

    `progress` gets uploaded bytes (done, total).
    Raises: target-exists; target-unwritable where the upload fails.
    """
    if not isinstance(target, RemotePath):
        yield target
        return
    finals = [below(layout.kind, target, file.name) for file in layout.files]
    existing = _existing(target, layout, finals)
    if existing and not force:
        message, hint = f"'{existing[0]}' exists", "Pass --force to replace it, or choose another target."
        raise target_error("target-exists", target, message, hint)
    with tempfile.TemporaryDirectory(prefix=_PREFIX) as folder:
        local = Path(folder) / target.name
        state = target.parent / STATE_FILE
        if layout.bookkeeping and state.is_file():
            (local.parent / STATE_FILE).write_bytes(state.read_bytes())
        yield local
        written = [below(layout.kind, local, file.name) for file in layout.files]
        beside = [local.parent / STATE_FILE] if layout.bookkeeping else []
        pairs = [*zip(written, finals, strict=True), *((path, state) for path in beside)]
        commit = finals[-1]
        if commit in existing and len(finals) > 1:
            _remote(commit).unlink()
        _upload(pairs, progress)
        for path in existing:
            if path not in finals:
                _remote(path).unlink()


def _existing(target: Path, layout: Layout, finals: list[Path]) -> list[Path]:
    """What the target replaces. Raises: target-exists for a directory that is no checkpoint."""
    if layout.kind == "file" and target.is_dir():
        message = f"'{target}' is a directory, the target is a file"
        raise target_error("target-exists", target, message, "Choose another target.")
    if layout.kind != "directory" or not target.is_dir():
        old = [below(layout.kind, target, name) for name in layout.replaces]
        return [path for path in dict.fromkeys((*finals, *old)) if path.is_file()]
    found = [path for path in target.iterdir() if path.is_file()]
    if finals[-1] not in found:
        message = f"'{target}' is a directory without a '{layout.files[-1].name}', no checkpoint to replace"
        raise target_error("target-exists", target, message, "Choose another target.")
    return found


def _upload(pairs: list[tuple[Path, Path]], progress: Callable[[int, int], None] | None) -> None:
    """Every file in this order, the next one begun when the one before is whole."""
    total = sum(source.stat().st_size for source, _ in pairs)
    done = 0
    for source, final in pairs:
        try:
            _remote(final).put(source)
        except Exception as error:  # each file system has errors of its own
            raise TargetError.of(
                "target-unwritable",
                f"cannot upload to '{final}': {error or type(error).__name__}",
                "Check the credentials and the room there, and run again; an unfinished target has no "
                f"'{pairs[-1][1].name}'.",
                loc=(final.name,),
            ) from error
        done += source.stat().st_size
        if progress is not None:
            progress(done, total)


def _remote(path: Path) -> RemotePath:
    return cast("RemotePath", path)
