"""A residue as bytes: the tree without its tensors, exact to the last bit.

Layout: a sequence of msgpack objects: the number of those that follow, then the tree in postfix order. Plain
objects (nil, bool, int, float64, str, bin) are values; extension objects are built from those before them:

    code  payload                      makes
    1     big-endian two's complement  an int beyond 64 bits
    2     two float64, big-endian      a complex
    3     UTF-8 with surrogates        a str that is not Unicode
    16    [items, args]                DictNode of kind, key and value per item, args, state
    17    [items]                      ListNode of kind, items
    18    [args, items, pairs]         Opaque of kind, name, args, items, key and value per pair, state
    19    [to, encoding]               Lifted of address parts, key and value per encoding

Payloads of 16 to 19 are msgpack arrays of counts. Postfix order needs no nesting, so neither side recurses
and no depth is too deep. Arrays, maps and other extensions are refused; so are tensors, which are never in a
residue. Producer: this file, for neutral checkpoints 1.0.0.
"""

from __future__ import annotations

import struct
from collections.abc import Callable

import msgpack

from ckptconv.errors import FormatError
from ckptconv.rawtree import DictNode, Lifted, ListNode, Node, Opaque, Scalar

_BIG_INT, _COMPLEX, _ODD_STR = 1, 2, 3
_DICT, _LIST, _OPAQUE, _LIFTED = 16, 17, 18, 19
_COUNTS = {_DICT: 2, _LIST: 1, _OPAQUE: 3, _LIFTED: 2}
_HINT = "The state file is damaged: copy it again, or write the checkpoint again from its source."
_INT64_MIN, _UINT64_MAX = -(1 << 63), (1 << 64) - 1


class _Build:
    """Pending step of the encoder: everything below is written, now the operation."""

    __slots__ = ("code", "counts")

    def __init__(self, code: int, *counts: int) -> None:
        self.code = code
        self.counts = counts


def pack(node: Node) -> bytes:
    """The tree as bytes.

    Raises: unsupported-feature for a tensor.
    """
    packer = msgpack.Packer()
    out, count = bytearray(), 0
    pending: list[Node | _Build] = [node]
    while pending:
        current = pending.pop()
        if isinstance(current, _Build):
            count += 1
            out += packer.pack(msgpack.ExtType(current.code, msgpack.packb(current.counts)))
            continue
        parts = _parts(current)
        if parts is None:
            assert current is None or isinstance(current, (bool, int, float, complex, str, bytes))
            out += packer.pack(_leaf(current))
            count += 1
            continue
        build, children = parts
        pending.append(build)
        pending.extend(reversed(children))
    head: bytes = packer.pack(count)
    return head + out


def _parts(node: Node) -> tuple[_Build, list[Node]] | None:
    """The operation that makes a container and its operands in order; None for a leaf."""
    if isinstance(node, DictNode):
        flat = [part for item in node.items for part in item]
        return _Build(_DICT, len(node.items), len(node.args)), [node.kind, *flat, *node.args, node.state]
    if isinstance(node, ListNode):
        return _Build(_LIST, len(node.items)), [node.kind, *node.items]
    if isinstance(node, Opaque):
        pairs = [part for pair in node.pairs for part in pair]
        build = _Build(_OPAQUE, len(node.args), len(node.items), len(node.pairs))
        return build, [node.kind, node.name, *node.args, *node.items, *pairs, node.state]
    if isinstance(node, Lifted):
        encoding: list[Node] = []
        for key, value in node.encoding.items():
            encoding += [key, ListNode(items=value, kind="tuple") if isinstance(value, tuple) else value]
        return _Build(_LIFTED, len(node.to), len(node.encoding)), [*node.to, *encoding]
    if node is None or isinstance(node, (bool, int, float, complex, str, bytes)):
        return None
    raise FormatError.of(
        "unsupported-feature",
        f"a {type(node).__name__} cannot stand in a residue",
        "The dialect must lift every tensor; this is a fault of ckptconv, please report it.",
    )


def _leaf(value: Scalar) -> object:
    if isinstance(value, bool) or value is None:
        return value
    if isinstance(value, int) and not _INT64_MIN <= value <= _UINT64_MAX:
        return msgpack.ExtType(_BIG_INT, value.to_bytes(value.bit_length() // 8 + 1, "big", signed=True))
    if isinstance(value, complex):
        return msgpack.ExtType(_COMPLEX, struct.pack(">dd", value.real, value.imag))
    if isinstance(value, str):
        try:
            value.encode("utf-8")
        except UnicodeEncodeError:
            return msgpack.ExtType(_ODD_STR, value.encode("utf-8", "surrogatepass"))
    return value


def unpack(data: bytes, name: str) -> Node:
    """The tree that `pack` made into `data`; `name` is the file's, for messages.

    Raises: corrupt-file, truncated-file.
    """
    unpacker = msgpack.Unpacker(
        raw=False, strict_map_key=False, max_buffer_size=max(len(data), 1), max_array_len=0, max_map_len=0
    )
    unpacker.feed(data)
    stack: list[Node] = []
    count = 0
    try:
        for item in unpacker:
            count += 1
            if isinstance(item, msgpack.ExtType):
                _apply(item.code, item.data, stack)
            elif item is None or isinstance(item, (bool, int, float, str, bytes)):
                stack.append(item)
            else:
                raise ValueError(f"a msgpack {type(item).__name__} is not expected")
    except (ValueError, TypeError, struct.error, msgpack.exceptions.UnpackException) as error:
        raise _corrupt(name, f"not a residue: {str(error)[:200]}") from None
    if unpacker.tell() != len(data):
        raise FormatError.of(
            "truncated-file",
            f"the object at byte {unpacker.tell()} needs more than the {len(data)} bytes there are [{name}]",
            _HINT,
            loc=(name,),
        )
    if len(stack) != 2 or stack[0] != count - 1:
        raise _corrupt(name, f"expected one tree of {stack[:1]} objects, got {len(stack) - 1} of {count - 1}")
    return stack[1]


def _corrupt(name: str, message: str) -> FormatError:
    error = FormatError.of("corrupt-file", f"{message} [{name}]", _HINT, loc=(name,))
    assert isinstance(error, FormatError)
    return error


def _apply(code: int, payload: bytes, stack: list[Node]) -> None:
    """Do one extension object; ValueError where it does not fit."""
    if code == _BIG_INT:
        stack.append(int.from_bytes(payload, "big", signed=True))
    elif code == _COMPLEX:
        stack.append(complex(*struct.unpack(">dd", payload)))
    elif code == _ODD_STR:
        stack.append(payload.decode("utf-8", "surrogatepass"))
    elif code in _COUNTS:
        counts = msgpack.unpackb(payload)
        if not isinstance(counts, list) or len(counts) != _COUNTS[code]:
            raise ValueError(f"extension {code} with counts {counts!r}")
        if not all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in counts):
            raise ValueError(f"extension {code} with counts {counts!r}")
        stack.append(_MAKERS[code](counts, stack))
    else:
        raise ValueError(f"unknown extension {code}")


def _pop(stack: list[Node], count: int) -> list[Node]:
    if count > len(stack):
        raise ValueError(f"{count} operands are needed, {len(stack)} are there")
    taken = stack[len(stack) - count :]
    del stack[len(stack) - count :]
    return taken


def _text(node: Node) -> str:
    if not isinstance(node, str):
        raise ValueError(f"text is needed, {type(node).__name__} is there")
    return node


def _pairs(flat: list[Node]) -> tuple[tuple[Node, Node], ...]:
    return tuple(zip(flat[::2], flat[1::2], strict=True))


def _dict(counts: list[int], stack: list[Node]) -> Node:
    items, args = counts
    kind, *rest, state = _pop(stack, 2 + 2 * items + args)
    return DictNode(
        kind=_text(kind), items=_pairs(rest[: 2 * items]), args=tuple(rest[2 * items :]), state=state
    )


def _list(counts: list[int], stack: list[Node]) -> Node:
    kind, *items = _pop(stack, 1 + counts[0])
    return ListNode(kind=_text(kind), items=tuple(items))


def _opaque(counts: list[int], stack: list[Node]) -> Node:
    args, items, pairs = counts
    kind, name, *rest, state = _pop(stack, 3 + args + items + 2 * pairs)
    return Opaque(
        kind=_text(kind),
        name=_text(name),
        args=tuple(rest[:args]),
        items=tuple(rest[args : args + items]),
        pairs=_pairs(rest[args + items :]),
        state=state,
    )


def _lifted(counts: list[int], stack: list[Node]) -> Node:
    parts, encodings = counts
    flat = _pop(stack, parts + 2 * encodings)
    to: list[str | int] = []
    for part in flat[:parts]:
        if not isinstance(part, (str, int)) or isinstance(part, bool):
            raise ValueError("an address is made of text and integers")
        to.append(part)
    encoding: dict[str, str | int | float | bool | tuple[int, ...] | None] = {}
    for key, value in _pairs(flat[parts:]):
        if isinstance(value, ListNode):
            encoding[_text(key)] = _ints(value)
        elif value is None or isinstance(value, (str, int, float, bool)):
            encoding[_text(key)] = value
        else:
            raise ValueError(f"an encoding cannot be a {type(value).__name__}")
    return Lifted(to=tuple(to), encoding=encoding)


def _ints(node: ListNode) -> tuple[int, ...]:
    if not all(isinstance(item, int) for item in node.items):
        raise ValueError("a sequence in an encoding is made of integers")
    return tuple(item for item in node.items if isinstance(item, int))


_MAKERS: dict[int, Callable[[list[int], list[Node]], Node]] = {
    _DICT: _dict,
    _LIST: _list,
    _OPAQUE: _opaque,
    _LIFTED: _lifted,
}
