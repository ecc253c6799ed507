"""Checkpoints of TensorFlow's first format, as TensorFlow writes them: every dtype, slices, shards."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import shutil
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
tf = pytest.importorskip("tensorflow")

import ckptconv  # noqa: E402
from ckptconv import engine  # noqa: E402
from ckptconv.detect import read_raw  # noqa: E402
from ckptconv.errors import CkptError  # noqa: E402
from ckptconv.formats.string_tensor import read_strings  # noqa: E402
from ckptconv.formats.tensor_bundle import FORMAT  # noqa: E402
from ckptconv.ops import Permute, Slice  # noqa: E402
from ckptconv.rawtree import DictNode  # noqa: E402
from ckptconv.rereading import check_sources  # noqa: E402
from ckptconv.tensor import StoredTensor, TensorRef, as_bytes  # noqa: E402

FIXTURE = Path(__file__).parents[2] / "fixtures/tensorflow/v1"
EXPECTED: dict[str, Any] = json.loads((FIXTURE / "expected.json").read_text())


def tensors(path: Path) -> dict[str, TensorRef]:
    root = read_raw(path).root
    assert isinstance(root, DictNode)
    return {str(key): node for key, node in root.items if isinstance(node, TensorRef)}


def save(path: Path, named: dict[str, Any]) -> Path:
    values = [tf.convert_to_tensor(value) for value in named.values()]
    tf.raw_ops.Save(filename=str(path), tensor_names=list(named), data=values)
    return path


def described(tensor: TensorRef) -> dict[str, Any]:
    spec = {"dtype": tensor.dtype.name, "shape": list(tensor.shape)}
    if tensor.dtype.name == "string":
        return {**spec, "hex": [element.hex() for element in read_strings(tensor)]}
    return {**spec, "sha256": hashlib.sha256(as_bytes(tensor.read()).tobytes()).hexdigest()}


@pytest.mark.parametrize("name", ["v1", EXPECTED["checkpoint"], "v1-00001-of-00002"])
def test_every_tensor_is_what_tensorflow_restores(name: str) -> None:
    """Named by its prefix, by the pattern of a state file, by one of its shards."""
    found = {key: described(tensor) for key, tensor in tensors(FIXTURE / name).items()}
    expected = EXPECTED["tensors"]
    half = {
        key: {**entry, "dtype": entry["dtype"].replace("half", "float16")} for key, entry in expected.items()
    }
    assert found == half
    check_sources(extent for tensor in tensors(FIXTURE / name).values() for extent in tensor.extents)


def test_it_is_written_as_a_bundle_with_its_shards_and_slices(tmp_path: Path) -> None:
    raw = read_raw(FIXTURE / "v1")
    engine.write(FORMAT.layout(raw, tmp_path / "run"), tmp_path / "run")
    reader = tf.train.load_checkpoint(str(tmp_path / "run"))
    assert {key: described(tensor) for key, tensor in tensors(tmp_path / "run").items()} == {
        key: described(tensor) for key, tensor in tensors(FIXTURE / "v1").items()
    }
    assert set(reader.get_variable_to_shape_map()) == set(EXPECTED["tensors"])
    assert (tmp_path / "run.data-00001-of-00002").exists()
    again = read_raw(tmp_path / "run")
    assert {**again.attributes, "prefix": "v1", "container": "v1"} == dict(raw.attributes)


def test_windows_blocks_and_pickles_of_what_is_decoded(tmp_path: Path) -> None:
    """Varints in windows of any size, boxes of them, turned, and in another process."""
    rng = np.random.default_rng(7)
    arrays = {
        "int64": rng.integers(-(2**62), 2**62, (40, 31)) >> rng.integers(0, 62, (40, 31)),
        "half": rng.normal(size=(40, 31)).astype(np.float16),
        "int8": rng.integers(-128, 128, (40, 31)).astype(np.int8),
    }
    for name, tensor in tensors(save(tmp_path / "model.ckpt-1", arrays)).items():
        wanted = arrays[name]
        for nbytes in (1, 3, 64, 1 << 20):
            pieces = [piece.tobytes() for piece in tensor.windows(nbytes)]
            assert b"".join(pieces) == wanted.tobytes()
            assert max(map(len, pieces)) <= max(nbytes, wanted.itemsize)
        np.testing.assert_array_equal(tensor.block((3, 5), (17, 29)), wanted[3:17, 5:29])
        turned = tensor.apply(Permute((1, 0))).apply(Slice(0, 2, 9))
        np.testing.assert_array_equal(turned.read(), wanted.T[2:9])
        np.testing.assert_array_equal(pickle.loads(pickle.dumps(tensor)).read(), wanted)


def test_a_large_value_is_neither_read_by_opening_nor_held_whole(tmp_path: Path) -> None:
    """Floats are the file's own bytes; whole numbers are decoded in windows."""
    floats = np.random.default_rng(1).normal(size=(2048, 1024)).astype("float32")
    numbers = np.arange(-(1 << 19), 1 << 19)
    path = save(tmp_path / "model.ckpt-1", {"floats": floats, "numbers": numbers, "bias": floats[0]})
    tracemalloc.start()
    found = tensors(path)
    _, peak = tracemalloc.get_traced_memory()
    assert peak < 1 << 20
    assert isinstance(found["floats"], StoredTensor)
    digest = hashlib.sha256()
    tracemalloc.reset_peak()
    for piece in found["numbers"].windows(1 << 16):
        digest.update(piece.tobytes())
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 4 << 20
    assert digest.digest() == hashlib.sha256(numbers.astype("int64").tobytes()).digest()
    np.testing.assert_array_equal(found["floats"].block((7, 9), (9, 700)), floats[7:9, 9:700])


def test_many_tensors_share_blocks(tmp_path: Path) -> None:
    rng = np.random.default_rng(2)
    arrays = {f"layer/{number}/kernel": rng.normal(size=(90, 13)).astype("float32") for number in range(300)}
    found = tensors(save(tmp_path / "model.ckpt-1", arrays))
    assert list(found) == sorted(arrays)
    for name, wanted in arrays.items():
        np.testing.assert_array_equal(found[name].read(), wanted)
    blocks = {extent.checked.id for tensor in found.values() for extent in tensor.extents}
    assert 1 < len(blocks) < len(arrays)


def test_a_flipped_bit_is_found_by_the_pass_that_reads_it(tmp_path: Path) -> None:
    values = np.random.default_rng(3).normal(size=(400, 400)).astype("float32")
    path = save(tmp_path / "model.ckpt-1", {"a": values, "b": values[0]})
    data = bytearray(path.read_bytes())
    data[data.index(values[200].tobytes()) + 17] ^= 4
    path.write_bytes(data)
    with pytest.raises(CkptError) as caught:
        ckptconv.convert(path, tmp_path / "out", to="safetensors")
    (problem,) = caught.value.problems
    assert (problem.code, problem.loc) == ("checksum-mismatch", ("model.ckpt-1", "out/a"))
    assert [problem.code for problem in ckptconv.validate(path)] == ["checksum-mismatch"]


def test_a_directory_is_read_by_its_state_file(tmp_path: Path) -> None:
    """Relative, absolute, stale; the pattern of shards; another one by --select."""
    for shard in FIXTURE.glob("v1-*-of-*"):
        shutil.copy(shard, tmp_path / shard.name)
    save(tmp_path / "model.ckpt-3", {"a": np.float32(3)})
    state = tmp_path / "checkpoint"
    for newest in ("v1-?????-of-00002", f"{tmp_path}/v1-?????-of-00002", "/gone/v1-?????-of-00002"):
        state.write_text(
            f'model_checkpoint_path: "{newest}"\nall_model_checkpoint_paths: "/gone/model.ckpt-3"\n'
            f'all_model_checkpoint_paths: "{newest}"\n'
        )
        opened = ckptconv.open(tmp_path)
        assert opened.provenance.source == "v1"
        assert any("'v1' was taken" in said and "model.ckpt-3" in said for said in opened.oddities)
        assert ckptconv.open(tmp_path, select=["model.ckpt-3"]).provenance.source == "model.ckpt-3"
