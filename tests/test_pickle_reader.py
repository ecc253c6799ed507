"""The opcode machine: what it makes of each protocol, and what it refuses."""

from __future__ import annotations

import contextlib
import datetime
import pickle
import pickletools
from collections import OrderedDict
from pathlib import PurePosixPath
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ckptconv.errors import CODES, CkptError
from ckptconv.formats.pickle_opcodes import OPERATIONS
from ckptconv.formats.pickle_reader import MAX_DEPTH, unpickle
from ckptconv.formats.pickle_writer import pickle_tree
from ckptconv.rawtree import DictNode, ListNode, Node, Opaque


def read(data: bytes) -> Node:
    return unpickle(data, decode=lambda node: node, name="x.pkl").root


def code(data: bytes) -> str:
    with pytest.raises(CkptError) as caught:
        read(data)
    (problem,) = caught.value.problems
    assert problem.code in CODES
    assert problem.loc[0] == "x.pkl"
    return problem.code


def node_of(value: Any) -> Node:
    """What plain values become."""
    if isinstance(value, dict):
        return DictNode(items=tuple((node_of(k), node_of(v)) for k, v in value.items()))
    if isinstance(value, (list, tuple)):
        return ListNode(items=tuple(map(node_of, value)), kind=type(value).__name__)
    return value


def same(a: Node, b: Node) -> bool:
    """Equal with types: True is not 1, NaN is NaN."""
    return repr(a) == repr(b)


PLAIN = {
    "numbers": [0, 1, 255, 256, 65535, 65536, -1, 2**31 - 1, 2**31, -(2**31), 2**63, -(2**200), 2**2040 - 1],
    "floats": [0.0, -0.0, 1.5, 1e308, float("inf"), float("nan")],
    "text": ["", "a", "é\n\\'\"", "\ud800", "x" * 300, "\U0001f600"],
    "constants": (None, True, False),
    "tuples": [(), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4)],
    "nested": [[[]], {}, {"a": {"b": []}}, [{1: (2,)}]],
    (1, "key"): {2.5: None},
}


@pytest.mark.parametrize("protocol", range(6))
def test_plain_values_of_each_protocol(protocol: int) -> None:
    assert same(read(pickle.dumps(PLAIN, protocol)), node_of(PLAIN))
    optimized = pickletools.optimize(pickle.dumps(PLAIN, protocol))
    assert same(read(optimized), node_of(PLAIN))


@pytest.mark.parametrize("protocol", [3, 4, 5])
def test_bytes_sets_and_bytearrays(protocol: int) -> None:
    value = [b"", b"\x00\xff" * 200, {1}, frozenset({2}), bytearray(b"q")]
    root = read(pickle.dumps(value, protocol))
    assert isinstance(root, ListNode)
    assert root.items[:2] == (b"", b"\x00\xff" * 200)
    if protocol > 3:
        assert root.items[2:4] == (ListNode(items=(1,), kind="set"), ListNode(items=(2,), kind="frozenset"))
    assert isinstance(root.items[4], Opaque)
    assert root.items[4].name == "builtins.bytearray"


class Plain:
    def __init__(self) -> None:
        self.x = [1]


class WithNew:
    def __getnewargs_ex__(self) -> tuple[tuple[int], dict[str, int]]:
        return (1,), {"k": 2}

    def __new__(cls, *_: int, **__: int) -> WithNew:
        return super().__new__(cls)

    class Inner:
        pass


class Items(list[int]):
    pass


@pytest.mark.parametrize("protocol", range(6))
def test_objects_are_described_not_made(protocol: int) -> None:
    root = read(pickle.dumps([Plain(), Items([1, 2]), PurePosixPath("/a"), datetime.timedelta(1)], protocol))
    assert isinstance(root, ListNode)
    plain, items, path, delta = root.items
    assert isinstance(plain, Opaque)
    assert plain.state == DictNode(items=(("x", ListNode(items=(1,))),))
    assert isinstance(items, Opaque)
    assert 1 in items.items or ListNode(items=(1, 2)) in items.args
    assert isinstance(path, Opaque)
    assert path.name.endswith("PurePosixPath")
    assert isinstance(delta, Opaque)
    assert delta.args == (1, 0, 0)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_objects_with_keyword_arguments(protocol: int) -> None:
    node = read(pickle.dumps(WithNew(), protocol))
    assert isinstance(node, Opaque)
    if protocol >= 4:
        assert node.name == "copyreg.__newobj_ex__"
        assert node.args[1:] == (ListNode(items=(1,), kind="tuple"), DictNode(items=(("k", 2),)))
    else:
        assert node.kind == "apply" or node.name == "functools.partial"


def test_nested_names_are_kept_apart() -> None:
    node = read(pickle.dumps(WithNew.Inner, 4))
    assert node == Opaque(kind="global", name=f"{__name__}:WithNew.Inner")
    written, names = pickle_tree(node, lambda node: node)
    assert pickle.loads(written) is WithNew.Inner
    assert "builtins.getattr" in names


def test_python_2_names_and_text() -> None:
    assert read(b"c__builtin__\nunicode\n.") == Opaque(kind="global", name="builtins.str")
    assert read(b"ccopy_reg\n_reconstructor\n.") == Opaque(kind="global", name="copyreg._reconstructor")
    assert read(b"\x80\x04c__builtin__\nset\n.") == Opaque(kind="global", name="__builtin__.set")
    assert read(b"S'caf\\xc3\\xa9'\n.") == "café"
    assert read(b"U\x02\xff\xfe.") == b"\xff\xfe"
    assert read(b"I01\n.") is True
    assert read(b"L12L\n.") == 12
    assert read(b"(I1\ni__main__\nOld\n.") == Opaque(kind="object", name="__main__.Old", args=(1,))
    assert read(b"(c__main__\nOld\nI1\no.") == Opaque(kind="object", name="__main__.Old", args=(1,))


def test_one_object_twice_is_one_node_twice() -> None:
    shared = [1]
    root = read(pickle.dumps({"a": shared, "b": shared}, 2))
    assert isinstance(root, DictNode)
    assert root.get("a") is root.get("b")


def test_cycles_end_in_a_mark() -> None:
    loop: list[Any] = [1]
    loop.append({"back": loop})
    root = read(pickle.dumps(loop, 2))
    assert isinstance(root, ListNode)
    inner = root.items[1]
    assert isinstance(inner, DictNode)
    assert inner.get("back") == Opaque(kind="cycle", name="list")
    loop[:] = [loop]
    assert read(pickle.dumps(loop, 2)) == ListNode(items=(Opaque(kind="cycle", name="list"),))


def test_running_code_is_data() -> None:
    class Attack:
        def __reduce__(self) -> tuple[Any, ...]:
            return eval, ("raise SystemExit(1)",)

    for protocol in range(6):
        node = read(pickle.dumps(Attack(), protocol))
        assert node == Opaque(kind="call", name="builtins.eval", args=("raise SystemExit(1)",))
    assert read(b"cos\nsystem\n(S'touch /tmp/owned'\ntR.") == Opaque(
        kind="call", name="os.system", args=("touch /tmp/owned",)
    )


def test_every_opcode_of_python_has_an_answer() -> None:
    known = {ord(opcode.code) for opcode in pickletools.opcodes} - {ord(".")}
    assert {opcode for opcode, operation in enumerate(OPERATIONS) if operation} == known


MALFORMED = {
    "nothing": b"",
    "no STOP": b"\x80\x02N",
    "empty stack": b".",
    "two values": b"NN.",
    "open mark": b"(N.",
    "unknown opcode": b"\xff.",
    "protocol 9": b"\x80\x09N.",
    "no such memo": b"h\x07.",
    "no such long memo": b"j\xff\xff\xff\xff.",
    "memo of nothing": b"q\x00.",
    "pop of nothing": b"0.",
    "tuple below its mark": b"NN(\x86.",
    "text longer than the file": b"X\xff\xff\xff\xffab.",
    "bytes longer than memory": b"\x8e\xff\xff\xff\xff\xff\xff\xff\x7fab.",
    "text8 longer than memory": b"\x8d\xff\xff\xff\xff\xff\xff\xff\xffab.",
    "frame longer than the file": b"\x80\x04\x95\xff\xff\xff\xff\xff\xff\xff\xffN.",
    "long longer than the file": b"\x8b\xff\xff\xff\x7f\x01.",
    "a negative length": b"\x8b\xff\xff\xff\xff\x01.",
    "line without end": b"cos",
    "number without digits": b"Iabc\n.",
    "float without digits": b"F1.2.3\n.",
    "not UTF-8": b"X\x01\x00\x00\x00\xff.",
    "item of a number": b"K\x01K\x02a.",
    "item of a tuple": b")K\x02a.",
    "item of a dict": b"}K\x02a.",
    "pair of a list": b"]K\x01K\x02s.",
    "odd pairs": b"}(K\x01u.",
    "odd dict": b"(K\x01d.",
    "set items of a list": b"](K\x01\x90.",
    "item of a global": b"cos\nsystem\nK\x01a.",
    "call without tuple": b"cos\nsystem\n]R.",
    "state of a list": b"]}b.",
    "state of a number": b"K\x01}b.",
    "state twice": b"cos\nx\n)R}b}b.",
    "name of numbers": b"K\x01K\x02\x93.",
    "extension": b"\x82\x01.",
    "buffer elsewhere": b"\x80\x05\x97.",
    "string without quotes": b"Sabc\n.",
    "object without class": b"(o.",
}


@pytest.mark.parametrize("data", MALFORMED.values(), ids=MALFORMED.keys())
def test_malformed_pickles_have_a_code(data: bytes) -> None:
    assert code(data) in ("malformed-pickle", "truncated-file", "unsupported-feature")


def test_depth_is_limited() -> None:
    assert read(b"]" * MAX_DEPTH + b"a" * (MAX_DEPTH - 1) + b".") is not None
    assert code(b"]" * (MAX_DEPTH + 1) + b"a" * MAX_DEPTH + b".") == "limit-exceeded"
    assert code(b"]" * 100_000 + b"a" * 99_999 + b".") == "limit-exceeded"
    assert code(b"(" * 1_000_000) == "truncated-file"
    assert code(b"N" + b"\x85" * 1_000_000 + b".") == "limit-exceeded"


def test_references_to_references_do_not_multiply() -> None:
    """Forty doublings: a terabyte of leaves in 200 bytes."""
    doubled = b"".join(b"](h" + bytes([i]) + b"h" + bytes([i]) + b"eq" + bytes([i + 1]) for i in range(40))
    assert code(b"]q\x00" + doubled + b"0" * 41 + b"h\x28.") == "limit-exceeded"


def test_numbers_are_limited() -> None:
    assert code(b"I" + b"9" * 100_000 + b"\n.") == "limit-exceeded"
    assert code(b"\x8b\x00\x00\x01\x00" + b"\x01" * 65536 + b".") == "limit-exceeded"


def tree_or_code(data: bytes) -> None:
    with contextlib.suppress(CkptError):
        read(data)


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=60))
def test_any_bytes_give_a_tree_or_a_code(data: bytes) -> None:
    tree_or_code(data)


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.sampled_from([op.code.encode("latin1") for op in pickletools.opcodes] + [b"K\x01", b"h\x00"]))
)
def test_any_opcodes_give_a_tree_or_a_code(opcodes: list[bytes]) -> None:
    tree_or_code(b"".join(opcodes) + b".")


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=4)
    | st.lists(inner, max_size=5).map(tuple),
    max_leaves=20,
)  # fmt: skip


@settings(max_examples=200, deadline=None)
@given(VALUES)
def test_what_is_written_python_reads(value: Any) -> None:
    data, names = pickle_tree(node_of(value), lambda node: node)
    assert not names
    assert repr(pickle.loads(data)) == repr(value)
    assert same(read(data), node_of(value))
    assert max(opcode.proto for opcode, _, _ in pickletools.genops(data)) == 2


def test_many_items_are_written_in_batches() -> None:
    value = {"d": {i: str(i) for i in range(2500)}, "l": list(range(2500)), "t": tuple(range(700))}
    data, _ = pickle_tree(node_of(value), lambda node: node)
    assert pickle.loads(data) == value
    assert sum(opcode.name == "SETITEMS" for opcode, _, _ in pickletools.genops(data)) == 4


@pytest.mark.parametrize(
    ("node", "expected"),
    [
        (2**3000, "limit-exceeded"),
        (Opaque(kind="cycle", name="list"), "unsupported-feature"),
        (Opaque(kind="global", name="nodots"), "unsupported-feature"),
        (Opaque(kind="unheard.of"), "unsupported-feature"),
    ],
    ids=["long", "cycle", "name", "kind"],
)
def test_what_cannot_be_written(node: Node, expected: str) -> None:
    with pytest.raises(CkptError) as caught:
        pickle_tree(node, lambda node: node)
    assert caught.value.problems[0].code == expected


def test_trees_too_deep_to_read_are_not_written() -> None:
    node: Node = None
    for _ in range(300):
        node = ListNode(items=(node,))
    with pytest.raises(CkptError) as caught:
        pickle_tree(node, lambda node: node)
    assert caught.value.problems[0].code == "limit-exceeded"


def test_states_and_items_are_written_as_they_were() -> None:
    value = OrderedDict(a=1)
    value.extra = 2  # type: ignore[attr-defined]
    node = read(pickle.dumps([value, Items([1, 2]), Plain()], 2))
    data, names = pickle_tree(node, lambda node: node)
    ordered, items, plain = pickle.loads(data)
    assert (ordered, vars(ordered)) == (value, {"extra": 2})
    assert (items, plain.x) == ([1, 2], [1])
    assert {"collections.OrderedDict", f"{__name__}.Items", f"{__name__}.Plain"} <= names
