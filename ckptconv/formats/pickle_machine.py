"""The state of the opcode machine of `pickle_reader`: stream, stack, marks, memo, and what it makes.

`Made` values are descriptions that later opcodes may still add to; what nothing can be added to and needs no
look at its parts, a global or a tuple of plain values, is a node at once. Nothing is imported or called.
Source: CPython 3.11 `Lib/pickle.py`, `Lib/_compat_pickle.py`.
"""

from __future__ import annotations

import _compat_pickle
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal, cast

from ckptconv.errors import Code, FormatError
from ckptconv.rawtree import DictNode, ListNode, Node, Opaque

MAX_INT_NBYTES: Final = 1 << 12

_MAPPING: Final = "collections.OrderedDict"
_EMPTY_MAPPING: Final = DictNode(kind=_MAPPING)


@dataclass(slots=True, eq=False)
class Made:
    """A container or call under construction: later opcodes add to it."""

    kind: Literal["dict", "list", "tuple", "set", "frozenset", "call", "object", "apply", "persistent"]
    name: str = ""
    args: tuple[Value, ...] = ()
    # Lists are made when the first part arrives: most values of a hostile pickle are empty.
    items: list[Value] | tuple[()] = ()
    pairs: list[tuple[Value, Value]] | tuple[()] = ()
    state: Value = None
    node: Node = None
    """What it became, once `depth` is positive."""
    depth: int = 0
    """0: not visited, -1: its parts are being visited, else levels from here down."""
    size: int = 0
    """Nodes from here down, repeated ones counted each time."""
    sealed: bool = False
    """Whether it was used as it is, empty, so that nothing may be added any more."""

    def extend(self, values: list[Value]) -> None:
        """Add items."""
        if isinstance(self.items, list):
            self.items.extend(values)
        elif values:
            self.items = list(values)

    def update(self, pairs: list[tuple[Value, Value]]) -> None:
        """Add pairs."""
        if isinstance(self.pairs, list):
            self.pairs.extend(pairs)
        elif pairs:
            self.pairs = list(pairs)

    def finish(self, node: Node, depth: int) -> None:
        """Become a node; what it was made of is given up."""
        self.node, self.depth = node, depth
        self.args = self.items = self.pairs = ()
        self.state = None


Value = Node | Made

Idiom = Callable[["Machine", int], int]
"""Runs the opcodes at a position as one, where it knows them, and answers where they end; else changes
nothing and answers the position. What it leaves, or raises, is what they would have one by one."""

PLAIN: Final = frozenset({type(None), bool, int, float, str, bytes, Opaque})
"""Types of which a tuple is a node at once; an `Opaque` on the stack is a global or a decoded id."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AtOnce:
    """What is decoded while the opcodes run, because nothing is ever added to it: a pickle's bulk."""

    persistent: Callable[[ListNode], Node]
    """What a persistent id of plain values stands for."""
    calls: Mapping[str, Callable[[Sequence[Node]], Node]]
    """By the callee's name: the result from arguments that are nodes already."""
    idiom: Idiom | None = None
    """Tried where two marks follow on a value."""


def tuple_of(values: list[Value]) -> Value:
    """A tuple of what was on the stack."""
    for value in values:
        if type(value) not in PLAIN:
            return Made("tuple", items=values)
    return ListNode(items=tuple(cast("list[Node]", values)), kind="tuple")


def nodes_of(values: Sequence[Value]) -> list[Node] | None:
    """Arguments as nodes, where each is one or an empty mapping, which is sealed; else None."""
    nodes: list[Node] = []
    for value in values:
        if type(value) is not Made:
            nodes.append(cast("Node", value))
        elif value.name == _MAPPING and not (value.args or value.items or value.pairs or value.state):
            value.sealed = True
            nodes.append(_EMPTY_MAPPING)
        else:
            return None
    return nodes


def parts_of(value: Made) -> Sequence[Value]:
    """Everything below a value, in the pickle's order."""
    if not value.args and not value.pairs and value.state is None:
        return value.items
    parts = [*value.args, *value.items]
    for pair in value.pairs:
        parts += pair
    if value.state is not None:
        parts.append(value.state)
    return parts


def error(code: Code, name: str, message: str) -> FormatError:
    error = FormatError.of(
        code,
        f"{message} [{name}]",
        "Save the file again with its producer; nothing in it was run.",
        loc=(name,),
    )
    assert isinstance(error, FormatError)
    return error


class SkippedError(Exception):
    """The pickle uses what an idiom may have left out of the memo: it is to be run again without idioms."""


class Machine:
    """Stack, memo, position, and the persistent ids that were met."""

    __slots__ = (
        "at",
        "at_once",
        "data",
        "identifiers",
        "marks",
        "memo",
        "name",
        "op_at",
        "protocol",
        "skipped",
        "stack",
    )

    def __init__(self, data: bytes, start: int, name: str, at_once: AtOnce | None = None) -> None:
        self.data, self.at, self.name, self.at_once = data, start, name, at_once
        self.op_at = start
        self.protocol = 0
        self.skipped = False  # whether an idiom left out of the memo what nobody is expected to get
        self.stack: list[Value] = []
        self.marks: list[int] = []
        self.memo: dict[int, Value] = {}
        self.identifiers: list[Value] = []

    def error(self, code: Code, message: str) -> FormatError:
        return error(code, self.name, f"{message} (opcode at {self.op_at})")

    def take(self, nbytes: int) -> bytes:
        """The next bytes of the stream."""
        stop = self.at + nbytes
        if stop > len(self.data):
            raise self.error(
                "truncated-file",
                f"{nbytes} bytes are needed at {self.at}, the pickle ends at {len(self.data)}",
            )
        piece = self.data[self.at : stop]
        self.at = stop
        return piece

    def byte(self) -> int:
        """The next byte of the stream as a number."""
        at = self.at
        if at >= len(self.data):
            self.take(1)
        self.at = at + 1
        return self.data[at]

    def number(self, nbytes: int) -> int:
        """An unsigned little-endian number."""
        stop = self.at + nbytes
        if stop > len(self.data):
            self.take(nbytes)
        value = int.from_bytes(self.data[self.at : stop], "little")
        self.at = stop
        return value

    def line(self) -> bytes:
        """The bytes up to the next newline."""
        stop = self.data.find(b"\n", self.at)
        if stop < 0:
            raise self.error("truncated-file", f"the line at {self.at} has no end")
        piece = self.data[self.at : stop]
        self.at = stop + 1
        return piece

    def text(self, raw: bytes) -> str:
        try:
            return raw.decode("utf-8", "surrogatepass")
        except UnicodeDecodeError:
            raise self.error("malformed-pickle", f"text that is not UTF-8: {raw[:40]!r}") from None

    def decimal(self, raw: bytes) -> int:
        digits = raw.strip()
        if len(digits) > MAX_INT_NBYTES:
            raise self.error(
                "limit-exceeded", f"a number of {len(digits)} digits, at most {MAX_INT_NBYTES} are read"
            )
        try:
            return int(digits)
        except ValueError:
            raise self.error("malformed-pickle", f"{raw[:40]!r} is no number") from None

    def pop(self) -> Value:
        if len(self.stack) <= (self.marks[-1] if self.marks else 0):
            raise self.error("malformed-pickle", "the stack is empty")
        return self.stack.pop()

    def top(self) -> Value:
        if len(self.stack) <= (self.marks[-1] if self.marks else 0):
            raise self.error("malformed-pickle", "the stack is empty")
        return self.stack[-1]

    def pop_to_mark(self) -> list[Value]:
        if not self.marks:
            raise self.error("malformed-pickle", "there is no mark on the stack")
        mark = self.marks.pop()
        values = self.stack[mark:]
        del self.stack[mark:]
        return values

    def container(self) -> Made:
        """The object on top of the stack, which the next opcode adds to."""
        target = self.top()
        if not isinstance(target, Made) or target.kind in ("tuple", "frozenset", "persistent"):
            what = target.kind if isinstance(target, Made | ListNode | Opaque) else type(target).__name__
            raise self.error("malformed-pickle", f"nothing can be added to a {what}")
        if target.sealed:
            raise self.error("malformed-pickle", f"a {target.name} is added to after it was used")
        return target

    def global_(self, module: str, name: str) -> Opaque:
        if self.protocol < 3:
            if (module, name) in _compat_pickle.NAME_MAPPING:
                module, name = _compat_pickle.NAME_MAPPING[module, name]
            elif module in _compat_pickle.IMPORT_MAPPING:
                module = _compat_pickle.IMPORT_MAPPING[module]
        return Opaque(kind="global", name=f"{module}{':' if '.' in name else '.'}{name}")

    def call(self, callee: Value, args: Value, kind: Literal["call", "object"]) -> Value:
        if not isinstance(args, Made | ListNode) or args.kind != "tuple":
            raise self.error("malformed-pickle", "the arguments of a call are no tuple")
        if type(callee) is not Opaque or callee.kind != "global":
            return Made("apply", "", (callee, args))
        if self.at_once is not None and kind == "call":
            make = self.at_once.calls.get(callee.name)
            if make is not None and (nodes := nodes_of(args.items)) is not None:
                return make(nodes)
        return Made(kind, callee.name, tuple(args.items))

    def persistent(self, identifier: Value) -> Value:
        if self.at_once is not None and type(identifier) is ListNode:
            return self.at_once.persistent(identifier)
        self.identifiers.append(identifier)
        return Made("persistent", args=(identifier,))
