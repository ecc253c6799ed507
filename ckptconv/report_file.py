"""Where a report may be written: never over a checkpoint."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from ckptconv.errors import CkptError, TargetError
from ckptconv.remote import is_url


def _belongs_to(path: Path, checkpoint: Path) -> bool:
    """Whether the file is a checkpoint, in its directory or of its prefix; a report is a local file."""
    if is_url(str(checkpoint)):
        return False
    file, whole = Path(os.path.realpath(path)), Path(os.path.realpath(checkpoint))
    names = (f"{whole.name}.index", f"{whole.name}.data-")
    of_prefix = file.parent == whole.parent and file.name.startswith(names)
    return file == whole or of_prefix or (whole.is_dir() and whole in file.parents and file.exists())


def check_report_file(path: Path, checkpoints: Iterable[Path | None], *, force: bool) -> None:
    """Before anything is done: a report must not replace a checkpoint by a slip of the pen."""
    if any(_belongs_to(path, checkpoint) for checkpoint in checkpoints if checkpoint is not None):
        raise CkptError.of(
            "usage", f"'{path}' is a checkpoint of this conversion", "Choose another name.", loc=("--report",)
        )
    if path.is_dir():
        raise TargetError.of(
            "target-unwritable", f"'{path}' is a directory", "Name a file.", loc=("--report",)
        )
    if path.exists() and not force:
        raise TargetError.of(
            "target-exists",
            f"the report file '{path}' is there already",
            "Choose another name, or pass --force to replace it.",
            loc=("--report",),
        )
    if not path.parent.is_dir():
        raise TargetError.of(
            "target-unwritable",
            f"the report's directory '{path.parent}' does not exist",
            "Create it first; nothing was written.",
            loc=("--report",),
        )
