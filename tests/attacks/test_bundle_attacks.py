"""Damaged and hostile bundles: each gives a code and a place, and none more than its size in work."""

from __future__ import annotations

import os
import random
import shutil
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from ckptconv import dtypes
from ckptconv.errors import CkptError
from ckptconv.formats import protos, string_tensor
from ckptconv.formats.object_graph import ObjectGraph
from ckptconv.formats.ordered_code import slice_key
from ckptconv.formats.string_tensor import EncodedTensor
from ckptconv.formats.tensor_bundle import FORMAT, NOTE_KEY
from ckptconv.formats.varint import write_varint
from ckptconv.rawtree import DictNode, Node, RawTree, dict_of
from ckptconv.tensor import StoredTensor, TensorRef, TensorSpec
from tests.support.tables import Entries, rewrite
from tests.support.write_layout import write_layout

FIXTURE = Path(__file__).parents[2] / "fixtures/tensorflow/bundle"
Problems = list[tuple[str, tuple[str | int, ...]]]
Change = Callable[[protos.BundleEntryProto], None]


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """A copy of the fixture; its prefix."""
    for path in FIXTURE.glob("bundle.*"):
        shutil.copy(path, tmp_path)
    return tmp_path / "bundle"


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """Two vectors of four floats and a text; the prefix."""
    named: dict[str, Node] = {
        "a": StoredTensor.of_array(np.arange(4, dtype=np.float32)),
        "b": StoredTensor.of_array(np.arange(4, 8, dtype=np.float32)),
        "text": "some text",
    }
    prefix = tmp_path / "small"
    write_layout(FORMAT.layout(RawTree(format="tensorflow", root=dict_of(named)), prefix), prefix)
    return prefix


def problems(prefix: Path) -> Problems:
    with pytest.raises(CkptError) as caught:
        FORMAT.read(prefix)
    return [(problem.code, problem.loc) for problem in caught.value.problems]


def content(prefix: Path) -> object:
    """All that reading gives, strings decoded."""
    raw = FORMAT.read(prefix)
    assert isinstance(raw.root, DictNode)
    leaves = []
    for key, tensor in raw.root.items:
        assert isinstance(tensor, TensorRef)
        recorded = tensor.entry_checksum if isinstance(tensor, EncodedTensor) else tensor.extents[0].checksum
        leaves.append((key, tensor.spec, recorded, tensor.read().tobytes()))
    return leaves, raw.attributes, raw.note


def attempt(what: Callable[[Path], object], prefix: Path) -> object:
    """What it gives, or the error that is one of ours."""
    try:
        return what(prefix)
    except CkptError as error:
        return error


def is_told(outcome: object) -> bool:
    return isinstance(outcome, CkptError) and all(
        problem.loc and problem.hint for problem in outcome.problems
    )


def index_of(prefix: Path) -> Path:
    return Path(f"{prefix}.index")


def edit(prefix: Path, key: str | bytes, change: Change) -> None:
    """Change one entry of a bundle, keeping its index a sound table."""
    wanted = key.encode() if isinstance(key, str) else key

    def changed(entries: Entries) -> Entries:
        out = []
        for name, data in entries:
            if name == wanted:
                entry = protos.parse(protos.BundleEntryProto, data, ())
                change(entry)
                data = entry.SerializeToString()
            out.append((name, data))
        return out

    rewrite(index_of(prefix), changed)


def replace_value(prefix: Path, key: bytes, value: bytes) -> None:
    rewrite(index_of(prefix), lambda entries: [(k, value if k == key else v) for k, v in entries])


def set_shape(entry: protos.BundleEntryProto, *sizes: int) -> None:
    entry.shape.ClearField("dim")
    for size in sizes:
        entry.shape.dim.add().size = size


def test_truncated_index(bundle: Path) -> None:
    data = index_of(bundle).read_bytes()
    for length in range(len(data)):
        index_of(bundle).write_bytes(data[:length])
        for code, loc in problems(bundle):
            assert code in ("truncated-file", "corrupt-file", "checksum-mismatch")
            assert loc == ("bundle.index",)


def test_flipped_bits_of_the_index(small: Path) -> None:
    data, before = index_of(small).read_bytes(), content(small)
    for position in range(len(data) * 8):
        flipped = bytearray(data)
        flipped[position // 8] ^= 1 << position % 8
        index_of(small).write_bytes(flipped)
        outcome = attempt(content, small)
        assert outcome == before or is_told(outcome)


def test_flipped_bits_behind_sound_checksums(bundle: Path) -> None:
    """Values changed and the checksums of the blocks made to fit: still an error or a tree."""
    rng = random.Random(1)
    data = index_of(bundle).read_bytes()
    for _ in range(600):

        def flip(entries: Entries) -> Entries:
            at = rng.randrange(len(entries))
            key, value = entries[at]
            changed = bytearray(value)
            changed[rng.randrange(len(changed))] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))
            return [*entries[:at], (key, bytes(changed)), *entries[at + 1 :]]

        index_of(bundle).write_bytes(data)
        rewrite(index_of(bundle), flip)
        outcome = attempt(FORMAT.read, bundle)
        assert isinstance(outcome, RawTree) or is_told(outcome)


def test_flipped_bits_of_a_string(small: Path) -> None:
    """A string's checksum is not over its raw bytes; every pass over them verifies it all the same."""
    shard = Path(f"{small}.data-00000-of-00001")
    data = shard.read_bytes()
    raw = FORMAT.read(small)
    assert isinstance(raw.root, DictNode)
    text = raw.root.get("text")
    assert isinstance(text, TensorRef)
    (extent,) = text.extents
    assert string_tensor.read_strings(text) == [b"some text"]
    for position in range(8 * extent.offset, 8 * (extent.offset + extent.nbytes)):
        flipped = bytearray(data)
        flipped[position // 8] ^= 1 << position % 8
        shard.write_bytes(flipped)
        for consume in (string_tensor.read_strings, lambda tensor: list(tensor.windows(3))):
            with pytest.raises(CkptError) as caught:
                consume(text)
            assert caught.value.problems[0].code in ("checksum-mismatch", "corrupt-file")


def test_truncated_and_missing_shards(bundle: Path) -> None:
    shard = Path(f"{bundle}.data-00001-of-00002")
    data = shard.read_bytes()
    for length in range(len(data)):
        shard.write_bytes(data[:length])
        assert {code for code, _ in problems(bundle)} == {"truncated-tensor"}
    assert problems(bundle)[0][1] == ("second/float32",)
    shard.unlink()
    assert problems(bundle) == [("missing-file", ("bundle.data-00001-of-00002",))]


def test_a_pipe_is_no_shard(small: Path) -> None:
    shard = Path(f"{small}.data-00000-of-00001")
    shard.unlink()
    os.mkfifo(shard)
    assert problems(small) == [("missing-file", ("small.data-00000-of-00001",))]
    index_of(small).unlink()
    os.mkfifo(index_of(small))
    assert not FORMAT.sniff(small)
    assert problems(small) == [("missing-file", ("small.index",))]


def change_offset(entry: protos.BundleEntryProto) -> None:
    entry.offset = 12


def change_negative_offset(entry: protos.BundleEntryProto) -> None:
    entry.offset = -16


def change_far_offset(entry: protos.BundleEntryProto) -> None:
    entry.offset = 2**63 - 17


def change_size(entry: protos.BundleEntryProto) -> None:
    entry.size = 20


def change_shape(entry: protos.BundleEntryProto) -> None:
    set_shape(entry, 5)


def change_negative_shape(entry: protos.BundleEntryProto) -> None:
    set_shape(entry, -2, -2)


def change_overflow(entry: protos.BundleEntryProto) -> None:
    set_shape(entry, 2**32, 2**32)
    entry.size = 0


def change_hidden_overflow(entry: protos.BundleEntryProto) -> None:
    set_shape(entry, 2**62, 0, 2**62)
    entry.size = 0


def change_rank(entry: protos.BundleEntryProto) -> None:
    set_shape(entry, 4, *[1] * 32)


def change_dtype(entry: protos.BundleEntryProto) -> None:
    entry.dtype = 20


def change_reference_dtype(entry: protos.BundleEntryProto) -> None:
    entry.dtype = 101


def change_shard(entry: protos.BundleEntryProto) -> None:
    entry.shard_id = 1


def change_negative_shard(entry: protos.BundleEntryProto) -> None:
    entry.shard_id = -1


def change_name(entry: protos.BundleEntryProto) -> None:
    entry.shape.dim[0].name = "batch"


def change_unknown_rank(entry: protos.BundleEntryProto) -> None:
    entry.shape.unknown_rank = True


def change_to_strings(entry: protos.BundleEntryProto) -> None:
    entry.dtype = 7
    set_shape(entry, 2**40)


def change_to_partitioned(entry: protos.BundleEntryProto) -> None:
    entry.slices.add().extent.add()


@pytest.mark.parametrize(
    ("change", "code"),
    [
        (change_offset, "corrupt-file"),
        (change_negative_offset, "corrupt-file"),
        (change_far_offset, "truncated-tensor"),
        (change_size, "corrupt-file"),
        (change_shape, "corrupt-file"),
        (change_negative_shape, "corrupt-file"),
        (change_overflow, "limit-exceeded"),
        (change_hidden_overflow, "limit-exceeded"),
        (change_rank, "limit-exceeded"),
        (change_dtype, "unknown-dtype"),
        (change_reference_dtype, "unknown-dtype"),
        (change_shard, "corrupt-file"),
        (change_negative_shard, "corrupt-file"),
        (change_name, "unsupported-feature"),
        (change_unknown_rank, "unsupported-feature"),
        (change_to_strings, "corrupt-file"),
        (change_to_partitioned, "corrupt-file"),
    ],
)
def test_entries_that_cannot_be(small: Path, change: Change, code: str) -> None:
    edit(small, "b", change)
    assert problems(small) == [(code, ("b",))]


def test_all_problems_are_told_at_once(small: Path) -> None:
    edit(small, "a", change_size)
    edit(small, "b", change_dtype)
    assert problems(small) == [("corrupt-file", ("a",)), ("unknown-dtype", ("b",))]


@pytest.mark.parametrize(
    ("value", "code"),
    [
        (b"\xff", "corrupt-file"),
        (b"\x0b" * 100_000, "corrupt-file"),
        (b"\x08" + b"\xff" * 11, "corrupt-file"),
        (b"\x12\xff\xff\xff\xff\x0f", "corrupt-file"),
        (b"\x48\x01", "unsupported-feature"),
    ],
)
def test_entries_that_are_none(small: Path, value: bytes, code: str) -> None:
    replace_value(small, b"b", value)
    assert problems(small) == [(code, ("b",))]


@pytest.mark.parametrize(
    ("header", "code"),
    [
        (b"", "corrupt-file"),  # no shards
        (bytes.fromhex("0801 1002 1a020801"), "corrupt-file"),  # endianness 2
        (bytes.fromhex("0801 1a0408011002"), "unsupported-feature"),  # min_consumer 2
        (bytes.fromhex("0801 1a0508011a0101"), "unsupported-feature"),  # bad_consumers [1]
        (b"\x08" + write_varint(2**31 - 1), "corrupt-file"),
        (b"\x08" + write_varint(2**64 - 1), "corrupt-file"),
        (bytes.fromhex("0801 2001"), "unsupported-feature"),
        (b"\x0a", "corrupt-file"),
    ],
)
def test_headers(small: Path, header: bytes, code: str) -> None:
    replace_value(small, b"", header)
    assert problems(small) == [(code, ("small.index",))]


def test_no_header(small: Path) -> None:
    rewrite(index_of(small), lambda entries: entries[1:])
    assert problems(small) == [("corrupt-file", ("small.index",))]


def test_many_shards_are_not_written_again(small: Path) -> None:
    """A header alone must not make thousands of files."""
    replace_value(small, b"", b"\x08" + write_varint(90_000))
    Path(f"{small}.data-00000-of-00001").rename(f"{small}.data-00000-of-90000")
    raw = FORMAT.read(small)
    assert raw.attributes["num_shards"] == 90_000
    assert [file.name for file in FORMAT.layout(raw, Path("x")).files] == ["x.data-00000-of-00001", "x.index"]


def test_keys_that_are_not_text(small: Path) -> None:
    rewrite(index_of(small), lambda entries: [(b"b\xff" if k == b"b" else k, v) for k, v in entries])
    assert [code for code, _ in problems(small)] == ["unsupported-feature"]


def test_keys_are_no_paths(small: Path) -> None:
    rewrite(index_of(small), lambda entries: sorted((b"../../x" if k == b"b" else k, v) for k, v in entries))
    raw = FORMAT.read(small)
    assert isinstance(raw.root, DictNode)
    assert raw.root.keys == ("../../x", "a", "text")
    assert [file.name for file in FORMAT.layout(raw, small).files] == [
        "small.data-00000-of-00001",
        "small.index",
    ]


GRID, ROWS = "partitioned/grid", "partitioned/rows"


def test_slices_that_do_not_cover(bundle: Path) -> None:
    whole = index_of(bundle).read_bytes()

    def parts(*extents: tuple[int, int]) -> Change:
        def change(entry: protos.BundleEntryProto) -> None:
            entry.ClearField("slices")
            for start, length in extents:
                axes = entry.slices.add().extent
                extent = axes.add()
                extent.start, extent.length = start, length
                axes.add()

        return change

    edit(bundle, ROWS, parts((0, 2), (2, 2)))  # a gap, and a slice of nobody
    assert {code for code, _ in problems(bundle)} == {"corrupt-file"}
    index_of(bundle).write_bytes(whole)
    edit(bundle, ROWS, parts((0, 2), (2, 2), (3, 2)))  # a slice that is not there
    assert ("corrupt-file", (ROWS,)) in problems(bundle)
    index_of(bundle).write_bytes(whole)
    edit(bundle, ROWS, parts((0, 2), (2, 2), (4, 1), (4, 1)))  # one twice
    assert problems(bundle) == [("corrupt-file", (ROWS,))]
    index_of(bundle).write_bytes(whole)
    edit(bundle, ROWS, parts((0, 2), (2, 2), (4, 2)))  # outside
    assert problems(bundle) == [("corrupt-file", (ROWS,))]
    index_of(bundle).write_bytes(whole)
    edit(bundle, ROWS, parts((0, 2), (2, 2), (-1, 1)))
    assert problems(bundle) == [("corrupt-file", (ROWS,))]


def test_slices_that_are_something_else(bundle: Path) -> None:
    whole, key = index_of(bundle).read_bytes(), slice_key(ROWS, ((4, 1), (0, -1)))
    for change in (change_shape, change_dtype_to_int):
        index_of(bundle).write_bytes(whole)
        edit(bundle, key, change)
        assert "corrupt-file" in {code for code, _ in problems(bundle)}
    rewrite(index_of(bundle), lambda entries: [(k, v) for k, v in entries if k != ROWS.encode()])
    assert {code for code, _ in problems(bundle)} == {"corrupt-file"}


def change_dtype_to_int(entry: protos.BundleEntryProto) -> None:
    entry.dtype = 3


def test_a_pinwheel_is_no_grid(tmp_path: Path) -> None:
    """Five slices that cover 3 x 3 and that no straight cut separates."""
    pieces = [((0, 1), (0, 2)), ((0, 2), (2, 1)), ((2, 1), (1, 2)), ((1, 2), (0, 1)), ((1, 1), (1, 1))]
    prefix = tmp_path / "x"
    named: dict[str, Node] = {
        f"p{i}": StoredTensor.of_array(np.zeros((rows[1], columns[1]), np.float32))
        for i, (rows, columns) in enumerate(pieces)
    }
    write_layout(FORMAT.layout(RawTree(format="tensorflow", root=dict_of(named)), prefix), prefix)

    def partition(entries: Entries) -> Entries:
        logical = protos.new(protos.BundleEntryProto)
        logical.dtype = 1
        set_shape(logical, 3, 3)
        out = [entries[0]]
        for extents, (_, data) in zip(pieces, entries[1:], strict=True):
            axes = logical.slices.add().extent
            for start, length in extents:
                extent = axes.add()
                extent.start, extent.length = start, length
            out.append((slice_key("w", extents), data))
        return sorted([*out, (b"w", logical.SerializeToString())])

    rewrite(index_of(prefix), partition)
    assert problems(prefix) == [("unsupported-feature", ("w",))]


def test_a_small_index_does_not_become_large(small: Path) -> None:
    """Lengths beyond the file, thousandfold shapes and strings: nothing is allocated for them."""
    edit(small, "b", change_to_strings)
    tracemalloc.start()
    problems(small)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 4 << 20


@pytest.mark.parametrize(
    "encoded",
    [
        b"",
        b"\x01",
        b"\x80" * 12,
        b"\xff\xff\xff\xff\x0f" + b"\0" * 4,
        write_varint(2**64 - 1) + b"\0" * 4,
        string_tensor.encode([b"ab"]) + b"c",
        string_tensor.encode([b"ab", b"c"]),
        string_tensor.encode([b"ab"])[:-1],
        string_tensor.encode([b""])[:-1],
    ],
)
def test_encoded_strings(encoded: bytes) -> None:
    with pytest.raises(CkptError) as caught:
        string_tensor.decode(encoded, 1, ("key",))
    assert [(p.code, p.loc) for p in caught.value.problems] in (
        [("corrupt-file", ("key",))],
        [("checksum-mismatch", ("key",))],
    )


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
def test_strings_in_pieces_of_any_size(size: int) -> None:
    elements = [b"", b"a" * 300, b"\0", b"bcd"] * 5
    data = string_tensor.encode(elements)
    spec = TensorSpec(dtype=string_tensor.STRING, shape=(20,), encoded_nbytes=len(data))
    whole, scan = string_tensor.Scan(spec, ()), string_tensor.Scan(spec, ())
    whole.update(data)
    for at in range(0, len(data), size):
        scan.update(data[at : at + size])
    assert scan.finish() == whole.finish()
    assert string_tensor.decode(data, 20) == elements


def test_state_files(small: Path) -> None:
    state = small.parent / "checkpoint"
    shutil.copy(index_of(small), small.parent / "other.index")

    def chosen(path: str) -> object:
        state.write_text(f'model_checkpoint_path: "{path}"\n')
        return FORMAT.read(small.parent).attributes["prefix"]

    assert chosen("small") == "small"
    assert chosen("/elsewhere/that/is/gone/small") == "small"
    assert chosen("../../../small") == "small"
    assert chosen("C:\\\\runs\\\\small") == "small"
    for bad in ("gone", "..", "/", ""):
        state.write_text(f'model_checkpoint_path: "{bad}"\n')
        assert problems(small.parent) == [("usage", ("checkpoint",))]
    for data in (b"\xff\xfe", b"{", b'model_checkpoint_path: "a', b"nothing: 1", b"a {" * 5000):
        state.write_bytes(data)
        assert problems(small.parent) == [("corrupt-file", ("checkpoint",))]
        assert FORMAT.read(small).attributes["prefix"] == "small"
        with pytest.raises(CkptError):
            FORMAT.layout(FORMAT.read(small), small.parent / "new")
    state.unlink()
    assert problems(small.parent) == [("usage", ("checkpoint",))]
    (small.parent / "other.index").unlink()
    assert FORMAT.read(small.parent).attributes["prefix"] == "small"
    assert FORMAT.sniff(small.parent)
    index_of(small).unlink()
    assert not FORMAT.sniff(small.parent)
    assert problems(small.parent) == [("missing-file", ("checkpoint",))]


def test_paths(small: Path, tmp_path: Path) -> None:
    for path in (small, index_of(small), Path(f"{small}.data-00000-of-00001")):
        assert FORMAT.sniff(path)
        assert FORMAT.read(path).attributes["prefix"] == "small"
    assert not FORMAT.sniff(tmp_path / "nothing")
    assert problems(tmp_path / "nothing") == [("missing-file", ("nothing.index",))]
    (tmp_path / "text.index").write_text("no table")
    assert not FORMAT.sniff(tmp_path / "text")
    (tmp_path / "checkpoint").unlink()
    (tmp_path / "checkpoint").mkdir()
    with pytest.raises(CkptError) as caught:
        FORMAT.layout(FORMAT.read(small), tmp_path / "new")
    assert caught.value.problems[0].code == "target-unwritable"


def test_a_note_that_is_none(small: Path) -> None:
    raw = FORMAT.read(small)
    assert isinstance(raw.root, DictNode)
    foreign = dict_of({NOTE_KEY: StoredTensor.of_array(np.zeros(2, np.float32))})
    prefix = small.with_name("foreign")
    write_layout(FORMAT.layout(RawTree(format="tensorflow", root=foreign), prefix), prefix)
    again = FORMAT.read(prefix)
    assert again.note is None
    assert again.root.keys == (NOTE_KEY,)  # type: ignore[union-attr]
    with pytest.raises(CkptError) as caught:
        FORMAT.layout(RawTree(format="tensorflow", root=again.root, note="{}"), prefix)
    assert [(p.code, p.loc) for p in caught.value.problems] == [("duplicate-key", (NOTE_KEY,))]
    broken = dict_of({NOTE_KEY: b"\xff"})
    write_layout(FORMAT.layout(RawTree(format="tensorflow", root=broken), prefix), prefix)
    assert problems(prefix) == [("corrupt-file", (NOTE_KEY,))]


ARRAY = StoredTensor.of_array(np.zeros(2, np.float32))
E8M0 = StoredTensor.dense(TensorSpec(dtype=dtypes.BY_NAME["float8_e8m0fnu"], shape=(2,)), ARRAY.extent)


@pytest.mark.parametrize(
    ("pairs", "code"),
    [
        ([("a", 1)], "unsupported-feature"),
        ([("a", None)], "unsupported-feature"),
        ([("a", dict_of({"b": ARRAY}))], "unsupported-feature"),
        ([(3, ARRAY)], "unsupported-feature"),
        ([("", ARRAY)], "unsupported-feature"),
        ([("\0a", ARRAY)], "unsupported-feature"),
        ([("\udc80", ARRAY)], "unsupported-feature"),
        ([("a", ARRAY), ("a", ARRAY)], "duplicate-key"),
        ([("a", E8M0)], "unknown-dtype"),
    ],
)
def test_what_a_bundle_does_not_hold(pairs: list[tuple[Node, Node]], code: str, tmp_path: Path) -> None:
    with pytest.raises(CkptError) as caught:
        FORMAT.layout(RawTree(format="tensorflow", root=dict_of(pairs)), tmp_path / "x")
    assert [(p.code, p.loc) for p in caught.value.problems] == [(code, (str(pairs[-1][0]),))]


@pytest.mark.parametrize(
    "attributes",
    [
        {"shards": ("x",)},
        {"shards": ("-1:a",)},
        {"shards": 3},
        {"slices": ("[",)},
        {"slices": ("[" * 100_000,)},
        {"slices": ('["a", [2], [[[0, -1]]], []]',)},
        {"slices": ('["a", [2], [[]], [0]]',)},
        {"slices": ('["a", ["x"], [[[0, -1]]], [0]]',)},
        {"slices": ("{}",)},
    ],
)
def test_attributes_that_reading_does_not_give(attributes: dict[str, object], tmp_path: Path) -> None:
    raw = RawTree(format="tensorflow", root=dict_of({"a": ARRAY}), attributes=attributes)  # type: ignore[arg-type]
    with pytest.raises(CkptError) as caught:
        FORMAT.layout(raw, tmp_path / "x")
    assert [problem.code for problem in caught.value.problems] == ["schema-invalid"]


def test_slices_of_another_shape(tmp_path: Path) -> None:
    line = '["a", [3], [[[0, 1]], [[1, 2]]], [0, 0]]'
    raw = RawTree(format="tensorflow", root=dict_of({"a": ARRAY}), attributes={"slices": (line,)})
    with pytest.raises(CkptError) as caught:
        FORMAT.layout(raw, tmp_path / "x")
    assert [(p.code, p.loc) for p in caught.value.problems] == [("shape-mismatch", ("a",))]


def test_a_graph_of_empty_nodes_is_no_amplifier() -> None:
    data = b"\x0a\x00" * 50_000
    tracemalloc.start()
    graph = ObjectGraph.parse(data)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(graph.nodes) == 50_000
    assert peak < 200 * len(data)
