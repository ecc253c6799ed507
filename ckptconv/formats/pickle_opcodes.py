"""The opcodes of `pickle_reader`: one function each, in a dispatch table; `pickle_run` runs them.

Source: CPython 3.11 `Lib/pickletools.py`, `Lib/pickle.py`.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Final, Literal

from ckptconv.formats.pickle_machine import (
    MAX_INT_NBYTES,
    Machine,
    Made,
    SkippedError,
    Value,
    tuple_of,
)
from ckptconv.rawtree import ListNode

_Operation = Callable[[Machine], None]
OPERATIONS: Final[list[_Operation | None]] = [None] * 256
"""By opcode; STOP has none."""
NO_ARGUMENTS: Final = ListNode(kind="tuple")


def _op(*opcodes: int | str) -> Callable[[_Operation], _Operation]:
    """Enter a function in the dispatch table."""

    def enter(operation: _Operation) -> _Operation:
        for opcode in opcodes:
            OPERATIONS[ord(opcode) if isinstance(opcode, str) else opcode] = operation
        return operation

    return enter


def _constant(opcode: int | str, value: bool | None) -> None:
    _op(opcode)(lambda m: m.stack.append(value))


def _sized(opcode: int | str, length_nbytes: int, make: Callable[[Machine, bytes], Value]) -> None:
    """An opcode whose argument is a length and that many bytes."""
    _op(opcode)(lambda m: m.stack.append(make(m, m.take(m.number(length_nbytes)))))


def _unsigned(opcode: int | str, nbytes: int) -> None:
    _op(opcode)(lambda m: m.stack.append(m.number(nbytes)))


def _python2_text(_: Machine, raw: bytes) -> str | bytes:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        return raw


def _long(machine: Machine, raw: bytes) -> int:
    if len(raw) > MAX_INT_NBYTES:
        raise machine.error(
            "limit-exceeded", f"a number of {len(raw)} bytes, at most {MAX_INT_NBYTES} are read"
        )
    return int.from_bytes(raw, "little", signed=True)


def _bytearray(_: Machine, raw: bytes) -> Made:
    return Made("call", "builtins.bytearray", (raw,))


_constant("N", None)
_constant(0x88, True)
_constant(0x89, False)
_op("K")(lambda m: m.stack.append(m.byte()))
_unsigned("M", 2)
_sized("X", 4, Machine.text)
_sized(0x8C, 1, Machine.text)
_sized(0x8D, 8, Machine.text)
_sized("T", 4, _python2_text)
_sized("U", 1, _python2_text)
_sized("B", 4, lambda _, raw: raw)
_sized("C", 1, lambda _, raw: raw)
_sized(0x8E, 8, lambda _, raw: raw)
_sized(0x8A, 1, _long)
_sized(0x8B, 4, _long)
_sized(0x96, 8, _bytearray)


@_op(0x80)
def _proto(m: Machine) -> None:
    m.protocol = m.number(1)
    if m.protocol > 5:
        raise m.error("unsupported-feature", f"pickle protocol {m.protocol}, 0 to 5 are read")


@_op(0x95)
def _frame(m: Machine) -> None:
    nbytes = m.number(8)
    if m.at + nbytes > len(m.data):
        raise m.error("truncated-file", f"a frame of {nbytes} bytes, {len(m.data) - m.at} are left")


@_op("J")
def _binint(m: Machine) -> None:
    m.stack.append(int.from_bytes(m.take(4), "little", signed=True))


@_op("I")
def _int(m: Machine) -> None:
    raw = m.line()
    m.stack.append({b"00": False, b"01": True}[raw] if raw in (b"00", b"01") else m.decimal(raw))


@_op("L")
def _decimal_long(m: Machine) -> None:
    m.stack.append(m.decimal(m.line().removesuffix(b"L")))


@_op("F")
def _float(m: Machine) -> None:
    raw = m.line()
    try:
        m.stack.append(float(raw))
    except ValueError:
        raise m.error("malformed-pickle", f"{raw[:40]!r} is no number") from None


@_op("G")
def _binfloat(m: Machine) -> None:
    m.stack.append(struct.unpack(">d", m.take(8))[0])


@_op("S")
def _string(m: Machine) -> None:
    raw = m.line().strip()
    if len(raw) < 2 or raw[:1] != raw[-1:] or raw[:1] not in (b"'", b'"'):
        raise m.error("malformed-pickle", f"{raw[:40]!r} is no quoted string")
    try:
        plain = raw[1:-1].decode("latin1").encode("latin1").decode("unicode_escape").encode("latin1")
    except (UnicodeDecodeError, UnicodeEncodeError):
        raise m.error("malformed-pickle", f"{raw[:40]!r} has a malformed escape") from None
    m.stack.append(_python2_text(m, plain))


@_op("V")
def _unicode(m: Machine) -> None:
    raw = m.line()
    try:
        m.stack.append(raw.decode("raw-unicode-escape"))
    except UnicodeDecodeError:
        raise m.error("malformed-pickle", f"{raw[:40]!r} has a malformed escape") from None


@_op("(")
def _mark(m: Machine) -> None:
    m.marks.append(len(m.stack))


@_op("0")
def _pop(m: Machine) -> None:
    # POP on an empty segment takes the mark away, as Python's does.
    if m.marks and len(m.stack) == m.marks[-1]:
        m.marks.pop()
    else:
        m.pop()


@_op("1")
def _pop_mark(m: Machine) -> None:
    m.pop_to_mark()


@_op("2")
def _dup(m: Machine) -> None:
    m.stack.append(m.top())


def _empty(opcode: int | str, kind: Literal["dict", "list", "set"]) -> None:
    _op(opcode)(lambda m: m.stack.append(Made(kind)))


def _marked(opcode: int | str, kind: Literal["list", "frozenset"]) -> None:
    _op(opcode)(lambda m: m.stack.append(Made(kind, items=m.pop_to_mark())))


_empty("}", "dict")
_empty("]", "list")
_op(")")(lambda m: m.stack.append(NO_ARGUMENTS))
_empty(0x8F, "set")
_marked("l", "list")
_op("t")(lambda m: m.stack.append(tuple_of(m.pop_to_mark())))
_marked(0x91, "frozenset")


def _tuple_of(opcode: int, count: int) -> None:
    def operation(m: Machine) -> None:
        low = len(m.stack) - count
        if low < (m.marks[-1] if m.marks else 0):
            raise m.error("malformed-pickle", "the stack is empty")
        m.stack[low:] = [tuple_of(m.stack[low:])]

    _op(opcode)(operation)


_tuple_of(0x85, 1)
_tuple_of(0x86, 2)
_tuple_of(0x87, 3)


def _paired(m: Machine, values: list[Value]) -> list[tuple[Value, Value]]:
    if len(values) % 2:
        raise m.error("malformed-pickle", f"{len(values)} keys and values, which is odd")
    return list(zip(values[::2], values[1::2], strict=True))


def _set_items(m: Machine, pairs: list[tuple[Value, Value]]) -> None:
    target = m.container()
    if target.kind in ("list", "set"):
        raise m.error("malformed-pickle", f"a {target.kind} has no keys")
    target.update(pairs)


def _add_items(m: Machine, values: list[Value]) -> None:
    target = m.container()
    if target.kind in ("dict", "set"):
        raise m.error("malformed-pickle", f"nothing can be appended to a {target.kind}")
    target.extend(values)


@_op("d")
def _dict(m: Machine) -> None:
    m.stack.append(Made("dict", pairs=_paired(m, m.pop_to_mark())))


@_op("s")
def _setitem(m: Machine) -> None:
    value, key = m.pop(), m.pop()
    _set_items(m, [(key, value)])


@_op("u")
def _setitems(m: Machine) -> None:
    _set_items(m, _paired(m, m.pop_to_mark()))


@_op("a")
def _append(m: Machine) -> None:
    _add_items(m, [m.pop()])


@_op("e")
def _appends(m: Machine) -> None:
    _add_items(m, m.pop_to_mark())


@_op(0x90)
def _additems(m: Machine) -> None:
    values = m.pop_to_mark()
    target = m.container()
    if target.kind in ("dict", "list"):
        raise m.error("malformed-pickle", f"nothing can be added to a {target.kind} as to a set")
    target.extend(values)


@_op("c")
def _global(m: Machine) -> None:
    module, name = m.text(m.line()), m.text(m.line())
    m.stack.append(m.global_(module, name))


@_op(0x93)
def _stack_global(m: Machine) -> None:
    name, module = m.pop(), m.pop()
    if not isinstance(module, str) or not isinstance(name, str):
        raise m.error("malformed-pickle", "the name of a global is no text")
    m.stack.append(m.global_(module, name))


@_op("R")
def _reduce(m: Machine) -> None:
    args, callee = m.pop(), m.pop()
    m.stack.append(m.call(callee, args, "call"))


@_op(0x81)
def _newobj(m: Machine) -> None:
    args, class_ = m.pop(), m.pop()
    m.stack.append(m.call(class_, args, "object"))


@_op(0x92)
def _newobj_ex(m: Machine) -> None:
    kwargs, args, class_ = m.pop(), m.pop(), m.pop()
    m.stack.append(Made("call", "copyreg.__newobj_ex__", (class_, args, kwargs)))


@_op("o")
def _obj(m: Machine) -> None:
    values = m.pop_to_mark()
    if not values:
        raise m.error("malformed-pickle", "an object without a class")
    m.stack.append(m.call(values[0], tuple_of(values[1:]), "object"))


@_op("i")
def _inst(m: Machine) -> None:
    module, name = m.text(m.line()), m.text(m.line())
    m.stack.append(Made("object", m.global_(module, name).name, tuple(m.pop_to_mark())))


@_op("b")
def _build(m: Machine) -> None:
    state = m.pop()
    target = m.container()
    if target.kind in ("dict", "list", "set") or target.state is not None or state is None:
        raise m.error("malformed-pickle", f"a {target.kind} cannot be given this state")
    target.state = state


_op("P")(lambda m: m.stack.append(m.persistent(m.text(m.line()))))
_op("Q")(lambda m: m.stack.append(m.persistent(m.pop())))


def _get(m: Machine, key: int) -> None:
    if key not in m.memo:
        if m.skipped:
            raise SkippedError
        raise m.error("malformed-pickle", f"the memo has no entry {key}, it has {len(m.memo)} entries")
    m.stack.append(m.memo[key])


def _put(m: Machine, key: int) -> None:
    m.memo[key] = m.top()


_op("g")(lambda m: _get(m, m.decimal(m.line())))
_op("h")(lambda m: _get(m, m.byte()))
_op("j")(lambda m: _get(m, m.number(4)))
_op("p")(lambda m: _put(m, m.decimal(m.line())))
_op("q")(lambda m: _put(m, m.byte()))
_op("r")(lambda m: _put(m, m.number(4)))


@_op(0x94)
def _memoize(m: Machine) -> None:
    if m.skipped:
        raise SkippedError
    _put(m, len(m.memo))


@_op(0x82, 0x83, 0x84, 0x97, 0x98)
def _elsewhere(m: Machine) -> None:
    raise m.error(
        "unsupported-feature",
        f"opcode 0x{m.data[m.op_at]:02x} refers to a registry or a buffer that is not in the file",
    )
