"""Writes a tree as a pickle of protocol 2, within the opcodes that `torch.load(weights_only=True)` accepts.

Byte layout: PROTO 2, the value, STOP. Text and containers go into the memo as they are written, so that
text that stands twice and a node that is the same object twice are written once. Opcodes used: PROTO STOP
GLOBAL REDUCE NEWOBJ BUILD BINPERSID MARK APPENDS SETITEMS EMPTY_LIST EMPTY_DICT EMPTY_TUPLE TUPLE TUPLE1-3
NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1 BINFLOAT BINUNICODE BINGET LONG_BINGET BINPUT LONG_BINPUT.

What the writer itself knows are the nodes of `pickle_reader` before decoding; for everything else it asks
`encode`, the inverse of the reader's `decode`. It collects the globals that it names: whoever publishes the
pickle decides whether they are harmless. Globals are written under Python 2's names, as protocol 2 has them.

Refused: trees deeper than the reader reads, numbers beyond LONG1 (255 bytes), cycles.
Source: CPython 3.11 `Lib/pickle.py`; torch 2.13 `torch/_weights_only_unpickler.py`.
"""

from __future__ import annotations

import _compat_pickle
import struct
from collections.abc import Callable, Sequence

from ckptconv.errors import Code, FormatError
from ckptconv.formats.pickle_reader import MAX_DEPTH
from ckptconv.rawtree import DictNode, Lifted, ListNode, Node, Opaque
from ckptconv.tensor import TensorRef

_BATCH = 1000
"""Items between a MARK and its SETITEMS or APPENDS, as in Python's pickle."""

_ENCODED_DEPTH = 32
"""Levels that the encoding of nodes may add to those of the tree."""

Encode = Callable[[Node], Node]
"""A node that the writer does not know, as calls, globals, lists and dicts."""


def pickle_tree(root: Node, encode: Encode) -> tuple[bytes, frozenset[str]]:
    """The pickle, and the globals that it names (`module.qualname`).

    Raises: limit-exceeded, unsupported-feature, reference-broken, and what `encode` raises.
    """
    writer = _Writer(encode)
    writer.out += b"\x80\x02"
    writer.value(root, 0)
    writer.out += b"."
    return bytes(writer.out), frozenset(writer.globals)


def _error(code: Code, message: str, hint: str) -> FormatError:
    error = FormatError.of(code, message, hint)
    assert isinstance(error, FormatError)
    return error


class _Writer:
    """Output and memo."""

    __slots__ = ("_encode", "_kept", "_memo", "_open", "globals", "out")

    def __init__(self, encode: Encode) -> None:
        self.out = bytearray()
        self.globals: set[str] = set()
        self._encode = encode
        self._memo: dict[str | int | tuple[str, str], int] = {}
        self._kept: list[Node] = []
        self._open: set[int] = set()

    def value(self, node: Node, depth: int) -> None:
        """Write any node."""
        if node is None or isinstance(node, (bool, int, float, str)):
            self._scalar(node)
            return
        if depth > MAX_DEPTH + _ENCODED_DEPTH:
            raise _error(
                "limit-exceeded", f"the tree is deeper than {MAX_DEPTH} levels", "Flatten it before writing."
            )
        if self._recall(id(node)):
            return
        if id(node) in self._open:
            raise _error("unsupported-feature", "a container holds itself", "Remove the reference first.")
        self._open.add(id(node))
        self._compound(node, depth)
        self._open.discard(id(node))
        # Globals are remembered by name; the empty tuple is a constant, as in Python.
        named = isinstance(node, Opaque) and node.kind in ("global", "persistent")
        empty = isinstance(node, ListNode) and node.kind == "tuple" and not node.items
        if not named and not empty:
            self._keep(node)

    def _compound(self, node: Node, depth: int) -> None:
        match node:
            case DictNode(kind="dict") if node.state is None and not node.args:
                self.out += b"}"
                self._keep(node)
                self._pairs(node.items, depth)
            case ListNode(kind="list"):
                self.out += b"]"
                self._keep(node)
                self._items(node.items, depth)
            case ListNode(kind="tuple"):
                self._tuple(node.items, depth)
            case Opaque(kind="global"):
                self._global(node.name)
            case Opaque(kind="persistent"):
                self.value(node.args[0], depth + 1)
                self.out += b"Q"
            case Opaque(kind="call" | "object"):
                self._global(node.name)
                self._tuple(node.args, depth)
                self.out += b"R" if node.kind == "call" else b"\x81"
                self._additions(node, depth)
            case Opaque(kind="apply"):
                self.value(node.args[0], depth + 1)
                self.value(node.args[1], depth + 1)
                self.out += b"R"
                self._additions(node, depth)
            case Opaque(kind="cycle"):
                raise _error(
                    "unsupported-feature",
                    f"a {node.name} holds itself, which is not written",
                    "Convert to a format without pickled objects, or save only the state dicts.",
                )
            case Lifted():
                raise _error(
                    "reference-broken",
                    f"the place of {'.'.join(map(str, node.to))} was not filled",
                    "Fill the residue from its document before writing.",
                )
            case TensorRef() | _:
                encoded = self._encode(node)
                if encoded is node:
                    raise _error(
                        "unsupported-feature", f"{node!r:.80} has no pickle", "Leave it out of the target."
                    )
                self._kept.append(encoded)
                self._compound(encoded, depth)

    def _additions(self, node: Opaque, depth: int) -> None:
        """What is set on an object after it was made; the object is in the memo by then."""
        if node.items or node.pairs or node.state is not None:
            self._keep(node)
        if node.items:
            self._items(node.items, depth)
        if node.pairs:
            self._pairs(node.pairs, depth)
        if node.state is not None:
            self.value(node.state, depth + 1)
            self.out += b"b"

    def _scalar(self, value: bool | int | float | str | None) -> None:
        if value is None:
            self.out += b"N"
        elif isinstance(value, bool):
            self.out += b"\x88" if value else b"\x89"
        elif isinstance(value, int):
            self._int(value)
        elif isinstance(value, float):
            self.out += b"G" + struct.pack(">d", value)
        elif not self._recall(value):
            raw = value.encode("utf-8", "surrogatepass")
            if len(raw) >> 32:
                raise _error(
                    "limit-exceeded", f"text of {len(raw)} bytes, below 2**32 is possible", "Shorten it."
                )
            self.out += b"X" + struct.pack("<I", len(raw)) + raw
            self._remember(value)

    def _int(self, value: int) -> None:
        if 0 <= value < 1 << 8:
            self.out += b"K" + struct.pack("<B", value)
        elif 0 <= value < 1 << 16:
            self.out += b"M" + struct.pack("<H", value)
        elif -(1 << 31) <= value < 1 << 31:
            self.out += b"J" + struct.pack("<i", value)
        else:
            nbytes = value.bit_length() // 8 + 1
            if nbytes > 255:
                raise _error(
                    "limit-exceeded",
                    f"a number of {nbytes} bytes, at most 255 are written",
                    "Store it as text.",
                )
            self.out += b"\x8a" + struct.pack("<B", nbytes) + value.to_bytes(nbytes, "little", signed=True)

    def _tuple(self, items: Sequence[Node], depth: int) -> None:
        if len(items) > 3:
            self.out += b"("
        for item in items:
            self.value(item, depth + 1)
        self.out += (b")", b"\x85", b"\x86", b"\x87")[len(items)] if len(items) <= 3 else b"t"

    def _items(self, items: Sequence[Node], depth: int) -> None:
        for start in range(0, len(items), _BATCH):
            self.out += b"("
            for item in items[start : start + _BATCH]:
                self.value(item, depth + 1)
            self.out += b"e"

    def _pairs(self, pairs: Sequence[tuple[Node, Node]], depth: int) -> None:
        for start in range(0, len(pairs), _BATCH):
            self.out += b"("
            for key, value in pairs[start : start + _BATCH]:
                self.value(key, depth + 1)
                self.value(value, depth + 1)
            self.out += b"u"

    def _global(self, name: str) -> None:
        self.globals.add(name)
        module, mark, qualname = name.partition(":")
        if mark:
            # Protocol 2 reaches a nested name by getattr, as Python's pickle does.
            *outer, last = qualname.split(".")
            self._global("builtins.getattr")
            self._global(f"{module}{':' if len(outer) > 1 else '.'}{'.'.join(outer)}")
            self._scalar(last)
            self.out += b"\x86R"
            return
        module, _, qualname = name.rpartition(".")
        if not module or "\n" in name:
            raise _error(
                "unsupported-feature", f"{name!r} is no name of a global", "Leave it out of the target."
            )
        key = (module, qualname)
        if self._recall(key):
            return
        if key in _compat_pickle.REVERSE_NAME_MAPPING:
            module, qualname = _compat_pickle.REVERSE_NAME_MAPPING[key]
        elif module in _compat_pickle.REVERSE_IMPORT_MAPPING:
            module = _compat_pickle.REVERSE_IMPORT_MAPPING[module]
        self.out += f"c{module}\n{qualname}\n".encode()
        self._remember(key)

    def _keep(self, node: Node) -> None:
        """Enter a node into the memo, once; it must live on, since its id is the key."""
        if id(node) not in self._memo:
            self._remember(id(node))
            self._kept.append(node)

    def _remember(self, key: str | int | tuple[str, str]) -> None:
        position = self._memo[key] = len(self._memo)
        self.out += (
            b"q" + struct.pack("<B", position) if position < 256 else b"r" + struct.pack("<I", position)
        )

    def _recall(self, key: str | int | tuple[str, str]) -> bool:
        position = self._memo.get(key)
        if position is None:
            return False
        self.out += (
            b"h" + struct.pack("<B", position) if position < 256 else b"j" + struct.pack("<I", position)
        )
        return True
