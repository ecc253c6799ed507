"""HDF5 files that are hostile or damaged, in each of the three formats: the code that each must give."""

from __future__ import annotations

import resource
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

h5py = pytest.importorskip("h5py")

import ckptconv  # noqa: E402
from ckptconv.errors import CkptError  # noqa: E402

File = Any
FIXED = np.dtype("S32")


def weights(path: Path) -> File:
    """A small `.weights.h5`, open."""
    file = h5py.File(path, "w")
    file["layers/dense/vars/0"] = np.ones((3, 2), np.float32)
    file["layers/dense/vars/1"] = np.ones(2, np.float32)
    return file


def model(path: Path) -> File:
    """A small `.h5`, open."""
    file = h5py.File(path, "w")
    file.attrs["keras_version"] = "2.15.0"
    file.attrs["model_config"] = '{"class_name": "Sequential", "config": {"layers": []}}'
    group = file.create_group("model_weights")
    group.attrs["layer_names"] = np.array([b"dense"], FIXED)
    group.create_group("dense").attrs["weight_names"] = np.array([b"dense/kernel:0"], FIXED)
    group["dense/dense/kernel:0"] = np.ones((3, 2), np.float32)
    state = file.create_group("optimizer_weights")
    state.attrs["weight_names"] = np.array([b"iteration:0"], FIXED)
    state["iteration:0"] = np.int64(3)
    return file


def code_of(path: Path) -> str:
    with pytest.raises(CkptError) as caught:
        ckptconv.open(path)
    (problem,) = caught.value.problems
    assert problem.loc
    assert problem.hint
    return problem.code


def virtual(file: File) -> None:
    layout = h5py.VirtualLayout((3, 2), "f4")
    layout[:] = h5py.VirtualSource("/etc/passwd", "data", (3, 2))
    file.create_virtual_dataset("layers/dense/vars/2", layout)


def nested(file: File) -> None:
    group = file
    for _ in range(200):
        group = group.create_group("g")
    group["vars/0"] = np.ones(2, np.float32)


def cycle(file: File) -> None:
    file["layers/dense/again"] = file["layers"]


def plugin(file: File) -> None:
    made = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    made.set_chunk((64, 64))
    made.set_filter(32015, h5py.h5z.FLAG_OPTIONAL, ())
    space = h5py.h5s.create_simple((64, 64))
    low = h5py.h5d.create(file["layers/dense/vars"].id, b"2", h5py.h5t.IEEE_F32LE, space, made)
    h5py.Dataset(low)[:1] = 1.0


def huge_chunk(file: File) -> None:
    """One chunk of 400 MB of zeros, which deflates to as many KB."""
    shape = (100, 1 << 20)
    made = {"chunks": shape, "compression": "gzip", "compression_opts": 1}
    data = file.create_dataset("layers/dense/vars/2", shape, "f4", **made)
    data.id.write_direct_chunk((0, 0), b"\0" * 420_000)


def claims(file: File) -> None:
    """A petabyte, of which one chunk is there."""
    made = {"chunks": (1024,), "compression": "gzip"}
    file.create_dataset("layers/dense/vars/2", (1 << 48,), "f4", **made)[:1024] = 1.0


WEIGHTS: dict[str, tuple[Callable[[File], Any], str]] = {
    "a link into another file": (
        lambda file: file.__setitem__("layers/other", h5py.ExternalLink("/etc/passwd", "/")),
        "unsafe-path",
    ),
    "a soft link": (
        lambda file: file.__setitem__("layers/other", h5py.SoftLink("/layers/dense")),
        "unsupported-feature",
    ),
    "data in another file": (
        lambda file: file.create_dataset(
            "layers/dense/vars/2", (16,), "u1", external=[("/etc/passwd", 0, 16)]
        ),
        "unsafe-path",
    ),
    "a virtual dataset": (virtual, "unsafe-path"),
    "a group inside itself": (cycle, "unsupported-feature"),
    "a dataset in two places": (
        lambda file: file.__setitem__("layers/dense/vars/2", file["layers/dense/vars/0"]),
        "unsupported-feature",
    ),
    "nested groups": (nested, "limit-exceeded"),
    "a filter of a plugin": (plugin, "unsupported-feature"),
    "a chunk of 400 MB": (huge_chunk, "limit-exceeded"),
    "a petabyte": (claims, "limit-exceeded"),
    "no data at all": (
        lambda file: file.create_dataset("layers/dense/vars/2", (1 << 40,), "f4"),
        "truncated-tensor",
    ),
    "texts": (
        lambda file: file.create_dataset("layers/dense/vars/2", data=["a"], dtype=h5py.string_dtype()),
        "unknown-dtype",
    ),
    "records": (
        lambda file: file.create_dataset("layers/dense/vars/2", (2,), [("a", "f4"), ("b", "i4")]),
        "unknown-dtype",
    ),
    "references": (
        lambda file: file.create_dataset("layers/dense/vars/2", (2,), h5py.ref_dtype),
        "unknown-dtype",
    ),
    "opaque data of no dtype": (
        lambda file: file.create_dataset("layers/dense/vars/2", data=np.zeros(2, "V2")),
        "unknown-dtype",
    ),
    "opaque data that says another width": (
        lambda file: file.create_dataset("layers/dense/vars/2", data=np.zeros(2, "V4")).attrs.update(
            {"dtype": "bfloat16"}
        ),
        "unknown-dtype",
    ),
    "a named type": (
        lambda file: file.__setitem__("layers/dense/vars/2", np.dtype("f4")),
        "unsupported-feature",
    ),
    "an attribute of references": (
        lambda file: file.attrs.create("x", file["layers"].ref, dtype=h5py.ref_dtype),
        "unsupported-feature",
    ),
    "an attribute of records": (
        lambda file: file.attrs.create("x", np.zeros(1, [("a", "f4")])),
        "unsupported-feature",
    ),
    "a counter that is none": (
        lambda file: file.__setitem__("optimizer/vars/0", np.zeros(3, np.int64)),
        "corrupt-file",
    ),
    "a counter below 0": (
        lambda file: file.__setitem__("optimizer/vars/0", np.int64(-1)),
        "corrupt-file",
    ),
    "a counter that is no number": (
        lambda file: file.__setitem__("optimizer/vars/0", np.float32("nan")),
        "corrupt-file",
    ),
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_weights(name: str, tmp_path: Path) -> None:
    change, code = WEIGHTS[name]
    with weights(tmp_path / "a.weights.h5") as file:
        change(file)
    assert code_of(tmp_path / "a.weights.h5") == code


@pytest.mark.parametrize(
    "name", ["a link into another file", "a virtual dataset", "a petabyte", "nested groups"]
)
def test_weights_in_an_archive(name: str, tmp_path: Path) -> None:
    change, code = WEIGHTS[name]
    with weights(tmp_path / "model.weights.h5") as file:
        change(file)
    with zipfile.ZipFile(tmp_path / "a.keras", "w") as archive:
        archive.writestr("metadata.json", '{"keras_version": "3.15.1"}')
        archive.writestr("config.json", "{}")
        archive.write(tmp_path / "model.weights.h5", "model.weights.h5")
    assert code_of(tmp_path / "a.keras") == code


def names(group: str, *listed: bytes) -> Callable[[File], None]:
    def change(file: File) -> None:
        file[group].attrs["weight_names" if group != "model_weights" else "layer_names"] = np.array(
            listed, FIXED
        )

    return change


MODEL: dict[str, tuple[Callable[[File], Any], str]] = {
    "a layer without a group": (names("model_weights", b"dense", b"other"), "corrupt-file"),
    "a layer that is a dataset": (
        lambda file: (
            names("model_weights", b"dense", b"data")(file),
            file.__setitem__("model_weights/data", np.ones(2, np.float32)),
        ),
        "corrupt-file",
    ),
    "a variable that is not there": (names("model_weights/dense", b"dense/bias:0"), "corrupt-file"),
    "a variable in another layer": (names("model_weights/dense", b"../dense/dense/kernel:0"), "corrupt-file"),
    "a variable listed twice": (
        names("model_weights/dense", b"dense/kernel:0", b"dense/kernel:0"),
        "corrupt-file",
    ),
    "a variable that is a group": (names("model_weights/dense", b"dense"), "corrupt-file"),
    "a name that is no text": (names("model_weights", b"\xff\xfe"), "corrupt-file"),
    "a config that is no JSON": (lambda file: file.attrs.__setitem__("model_config", "{"), "corrupt-file"),
    "a config that is no text": (
        lambda file: file.attrs.__setitem__("model_config", np.bytes_(b"\xff{}")),
        "corrupt-file",
    ),
    "a config nested too deeply": (
        lambda file: file.attrs.__setitem__("training_config", "[" * 50_000 + "]" * 50_000),
        "limit-exceeded",
    ),
    "a config with a key twice": (
        lambda file: file.attrs.__setitem__("training_config", '{"a": 1, "a": 2}'),
        "duplicate-key",
    ),
    "a link into another file": (
        lambda file: file.__setitem__("model_weights/other", h5py.ExternalLink("/etc/passwd", "/")),
        "unsafe-path",
    ),
}


@pytest.mark.parametrize("name", MODEL)
def test_model(name: str, tmp_path: Path) -> None:
    change, code = MODEL[name]
    with model(tmp_path / "a.h5") as file:
        change(file)
    assert code_of(tmp_path / "a.h5") == code


def test_what_is_attacked_is_fine_by_itself(tmp_path: Path) -> None:
    weights(tmp_path / "a.weights.h5").close()
    model(tmp_path / "a.h5").close()
    assert list(ckptconv.open(tmp_path / "a.weights.h5").params) == ["dense/kernel", "dense/bias"]
    run = ckptconv.open(tmp_path / "a.h5")
    assert list(run.params) == ["dense/kernel"]


def test_a_cut_anywhere_is_an_error_with_a_code(tmp_path: Path) -> None:
    model(tmp_path / "a.h5").close()
    data = (tmp_path / "a.h5").read_bytes()
    for end in range(0, len(data), 97):
        (tmp_path / "b.h5").write_bytes(data[:end])
        with pytest.raises(CkptError) as caught:
            ckptconv.open(tmp_path / "b.h5")
        assert caught.value.problems


def test_a_config_is_never_run(tmp_path: Path) -> None:
    """A lambda's code stays text."""
    with model(tmp_path / "a.h5") as file:
        file.attrs["model_config"] = (
            '{"class_name": "Sequential", "config": {"layers": [{"class_name": "Lambda", "config": '
            '{"name": "evil", "function": ["4wEAAAAAAAAA", null, null], "function_type": "lambda"}}]}}'
        )
    assert list(ckptconv.open(tmp_path / "a.h5").params) == ["dense/kernel"]


def test_memory_stays_small(tmp_path: Path) -> None:
    """What is refused is refused before it is read."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for name in ("a chunk of 400 MB", "a petabyte", "no data at all"):
        change, code = WEIGHTS[name]
        with weights(tmp_path / "a.weights.h5") as file:
            change(file)
        assert code_of(tmp_path / "a.weights.h5") == code
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 << 10


@pytest.mark.parametrize("free", [0, 8, 15])
def test_a_heap_in_which_the_library_would_walk_forever(tmp_path: Path, free: int) -> None:
    """Texts of attributes stand in a heap, whose free space is told to be smaller than its own header."""
    path = tmp_path / "model.h5"
    model(path).close()
    data = bytearray(path.read_bytes())
    start = data.index(b"GCOL")
    place, end = start + 16, start + int.from_bytes(data[start + 8 : start + 16], "little")
    while number := int.from_bytes(data[place : place + 2], "little"):
        assert number
        place += 16 + -(-int.from_bytes(data[place + 8 : place + 16], "little") // 8) * 8
    assert place < end
    data[place + 8 : place + 16] = free.to_bytes(8, "little")
    path.write_bytes(data)
    assert code_of(path) == "corrupt-file"
