"""Damaged and hostile checkpoints of TensorFlow's first format: each gives a code and a place."""

from __future__ import annotations

import random
import shutil
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest

from ckptconv.detect import read_raw
from ckptconv.errors import CkptError
from ckptconv.formats import protos
from ckptconv.formats.ordered_code import FULL, slice_key
from ckptconv.formats.sstable import MAGIC
from ckptconv.formats.tensor_bundle import FORMAT
from ckptconv.formats.varint import write_varint
from ckptconv.rawtree import DictNode
from ckptconv.rereading import check_sources
from ckptconv.tensor import TensorRef
from tests.support.tables import Entries, assembled, block, entries_of, table_of

FIXTURES = Path(__file__).parents[2] / "fixtures"
FLOAT, INT8, STRING, INT64, BOOL, BFLOAT16 = 1, 6, 7, 9, 10, 14
Problems = list[tuple[str, tuple[str | int, ...]]]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "model.ckpt-1"


def field(number: int, data: bytes) -> bytes:
    return write_varint(number << 3 | 2) + write_varint(len(data)) + data


def slice_proto(*extents: tuple[int, int]) -> bytes:
    proto = protos.new(protos.TensorSliceProto)
    for start, length in extents:
        extent = proto.extent.add()
        if (start, length) != FULL:
            extent.start, extent.length = start, length
    return proto.SerializeToString()


Described = tuple[str, int, tuple[int, ...], list[bytes]]


def meta(*tensors: Described, consumer: int = 0) -> bytes:
    proto = protos.new(protos.SavedTensorSlices)
    proto.meta.versions.producer = 1
    proto.meta.versions.min_consumer = consumer
    for name, dtype, shape, slices in tensors:
        one = proto.meta.tensor.add()
        one.name, one.type = name, dtype
        one.shape.SetInParent()
        for size in shape:
            one.shape.dim.add().size = size
        for data in slices:
            one.slice.add().MergeFromString(data)
    return proto.SerializeToString()


def value(tensor: bytes, name: str = "a", extents: bytes = slice_proto(FULL)) -> bytes:
    return field(2, field(1, name.encode()) + field(2, extents) + field(3, tensor))


VECTOR = field(5, struct.pack("<4f", 1, 2, 3, 4))
A: Described = ("a", FLOAT, (4,), [slice_proto(FULL)])
KEY = slice_key("a", (FULL,))


def written(path: Path, *entries: tuple[bytes, bytes]) -> Path:
    path.write_bytes(table_of(list(entries)))
    return path


def problems(path: Path) -> Problems:
    """Of a pass over everything."""
    with pytest.raises(CkptError) as caught:
        content(path)
    assert all(problem.hint for problem in caught.value.problems)
    return [(problem.code, problem.loc) for problem in caught.value.problems]


def content(path: Path) -> object:
    root = FORMAT.read(path).root
    assert isinstance(root, DictNode)
    tensors = {str(key): node for key, node in root.items if isinstance(node, TensorRef)}
    check_sources(extent for tensor in tensors.values() for extent in tensor.extents)
    return {key: (tensor.spec, tensor.read().tobytes()) for key, tensor in tensors.items()}


def attempt(path: Path) -> object:
    """The content, None where it is one of our errors."""
    try:
        return content(path)
    except CkptError:
        return None


def test_what_the_cases_below_change_is_sound(path: Path) -> None:
    assert len(str(content(written(path, (b"", meta(A)), (KEY, value(VECTOR)))))) > 0


def test_truncated(path: Path) -> None:
    data = (FIXTURES / "tf1/v1-adam/artifact/model.ckpt-5").read_bytes()
    for length in range(0, len(data) - len(MAGIC), 3):
        path.write_bytes(data[:length] + MAGIC)
        assert {code for code, _ in problems(path)} <= {"truncated-file", "corrupt-file", "checksum-mismatch"}
        path.write_bytes(data[:length])
        with pytest.raises(CkptError) as caught:
            read_raw(path)
        assert {problem.code for problem in caught.value.problems} == {"unknown-format"}


def test_flipped_bits(path: Path) -> None:
    data = (FIXTURES / "tf1/v1-adam/artifact/model.ckpt-5").read_bytes()
    path.write_bytes(data)
    before = content(path)
    for position in range(0, len(data) * 8, 13):
        flipped = bytearray(data)
        flipped[position // 8] ^= 1 << position % 8
        path.write_bytes(flipped)
        assert attempt(path) in (before, None)


def test_changed_bytes_behind_sound_checksums(path: Path) -> None:
    """Values changed and the checksums of the blocks made to fit: still an error or a tree."""
    rng = random.Random(5)
    shard = FIXTURES / "tensorflow/v1/v1-00000-of-00002"
    entries = entries_of(shard.read_bytes())
    told = 0
    for _ in range(300):
        number = rng.randrange(len(entries))
        key, data = entries[number]
        damaged = bytearray(data)
        for _ in range(rng.randint(1, 3)):
            damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        changed: Entries = [*entries[:number], (key, bytes(damaged)), *entries[number + 1 :]]
        path.write_bytes(table_of(changed))
        told += attempt(path) is None
    assert told > 50


CASES: dict[str, tuple[Callable[[], Entries], str, str]] = {
    "no meta": (lambda: [(KEY, value(VECTOR))], "corrupt-file", "model.ckpt-1"),
    "an index": (lambda: [(b"", bytes.fromhex("08011a020801"))], "unsupported-feature", "model.ckpt-1"),
    "a meta that is none": (lambda: [(b"", b"\x0a\xff")], "corrupt-file", "model.ckpt-1"),
    "a newer version": (
        lambda: [(b"", meta(A, consumer=2)), (KEY, value(VECTOR))], "unsupported-feature", "model.ckpt-1",
    ),
    "a slice is missing": (lambda: [(b"", meta(A))], "corrupt-file", "a"),
    "a slice of nothing": (lambda: [(b"", meta()), (KEY, value(VECTOR))], "corrupt-file", repr(KEY)),
    "a slice is stated twice": (
        lambda: [(b"", meta(("a", FLOAT, (4,), [slice_proto(FULL)] * 2))), (KEY, value(VECTOR))],
        "corrupt-file", "a",
    ),
    "described twice": (
        lambda: [(b"", meta(A, ("a", FLOAT, (5,), [slice_proto(FULL)]))), (KEY, value(VECTOR))],
        "corrupt-file", "a",
    ),
    "no slices": (lambda: [(b"", meta(("a", FLOAT, (4,), [])))], "corrupt-file", "a"),
    "a gap": (
        lambda: [
            (b"", meta(("a", FLOAT, (5,), [slice_proto((0, 4))]))),
            (slice_key("a", ((0, 4),)), value(VECTOR, extents=slice_proto((0, 4)))),
        ],
        "corrupt-file", "a",
    ),
    "a slice outside": (
        lambda: [(b"", meta(("a", FLOAT, (4,), [slice_proto((2, 4))])))], "corrupt-file", "a",
    ),
    "a slice of another rank": (
        lambda: [(b"", meta(("a", FLOAT, (4,), [slice_proto(FULL, FULL)])))], "corrupt-file", "a",
    ),
    "an unknown dtype": (lambda: [(b"", meta(("a", 99, (4,), [])))], "unknown-dtype", "a"),
    "a dtype that was never saved so": (
        lambda: [(b"", meta(("a", BFLOAT16, (4,), [])))], "unsupported-feature", "a",
    ),
    "a negative shape": (lambda: [(b"", meta(("a", FLOAT, (-4,), [])))], "corrupt-file", "a"),
    "too many axes": (lambda: [(b"", meta(("a", FLOAT, (1,) * 40, [])))], "limit-exceeded", "a"),
    "too many elements": (lambda: [(b"", meta(("a", FLOAT, (2**40, 2**40), [])))], "limit-exceeded", "a"),
    "the value of another tensor": (
        lambda: [(b"", meta(A)), (KEY, value(VECTOR, name="b"))], "corrupt-file", "a",
    ),
    "the value of another slice": (
        lambda: [(b"", meta(A)), (KEY, value(VECTOR, extents=slice_proto((0, 4))))], "corrupt-file", "a",
    ),
    "a value that is a meta": (lambda: [(b"", meta(A)), (KEY, meta(A))], "corrupt-file", "a"),
    "an empty value": (lambda: [(b"", meta(A)), (KEY, b"")], "corrupt-file", "a"),
    "a field longer than its message": (
        lambda: [(b"", meta(A)), (KEY, value(VECTOR)[:-3])], "corrupt-file", "a",
    ),
    "floats as doubles": (
        lambda: [(b"", meta(A)), (KEY, value(field(6, bytes(32))))], "corrupt-file", "a",
    ),
    "unpacked": (
        lambda: [(b"", meta(A)), (KEY, value(b"\x2d" + bytes(4)))], "unsupported-feature", "a",
    ),
    "two runs": (lambda: [(b"", meta(A)), (KEY, value(VECTOR + VECTOR))], "corrupt-file", "a"),
    "too few floats": (lambda: [(b"", meta(A)), (KEY, value(field(5, bytes(12))))], "corrupt-file", "a"),
    "floats for none": (
        lambda: [(b"", meta(("a", FLOAT, (0,), [slice_proto(FULL)]))), (KEY, value(VECTOR))],
        "corrupt-file", "a",
    ),
    "a shape beyond its bytes": (
        lambda: [(b"", meta(("a", INT64, (2**50,), [slice_proto(FULL)]))), (KEY, value(field(10, b"\1")))],
        "corrupt-file", "a",
    ),
    "strings beyond their bytes": (
        lambda: [(b"", meta(("a", STRING, (2**50,), [slice_proto(FULL)]))), (KEY, value(field(8, b"x")))],
        "corrupt-file", "a",
    ),
    "too few strings": (
        lambda: [(b"", meta(("a", STRING, (2,), [slice_proto(FULL)]))), (KEY, value(field(8, b"xyz")))],
        "corrupt-file", "a",
    ),
    "slices of strings": (
        lambda: [
            (b"", meta(("a", STRING, (2,), [slice_proto((0, 1)), slice_proto((1, 1))]))),
            *(
                (slice_key("a", ((at, 1),)), value(field(8, b"x"), extents=slice_proto((at, 1))))
                for at in (0, 1)
            ),
        ],
        "unsupported-feature", "a",
    ),
    **{
        f"numbers: {name}": (
            lambda dtype=dtype, number=number, data=data: [  # type: ignore[misc]
                (b"", meta(("a", dtype, (2,), [slice_proto(FULL)]))),
                (KEY, value(field(number, data))),
            ],
            "corrupt-file", "a",
        )
        for name, dtype, number, data in (
            ("three", INT64, 10, b"\1\2\3"),
            ("one", INT64, 10, b"\x81\1"),
            ("unfinished", INT64, 10, b"\1\x81\x81"),
            ("over 64 bits", INT64, 10, b"\1" + b"\xff" * 9 + b"\2"),
            ("eleven bytes", INT64, 10, b"\x80" * 10 + b"\1\1"),
            ("beyond int8", INT8, 7, b"\1" + write_varint(128)),
            ("below int8", INT8, 7, b"\1" + write_varint(2**64 - 129)),
            ("a bool of 2", BOOL, 11, b"\1\2"),
        )
    },
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_every_contradiction_has_a_code(case: str, path: Path) -> None:
    entries, code, loc = CASES[case]
    found = problems(written(path, *entries()))
    assert (code, (loc,)) in found
    assert {told for told, _ in found} == {code}


def test_keys_that_share_or_repeat(path: Path) -> None:
    rows = [(b"", meta(A)), (KEY, value(VECTOR)), (KEY, value(VECTOR))]
    path.write_bytes(assembled([block(rows)], [(KEY + b"\xff", b"0")]))
    assert {code for code, _ in problems(path)} == {"duplicate-key"}


def test_a_compressed_block(path: Path) -> None:
    rows = [(b"", meta(A)), (KEY, value(VECTOR))]
    path.write_bytes(assembled([block(rows)], [(KEY + b"\xff", b"0")], compress=True))
    assert problems(path) == [("unsupported-feature", ("model.ckpt-1",))]


def test_a_block_of_a_thousand_million_restarts(path: Path) -> None:
    tracemalloc.start()
    path.write_bytes(assembled([bytes(60) + struct.pack("<I", 2**30)], [(b"z", b"0")]))
    assert problems(path) == [("corrupt-file", ("model.ckpt-1",))]
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1 << 20


def test_shards_that_are_not_all_there(tmp_path: Path) -> None:
    for shard in (FIXTURES / "tf1/v1-sharded/artifact").glob("model.ckpt-4-*"):
        shutil.copy(shard, tmp_path)
    (tmp_path / "model.ckpt-4-00001-of-00003").unlink()
    assert problems(tmp_path / "model.ckpt-4") == [("missing-file", ("model.ckpt-4",))]
    with pytest.raises(CkptError) as caught:
        read_raw(tmp_path / "model.ckpt-4-?????-of-00003")
    assert caught.value.problems[0].code == "missing-file"


def test_two_sets_of_shards(tmp_path: Path) -> None:
    for shard in (FIXTURES / "tf1/v1-sharded/artifact").glob("model.ckpt-4-*"):
        shutil.copy(shard, tmp_path)
    shutil.copy(tmp_path / "model.ckpt-4-00001-of-00003", tmp_path / "model.ckpt-4-00000-of-00001")
    assert problems(tmp_path / "model.ckpt-4") == [("checkpoint-ambiguous", ("model.ckpt-4",))]


def test_a_slice_in_two_shards(tmp_path: Path) -> None:
    source = written(tmp_path / "one", (b"", meta(A)), (KEY, value(VECTOR)))
    for shard in ("00000", "00001"):
        shutil.copy(source, tmp_path / f"m-{shard}-of-00002")
    assert ("duplicate-key", (repr(KEY),)) in problems(tmp_path / "m")


def test_shards_that_disagree(tmp_path: Path) -> None:
    written(tmp_path / "m-00000-of-00002", (b"", meta(A)), (KEY, value(VECTOR)))
    written(tmp_path / "m-00001-of-00002", (b"", meta(("a", FLOAT, (5,), []))))
    assert ("corrupt-file", ("a",)) in problems(tmp_path / "m")
