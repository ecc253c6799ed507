"""The PyTorch format against torch: what it saves we read bit-equal, what we write it loads as it was."""

from __future__ import annotations

import argparse
import copy
import os
import pickle
import zipfile
from collections import Counter, OrderedDict, defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ckptconv.errors import CkptError
from ckptconv.formats.pytorch import PyTorchFormat
from ckptconv.ops import Cast, Scale
from ckptconv.rawtree import DictNode, ListNode, Node, Opaque, RawTree, dict_of, transform, walk
from ckptconv.tensor import FilledTensor, StoredTensor, TensorRef, TensorSpec, as_bytes
from tests.support.write_layout import write_layout

torch = pytest.importorskip("torch")
pytest.importorskip("torch.utils.serialization")

from tests.support.torch_equal import assert_same, bits, sharing  # noqa: E402

FORMAT = PyTorchFormat()

pytestmark = [
    pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental"),
    pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning"),
]

DTYPES = [
    getattr(torch, name)
    for name in [
        "float64",
        "float32",
        "float16",
        "bfloat16",
        "float8_e4m3fn",
        "float8_e5m2",
        "float8_e4m3fnuz",
        "float8_e5m2fnuz",
        "float8_e8m0fnu",
        "float4_e2m1fn_x2",
        "complex128",
        "complex64",
        "complex32",
        "int64",
        "int32",
        "int16",
        "int8",
        "uint8",
        "uint16",
        "uint32",
        "uint64",
        "bool",
    ]
]


def of_bytes(dtype: Any, *shape: int, seed: int = 0) -> Any:
    """A tensor of random bits: NaN payloads and denormals included; bool stays 0 or 1."""
    generator = torch.Generator().manual_seed(seed)
    item = torch.empty(0, dtype=dtype).element_size()
    count = int(np.prod(shape))
    raw = torch.randint(0, 2 if dtype is torch.bool else 256, (count * item,), generator=generator)
    return raw.to(torch.uint8).view(dtype).reshape(shape)


def saved(value: Any, path: Path, **options: Any) -> RawTree:
    torch.save(value, path, **options)
    assert FORMAT.sniff(path)
    return FORMAT.read(path)


def rewritten(raw: RawTree, path: Path, *, weights_only: bool = True, mmap: bool = False) -> Any:
    write_layout(FORMAT.layout(raw, path), path)
    return torch.load(path, weights_only=weights_only, mmap=mmap)


def refs(root: Node) -> list[TensorRef]:
    return [node for _, node in walk(root) if isinstance(node, TensorRef)]


@pytest.fixture
def checked_offsets(monkeypatch: pytest.MonkeyPatch) -> Any:
    """torch computes each offset from the layout that it expects, and compares it with the file's."""
    monkeypatch.setenv("TORCH_SERIALIZATION_DEBUG", "1")
    with torch.utils.serialization.config.patch("load.calculate_storage_offsets", True):
        yield


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_each_dtype_reads_and_writes_bit_equal(dtype: Any, tmp_path: Path) -> None:
    base = of_bytes(dtype, 6, 5)
    value = {
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
    raw = saved(value, tmp_path / "a.pt")
    for ref, tensor in zip(refs(raw.root), value.values(), strict=True):
        assert ref.dtype.torch == str(dtype).removeprefix("torch.")
        assert ref.shape == tuple(tensor.shape)
        assert as_bytes(ref.read()).tobytes() == bits(tensor)
        assert b"".join(window.tobytes() for window in ref.windows(16)) == bits(tensor)
        if tensor.numel():
            assert isinstance(ref, StoredTensor)
            assert ref.strides == tensor.stride()
    again = rewritten(raw, tmp_path / "b.pt")
    assert_same(torch.load(tmp_path / "a.pt"), again)
    assert sharing(again) == sharing(value) == [0, 0, 0, 0, 0, 0, 6, 7, 8]


def training_state() -> dict[str, Any]:
    torch.manual_seed(1)
    model = torch.nn.Sequential(
        torch.nn.Embedding(7, 4), torch.nn.Conv1d(4, 4, 3), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 4)
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [2, 4])
    for _ in range(3):
        optimizer.zero_grad()
        model[3](model[2](model[1](model[0](torch.arange(6).reshape(1, 6)).mT)).mT).square().sum().backward()
        optimizer.step()
        scheduler.step()
    state = model.state_dict()
    return {
        "model": state,
        "ema": copy.deepcopy(state),
        "tied": state["3.weight"],
        "optimizer": optimizer.state_dict(),
        "scheduler": scheduler.state_dict(),
        "rng": torch.get_rng_state(),
        "epoch": 3,
        "best": float("-inf"),
        "betas": (0.9, 0.999),
        "history": [0.5, 1e300, float("nan"), -0.0],
        "big": [2**31, -(2**31) - 1, 2**63, 2**200, -(2**64), 255, 256, 65535, 65536, -1],
        "text": "äöü\u2028\x00" + "x" * 300,
        "bytes": bytes(range(256)),
        "nothing": [None, [], {}, (), "", b"", set(), OrderedDict()],
        "flags": (True, False, 1 + 2j),
        "set": {1, "a"},
        "size": torch.Size([2, 3]),
        "counter": Counter("aab"),
        "dtype": torch.bfloat16,
        "device": torch.device("cpu"),
        "layout": torch.Size([]),
        3: "an int key",
        (1, "t"): "a tuple key",
        "bytearray": bytearray(b"ab\xff"),
        "parameter": torch.nn.Parameter(torch.randn(3)),
        "frozen": torch.nn.Parameter(torch.randn(2), requires_grad=False),
        "graph": torch.randn(2, requires_grad=True),
        "conj": torch.randn(4, dtype=torch.complex64).conj(),
        "neg": torch.randn(4, dtype=torch.complex128).conj().imag,
        "qint8": torch.quantize_per_tensor(torch.randn(4, 3), 0.1, 3, torch.quint8),
        "channels": torch.quantize_per_channel(
            torch.randn(3, 2), torch.rand(3) + 0.1, torch.arange(3), 0, torch.qint8
        ),
        "coo": torch.tensor([[0, 1.5], [2.5, 0]]).to_sparse(),
        "csr": torch.tensor([[0, 1.5], [2.5, 0]]).to_sparse_csr(),
        "meta": torch.empty(2, 3, device="meta"),
        "buffer": torch.nn.Buffer(torch.randn(2)),
    }


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("mmap", [False, True])
def test_a_training_state_comes_back_as_it_was(mmap: bool, tmp_path: Path, checked_offsets: None) -> None:
    value = training_state()
    raw = saved(value, tmp_path / "run.pt")
    again = rewritten(raw, tmp_path / "again.pt", mmap=mmap)
    # The empty bytes object alone keeps torch from loading its own file with weights_only; ours it loads.
    first = torch.load(tmp_path / "run.pt", weights_only=False)
    assert_same(first, again)
    assert sharing(again) == sharing(first)
    assert again["model"]._metadata == value["model"]._metadata


def test_our_archive_is_torchs_byte_for_byte_but_for_its_id(tmp_path: Path) -> None:
    """Same object, same archive name: only the serialization id, its checksum, may differ."""
    for name in ("a", "ab" * 9, "checkpoint.0003", "x" * 64):
        path = tmp_path / f"{name}.pt"
        value = {"w": torch.arange(12.0).reshape(3, 4), "none": torch.zeros(0), "b": torch.ones(3)}
        torch.save(value, path)
        ours, theirs = tmp_path / "ours.pt", path.read_bytes()
        write_layout(FORMAT.layout(FORMAT.read(path), ours), ours)
        written = ours.read_bytes()
        assert len(written) == len(theirs)
        with zipfile.ZipFile(ours) as archive, zipfile.ZipFile(path) as expected:
            assert archive.testzip() is None
            assert archive.namelist() == expected.namelist()
            start = expected.getinfo(f"{name}/data/0").header_offset
            stop = expected.getinfo(f"{name}/.data/serialization_id").header_offset
        assert written[start:stop] == theirs[start:stop]


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_each_pickle_protocol(protocol: int, tmp_path: Path) -> None:
    value = {
        "w": torch.randn(3, 2),
        "np": np.arange(6.0).reshape(2, 3),
        "o": OrderedDict(a=torch.ones(2), b=b"\x00\xff"),
        "f": frozenset([1]),
        "s": {2},
        "d": defaultdict(list, {"k": [1]}),
        "n": [2**70, "é" * 300, np.float32(0.5), bytearray(b"q"), Counter("aab")],
    }
    raw = saved(value, tmp_path / "a.pt", pickle_protocol=protocol)
    assert raw.attributes["protocol"] == protocol
    again = rewritten(raw, tmp_path / "b.pt", weights_only=False)
    assert_same(value, again)


@pytest.mark.parametrize(
    "array",
    [
        np.arange(12, dtype="<i8").reshape(3, 4),
        np.asfortranarray(np.arange(12.0).reshape(3, 4)),
        np.arange(5, dtype=">f4"),
        np.arange(5, dtype=">u2").astype(">u2"),
        np.array(True),
        np.zeros((0, 3), "<c8"),
        np.arange(624, dtype="u4"),
        np.float64("nan"),
        np.int16(-3),
        np.bool_(True),
        np.float16(1.5),
        np.array([1, 2], dtype=">c16"),
    ],
    ids=lambda array: f"{array.dtype.str}{array.shape}",
)
def test_numpy_values_come_back_as_they_were(array: Any, tmp_path: Path) -> None:
    raw = saved({"a": array}, tmp_path / "a.pt")
    assert isinstance(raw.root, DictNode)
    node = raw.root.get("a")
    assert isinstance(node, Opaque)
    assert node.kind == ("numpy.ndarray" if isinstance(array, np.ndarray) else "numpy.scalar")
    (ref,) = refs(raw.root)
    assert ref.read().tobytes() == np.ascontiguousarray(array.astype(array.dtype.newbyteorder("<"))).tobytes()
    first = torch.load(tmp_path / "a.pt", weights_only=False)
    assert_same(first, rewritten(raw, tmp_path / "b.pt", weights_only=False))
    if isinstance(array, np.ndarray):
        (again,) = refs(FORMAT.read(tmp_path / "b.pt").root)
        assert again.extents[0].big_endian == ref.extents[0].big_endian


def test_numpy_arrays_of_other_types_stay_calls_with_their_parts(tmp_path: Path) -> None:
    value = {"t": np.array(["ab", "c"]), "o": np.array([{}, 1], dtype=object), "d": np.dtype("f4")}
    raw = saved(value, tmp_path / "a.pt")
    assert isinstance(raw.root, DictNode)
    assert [node.kind for node in (raw.root.get(k) for k in "tod") if isinstance(node, Opaque)] == [
        "call"
    ] * 3
    again = rewritten(raw, tmp_path / "b.pt", weights_only=False)
    assert (again["t"].tolist(), again["o"].tolist(), again["d"]) == (["ab", "c"], [{}, 1], np.dtype("f4"))


def test_random_states_come_back(tmp_path: Path) -> None:
    import random

    value = {"python": random.getstate(), "numpy": np.random.get_state(), "torch": torch.get_rng_state()}
    value["generator"] = np.random.default_rng(3).bit_generator.state
    again = rewritten(saved(value, tmp_path / "a.pt"), tmp_path / "b.pt", weights_only=False)
    assert_same(value, again)


def test_two_dtypes_on_one_untyped_storage(tmp_path: Path) -> None:
    base = of_bytes(torch.uint16, 8)
    value = {"a": base, "b": base.view(torch.float8_e4m3fn), "c": base[2:].view(torch.uint32)}
    raw = saved(value, tmp_path / "a.pt")
    assert len({ref.storage_id for ref in refs(raw.root)}) == 1
    again = rewritten(raw, tmp_path / "b.pt")
    assert_same(value, again)
    assert sharing(again) == [0, 0, 0]


def test_storages_saved_bare(tmp_path: Path) -> None:
    value = [torch.arange(3.0).storage(), torch.arange(4, dtype=torch.uint8).untyped_storage()]
    raw = saved(value, tmp_path / "a.pt")
    assert [ref.shape for ref in refs(raw.root)] == [(3,), (4,)]
    assert_same(torch.load(tmp_path / "a.pt"), rewritten(raw, tmp_path / "b.pt"))


def test_identity_survives(tmp_path: Path) -> None:
    shared, tensor = [1], torch.ones(2)
    again = rewritten(saved([shared, shared, tensor, tensor], tmp_path / "a.pt"), tmp_path / "b.pt")
    assert again[0] is again[1]
    assert again[2] is again[3]


def test_flags_read_as_the_values_that_torch_shows(tmp_path: Path) -> None:
    base = of_bytes(torch.complex64, 3, 2)
    value = {
        "c": base.conj(),
        "n": base.clone().conj().imag,
        "both": torch._neg_view(base.conj()),
        "h": torch._neg_view(base),
    }
    value |= {"i": torch._neg_view(torch.arange(3)), "d": torch._neg_view(of_bytes(torch.bfloat16, 5))}
    raw = saved(value, tmp_path / "a.pt")
    for ref, tensor in zip(refs(raw.root), value.values(), strict=True):
        assert as_bytes(ref.read()).tobytes() == bits(tensor)
        assert b"".join(window.tobytes() for window in ref.windows(16)) == bits(tensor)
    assert_same(torch.load(tmp_path / "a.pt"), rewritten(raw, tmp_path / "b.pt"))


def test_attributes_of_tensors_stay(tmp_path: Path) -> None:
    tensor = torch.ones(2)
    tensor.note = "kept"
    parameter = torch.nn.Parameter(torch.ones(2))
    parameter.rank = 3
    raw = saved([tensor, parameter], tmp_path / "a.pt")
    assert isinstance(raw.root, ListNode)
    assert [node.kind for node in raw.root.items if isinstance(node, Opaque)] == [
        "torch.subclass",
        "torch.parameter",
    ]
    again = rewritten(raw, tmp_path / "b.pt")
    assert_same([tensor, parameter], again)
    assert (again[0].note, again[1].rank) == ("kept", 3)


def test_tensors_that_are_computed_get_storages_of_their_own(tmp_path: Path) -> None:
    raw = saved({"w": torch.arange(6.0).reshape(2, 3)}, tmp_path / "a.pt")
    (w,) = refs(raw.root)
    double = w.apply(Scale(2.0))
    from ckptconv import dtypes

    zeros = FilledTensor(spec=TensorSpec(dtype=dtypes.BY_NAME["bfloat16"], shape=(2, 2)), value=0.5)
    root = dict_of(
        {
            "w": w,
            "a": double,
            "b": double,
            "z": zeros,
            "n": w.apply(Cast("int64")),
            "e": StoredTensor.of_array(np.zeros((0, 2), "u2")),
        }
    )
    again = rewritten(RawTree(format="pytorch", root=root), tmp_path / "b.pt")
    assert torch.equal(again["a"], 2 * again["w"])
    assert again["a"] is again["b"]
    assert again["z"].tolist() == [[0.5, 0.5], [0.5, 0.5]]
    assert again["n"].dtype is torch.int64
    assert (again["e"].dtype, again["e"].shape) == (torch.uint16, (0, 2))
    assert sharing(again) == [0, 1, 1, 3, 4, 5]


def test_one_extent_under_two_typed_dtypes_is_written_untyped(tmp_path: Path) -> None:
    """torch refuses to save it; a tree from another container may hold it."""
    from ckptconv import dtypes

    words = StoredTensor.of_array(np.arange(6, dtype="<f4"))
    spec = TensorSpec(dtype=dtypes.BY_NAME["int32"], shape=(3,))
    other = StoredTensor.dense(spec, words.extent, 2)
    again = rewritten(RawTree(format="pytorch", root=dict_of({"f": words, "i": other})), tmp_path / "b.pt")
    assert again["f"].tolist() == [0, 1, 2, 3, 4, 5]
    assert torch.equal(again["i"], again["f"].view(torch.int32)[2:5])
    assert sharing(again) == [0, 0]


def swapped(path: Path, target: Path, items: dict[str, int]) -> None:
    """A big-endian machine's copy of a file: each storage's bytes reversed in groups."""
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(target, "w") as archive:
        for name in source.namelist():
            data = source.read(name)
            item = items.get(name.rpartition("/")[2]) if "/data/" in name else None
            if item:
                data = np.frombuffer(data, np.uint8).reshape(-1, item)[:, ::-1].tobytes()
            archive.writestr(name, b"big" if name.endswith("/byteorder") else data)


def test_a_big_endian_file(tmp_path: Path) -> None:
    value = [
        torch.randn(3),
        torch.randn(2, dtype=torch.complex64),
        torch.arange(4),
        torch.tensor([True]),
        of_bytes(torch.uint16, 3),
    ]
    torch.save(value, tmp_path / "a.pt")
    swapped(tmp_path / "a.pt", tmp_path / "big.pt", {"0": 4, "1": 4, "2": 8, "3": 1, "4": 2})
    assert_same(value[:4], torch.load(tmp_path / "big.pt")[:4])
    raw = FORMAT.read(tmp_path / "big.pt")
    assert raw.attributes["byteorder"] == "big"
    for ref, tensor in zip(refs(raw.root), value, strict=True):
        assert as_bytes(ref.read()).tobytes() == bits(tensor)
    assert_same(value, rewritten(raw, tmp_path / "b.pt"))


def test_a_deflated_repack(tmp_path: Path) -> None:
    value = {"w": torch.arange(5000.0), "v": torch.randn(3)}
    torch.save(value, tmp_path / "a.pt")
    with (
        zipfile.ZipFile(tmp_path / "a.pt") as source,
        zipfile.ZipFile(tmp_path / "z.pt", "w", zipfile.ZIP_DEFLATED) as archive,
    ):
        for name in source.namelist():
            archive.writestr(name, source.read(name))
    raw = FORMAT.read(tmp_path / "z.pt")
    assert_same(value, rewritten(raw, tmp_path / "b.pt"))


def test_files_of_older_versions(tmp_path: Path) -> None:
    """torch 1.6: version first, no byteorder, storages in lexicographic order, nothing aligned."""
    value = {str(i): torch.full((i + 1,), float(i)) for i in range(12)}
    torch.save(value, tmp_path / "a.pt")
    with zipfile.ZipFile(tmp_path / "a.pt") as source, zipfile.ZipFile(tmp_path / "old.pt", "w") as archive:
        storages = sorted(name for name in source.namelist() if "/data/" in name)
        for name in ("a/version", "a/data.pkl", *storages):
            archive.writestr(name, source.read(name))
    assert_same(value, torch.load(tmp_path / "old.pt"))
    assert_same(value, rewritten(FORMAT.read(tmp_path / "old.pt"), tmp_path / "b.pt"))


def test_without_checksums(tmp_path: Path) -> None:
    value = {"w": torch.randn(3)}
    torch.serialization.set_crc32_options(False)
    try:
        raw = saved(value, tmp_path / "a.pt")
    finally:
        torch.serialization.set_crc32_options(True)
    (ref,) = refs(raw.root)
    assert ref.extents[0].checksum is None
    assert_same(value, rewritten(raw, tmp_path / "b.pt"))


def test_another_alignment(tmp_path: Path, checked_offsets: None) -> None:
    value = {"w": torch.randn(3), "v": torch.randn(4)}
    with torch.utils.serialization.config.patch("save.storage_alignment", 4096):
        raw = saved(value, tmp_path / "a.pt")
    assert raw.attributes["alignment"] == 4096
    assert_same(value, rewritten(raw, tmp_path / "b.pt", mmap=True))


def test_beyond_four_gigabytes(tmp_path: Path) -> None:
    """Sparse, so that it takes no room: sizes and offsets in their zip64 fields."""
    with torch.serialization.skip_data():
        value = {
            "a": torch.empty(2**32 + 100, dtype=torch.uint8),
            "b": torch.zeros(3),
            "c": torch.empty(2**32 - 1, dtype=torch.uint8),
            "d": torch.zeros(0),
        }
        torch.save(value, tmp_path / "big.pt")
    raw = FORMAT.read(tmp_path / "big.pt")
    assert [ref.shape for ref in refs(raw.root)] == [(2**32 + 100,), (3,), (2**32 - 1,), (0,)]
    assert refs(raw.root)[1].read().tolist() == [0, 0, 0]
    # Our layout of the same tree puts every header and descriptor where torch's stands.
    (file,) = FORMAT.layout(raw, tmp_path / "big.pt").files
    with zipfile.ZipFile(tmp_path / "big.pt") as archive:
        first = archive.getinfo("big/data/0").header_offset
        stop = archive.getinfo("big/.data/serialization_id").header_offset
        frame = list(file.finish({placement.key: 0 for placement in file.placements}))
        with (tmp_path / "big.pt").open("rb") as stream:
            for offset, data in frame:
                if first <= offset < stop:
                    stream.seek(offset)
                    assert stream.read(len(data)) == data, offset
    assert [placement.offset % 64 for placement in file.placements] == [0, 0, 0]
    assert frame[-1][0] + len(frame[-1][1]) == (tmp_path / "big.pt").stat().st_size


def test_the_note_is_a_record_that_torch_passes_over(tmp_path: Path, checked_offsets: None) -> None:
    value = OrderedDict(w=torch.randn(2))
    raw = saved(value, tmp_path / "a.pt")
    noted = RawTree(format="pytorch", root=raw.root, attributes=raw.attributes, note='{"schema": "é"}')
    assert_same(value, rewritten(noted, tmp_path / "b.pt", mmap=True))
    assert FORMAT.read(tmp_path / "b.pt").note == '{"schema": "é"}'


def test_unknown_objects_are_data(tmp_path: Path) -> None:
    value = {
        "args": argparse.Namespace(lr=0.1, w=torch.ones(2)),
        "path": Path("/x/y"),
        "model": torch.nn.Linear(2, 2),
    }
    raw = saved(value, tmp_path / "a.pt")
    assert len(refs(raw.root)) == 3
    with pytest.raises(CkptError) as caught:
        FORMAT.layout(raw, tmp_path / "b.pt")
    (problem,) = caught.value.problems
    assert problem.code == "opaque-globals"
    assert {"argparse.Namespace", "torch.nn.modules.linear.Linear"} <= set(problem.loc)
    allowed = RawTree(
        format="pytorch", root=raw.root, attributes={**raw.attributes, "allow_opaque_globals": True}
    )
    again = rewritten(allowed, tmp_path / "b.pt", weights_only=False)
    assert again["args"].lr == 0.1
    assert again["path"] == Path("/x/y")
    assert torch.equal(again["model"].weight, value["model"].weight)
    assert torch.equal(again["args"].w, torch.ones(2))


def test_new_trees_take_the_name_that_torch_would(tmp_path: Path) -> None:
    tree = RawTree(format="pytorch", root=dict_of({"a": 1}))
    for name, expected in (("a.b.pt", "a.b"), ("noext", "noext"), ("x.tar.gz", "x.tar"), ("é.pt", "archive")):
        torch.save({"a": 1}, tmp_path / name)
        theirs = zipfile.ZipFile(tmp_path / name).namelist()[0].partition("/")[0]
        rewritten(tree, tmp_path / name)
        assert zipfile.ZipFile(tmp_path / name).namelist()[0].partition("/")[0] == theirs == expected


def test_the_allow_list_is_torchs() -> None:
    from torch._weights_only_unpickler import _get_allowed_globals

    from ckptconv.formats.torch_names import WEIGHTS_ONLY

    assert set(_get_allowed_globals()) - WEIGHTS_ONLY == set()
    assert WEIGHTS_ONLY - set(_get_allowed_globals()) == set()


def test_other_zips_are_not_ours(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "m.keras", "w") as archive:
        archive.writestr("metadata.json", "{}")
    assert not FORMAT.sniff(tmp_path / "m.keras")
    (tmp_path / "t.txt").write_bytes(b"")
    assert not FORMAT.sniff(tmp_path / "t.txt")
    assert not FORMAT.sniff(tmp_path)


def test_the_engine_writes_our_layout(tmp_path: Path) -> None:
    from ckptconv import engine

    value = {
        "w": torch.randn(300, 7).t(),
        "u": of_bytes(torch.uint16, 9),
        "e": torch.zeros(0),
        "s": torch.tensor(2),
    }
    raw = saved(value, tmp_path / "a.pt")
    engine.write(FORMAT.layout(raw, tmp_path / "b.pt"), tmp_path / "b.pt")
    assert_same(value, torch.load(tmp_path / "b.pt", mmap=True))
    with zipfile.ZipFile(tmp_path / "b.pt") as archive:
        assert archive.testzip() is None


def test_tensors_of_a_deflated_file_cross_to_another_process(tmp_path: Path) -> None:
    torch.save({"w": torch.arange(9.0), "c": torch.randn(2, dtype=torch.complex64).conj()}, tmp_path / "a.pt")
    with zipfile.ZipFile(tmp_path / "a.pt") as source:
        contents = {name: source.read(name) for name in source.namelist()}
    with zipfile.ZipFile(tmp_path / "z.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in contents.items():
            archive.writestr(name, data)
    for ref in refs(FORMAT.read(tmp_path / "z.pt").root):
        there = pickle.loads(pickle.dumps(ref))
        assert as_bytes(there.read()).tobytes() == as_bytes(ref.read()).tobytes()


def test_many_deflated_storages_take_one_open_file(tmp_path: Path) -> None:
    torch.save({str(i): torch.full((9,), float(i)) for i in range(200)}, tmp_path / "a.pt")
    with zipfile.ZipFile(tmp_path / "a.pt") as source, zipfile.ZipFile(tmp_path / "z.pt", "w", 8) as archive:
        for name in source.namelist():
            archive.writestr(name, source.read(name))
    raw = FORMAT.read(tmp_path / "z.pt")
    before = len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").exists() else 0
    assert [float(ref.read()[0]) for ref in reversed(refs(raw.root))] == [
        float(i) for i in reversed(range(200))
    ]
    assert before == 0 or len(os.listdir("/proc/self/fd")) <= before + 2


def test_trees_are_not_changed_by_writing(tmp_path: Path) -> None:
    raw = saved({"w": torch.ones(2), "l": [1]}, tmp_path / "a.pt")
    before = transform(raw.root, lambda _, node: node)
    FORMAT.layout(raw, tmp_path / "b.pt")
    assert raw.root == before
