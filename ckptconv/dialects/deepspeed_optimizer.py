"""The optimizer of a DeepSpeed run, by parameter, joined of what its ranks have.

    {"base_optimizer_state": {"state": {n: {"step": .., "exp_avg": <vector>, ..}}, "param_groups": ..},
     "single_partition_of_fp32_groups": [<vector>, ..], "partition_count": .., "group_paddings": ..,
     "param_alignment_paddings": .., "param_slice_mappings": [{name: fragment_address}, ..]}

`n` numbers the vectors: one for each group of parameters, of ZeRO 3 one for each of its sub-groups.
`param_shapes` of the model file has a dictionary for each vector, names in the vector's order (which
`round_robin_gradients` changes). ZeRO 3 has `optimizer_state_dict` and `fp32_flat_groups` in the place of the
first two; an *elastic* checkpoint has a list of states without groups. `param_slice_mappings` says of each
parameter where in the rank's vector it is, and must agree; with `round_robin_gradients` it does not (0.19.8
numbers the parameters there as before the shuffle, and `ds_to_universal` follows it), `param_shapes` does.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from ckptconv.dialects.deepspeed_layout import Cut, begins, joined, padding_of
from ckptconv.dialects.deepspeed_parts import Found, Located, Shapes, damaged, tensor_at
from ckptconv.dialects.deepspeed_places import FP32, STATE, place
from ckptconv.dialects.deepspeed_settings import (
    base_of,
    entry_of,
    is_decoupled,
    join_settings,
    numbers_of,
    same_step,
)
from ckptconv.dialects.torch_values import tensor_of
from ckptconv.rawtree import DictNode, ListNode, Node, Opaque, Path
from ckptconv.tensor import TensorRef

_VECTORS = ("single_partition_of_fp32_groups", "fp32_flat_groups")
_ELASTIC_STEP = "base_optimizer_state_step"


def join_shares(
    shares: Sequence[Located], groups: Sequence[Shapes], config: Node, *, by_param: bool
) -> Found:
    """The optimizer of the ranks' shares; `groups`: the parameters of each vector, in its order.

    I/O: reads 0-d numbers. Raises: corrupt-file, progress-conflict.
    """
    found = Found(entries={name: [] for shapes in groups for name in shapes})
    bases = [base_of(share) for share in shares]
    numbers = numbers_of(bases[0], len(groups))
    paddings = shares[0][1].get("param_alignment_paddings")
    first = 0
    for position, shapes in enumerate(groups):
        cut = Cut(
            numels=tuple(math.prod(shape) for shape in shapes.values()),
            paddings=_paddings(paddings, position, len(shapes), shares[0][0]),
            ranks=len(shares),
            by_param=by_param,
        )
        found.cuts.append(cut)
        masters = [_item(share, _VECTORS, position, len(groups)) for share in shares]
        tensors = _join(found, masters, cut, FP32, position, shapes)
        found.weights.update(zip(shapes, tensors, strict=True))
        if not _is_shuffled(config):
            _check_mappings(shares, position, cut, list(shapes), masters)
        entries = [entry_of(base, numbers[position]) for base in bases]
        _join_state(found, entries, cut, position, first, shapes)
        first += len(shapes)
    join_settings(found, bases, numbers, groups, is_decoupled(config))
    steps = [((*path, _ELASTIC_STEP), share.get(_ELASTIC_STEP)) for path, share in shares]
    if all(node is not None for _, node in steps):
        same_step(found, steps, groups)
    return found


def _is_shuffled(config: Node) -> bool:
    zero = config.get("zero_optimization") if isinstance(config, DictNode) else None
    return isinstance(zero, DictNode) and zero.get("round_robin_gradients") is True


def _join(
    found: Found, nodes: Sequence[tuple[Path, Node]], cut: Cut, key: str, position: int, shapes: Shapes
) -> list[TensorRef]:
    """The parameters of one vector of every rank."""
    vectors = [tensor_at(node, path) for path, node in nodes]
    tensors = [tensor for tensor, _ in vectors]
    where = vectors[0][1]
    kinds = {(tensor.dtype.name, len(tensor.shape)) for tensor in tensors}
    if len(kinds) > 1 or next(iter(kinds))[1] != 1:
        shown = ", ".join(f"{name} of {rank} axes" for name, rank in sorted(kinds))
        raise damaged("corrupt-file", where, f"the ranks' vectors are {shown}")
    lengths = [tensor.shape[0] for tensor in tensors]
    misfit = cut.misfit(lengths)
    if misfit:
        raise damaged("corrupt-file", where, f"'{key}' of {len(shapes)} parameters: {misfit}")
    for rank, ((tensor, path), begin) in enumerate(zip(vectors, begins(lengths), strict=True)):
        padding: Node = padding_of(cut, rank, begin, tensor)
        if isinstance(padding, TensorRef) and not padding.spec.numel:
            padding = None
        args = (key, position, rank, begin, lengths[rank], tensor.dtype.name, padding)
        found.moved[path] = place("vector", *args)
    return joined(cut, tensors, list(shapes.values()))


def _join_state(
    found: Found, entries: list[Located | None], cut: Cut, position: int, first: int, shapes: Shapes
) -> None:
    there = [entry for entry in entries if entry is not None]
    if not there:
        return
    keys = [tuple(sorted(map(str, node.keys))) for _, node in there]
    if len(there) < len(entries) or len(set(keys)) > 1:
        where = there[0][0]
        message = f"the ranks keep different state of vector {position}: {sorted({*keys})}"
        raise damaged("corrupt-file", where, message)
    for key in there[0][1].keys:
        if not isinstance(key, str):
            continue
        nodes: list[tuple[Path, Node]] = [((*path, key), node.get(key)) for path, node in there]
        value = tensor_of(nodes[0][1])
        if value is not None and value[0].shape:
            tensors = _join(found, nodes, cut, key, position, shapes)
            for name, tensor in zip(shapes, tensors, strict=True):
                found.entries[name].append((key, tensor))
            continue
        node = found.once(nodes, (*STATE, first, key))
        for name in shapes:
            found.entries[name].append((key, node))


def _check_mappings(
    shares: Sequence[Located],
    position: int,
    cut: Cut,
    names: Sequence[str],
    masters: Sequence[tuple[Path, Node]],
) -> None:
    """Raises: corrupt-file where a rank says that a parameter is elsewhere in its vector."""
    begin = 0
    for rank, (path, share) in enumerate(shares):
        length = tensor_at(masters[rank][1], masters[rank][0])[0].spec.numel
        mappings = share.get("param_slice_mappings")
        count = len(mappings.items) if isinstance(mappings, ListNode) else 0
        mine = mappings.items[position] if isinstance(mappings, ListNode) and position < count else None
        if isinstance(mine, DictNode):
            told = {str(name): _address(node) for name, node in mine.items}
            ours = {names[span.param]: (span.at, span.count) for span in cut.spans(rank, begin, length)}
            wrong = [name for name in {**told, **ours} if told.get(name) != ours.get(name)]
            if wrong:
                where = (*path, "param_slice_mappings", position)
                told_of, due = told.get(wrong[0]), ours.get(wrong[0])
                message = f"'{wrong[0]}' is at {told_of} of the vector, by 'param_shapes' at {due}"
                raise damaged("corrupt-file", where, message)
        begin += length


def _address(node: Node) -> tuple[int, int] | None:
    """(start, numel) of a `fragment_address`."""
    state = node.state if isinstance(node, Opaque) else None
    if isinstance(node, Opaque) and not isinstance(state, DictNode) and len(node.args) == 2:
        numel, start = node.args
    elif isinstance(state, DictNode):
        numel, start = state.get("numel"), state.get("start")
    else:
        return None
    return (start, numel) if isinstance(start, int) and isinstance(numel, int) else None


def _item(share: Located, keys: Sequence[str], position: int, count: int) -> tuple[Path, Node]:
    """One of the vectors that a share lists."""
    path, node = share
    for key in keys:
        listed = node.get(key)
        if isinstance(listed, ListNode):
            if len(listed.items) == count:
                return (*path, key, position), listed.items[position]
            message = f"there are {len(listed.items)} vectors, 'param_shapes' tells of {count}"
            raise damaged("corrupt-file", (*path, key), message)
    raise damaged("corrupt-file", path, f"neither {' nor '.join(map(repr, keys))} is there")


def _paddings(listed: Node, position: int, count: int, path: Path) -> tuple[int, ...]:
    if listed is None:
        return ()
    where = (*path, "param_alignment_paddings", position)
    mine = listed.items[position] if isinstance(listed, ListNode) and position < len(listed.items) else None
    items = mine.items if isinstance(mine, ListNode) else ()
    paddings = tuple(p for p in items if isinstance(p, int) and not isinstance(p, bool) and p >= 0)
    if len(paddings) != count or len(items) != count:
        raise damaged("corrupt-file", where, f"{len(paddings)} paddings for {count} parameters")
    return paddings
