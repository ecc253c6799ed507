"""Damaged and hostile safetensors files and indexes, each with the code it must give."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ckptconv.dialects.safetensors_weights import DIALECT
from ckptconv.errors import CkptError, FormatError
from ckptconv.formats.safetensors import FORMAT
from ckptconv.formats.safetensors_header import MAX_HEADER_NBYTES
from ckptconv.rawtree import DictNode, ListNode, RawTree, dict_of
from tests.support.documents import array_tensor
from tests.support.write_layout import write_layout


def file_bytes(header, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def entry(dtype="U8", shape=(2,), begin=0, end=2, **more):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end], **more}


def found(error: CkptError):
    return [(problem.code, problem.loc) for problem in error.problems]


NAME = "a.safetensors"
AT = ("a", "data_offsets")
DEEP = b"[" * 50_000
BAD_FILES = {
    "empty": (b"", "truncated-file", (NAME,)),
    "seven bytes": (b"\2\0\0\0\0\0\0", "truncated-file", (NAME,)),
    "header longer than file": (file_bytes({})[:9], "truncated-file", (NAME,)),
    "header too large": ((MAX_HEADER_NBYTES + 1).to_bytes(8, "little") + b"{}", "limit-exceeded", (NAME,)),
    "header of 2^63": (b"\0\0\0\0\0\0\0\x80{}", "limit-exceeded", (NAME,)),
    "no json": (file_bytes(b"{"), "corrupt-file", (NAME,)),
    "empty header": (file_bytes(b""), "corrupt-file", (NAME,)),
    "NUL padding": (file_bytes(b"{}\0\0"), "corrupt-file", (NAME,)),
    "NaN": (file_bytes(b'{"a":NaN}'), "corrupt-file", (NAME,)),
    "not utf-8": (file_bytes(b'{"\xff":1}'), "corrupt-file", (NAME,)),
    "half a character": (file_bytes(b'{"\\ud800":1}'), "corrupt-file", (NAME,)),
    "deep": (file_bytes(b'{"a":' + DEEP), "limit-exceeded", (NAME,)),
    "many digits": (file_bytes(b'{"a":' + b"9" * 5_000 + b"}"), "limit-exceeded", (NAME,)),
    "a list": (file_bytes([]), "corrupt-file", (NAME,)),
    "name twice": (
        file_bytes(b'{"a":%b,"a":%b}' % ((json.dumps(entry()).encode(),) * 2), b"xx"),
        "duplicate-key",
        (NAME,),
    ),
    "metadata twice": (file_bytes(b'{"__metadata__":{},"__metadata__":{}}'), "duplicate-key", (NAME,)),
    "metadata is text": (file_bytes({"__metadata__": "x"}), "corrupt-file", ("__metadata__",)),
    "metadata is a number": (
        file_bytes({"__metadata__": {"step": 1}}),
        "corrupt-file",
        ("__metadata__", "step"),
    ),
    "entry is a number": (file_bytes({"a": 1}), "corrupt-file", ("a",)),
    "no dtype": (
        file_bytes({"a": {"shape": [], "data_offsets": [0, 1]}}, b"x"),
        "corrupt-file",
        ("a", "dtype"),
    ),
    "unknown dtype": (file_bytes({"a": entry("F128")}, b"xx"), "unknown-dtype", ("a", "dtype")),
    "F6": (file_bytes({"a": entry("F6_E2M3", (8,), 0, 6)}, b"x" * 6), "unknown-dtype", ("a", "dtype")),
    "negative size": (file_bytes({"a": entry(shape=(-1, -2))}, b"xx"), "corrupt-file", ("a", "shape")),
    "size with a fraction": (file_bytes({"a": entry(shape=(2.0,))}, b"xx"), "corrupt-file", ("a", "shape")),
    "size that is true": (file_bytes({"a": entry(shape=(True, 2))}, b"xx"), "corrupt-file", ("a", "shape")),
    "size beyond 64 bits": (file_bytes({"a": entry(shape=(2**64,))}, b"xx"), "corrupt-file", ("a", "shape")),
    "product overflows": (
        file_bytes({"a": entry(shape=(2**63, 4))}, b"xx"),
        "corrupt-file",
        AT,
    ),
    "three offsets": (
        file_bytes({"a": {**entry(), "data_offsets": [0, 1, 2]}}, b"xx"),
        "corrupt-file",
        AT,
    ),
    "begin after end": (
        file_bytes({"a": entry(shape=(0,), begin=2, end=0)}, b""),
        "corrupt-file",
        AT,
    ),
    "size and shape disagree": (
        file_bytes({"a": entry(end=3)}, b"xxx"),
        "corrupt-file",
        AT,
    ),
    "hole at the start": (
        file_bytes({"a": entry(begin=1, end=3)}, b"xxx"),
        "corrupt-file",
        AT,
    ),
    "hole between": (
        file_bytes({"a": entry(), "b": entry(begin=3, end=5)}, b"x" * 5),
        "corrupt-file",
        ("b", "data_offsets"),
    ),
    "overlap": (
        file_bytes({"a": entry(), "b": entry(begin=1, end=3)}, b"xxx"),
        "corrupt-file",
        ("b", "data_offsets"),
    ),
    "same range twice": (
        file_bytes({"a": entry(), "b": entry()}, b"xx"),
        "corrupt-file",
        ("b", "data_offsets"),
    ),
    "trailing bytes": (file_bytes({"a": entry()}, b"xxx"), "corrupt-file", (NAME,)),
    "data cut": (file_bytes({"a": entry()}, b"x"), "truncated-tensor", AT),
    "F4 that fills no byte": (
        file_bytes({"a": entry("F4", (3,), 0, 1)}, b"x"),
        "corrupt-file",
        ("a", "shape"),
    ),
    "F4 with an odd last axis": (
        file_bytes({"a": entry("F4", (2, 3), 0, 3)}, b"xxx"),
        "unsupported-feature",
        ("a", "shape"),
    ),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_files(case, tmp_path):
    data, code, loc = BAD_FILES[case]
    path = tmp_path / NAME
    path.write_bytes(data)
    with pytest.raises(FormatError) as caught:
        FORMAT.read(path)
    assert found(caught.value) == [(code, loc)]


# The library takes the last of two keys, and reads these dtypes and shapes.
TAKEN = {"name twice", "metadata twice", "F6", "F4 with an odd last axis"}


@pytest.mark.parametrize("case", [case for case in BAD_FILES if case not in TAKEN])
def test_the_library_refuses_them_too(case, tmp_path):
    library = pytest.importorskip("safetensors")
    path = tmp_path / NAME
    path.write_bytes(BAD_FILES[case][0])
    with pytest.raises(library.SafetensorError), library.safe_open(path, "np"):
        pass


def test_all_problems_are_told_at_once(tmp_path):
    path = tmp_path / NAME
    path.write_bytes(file_bytes({"a": 1, "b": entry("F128"), "c": entry(shape=(-1,))}))
    with pytest.raises(FormatError) as caught:
        FORMAT.read(path)
    assert [loc for _, loc in found(caught.value)] == [("a",), ("b", "dtype"), ("c", "shape")]


@pytest.fixture
def good(tmp_path) -> Path:
    path = tmp_path / NAME
    items = {"w": array_tensor((2, 3)), "b": array_tensor((3,), "bfloat16")}
    raw = RawTree(format="safetensors", root=dict_of(items))
    write_layout(FORMAT.layout(raw, path), path)
    return path


def test_truncation_everywhere(good):
    data = good.read_bytes()
    for end in range(len(data)):
        good.write_bytes(data[:end])
        with pytest.raises(FormatError) as caught:
            FORMAT.read(good)
        assert {code for code, _ in found(caught.value)} <= {"truncated-file", "truncated-tensor"}


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_a_damaged_file_is_read_or_refused(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("flip") / NAME
    items = {"w": array_tensor((2,)), "b": array_tensor((3,), "uint8")}
    write_layout(FORMAT.layout(RawTree(format="safetensors", root=dict_of(items)), path), path)
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content)
    try:
        raw = FORMAT.read(path)
    except FormatError:
        return
    for _, tensor in raw.root.items:
        tensor.read()
    DIALECT.lift(raw)


# -- indexes -------------------------------------------------------------------------------------------


def index(tmp_path: Path, weight_map, **files) -> Path:
    for name, content in files.items():
        (tmp_path / f"{name}.safetensors").write_bytes(content)
    path = tmp_path / "m.safetensors.index.json"
    path.write_text(json.dumps({"metadata": {"total_size": 0}, "weight_map": weight_map}))
    return path


ONE = file_bytes({"a": entry()}, b"xx")
BOTH = file_bytes({"a": entry(), "b": entry(begin=2, end=4)}, b"xxyy")


@pytest.mark.parametrize(
    "name", ["../x.safetensors", "/etc/passwd", "a/b.safetensors", "..", ".", "", "a\\b", "C:x", "x\0", "x\n"]
)
def test_names_never_leave_the_directory(tmp_path, name):
    with pytest.raises(FormatError) as caught:
        FORMAT.read(index(tmp_path, {"a": name}))
    assert found(caught.value) == [("unsafe-path", ("weight_map", name))]


INDEXES = [
    ({"a": "none.safetensors"}, {}, "missing-file", ("none.safetensors",)),
    ({"a": "x.safetensors", "z": "x.safetensors"}, {"x": ONE}, "corrupt-file", ("weight_map", "z")),
    ({"a": "x.safetensors"}, {"x": BOTH}, "corrupt-file", ("x.safetensors", "b")),
    (
        {"a": "x.safetensors", "b": "y.safetensors"},
        {"x": ONE, "y": BOTH},
        "duplicate-key",
        ("y.safetensors", "a"),
    ),
    ({"a": "x.safetensors"}, {"x": ONE[:-1]}, "truncated-tensor", AT),
    ({"a": 1}, {}, "corrupt-file", ("m.safetensors.index.json",)),
    ([], {}, "corrupt-file", ("m.safetensors.index.json",)),
]


@pytest.mark.parametrize(("weight_map", "files", "code", "loc"), INDEXES)
def test_bad_indexes(tmp_path, weight_map, files, code, loc):
    with pytest.raises(FormatError) as caught:
        FORMAT.read(index(tmp_path, weight_map, **files))
    assert (code, loc) in found(caught.value)


def test_a_name_twice_in_an_index(tmp_path):
    path = tmp_path / "m.safetensors.index.json"
    path.write_text('{"weight_map": {"a": "x.safetensors", "a": "y.safetensors"}}')
    with pytest.raises(FormatError) as caught:
        FORMAT.read(path)
    assert found(caught.value) == [("duplicate-key", (path.name,))]


def test_a_link_to_a_file_is_followed_and_a_pipe_is_not_opened(tmp_path):
    (tmp_path / "blob").write_bytes(ONE)
    (tmp_path / "x.safetensors").symlink_to("blob")
    assert FORMAT.read(index(tmp_path, {"a": "x.safetensors"})).root.keys == ("a",)
    (tmp_path / "x.safetensors").unlink()
    os.mkfifo(tmp_path / "x.safetensors")
    with pytest.raises(FormatError) as caught:
        FORMAT.read(tmp_path / "m.safetensors.index.json")
    assert found(caught.value) == [("missing-file", ("x.safetensors",))]
    assert not FORMAT.sniff(tmp_path / "x.safetensors")


def test_two_notes_that_differ(tmp_path):
    first = file_bytes({"__metadata__": {"ckptconv": "1"}, "a": entry()}, b"xx")
    second = file_bytes({"__metadata__": {"ckptconv": "2"}, "b": entry()}, b"xx")
    path = index(tmp_path, {"a": "x.safetensors", "b": "y.safetensors"}, x=first, y=second)
    with pytest.raises(FormatError) as caught:
        FORMAT.read(path)
    assert found(caught.value) == [("corrupt-file", (path.name,))]


def test_a_note_that_is_none(tmp_path):
    path = tmp_path / NAME
    path.write_bytes(file_bytes({"__metadata__": {"ckptconv": "{"}, "a": entry()}, b"xx"))
    raw = FORMAT.read(path)
    with pytest.raises(CkptError) as caught:
        DIALECT.lift(raw)
    assert found(caught.value) == [("corrupt-file", ("ckptconv",))]


# -- trees that cannot be written ----------------------------------------------------------------------

W = array_tensor()
BAD_TREES = [
    (None, {}, "unsupported-feature", ()),
    (DictNode(items=((1, W),)), {}, "unsupported-feature", (1,)),
    (dict_of({"a": 1.0}), {}, "unsupported-feature", ("a",)),
    (dict_of({"a": ListNode()}), {}, "unsupported-feature", ("a",)),
    (dict_of({"__metadata__": W}), {}, "unsupported-feature", ("__metadata__",)),
    (DictNode(items=(("a", W), ("a", W))), {}, "duplicate-key", ("a",)),
    (dict_of({"\ud800": W}), {}, "unsupported-feature", ("\ud800",)),
    (dict_of({"a": W}), {"who": "\ud800"}, "schema-invalid", ()),
    (dict_of({"a": W}), {"step": 3}, "unsupported-feature", ("__metadata__", "step")),
    (dict_of({"a": W}), {"shard_nbytes": 0}, "usage", ("shard_nbytes",)),
    (dict_of({"a": W, "who": W}), {"who": "me"}, "duplicate-key", ("who",)),
]


@pytest.mark.parametrize(("root", "attributes", "code", "loc"), BAD_TREES)
def test_bad_trees(tmp_path, root, attributes, code, loc):
    raw = RawTree(format="safetensors", root=root, attributes=attributes)
    with pytest.raises(CkptError) as caught:
        FORMAT.layout(raw, tmp_path / NAME)
    assert found(caught.value) == [(code, loc)]


def test_a_header_that_no_reader_takes(tmp_path):
    raw = RawTree(format="safetensors", root=dict_of({"a": W}), note="x" * MAX_HEADER_NBYTES)
    with pytest.raises(CkptError) as caught:
        FORMAT.layout(raw, tmp_path / NAME)
    assert found(caught.value) == [("limit-exceeded", (NAME,))]


def test_an_old_single_file_would_hide_new_shards(good):
    raw = RawTree(format="safetensors", root=dict_of({"a": W}), attributes={"shard_nbytes": 8})
    with pytest.raises(CkptError) as caught:
        FORMAT.layout(raw, good)
    assert found(caught.value) == [("target-exists", (NAME,))]
