"""`--shard-size`: the files of a target, what they hold, and the way back from them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import ckptconv
from ckptconv.formats.table import FORMATS
from ckptconv.plan import shard_nbytes
from ckptconv.tensor import as_bytes
from tests.support.command import FIXTURES, convert_here, invoke

RUN = FIXTURES / "plain" / "mlp-adamw" / "run.pt"
FRESH = FIXTURES / "keras3" / "mlp-adamw-fresh" / "ckpt-1"
SAFETENSORS = FORMATS["safetensors"]

Content = dict[tuple[str | int, ...], bytes]


def content(path: Path) -> Content:
    """Every tensor's address, dtype, shape and bytes."""
    document = ckptconv.open(path)
    return {
        (*address, tensor.dtype.name, *tensor.shape): as_bytes(tensor.read()).tobytes()
        for address, tensor in document.tensors()
    }


def names(folder: Path) -> list[str]:
    return sorted(item.name for item in folder.iterdir())


@pytest.mark.parametrize(
    ("size", "nbytes"),
    [
        (7, 7),
        ("300", 300),
        ("300B", 300),
        ("500MB", 500 * 10**6),
        ("5GB", 5 * 10**9),
        ("2GiB", 2 * 2**30),
        ("1.5 KiB", 1536),
        ("3KB", 3000),
        ("1TB", 10**12),
        ("1TiB", 2**40),
        ("64MiB", 64 * 2**20),
    ],
)
def test_sizes(size: int | str, nbytes: int) -> None:
    assert shard_nbytes(size, SAFETENSORS) == nbytes


@pytest.mark.parametrize(
    "size",
    [
        "",
        "0",
        "0GB",
        "-5",
        "-5GB",
        "5Gb",
        "5gb",
        "5 G",
        "1e9",
        "1.5",
        "0.0001KB",
        "GB",
        "5GB5",
        "٥",
        "9" * 5000,
        0,
        -1,
        True,
    ],
)
def test_what_is_no_size(size: int | str) -> None:
    with pytest.raises(ckptconv.CkptError) as caught:
        shard_nbytes(size, SAFETENSORS)
    assert [(p.code, p.loc[0]) for p in caught.value.problems] == [("usage", "--shard-size")]


def test_no_size_is_no_shards() -> None:
    assert all(shard_nbytes(None, format_) is None for format_ in FORMATS.values())


def test_safetensors(tmp_path: Path) -> None:
    numpy = pytest.importorskip("safetensors.numpy")
    whole = numpy.load_file(convert_here(RUN, tmp_path / "whole.safetensors"))
    folder = tmp_path / "sharded"
    folder.mkdir()
    convert_here(RUN, folder / "w.safetensors", "--shard-size", "300")
    *shards, index_name = names(folder)
    assert shards == [f"w-{i:05d}-of-00003.safetensors" for i in (1, 2, 3)]
    index = json.loads((folder / index_name).read_text())
    parts = {name: numpy.load_file(folder / name) for name in shards}
    assert {key: name for name, part in parts.items() for key in part} == index["weight_map"]
    for part in parts.values():
        assert len(part) == 1 or sum(value.nbytes for value in part.values()) <= 300
    joined = {key: value for part in parts.values() for key, value in part.items()}
    assert joined.keys() == whole.keys()
    assert all(joined[key].tobytes() == whole[key].tobytes() for key in whole)
    # Back into one file, from the index and from the name that it stands for.
    for source in (folder / index_name, folder / "w.safetensors", folder):
        again = convert_here(source, tmp_path / "again.safetensors", "--force")
        assert content(again) == content(tmp_path / "whole.safetensors")


def test_safetensors_in_a_directory(tmp_path: Path) -> None:
    target = convert_here(RUN, tmp_path / "model", "--to", "safetensors", "--shard-size", "1KiB")
    assert names(target) == ["model-00001-of-00001.safetensors", "model.safetensors.index.json"]
    assert content(target) == content(convert_here(RUN, tmp_path / "whole.safetensors"))


def test_neutral_and_back(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    target = convert_here(RUN, tmp_path / "archive.neutral", "--shard-size", "0.5KB")
    found = names(target)
    assert {"weights-00001-of-00003.safetensors", "optimizer-00005-of-00005.safetensors"} <= set(found)
    assert invoke("validate", target)[0] == 0
    assert content(target) == content(RUN)
    back = convert_here(target, tmp_path / "back.pt")
    before, after = (torch.load(path, weights_only=True) for path in (RUN, back))
    assert list(after["model_state_dict"]) == list(before["model_state_dict"])
    assert repr(after) == repr(before)
    whole = convert_here(target, tmp_path / "whole.neutral")
    assert names(whole) == [
        "manifest.json",
        "optimizer.safetensors",
        "state.msgpack",
        "weights.safetensors",
    ]


def test_what_is_kept_beside_the_target_has_shards_too(tmp_path: Path) -> None:
    convert_here(RUN, tmp_path / "w.safetensors", "--shard-size", "300", "--keep")
    assert "weights-00003-of-00003.safetensors" in names(tmp_path / "w.safetensors.neutral")


def test_a_plan_has_them_and_writes_nothing(tmp_path: Path) -> None:
    code, shown = invoke("plan", RUN, tmp_path / "w.safetensors", "--shard-size", "300")
    assert code == 0, shown
    assert names(tmp_path) == []


def test_saved_by_the_library(tmp_path: Path) -> None:
    document = ckptconv.open(RUN)
    report = ckptconv.save(document, tmp_path / "w.safetensors", shard_size="0.3KB")
    assert [name for name, _ in report.files] == names(tmp_path)
    report = ckptconv.convert(RUN, tmp_path / "a.neutral", shard_size=10**9)
    assert "weights.safetensors" in [name for name, _ in report.files]


@pytest.mark.parametrize(
    ("target", "options"),
    [
        ("out.pt", ["--shard-size", "5GB"]),
        ("out-1", ["--shard-size", "5GB", "--template", FRESH]),
        ("out.safetensors", ["--shard-size", "5 gigabytes"]),
        ("out.neutral", ["--shard-size", "0"]),
    ],
)
def test_wrong_usage(target: str, options: list[object], tmp_path: Path) -> None:
    for command in ("convert", "plan"):
        code, shown = invoke(command, RUN, tmp_path / target, *options, "--json")
        assert code == 2, shown
        (problem,) = json.loads(shown)["problems"]
        assert (problem["code"], problem["loc"]) == ("usage", ["--shard-size", options[1]])
    assert names(tmp_path) == []
