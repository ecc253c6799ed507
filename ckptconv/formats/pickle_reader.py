"""An opcode machine for pickles that builds descriptions and runs nothing.

Byte layout: a stream of opcodes, each one byte and its argument; numbers little-endian but for BINFLOAT;
protocols 0 to 5 of Python 2 and 3. Every opcode is read but NEXT_BUFFER (the buffers are elsewhere) and
EXT1..4 (the registry is elsewhere), which are `unsupported-feature`.

What comes out, before `decode` is asked:

| in the pickle | node |
|---|---|
| None, bool, int, float, str, bytes | itself |
| dict, list, tuple, set, frozenset | `DictNode`, `ListNode(kind=...)` |
| a global | `Opaque(kind="global", name="module.qualname")`, `"module:Outer.Inner"` for a nested one |
| REDUCE | `Opaque(kind="call", name=callee, args=...)` |
| REDUCE of what is no global | `Opaque(kind="apply", args=(callee, tuple))` |
| NEWOBJ, OBJ, INST | `Opaque(kind="object", name=class, args=...)` |
| NEWOBJ_EX | `Opaque(kind="call", name="copyreg.__newobj_ex__", args=(class, args, kwargs))` |
| BUILD, APPEND(S)/ADDITEMS, SETITEM(S) on those | `state`, `items`, `pairs` |
| bytearray (protocol 5) | `Opaque(kind="call", name="builtins.bytearray", args=(bytes,))` |
| PERSID, BINPERSID | `Opaque(kind="persistent", args=(id,))` |
| a container inside itself | `Opaque(kind="cycle", name=kind of the container)` where it closes |

An object that the pickle refers to twice is the same node twice. Names are Python 3's, also where the pickle
has Python 2's (`__builtin__`, `copy_reg`). A Python 2 `str` is text where it is UTF-8, else bytes.

Refused: lengths beyond the bytes that are there, unknown memo keys, stack underflow, items for what is no
container, nesting deeper than `MAX_DEPTH`, descriptions that grow beyond a multiple of the pickle by
references to references.

Source: CPython 3.11 `Lib/pickletools.py`, `Lib/pickle.py`, `Lib/_compat_pickle.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Final

from ckptconv.formats.pickle_machine import (
    AtOnce,
    Machine,
    Made,
    SkippedError,
    Value,
    error,
    parts_of,
)
from ckptconv.formats.pickle_run import run
from ckptconv.rawtree import DictNode, ListNode, Node, Opaque

MAX_DEPTH: Final = 200
"""Nested containers and calls; what walks a tree recurses once or twice per level."""
_GROWTH: Final = 16
_GROWTH_FLOOR: Final = 100_000
"""A tree may have this many nodes, or `_GROWTH` times the pickle's bytes."""

Decode = Callable[[Opaque], Node]
"""Asked once for each `Opaque` but globals, when its parts are final; answers what stands in the tree."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Unpickled:
    """One pickle as read."""

    root: Node
    protocol: int
    end: int
    """Offset behind the STOP."""


def unpickle(
    data: bytes, *, decode: Decode, name: str, start: int = 0, at_once: AtOnce | None = None
) -> Unpickled:
    """Read the pickle at `start`. What `at_once` knows is not asked of `decode`.

    Raises: malformed-pickle, truncated-file, limit-exceeded, unsupported-feature, and what `decode` raises.
    """
    parsed = parse(data, name=name, start=start, at_once=at_once)
    return Unpickled(root=parsed.root(decode), protocol=parsed.protocol, end=parsed.end)


def parse(data: bytes, *, name: str, start: int = 0, at_once: AtOnce | None = None) -> Parsed:
    """Run the opcodes at `start`; the nodes are made when they are asked for.

    Raises: malformed-pickle, truncated-file, limit-exceeded, unsupported-feature.
    """
    machine = Machine(data, start, name, at_once)
    try:
        made = run(machine)
    except SkippedError:
        assert at_once is not None
        machine = Machine(data, start, name, replace(at_once, idiom=None))
        made = run(machine)
    machine.memo.clear()  # it would keep every value that becomes a node
    return Parsed(machine, made)


class Parsed:
    """A pickle whose opcodes were run: where it ends is known before its persistent ids mean anything."""

    __slots__ = ("_identifiers", "_limit", "_made", "_name", "end", "protocol")

    def __init__(self, machine: Machine, made: Value) -> None:
        self._made, self._name, self._identifiers = made, machine.name, machine.identifiers
        self._limit = max(_GROWTH_FLOOR, _GROWTH * len(machine.data))
        self.protocol, self.end = machine.protocol, machine.at

    def identifiers(self) -> Iterator[Node]:
        """What the persistent ids are, in order; nothing in them is decoded."""
        freezer = _Freezer(lambda node: node, self._name, self._limit)
        for identifier in self._identifiers:
            yield freezer.freeze(identifier)

    def root(self, decode: Decode) -> Node:
        """The object's node. Raises: limit-exceeded, and what `decode` raises."""
        return _Freezer(decode, self._name, self._limit).freeze(self._made)


class _Freezer:
    """Turns what the machine made into nodes: parts first, each once, with depth and growth limited."""

    __slots__ = ("_decode", "_limit", "_name")

    def __init__(self, decode: Decode, name: str, limit: int) -> None:
        self._decode, self._name, self._limit = decode, name, limit

    def freeze(self, root: Value) -> Node:
        """The root's node. An explicit stack: the pickle's depth is not ours."""
        todo: list[Value] = [root]
        while todo:
            value = todo[-1]
            if type(value) is not Made or value.depth > 0:
                todo.pop()
                continue
            parts = parts_of(value)
            if value.depth == 0:
                value.depth = -1
                waiting = [part for part in parts if type(part) is Made and not part.depth]
                if waiting:
                    todo += waiting[::-1]
                    continue
            todo.pop()
            depth, value.size = self._measure(parts)
            # Open until here: what it refers to itself by is a cycle.
            value.finish(self._node(value), depth)
        return _node_of(root)

    def _measure(self, parts: Sequence[Value]) -> tuple[int, int]:
        """Levels and nodes from here down."""
        depth, size = 0, 1 + len(parts)
        for part in parts:
            if type(part) is Made:
                size += part.size
                if part.depth > depth:
                    depth = part.depth
            elif type(part) is ListNode:
                size += len(part.items)
                depth = depth or 1
        if depth >= MAX_DEPTH:
            raise error("limit-exceeded", self._name, f"nested deeper than {MAX_DEPTH} levels")
        if size > self._limit:
            raise error("limit-exceeded", self._name, f"references make more than {self._limit} values")
        return depth + 1, size

    def _node(self, value: Made) -> Node:
        if value.kind == "dict":
            return DictNode(items=_pairs_of(value))
        if value.kind in ("list", "tuple", "set", "frozenset"):
            return ListNode(items=_nodes_of(value.items), kind=value.kind)
        return self._decode(
            Opaque(
                kind=value.kind,
                name=value.name,
                args=_nodes_of(value.args),
                state=_node_of(value.state),
                items=_nodes_of(value.items) if value.items else (),
                pairs=_pairs_of(value) if value.pairs else (),
            )
        )


def _nodes_of(values: Sequence[Value]) -> tuple[Node, ...]:
    return tuple([_node_of(value) for value in values])


def _pairs_of(value: Made) -> tuple[tuple[Node, Node], ...]:
    return tuple([(_node_of(key), _node_of(item)) for key, item in value.pairs])


def _node_of(value: Value) -> Node:
    """The node of a finished value; the mark of a cycle for one that is still open."""
    if not isinstance(value, Made):  # also narrows; `type() is` would not
        return value
    return value.node if value.depth > 0 else Opaque(kind="cycle", name=value.name or value.kind)
