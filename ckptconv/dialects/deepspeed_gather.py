"""A DeepSpeed folder as one training dictionary: what the ranks share is there once, what they cut is joined.

    {"module": .., "optimizer": {"state": {i: {..}}, "param_groups": [{.., "param_names": ..}]},
     <whatever else the model file of the first rank has>, "deepspeed.files": <the folder>, ..}

| files | weights | masters |
|---|---|---|
| ZeRO 1 and 2 | `module` of the model file | the ranks' `single_partition_of_fp32_groups` |
| ZeRO 3 | the ranks' `fp32_flat_groups`: `module` holds tensors of no elements | none: they are the weights |
| universal | `module`; where that is empty `fp32.pt` | `fp32.pt`, where `module` has the weights |
| no ZeRO, 16 bit | `module` | `fp32_groups` of the optimizer |

Copies are one value: `frozen_param_fragments` of ZeRO 1 and 2, the counters and settings of further ranks,
`fp32.pt` of what is not trained. Counters, settings and shapes that differ between ranks are refused; buffers
of further ranks (statistics of their own data) are kept for the way back. The fused optimizer of a 16-bit run
without ZeRO keeps vectors (`fp32_groups_flat`) whose parameters nothing names: its state stays numbered.
Source: deepspeed 0.19 `runtime/engine.py` (`_common_checkpoint_state`), `runtime/zero/stage_1_and_2.py`,
`runtime/zero/stage3.py`, `runtime/fp16/unfused_optimizer.py`, `utils/zero_to_fp32.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ckptconv.dialects.deepspeed_files import COMMON, Files
from ckptconv.dialects.deepspeed_model import FRAGMENTS, Model, shapes_of
from ckptconv.dialects.deepspeed_optimizer import join_shares
from ckptconv.dialects.deepspeed_parts import Found, Located, Pairs, Shape, Shapes, conflict, damaged, same
from ckptconv.dialects.deepspeed_places import FILES, FP32, GROUPS, MASTER, MODULE, SCALER, group_node, place
from ckptconv.dialects.deepspeed_universal import place_copies, take_universal
from ckptconv.dialects.torch_optimizer import is_optimizer
from ckptconv.dialects.torch_values import count_of, dotted, number_of, tensor_of
from ckptconv.errors import CkptError, FormatError
from ckptconv.rawtree import DictNode, ListNode, Node, Opaque, Path, dict_of, transform

_OPTIMIZER, _INNER = "optimizer", "optimizer_state_dict"
_ALIKE = frozenset(
    {"global_steps", "global_samples", "skipped_steps", "lr_scheduler", "param_shapes", "frozen_param_shapes"}
)
"""Entries of model files that are the same in those of all ranks."""


def gathered(folder: DictNode) -> DictNode:
    """The dictionary of a DeepSpeed folder. I/O: reads 0-d numbers.

    Raises: unsupported-feature, missing-file, corrupt-file, progress-conflict.
    """
    files = Files.of(folder)
    models = [((name,), _dictionary(folder, name)) for name in files.models]
    states = models[0][1]
    _refuse_parallel(models[0])
    groups = shapes_of(states, "param_shapes", models[0][0])
    found = _optimizer(folder, files, models[0], groups)
    module = Model(models, found, groups).module()
    _place_states(found, models)
    place_copies(found, folder, files, module)
    scaler = _scaler(found, folder, files, states)
    items: Pairs = []
    for key, value in states.items:
        if key == MODULE:
            items.append((key, module))
        elif key == _OPTIMIZER and found.is_optimizer:
            items.append((key, _state_dict(found)))
        elif key != FRAGMENTS:
            items.append((key, value))
    if found.entries and _OPTIMIZER not in states:
        items.append((_OPTIMIZER, _state_dict(found)))
    placed = transform(folder, lambda path, node: found.moved.get(path, node))
    assert isinstance(placed, DictNode)
    items += [
        (SCALER, scaler),
        (GROUPS, ListNode(items=tuple(map(group_node, found.cuts)))),
        (FILES, replace(placed, kind="dict")),
    ]
    return dict_of([(key, value) for key, value in items if key != SCALER or value is not None])


def _dictionary(folder: DictNode, name: str) -> DictNode:
    node = folder.get(name)
    if not isinstance(node, DictNode):
        raise damaged("corrupt-file", (name,), "it holds no dictionary")
    return node


def _refuse_parallel(model: Located) -> None:
    (name,), states = model
    dimensions = states.get("checkpoint_parallel_dimensions")
    told: Pairs = list(dimensions.items) if isinstance(dimensions, DictNode) else []
    for key, node in [("mp_world_size", states.get("mp_world_size")), *told]:
        count = count_of(node)
        if count is not None and count[0] > 1:
            message = f"{key!r:.80} is {count[0]}, the files are of the first rank alone"
            raise _parallel((name, str(key)), message)
    if states.get("ds_autoep_layers") is not None:
        raise _parallel((name, "ds_autoep_layers"), "each rank has experts of its own")
    if not isinstance(states.get(MODULE), DictNode):
        raise _parallel(
            (name, MODULE), "the model is not there: a pipeline keeps its layers in files of their own"
        )


def _optimizer(folder: DictNode, files: Files, model: Located, groups: list[Shapes]) -> Found:
    config = model[1].get("ds_config")
    if files.universal:
        return take_universal(folder, files, groups, config)
    shares: list[Located] = []
    for name in files.optimizers:
        share = _dictionary(folder, name).get(_INNER)
        if not isinstance(share, DictNode):
            raise damaged("corrupt-file", (name, _INNER), "the rank's share of the optimizer is not there")
        shares.append(((name, _INNER), share))
    if shares:
        files.refuse_other_count(_counts(shares[0][1].get("partition_count")))
        by_param = "fp32_flat_groups" in shares[0][1]
        groups = groups or _mapped(shares, model)
        return join_shares(shares, groups, config, by_param=by_param)
    if groups:
        raise damaged(
            "missing-file",
            ("zero_pp_rank_0_mp_rank_00_optim_states.pt",),
            "the run's optimizer was shared by its ranks, and none of their files is there",
        )
    return _unfused(model)


def _counts(node: Node) -> list[int]:
    items = node.items if isinstance(node, ListNode) else (node,)
    return [found[0] for item in items if (found := count_of(item)) is not None]


def _mapped(shares: Sequence[Located], model: Located) -> list[Shapes]:
    """The parameters of each vector by `param_slice_mappings`, where the model file does not tell."""
    module = model[1].get(MODULE)
    groups: list[dict[str, Shape]] = []
    for path, share in shares:
        mappings = share.get("param_slice_mappings")
        if not isinstance(mappings, ListNode):
            raise damaged("corrupt-file", path, "nothing tells which parameters the vectors are made of")
        for position, mine in enumerate(mappings.items):
            if position == len(groups):
                groups.append({})
            for name in mine.keys if isinstance(mine, DictNode) else ():
                found = tensor_of(module.get(name)) if isinstance(module, DictNode) else None
                if found is None or not isinstance(name, str):
                    where = (*path, "param_slice_mappings", position)
                    raise damaged("corrupt-file", where, f"{name!r:.80} is no parameter of the model")
                groups[position].setdefault(name, found[0].shape)
    return list(groups)


def _unfused(model: Located) -> Found:
    """The optimizer of a 16-bit run without ZeRO: its parameters' float32 masters stand beside its state."""
    path, states = model
    found = Found()
    outer = states.get(_OPTIMIZER)
    inner = outer.get(_INNER) if isinstance(outer, DictNode) else None
    lists = outer.get("fp32_groups") if isinstance(outer, DictNode) else None
    if not isinstance(inner, DictNode) or not is_optimizer(inner) or not isinstance(lists, ListNode):
        return found
    groups, state = inner.get("param_groups"), inner.get("state")
    assert isinstance(groups, ListNode)
    assert isinstance(state, DictNode)
    params = [g.get("params") if isinstance(g, DictNode) else None for g in groups.items]
    sizes = [len(p.items) if isinstance(p, ListNode) else 0 for p in params]
    had = [len(masters.items) if isinstance(masters, ListNode) else 0 for masters in lists.items]
    where = (*path, _OPTIMIZER, "fp32_groups")
    if sizes != had:
        raise damaged("corrupt-file", where, f"groups of {had} masters, of {sizes} parameters")
    entries = dict(state.items)
    for group, (numbers, masters) in enumerate(zip(params, lists.items, strict=True)):
        assert isinstance(numbers, ListNode)
        assert isinstance(masters, ListNode)
        for position, (number, node) in enumerate(zip(numbers.items, masters.items, strict=True)):
            entry, master = entries.get(number), tensor_of(node)
            if master is None:
                raise damaged("corrupt-file", (*where, group, position), "no tensor is there")
            if not isinstance(entry, DictNode) or not isinstance(number, int):
                continue
            entries[number] = replace(entry, items=(*entry.items, (MASTER, master[0])))
            slot = place("slot", FP32, number, master[0].dtype.name, False)
            found.moved[(*where, group, position, *master[1])] = slot
    renewed = replace(state, items=tuple(entries.items()))
    items = tuple((k, renewed if k == "state" else v) for k, v in inner.items)
    found.ready = replace(inner, items=items)
    found.moved[(*path, _OPTIMIZER, _INNER)] = place("bare")
    return found


def _place_states(found: Found, models: Sequence[Located]) -> None:
    """The entries of every rank's model file that are the first rank's, or must be."""
    first = models[0][1]
    for path, states in models:
        for key, value in states.items:
            where = (*path, key) if isinstance(key, str) else None
            if where is None or key in (MODULE, FRAGMENTS):
                continue
            if key == _OPTIMIZER and found.is_optimizer:
                continue
            if states is first or same(value, first.get(key)):
                found.moved[where] = place("at", str(key))
            elif key in _ALIKE:
                raise conflict(((*models[0][0], str(key)), first.get(key)), (where, value))


def _scaler(found: Found, folder: DictNode, files: Files, states: DictNode) -> DictNode | None:
    """The loss scale, nothing in it where losses are not scaled; None where no file tells."""
    told: list[tuple[Path, Node]] = []
    is_dynamic = False
    for name in files.optimizers or tuple(n for n in (COMMON,) if n in folder):
        share = _dictionary(folder, name)
        inside: Path = (name,)
        if isinstance(inner := share.get(_INNER), DictNode) and "loss_scaler" not in share:
            share, inside = inner, (name, _INNER)
        scaler = share.get("loss_scaler")
        if isinstance(scaler, Opaque) and isinstance(scaler.state, DictNode):
            told.append(((*inside, "loss_scaler", "@state", "cur_scale"), scaler.state.get("cur_scale")))
            is_dynamic = is_dynamic or scaler.state.get("dynamic") is True
    outer = states.get(_OPTIMIZER)
    if not told and isinstance(outer, DictNode) and "cur_scale" in outer:
        told.append(((files.models[0], _OPTIMIZER, "cur_scale"), outer.get("cur_scale")))
        is_dynamic = outer.get("dynamic_loss_scale") is True
    number = number_of(told[0][1]) if told else None
    if number is None:
        return None
    if number[0] == 1 and not is_dynamic:
        return DictNode()
    return dict_of([("scale", found.once(told, (SCALER, "scale")))])


def _state_dict(found: Found) -> DictNode:
    """The optimizer as `Optimizer.state_dict()` would have it, with names."""
    if found.ready is not None:
        return found.ready
    numbers = {name: number for number, name in enumerate(found.entries)}
    state = dict_of([(numbers[name], dict_of(pairs)) for name, pairs in found.entries.items() if pairs])
    groups = [
        dict_of(
            [
                *settings,
                ("params", ListNode(items=tuple(numbers[name] for name in names))),
                ("param_names", ListNode(items=tuple(names))),
            ]
        )
        for settings, names in found.groups
    ]
    return dict_of([("state", state), ("param_groups", ListNode(items=tuple(groups)))])


def _parallel(where: Path, message: str) -> CkptError:
    hint = "Load the run with DeepSpeed and save a universal checkpoint of it (ds_to_universal)."
    return FormatError.of("unsupported-feature", f"'{dotted(where)}': {message}", hint, loc=where)
