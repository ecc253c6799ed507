"""Damaged and hostile legacy files, tars and TorchScript archives: a code each, and nothing in them runs."""

from __future__ import annotations

import contextlib
import io
import os
import pickle
import random
import struct
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ckptconv.errors import CkptError
from ckptconv.formats.pickle_writer import pickle_tree
from ckptconv.formats.pytorch import PyTorchFormat
from ckptconv.rawtree import ListNode, Node, Opaque, dict_of
from tests.attacks.test_pytorch_attacks import call, code, everything, tup

FORMAT = PyTorchFormat()
FLOATS = struct.pack("<6f", *range(6))
MAGIC = 0x1950A86A20F9469CFC6C
INFO = {"protocol_version": 1001, "little_endian": True, "type_sizes": {"short": 2, "int": 4, "long": 4}}


def made(node: Node) -> bytes:
    return pickle_tree(node, lambda part: part)[0]


def class_(name: str) -> Opaque:
    return Opaque(kind="global", name=name)


def storage(
    key: Node = "0",
    numel: Node = 6,
    view: Node = None,
    name: str = "torch.FloatStorage",
    kind: str = "storage",
) -> Opaque:
    return Opaque(kind="persistent", args=(tup(kind, class_(name), key, "cpu", numel, view),))


def tensor(base: Node = None, size: tuple[int, ...] = (6,), stride: tuple[int, ...] = (1,)) -> Opaque:
    empty = call("collections.OrderedDict")
    arguments = (base or storage(), 0, tup(*size), tup(*stride), False, empty)
    return call("torch._utils._rebuild_tensor_v2", *arguments)


def legacy(
    path: Path,
    root: Node = None,
    *,
    magic: Node = MAGIC,
    version: Node = 1001,
    info: Any = INFO,
    keys: Any = ("0",),
    data: bytes = struct.pack("<q", 6) + FLOATS,
) -> Path:
    root = dict_of({"w": tensor(), "n": 3}) if root is None else root
    pickles = [pickle.dumps(magic, 2), pickle.dumps(version, 2), pickle.dumps(info, 2), made(root)]
    path.write_bytes(
        b"".join([*pickles, pickle.dumps(list(keys) if isinstance(keys, tuple) else keys, 2), data])
    )
    return path


def tar(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w:", format=tarfile.PAX_FORMAT) as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def described(key: Node = 1, numel: int = 6, views: Any = (), name: str = "torch.FloatStorage") -> bytes:
    head = made(1) + made(tup(key, "cpu", class_(name))) + struct.pack("<q", numel) + FLOATS
    return head + pickle.dumps(list(views), 2)


def placed(
    key: Node = 7,
    on: Node = 1,
    axes: int = 1,
    numbers: tuple[int, ...] = (6, 1, 0),
    count: int = 1,
) -> bytes:
    one = made(tup(key, on, class_("torch.FloatTensor"))) + struct.pack("<i4x", axes)
    return made(count) + one + struct.pack(f"<{len(numbers)}q", *numbers)


def object_(key: Node = 7) -> bytes:
    return made(dict_of({"w": Opaque(kind="persistent", args=(key,)), "n": 3}))


def small_tar(path: Path, **changed: bytes) -> Path:
    return tar(path, {"storages": described(), "tensors": placed(), "pickle": object_()} | changed)


CODE = b'class M(Module):\n  __parameters__ = ["w", ]\n  __buffers__ = []\n  w : Tensor\n'


def module(**state: Node) -> Opaque:
    return Opaque(kind="object", name="__torch__.M", state=dict_of(state or {"w": script_tensor()}))


def script_tensor() -> Opaque:
    identifier = tup("storage", class_("torch.FloatStorage"), "0", "cpu", 6)
    empty = call("collections.OrderedDict")
    base = Opaque(kind="persistent", args=(identifier,))
    return call("torch._utils._rebuild_tensor_v2", base, 0, tup(6), tup(1), True, empty)


def script(path: Path, root: Node = None, **changed: bytes | None) -> Path:
    records: dict[str, bytes | None] = {
        "data/0": FLOATS,
        "data.pkl": made(module() if root is None else root),
        "code/__torch__.py": CODE,
        "constants.pkl": b"\x80\x02).",
        "version": b"3\n",
    }
    records.update({name.replace("__py", ".py"): data for name, data in changed.items()})
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in records.items():
            if data is not None:
                archive.writestr(f"a/{name}", data)
    return path


WRITERS: dict[str, Callable[[Path], Path]] = {"legacy": legacy, "tar": small_tar, "script": script}


@pytest.fixture(params=sorted(WRITERS))
def small(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    path = WRITERS[request.param](tmp_path / "small.pt")
    assert FORMAT.sniff(path)
    assert everything(FORMAT.read(path))
    return path


def test_truncation_at_every_byte(small: Path) -> None:
    """A tar's last blocks are padding: what is whole without them reads."""
    data, expected = small.read_bytes(), everything(FORMAT.read(small))
    target = small.with_name("cut.pt")
    whole = len(data.rstrip(b"\0"))
    for length in (*range(whole), *range(whole, len(data), 512)):
        if not any(data[max(length - 16, 0) : length + 16]) and length % 64:
            continue  # inside a tar's padding
        target.write_bytes(data[:length])
        if length >= whole:
            with contextlib.suppress(CkptError):
                assert everything(FORMAT.read(target)) == expected, length
            continue
        assert code(target) in ("truncated-file", "truncated-tensor", "corrupt-file", "unknown-format"), (
            length
        )


def test_every_byte_changed_gives_a_code_or_a_tree(small: Path) -> None:
    data = small.read_bytes()
    target = small.with_name("flipped.pt")
    rng = random.Random(0)
    for position in range(len(data)):
        if not any(data[max(position - 16, 0) : position + 16]) and position % 64:
            continue  # inside a tar's padding
        flipped = bytearray(data)
        flipped[position] ^= 1 << rng.randrange(8)
        target.write_bytes(flipped)
        with contextlib.suppress(CkptError):
            everything(FORMAT.read(target))


def test_bytes_removed_inserted_and_swapped(small: Path) -> None:
    data = small.read_bytes()
    target = small.with_name("moved.pt")
    rng = random.Random(1)
    for _ in range(300):
        at, length = rng.randrange(len(data)), rng.randrange(1, 9)
        target.write_bytes(data[:at] + rng.randbytes(rng.randrange(9)) + data[at + length :])
        with contextlib.suppress(CkptError):
            everything(FORMAT.read(target))


@pytest.mark.parametrize(
    ("expected", "changed"),
    [
        ("unsupported-feature", {"version": 1002}),
        ("unsupported-feature", {"version": None}),
        ("corrupt-file", {"info": [1]}),
        ("corrupt-file", {"keys": {"0": 1}}),
        ("corrupt-file", {"keys": ("1",)}),
        ("corrupt-file", {"keys": (0,)}),
        ("corrupt-file", {"keys": ()}),
        ("duplicate-key", {"keys": ("0", "0"), "data": 2 * (struct.pack("<q", 6) + FLOATS)}),
        ("truncated-tensor", {"data": struct.pack("<q", 7) + FLOATS}),
        ("truncated-tensor", {"data": struct.pack("<q", (1 << 63) - 1) + FLOATS}),
        ("corrupt-file", {"data": struct.pack("<q", -1) + FLOATS}),
        ("truncated-tensor", {"data": struct.pack("<q", 5) + FLOATS[:20]}),
        ("corrupt-file", {"data": struct.pack("<q", 6) + FLOATS + b"more"}),
        ("unknown-dtype", {"root": tensor(storage(name="torch.DreamStorage"))}),
        ("unknown-dtype", {"root": tensor(storage(name="os.FloatStorage"))}),
        ("malformed-pickle", {"root": tensor(storage(kind="file")), "keys": (), "data": b""}),
        ("malformed-pickle", {"root": tensor(storage(numel=-1))}),
        ("malformed-pickle", {"root": tensor(storage(view="all"))}),
        ("malformed-pickle", {"root": tensor(storage(view=tup("1", -1, 2)))}),
        ("corrupt-file", {"root": tensor(storage(view=tup("1", 2, 5)))}),
        ("corrupt-file", {"root": tensor(storage(view=tup("1", 2, 3)))}),
        ("limit-exceeded", {"root": tensor(storage(view=tup("1", 1 << 63, 1)))}),
        ("corrupt-file", {"root": tensor(size=(7,))}),
        ("corrupt-file", {"root": ListNode(items=(tensor(), tensor(storage(numel=5))))}),
        ("malformed-pickle", {"root": Opaque(kind="persistent", args=(1,)), "keys": (), "data": b""}),
    ],
)
def test_lies_of_a_legacy_file(expected: str, changed: dict[str, Any], tmp_path: Path) -> None:
    assert code(legacy(tmp_path / "a.pt", **changed)) == expected


@pytest.mark.parametrize(
    ("expected", "changed"),
    [
        ("truncated-tensor", {"storages": described(numel=100)}),
        ("corrupt-file", {"storages": described(numel=-7)}),
        ("unknown-dtype", {"storages": described(name="torch.FloatTensor")}),
        ("corrupt-file", {"storages": described(views=[(2, 9, 0, 1)])}),
        ("corrupt-file", {"storages": described(views=[(2, 1, 5, 2)])}),
        ("corrupt-file", {"storages": described(views=["view"])}),
        ("duplicate-key", {"storages": described(views=[(1, 1, 0, 2)])}),
        ("malformed-pickle", {"storages": described(key=None)}),
        ("corrupt-file", {"storages": described() + b"more"}),
        ("malformed-pickle", {"storages": made("many")}),
        ("truncated-file", {"storages": made(1 << 62)}),
        ("limit-exceeded", {"tensors": placed(axes=65)}),
        ("corrupt-file", {"tensors": placed(axes=-1)}),
        ("truncated-file", {"tensors": placed(axes=2)}),
        ("truncated-file", {"tensors": placed(count=2)}),
        ("corrupt-file", {"tensors": placed(numbers=(7, 1, 0))}),
        ("corrupt-file", {"tensors": placed(numbers=(6, 1, 1))}),
        ("corrupt-file", {"tensors": placed(numbers=(6, -1, 0))}),
        ("corrupt-file", {"tensors": placed(on=9)}),
        ("corrupt-file", {"tensors": placed() + b"more"}),
        ("corrupt-file", {"pickle": object_(8)}),
        ("corrupt-file", {"pickle": object_("seven")}),
        ("corrupt-file", {"pickle": object_() + b"more"}),
    ],
)
def test_lies_of_a_tar(expected: str, changed: dict[str, bytes], tmp_path: Path) -> None:
    assert code(small_tar(tmp_path / "a.pt", **changed)) == expected


def test_a_tar_without_a_member_or_with_one_twice(tmp_path: Path) -> None:
    assert code(tar(tmp_path / "a.pt", {"storages": described(), "pickle": object_()})) == "truncated-file"
    path = small_tar(tmp_path / "b.pt")
    data = path.read_bytes()
    path.write_bytes(data[: 512 * 2] + data[: 512 * 2] + data[512 * 2 :])
    assert code(path) == "duplicate-key"


@pytest.mark.parametrize(
    ("expected", "root", "changed"),
    [
        ("corrupt-file", None, {"code/__torch____py": None}),
        ("corrupt-file", None, {"code/__torch____py": b"class M(Module):\n  w : Tensor\n"}),
        ("corrupt-file", None, {"code/__torch____py": b"\xff\xfe"}),
        ("corrupt-file", None, {"code/__torch____py": CODE.replace(b'"w"', b'"w", "v"')}),
        ("corrupt-file", dict_of({"w": 1}), {}),
        ("corrupt-file", Opaque(kind="object", name="os.M", state=dict_of({"w": 1})), {}),
        ("corrupt-file", Opaque(kind="object", name="__torch__.M"), {}),
    ],
)
def test_lies_of_a_torchscript_archive(
    expected: str, root: Node, changed: dict[str, bytes | None], tmp_path: Path
) -> None:
    assert code(script(tmp_path / "a.pt", root, **changed)) == expected


@pytest.mark.parametrize("write", [legacy, script])
def test_nothing_runs(write: Any, tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    bad = call("os.system", f"touch {marker}")
    root = dict_of({"w": bad}) if write is legacy else module(w=script_tensor(), extra=bad)
    FORMAT.read(write(tmp_path / "a.pt", root, **({"keys": (), "data": b""} if write is legacy else {})))
    assert not os.path.exists(marker)


def test_a_pickle_that_never_ends_is_not_read_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ckptconv.formats.torch_stream._MAX_PICKLE_NBYTES", 1 << 18)
    path = tmp_path / "a.pt"
    head = b"".join(pickle.dumps(part, 2) for part in (MAGIC, 1001, INFO))
    with open(path, "wb") as file:
        file.write(head + b"\x80\x02\x8e" + struct.pack("<Q", 1 << 40))
        file.truncate(1 << 41)
    assert code(path) == "limit-exceeded"
