"""Skeletons on disk: a document without its tensors, as one JSON file."""

from __future__ import annotations

import os
from pathlib import Path

from ckptconv.document import Checkpoint
from ckptconv.errors import FormatError, TargetError
from ckptconv.manifest import from_json, to_json
from ckptconv.residue_json import STATE_FILE
from ckptconv.strictjson import dump_document, parse

_HEAD_NBYTES = 4096


def is_skeleton_file(path: Path) -> bool:
    """Whether the file is a manifest, judged by its first bytes."""
    try:
        if not path.is_file():
            return False
        with path.open("rb") as file:
            head = file.read(_HEAD_NBYTES)
    except OSError:
        return False
    return head.lstrip()[:1] == b"{" and b'"ckptconv/checkpoint"' in head


def write_skeleton(checkpoint: Checkpoint, path: str | os.PathLike[str]) -> None:
    """Write the document without its tensors as one JSON file, whole or not at all."""
    target = Path(path)
    text = dump_document(to_json(checkpoint))
    aside = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        with aside.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(target)
    except OSError as error:
        aside.unlink(missing_ok=True)
        raise TargetError.of(
            "target-unwritable",
            f"'{target.name}' cannot be written: {error.strerror}",
            "Choose another path, or make room.",
            loc=(target.name,),
        ) from None


def read_skeleton(path: str | os.PathLike[str]) -> Checkpoint:
    """The document of a manifest file, without its tensors.

    Raises: missing-file, corrupt-file, duplicate-key, schema-version, schema-invalid, reference-broken.
    """
    file = Path(path)
    try:
        data = file.read_bytes()
    except OSError as error:
        raise FormatError.of(
            "missing-file",
            f"'{file.name}' cannot be read: {error.strerror}",
            "Check the path.",
            loc=(file.name,),
        ) from None
    obj = parse(data, file.name)
    state: bytes | None = None
    residue = obj.get("residue") if isinstance(obj, dict) else None
    if isinstance(residue, dict) and residue.get("file") == STATE_FILE:
        beside = file.with_name(STATE_FILE)
        state = beside.read_bytes() if beside.is_file() else None
    return from_json(obj, None, state)
