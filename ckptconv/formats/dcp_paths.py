"""Flat keys and nested trees, as torch.distributed.checkpoint's default planner makes the one from the other.

A dictionary is flattened, its keys as text; a list is flattened where a tensor, a dictionary or such a list
is in it; everything else is one entry. An entry's key is its path joined by dots. What that loses (the kind
of a container, its attributes, keys that are no text, containers with nothing in them, the wrapping of a
parameter) is kept in one more entry of folders that we write, `ckptconv.containers`: a list of (path, mold),
a mold being the node without its parts. Where a key is no text, or has no entry, the mold has all the keys,
with None for the values.

Source: torch 2.13 `torch/distributed/checkpoint/_nested_dict.py`, `_traverse.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Final

from ckptconv.errors import Code, FormatError
from ckptconv.formats.pickle_reader import MAX_DEPTH
from ckptconv.rawtree import DictNode, ListNode, Node, Opaque, Path
from ckptconv.tensor import TensorRef

CONTAINERS: Final = "ckptconv.containers"
"""Key of the entry with the molds."""
NOTE: Final = "ckptconv.note"
"""Key of the entry with the embedded note."""

_WRAPPED = ("torch.parameter", "torch.tensor")


@dataclass(slots=True)
class _Open:
    """A container under construction."""

    parts: dict[str | int, _Open | Node] = field(default_factory=dict)


def nested(leaves: Mapping[str, Node], paths: Mapping[str, Path], folder: str) -> DictNode:
    """The tree with these leaves; `paths` is empty where nothing was flattened.

    Raises: corrupt-file, limit-exceeded, duplicate-key.
    """
    molds = _molds(leaves.get(CONTAINERS), folder)
    root = _Open()
    for key in paths or leaves:
        if key not in (CONTAINERS, NOTE):
            _enter(root, paths.get(key, (key,)), leaves[key], folder)
    for path, mold in molds.items():
        if isinstance(mold, (DictNode, ListNode)) and path:
            _ensure(root, path, folder)
    tree = _closed(root, (), molds, len(leaves), folder)
    if not isinstance(tree, DictNode):
        raise _problem("corrupt-file", folder, (), "the entries are no dictionary")
    return tree


def _enter(root: _Open, path: Path, leaf: Node, folder: str) -> None:
    if len(path) > MAX_DEPTH:
        raise _problem(
            "limit-exceeded", folder, path[:3], f"a path of {len(path)} levels, {MAX_DEPTH} are read"
        )
    where = _ensure(root, path[:-1], folder)
    if path[-1] in where.parts:
        raise _problem("corrupt-file", folder, path, "two entries stand in one place")
    where.parts[path[-1]] = leaf


def _ensure(root: _Open, path: Path, folder: str) -> _Open:
    """The container at a path, made where there is none."""
    where = root
    for step in path:
        part = where.parts.setdefault(step, _Open())
        if not isinstance(part, _Open):
            raise _problem("corrupt-file", folder, path, "an entry stands where others have a container")
        where = part
    return where


def _closed(node: _Open, path: Path, molds: Mapping[Path, Node], count: int, folder: str) -> Node:
    """A finished container; `count`: entries of the folder, which no list is longer than."""
    parts: dict[str | int, Node] = {}
    for step, part in node.parts.items():
        below = (*path, step)
        if isinstance(part, _Open):
            parts[step] = _closed(part, below, molds, count, folder)
        else:
            parts[step] = _wrapped(part, molds.get(below)) if below in molds else part
    mold = molds.get(path)
    positions = [step for step in parts if isinstance(step, int)]
    if len(positions) == len(parts) and (positions or isinstance(mold, ListNode)):
        if max(positions, default=0) >= count + len(molds):
            raise _problem(
                "corrupt-file", folder, path, f"{count} entries cannot fill position {max(positions)}"
            )
        # torch fills gaps so too: containers with nothing in them leave no entry.
        items = tuple(parts.get(i) for i in range(max(positions, default=-1) + 1))
        return replace(mold, items=items) if isinstance(mold, ListNode) else ListNode(items=items)
    if positions:
        raise _problem("corrupt-file", folder, path, "names and positions stand in one container")
    if not isinstance(mold, DictNode):
        return DictNode(items=tuple(parts.items()))
    if not mold.items:
        return replace(mold, items=tuple(parts.items()))
    keys = {str(key): key for key, _ in mold.items}
    if set(keys) != set(parts):
        raise _problem(
            "corrupt-file", folder, path, f"its {len(parts)} entries are not those of its {len(keys)} keys"
        )
    return replace(mold, items=tuple((key, parts[text]) for text, key in keys.items()))


def _wrapped(leaf: Node, mold: Node) -> Node:
    """A tensor in the wrapping that it had."""
    if isinstance(leaf, TensorRef) and isinstance(mold, Opaque) and mold.kind in _WRAPPED and mold.args:
        return replace(mold, args=(leaf, *mold.args[1:]))
    return leaf


def _molds(node: Node, folder: str) -> dict[Path, Node]:
    if node is None:
        return {}
    molds: dict[Path, Node] = {}
    for pair in node.items if isinstance(node, ListNode) else (None,):
        match pair:
            case ListNode(items=(ListNode(items=steps), mold)) if all(type(s) in (str, int) for s in steps):
                molds[tuple(s for s in steps if isinstance(s, (str, int)))] = mold
            case _:
                raise _problem("corrupt-file", folder, (CONTAINERS,), "it is no list of paths and containers")
    return molds


# Writing


@dataclass(slots=True)
class Flat:
    """A tree as entries."""

    leaves: dict[str, Node] = field(default_factory=dict)
    paths: dict[str, Path] = field(default_factory=dict)
    molds: list[tuple[Path, Node]] = field(default_factory=list)


def flattened(root: Node, note: str | None, folder: str, *, entries: bool = False) -> Flat:
    """The entries of a tree, among them the molds and the note where there are any; `entries`: the tree's
    items are entries as they are, and have no paths.

    Raises: unsupported-feature for a tree that is no dictionary; duplicate-key for two entries of one key.
    """
    if not isinstance(root, DictNode):
        raise _problem("unsupported-feature", folder, (), "the tree is no dictionary")
    flat = Flat()
    found = (((str(key),), value) for key, value in root.items) if entries else _leaves(root, (), flat.molds)
    for path, leaf in found:
        key = ".".join(map(str, path))
        if key in flat.leaves or key in (CONTAINERS, NOTE):
            raise _problem("duplicate-key", folder, path, f"two entries have the key '{key}'")
        flat.leaves[key], flat.paths[key] = leaf, path
    if flat.molds:
        pairs = [ListNode(items=(ListNode(items=path), mold), kind="tuple") for path, mold in flat.molds]
        flat.leaves[CONTAINERS] = ListNode(items=tuple(pairs))
        flat.paths[CONTAINERS] = (CONTAINERS,)
    if note is not None:
        flat.leaves[NOTE], flat.paths[NOTE] = note, (NOTE,)
    return replace(flat, paths={}) if entries else flat


def _leaves(node: Node, path: Path, molds: list[tuple[Path, Node]]) -> Iterator[tuple[Path, Node]]:
    if isinstance(node, DictNode):
        plain = all(isinstance(key, str) and not _vanishes(value) for key, value in node.items)
        if node.kind != "dict" or node.state is not None or not plain or (path and not node.items):
            molds.append(
                (path, replace(node, items=() if plain else tuple((k, None) for k, _ in node.items)))
            )
        for key, value in node.items:
            yield from _leaves(value, (*path, str(key)), molds)
    elif isinstance(node, ListNode) and _is_taken_apart(node):
        for position, value in enumerate(node.items):
            yield from _leaves(value, (*path, position), molds)
    elif (
        isinstance(node, Opaque)
        and node.kind in _WRAPPED
        and node.args
        and isinstance(node.args[0], TensorRef)
    ):
        molds.append((path, replace(node, args=(None, *node.args[1:]))))
        yield path, node.args[0]
    else:
        yield path, node


def _vanishes(node: Node) -> bool:
    """Whether a container leaves no entry: nothing is in it, or nothing but such containers."""
    if isinstance(node, DictNode):
        return all(_vanishes(value) for _, value in node.items)
    return isinstance(node, ListNode) and _is_taken_apart(node) and all(map(_vanishes, node.items))


def _is_taken_apart(node: ListNode) -> bool:
    """Whether torch makes several entries of a list."""
    return node.kind == "list" and any(
        isinstance(item, (TensorRef, DictNode))
        or (isinstance(item, Opaque) and item.kind in _WRAPPED)
        or (isinstance(item, ListNode) and _is_taken_apart(item))
        for item in node.items
    )


def _problem(code: Code, folder: str, path: Path, message: str) -> FormatError:
    where = ".".join(map(str, path))
    hint = "Copy or save the folder again; nothing was written."
    error = FormatError.of(code, f"'{where}': {message} [{folder}]", hint, loc=path or (folder,))
    assert isinstance(error, FormatError)
    return error
