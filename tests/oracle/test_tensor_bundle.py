"""Bundles against TensorFlow itself: what it writes is read bit-equal, what is written here it reads."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
tf = pytest.importorskip("tensorflow")

from ckptconv.formats import protos, string_tensor  # noqa: E402
from ckptconv.formats.checkpoint_state import CheckpointState  # noqa: E402
from ckptconv.formats.object_graph import OBJECT_GRAPH_KEY, ObjectGraph, variable_key  # noqa: E402
from ckptconv.formats.tensor_bundle import FORMAT, NOTE_KEY  # noqa: E402
from ckptconv.rawtree import DictNode, RawTree, dict_of  # noqa: E402
from ckptconv.tensor import StoredTensor, TensorRef  # noqa: E402
from tests.support.tables import assembled, block, entries_of, rewrite  # noqa: E402
from tests.support.write_layout import write_layout  # noqa: E402

FLOATS = "float32 float64 half bfloat16 complex64 complex128 float8_e5m2 float8_e4m3fn"
DTYPES = f"{FLOATS} int4 int8 int16 int32 int64 uint4 uint8 uint16 uint32 uint64".split()
FIXTURE = Path(__file__).parents[2] / "fixtures/tensorflow/bundle/bundle"


def tensors(raw: RawTree) -> Iterator[tuple[str, TensorRef]]:
    assert isinstance(raw.root, DictNode)
    for key, node in raw.root.items:
        assert isinstance(key, str)
        assert isinstance(node, TensorRef)
        yield key, node


def value_of(tensor: TensorRef) -> object:
    """Shape and bytes, comparable with those of a numpy array from TensorFlow."""
    if tensor.dtype == string_tensor.STRING:
        return tensor.shape, string_tensor.read_strings(tensor)
    return tensor.shape, tensor.read().tobytes()


def oracle(reader: object, key: str) -> object:
    got = reader.get_tensor(key)  # type: ignore[attr-defined]
    if isinstance(got, bytes):
        return (), [got]
    array = np.asarray(got)
    return array.shape, list(array.reshape(-1)) if array.dtype == object else array.tobytes()


def assert_same_as_tensorflow(prefix: Path) -> RawTree:
    """Our reading of a checkpoint, after it was compared with TensorFlow's, key by key."""
    raw = FORMAT.read(prefix)
    reader = tf.train.load_checkpoint(str(prefix))
    listed = reader.get_variable_to_dtype_map()
    if raw.note is not None:
        assert listed.pop(NOTE_KEY) == tf.string
    ours = dict(tensors(raw))
    assert {key: t.dtype.tensorflow for key, t in ours.items()} == {
        key: dtype.as_datatype_enum for key, dtype in listed.items()
    }
    for key, tensor in ours.items():
        if tensor.dtype.name != "variant":
            assert value_of(tensor) == oracle(reader, key), key
    return raw


def write(raw: RawTree, prefix: Path) -> Path:
    write_layout(FORMAT.layout(raw, prefix), prefix)
    return prefix


def save(prefix: Path, named: dict[str, object]) -> Path:
    """`SaveV2` itself, without an object graph."""
    prefix.parent.mkdir(exist_ok=True)
    values = [tf.convert_to_tensor(value) for value in named.values()]
    tf.raw_ops.SaveV2(
        prefix=str(prefix), tensor_names=list(named), shape_and_slices=[""] * len(named), tensors=values
    )
    return prefix


def in_order_of(raw: RawTree, names: list[str]) -> RawTree:
    found = dict(tensors(raw))
    return replace(raw, root=DictNode(items=tuple((name, found[name]) for name in names)))


def files_of(prefix: Path) -> dict[str, bytes]:
    return {
        path.name.removeprefix(prefix.name): path.read_bytes()
        for path in prefix.parent.iterdir()
        if path.name.startswith(f"{prefix.name}.")
    }


def test_the_fixture_is_read_and_written_like_tensorflow(tmp_path: Path) -> None:
    """Every dtype, strings, slices, two shards, an empty tensor, keys that are not ASCII."""
    raw = assert_same_as_tensorflow(FIXTURE)
    written = write(raw, tmp_path / "again")
    again = assert_same_as_tensorflow(written)
    assert again.attributes == {**raw.attributes, "prefix": "again"}
    keys = [key for key, _ in entries_of((tmp_path / "again.index").read_bytes())]
    assert keys == [key for key, _ in entries_of(Path(f"{FIXTURE}.index").read_bytes())]
    assert write(again, tmp_path / "third").exists() is False
    assert files_of(tmp_path / "third") == files_of(tmp_path / "again")


def test_every_dtype_is_byte_identical(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    named: dict[str, object] = {}
    for name in DTYPES:
        dtype = tf.as_dtype(name)
        for shape in ((), (1,), (3, 2), (0, 4), (2, 0), (2, 3, 1, 2)):
            named[f"{dtype.name}/{shape}"] = np.asarray(rng.uniform(0, 8, shape)).astype(dtype.as_numpy_dtype)
    named["bool"] = rng.random((3, 3)) < 0.5
    named["nan"] = np.array([0x7FC00001, 0xFF800001], np.uint32).view(np.float32)
    named["strings"] = tf.constant([[b"", b"\0"], [b"a\0\0", b"\xff" * 300]])
    named["no strings"] = tf.constant([], tf.string)
    prefix = save(tmp_path / "a" / "x", named)
    raw = assert_same_as_tensorflow(prefix)
    (tmp_path / "b").mkdir()
    ours = write(in_order_of(raw, list(named)), tmp_path / "b" / "x")
    assert files_of(ours) == files_of(prefix)


def test_seven_thousand_keys_in_any_order_are_byte_identical(tmp_path: Path) -> None:
    names = [f"model/{'block/' * (i % 9)}{i}/größe" for i in range(6990)]
    names += ["a" * 3000 + str(i) for i in range(10)]
    random.Random(5).shuffle(names)
    named = {name: np.full((i % 4,), i, np.int32) for i, name in enumerate(names)}
    prefix = save(tmp_path / "a" / "x", named)  # type: ignore[arg-type]
    raw = FORMAT.read(prefix)
    for name, tensor in tensors(raw):
        assert np.array_equal(tensor.read(), named[name])
    assert [name for name, _ in tensors(raw)] == sorted(names, key=str.encode)
    (tmp_path / "b").mkdir()
    ours = write(in_order_of(raw, names), tmp_path / "b" / "x")
    assert files_of(ours) == files_of(prefix)


def test_a_key_larger_than_a_block_is_byte_identical(tmp_path: Path) -> None:
    named = {"a": 1, "b" * 600_000: 2, "c": 3, "d" * 300_000: 4, "e": 5}
    prefix = save(tmp_path / "a" / "x", named)  # type: ignore[arg-type]
    (tmp_path / "b").mkdir()
    ours = write(in_order_of(FORMAT.read(prefix), list(named)), tmp_path / "b" / "x")
    assert files_of(ours) == files_of(prefix)


def test_an_empty_tensor_alone(tmp_path: Path) -> None:
    prefix = save(tmp_path / "a" / "x", {"nothing": np.zeros((0, 3), np.float32)})
    raw = assert_same_as_tensorflow(prefix)
    assert_same_as_tensorflow(write(raw, tmp_path / "y"))


def test_partitioned_variables_are_byte_identical(tmp_path: Path) -> None:
    """Slices with explicit and with full extents, in the order that TensorFlow was given them."""
    value = np.arange(24, dtype=np.float32).reshape(6, 4)
    parts = {
        "6 4 0,2:-": value[:2],
        "6 4 2,3:0,4": value[2:5],
        "6 4 5,1:0,1": value[5:, :1],
        "6 4 5,1:1,3": value[5:, 1:],
    }
    prefix = tmp_path / "x"
    tf.raw_ops.SaveV2(
        prefix=str(prefix), tensor_names=["w"] * 4, shape_and_slices=list(parts), tensors=list(parts.values())
    )
    raw = assert_same_as_tensorflow(prefix)
    ours = write(raw, tmp_path / "y")
    assert files_of(ours) == files_of(prefix)
    doubled = StoredTensor.of_array(value * 2)
    changed = write(replace(raw, root=dict_of({"w": doubled})), tmp_path / "z")
    assert np.array_equal(tf.train.load_checkpoint(str(changed)).get_tensor("w"), value * 2)
    got = tf.raw_ops.RestoreV2(
        prefix=str(changed), tensor_names=["w"], shape_and_slices=["6 4 1,4:1,2"], dtypes=[tf.float32]
    )
    assert np.array_equal(got[0], value[1:5, 1:3] * 2)


def test_big_endian(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    named = {
        "f4": rng.normal(size=(3, 2)).astype(np.float32),
        "c16": rng.normal(size=2) + 1j * rng.normal(size=2),
        "u1": np.arange(3, dtype=np.uint8),
    }
    big = {key: StoredTensor.of_array(value.view(np.uint8).copy()) for key, value in named.items()}
    for key, value in named.items():
        swapped = value.byteswap().reshape(-1).view(np.uint8)
        big[key] = StoredTensor.of_array(swapped)
    prefix = write(RawTree(format="tensorflow", root=dict_of(dict(big))), tmp_path / "x")

    def relabel(entries: list[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
        out = []
        for key, data in entries:
            if not key:
                out.append((key, bytes.fromhex("0801 1001 1a02 0801")))
                continue
            entry = protos.parse(protos.BundleEntryProto, data, ())
            value = named[key.decode()]
            entry.dtype = tf.as_dtype(value.dtype).as_datatype_enum
            entry.shape.ClearField("dim")
            for size in value.shape:
                entry.shape.dim.add().size = size
            out.append((key, entry.SerializeToString()))
        return out

    rewrite(tmp_path / "x.index", relabel)
    raw = assert_same_as_tensorflow(prefix)
    for key, tensor in tensors(raw):
        assert np.array_equal(tensor.read(), named[key])
    assert_same_as_tensorflow(write(raw, tmp_path / "little"))


def test_snappy_blocks(tmp_path: Path) -> None:
    shutil.copy(f"{FIXTURE}.data-00000-of-00002", tmp_path / "x.data-00000-of-00002")
    shutil.copy(f"{FIXTURE}.data-00001-of-00002", tmp_path / "x.data-00001-of-00002")
    rows = entries_of(Path(f"{FIXTURE}.index").read_bytes())
    half = len(rows) // 2
    table = assembled(
        [block(rows[:half]), block(rows[half:])],
        [(rows[half - 1][0], b"0"), (rows[-1][0], b"1")],
        compress=True,
    )
    (tmp_path / "x.index").write_bytes(table)
    assert_same_as_tensorflow(tmp_path / "x")


def keras_run(seed: int) -> tuple[object, object]:
    tf.keras.utils.set_random_seed(seed)
    model = tf.keras.Sequential(
        [
            tf.keras.layers.Input((3,)),
            tf.keras.layers.Dense(4),
            tf.keras.layers.BatchNormalization(),
            tf.keras.layers.Dense(2),
        ]
    )
    optimizer = tf.keras.optimizers.Adam(0.01 * seed)
    optimizer.build(model.trainable_variables)
    for i, variable in enumerate((*model.variables, *optimizer.variables)):
        variable.assign(tf.cast(tf.random.stateless_normal(variable.shape, (seed, i)) * 50, variable.dtype))
    return model, optimizer


def state_of(model: object, optimizer: object) -> list[bytes]:
    return [v.numpy().tobytes() for v in (*model.variables, *optimizer.variables)]  # type: ignore[attr-defined]


def test_a_keras_run_restores_from_what_is_written(tmp_path: Path) -> None:
    model, optimizer = keras_run(1)
    path = Path(tf.train.Checkpoint(model=model, optimizer=optimizer).save(str(tmp_path / "a" / "ckpt")))
    raw = assert_same_as_tensorflow(path)
    assert raw.note is None
    (graph,) = string_tensor.read_strings(dict(tensors(raw))[OBJECT_GRAPH_KEY])
    assert ObjectGraph.parse(graph).serialize() == graph

    (tmp_path / "b").mkdir()
    written = write(replace(raw, note='{"step": 9, "name": "Größe"}'), tmp_path / "b" / "ckpt-1")
    assert assert_same_as_tensorflow(written).note == '{"step": 9, "name": "Größe"}'
    other, other_optimizer = keras_run(2)
    assert state_of(other, other_optimizer) != state_of(model, optimizer)
    tf.train.Checkpoint(model=other, optimizer=other_optimizer).restore(str(written)).assert_consumed()
    assert state_of(other, other_optimizer) == state_of(model, optimizer)


def test_a_module_restores_from_what_is_written(tmp_path: Path) -> None:
    class Net(tf.Module):  # type: ignore[misc]
        def __init__(self, start: float) -> None:
            super().__init__()
            self.layers = [tf.Variable(start + i) for i in range(3)]
            self.named = {"a.b/c": tf.Variable([start] * 2, dtype=tf.bfloat16)}
            self.text = tf.Variable("x")

    first, second = Net(1.0), Net(5.0)
    first.text.assign("ends in NUL\0")
    path = Path(tf.train.Checkpoint(first).write(str(tmp_path / "a")))
    raw = assert_same_as_tensorflow(path)
    assert variable_key(("named", "a.b/c")) in dict(tensors(raw))
    written = write(raw, tmp_path / "b")
    tf.train.Checkpoint(second).read(str(written)).assert_consumed()
    assert [v.numpy() for v in second.layers] == [1.0, 2.0, 3.0]
    assert second.text.numpy() == b"ends in NUL\0"


def test_iterators_and_tables(tmp_path: Path) -> None:
    """Variants, and attributes whose key is only the beginning of the bundle's keys."""
    iterator = iter(tf.data.Dataset.range(10).shuffle(4, seed=1))
    table = tf.lookup.experimental.MutableHashTable(tf.string, tf.int64, -1)
    table.insert(["a", "bb"], [1, 2])
    next(iterator)
    checkpoint = tf.train.Checkpoint(iterator=iterator, table=table)
    raw = assert_same_as_tensorflow(Path(checkpoint.save(str(tmp_path / "x"))))
    variants = [tensor for _, tensor in tensors(raw) if tensor.dtype.name == "variant"]
    assert variants
    assert all(len(tensor.read()) == tensor.spec.nbytes for tensor in variants)
    following = [int(next(iterator)) for _ in range(3)]
    written = write(raw, tmp_path / "y")
    table.insert(["a"], [7])
    checkpoint.restore(str(written)).assert_consumed()
    assert [int(next(iterator)) for _ in range(3)] == following
    assert int(table.lookup(tf.constant("a"))) == 1


def test_a_manager_goes_on_numbering(tmp_path: Path) -> None:
    step = tf.Variable(0, dtype=tf.int64)
    manager = tf.train.CheckpointManager(tf.train.Checkpoint(step=step), str(tmp_path), max_to_keep=3)
    for _ in range(3):
        step.assign_add(1)
        manager.save()
    raw = FORMAT.read(tmp_path)
    assert raw.attributes["prefix"] == "ckpt-3"
    state = CheckpointState.parse((tmp_path / "checkpoint").read_text())
    assert state.text() == (tmp_path / "checkpoint").read_text()

    write(raw, tmp_path / "converted")
    assert tf.train.latest_checkpoint(str(tmp_path)) == str(tmp_path / "converted")
    assert FORMAT.read(tmp_path).attributes["prefix"] == "converted"
    step = tf.Variable(0, dtype=tf.int64)
    checkpoint = tf.train.Checkpoint(step=step)
    manager = tf.train.CheckpointManager(checkpoint, str(tmp_path), max_to_keep=3)
    assert [os.path.basename(path) for path in manager.checkpoints] == [
        "ckpt-1",
        "ckpt-2",
        "ckpt-3",
        "converted",
    ]
    checkpoint.restore(manager.latest_checkpoint).assert_consumed()
    assert int(step) == 3
    assert os.path.basename(manager.save()) == "ckpt-4"
    assert [os.path.basename(path) for path in manager.checkpoints] == ["ckpt-3", "converted", "ckpt-4"]
    assert not (tmp_path / "ckpt-2.index").exists()


def test_a_prefix_with_an_empty_name(tmp_path: Path) -> None:
    """`write('run/')` makes `run/.index`: the directory means it, and each of its files."""
    value = tf.Variable([1.0, 2.0])
    saved = tf.train.Checkpoint(value=value).write(f"{tmp_path}/run/")
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [".data-00000-of-00001", ".index"]
    reader = tf.compat.v1.train.NewCheckpointReader(saved)
    for path in (tmp_path / "run", tmp_path / "run/.index", tmp_path / "run/.data-00000-of-00001"):
        assert FORMAT.sniff(path)
        found = dict(tensors(FORMAT.read(path)))
        assert found.keys() == reader.get_variable_to_dtype_map().keys()
        assert all(value_of(tensor) == oracle(reader, key) for key, tensor in found.items())
    (tmp_path / "again").mkdir()
    write(FORMAT.read(tmp_path / "run"), tmp_path / "again/.index")
    value.assign([0.0, 0.0])
    tf.train.Checkpoint(value=value).read(f"{tmp_path}/again/").assert_consumed()
    assert value.numpy().tolist() == [1.0, 2.0]
    assert FORMAT.read(tmp_path / "again").attributes["prefix"] == ""


def test_a_new_directory_has_a_state_file(tmp_path: Path) -> None:
    raw = FORMAT.read(FIXTURE)
    written = write(raw, tmp_path / "model.ckpt-7")
    assert tf.train.latest_checkpoint(str(tmp_path)) == str(written)
    assert "timestamps" not in (tmp_path / "checkpoint").read_text()


def test_saver_of_tensorflow_1_writes_and_restores(tmp_path: Path) -> None:
    with tf.Graph().as_default(), tf.compat.v1.Session() as session:
        initial = tf.compat.v1.random_uniform_initializer(seed=1)
        plain = tf.compat.v1.get_variable("w", (2, 2), initializer=initial)
        cut = tf.compat.v1.get_variable(
            "cut", (5, 2), initializer=initial, partitioner=tf.compat.v1.fixed_size_partitioner(2)
        )
        saver = tf.compat.v1.train.Saver()
        session.run(tf.compat.v1.global_variables_initializer())
        before = session.run([plain, tf.convert_to_tensor(cut)])
        saver.save(session, str(tmp_path / "a" / "model"), global_step=7)
        raw = FORMAT.read(tmp_path / "a")
        assert raw.attributes["prefix"] == "model-7"
        assert [name for name, _ in tensors(raw)] == ["cut", "w"]
        (tmp_path / "b").mkdir()
        written = write(raw, tmp_path / "b" / "model-8")
        session.run(tf.compat.v1.global_variables_initializer())
        saver.restore(session, str(written))
        after = session.run([plain, tf.convert_to_tensor(cut)])
    assert all(np.array_equal(a, b) for a, b in zip(before, after, strict=True))
    moved = tmp_path / "moved"
    (tmp_path / "a").rename(moved)
    assert FORMAT.read(moved).attributes["prefix"] == "model-7"


def test_expected_truth_of_the_fixture() -> None:
    expected = json.loads((FIXTURE.parent / "expected.json").read_text())
    reader = tf.train.load_checkpoint(str(FIXTURE))
    assert set(expected["tensors"]) == set(reader.get_variable_to_shape_map())
