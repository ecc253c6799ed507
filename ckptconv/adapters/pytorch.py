"""Live PyTorch objects: describe them, take their state as a document, put a document's state into them.

The framework itself writes and reads: objects go through `torch.save` and `torch.load`, so what is captured
is what a file would hold, and what is restored is what `load_state_dict` accepts.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from ckptconv import convert as conversion
from ckptconv.adapters.live import Spill, declared, skeleton, with_optimizer, with_progress
from ckptconv.catalog import layers
from ckptconv.detect import PathLike, open
from ckptconv.document import Checkpoint, Value
from ckptconv.errors import missing_extra
from ckptconv.report import Report

if TYPE_CHECKING:
    import torch

MODEL, OPTIMIZER, SCHEDULER = "model", "optimizer", "scheduler"


class Stateful(Protocol):
    """A scheduler or scaler."""

    def state_dict(self) -> dict[str, object]: ...

    def load_state_dict(self, state_dict: dict[str, object]) -> None: ...


def describe(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer | None = None, scheduler: Stateful | None = None
) -> Checkpoint:
    """A skeleton of live objects: names, layer kinds and axes, parameter order, class and hyperparameters.

    It serves as `template` or `source_spec`; `ckptconv.schema.write_skeleton` makes a JSON file of it.
    I/O: a temporary file without tensor bytes.
    """
    torch = _torch()
    skip: contextlib.AbstractContextManager[object] = contextlib.nullcontext()
    if hasattr(torch.serialization, "skip_data"):
        skip = torch.serialization.skip_data()
    with skip:
        captured, _ = _captured(model, optimizer, scheduler)
    return skeleton(captured)


def capture(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    scheduler: Stateful | None = None,
    *,
    progress: Mapping[str, Value] | None = None,
) -> Checkpoint:
    """The state of live objects as a document; `progress` gives the counters that they do not hold.

    I/O: a temporary file that lives as long as the document's tensors.
    Raises: usage for an unknown progress field.
    """
    captured, _ = _captured(model, optimizer, scheduler)
    return with_progress(captured, progress, "capture")


def restore(
    source: PathLike | Checkpoint,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    scheduler: Stateful | None = None,
    *,
    source_spec: PathLike | Checkpoint | None = None,
    set_: Mapping[str, str] | None = None,
    allow: Sequence[str] = (),
) -> Report:
    """Put a checkpoint of any framework into live objects, in place; the report says what became of each item.

    Raises: as `ckptconv.convert`; nothing is changed then.
    """
    torch = _torch()
    template, spill = _captured(model, optimizer, scheduler)
    target = spill.path / "restored.pt"
    report = conversion.convert(
        source, target, template=template, source_spec=source_spec, set_=set_, allow=allow
    )
    state = torch.load(target, map_location="cpu", weights_only=True, mmap=True)
    model.load_state_dict(state[MODEL])
    if optimizer is not None:
        optimizer.load_state_dict(state[OPTIMIZER])
    if scheduler is not None:
        scheduler.load_state_dict(state[SCHEDULER])
    return replace(report, target=type(model).__name__)


def _captured(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer | None, scheduler: Stateful | None
) -> tuple[Checkpoint, Spill]:
    """The objects' document, with what only the live objects tell: kinds of layers, order, classes."""
    torch = _torch()
    spill = Spill()
    state: dict[str, object] = {MODEL: model.state_dict()}
    if optimizer is not None:
        state[OPTIMIZER] = _named(optimizer, model)
    if scheduler is not None:
        state[SCHEDULER] = scheduler.state_dict()
    path = Path(spill.path / "captured.pt")
    torch.save(state, path)
    checkpoint = open(path, format="pytorch", dialect="plain")
    checkpoint = declared(checkpoint, dict(_layouts(model)), _trainable(model))
    if optimizer is not None:
        checkpoint = with_optimizer(checkpoint, type(optimizer).__name__, {}, "describe")
    return checkpoint, spill


def _named(optimizer: torch.optim.Optimizer, model: torch.nn.Module) -> dict[str, object]:
    """The optimizer's state_dict with the names of its parameters, which a live model tells."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    state = optimizer.state_dict()
    groups = []
    for group, live in zip(state["param_groups"], optimizer.param_groups, strict=True):
        found = [names.get(id(parameter)) for parameter in live["params"]]
        groups.append(group if None in found else {**group, "param_names": found})
    return {**state, "param_groups": groups}


def _layouts(model: torch.nn.Module) -> Iterator[tuple[str, tuple[str, str, tuple[str, ...]]]]:
    for prefix, module in model.named_modules():
        kind = layers.kind_of_class("torch", type(module), module)
        if kind is None:
            continue
        own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
        for suffix, tensor in own:
            layout = layers.declared("torch", kind, suffix, tuple(tensor.shape))
            if layout is not None:
                yield f"{prefix}.{suffix}" if prefix else suffix, (kind, *layout)


def _trainable(model: torch.nn.Module) -> dict[str, bool]:
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters(remove_duplicate=False)}
    flags.update(dict.fromkeys((name for name, _ in model.named_buffers()), False))
    return flags


def _torch():  # type: ignore[no-untyped-def]
    try:
        import torch
    except ImportError as error:
        raise missing_extra("torch", "torch", "ckptconv.pytorch") from error
    return torch
