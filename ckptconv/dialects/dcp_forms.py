"""Optimizers as torch.distributed.checkpoint has them, and as `Optimizer.state_dict()` has them.

A folder flattens dictionaries, so what a training loop saved comes back changed; each change has a name here,
and is undone when the tree is written to a folder again:

| form | in the folder | as a state_dict |
|---|---|---|
| `flat` | `{"state.<name>.exp_avg": .., "param_groups.<name>.lr": ..}` | groups of equal settings |
| `text` | the numbers of parameters are text in `state`, and numbers in `params` | numbers |
| `bare` | no `state`: one with nothing in it leaves no entry | `state` is `{}` |
| `named` | names where a state_dict has running numbers; `ckptconv.named` tells which optimizers | numbers |
| `loose` | a model's tensors at the root, beside the optimizer (torchtitan) | under `model` |

Everything else is as it was saved: with names if `get_state_dict` made it, flat if that was asked to flatten.
Source: torch 2.13 `torch/distributed/checkpoint/state_dict.py` (`_flatten_optim_state_dict`), `_traverse.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import partial
from typing import Final

from ckptconv.dialects.torch_keys import MODEL
from ckptconv.dialects.torch_modules import is_state_dict
from ckptconv.dialects.torch_values import dotted, keyed, number_of
from ckptconv.rawtree import DictNode, ListNode, Node, Path, at, dict_of, transform
from ckptconv.tensor import TensorRef

NAMED: Final = "ckptconv.named"
"""Key at the root of a folder that we write: the optimizers whose names were numbers."""

FORMS: Final = "forms"
"""Attribute of the residue: what was undone when the tree was lifted."""

_STATE = "state."
_GROUPS = "param_groups."
_SEPARATOR = ":"

Form = tuple[str, Path]


def unfolded(root: DictNode) -> tuple[DictNode, tuple[str, ...]]:
    """The tree with every optimizer as a state_dict, and which forms that undid."""
    forms: list[Form] = []
    told = root.get(NAMED)
    named = set(told.items) if isinstance(told, ListNode) else set()
    tree = replace(root, items=tuple((k, v) for k, v in root.items if k != NAMED))
    for path, node in keyed(tree):
        if isinstance(node, DictNode):
            forms += [(form, path) for form in _forms(node, dotted(path) in named)]
    for form, path in forms:
        tree = _at(tree, path, _INWARD[form])
    if _is_loose(tree) and has_optimizer(tree):
        tree = _gathered(tree)
        forms.append(("loose", ()))
    return tree, tuple(f"{form}{_SEPARATOR}{'/'.join(map(str, path))}" for form, path in forms)


def folded(root: DictNode, forms: Iterable[str], names: Mapping[Path, tuple[str, ...]]) -> DictNode:
    """The tree as the folder has it; `names`: those of each optimizer's parameters, in the order of groups.

    An optimizer that was in no form of its own, and is numbered, gets the names.
    """
    undone = [_parsed(root, form) for form in forms]
    kept = [form for form in undone if form is not None]
    for form, path in reversed(kept):
        if form == "loose":
            root = _scattered(root)
        elif form in _OUTWARD:
            root = _at(root, path, _OUTWARD[form])
    as_it_was = {path for form, path in kept if form == "text"}
    marked = []
    for path, listed in names.items():
        if path in as_it_was:
            continue
        node = at(root, path)
        if isinstance(node, DictNode) and _numbers(node) == list(range(len(listed))):
            root = _at(root, path, partial(_renamed, names=dict(enumerate(listed))))
            marked.append(dotted(path))
    if not marked:
        return root
    return replace(root, items=(*root.items, (NAMED, ListNode(items=tuple(marked)))))


def has_optimizer(root: DictNode) -> bool:
    """Whether there is an optimizer in the tree."""
    return any(isinstance(node, DictNode) and "param_groups" in node for _, node in keyed(root))


def _parsed(root: DictNode, text: str) -> Form | None:
    """A form and its path, where the tree still has it."""
    form, _, joined = text.partition(_SEPARATOR)
    path: Path = tuple(joined.split("/")) if joined else ()
    steps: list[str | int] = []
    node: Node = root
    for step in path:
        step = int(step) if isinstance(node, ListNode) and str(step).isdigit() else step
        try:
            node = at(node, (step,))
        except KeyError:
            return None
        steps.append(step)
    return form, tuple(steps)


def _forms(node: DictNode, named: bool) -> list[str]:
    """The forms of one dictionary, in the order in which they are undone."""
    keys = [key for key in node.keys if isinstance(key, str)]
    if keys and len(keys) == len(node.items) and all(k.startswith((_STATE, _GROUPS)) for k in keys):
        return ["flat"] if any(key.startswith(_GROUPS) for key in keys) else []
    numbers = _numbers(node)
    if numbers is None:
        return []
    state = node.get("state")
    forms = ["bare"] if "state" not in node else []
    if isinstance(state, DictNode) and state.items:
        texts = {str(number) for number in numbers}
        if all(isinstance(n, int) for n in numbers) and all(key in texts for key in state.keys):
            forms.append("text")
    return [*forms, "named"] if named else forms


def _numbers(node: DictNode) -> list[str | int] | None:
    """What an optimizer's groups call its parameters; None for what is no optimizer."""
    groups = node.get("param_groups")
    if not isinstance(groups, ListNode) or not groups.items:
        return None
    found: list[str | int] = []
    for group in groups.items:
        params = group.get("params") if isinstance(group, DictNode) else None
        if not isinstance(params, ListNode):
            return None
        found += [n for n in params.items if isinstance(n, (str, int)) and not isinstance(n, bool)]
    return found


def _renamed(node: DictNode, names: Mapping[str | int, str | int]) -> DictNode:
    """An optimizer whose parameters are called otherwise."""

    def called(key: Node) -> Node:
        return names.get(key, key) if isinstance(key, (str, int)) and not isinstance(key, bool) else key

    def group(entry: Node) -> Node:
        params = entry.get("params") if isinstance(entry, DictNode) else None
        if not isinstance(entry, DictNode) or not isinstance(params, ListNode):
            return entry
        renamed = replace(params, items=tuple(map(called, params.items)))
        return replace(entry, items=tuple((k, renamed if k == "params" else v) for k, v in entry.items))

    items: list[tuple[Node, Node]] = []
    for key, value in node.items:
        if key == "state" and isinstance(value, DictNode):
            value = replace(value, items=tuple((called(k), v) for k, v in value.items))
        elif key == "param_groups" and isinstance(value, ListNode):
            value = replace(value, items=tuple(map(group, value.items)))
        items.append((key, value))
    return replace(node, items=tuple(items))


def _numbered(node: DictNode) -> DictNode:
    names = _numbers(node) or []
    return _renamed(node, {name: number for number, name in enumerate(names)})


def _with_numbers(node: DictNode) -> DictNode:
    """`state` under numbers, where it has them as text."""
    return _rekeyed(node, {str(number): number for number in _numbers(node) or []})


def _with_text(node: DictNode) -> DictNode:
    return _rekeyed(node, {number: str(number) for number in _numbers(node) or []})


def _rekeyed(node: DictNode, keys: Mapping[str | int, str | int]) -> DictNode:
    state = node.get("state")
    if not isinstance(state, DictNode):
        return node
    items = tuple((keys.get(k, k) if isinstance(k, (str, int)) else k, v) for k, v in state.items)
    renewed = replace(state, items=items)
    return replace(node, items=tuple((k, renewed if k == "state" else v) for k, v in node.items))


def _stateful(node: DictNode) -> DictNode:
    return replace(node, items=(("state", DictNode()), *node.items))


def _stateless(node: DictNode) -> DictNode:
    state = node.get("state")
    if isinstance(state, DictNode) and state.items:
        return node
    return replace(node, items=tuple((k, v) for k, v in node.items if k != "state"))


def _deflated(node: DictNode) -> DictNode:
    """A flat optimizer, nested: parameters with equal settings are a group."""
    state: dict[str, list[tuple[Node, Node]]] = {}
    settings: dict[str, list[tuple[Node, Node]]] = {}
    for key, value in node.items:
        assert isinstance(key, str)
        into, rest = (
            (state, key.removeprefix(_STATE))
            if key.startswith(_STATE)
            else (settings, key.removeprefix(_GROUPS))
        )
        name, _, field = rest.rpartition(".")
        into.setdefault(name, []).append((field, value))
    groups: dict[tuple[object, ...], tuple[list[tuple[Node, Node]], list[Node]]] = {}
    for name, items in settings.items():
        alike = tuple((field, _comparable(value)) for field, value in items)
        groups.setdefault(alike, (items, []))[1].append(name)
    listed = [dict_of([*items, ("params", ListNode(items=tuple(names)))]) for items, names in groups.values()]
    return dict_of(
        {
            "state": dict_of([(name, dict_of(items)) for name, items in state.items()]),
            "param_groups": ListNode(items=tuple(listed)),
        }
    )


def _comparable(value: Node) -> object:
    """Equal for equal settings, whatever they are stored in."""
    if isinstance(value, TensorRef):
        found = number_of(value)
        return id(value) if found is None else (repr(found[0]), str(found[1]))
    return repr(value)


def _flattened(node: DictNode) -> DictNode:
    items: list[tuple[Node, Node]] = []
    state, groups = node.get("state"), node.get("param_groups")
    for name, entry in state.items if isinstance(state, DictNode) else ():
        for field, value in entry.items if isinstance(entry, DictNode) else ():
            items.append((".".join(("state", str(name), str(field))), value))
    for group in groups.items if isinstance(groups, ListNode) else ():
        params = group.get("params") if isinstance(group, DictNode) else None
        if isinstance(group, DictNode) and isinstance(params, ListNode):
            items += [
                (".".join(("param_groups", str(name), str(field))), value)
                for name in params.items
                for field, value in group.items
                if field != "params"
            ]
    return dict_of(items)


_INWARD: Mapping[str, Callable[[DictNode], DictNode]] = {
    "flat": _deflated,
    "text": _with_numbers,
    "bare": _stateful,
    "named": _numbered,
}
_OUTWARD: Mapping[str, Callable[[DictNode], DictNode]] = {
    "flat": _flattened,
    "text": _with_text,
    "bare": _stateless,
}


def _is_loose(root: DictNode) -> bool:
    """Whether a model's tensors stand at the root: dotted names, and no model of its own."""
    names = [k for k, v in root.items if isinstance(k, str) and "." in k and isinstance(v, TensorRef)]
    return bool(names) and not any(k in MODEL or is_state_dict(v) for k, v in root.items)


def _gathered(root: DictNode) -> DictNode:
    model = tuple((k, v) for k, v in root.items if isinstance(v, TensorRef))
    rest = tuple((k, v) for k, v in root.items if not isinstance(v, TensorRef))
    return replace(root, items=((MODEL[0], DictNode(items=model)), *rest))


def _scattered(root: DictNode) -> DictNode:
    model = root.get(MODEL[0])
    if not isinstance(model, DictNode):
        return root
    return replace(root, items=(*model.items, *((k, v) for k, v in root.items if k != MODEL[0])))


def _at(root: DictNode, path: Path, change: Callable[[DictNode], DictNode]) -> DictNode:
    changed = transform(
        root, lambda where, node: change(node) if where == path and isinstance(node, DictNode) else node
    )
    assert isinstance(changed, DictNode)
    return changed
