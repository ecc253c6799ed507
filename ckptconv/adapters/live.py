"""What both adapters share: a directory that lives as long as the document whose tensors lie in it."""

from __future__ import annotations

import tempfile
import weakref
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from ckptconv import supply
from ckptconv.catalog import completion
from ckptconv.document import Checkpoint, Param, Value
from ckptconv.errors import CkptError
from ckptconv.tensor import MissingTensor, TensorRef

SPILL_PREFIX = "ckptconv-live-"


class Spill:
    """A temporary directory that is removed when nothing refers to it any more."""

    def __init__(self) -> None:
        self._directory = tempfile.TemporaryDirectory(prefix=SPILL_PREFIX)
        self.path = Path(self._directory.name)
        weakref.finalize(self, self._directory.cleanup)


def with_progress(checkpoint: Checkpoint, progress: Mapping[str, Value] | None, who: str) -> Checkpoint:
    """The document with the counters that the caller of an adapter knows.

    Raises: usage for a counter that does not exist.
    """
    unknown = [name for name in progress or {} if name not in supply.settable_fields()]
    if unknown:
        raise CkptError.of(
            "usage",
            f"there is no field '{unknown[0]}'",
            "Fields: " + ", ".join(supply.settable_fields()) + ".",
            loc=("progress", unknown[0]),
        )
    return supply.set_fields(checkpoint, progress or {}, who=who)


def skeleton(checkpoint: Checkpoint) -> Checkpoint:
    """The document without values: names, shapes, axes, classes, hyperparameters. Counters are forgotten."""

    def bare(name: str, tensor: TensorRef) -> TensorRef:
        return MissingTensor(spec=tensor.spec, name=name)

    return replace(
        checkpoint,
        params={
            name: replace(param, tensor=bare(name, param.tensor)) for name, param in checkpoint.params.items()
        },
        optimizers=tuple(
            replace(
                optimizer,
                slots={
                    slot: {name: bare(f"{name}/{slot}", tensor) for name, tensor in by_param.items()}
                    for slot, by_param in optimizer.slots.items()
                },
            )
            for optimizer in checkpoint.optimizers
        ),
        extras={key: bare(key, tensor) for key, tensor in checkpoint.extras.items()},
    )


def declared(
    checkpoint: Checkpoint,
    layouts: Mapping[str, tuple[str, str, tuple[str, ...]]],
    trainable: Mapping[str, bool],
) -> Checkpoint:
    """The document with (layer, role, axes) by parameter name as the live layers declare them."""

    def one(param: Param) -> Param:
        layout = layouts.get(param.name)
        known = trainable.get(param.name, param.trainable)
        if layout is None:
            return replace(param, trainable=known)
        layer, role, axes = layout
        return replace(param, trainable=known, layer=layer, role=role, axes=axes, evidence="declared")

    return replace(checkpoint, params={name: one(param) for name, param in checkpoint.params.items()})


def with_optimizer(checkpoint: Checkpoint, class_name: str, arguments: Mapping[str, object], who: str) -> Checkpoint:
    """The document whose optimizers are of the live one's class, with its constructor's arguments."""
    return replace(
        checkpoint,
        optimizers=tuple(
            completion.with_arguments(optimizer, class_name, arguments, who)
            for optimizer in checkpoint.optimizers
        ),
    )
