"""Damaged and hostile PyTorch files: each gives a code and nothing else, and nothing in them runs."""

from __future__ import annotations

import contextlib
import os
import pickle
import random
import struct
import zipfile
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from ckptconv.errors import CODES, CkptError
from ckptconv.formats.pickle_writer import pickle_tree
from ckptconv.formats.pytorch import PyTorchFormat
from ckptconv.rawtree import ListNode, Node, Opaque, RawTree, dict_of, walk
from ckptconv.source import FileSource
from ckptconv.tensor import StoredTensor, TensorRef, as_bytes
from tests.support.write_layout import write_layout

FORMAT = PyTorchFormat()
FLOATS = struct.pack("<6f", *range(6))


def call(name: str, *args: Node) -> Opaque:
    return Opaque(kind="call", name=name, args=args)


def tup(*items: Node) -> ListNode:
    return ListNode(items=items, kind="tuple")


def storage(
    key: Node = "0", class_: str = "torch.FloatStorage", numel: Node = 6, first: Node = "storage"
) -> Opaque:
    return Opaque(
        kind="persistent", args=(tup(first, Opaque(kind="global", name=class_), key, "cpu", numel),)
    )


def tensor(
    base: Node = None, offset: Node = 0, size: Node = (6,), stride: Node = (1,), *more: Node
) -> Opaque:
    def sizes(value: Node) -> Node:
        return tup(*value) if isinstance(value, tuple) else value

    more = more or (False, call("collections.OrderedDict"))
    return call(
        "torch._utils._rebuild_tensor_v2", base or storage(), offset, sizes(size), sizes(stride), *more
    )


def archive(root: Node | bytes, path: Path, records: dict[str, bytes] | None = None, **options: Any) -> Path:
    """A torch file with this object, made by python's zipfile."""

    def encode(node: Node) -> Node:
        return call("_codecs.encode", node.decode("latin1"), "latin1") if isinstance(node, bytes) else node

    data = root if isinstance(root, bytes) else pickle_tree(root, encode)[0]
    with zipfile.ZipFile(path, "w", **options) as file:
        for name, content in {
            "data.pkl": data,
            "version": b"3\n",
            "data/0": FLOATS,
            **(records or {}),
        }.items():
            file.writestr(f"a/{name}", content)
    return path


def everything(raw: RawTree) -> list[Any]:
    """All leaves, tensors read; recorded checksums are compared as the engine does."""
    leaves: list[Any] = []
    for path, node in walk(raw.root):
        if isinstance(node, TensorRef):
            for extent in node.extents:
                data = bytearray(extent.nbytes)
                extent.read_into(0, memoryview(data))
                if extent.checksum is not None and zlib.crc32(data) != extent.checksum.value:
                    raise CkptError.of("checksum-mismatch", "differs", "as the engine says", loc=path)
            leaves.append((path, node.dtype.name, node.shape, as_bytes(node.read()).tobytes()))
        else:
            leaves.append((path, repr(node)))
    return leaves


def code(path: Path) -> str:
    """The code that reading everything in the file gives."""
    with pytest.raises(CkptError) as caught:
        everything(FORMAT.read(path))
    for problem in caught.value.problems:
        assert problem.code in CODES
        assert problem.loc
        assert problem.hint
    return caught.value.problems[0].code


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """What our own writer makes, which is what torch makes."""
    root = dict_of({"w": StoredTensor.of_array(_floats()), "n": 3, "t": "text", "b": b"\x00\xff"})
    path = tmp_path / "small.pt"
    raw = RawTree(format="pytorch", root=root, attributes={"alignment": 8})
    write_layout(FORMAT.layout(raw, path), path)
    assert everything(FORMAT.read(path))
    return path


def _floats() -> Any:
    import numpy as np

    return np.arange(6, dtype="<f4")


def test_truncation_at_every_byte(small: Path) -> None:
    data = small.read_bytes()
    target = small.with_name("cut.pt")
    for length in range(len(data)):
        target.write_bytes(data[:length])
        assert code(target) in ("truncated-file", "corrupt-file", "unknown-format")
    for length in range(70, len(data), 50):
        target.write_bytes(data[:length])
        assert FORMAT.sniff(target), "a cut file is still recognised, so that the error names its damage"


def test_every_byte_flipped(small: Path) -> None:
    """An error, or the same data: never other data."""
    data, expected = small.read_bytes(), everything(FORMAT.read(small))
    target = small.with_name("flipped.pt")
    rng = random.Random(0)
    for position in range(len(data)):
        flipped = bytearray(data)
        flipped[position] ^= 1 << rng.randrange(8)
        target.write_bytes(flipped)
        with contextlib.suppress(CkptError):
            assert everything(FORMAT.read(target)) == expected, position


def test_bytes_removed_inserted_and_swapped(small: Path) -> None:
    data, expected = small.read_bytes(), everything(FORMAT.read(small))
    target = small.with_name("moved.pt")
    rng = random.Random(1)
    for _ in range(300):
        at, length = rng.randrange(len(data)), rng.randrange(1, 9)
        inserted = rng.randbytes(rng.randrange(9))
        target.write_bytes(data[:at] + inserted + data[at + length :])
        with contextlib.suppress(CkptError):
            assert everything(FORMAT.read(target)) == expected


def test_code_in_a_pickle_does_not_run(tmp_path: Path) -> None:
    class Attack:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.system, (f"touch {tmp_path / 'owned'}",)

    for protocol in range(6):
        path = archive(pickle.dumps({"a": Attack()}, protocol), tmp_path / "a.pt")
        raw = FORMAT.read(path)
        everything(raw)
        with pytest.raises(CkptError) as caught:
            FORMAT.layout(raw, tmp_path / "b.pt")
        (problem,) = caught.value.problems
        assert problem.code == "opaque-globals"
        assert problem.loc in (("posix.system",), ("nt.system",))
    assert not (tmp_path / "owned").exists()
    assert not (tmp_path / "b.pt").exists()


def test_calls_dressed_as_harmless_ones_are_named(tmp_path: Path) -> None:
    attack = Opaque(kind="global", name="os.system")
    disguises: Iterable[Node] = (
        Opaque(kind="torch.subclass", name="os.system", args=(StoredTensor.of_array(_floats()),)),
        Opaque(kind="torch.parameter", args=(call("os.system", "x"), True)),
        dict_of([(tup(attack), 1)]),
        dict_of([("a", 1)], kind="os.system"),
        ListNode(items=("x",), kind="os.system"),
        Opaque(kind="apply", args=(call("builtins.getattr", attack, "x"), tup())),
        Opaque(kind="numpy.scalar", name="os.system", args=(StoredTensor.of_array(_floats()[0]),)),
    )
    for root in disguises:
        with pytest.raises(CkptError) as caught:
            FORMAT.layout(RawTree(format="pytorch", root=root), tmp_path / "b.pt")
        assert caught.value.problems[0].code == "opaque-globals"
        assert "os.system" in caught.value.problems[0].loc


HUGE = 1 << 70

TENSORS: dict[str, tuple[Node, str]] = {
    "beyond its storage": (tensor(offset=1), "corrupt-file"),
    "strides beyond": (tensor(size=(2, 2), stride=(5, 1)), "corrupt-file"),
    "negative offset": (tensor(offset=-1), "malformed-pickle"),
    "negative size": (tensor(size=(-1,)), "malformed-pickle"),
    "negative stride": (tensor(offset=5, stride=(-1,)), "malformed-pickle"),
    "huge offset": (tensor(offset=HUGE), "limit-exceeded"),
    "huge size": (tensor(size=(HUGE,)), "limit-exceeded"),
    "huge stride": (tensor(size=(0,), stride=(HUGE,)), "limit-exceeded"),
    "product beyond 64 bits": (tensor(size=(1 << 40, 1 << 40), stride=(0, 0)), "limit-exceeded"),
    "empty with huge axes": (tensor(size=(0, 1 << 62), stride=(1, 1)), "limit-exceeded"),
    "many axes": (tensor(size=(1,) * 65, stride=(1,) * 65), "limit-exceeded"),
    "repeated without end": (tensor(size=(1 << 40,), stride=(0,)), "limit-exceeded"),
    "a size of text": (tensor(size=("6",)), "malformed-pickle"),
    "a size of truth": (tensor(size=(True,)), "malformed-pickle"),
    "a size of floats": (tensor(size=(6.0,)), "malformed-pickle"),
    "no tuple": (tensor(size=6), "malformed-pickle"),
    "other ranks": (tensor(size=(2, 3), stride=(1,)), "corrupt-file"),
    "no storage": (tensor(base=tup()), "malformed-pickle"),
    "too few arguments": (call("torch._utils._rebuild_tensor_v2", storage()), "malformed-pickle"),
    "too many arguments": (tensor(None, 0, (6,), (1,), *(False,) * 9), "malformed-pickle"),
    "no arguments for v3": (call("torch._utils._rebuild_tensor_v3"), "malformed-pickle"),
    "no parameter": (call("torch._utils._rebuild_parameter"), "malformed-pickle"),
    "no quantized": (call("torch._utils._rebuild_qtensor", storage()), "malformed-pickle"),
    "no subclass": (call("torch._tensor._rebuild_from_type_v2"), "malformed-pickle"),
    "flags of text": (tensor(None, 0, (6,), (1,), False, None, "conj"), "malformed-pickle"),
    "storage of nothing": (Opaque(kind="persistent", args=("0",)), "malformed-pickle"),
    "another persistent id": (storage(first="module"), "malformed-pickle"),
    "a key of numbers": (storage(key=0), "malformed-pickle"),
    "no record": (storage(key="7"), "corrupt-file"),
    "a key that climbs": (storage(key="../data.pkl"), "corrupt-file"),
    "unknown class": (storage(class_="torch.FooStorage"), "unknown-dtype"),
    "class from elsewhere": (storage(class_="os.FloatStorage"), "unknown-dtype"),
    "longer than its record": (storage(numel=7), "truncated-tensor"),
    "huge storage": (storage(numel=1 << 61), "truncated-tensor"),
    "endless storage": (storage(numel=HUGE), "limit-exceeded"),
    "negative storage": (storage(numel=-1), "malformed-pickle"),
    "two classes": (tup(storage(), storage(class_="torch.IntStorage")), "corrupt-file"),
    "two lengths": (tup(storage(), storage(numel=5)), "corrupt-file"),
}


@pytest.mark.parametrize(("root", "expected"), TENSORS.values(), ids=TENSORS.keys())
def test_tensors_that_cannot_be(root: Node, expected: str, tmp_path: Path) -> None:
    assert code(archive(root, tmp_path / "a.pt")) == expected


def test_v3_with_an_unknown_dtype(tmp_path: Path) -> None:
    untyped = storage(class_="torch.storage.UntypedStorage", numel=24)
    for dtype, expected in (("torch.nonsense", "unknown-dtype"), ("os.float32", "unknown-dtype")):
        args = (untyped, 0, tup(6), tup(1), False, None, Opaque(kind="global", name=dtype))
        assert code(archive(call("torch._utils._rebuild_tensor_v3", *args), tmp_path / "a.pt")) == expected


def test_numpy_arrays_that_cannot_be(tmp_path: Path) -> None:
    from ckptconv.formats.numpy_pickle import RECONSTRUCT

    state = tup(3, "<", None, None, None, -1, -1, 0)
    dtype = Opaque(kind="call", name="numpy.dtype", args=("f4", False, True), state=state)
    for shape, data, expected in (
        ((3,), b"1234", "corrupt-file"),
        ((-1,), b"", "malformed-pickle"),
        ((0, 1 << 62), b"", "corrupt-file"),
        ((HUGE,), b"", "limit-exceeded"),
    ):
        root = Opaque(
            kind="call",
            name=RECONSTRUCT,
            args=(Opaque(kind="global", name="numpy.ndarray"), tup(0), b"b"),
            state=tup(1, tup(*shape), dtype, False, data),
        )
        assert code(archive(root, tmp_path / "a.pt")) == expected


# The container


def test_a_checksum_that_does_not_hold(small: Path) -> None:
    data = bytearray(small.read_bytes())
    at = data.index(FLOATS[4:])
    data[at] ^= 1
    small.write_bytes(data)
    assert code(small) == "checksum-mismatch"


def test_a_record_twice(tmp_path: Path) -> None:
    path = archive(1, tmp_path / "a.pt")
    with pytest.warns(UserWarning, match="Duplicate"), zipfile.ZipFile(path, "a") as file:
        file.writestr("a/data.pkl", b"N.")
    assert code(path) == "duplicate-key"


@pytest.mark.parametrize(
    "name", ["a/../../etc/passwd", "/a/x", "a//x", "a/./x", "a\\x", "..", "a/x\x01/../y"]
)
def test_names_that_climb(name: str, tmp_path: Path) -> None:
    path = archive(1, tmp_path / "a.pt")
    with zipfile.ZipFile(path, "a") as file:
        file.writestr(name, b"")
    assert code(path) == "unsafe-path"


def test_records_under_several_names(tmp_path: Path) -> None:
    path = archive(1, tmp_path / "a.pt")
    with zipfile.ZipFile(path, "a") as file:
        file.writestr("b/data.pkl", b"N.")
    assert code(path) == "corrupt-file"


def test_a_bomb_is_not_inflated(tmp_path: Path) -> None:
    path = tmp_path / "bomb.pt"
    archive(tensor(), path, {"data/1": b"\0" * (100 << 20)}, compression=zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 1 << 20
    assert code(path) == "limit-exceeded"


def lied(path: Path, name: str, claimed: int) -> Path:
    """The directory claims another size for a record."""
    data = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as file:
        at = file.start_dir
        for info in file.infolist():
            if info.filename == name:
                struct.pack_into("<L", data, at + 24, claimed)
            at += 46 + len(info.filename) + len(info.extra)
    path.write_bytes(data)
    return path


def test_deflated_sizes_that_lie(tmp_path: Path) -> None:
    for claimed in (0, 23, 25, 4096):
        path = archive(tensor(), tmp_path / "z.pt", compression=zipfile.ZIP_DEFLATED)
        assert code(lied(path, "a/data/0", claimed)) in ("corrupt-file", "truncated-tensor")
    path = archive(tensor(), tmp_path / "s.pt")
    assert code(lied(path, "a/data/0", 4096)) == "corrupt-file"


def test_deflated_data_that_are_damaged(tmp_path: Path) -> None:
    for position in range(12):
        path = archive(tensor(), tmp_path / "z.pt", {"data/0": FLOATS * 20}, compression=zipfile.ZIP_DEFLATED)
        data = bytearray(path.read_bytes())
        with zipfile.ZipFile(path) as file:
            start = file.getinfo("a/data/0").header_offset + 30 + len("a/data/0")
        data[start + position] ^= 0xFF
        path.write_bytes(data)
        assert code(path) in ("corrupt-file", "checksum-mismatch")


def test_records_that_overlap(tmp_path: Path) -> None:
    """Two names for one run of bytes, as quoted zip bombs have them."""
    path = archive(tensor(), tmp_path / "a.pt", {"data/1": FLOATS})
    data = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as file:
        start, infos = file.start_dir, file.infolist()
    at = start
    for info in infos:
        if info.filename == "a/data/1":
            struct.pack_into("<L", data, at + 42, infos[2].header_offset)
        at += 46 + len(info.filename) + len(info.extra)
    path.write_bytes(data)
    assert code(path) == "corrupt-file"


def test_encrypted_and_other_methods(tmp_path: Path) -> None:
    path = archive(tensor(), tmp_path / "a.pt", compression=zipfile.ZIP_LZMA)
    assert code(path) == "unsupported-feature"
    path = archive(tensor(), tmp_path / "a.pt")
    data = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as file:
        data[file.start_dir + 8] |= 1
    path.write_bytes(data)
    assert code(path) == "unsupported-feature"


@pytest.mark.parametrize(
    ("records", "expected"),
    [
        ({"version": b"11"}, "unsupported-feature"),
        ({"version": b""}, "corrupt-file"),
        ({"version": b"three"}, "corrupt-file"),
        ({"version": b"9" * 4000}, "corrupt-file"),
        ({"byteorder": b"middle"}, "corrupt-file"),
        ({".storage_alignment": b"-1"}, "corrupt-file"),
        ({"ckptconv.json": b"\xff"}, "corrupt-file"),
        ({"data.pkl": b""}, "truncated-file"),
        ({"data.pkl": b"N.N."}, "malformed-pickle"),
    ],
)
def test_small_records_that_make_no_sense(records: dict[str, bytes], expected: str, tmp_path: Path) -> None:
    assert code(archive(1, tmp_path / "a.pt", records)) == expected


def test_no_record_at_all(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "e.pt", "w"):
        pass
    assert code(tmp_path / "e.pt") == "unknown-format"
    with zipfile.ZipFile(tmp_path / "f.pt", "w") as file:
        file.writestr("a/version", b"3")
    assert code(tmp_path / "f.pt") == "corrupt-file"


def test_something_behind_the_end(small: Path) -> None:
    data = small.read_bytes()
    small.write_bytes(data + b"\0" * 100)
    assert everything(FORMAT.read(small))
    small.write_bytes(data + b"x")
    assert code(small) == "corrupt-file"


def test_end_records_that_disagree(small: Path) -> None:
    """(offset from the end, format, value) of fields in the end record and the zip64 end record."""
    data = small.read_bytes()
    for at, kind, value in (
        (-22 + 8, "<H", 3),
        (-22 + 10, "<H", 3),
        (-22 + 12, "<L", 7),
        (-22 + 16, "<L", 9),
        (-98 + 32, "<Q", 1 << 40),
        (-98 + 48, "<Q", 1 << 62),
        (-42 + 8, "<Q", 1 << 62),
    ):
        changed = bytearray(data)
        struct.pack_into(kind, changed, len(data) + at, value)
        small.write_bytes(changed)
        assert code(small) in ("corrupt-file", "truncated-file", "unsupported-feature"), at


def test_a_file_that_shrinks_after_it_was_opened(small: Path) -> None:
    raw = FORMAT.read(small)
    size = small.stat().st_size
    os.truncate(small, 100)
    with pytest.raises(CkptError) as caught:
        everything(raw)
    assert caught.value.problems[0].code in ("truncated-tensor", "source-changed")
    assert size > 100


def test_reading_touches_no_storage(tmp_path: Path) -> None:
    """Between the head, which tells the format, and the tail, which is searched for the end record.

    But for the rest of the page that the record's header lies on, as the disk is read.
    """
    storage = FLOATS.ljust(100_000, b"\2")
    path = archive(tensor(), tmp_path / "a.pt", {"data/0": storage, ".data/padding": b"\1" * 200_000})
    with zipfile.ZipFile(path) as file:
        contents = {
            name: file.read(name) for name in ("a/data.pkl", "a/version", "a/data/0", "a/.data/padding")
        }
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("a/.data/front", b"\1" * 1000)
        for name, content in contents.items():
            file.writestr(name, content)
    start = path.read_bytes().index(FLOATS)
    page = start - start % 4096 + 4096
    seen: list[tuple[int, int]] = []
    read_into = FileSource.read_into

    def watched(self: FileSource, offset: int, out: memoryview) -> None:
        seen.append((offset, offset + len(out)))
        read_into(self, offset, out)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FileSource, "read_into", watched)
        FORMAT.read(path)
    assert seen
    assert not [span for span in seen if span[0] < start + len(storage) and page < span[1]]
