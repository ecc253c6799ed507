"""Folders of several files that are one PyTorch checkpoint: which ones are, what is read, what is written."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from ckptconv import engine, verification
from ckptconv.detect import detect_format, read_raw
from ckptconv.errors import CkptError
from ckptconv.formats.table import FORMATS
from ckptconv.formats.torch_folder import producer_of
from ckptconv.formats.torch_producers import PRODUCERS
from ckptconv.rawtree import DictNode, RawTree, dict_of
from ckptconv.tensor import StoredTensor, TensorRef

torch = pytest.importorskip("torch")


def trainer_folder(path: Path) -> Path:
    """What a Trainer leaves, as far as a format sees it."""
    path.mkdir()
    rng = np.random.default_rng(0)
    pt = {"format": "pt"}
    save_file({"a.weight": rng.random((3, 2), np.float32)}, path / "model-00001-of-00002.safetensors", pt)
    save_file({"b.weight": rng.random((2,), np.float32)}, path / "model-00002-of-00002.safetensors", pt)
    weight_map = {
        "a.weight": "model-00001-of-00002.safetensors",
        "b.weight": "model-00002-of-00002.safetensors",
    }
    index = {"metadata": {"total_size": 32}, "weight_map": weight_map}
    (path / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    state = {0: {"step": torch.tensor(4.0), "exp_avg": torch.rand(3, 2)}}
    torch.save({"state": state, "param_groups": [{"lr": 0.1, "params": [0]}]}, path / "optimizer.pt")
    torch.save({"numpy": np.random.RandomState(3).get_state(), "cpu": torch.get_rng_state()}, path / "r.pth")
    (path / "trainer_state.json").write_text('{\n  "global_step": 4,\n  "best_metric": NaN\n}\n')
    (path / "tokenizer.model").write_bytes(b"\x0a\x0e\x0a\x05<unk>")
    (path / "empty.txt").write_bytes(b"")
    return path


def write(raw: RawTree, target: Path) -> Path:
    format_ = FORMATS["pytorch"]
    layout = format_.layout(raw, target)
    engine.write(layout, target, verify=verification.checker(format_, raw, layout))
    return target


def member(raw: RawTree, name: str) -> DictNode:
    assert isinstance(raw.root, DictNode)
    node = raw.root.get(name)
    assert isinstance(node, DictNode)
    return node


def test_each_file_is_read_by_its_format(tmp_path: Path) -> None:
    folder = trainer_folder(tmp_path / "checkpoint-4")
    raw = read_raw(folder)
    assert raw.format == "pytorch"
    assert {key: raw.attributes[key] for key in sorted(os.listdir(folder))} == {
        "empty.txt": "bytes",
        "model-00001-of-00002.safetensors": "safetensors",
        "model-00002-of-00002.safetensors": "safetensors",
        "model.safetensors.index.json": "json",
        "optimizer.pt": "pytorch",
        "r.pth": "pytorch",
        "tokenizer.model": "bytes",
        "trainer_state.json": "json",
    }
    assert raw.attributes["producer"] == "hf-trainer"
    assert member(raw, "trainer_state.json").get("global_step") == 4
    tensor = member(raw, "model-00002-of-00002.safetensors").get("b.weight")
    assert isinstance(tensor, TensorRef)
    assert tensor.shape == (2,)


def test_what_is_written_is_what_was_read(tmp_path: Path) -> None:
    folder = trainer_folder(tmp_path / "checkpoint-4")
    again = write(read_raw(folder), tmp_path / "again")
    assert sorted(os.listdir(again)) == sorted(os.listdir(folder))
    for name in os.listdir(folder):
        if not name.endswith((".pt", ".pth")):  # a zip has an id that follows from its content, ours too
            assert (again / name).read_bytes() == (folder / name).read_bytes(), name
    ours, theirs = (torch.load(f / "optimizer.pt") for f in (again, folder))
    assert torch.equal(ours["state"][0]["exp_avg"], theirs["state"][0]["exp_avg"])
    assert torch.equal(ours["state"][0]["step"], theirs["state"][0]["step"])
    ours, theirs = (torch.load(f / "r.pth", weights_only=False) for f in (again, folder))
    assert np.array_equal(ours["numpy"][1], theirs["numpy"][1])
    assert torch.equal(ours["cpu"], theirs["cpu"])


def test_the_mark_is_published_last_and_the_note_is_a_file(tmp_path: Path) -> None:
    folder = trainer_folder(tmp_path / "checkpoint-4")
    raw = replace(read_raw(folder), note='{"a": 1}')
    layout = FORMATS["pytorch"].layout(raw, tmp_path / "out")
    assert layout.kind == "directory"
    assert layout.files[-1].name == "trainer_state.json"
    assert read_raw(write(raw, tmp_path / "out")).note == '{"a": 1}'


def test_files_of_directories_below_stand_under_their_path(tmp_path: Path) -> None:
    folder = tmp_path / "iter_0000004"
    (folder / "mp_rank_00").mkdir(parents=True)
    (folder / "elsewhere").mkdir()
    torch.save({"iteration": 4, "x": torch.rand(2)}, folder / "mp_rank_00" / "model_optim_rng.pt")
    raw = read_raw(folder)
    assert raw.attributes["producer"] == "megatron"
    assert raw.attributes["not_read"] == ("elsewhere",)
    assert member(raw, "mp_rank_00/model_optim_rng.pt").get("iteration") == 4
    again = read_raw(write(raw, tmp_path / "again"))
    assert member(again, "mp_rank_00/model_optim_rng.pt").get("iteration") == 4


def test_equal_names_in_two_directories_are_told_apart_when_verified(tmp_path: Path) -> None:
    folder = tmp_path / "pipeline"
    for number, part in enumerate(("unet", "vae")):
        (folder / part).mkdir(parents=True)
        values = np.full((4,), number, np.float32)
        save_file({"w": values}, folder / part / "diffusion_pytorch_model.safetensors")
    (folder / "model_index.json").write_text("{}")
    again = read_raw(write(read_raw(folder), tmp_path / "again"))
    tensor = member(again, "vae/diffusion_pytorch_model.safetensors").get("w")
    assert isinstance(tensor, TensorRef)
    assert tensor.read().tolist() == [1.0] * 4


def test_other_folders_are_left_to_their_formats(tmp_path: Path) -> None:
    (tmp_path / "plain").mkdir()
    torch.save({}, tmp_path / "plain" / "a.pt")
    assert producer_of(tmp_path / "plain") is None
    dcp = trainer_folder(tmp_path / "dcp")
    (dcp / ".metadata").write_bytes(b"")
    assert producer_of(dcp) is None
    index_only = tmp_path / "weights"
    index_only.mkdir()
    save_file({"w": np.zeros(2, np.float32)}, index_only / "model-00001-of-00001.safetensors")
    weight_map = {"w": "model-00001-of-00001.safetensors"}
    (index_only / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert detect_format(index_only).name == "safetensors"


def test_every_producer_is_told_by_its_marks() -> None:
    assert len({producer.name for producer in PRODUCERS}) == len(PRODUCERS)
    assert all(producer.marks and producer.source for producer in PRODUCERS)


@pytest.mark.parametrize(
    ("weight_map", "code"),
    [
        ({"a.weight": "model-00003-of-00002.safetensors"}, "missing-file"),
        ({"a.weight": "../checkpoint-4/model-00001-of-00002.safetensors"}, "missing-file"),
        ({"c.weight": "model-00001-of-00002.safetensors"}, "corrupt-file"),
        ({"a.weight": 3}, "missing-file"),
    ],
)
def test_an_index_of_other_shards_is_refused(
    tmp_path: Path, weight_map: dict[str, object], code: str
) -> None:
    folder = trainer_folder(tmp_path / "checkpoint-4")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(CkptError) as caught:
        read_raw(folder)
    assert [(p.code, p.loc) for p in caught.value.problems] == [(code, ("model.safetensors.index.json",))]


@pytest.mark.parametrize("name", ["../a.pt", "/a.pt", "a/../../b.pt", "a\\b.pt", "", "a//b.pt"])
def test_a_file_is_never_written_outside(tmp_path: Path, name: str) -> None:
    raw = RawTree(format="pytorch", root=dict_of({name: dict_of({})}), attributes={"container": "directory"})
    with pytest.raises(CkptError) as caught:
        FORMATS["pytorch"].layout(raw, tmp_path / "out")
    assert caught.value.problems[0].code == "unsupported-feature"


def test_what_is_no_file_of_its_format_is_refused(tmp_path: Path) -> None:
    number = StoredTensor.of_array(np.zeros(3, np.float32))
    trees = {"x.json": dict_of({"t": number}), "x.txt": number}
    for name, node in trees.items():
        raw = RawTree(format="pytorch", root=dict_of({name: node}), attributes={"container": "directory"})
        with pytest.raises(CkptError) as caught:
            FORMATS["pytorch"].layout(raw, tmp_path / "out")
        assert [(p.code, p.loc) for p in caught.value.problems] == [("unsupported-feature", (name,))]


def test_arrays_within_a_pickle_are_verified_too(tmp_path: Path) -> None:
    folder = trainer_folder(tmp_path / "checkpoint-4")
    raw = read_raw(folder)
    layout = FORMATS["pytorch"].layout(raw, tmp_path / "out")
    state = np.random.RandomState(4).get_state()
    changed = trainer_folder(tmp_path / "changed")
    torch.save({"numpy": state, "cpu": torch.get_rng_state()}, changed / "r.pth")
    other = read_raw(changed)
    with pytest.raises(CkptError) as caught:
        engine.write(layout, tmp_path / "out", verify=verification.checker(FORMATS["pytorch"], other, layout))
    assert [p.code for p in caught.value.problems] == ["verify-failed"]


def test_a_folder_with_sharded_weights_and_a_run_beside_them_is_the_runs(tmp_path: Path) -> None:
    folder = trainer_folder(tmp_path / "checkpoint-4")
    assert FORMATS["safetensors"].sniff(folder)
    assert detect_format(folder).name == "pytorch"
