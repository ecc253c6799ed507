"""What the reader decodes while the opcodes run is what it would have decoded afterwards, or an error."""

from __future__ import annotations

import collections
import pickle
from collections.abc import Sequence

import pytest

from ckptconv.errors import FormatError
from ckptconv.formats.pickle_machine import AtOnce
from ckptconv.formats.pickle_reader import unpickle
from ckptconv.rawtree import DictNode, ListNode, Node, Opaque

MAKE = b"ccollections\nOrderedDict\n"
TENSOR = b"cm\nrebuild\n"


def persistent(identifier: Node) -> Node:
    return Opaque(kind="decoded", args=(identifier,))


def rebuilt(args: Sequence[Node]) -> Node:
    return Opaque(kind="rebuilt", args=tuple(args))


def afterwards(node: Opaque) -> Node:
    if node.kind == "persistent":
        return persistent(node.args[0])
    if node.name == "m.rebuild":
        return rebuilt(node.args)
    if node.name == "collections.OrderedDict":
        return DictNode(items=node.pairs, kind=node.name, state=node.state)
    return node


AT_ONCE = AtOnce(persistent=persistent, calls={"m.rebuild": rebuilt})


@pytest.mark.parametrize(
    "body",
    [
        b"(X\x01\x00\x00\x00aK\x01tQ.",  # an id of plain values
        b"]Q.",  # an id that is a list
        TENSOR + b"(K\x05K\x06\x86" + MAKE + b")Rt" + b"R.",  # an empty mapping among the arguments
        TENSOR + b"(" + MAKE + b")RK\x01K\x02st" + b"R.",  # a mapping that is not empty
        TENSOR + b"(]t" + b"R.",  # an argument that may still change
        b"(" + TENSOR + b")R" + TENSOR + b"K\x07\x85Rt.",
    ],
)
def test_decoding_at_once_gives_the_same_tree(body: bytes) -> None:
    data = b"\x80\x02" + body
    at_once = unpickle(data, decode=afterwards, name="x", at_once=AT_ONCE).root
    assert at_once == unpickle(data, decode=afterwards, name="x").root


def test_a_mapping_that_was_used_empty_cannot_be_filled_later() -> None:
    data = b"\x80\x02" + b"(" + MAKE + b")Rq\x00" + TENSOR + b"h\x00\x85R" + b"h\x00K\x01K\x02s" + b"t."
    with pytest.raises(FormatError) as caught:
        unpickle(data, decode=afterwards, name="x", at_once=AT_ONCE)
    assert caught.value.problems[0].code == "malformed-pickle"


def test_nothing_is_added_to_what_was_decoded() -> None:
    data = b"\x80\x02" + TENSOR + b"K\x07\x85R" + b"}b."
    with pytest.raises(FormatError) as caught:
        unpickle(data, decode=afterwards, name="x", at_once=AT_ONCE)
    assert caught.value.problems[0].code == "malformed-pickle"


@pytest.mark.parametrize("protocol", range(6))
def test_every_protocol_gives_plain_values_alike(protocol: int) -> None:
    value = {"a": (1, (2.5, "x"), ()), "b": [True, None, b"raw", -(1 << 70)], 300: (70_000, 1 << 20)}
    found = unpickle(pickle.dumps(value, protocol), decode=lambda node: node, name="x").root
    assert isinstance(found, DictNode)
    first = found.get("a")
    assert isinstance(first, ListNode)
    assert first.items == (1, ListNode(items=(2.5, "x"), kind="tuple"), ListNode(kind="tuple"))
    assert found.get(300) == ListNode(items=(70_000, 1 << 20), kind="tuple")


def test_tuples_of_tuples_count_towards_the_growth() -> None:
    """Each level refers to the one below it ten times, and the lowest is a tuple of plain values."""
    body = b"(" + b"K\x01" * 10 + b"tq\x00"
    for level in range(12):
        body += b"0(" + b"h" + bytes([level]) + (b"h" + bytes([level])) * 9 + b"tq" + bytes([level + 1])
    with pytest.raises(FormatError) as caught:
        unpickle(b"\x80\x02" + body + b".", decode=lambda node: node, name="x")
    assert caught.value.problems[0].code == "limit-exceeded"


def test_an_ordered_dict_is_the_same_with_and_without() -> None:
    value = collections.OrderedDict(a=1, b=(2, 3))
    data = pickle.dumps(value, 2)
    assert unpickle(data, decode=afterwards, name="x", at_once=AT_ONCE) == unpickle(
        data, decode=afterwards, name="x"
    )
