"""Live PyTorch objects: describe them, take their state as a document, put a document's state into them.

The framework itself writes and reads: objects go through `torch.save` and `torch.load`, so what is captured
is what a file would hold, and what is restored is what `load_state_dict` accepts.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Protocol

from ckptconv.adapters.live import (
    DESCRIBED,
    Spill,
    declared,
    of_class,
    restored,
    texts,
    unbuilt,
    with_progress,
    with_run,
    writing,
)
from ckptconv.adapters.pytorch_exact import rules_of, stock_class
from ckptconv.adapters.torch_flow import Inputs, run_of
from ckptconv.adapters.torch_table import table_of
from ckptconv.catalog import layers
from ckptconv.catalog.schedule_rates import TABLED, flat
from ckptconv.catalog.schedules import UNKNOWN
from ckptconv.conversion import convert
from ckptconv.detect import PathLike, open
from ckptconv.dialects.torch_modules import model_names
from ckptconv.document import Checkpoint, Fact, Known, Unknown, Value
from ckptconv.errors import LossError, MappingError, Problem, missing_extra
from ckptconv.manifest import INLINE_NBYTES
from ckptconv.mapping_file import MappingLike
from ckptconv.report import Report
from ckptconv.skeleton import skeleton_of

if TYPE_CHECKING:
    import torch

MODEL, OPTIMIZER, SCHEDULER = "model", "optimizer", "scheduler"
_WRAPPERS = {"DistributedDataParallel": "module", "DataParallel": "module", "OptimizedModule": "_orig_mod"}
"""Class of a wrapper -> where it has the model."""

State = dict[str, object]


class Scheduler(Protocol):
    """A learning-rate scheduler, as far as it is used here."""

    def state_dict(self) -> State: ...

    def load_state_dict(self, state_dict: State) -> None: ...

    def step(self) -> None: ...

    last_epoch: int


def describe(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    scheduler: Scheduler | None = None,
    *,
    inputs: Inputs | None = None,
    remaining: int | None = None,
) -> Checkpoint:
    """A skeleton of live objects: names, layer kinds and axes, parameter order, class and hyperparameters.

    It serves as `template` or `source_spec`; `ckptconv.write_skeleton` makes a JSON file of it.
    `inputs`: a batch to run the model on, so that modules are matched by what they take and give; its first
    argument, all of them as a tuple, or those with names as a dictionary.
    `remaining`: for a scheduler whose function no file holds (LambdaLR), how many of its next rates to note.
    I/O: a temporary file with small arrays only.
    Raises: template-unbuilt for lazy or meta parameters; template-mismatch for another model's optimizer;
    usage, unsupported-feature for a scheduler that has no table.
    """
    captured = _captured(_state(model, optimizer, scheduler, small=True), model, optimizer, Spill())
    if inputs is not None:
        captured = with_run(captured, run_of(unwrapped(model), inputs, captured.params))
    return skeleton_of(_tabled(captured, optimizer, scheduler, remaining))


def capture(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    scheduler: Scheduler | None = None,
    *,
    progress: Mapping[str, Value] | None = None,
    remaining: int | None = None,
) -> Checkpoint:
    """The state of live objects as a document; `progress` gives the counters that they do not hold.

    `remaining`: as for `describe`.

    I/O: a temporary file that lives as long as the document's tensors.
    Raises: as `describe`; usage for an unknown progress field; target-unwritable.
    """
    captured = _captured(_state(model, optimizer, scheduler), model, optimizer, Spill())
    if optimizer is not None and not optimizer.state:
        captured = _never_stepped(captured)
    return with_progress(_tabled(captured, optimizer, scheduler, remaining), progress)


def _tabled(
    checkpoint: Checkpoint,
    optimizer: torch.optim.Optimizer | None,
    scheduler: Scheduler | None,
    remaining: int | None,
) -> Checkpoint:
    """The document with a table of the next rates, where the scheduler is none that is known by its state."""
    if remaining is None or optimizer is None or scheduler is None or len(checkpoint.schedules) != 1:
        return checkpoint
    schedule = checkpoint.schedules[0]
    if schedule.family not in TABLED:
        return checkpoint
    curve = table_of(scheduler, optimizer, remaining)
    facts: dict[str, Fact] = {
        name: Known(value=value, status="supplied", source=DESCRIBED) for name, value in flat(curve).items()
    }
    family = curve.family if schedule.family == UNKNOWN else schedule.family
    tabled = replace(schedule, family=family, parameters={**schedule.parameters, **facts})
    return replace(checkpoint, schedules=(tabled,))


def restore(
    source: PathLike | Checkpoint,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    scheduler: Scheduler | None = None,
    *,
    source_spec: PathLike | Checkpoint | None = None,
    mapping: MappingLike | None = None,
    set_: Mapping[str, Value] | None = None,
    allow: Sequence[str] = (),
) -> Report:
    """Put a checkpoint of any framework into live objects, in place; the report accounts for every item.

    Parameters stay the objects that they are, with their device, dtype and ties.
    Raises: as `ckptconv.convert` and `describe`; nothing is changed then.
    """
    torch = _torch()
    spill = Spill()
    template = describe(model, optimizer, scheduler)
    target = spill.path / "restored.pt"
    report = convert(
        source,
        target,
        template=template,
        source_spec=source_spec,
        mapping=mapping,
        set_=texts(set_),
        allow=allow,
    )
    state = torch.load(target, map_location="cpu", weights_only=True, mmap=True)
    if optimizer is not None:
        for group, live in zip(state[OPTIMIZER]["param_groups"], optimizer.param_groups, strict=True):
            if "param_names" not in live:
                group.pop("param_names", None)
        if "precision-loss" not in allow:
            _check_precision(state[OPTIMIZER], optimizer)
        for entry in state[OPTIMIZER]["state"].values():
            # `load_state_dict` keeps tensors that need no change: these would hold on to the mapped file.
            entry.update((key, value.clone()) for key, value in entry.items() if torch.is_tensor(value))
    unwrapped(model).load_state_dict(state[MODEL])
    if optimizer is not None:
        optimizer.load_state_dict(state[OPTIMIZER])
    if scheduler is not None:
        scheduler.load_state_dict(state[SCHEDULER])
    return restored(report, type(model).__name__, describe(model, optimizer, scheduler))


def _captured(
    state: State, model: torch.nn.Module, optimizer: torch.optim.Optimizer | None, spill: Spill
) -> Checkpoint:
    """The document of a training dictionary, with what only the live objects tell."""
    torch = _torch()
    path = Path(spill.path / "captured.pt")
    with writing("training state"):
        torch.save(state, path)
    checkpoint = open(path, format="pytorch", dialect="plain")
    spill.keep_for(checkpoint)
    model = unwrapped(model)
    names = list(model.state_dict())
    called = dict(zip(names, model_names(names), strict=True))
    layouts = {called.get(name, name): layout for name, layout in _layouts(model)}
    checkpoint = declared(checkpoint, layouts, {called.get(n, n): flag for n, flag in _trainable(model)})
    checkpoint = replace(checkpoint, layer_settings=dict(_settings(model)))
    if optimizer is None:
        return checkpoint
    return of_class(checkpoint, stock_class(optimizer), "torch", {}, rules_of(optimizer))


def _state(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer | None,
    scheduler: Scheduler | None,
    *,
    small: bool = False,
) -> State:
    """The dictionary that a plain loop saves; `small`: large tensors by stand-ins of their shape and type."""
    model = unwrapped(model)
    _check_built(model)
    state: State = {MODEL: model.state_dict()}
    if optimizer is not None:
        state[OPTIMIZER] = _named(optimizer, model)
    if scheduler is not None:
        state[SCHEDULER] = scheduler.state_dict()
    return {key: _stand_in(value, {}) for key, value in state.items()} if small else state


def unwrapped(model: torch.nn.Module) -> torch.nn.Module:
    """The model inside DataParallel and the like."""
    while (inner := _WRAPPERS.get(type(model).__name__)) is not None:
        model = getattr(model, inner)
    return model


def _check_built(model: torch.nn.Module) -> None:
    torch = _torch()
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if torch.nn.parameter.is_lazy(tensor):
            hint = "Run the model once on a batch: model(batch)."
            raise unbuilt(MODEL, f"'{name}' of the model has no shape yet", hint)
        if tensor.is_meta:
            hint = "Give it memory: model.to_empty(device='cpu')."
            raise unbuilt(MODEL, f"'{name}' of the model is on the meta device", hint)


def _stand_in(value: object, seen: dict[object, torch.Tensor]) -> object:
    """The same structure in which a large tensor is one element, repeated; views of one memory stay so."""
    torch = _torch()
    if isinstance(value, torch.Tensor):
        if value.layout != torch.strided or value.numel() * value.element_size() <= INLINE_NBYTES:
            return value
        view = (value.data_ptr(), value.device, value.dtype, value.shape, value.stride())
        if view not in seen:
            seen[view] = torch.empty(1, dtype=value.dtype).zero_().expand(value.shape)
        return seen[view]
    if isinstance(value, dict):
        result = copy.copy(value)  # keeps a state_dict's `_metadata`
        result.update((key, _stand_in(part, seen)) for key, part in value.items())
        return result
    if isinstance(value, list):
        return [_stand_in(part, seen) for part in value]
    return value


def _named(optimizer: torch.optim.Optimizer, model: torch.nn.Module) -> State:
    """The optimizer's state_dict with the names of its parameters, which a live model tells."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    state = optimizer.state_dict()
    groups = []
    for position, (group, live) in enumerate(zip(state["param_groups"], optimizer.param_groups, strict=True)):
        found = [names.get(id(parameter)) for parameter in live["params"]]
        if None in found:
            raise MappingError(
                Problem(
                    code="template-mismatch",
                    loc=(OPTIMIZER, "param_groups", position),
                    message=f"{found.count(None)} of the group's {len(found)} parameters are not the model's",
                    hint="Pass the model whose parameters the optimizer was made with.",
                )
            )
        groups.append({**group, "param_names": found})
    return {**state, "param_groups": groups}


def _never_stepped(checkpoint: Checkpoint) -> Checkpoint:
    """Of a file an empty state may be left out; a live optimizer without state has done nothing yet.

    Where the class keeps no state at all, its emptiness tells nothing.
    """
    (optimizer,) = checkpoint.optimizers
    if not isinstance(optimizer.step, Unknown) or not optimizer.step.candidates:
        return checkpoint
    (reading,) = optimizer.step.candidates
    step = Known(
        value=reading.value, status="derived", source=reading.source, formula="0 while there is no state"
    )
    return replace(
        checkpoint,
        optimizers=(replace(optimizer, step=step),),
        progress=replace(checkpoint.progress, step=step),
    )


def _check_precision(state: Mapping[str, Mapping[int, State]], optimizer: torch.optim.Optimizer) -> None:
    """`load_state_dict` brings state to the type of its parameter without a word: here it is said before.

    Raises: precision-loss.
    """
    torch = _torch()
    live = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for index, entry in state["state"].items():
        for key, value in entry.items():
            if key == "step" or not isinstance(value, torch.Tensor) or not value.is_floating_point():
                continue
            parameter = live[index]
            if torch.promote_types(value.dtype, parameter.dtype) != parameter.dtype:
                raise LossError.of(
                    "precision-loss",
                    f"'{key}' of parameter {index} is {value.dtype}, PyTorch keeps it as {parameter.dtype}",
                    "Use a model of the source's precision, or allow precision-loss.",
                    loc=(OPTIMIZER, "state", index, key),
                )


def _layouts(model: torch.nn.Module) -> Iterator[tuple[str, tuple[str, str, tuple[str, ...]]]]:
    """What each parameter and buffer is, as far as the catalog knows its module's class."""
    for prefix, module in model.named_modules(remove_duplicate=False):
        kind = layers.kind_of_class("torch", type(module), module)
        if kind is None:
            continue
        for suffix, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
            layout = layers.declared("torch", kind, suffix, tuple(tensor.shape))
            if layout is not None:
                yield f"{prefix}.{suffix}" if prefix else suffix, (kind, *layout)


def _settings(model: torch.nn.Module) -> Iterator[tuple[str, Mapping[str, float]]]:
    """What each module computes with beside its parameters, as far as the catalog knows its class."""
    for name, module in model.named_modules(remove_duplicate=False):
        kind = layers.kind_of_class("torch", type(module), module)
        found = layers.told_settings("torch", kind or "", partial(getattr, module))
        if found:
            yield name, found


def _trainable(model: torch.nn.Module) -> Iterator[tuple[str, bool]]:
    for name, parameter in model.named_parameters(remove_duplicate=False):
        yield name, parameter.requires_grad
    for name, _ in model.named_buffers(remove_duplicate=False):
        yield name, False


def _torch() -> ModuleType:
    try:
        import torch
    except ImportError as error:
        raise missing_extra("torch", "torch", "ckptconv.pytorch") from error
    return torch
