"""The loop that runs a pickle's opcodes.

The opcodes that make up nearly all of a checkpoint are executed here, where nothing is wrong with them;
`pickle_opcodes` has every opcode, and whatever is wrong is found there. A sequence that a producer repeats
for every tensor may be run as one, by the `AtOnce.idiom` of who knows it.
"""

from __future__ import annotations

import struct
from typing import Final

from ckptconv.formats.pickle_machine import Machine, Made, Value, tuple_of
from ckptconv.formats.pickle_opcodes import NO_ARGUMENTS, OPERATIONS
from ckptconv.rawtree import Opaque

_STOP: Final = ord(".")
_NONE: Final = Opaque(kind="none")  # stands in no memo
_UINT32: Final = struct.Struct("<I")


def run(machine: Machine) -> Value:
    """The value on the stack at STOP.

    Raises: malformed-pickle, truncated-file, limit-exceeded, unsupported-feature.
    """
    data, end = machine.data, len(machine.data)
    idiom = machine.at_once.idiom if machine.at_once is not None else None
    stack, marks, memo = machine.stack, machine.marks, machine.memo
    push, got, uint32 = stack.append, memo.get, _UINT32.unpack_from
    at = machine.at
    floor = 0  # of the stack above the last mark
    while True:
        if at >= end:
            machine.op_at = at
            raise machine.error("truncated-file", f"the pickle ends at {end} without STOP")
        opcode = data[at]
        if opcode == 0x72 and len(stack) > floor and at + 5 <= end:  # LONG_BINPUT
            memo[uint32(data, at + 1)[0]] = stack[-1]
            at += 5
            continue
        if opcode == 0x94 and idiom is None and len(stack) > floor:  # MEMOIZE
            memo[len(memo)] = stack[-1]
            at += 1
            continue
        if opcode == 0x4B and at + 1 < end:  # BININT1
            push(data[at + 1])
            at += 2
            continue
        if opcode == 0x68 and at + 1 < end and (value := got(data[at + 1], _NONE)) is not _NONE:  # BINGET
            push(value)
            at += 2
            continue
        if opcode == 0x6A and at + 5 <= end:  # LONG_BINGET
            value = got(uint32(data, at + 1)[0], _NONE)
            if value is not _NONE:
                push(value)
                at += 5
                continue
        if opcode == 0x28:  # MARK
            if idiom is not None and data[at + 1 : at + 2] == b"(" and len(stack) > floor:
                after = idiom(machine, at)
                if after > at:
                    at = after
                    continue
            floor = len(stack)
            marks.append(floor)
            at += 1
            continue
        if opcode == 0x58 and at + 5 <= end:  # BINUNICODE
            stop = at + 5 + uint32(data, at + 1)[0]
            if stop <= end:
                push(machine.text(data[at + 5 : stop]))
                at = stop
                continue
        if opcode == 0x74 and marks:  # TUPLE
            stack[floor:] = [tuple_of(stack[floor:])]
            marks.pop()
            floor = marks[-1] if marks else 0
            at += 1
            continue
        if opcode == 0x52 and len(stack) > floor + 1:  # REDUCE
            machine.op_at = at
            args = stack.pop()
            stack[-1] = machine.call(stack[-1], args, "call")
            at += 1
            continue
        if opcode == 0x29:  # EMPTY_TUPLE
            push(NO_ARGUMENTS)
            at += 1
            continue
        if opcode == 0x89:  # NEWFALSE
            push(False)
            at += 1
            continue
        if opcode == 0x8C and at + 2 <= end and (stop := at + 2 + data[at + 1]) <= end:  # SHORT_BINUNICODE
            push(machine.text(data[at + 2 : stop]))
            at = stop
            continue
        if opcode == 0x81 and len(stack) > floor + 1:  # NEWOBJ
            machine.op_at = at
            args = stack.pop()
            stack[-1] = machine.call(stack[-1], args, "object")
            at += 1
            continue
        if opcode == 0x7D:  # EMPTY_DICT
            push(Made("dict"))
            at += 1
            continue
        if opcode == 0x51 and len(stack) > floor:  # BINPERSID
            machine.op_at = at
            stack[-1] = machine.persistent(stack[-1])
            at += 1
            continue
        if opcode == 0x85 and len(stack) > floor:  # TUPLE1
            stack[-1] = tuple_of([stack[-1]])
            at += 1
            continue
        if opcode == 0x86 and len(stack) > floor + 1:  # TUPLE2
            last = stack.pop()
            stack[-1] = tuple_of([stack[-1], last])
            at += 1
            continue
        if opcode == 0x71 and len(stack) > floor and at + 1 < end:  # BINPUT
            memo[data[at + 1]] = stack[-1]
            at += 2
            continue
        if opcode == _STOP:
            machine.op_at, machine.at = at, at + 1
            if len(stack) != 1 or marks:
                raise machine.error("malformed-pickle", f"STOP with {len(stack)} values on the stack")
            return stack[0]
        machine.op_at, machine.at = at, at + 1
        operation = OPERATIONS[opcode]
        if operation is None:
            raise machine.error("malformed-pickle", f"there is no opcode 0x{opcode:02x}")
        operation(machine)
        at = machine.at
        floor = marks[-1] if marks else 0
