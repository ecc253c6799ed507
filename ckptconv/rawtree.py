"""What a format yields: nested containers whose kind is kept, lazy tensors, plain values, inert descriptions.

Nothing here knows what a key means. A tree is immutable; `transform` gives a changed copy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import chain, islice
from typing import TypeVar, cast

from ckptconv.tensor import TensorRef

T = TypeVar("T")

Scalar = None | bool | int | float | complex | str | bytes

_NAMES = frozenset({str, int})
"""Types of keys that are steps of a path."""
_SCANNED = 16
"""Dictionaries up to this length are searched, longer ones get an index."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DictNode:
    """A mapping in the file's order; keys may be of any kind and a key may stand twice."""

    items: tuple[tuple[Node, Node], ...] = ()
    kind: str = "dict"
    """`dict`, or the global that made it, e.g. `collections.OrderedDict`."""
    args: tuple[Node, ...] = ()
    """Constructor arguments other than the items (a defaultdict's factory)."""
    state: Node = None
    """Attributes set on the object itself (a state_dict's `_metadata`)."""
    _index: dict[Node, Node] | None = field(default=None, init=False, repr=False, compare=False)
    """Value by name, once a long dictionary was asked for one."""

    def get(self, key: Node) -> Node:
        """Value of a key, the last one where it stands twice; None where it does not stand."""
        if len(self.items) > _SCANNED and type(key) in _NAMES:
            return self._by_name().get(key)
        found: Node = None
        for name, value in self.items:
            if type(name) is type(key) and name == key:
                found = value
        return found

    def __contains__(self, key: Node) -> bool:
        if len(self.items) > _SCANNED and type(key) in _NAMES:
            return key in self._by_name()
        return any(type(name) is type(key) and name == key for name, _ in self.items)

    def _by_name(self) -> dict[Node, Node]:
        if self._index is None:
            index = {key: value for key, value in self.items if type(key) in _NAMES}
            object.__setattr__(self, "_index", index)
            return index
        return self._index

    @property
    def keys(self) -> tuple[Node, ...]:
        return tuple(name for name, _ in self.items)


@dataclass(frozen=True, slots=True, kw_only=True)
class ListNode:
    """A sequence or a set."""

    items: tuple[Node, ...] = ()
    kind: str = "list"
    """`list`, `tuple`, `set`, `frozenset`, `torch.Size`, or the global of a named tuple."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Opaque:
    """An object that is described, not built."""

    kind: str
    """What it is: `global` (a class or function, `name`), `call` (`name(*args)` and then `state`/`items`),
    `object` (an instance of `name`), or a decoded kind of its format such as `torch.parameter`."""
    name: str = ""
    """`module.qualname` of the global that is meant."""
    args: tuple[Node, ...] = ()
    state: Node = None
    items: tuple[Node, ...] = ()
    pairs: tuple[tuple[Node, Node], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Lifted:
    """Stands in a residue for a leaf that was lifted: where it went, and how it is written there."""

    to: tuple[str | int, ...]
    """Address in the document, see `ckptconv.document.Checkpoint.lookup`."""
    encoding: Mapping[str, str | int | float | bool | tuple[int, ...] | None] = field(default_factory=dict)
    """What the address alone does not tell, e.g. `{"as": "tensor", "dtype": "float32", "plus": 1}`."""


Container = DictNode | ListNode | Opaque
CONTAINERS = (DictNode, ListNode, Opaque)
Node = Scalar | TensorRef | Container | Lifted
Path = tuple[str | int, ...]
"""Keys from the root; positions in lists; `"@state"`, `"@args"`, `"@key"`, ... for parts that have no key."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RawTree:
    """One container as read, or as it is to be written."""

    format: str
    """Name of the format."""
    root: Node
    attributes: Mapping[str, Scalar | tuple[str, ...]] = field(default_factory=dict)
    """Facts of the container that are no content: archive name, pickle protocol, shards, header metadata."""
    note: str | None = None
    """The JSON text of the embedded note, if the container carries one."""
    location: str = ""
    """Where it was read from, for messages."""
    _known: dict[object, object] = field(default_factory=dict, init=False, repr=False, compare=False)

    def once(self, work: Callable[[RawTree], T]) -> T:
        """What `work` makes of the tree, which is done once: dialects in turn look for the same in it."""
        if work not in self._known:
            self._known[work] = work(self)
        return cast("T", self._known[work])


def is_tensor(node: Node) -> bool:
    return isinstance(node, TensorRef)


def containers(root: Node) -> Iterator[Container]:
    """The node and every container below it, an outer one before those in it."""
    todo = [root] if isinstance(root, CONTAINERS) else []
    while todo:
        node = todo.pop()
        yield node
        todo += [part for part in _parts(node) if isinstance(part, CONTAINERS)]


def _parts(node: Container) -> Iterator[Node]:
    """Everything right below a container, keys too."""
    if isinstance(node, ListNode):
        return iter(node.items)
    if isinstance(node, DictNode):
        return chain(chain.from_iterable(node.items), node.args, (node.state,))
    return chain(node.args, (node.state,), node.items, chain.from_iterable(node.pairs))


def children(node: Node) -> Iterator[tuple[str | int, Node]]:
    """The parts of a node with the path step that leads to each."""
    if isinstance(node, DictNode):
        for position, (key, value) in enumerate(node.items):
            if type(key) is str or type(key) is int:
                yield key, value
            else:
                yield f"@key{position}", key
                yield f"@value{position}", value
        for i, arg in enumerate(node.args):
            yield f"@args{i}", arg
        if node.state is not None:
            yield "@state", node.state
    elif isinstance(node, ListNode):
        yield from enumerate(node.items)
    elif isinstance(node, Opaque):
        for i, arg in enumerate(node.args):
            yield f"@args{i}", arg
        if node.state is not None:
            yield "@state", node.state
        for i, item in enumerate(node.items):
            yield f"@item{i}", item
        for i, (key, value) in enumerate(node.pairs):
            yield f"@key{i}", key
            yield f"@value{i}", value


def walk(node: Node, path: Path = ()) -> Iterator[tuple[Path, Node]]:
    """Every leaf (tensor, scalar, empty container, global) with its path, in the file's order."""
    leaf = True
    for step, part in children(node):
        leaf = False
        if isinstance(part, CONTAINERS):
            yield from walk(part, (*path, step))
        else:
            yield (*path, step), part
    if leaf:
        yield path, node


def at(node: Node, path: Path) -> Node:
    """The node at a path; KeyError where there is none."""
    for step in path:
        for name, part in children(node):
            if type(name) is type(step) and name == step:
                node = part
                break
        else:
            raise KeyError(path)
    return node


def transform(node: Node, leaf: Callable[[Path, Node], Node], path: Path = ()) -> Node:
    """A copy in which `leaf(path, node)` replaces each node that it answers with another one.

    It is asked for every node, containers first; what it replaces is not descended into. A container in which
    nothing was replaced is itself.
    """
    changed = leaf(path, node)
    if changed is not node or not isinstance(node, CONTAINERS):
        return changed
    parts: list[Node] = []
    same = True
    for step, part in children(node):
        where = (*path, step)
        other = transform(part, leaf, where) if isinstance(part, CONTAINERS) else leaf(where, part)
        same = same and other is part
        parts.append(other)
    return node if same else _with_parts(node, iter(parts))


def _with_parts(node: Container, parts: Iterator[Node]) -> Container:
    """The container with other parts, in the order of `children`."""
    if isinstance(node, ListNode):
        return ListNode(items=tuple(parts), kind=node.kind)
    if isinstance(node, DictNode):
        items = [(k if type(k) in _NAMES else next(parts), next(parts)) for k, _ in node.items]
        return DictNode(
            items=tuple(items),
            kind=node.kind,
            args=_as_many(parts, node.args),
            state=None if node.state is None else next(parts),
        )
    return Opaque(
        kind=node.kind,
        name=node.name,
        args=_as_many(parts, node.args),
        state=None if node.state is None else next(parts),
        items=_as_many(parts, node.items),
        pairs=tuple([(next(parts), next(parts)) for _ in node.pairs]),
    )


def _as_many(parts: Iterator[Node], old: tuple[Node, ...]) -> tuple[Node, ...]:
    return tuple(islice(parts, len(old)))


def dict_of(items: Mapping[str, Node] | list[tuple[Node, Node]], kind: str = "dict") -> DictNode:
    """A DictNode from a mapping or pairs."""
    pairs = list(items.items()) if isinstance(items, Mapping) else items
    return DictNode(items=tuple(pairs), kind=kind)
