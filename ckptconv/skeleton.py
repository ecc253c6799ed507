"""Skeletons: a document without its values, and its form on disk, one JSON file.

Small arrays that no source of another framework gives (counters among the parameters, everything among the
extras) keep their values, so that a skeleton serves as a template as the checkpoint itself does.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from ckptconv.document import PROGRESS_FIELDS, Checkpoint, Fact, Known, Optimizer, Unknown
from ckptconv.errors import FormatError, TargetError
from ckptconv.manifest import from_json, keeps_value, to_json
from ckptconv.residue_json import STATE_FILE
from ckptconv.strictjson import dump_document, parse
from ckptconv.tensor import BufferSource, Extent, MissingTensor, StoredTensor, TensorRef

_HEAD_NBYTES = 4096

_FORGOTTEN = Unknown(reason="a skeleton is of no moment of the run")


def skeleton_of(checkpoint: Checkpoint) -> Checkpoint:
    """The document without values and counters: names, shapes, axes, classes, groups, hyperparameters.

    I/O: reads the small arrays that keep their values.
    """

    def optimizer(one: Optimizer) -> Optimizer:
        slots: Mapping[str, Mapping[str, TensorRef]] = {
            slot: {name: _bare(tensor, one.name, slot, name) for name, tensor in by_param.items()}
            for slot, by_param in one.slots.items()
        }
        return replace(one, slots=slots, step=_forgotten(one.step), param_steps={})

    progress = checkpoint.progress
    return replace(
        checkpoint,
        progress=replace(progress, **{name: _forgotten(getattr(progress, name)) for name in PROGRESS_FIELDS}),
        params={
            name: replace(param, tensor=_kept(param.tensor, name, is_param=True))
            for name, param in checkpoint.params.items()
        },
        optimizers=tuple(map(optimizer, checkpoint.optimizers)),
        schedules=tuple(replace(s, position=_forgotten(s.position)) for s in checkpoint.schedules),
        extras={key: _kept(tensor, key, is_param=False) for key, tensor in checkpoint.extras.items()},
    )


def _forgotten(fact: Fact) -> Fact:
    return _FORGOTTEN if isinstance(fact, Known) else fact


def _bare(tensor: TensorRef, *name: str) -> TensorRef:
    return MissingTensor(spec=tensor.spec, name=".".join(name))


def _kept(tensor: TensorRef, name: str, *, is_param: bool) -> TensorRef:
    """The tensor in memory where a skeleton has its values, else without."""
    if not keeps_value(tensor, is_param=is_param):
        return _bare(tensor, name)
    data = b"".join(window.tobytes() for window in tensor.windows())
    extent = Extent(source=BufferSource(data, name), offset=0, nbytes=len(data))
    return StoredTensor.dense(tensor.spec, extent)


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
    """Write the document's skeleton as one JSON file, whole or not at all. Raises: target-unwritable."""
    target = Path(path)
    text = dump_document(to_json(skeleton_of(checkpoint), values=True))
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
    """The document of a manifest file, without its tensors except those that stand in it.

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
