"""The state of the opcode machine of `pickle_reader`: stream, stack, marks, memo, and what it makes.

`Made` values are descriptions that later opcodes may still add to; nothing is imported or called.
Source: CPython 3.11 `Lib/pickle.py`, `Lib/_compat_pickle.py`.
"""

from __future__ import annotations

import _compat_pickle
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal

from ckptconv.errors import Code, FormatError
from ckptconv.rawtree import Node

MAX_INT_NBYTES: Final = 1 << 12


@dataclass(slots=True, eq=False)
class Made:
    """A container or call under construction: later opcodes add to it."""

    kind: Literal[
        "dict", "list", "tuple", "set", "frozenset", "call", "object", "apply", "global", "persistent"
    ]
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


Value = bool | int | float | str | bytes | Made | None


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


class Machine:
    """Stack, memo, position, and the persistent ids that were met."""

    __slots__ = ("at", "data", "identifiers", "marks", "memo", "name", "op_at", "protocol", "stack")

    def __init__(self, data: bytes, start: int, name: str) -> None:
        self.data, self.at, self.name = data, start, name
        self.op_at = start
        self.protocol = 0
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
        if not isinstance(target, Made) or target.kind in ("tuple", "frozenset", "global", "persistent"):
            what = target.kind if isinstance(target, Made) else type(target).__name__
            raise self.error("malformed-pickle", f"nothing can be added to a {what}")
        return target

    def global_(self, module: str, name: str) -> Made:
        if self.protocol < 3:
            if (module, name) in _compat_pickle.NAME_MAPPING:
                module, name = _compat_pickle.NAME_MAPPING[module, name]
            elif module in _compat_pickle.IMPORT_MAPPING:
                module = _compat_pickle.IMPORT_MAPPING[module]
        return Made("global", f"{module}{':' if '.' in name else '.'}{name}")

    def call(self, callee: Value, args: Value, kind: Literal["call", "object"]) -> Made:
        if not isinstance(args, Made) or args.kind != "tuple":
            raise self.error("malformed-pickle", "the arguments of a call are no tuple")
        if isinstance(callee, Made) and callee.kind == "global":
            return Made(kind, callee.name, tuple(args.items))
        return Made("apply", "", (callee, args))
