"""`Module.state_dict()` as parameters: names without wrappers, buffers, ties, what names tell of layers.

A state_dict maps dotted names to tensors, parameters and buffers alike, in the order of registration; tied
weights stand under every name and share a storage. Wrappers leave marks in the names: `module.` before every
name (DataParallel, DDP, AveragedModel), `base_model.model.` likewise (PEFT), `_orig_mod.` anywhere
(torch.compile); PEFT's names inside are `torch_adapter`'s. What is no tensor (`_extra_state`) is left to the
residue.

`torch.save(model)` pickles the module itself: an object of each layer's class with `_parameters`, `_buffers`
and `_modules` in its attributes. Its state_dict is read out of it (non-persistent buffers are not in it); the
classes, hooks and other attributes stay what they are, descriptions in the residue.
Source: torch 2.13 `torch/nn/modules/module.py` `Module.state_dict`, `__setstate__`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import NamedTuple

from ckptconv.catalog import layers
from ckptconv.catalog.compounds import home
from ckptconv.dialects import torch_adapter, torch_keys
from ckptconv.dialects.residue import Lifter
from ckptconv.dialects.torch_described import describe, kind_of, packed_kind
from ckptconv.dialects.torch_values import dotted, layout_of, tensor_of, view_id
from ckptconv.document import Block, Evidence, Param
from ckptconv.errors import FormatError
from ckptconv.rawtree import DictNode, Lifted, ListNode, Node, Opaque, Path
from ckptconv.tensor import TensorRef

Shape = tuple[int, ...]

_DDP, _AVERAGED = "module", "n_averaged"

PARTS = ("_parameters", "_buffers", "_modules")
"""Attributes that every module's pickle has."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Module:
    """One model of a checkpoint."""

    key: Path
    """Where its state_dict stands."""
    params: Mapping[str, Param]
    raw_names: Mapping[str, str]
    """Name in the file -> name of the parameter."""
    described: tuple[Block, ...] = ()
    """Parameters that are no plain arrays."""
    parts: Mapping[str, TensorRef] = field(default_factory=dict)
    """The arrays of these."""


class _Entry(NamedTuple):
    raw: str
    path: Path
    tensor: TensorRef
    trainable: bool | None


class _Described(NamedTuple):
    raw: str
    path: Path
    node: Node


def is_state_dict(node: Node, *, nested: bool = False) -> bool:
    """Whether a node is a dictionary of named tensors (`nested`: or of such) and extra states."""
    if not isinstance(node, DictNode) or not node.items:
        return False
    found = False
    for key, value in node.items:
        if not isinstance(key, str):
            return False
        if (
            tensor_of(value) is not None
            or kind_of(value) is not None
            or _was_param(value)
            or (nested and is_state_dict(value, nested=True))
        ):
            found = True
        elif not key.endswith("_extra_state"):
            return False
    return found


def _was_param(node: Node) -> bool:
    """Whether a residue has a parameter's address here: the dictionary is one of a model still."""
    inner = node.args[0] if isinstance(node, Opaque) and node.args else node
    return isinstance(inner, Lifted) and inner.to[0] == "param"


def is_module_state(node: Node) -> bool:
    """Whether a node bears the attribute that only `Module.state_dict()` sets."""
    return (
        isinstance(node, DictNode)
        and node.kind == "collections.OrderedDict"
        and isinstance(node.state, DictNode)
        and "_metadata" in node.state
    )


def is_module(node: Node) -> bool:
    """Whether a node is a pickled module."""
    attributes = node.state if isinstance(node, Opaque) else None
    return isinstance(attributes, DictNode) and all(isinstance(attributes.get(p), DictNode) for p in PARTS)


def is_averaged_model(node: Node) -> bool:
    """Whether a node is the state of an `AveragedModel`: a count, and every name behind `module.`."""
    if not isinstance(node, DictNode) or _AVERAGED not in node or len(node.items) < 2:
        return False
    begin = f"{_DDP}."
    return all(isinstance(key, str) and (key == _AVERAGED or key.startswith(begin)) for key in node.keys)


def lift_module(
    node: Node,
    path: Path,
    lifter: Lifter,
    *,
    prefix: str = "",
    seen: dict[object, str] | None = None,
    buffers: Collection[str] = (),
) -> Module:
    """The parameters of the state_dict at `path`, and where each was taken.

    `prefix` stands before every name, where a checkpoint has several models; `seen` is shared between models
    that may be tied to each other; `buffers` are names that the container tells to be no parameters.
    Raises: duplicate-key; unsupported-feature for one rank's shares of the parameters.
    """
    found = list(_module_entries(node, path) if is_module(node) else _entries(node, path))
    named = list(zip(_names([entry.raw for entry in found], path), found, strict=True))
    entries = [(bare, entry) for bare, entry in named if isinstance(entry, _Entry)]
    _refuse_shares(entries, path)
    seen = {} if seen is None else seen
    tuned = torch_adapter.trained([entry.raw for _, entry in entries])
    told = _told_of([(bare, entry.tensor.shape) for bare, entry in entries])
    params: dict[str, Param] = {}
    raw_names: dict[str, str] = {}
    for (bare, entry), (layer, role, axes, evidence) in zip(entries, told, strict=True):
        name = prefix + bare
        raw_names[entry.raw] = name
        shared = view_id(entry.tensor)
        first = None if shared is None else seen.setdefault(shared, name)
        params[name] = Param(
            name=name,
            tensor=entry.tensor,
            role=role,
            layer=layer,
            axes=axes,
            evidence=evidence,
            trainable=False if entry.raw in buffers else _trainable(bare, entry, tuned.get(entry.raw)),
            tied_to=None if first == name else first,
        )
        lifter.take(entry.path, ("param", name), **layout_of(entry.tensor))
    described, parts = describe(
        ((prefix + bare, other.path, other.node) for bare, other in named if isinstance(other, _Described)),
        lifter,
    )
    return Module(key=path, params=params, raw_names=raw_names, described=described, parts=parts)


def optimizable(params: Mapping[str, Param]) -> tuple[str, ...]:
    """Names that an optimizer over `model.parameters()` would hold, in order: no buffers, ties once."""
    return tuple(p.name for p in params.values() if p.trainable is not False and p.tied_to is None)


def state_dict_of(params: Mapping[str, Param]) -> Node:
    """The parameters as a module's state_dict has them, tied ones sharing their memory."""
    items = tuple((name, _first(params, param).tensor) for name, param in params.items())
    return DictNode(items=items, kind="collections.OrderedDict")


def _first(params: Mapping[str, Param], param: Param) -> Param:
    """The parameter that a tied one shares its memory with, where it has the same layout."""
    first = params.get(param.tied_to or param.name, param)
    return first if first.tensor.spec == param.tensor.spec else param


def _module_entries(node: Node, path: Path, outer: str = "") -> Iterator[_Entry | _Described]:
    """What `state_dict()` of a pickled module would hold, in its order."""
    if not isinstance(node, Opaque) or not isinstance(node.state, DictNode) or not is_module(node):
        return
    where, passing = (*path, "@state"), node.state.get("_non_persistent_buffers_set")
    for part in PARTS:
        inner = node.state.get(part)
        for key, value in inner.items if isinstance(inner, DictNode) else ():
            if not isinstance(key, str):
                continue
            spot = (*where, part, key)
            if part == "_modules":
                yield from _module_entries(value, spot, f"{outer}{key}.")
            elif (found := tensor_of(value)) is not None:
                if part == "_buffers" and isinstance(passing, ListNode) and key in passing.items:
                    continue
                trainable = False if part == "_buffers" else found[2]
                yield _Entry(f"{outer}{key}", (*spot, *found[1]), found[0], trainable)
            elif packed_kind(value) is not None:
                yield _Described(f"{outer}{key}", spot, value)


def _entries(node: Node, path: Path, outer: str = "") -> Iterator[_Entry | _Described]:
    for key, value in node.items if isinstance(node, DictNode) else ():
        if not isinstance(key, (str, int)) or isinstance(key, bool) or str(key).endswith("_extra_state"):
            continue
        raw, where = f"{outer}{key}", (*path, key)
        found = tensor_of(value)
        if found is not None:
            tensor, inside, trainable = found
            yield _Entry(raw, (*where, *inside), tensor, trainable)
        elif packed_kind(value) is not None:
            yield _Described(raw, where, value)
        elif isinstance(value, DictNode):
            yield from _entries(value, where, f"{raw}.")


def _names(raws: Sequence[str], path: Path) -> Sequence[str]:
    """Each name without the marks of wrappers, unless two would then be one."""
    if len(set(raws)) < len(raws):
        repeated = next(raw for raw, times in Counter(raws).items() if times > 1)
        raise FormatError.of(
            "duplicate-key",
            f"'{repeated}' stands twice in the state_dict at '{dotted(path)}'",
            "Save the model again: a state_dict has each name once.",
            loc=path,
        )
    return model_names(raws)


def model_names(raws: Sequence[str]) -> Sequence[str]:
    """What the document calls a state_dict's entries: without the marks, unless two would then be one."""
    stripped = bare_names(raws)
    return raws if len(set(stripped)) < len(raws) else stripped


def bare_names(raws: Sequence[str]) -> Sequence[str]:
    """Each name of a state_dict without the marks of wrappers."""
    text = "\n".join(raws)
    marked = any(mark in text for mark in torch_keys.MARKS)
    unmarked = [_without_marks(raw) for raw in raws] if marked else raws
    before = _wrapper([name for raw, name in zip(raws, unmarked, strict=True) if raw != _AVERAGED])
    if not (before or marked):
        return raws
    bare = [name.removeprefix(before) or raw for raw, name in zip(raws, unmarked, strict=True)]
    return torch_adapter.saved_names(bare) if before.endswith(torch_adapter.PREFIX) else bare


def _refuse_shares(entries: Sequence[tuple[str, _Entry]], path: Path) -> None:
    """Raises: unsupported-feature for what FSDP leaves on each rank: pieces of flattened parameters.

    They are called `_flat_param`, or as the parameters are, behind FSDP's mark and each a piece of one axis
    (`use_orig_params`); a whole model under that mark has weights of more axes.
    """
    flat = [entry.raw for bare, entry in entries if bare.rpartition(".")[2] in torch_keys.FLAT]
    marked = [
        entry
        for bare, entry in entries
        if torch_keys.FSDP in entry.raw
        and torch_keys.FSDP in entry.raw.split(".")
        and _trainable(bare, entry) is not False
    ]
    if not flat and marked and all(len(entry.tensor.shape) == 1 for entry in marked):
        flat = [entry.raw for entry in marked]
    if flat:
        raise FormatError.of(
            "unsupported-feature",
            f"'{flat[0]}' is what FSDP keeps of the parameters on one rank, flattened; which part of which "
            "parameter it is, is not recorded",
            "Save with StateDictType.FULL_STATE_DICT, or a folder of torch.distributed.checkpoint.",
            loc=(*path, flat[0]),
        )


def _wrapper(names: list[str]) -> str:
    """What stands before every name: the marks of wrappers, from the outside in."""
    found = ""
    for mark in (f"{_DDP}.", torch_adapter.PREFIX):
        if names and all(name.startswith(found + mark) for name in names):
            found += mark
    return found


def _without_marks(raw: str) -> str:
    return ".".join(part for part in raw.split(".") if part not in torch_keys.MARKS)


def _trainable(name: str, entry: _Entry, tuned: bool | None = None) -> bool | None:
    if name.rpartition(".")[2] in torch_keys.BUFFERS:
        return False
    if entry.tensor.dtype.kind not in ("float", "complex"):
        return False
    return tuned if entry.trainable is None else entry.trainable


def _place(name: str) -> tuple[str, str]:
    """The layer that a parameter belongs to, and its name there: the cell, of a module of several."""
    owner, _, last = name.rpartition(".")
    cell, suffix = _cell(last)
    return (f"{owner}.{cell}" if cell else owner), suffix


@lru_cache(maxsize=1024)
def _cell(last: str) -> tuple[str, str]:
    """The cell of `weight_ih_l0` and its name there; no other names than such stand for others in torch."""
    cell, _, suffix = home("torch", last).rpartition(".")
    return cell, suffix


class _Told(NamedTuple):
    """What a parameter's name and shape tell of its layer."""

    layer: str
    role: str
    axes: tuple[str, ...] | None
    evidence: Evidence


def _told_of(shapes: Sequence[tuple[str, Shape]]) -> list[_Told]:
    """What is told of each parameter, one after the other, from the layer that it belongs to."""
    groups: dict[str, dict[str, Shape]] = {}
    places = []
    for name, shape in shapes:
        owner, suffix = _place(name)
        group = groups.setdefault(owner, {})
        group[suffix] = shape
        places.append((group, suffix))
    return [_layer(tuple(group.items()))[suffix] for group, suffix in places]


@lru_cache(maxsize=1024)
def _layer(shapes: tuple[tuple[str, Shape], ...]) -> Mapping[str, _Told]:
    """What is told of each parameter of a layer; a model repeats its layers, so that few are worked out."""
    group = dict(shapes)
    return {key: _told(key, layers.candidates("torch", key, shape, group)) for key, shape in shapes}


def _told(suffix: str, readings: tuple[layers.Candidate, ...]) -> _Told:
    """What all readings of a parameter agree on, and never more."""
    kinds = {kind for kind, _, _ in readings}
    roles = {role for _, role, _ in readings}
    axes = {axes for _, _, axes in readings}
    # Torch's names ("weight") say no kind: what the only reading tells is the framework's convention.
    evidence: Evidence = "unknown"
    if len(axes) == 1:
        telling = suffix in torch_keys.BUFFERS or suffix in torch_keys.CELL
        evidence = "named" if len(kinds) == 1 and telling else "assumed"
    return _Told(
        layer=kinds.pop() if len(kinds) == 1 else "unknown",
        role=roles.pop() if len(roles) == 1 else "unknown",
        axes=axes.pop() if len(axes) == 1 else None,
        evidence=evidence,
    )
