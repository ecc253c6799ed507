"""Optimizers as Megatron-LM has them in its files, and as `Optimizer.state_dict()` has them.

| in the file | as a state_dict |
|---|---|
| the optimizer alone (FP32Optimizer), or several in a list (ChainedOptimizer) | as it is |
| beside it `fp32_from_fp16_params`, for each group a list of float32 copies | `fp32_param` in the state |
| `step` in the groups and not in the state (FusedAdam of Transformer Engine and Apex) | in the state |
| groups without `params` (DistributedOptimizer: its state lies elsewhere) | none: it is left as it is |

Groups are made by `_get_param_groups` in the order of the model: what is a vector or called `.bias` has no
decay (`wd_mult` 0). Source: megatron-core 0.16 `optimizer/optimizer.py`, `optimizer/__init__.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Final

from ckptconv.dialects.torch_groups import GroupRule
from ckptconv.dialects.torch_optimizer import is_optimizer
from ckptconv.dialects.torch_values import dotted, number_of
from ckptconv.document import Param
from ckptconv.errors import FormatError, MappingError
from ckptconv.rawtree import DictNode, ListNode, Node, Path, at, transform

OPTIMIZER: Final = "optimizer"
COPY: Final = "fp32_param"
"""Key in a parameter's state of its float32 copy."""
_COPIES = ("fp32_from_fp16_params", "fp32_from_fp16")
_STEP, _DECAY = "step", "wd_mult"
_MOVED = ListNode()
"""Stands in the tree for copies that are in the state of their parameters."""


def unfolded(root: DictNode) -> tuple[DictNode, tuple[str, ...]]:
    """The tree with every optimizer as a state_dict, and those whose groups held the step.

    Raises: order-ambiguous.
    """
    counted: list[str] = []
    for path, node in _optimizers(root):
        copied = _with_copies(root, path, node)
        if copied is not node:
            root = _put(root, (*path[:-1], str(_key_of_copies(at(root, path[:-1])))), _MOVED)
        stepped = _with_steps(copied)
        if stepped is not None:
            counted.append("/".join(map(str, path)))
        root = _put(root, path, stepped or copied)
    return root, tuple(counted)


def folded(root: DictNode, counted: Iterable[str]) -> DictNode:
    """The tree as the file has it. Raises: unequal-steps."""
    groups = set(counted)
    for path, node in list(_optimizers(root)):
        outer = at(root, path[:-1])
        key = _key_of_copies(outer)
        if key is not None and at(outer, (key,)) == _MOVED:
            lists = ListNode(items=tuple(ListNode(items=tuple(_copies(node, g))) for g in _groups(node)))
            node = _mapped_states(node, lambda state: _without(state, COPY))
            root = _put(root, (*path[:-1], key), lists)
        if "/".join(map(str, path)) in groups:
            node = _with_group_steps(node, path)
        root = _put(root, path, node)
    return root


def unreadable(root: DictNode) -> tuple[str, ...]:
    """A sentence about the optimizers whose state is not in the file, if any."""
    node = root.get(OPTIMIZER)
    several = node.items if isinstance(node, ListNode) else (node,)
    for outer in several:
        inner = outer.get(OPTIMIZER) if isinstance(outer, DictNode) else None
        groups = inner.get("param_groups") if isinstance(inner, DictNode) else None
        if isinstance(groups, ListNode) and isinstance(inner, DictNode) and not is_optimizer(inner):
            return (
                "The optimizer's state is DistributedOptimizer's, flat in 'distrib_optim.pt' without the "
                "names and shapes of the parameters: it is not read. Save with --ckpt-format torch_dist "
                "--dist-ckpt-optim-fully-reshardable, or without --use-distributed-optimizer.",
            )
    return ()


def rule(node: DictNode) -> GroupRule | None:
    """How Megatron fills the groups of an optimizer; None where they do not say what is decayed."""
    decays = [number_of(group.get(_DECAY)) for group in _groups(node)]
    if not decays or any(found is None for found in decays):
        return None
    decayed = [bool(found[0]) for found in decays if found is not None]
    if len(set(decayed)) == 1:
        return GroupRule(is_ordered=True, may_be_in=lambda param, group: True)
    return GroupRule(is_ordered=True, may_be_in=lambda param, group: decayed[group] is _is_decayed(param))


def _is_decayed(param: Param) -> bool:
    """Whether Megatron's standard rule decays a parameter."""
    return len(param.tensor.shape) != 1 and not param.name.endswith(".bias")


def _optimizers(root: DictNode) -> Iterator[tuple[Path, DictNode]]:
    """Every state_dict of an optimizer, the only one or those of a chain."""
    node = root.get(OPTIMIZER)
    chain = list(enumerate(node.items)) if isinstance(node, ListNode) else []
    places: list[tuple[Path, Node]] = [((OPTIMIZER,), node), *(((OPTIMIZER, i), one) for i, one in chain)]
    for path, one in places:
        inner = one.get(OPTIMIZER) if isinstance(one, DictNode) else None
        for where, found in ((path, one), ((*path, OPTIMIZER), inner)):
            if isinstance(found, DictNode) and is_optimizer(found):
                yield where, found


def _put(root: DictNode, path: Path, node: Node) -> DictNode:
    changed = transform(root, lambda where, old: node if where == path else old)
    assert isinstance(changed, DictNode)
    return changed


def _groups(node: DictNode) -> list[DictNode]:
    groups = node.get("param_groups")
    return [g for g in groups.items if isinstance(g, DictNode)] if isinstance(groups, ListNode) else []


def _params(group: DictNode) -> tuple[Node, ...]:
    params = group.get("params")
    return params.items if isinstance(params, ListNode) else ()


def _mapped_states(node: DictNode, change: Callable[[DictNode], DictNode]) -> DictNode:
    state = node.get("state")
    assert isinstance(state, DictNode)
    items = tuple((k, change(v) if isinstance(v, DictNode) else v) for k, v in state.items)
    return _with(node, "state", replace(state, items=tuple((k, v) for k, v in items if v != DictNode())))


def _with(node: DictNode, key: str, value: Node) -> DictNode:
    if key not in node:
        return replace(node, items=(*node.items, (key, value)))
    return replace(node, items=tuple((k, value if k == key else v) for k, v in node.items))


def _without(node: DictNode, key: str) -> DictNode:
    return replace(node, items=tuple((k, v) for k, v in node.items if k != key))


# Float32 copies


def _with_copies(root: DictNode, path: Path, node: DictNode) -> DictNode:
    """The optimizer with the copies that stand beside it in the state of their parameters."""
    outer = at(root, path[:-1])
    key = _key_of_copies(outer)
    lists = at(outer, (key,)) if key is not None else None
    groups = _groups(node)
    entries_of = lists.items if isinstance(lists, ListNode) else ()
    copies = [entry.items if isinstance(entry, ListNode) else () for entry in entries_of]
    if not any(copies):
        return node
    sizes = [len(_params(group)) for group in groups]
    if [len(c) for c in copies] != sizes:
        raise FormatError.of(
            "order-ambiguous",
            f"the groups of '{dotted(path)}' have {sizes} parameters and {[len(c) for c in copies]} float32 "
            "copies: which parameter has none is not recorded",
            "Save with --ckpt-format torch_dist, which names every copy.",
            loc=path,
        )
    state = node.get("state")
    entries = dict(state.items) if isinstance(state, DictNode) else {}
    for group, own in zip(groups, copies, strict=True):
        for index, copy in zip(_params(group), own, strict=True):
            entry = entries.get(index, DictNode())
            if isinstance(entry, DictNode):
                entries[index] = replace(entry, items=(*entry.items, (COPY, copy)))
    return _with(node, "state", DictNode(items=tuple(entries.items())))


def _key_of_copies(outer: Node) -> str | None:
    """The key beside an optimizer that holds its float32 copies, or held them."""
    return next((key for key in _COPIES if isinstance(outer, DictNode) and key in outer), None)


def _copies(node: DictNode, group: DictNode) -> Iterator[Node]:
    state = node.get("state")
    for index in _params(group):
        entry = state.get(index) if isinstance(state, DictNode) else None
        if isinstance(entry, DictNode) and COPY in entry:
            yield entry.get(COPY)


# Steps


def _with_steps(node: DictNode) -> DictNode | None:
    """The optimizer with its groups' steps in the state of their parameters; None where it is so already."""
    state, groups = node.get("state"), _groups(node)
    assert isinstance(state, DictNode)
    steps = {index: group.get(_STEP) for group in groups for index in _params(group) if _STEP in group}
    entries = [(k, v) for k, v in state.items if isinstance(v, DictNode)]
    if not steps or not entries or any(_STEP in v or k not in steps for k, v in entries):
        return None
    items = tuple((k, replace(v, items=((_STEP, steps[k]), *v.items))) for k, v in entries)
    emptied = tuple(_without(g, _STEP) if _params(g) else g for g in groups)
    node = _with(node, "state", replace(state, items=items))
    return _with(node, "param_groups", ListNode(items=emptied))


def _with_group_steps(node: DictNode, path: Path) -> DictNode:
    state = node.get("state")
    assert isinstance(state, DictNode)
    groups = []
    for group in _groups(node):
        entries = [entry for index in _params(group) if isinstance(entry := state.get(index), DictNode)]
        steps = [entry.get(_STEP) for entry in entries if _STEP in entry]
        refuse_unequal(steps, path)
        groups.append(_with(group, _STEP, steps[0]) if steps else group)
    node = _mapped_states(node, lambda entry: _without(entry, _STEP))
    return _with(node, "param_groups", ListNode(items=tuple(groups)))


def refuse_unequal(steps: Iterable[Node], path: Path) -> None:
    """Raises: unequal-steps where parameters count differently."""
    counts = sorted({found[0] for step in steps if (found := number_of(step)) is not None})
    if len(counts) > 1:
        raise MappingError.of(
            "unequal-steps",
            f"the parameters of '{dotted(path)}' have steps from {counts[0]} to {counts[-1]}, Megatron "
            "counts one for all of a group",
            "Pass --set step=N.",
            loc=path,
        )
