"""The opcodes that `torch.save` writes for a tensor, over and over, run as one.

With protocol 2 every tensor but the first of its kind is the same sequence behind a GET of
`torch._utils._rebuild_tensor_v2` (PUTs, which may stand behind a key, a tuple or a result, left out):

    MARK  MARK  GET 'storage'  GET class  BINUNICODE key  GET location  numel  TUPLE  BINPERSID
    offset  size  strides  NEWFALSE  GET OrderedDict  EMPTY_TUPLE  REDUCE  TUPLE  REDUCE

A number is BININT1, BININT2 or BININT; size and strides are EMPTY_TUPLE, numbers and TUPLE1 to 3, or MARK,
numbers, TUPLE; the key of a storage that was met before is a GET. Any other tensor is left to the machine.

Two things make it fast. How a tensor lies in its storage is worked out once for all whose sequences are equal
but for the key, which are most: a model repeats its shapes. And of what the sequence puts into the memo only
the key and the tensor are: no pickler ever gets the tuples and the OrderedDict (see `Machine.skipped`).

Source: torch 2.13 `torch/_tensor.py` (`_reduce_ex_internal`), CPython 3.11 `Lib/pickle.py`.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Mapping, Sequence
from operator import itemgetter
from typing import NamedTuple

from ckptconv.formats.pickle_machine import Machine, Value
from ckptconv.formats.torch_decode import Decoder
from ckptconv.formats.torch_names import TENSOR_V2
from ckptconv.rawtree import ListNode, Opaque
from ckptconv.tensor import StoredTensor

_GET, _PUT, _NUMBER = rb"(?:h.|j.{4})", rb"(r.{4}|)", rb"(?:K.|M..|J.{4})"
_COUNTS = rb"(?:\)|N\x85|NN\x86|NNN\x87|\(N{4,64}t)".replace(b"N", _NUMBER)
_TENSOR = re.compile(
    (rb"(\(\(" + _GET + _GET + rb")")
    + (rb"(?:X(.)\0\0\0([0-9]+)" + _PUT + rb"|(" + _GET + rb"))")
    + (rb"(" + _GET + _NUMBER + rb"t)" + _PUT + rb"Q")
    + (rb"(" + _NUMBER + _COUNTS + rb")" + _PUT)
    + (rb"(" + _COUNTS + rb")" + _PUT)
    + (rb"(\x89" + _GET + rb"\)R)" + _PUT + rb"t" + _PUT + rb"R" + _PUT),
    re.DOTALL,
)
_PUT_LAYOUTS = ["<" + puts * "xI" for puts in range(8)]
_MOST_KINDS = 10_000
_OPERAND = re.compile(_GET + rb"|" + _NUMBER, re.DOTALL)


class _Alike(NamedTuple):
    """What tensors have in common whose sequences differ in the key alone."""

    fetch: Callable[[Mapping[int, Value]], tuple[Value, ...]]
    """What is fetched from the memo,"""
    fetched: tuple[Value, ...]
    """and what that was."""
    class_: str
    numel: int
    """Of the storage."""
    laid: StoredTensor
    """One of them."""


class TensorIdiom:
    """Runs the sequence for one decoder: a `pickle_machine.Idiom`."""

    __slots__ = ("_alike", "_decoder")

    def __init__(self, decoder: Decoder) -> None:
        self._decoder = decoder
        self._alike: dict[tuple[bytes, ...], _Alike] = {}

    def __call__(self, machine: Machine, at: int) -> int:
        """See `Idiom`. Raises: what `Decoder.claim` and `Decoder.strided` raise."""
        callee, memo = machine.stack[-1], machine.memo
        if type(callee) is not Opaque or callee.name != TENSOR_V2 or callee.kind != "global":
            return at
        found = _TENSOR.match(machine.data, at)
        if found is None:
            return at
        (
            head, key_nbytes, digits, key_put, key_get, place, id_put, size, size_put, strides, strides_put,
            tail, mapping_put, args_put, put,
        ) = found.groups()  # fmt: skip
        puts = key_put or b"", id_put, size_put, strides_put, mapping_put, args_put, put
        numbers = struct.unpack(_PUT_LAYOUTS[sum(map(bool, puts))], b"".join(puts))
        if not memo.keys().isdisjoint(numbers) or (key_put and numbers.count(numbers[0]) > 1):
            return at  # a GET may mean what one of them put
        if key_get is not None:
            key = memo.get(_operand(key_get))
        else:
            key = digits.decode() if len(digits) == key_nbytes[0] else None
        if type(key) is not str:
            return at
        parts = head, place, size, strides, tail
        alike = self._alike.get(parts)
        if alike is None:
            alike = self._learned(memo, key, parts)
            if alike is None:
                return at
            if len(self._alike) < _MOST_KINDS:
                self._alike[parts] = alike
        if alike.fetch(memo) != alike.fetched:
            return at
        tensor = StoredTensor(
            spec=alike.laid.spec,
            extent=self._decoder.claim(alike.class_, key, alike.numel).extent,
            offset=alike.laid.offset,
            strides=alike.laid.strides,
        )
        if key_put:
            memo[numbers[0]] = key
        if put:
            memo[numbers[-1]] = tensor
        machine.skipped = True
        machine.stack[-1] = tensor
        return found.end()

    def _learned(self, memo: Mapping[int, Value], key: str, parts: tuple[bytes, ...]) -> _Alike | None:
        """What the first one of its kind shows; None where it is no tensor after all."""
        head, place, size, strides, tail = ([*map(_operand, _OPERAND.findall(part))] for part in parts)
        numbers = (*head, place[0], *tail)
        fetched = [memo.get(number) for number in numbers]
        match fetched:
            case [
                "storage",
                Opaque(kind="global", name=class_),
                str(location),
                Opaque(kind="global", name="collections.OrderedDict"),
            ]:
                numel, shape, steps = place[1], _tuple(size[1:]), _tuple(strides)
            case _:
                return None
        if numel < 0:
            return None
        self._decoder.locations.setdefault(location)
        storage = self._decoder.claim(class_, key, numel)
        return _Alike(
            fetch=itemgetter(*numbers),
            fetched=tuple(fetched),
            class_=class_,
            numel=numel,
            laid=self._decoder.strided(storage.flat, size[0], shape, steps),
        )


def _operand(opcode: bytes) -> int:
    """The number behind a GET or an opcode for numbers; only BININT has a sign."""
    if len(opcode) == 2:
        return opcode[1]
    return int.from_bytes(opcode[1:], "little", signed=opcode[0] == 0x4A)


def _tuple(numbers: Sequence[int]) -> ListNode:
    return ListNode(items=tuple(numbers), kind="tuple")
