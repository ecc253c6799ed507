"""PyTorch's formats beside the zip against torch: legacy files, tars, TorchScript archives."""

from __future__ import annotations

import io
import pickle
import re
import struct
import tarfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import ckptconv
from ckptconv.formats.pytorch import PyTorchFormat
from ckptconv.rawtree import DictNode, Node, Opaque, RawTree, walk
from ckptconv.tensor import TensorRef, as_bytes
from tests.support.write_layout import write_layout

torch = pytest.importorskip("torch")

from tests.support.torch_equal import assert_same, bits, sharing  # noqa: E402

FORMAT = PyTorchFormat()
TYPED = [
    "float64", "float32", "float16", "bfloat16", "complex128", "complex64",
    "int64", "int32", "int16", "int8", "uint8", "bool",
]  # fmt: skip
UNTYPED = ["uint16", "uint32", "uint64", "float8_e4m3fn", "float8_e5m2", "float8_e8m0fnu", "complex32"]

pytestmark = [
    pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental"),
    pytest.mark.filterwarnings("ignore:`torch.jit"),
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),
    pytest.mark.filterwarnings("ignore:Couldn't retrieve source code"),
]


def of_bytes(dtype: Any, *shape: int, seed: int = 0) -> Any:
    generator = torch.Generator().manual_seed(seed)
    item = torch.empty(0, dtype=dtype).element_size()
    raw = torch.randint(
        0, 2 if dtype is torch.bool else 256, (int(np.prod(shape)) * item,), generator=generator
    )
    return raw.to(torch.uint8).view(dtype).reshape(shape)


def refs(root: Node) -> list[TensorRef]:
    return [node for _, node in walk(root) if isinstance(node, TensorRef)]


def legacy(value: Any, path: Path, **options: Any) -> RawTree:
    torch.save(value, path, _use_new_zipfile_serialization=False, **options)
    assert FORMAT.sniff(path)
    raw = FORMAT.read(path)
    assert raw.attributes["container"] == "legacy"
    return raw


def rewritten(raw: RawTree, path: Path, *, weights_only: bool = True) -> Any:
    write_layout(FORMAT.layout(raw, path), path)
    assert FORMAT.read(path).attributes["container"] == "zip"
    return torch.load(path, weights_only=weights_only)


def shapes_of(dtype: Any) -> dict[str, Any]:
    base = of_bytes(dtype, 6, 5)
    return {
        "dense": base,
        "turned": base.t(),
        "part": base[1:4, 2:],
        "every other": base[::2, ::3],
        "repeated": base[0, :1].expand(7, 1),
        "scalar": base[2, 3],
        "own scalar": of_bytes(dtype, seed=3),
        "empty": of_bytes(dtype, 0, 4),
        "other": of_bytes(dtype, 3, seed=1),
    }


@pytest.mark.parametrize("name", TYPED)
def test_legacy_each_dtype_reads_and_is_written_as_a_zip_bit_equal(name: str, tmp_path: Path) -> None:
    value = shapes_of(getattr(torch, name))
    raw = legacy(value, tmp_path / "a.pt")
    loaded = torch.load(tmp_path / "a.pt")
    for ref, tensor in zip(refs(raw.root), loaded.values(), strict=True):
        assert ref.dtype.torch == name
        assert ref.shape == tuple(tensor.shape)
        assert as_bytes(ref.read()).tobytes() == bits(tensor)
    again = rewritten(raw, tmp_path / "b.pt")
    assert_same(loaded, again)
    assert sharing(again) == sharing(value)


@pytest.mark.parametrize("name", UNTYPED)
def test_legacy_dtypes_that_torch_writes_and_cannot_load(name: str, tmp_path: Path) -> None:
    value = shapes_of(getattr(torch, name))
    raw = legacy(value, tmp_path / "a.pt")
    with pytest.raises((TypeError, RuntimeError, AttributeError)):
        torch.load(tmp_path / "a.pt", weights_only=False)
    assert_same(value, rewritten(raw, tmp_path / "b.pt"))


@pytest.mark.parametrize("protocol", [1, 2, 3, 4, 5])
def test_legacy_in_every_pickle_protocol(protocol: int, tmp_path: Path) -> None:
    value = {"w": of_bytes(torch.float32, 3, 4), "step": 7, "text": "ü", "list": [1, 2.5, None, True]}
    raw = legacy(value, tmp_path / "a.pt", pickle_protocol=protocol)
    assert_same(value, rewritten(raw, tmp_path / "b.pt"))


def test_legacy_pickles_that_are_larger_than_a_window(tmp_path: Path) -> None:
    value = {f"layers.{i}.weight": torch.full((2,), float(i)) for i in range(3000)}
    value["text"] = "x" * 300_000
    raw = legacy(value, tmp_path / "a.pt")
    assert_same(value, rewritten(raw, tmp_path / "b.pt"))


def test_legacy_bytes_are_little_endian_whatever_the_writer_was(tmp_path: Path) -> None:
    """torch swaps when it writes, and never looks at `little_endian` again."""
    value = {"w": of_bytes(torch.float32, 5), "c": of_bytes(torch.complex64, 2)}
    legacy(value, tmp_path / "a.pt")
    data = (tmp_path / "a.pt").read_bytes()
    other, found = re.subn(rb"(little_endianq.)\x88", lambda m: m[1] + b"\x89", data)  # NEWFALSE
    assert found == 1
    (tmp_path / "b.pt").write_bytes(other)
    assert_same(value, torch.load(tmp_path / "b.pt"))
    raw = FORMAT.read(tmp_path / "b.pt")
    assert raw.attributes["byteorder"] == "big"
    assert_same(value, rewritten(raw, tmp_path / "c.pt"))


class OldPickler(pickle.Pickler):
    """Pickles `Window` as torch before 0.4 pickled a tensor on a view of a storage."""

    def persistent_id(self, obj: Any) -> Any:
        if isinstance(obj, Part):
            return ("storage", torch.FloatStorage, obj.key, "cpu", obj.numel, obj.view)
        return None


class Part:
    def __init__(self, key: str, numel: int, view: tuple[str, int, int] | None) -> None:
        self.key, self.numel, self.view = key, numel, view


class Window:
    def __init__(self, part: Part, offset: int, size: tuple[int, ...], stride: tuple[int, ...]) -> None:
        self.args = (part, offset, size, stride)

    def __reduce__(self) -> Any:
        return torch._utils._rebuild_tensor, self.args


def old_file(value: Any, storages: dict[str, np.ndarray[Any, Any]]) -> bytes:
    """A legacy file as the facts of `_legacy_load` say, made without torch.save."""
    out = io.BytesIO()
    for part in (0x1950A86A20F9469CFC6C, 1001, {"protocol_version": 1001, "little_endian": True}):
        pickle.dump(part, out, protocol=2)
    OldPickler(out, protocol=2).dump(value)
    pickle.dump(sorted(storages), out, protocol=2)
    for key in sorted(storages):
        out.write(struct.pack("<q", storages[key].size) + storages[key].tobytes())
    return out.getvalue()


def test_legacy_views_as_torch_reads_them(tmp_path: Path) -> None:
    floats = np.random.default_rng(0).normal(size=20).astype("<f4")
    value = OrderedDict(
        whole=Window(Part("7", 20, None), 0, (4, 5), (5, 1)),
        view=Window(Part("7", 20, ("8", 6, 9)), 1, (2, 3), (3, 1)),
        same=Window(Part("7", 20, ("8", 6, 9)), 1, (2, 3), (3, 1)),
        other=Window(Part("30", 3, None), 0, (3,), (1,)),
    )
    path = tmp_path / "old.pt"
    path.write_bytes(old_file(value, {"7": floats, "30": floats[:3] * 2}))
    loaded = torch.load(path, weights_only=False)
    raw = FORMAT.read(path)
    for ref, (name, tensor) in zip(refs(raw.root), loaded.items(), strict=True):
        assert as_bytes(ref.read()).tobytes() == bits(tensor), name
    whole, view, same, _ = refs(raw.root)
    assert view.storage_id == same.storage_id != whole.storage_id
    assert_same(dict(loaded), dict(rewritten(raw, tmp_path / "b.pt")))


def test_a_legacy_module_is_described_and_its_tensors_are_there(tmp_path: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    raw = legacy(model, tmp_path / "a.pt")
    assert isinstance(raw.root, Opaque)
    assert (raw.root.kind, raw.root.name) == ("object", "torch.nn.modules.container.Sequential")
    expected = [bits(tensor) for tensor in model.state_dict().values()]
    assert sorted(as_bytes(ref.read()).tobytes() for ref in refs(raw.root)) == sorted(expected)


def test_a_legacy_training_run_opens_and_converts(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(3):
        model(torch.randn(5, 3)).square().sum().backward()
        optimizer.step()
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "epoch": 2}
    torch.save(state, tmp_path / "zip.pt")
    legacy(state, tmp_path / "legacy.pt")
    documents = [ckptconv.open(tmp_path / name) for name in ("zip.pt", "legacy.pt")]
    assert documents[0].provenance.producer == "PyTorch" != documents[1].provenance.producer
    assert documents[0].progress == documents[1].progress
    assert documents[0].optimizers[0].algorithm == documents[1].optimizers[0].algorithm
    ckptconv.convert(tmp_path / "legacy.pt", tmp_path / "again.pt")
    assert_same(state, torch.load(tmp_path / "again.pt"))


# The tar


def member(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    info.mtime = 1.5  # a fraction: pax writes a record of its own for it
    archive.addfile(info, io.BytesIO(data))


class TarPickler(pickle.Pickler):
    """Pickles a `Key` as torch 0.1.9 pickled a tensor."""

    def persistent_id(self, obj: Any) -> Any:
        return obj.key if isinstance(obj, Key) else None


class Key:
    def __init__(self, key: Any) -> None:
        self.key = key


def tar_file(
    path: Path,
    value: Any,
    storages: list[tuple[int, Any, np.ndarray[Any, Any]]],
    views: list[tuple[int, int, int, int]],
    tensors: list[tuple[int, int, tuple[int, ...], tuple[int, ...], int]],
    format: int = tarfile.PAX_FORMAT,
) -> Path:
    out = io.BytesIO()
    pickle.dump(len(storages), out, protocol=2)
    for key, class_, array in storages:
        pickle.dump((key, "cpu", class_), out, protocol=2)
        out.write(struct.pack("<q", array.size) + array.tobytes())
    pickle.dump(views, out, protocol=2)
    described = io.BytesIO()
    pickle.dump(len(tensors), described, protocol=2)
    for key, storage, size, stride, offset in tensors:
        pickle.dump((key, storage, torch.FloatTensor), described, protocol=2)
        described.write(struct.pack("<i4x", len(size)))
        described.write(struct.pack(f"<{2 * len(size) + 1}q", *size, *stride, offset))
    pickled = io.BytesIO()
    TarPickler(pickled, protocol=2).dump(value)
    with tarfile.open(path, "w:", format=format) as archive:
        member(archive, "storages", out.getvalue())
        member(archive, "tensors", described.getvalue())
        member(archive, "pickle", pickled.getvalue())
    return path


def small_tar(path: Path, format: int = tarfile.PAX_FORMAT) -> Path:
    random = np.random.default_rng(0)
    floats, longs = random.normal(size=20).astype("<f4"), random.integers(-9, 9, 4).astype("<i8")
    return tar_file(
        path,
        OrderedDict(w=Key(101), t=Key("102"), v=Key(103), n=Key(104), epoch=3),
        [(1, torch.FloatStorage, floats), (2, torch.LongStorage, longs)],
        [(3, 1, 5, 10)],
        [
            (101, 1, (4, 5), (5, 1), 0),
            (102, 1, (5, 4), (1, 5), 0),
            (103, 3, (2, 3), (3, 1), 2),
            (104, 2, (4,), (1,), 0),
        ],
        format,
    )


@pytest.mark.parametrize("format", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT])
def test_a_tar_as_torch_reads_it(format: int, tmp_path: Path) -> None:
    path = small_tar(tmp_path / "old.pt", format)
    loaded = torch.load(path, weights_only=False)
    assert FORMAT.sniff(path)
    raw = FORMAT.read(path)
    assert raw.attributes["container"] == "tar"
    tensors = [tensor for tensor in loaded.values() if isinstance(tensor, torch.Tensor)]
    for ref, tensor in zip(refs(raw.root), tensors, strict=True):
        assert ref.dtype.torch == str(tensor.dtype).removeprefix("torch.")
        assert as_bytes(ref.read()).tobytes() == bits(tensor)
    again = rewritten(raw, tmp_path / "b.pt")
    assert_same(loaded, again)


def test_other_tars_are_not_ours(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        member(archive, "weights/model.ckpt", b"1234")
    assert not FORMAT.sniff(tmp_path / "a.tar")


# TorchScript


class Block(torch.nn.Module):  # type: ignore[misc,name-defined]
    def __init__(self) -> None:
        super().__init__()
        self.lin = torch.nn.Linear(3, 2)
        self.register_buffer("count", torch.tensor(3))
        self.register_buffer("passing", torch.randn(2), persistent=False)
        self.scale = 2.0
        self.attribute = torch.randn(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.lin(x) * self.scale + self.count + self.attribute.sum() + self.passing


class Net(torch.nn.Module):  # type: ignore[misc,name-defined]
    def __init__(self) -> None:
        super().__init__()
        self.seq = torch.nn.Sequential(Block(), torch.nn.BatchNorm1d(2))
        self.fc = torch.nn.Linear(2, 2, bias=False)
        self.tied = self.fc.weight
        self.again = self.fc
        self.frozen = torch.nn.ParameterList([torch.nn.Parameter(torch.randn(2), requires_grad=False)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.fc(self.seq(x)) + self.again(self.seq(x)) + self.tied.sum()
        for p in self.frozen:
            y = y + p
        return y


def scripted(path: Path, how: str) -> Any:
    torch.manual_seed(0)
    net = Net().eval()
    module = torch.jit.script(net) if how == "script" else torch.jit.trace(net, torch.randn(1, 3))
    torch.jit.save(module, path, _extra_files={"note.txt": "hello"})
    return torch.jit.load(path)


@pytest.mark.parametrize("how", ["script", "trace"])
def test_torchscript_gives_the_state_dict_with_its_parameters_told(how: str, tmp_path: Path) -> None:
    path = tmp_path / "m.pt"
    loaded = scripted(path, how)
    assert FORMAT.sniff(path)
    raw = FORMAT.read(path)
    expected = loaded.state_dict()
    assert isinstance(raw.root, DictNode)
    assert list(raw.root.keys) == list(expected)
    trained = {name: p.requires_grad for name, p in loaded.named_parameters(remove_duplicate=False)}
    for name, node in raw.root.items:
        assert isinstance(name, str)
        tensor = node
        if isinstance(node, Opaque):
            assert node.kind == "torch.parameter"
            tensor, flag = node.args
            assert flag is trained.pop(name)
        assert isinstance(tensor, TensorRef)
        assert as_bytes(tensor.read()).tobytes() == bits(expected[name].detach())
    assert not trained
    assert raw.attributes["container"] == "torchscript"
    assert raw.attributes["buffers"] == tuple(name for name, _ in loaded.named_buffers())
    if how == "script":
        assert raw.attributes["tensor_attributes"] == ("seq.0.attribute",)
    again = rewritten(raw, tmp_path / "b.pt")
    assert list(again) == list(expected)
    assert sharing(again) == sharing(expected)
    Net().load_state_dict({name: value for name, value in again.items() if name != "seq.0.passing"})


def test_the_document_of_a_torchscript_archive_knows_parameters_from_buffers(tmp_path: Path) -> None:
    loaded = scripted(tmp_path / "m.pt", "script")
    document = ckptconv.open(tmp_path / "m.pt")
    names = {name for name, _ in loaded.named_buffers()}
    assert {name for name, param in document.params.items() if param.trainable is False} == names | {
        "frozen.0"
    }
    assert [name for name, param in document.params.items() if param.trainable is None] == []


def test_a_frozen_torchscript_module_says_so(tmp_path: Path) -> None:
    module = torch.jit.freeze(torch.jit.script(torch.nn.Linear(2, 2).eval()))
    torch.jit.save(module, tmp_path / "m.pt")
    with pytest.raises(ckptconv.CkptError) as caught:
        FORMAT.read(tmp_path / "m.pt")
    assert [problem.code for problem in caught.value.problems] == ["unsupported-feature"]
    assert caught.value.problems[0].loc == ("m.pt", "constants.pkl")
