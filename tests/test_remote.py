"""Checkpoints behind URLs: read by ranges as the local ones are, written whole or not at all."""

from __future__ import annotations

import contextlib
import json
import pickle
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

fsspec = pytest.importorskip("fsspec", reason="needs fsspec to read URLs")

import ckptconv  # noqa: E402
from ckptconv.errors import CkptError  # noqa: E402
from ckptconv.remote import RemotePath, place  # noqa: E402
from tests.support.command import FIXTURES, invoke, refused_here  # noqa: E402

CASES = (
    "plain/mlp-adamw/run.pt",
    "lightning/mid-epoch/run.ckpt",
    "hf-trainer/sharded/checkpoint",
    "accelerate/two-models/state",
    "dcp/fsdp-2-ranks/run",
    "dcp/safetensors-2-ranks/run",
    "keras3/sequential-adam/artifact/ckpt-1",
    "tf-keras/sequential-adam/artifact",
    "tf1/partitioned-adam/artifact/model.ckpt-3",
    "tf1/v1-sharded/artifact",
    "keras-file/keras3-adam/artifact/model.keras",
    "keras-file/keras3-shards/artifact/model.weights.json",
    "h5/tf-keras-adam/artifact/model.h5",
)


@pytest.fixture
def memory() -> Iterator[Any]:
    """A file system in this process, empty before and after."""
    fs = fsspec.filesystem("memory")
    fs.store.clear()
    yield fs
    fs.store.clear()


def put(fs: Any, local: Path, key: str) -> None:
    for path in sorted(local.rglob("*")) if local.is_dir() else [local]:
        if path.is_file():
            inside = "" if path == local else f"/{path.relative_to(local).as_posix()}"
            fs.pipe(f"/{key}{inside}", path.read_bytes())


@pytest.mark.parametrize("case", CASES)
def test_a_document_is_that_of_the_local_file(case: str, memory: Any) -> None:
    local = FIXTURES / case
    put(memory, local.parent, "bucket")
    ours, theirs = ckptconv.open(local), ckptconv.open(f"memory://bucket/{local.name}")
    assert theirs.progress == ours.progress
    mine, other = dict(ours.tensors()), dict(theirs.tensors())
    assert list(mine) == list(other)
    for address, tensor in mine.items():
        assert tensor.read().tobytes() == other[address].read().tobytes()


def test_a_run_crosses_from_url_to_url_and_back(memory: Any, tmp_path: Path) -> None:
    put(memory, FIXTURES / "plain" / "mlp-adamw" / "run.pt", "in/run.pt")
    fresh = FIXTURES / "keras3" / "mlp-adamw-fresh" / "ckpt-1"
    report = ckptconv.convert("memory://in/run.pt", "memory://out/ckpt-1", template=fresh)
    assert report.verified
    assert memory.find("/out") == ["/out/checkpoint", "/out/ckpt-1.data-00000-of-00001", "/out/ckpt-1.index"]
    ckptconv.convert("memory://in/run.pt", tmp_path / "ckpt-1", template=fresh)
    for name in ("ckpt-1.index", "ckpt-1.data-00000-of-00001"):
        assert memory.cat(f"/out/{name}") == (tmp_path / name).read_bytes()
    assert ckptconv.validate("memory://out/ckpt-1", require=["step"]) == []
    ckptconv.convert("memory://out/ckpt-1", "memory://out/run.neutral")
    assert ckptconv.validate("memory://out/run.neutral") == []


def test_the_state_file_beside_a_bundle_goes_on(memory: Any) -> None:
    fresh = FIXTURES / "keras3" / "mlp-adamw-fresh" / "ckpt-1"
    run = FIXTURES / "plain" / "mlp-adamw" / "run.pt"
    for number in (1, 2):
        ckptconv.convert(run, f"memory://out/ckpt-{number}", template=fresh)
    text = memory.cat("/out/checkpoint").decode()
    assert 'model_checkpoint_path: "ckpt-2"' in text
    assert 'all_model_checkpoint_paths: "ckpt-1"' in text


def test_an_existing_target_is_kept_or_replaced_whole(memory: Any) -> None:
    run = FIXTURES / "plain" / "mlp-adamw" / "run.pt"
    ckptconv.convert(run, "memory://out/n.neutral", shard_size=300)
    many = set(memory.find("/out"))
    with pytest.raises(CkptError) as caught:
        ckptconv.convert(run, "memory://out/n.neutral")
    assert caught.value.problems[0].code == "target-exists"
    assert set(memory.find("/out")) == many
    ckptconv.convert(run, "memory://out/n.neutral", force=True)
    assert len(memory.find("/out")) < len(many)
    assert ckptconv.validate("memory://out/n.neutral") == []


def test_a_directory_that_is_no_checkpoint_is_not_replaced(memory: Any) -> None:
    memory.pipe("/out/n.neutral/mine.txt", b"")
    with pytest.raises(CkptError) as caught:
        ckptconv.convert(FIXTURES / "plain" / "mlp-adamw" / "run.pt", "memory://out/n.neutral", force=True)
    assert caught.value.problems[0].code == "target-exists"
    assert memory.find("/out") == ["/out/n.neutral/mine.txt"]


def test_what_makes_a_target_whole_comes_last(memory: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    put_file = RemotePath.put

    def recorded(self: RemotePath, local: Path) -> None:
        order.append(self.name)
        put_file(self, local)

    monkeypatch.setattr(RemotePath, "put", recorded)
    run = FIXTURES / "plain" / "mlp-adamw" / "run.pt"
    ckptconv.convert(run, "memory://out/n.neutral")
    assert order[-1] == "manifest.json"

    def broken(self: RemotePath, local: Path) -> None:
        if self.name == "optimizer.safetensors":
            raise ConnectionResetError("the network is gone")
        put_file(self, local)

    monkeypatch.setattr(RemotePath, "put", broken)
    with pytest.raises(CkptError) as caught:
        ckptconv.convert(run, "memory://out/n.neutral", force=True)
    assert caught.value.problems[0].code == "target-unwritable"
    assert not memory.exists("/out/n.neutral/manifest.json")


def test_a_source_that_changes_is_noticed(memory: Any, tmp_path: Path) -> None:
    run = FIXTURES / "plain" / "mlp-adamw" / "run.pt"
    put(memory, run, "in/run.pt")
    checkpoint = ckptconv.open("memory://in/run.pt")
    memory.pipe("/in/run.pt", run.read_bytes())
    with pytest.raises(CkptError) as caught:
        ckptconv.save(checkpoint, tmp_path / "w.safetensors")
    assert {p.code for p in caught.value.problems} == {"source-changed"}
    assert not (tmp_path / "w.safetensors").exists()


def test_sources_cross_to_other_processes(memory: Any) -> None:
    memory.pipe("/in/a.bin", bytes(range(100)))
    source = place("memory://in/a.bin").source()  # type: ignore[attr-defined]  # a RemotePath
    again = pickle.loads(pickle.dumps(source))
    out = bytearray(10)
    again.read_into(20, memoryview(out))
    assert out == bytes(range(20, 30))


@pytest.mark.parametrize("url", ["memory://in/nothing.pt", "memory://nowhere/at/all"])
def test_what_is_not_there_is_said(url: str, memory: Any) -> None:
    (problem,) = refused_here("inspect", url)
    assert problem["code"] == "missing-file"


def test_a_protocol_that_nobody_knows_is_wrong_usage() -> None:
    code, shown = invoke("inspect", "nosuchthing://bucket/a.pt", "--json")
    assert code == 2
    assert json.loads(shown)["problems"][0]["code"] == "usage"


@contextlib.contextmanager
def requests(fs: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """The bytes of each range that is fetched meanwhile."""
    asked: list[int] = []
    fetch = type(fs).cat_file

    def counted(self: Any, path: str, start: int, end: int, **options: Any) -> bytes:
        asked.append(end - start)
        return bytes(fetch(self, path, start=start, end=end, **options))

    with monkeypatch.context() as patched:
        patched.setattr(type(fs), "cat_file", counted)
        yield asked


def test_headers_take_few_requests_and_hardly_more_than_their_bytes(
    memory: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory.pipe("/in/a.bin", bytes(5_000_000))
    source = place("memory://in/a.bin").source()  # type: ignore[attr-defined]  # a RemotePath
    with requests(memory, monkeypatch) as asked:
        for at in range(0, 1_000_000, 4096):
            source.read_into(at, memoryview(bytearray(4096)))
    assert sum(asked) < 1.2e6
    assert len(asked) < 40


def test_of_a_torch_file_its_directory_headers_and_pickle_are_fetched(
    memory: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch = pytest.importorskip("torch")
    torch.save({f"layer{n}.weight": torch.zeros(16, 128) for n in range(1000)}, tmp_path / "w.pt")
    put(memory, tmp_path / "w.pt", "in/w.pt")
    with zipfile.ZipFile(tmp_path / "w.pt") as archive:
        infos = archive.infolist()
        directory = (tmp_path / "w.pt").stat().st_size - archive.start_dir
        headers = sum(30 + len(info.filename) for info in infos)
        small = sum(info.file_size for info in infos if "/data/" not in info.filename)
    with requests(memory, monkeypatch) as asked:
        checkpoint = ckptconv.open("memory://in/w.pt")
    assert len(checkpoint.params) == 1000
    assert sum(asked) < 1.2 * (directory + headers + small)


def test_a_report_stands_beside_a_target_far_away(memory: Any, tmp_path: Path) -> None:
    run, report = FIXTURES / "plain" / "mlp-adamw" / "run.pt", tmp_path / "report.json"
    code, shown = invoke("convert", run, "memory://out/w.safetensors", "--report", report)
    assert code == 0, shown
    assert json.loads(report.read_text())["target"] == "w.safetensors"
