"""Folders of Megatron-LM's `torch_dist` format as the dictionary that a file of one rank holds, and back.

| in the folder | in the dictionary |
|---|---|
| entry `decoder.layers.<rest>`, the layers along its first axis | `model`, `decoder.layers.<n>.<rest>` |
| entry `decoder.layers.<n>.<rest>` (layers of several kinds), any other name | `model`, the same name |
| entry `optimizer.state.<key>.<name>`, like the parameter | `optimizer`, `state`, by that name |
| `optimizer.state.common_step` of `common.pt` | `step` of every parameter |
| groups of `common.pt`, which do not name their parameters | `params`, by Megatron's rule for the decay |
| entries that are no tensors (`<name>/shard_<i>_<n>`) | the same key |
| the rest of `common.pt`; `metadata.json` | the same key; `metadata.json` |

Tensors are whole whatever the ranks were: the folder says where each part lies. Left as they are, with a
sentence: an optimizer's state in buckets (`dp_reshardable`), flattened (`fully_sharded_model_space` before
0.14), gathered in one object (`dp_zero_gather_scatter`) or of several optimizers in a chain, and groups for
which the rule does not tell every parameter.

Source: megatron-core 0.16 `dist_checkpointing/serialization.py`, `optimizer/optimizer.py`,
`optimizer/distrib_optimizer.py`, `transformer/transformer_block.py`.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Final

from ckptconv.dialects.megatron_forms import COPY, OPTIMIZER, refuse_unequal, rule
from ckptconv.document import Param
from ckptconv.errors import FormatError
from ckptconv.formats.dcp_write import COMMON, CONFIG
from ckptconv.ops import Concat, Reshape, Slice
from ckptconv.rawtree import DictNode, ListNode, Node, Path, Scalar, at, dict_of, transform
from ckptconv.tensor import TensorRef

STACKED: Final = "stacked_layers"
"""Attribute of the residue: the lists of layers that lie along a first axis."""
LEFT: Final = "not_lifted"
"""Attribute: what to say of an optimizer's state that is left as it is."""
_ENTRIES: Final = "entries"
"""Attribute: the keys of entries that are no tensors of the model or the optimizer."""
_CALLED: Final = "copies_called"
"""Attribute: what the folder calls the parameters' float32 copies."""

_STATE, _STEP, _MODEL = "optimizer.state.", "common_step", "model"
_OF_OPTIMIZER, _KIND = "optimizer.", "param_state_sharding_type"
_COPIES = (COPY, "param")
"""What the float32 copy is called: by the plain optimizers, by DistributedOptimizer."""
_LAYERS = re.compile(r"((?:.*?\.)?layers)\.(?!\d+(?:\.|$))(.+)")
_LAYER = re.compile(r"((?:.*?\.)?layers)\.(\d+)\.(.+)")
_LEFT = (
    "The optimizer's state is not lifted: {why}. Megatron-LM saves it by parameter with "
    "--dist-ckpt-optim-fully-reshardable, or without --use-distributed-optimizer."
)

Attributes = Mapping[str, Scalar | tuple[str, ...]]
Tensors = Mapping[str, TensorRef]


def is_torch_dist(root: DictNode) -> bool:
    """Whether a folder has what Megatron leaves beside its entries."""
    return isinstance(root.get(COMMON), DictNode) and CONFIG in root


def whole(root: DictNode) -> tuple[DictNode, Attributes]:
    """The dictionary, and the attributes of its residue. Raises: duplicate-key."""
    common = root.get(COMMON)
    assert isinstance(common, DictNode)
    entries = {k: v for k, v in root.items if k not in (COMMON, CONFIG) and isinstance(k, str)}
    weights = {
        key: value
        for key, value in entries.items()
        if isinstance(value, TensorRef) and not key.startswith(_OF_OPTIMIZER)
    }
    stacked = _stacked(weights)
    left = common.get(_MODEL)
    named = [*_by_layer(weights, stacked), *(left.items if isinstance(left, DictNode) else ())]
    model = {key: value for key, value in named if isinstance(key, str)}
    optimizer, used, why = _optimizer(common, entries, weights, stacked)
    rest = {k: v for k, v in entries.items() if k not in weights and k not in used}
    _refuse_repeated([key for key, _ in named], [*rest, *common.keys])
    items: list[tuple[Node, Node]] = [
        (k, optimizer if k == OPTIMIZER else v) for k, v in common.items if k != _MODEL
    ]
    items.append((_MODEL, dict_of(model)))
    items += [*rest.items(), (CONFIG, root.get(CONFIG))]
    told: dict[str, Scalar | tuple[str, ...]] = {STACKED: stacked, _ENTRIES: tuple(rest)}
    if why:
        told[LEFT] = _LEFT.format(why=why)
    called = {name for name in _COPIES for key in used if key.startswith(f"{_STATE}{name}.")}
    if len(called) == 1:
        told[_CALLED] = called.pop()
    return dict_of(items), told


def apart(root: DictNode, attributes: Attributes) -> DictNode:
    """The folder's tree of a dictionary that was one. Raises: unequal-steps."""
    stacked, rest = _texts(attributes, STACKED), _texts(attributes, _ENTRIES)
    model, common = root.get(_MODEL), root
    assert isinstance(model, DictNode)
    tensors = {k: v for k, v in model.items if isinstance(k, str) and isinstance(v, TensorRef)}
    others = tuple((k, v) for k, v in model.items if k not in tensors)
    entries: dict[str, Node] = {**_together(tensors, stacked)}
    for path in _places(common):
        common, slots = _emptied(common, path)
        for slot, by_name in slots.items():
            called = str(attributes.get(_CALLED, slot)) if slot == COPY else slot
            entries |= {f"{_STATE}{called}.{n}": t for n, t in _together(by_name, stacked).items()}
    items: list[tuple[Node, Node]] = []
    for key, value in common.items:
        if key == _MODEL:
            items += [(key, replace(model, items=others))] if others else []
        elif key in rest:
            entries[str(key)] = value
        elif key != CONFIG and not str(key).startswith("ckptconv."):
            items.append((key, value))
    return dict_of([*entries.items(), (COMMON, dict_of(items)), (CONFIG, root.get(CONFIG))])


def _refuse_repeated(*levels: list[Node]) -> None:
    """Raises: duplicate-key."""
    for names in levels:
        repeated = [name for name, times in Counter(map(str, names)).items() if times > 1]
        if repeated:
            raise FormatError.of(
                "duplicate-key",
                f"'{repeated[0][:80]}' stands twice, in the entries and '{COMMON}': they are of two folders",
                "Copy the whole folder again.",
                loc=(COMMON, repeated[0][:80]),
            )


def _texts(attributes: Attributes, key: str) -> tuple[str, ...]:
    told = attributes.get(key)
    return told if isinstance(told, tuple) else ()


# Layers along an axis


def _stacked(tensors: Tensors) -> tuple[str, ...]:
    """The lists of layers whose tensors all have as many along their first axis."""
    depths: dict[str, set[int]] = {}
    for name, tensor in tensors.items():
        if (told := _LAYERS.fullmatch(name)) is not None:
            depths.setdefault(told[1], set()).add(tensor.shape[0] if tensor.shape else 0)
    return tuple(outer for outer, counts in depths.items() if len(counts) == 1 and counts != {0})


def _by_layer(tensors: Tensors, stacked: tuple[str, ...]) -> Iterator[tuple[str, TensorRef]]:
    """Every tensor by the name that it has in its layer, a layer's together."""
    pending: dict[str, dict[str, TensorRef]] = {}
    for name, tensor in tensors.items():
        told = _LAYERS.fullmatch(name)
        if told is not None and told[1] in stacked:
            pending.setdefault(told[1], {})[told[2]] = tensor
    for name, tensor in tensors.items():
        told = _LAYERS.fullmatch(name)
        if told is None or told[1] not in stacked:
            yield name, tensor
            continue
        layers = pending.pop(told[1], {})
        count = min((tensor.shape[0] for tensor in layers.values()), default=0)
        for number in range(count):
            for inner, stack in layers.items():
                part = stack.apply(Slice(axis=0, start=number, stop=number + 1))
                layer = part.apply(Reshape(before=part.shape, after=part.shape[1:]))
                yield f"{told[1]}.{number}.{inner}", layer


def _together(tensors: Tensors, stacked: tuple[str, ...]) -> dict[str, TensorRef]:
    """The inverse of `_by_layer`."""
    joined: dict[str, TensorRef] = {}
    layers: dict[str, dict[int, TensorRef]] = {}
    for name, tensor in tensors.items():
        told = _LAYER.fullmatch(name)
        if told is None or told[1] not in stacked:
            joined[name] = tensor
            continue
        layers.setdefault(f"{told[1]}.{told[3]}", {})[int(told[2])] = tensor
    for name, by_number in layers.items():
        parts = [by_number[number] for number in sorted(by_number)]
        rows = [part.apply(Reshape(before=part.shape, after=(1, *part.shape))) for part in parts]
        joined[name] = rows[0].apply(Concat(axis=0), *rows[1:])
    return joined


# The optimizer


def _optimizer(
    common: DictNode, entries: Mapping[str, Node], weights: Tensors, stacked: tuple[str, ...]
) -> tuple[Node, frozenset[str], str]:
    """The optimizer of `common` with its state; the entries that are in it now; why it is as it was."""
    node = common.get(OPTIMIZER)
    own = {k: v for k, v in entries.items() if k.startswith(_OF_OPTIMIZER)}
    nothing: tuple[Node, frozenset[str]] = (node, frozenset())
    if node is None and not own:
        return *nothing, ""
    paths = list(_places(common))
    if len(paths) != 1:
        kind = node.get(_KIND) if isinstance(node, DictNode) else None
        why = f"it is shared out as '{kind}'" if isinstance(kind, str) else "it is of several optimizers"
        return *nothing, why
    slots: dict[str, dict[str, TensorRef]] = {}
    for key, value in own.items():
        slot, _, name = key.removeprefix(_STATE).partition(".")
        if not key.startswith(_STATE) or not isinstance(value, TensorRef) or name not in weights:
            return *nothing, f"'{key[:60]}' is of no single parameter"
        if value.shape != weights[name].shape:
            shapes = f"{list(value.shape)}, the parameter {list(weights[name].shape)}"
            return *nothing, f"'{key[:60]}' is flattened: it has shape {shapes}"
        slots.setdefault(slot, {})[name] = value
    state: dict[str, list[tuple[Node, Node]]] = {}
    for slot, by_name in slots.items():
        key = COPY if slot in _COPIES else slot
        for name, tensor in _by_layer(by_name, stacked):
            state.setdefault(name, []).append((key, tensor))
    found = at(common, paths[0])
    assert isinstance(found, DictNode)
    params = {name: tensor for name, tensor in _by_layer(weights, stacked) if name in state}
    groups = _filled(found, params)
    if groups is None:
        return *nothing, "its groups do not tell which parameters are in them"
    told = found.get("state")
    shared = dict(told.items) if isinstance(told, DictNode) else {}
    step = shared.pop(_STEP, None)
    if shared:
        return *nothing, f"{len(shared)} parameters have state of their own in '{COMMON}'"
    counted: list[tuple[Node, Node]] = [] if step is None else [("step", step)]
    filled = dict_of(
        [
            ("state", dict_of([(name, dict_of([*counted, *state[name]])) for name in params])),
            *((k, groups if k == "param_groups" else v) for k, v in found.items if k != "state"),
        ]
    )
    put = transform(common, lambda where, old: filled if where == paths[0] else old)
    assert isinstance(put, DictNode)
    return put.get(OPTIMIZER), frozenset(own), ""


def _places(common: DictNode) -> Iterator[Path]:
    """Where an optimizer's groups stand: FP32Optimizer's, or one level deeper."""
    for path in ((OPTIMIZER,), (OPTIMIZER, OPTIMIZER)):
        try:
            node = at(common, path)
        except KeyError:
            continue
        if isinstance(node, DictNode) and isinstance(node.get("param_groups"), ListNode):
            yield path


def _filled(node: DictNode, params: Tensors) -> ListNode | None:
    """The groups with the names of their parameters; None where the rule does not tell each."""
    groups = node.get("param_groups")
    assert isinstance(groups, ListNode)
    told, count = rule(node), len(groups.items)
    names: list[list[Node]] = [[] for _ in groups.items]
    for name, tensor in params.items():
        param = Param(name=name, tensor=tensor)
        fits = [place for place in range(count) if count == 1 or (told and told.may_be_in(param, place))]
        if len(fits) != 1:
            return None
        names[fits[0]].append(name)
    return ListNode(
        items=tuple(
            replace(group, items=(*group.items, ("params", ListNode(items=tuple(own)))))
            for group, own in zip(groups.items, names, strict=True)
            if isinstance(group, DictNode)
        )
    )


def _emptied(root: DictNode, path: Path) -> tuple[DictNode, dict[str, dict[str, TensorRef]]]:
    """The dictionary whose optimizer has no parameters' state, and that state by key and name."""
    node = at(root, path)
    assert isinstance(node, DictNode)
    state = node.get("state")
    slots: dict[str, dict[str, TensorRef]] = {}
    steps: list[Node] = []
    for name, entry in state.items if isinstance(state, DictNode) else ():
        for key, value in entry.items if isinstance(entry, DictNode) else ():
            if key == "step":
                steps.append(value)
            elif isinstance(value, TensorRef):
                slots.setdefault(str(key), {})[str(name)] = value
    refuse_unequal(steps, path)
    groups = node.get("param_groups")
    bare = tuple(
        replace(group, items=tuple((k, v) for k, v in group.items if k != "params"))
        for group in (groups.items if isinstance(groups, ListNode) else ())
        if isinstance(group, DictNode)
    )
    counted: list[tuple[Node, Node]] = [("state", dict_of({_STEP: steps[0]}))] if steps else []
    kept = [(k, ListNode(items=bare) if k == "param_groups" else v) for k, v in node.items if k != "state"]
    emptied = dict_of([*counted, *kept])
    changed = transform(root, lambda where, old: emptied if where == path else old)
    assert isinstance(changed, DictNode)
    return changed, slots
