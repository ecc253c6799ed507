"""Bundles of every generation of Keras against TensorFlow: every key, parameter, flag and slot of a model.

A checkpoint of model and optimizer, the weights of `save_weights(prefix)`, a SavedModel; back from neutral,
and onto the model of another generation, with every object of it bound.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

tf = pytest.importorskip("tensorflow")
keras = pytest.importorskip("keras")
tf_keras = pytest.importorskip("tf_keras")

import ckptconv  # noqa: E402
from ckptconv.catalog.optimizer_rows import algorithms, row  # noqa: E402
from ckptconv.detect import read_raw  # noqa: E402
from ckptconv.document import Checkpoint, value_of  # noqa: E402
from ckptconv.formats.string_tensor import read_strings  # noqa: E402
from ckptconv.rawtree import DictNode  # noqa: E402
from ckptconv.supply import set_fields  # noqa: E402
from ckptconv.tensor import TensorRef  # noqa: E402
from tests.support.keras_zoo import ZOO, check, compiled, same, state, stored, subclassed  # noqa: E402

KERAS = {"keras3": keras, "tf-keras": tf_keras, "tf-keras-legacy": tf_keras}
MODELS = {**ZOO, "subclassed": subclassed}


def made(generation: str, name: str, step: int = 3) -> Any:
    k = KERAS[generation]
    optimizers = k.optimizers.legacy if generation == "tf-keras-legacy" else k.optimizers
    return compiled(k, MODELS[name](k), optimizers.Adam(0.01, beta_1=0.8), step)


def blank(generation: str, name: str) -> Any:
    """A model of which no variable has a value that a checkpoint may have."""
    model = made(generation, name, step=0)
    for variable in (*stored(model.variables), *state(model.optimizer)):
        variable.assign(np.full(tuple(variable.shape), -1))
    return model


def checkpoint(model: Any) -> Any:
    return tf.train.Checkpoint(model=model, optimizer=model.optimizer)


def assert_every_key(path: Path | str, prefix: Path | str) -> None:
    """That the tree has what TensorFlow reads, key by key."""
    root, reader = read_raw(path).root, tf.train.load_checkpoint(str(prefix))
    assert isinstance(root, DictNode)
    found = dict(root.items)
    dtypes = reader.get_variable_to_dtype_map()
    assert found.keys() == dtypes.keys()
    for key, dtype in dtypes.items():
        ours, theirs = found[key], reader.get_tensor(key)
        assert isinstance(ours, TensorRef)
        assert ours.dtype.tensorflow == dtype.as_datatype_enum
        if dtype == tf.string:
            assert read_strings(ours) == np.asarray(theirs, object).reshape(-1).tolist()
        else:
            assert (ours.shape, ours.read().tobytes()) == (theirs.shape, theirs.tobytes()), key


def opened(path: Path | str, generation: str, algorithm: str = "adam") -> Checkpoint:
    """The document, with the algorithm that the names of its variables may leave open."""
    run = ckptconv.open(path)
    assert (run.provenance.dialect, value_of(run.progress.step)) == (generation, 3)
    if run.optimizers[0].algorithm == "unknown":
        assert algorithm in run.optimizers[0].algorithm_candidates
        run = set_fields(run, {"optimizer": algorithm})
    return run


@pytest.mark.slow
@pytest.mark.parametrize("generation", KERAS)
@pytest.mark.parametrize("name", MODELS)
def test_checkpoint_and_the_way_back(generation: str, name: str, tmp_path: Path) -> None:
    model = made(generation, name)
    source = checkpoint(model).save(str(tmp_path / "run"))
    assert_every_key(source, source)
    run = opened(source, generation)
    assert {slot: len(by) for slot, by in run.optimizers[0].slots.items()} == dict.fromkeys(
        ("first_moment", "second_moment"), len(model.trainable_variables)
    )
    check(run, model)
    ckptconv.convert(source, tmp_path / "archive", to="neutral")
    ckptconv.convert(tmp_path / "archive", tmp_path / "back-1", to="tensorflow")
    again = blank(generation, name)
    checkpoint(again).restore(str(tmp_path / "back-1")).assert_consumed()
    assert same(again, model)


@pytest.mark.slow
@pytest.mark.parametrize("generation", ["tf-keras", "tf-keras-legacy"])
@pytest.mark.parametrize("name", MODELS)
def test_weights_and_saved_models_of_tf_keras(generation: str, name: str, tmp_path: Path) -> None:
    model = made(generation, name)
    model.save_weights(str(tmp_path / "weights"))
    assert_every_key(tmp_path / "weights", tmp_path / "weights")
    check(opened(tmp_path / "weights", generation), model)
    ckptconv.convert(tmp_path / "weights", tmp_path / "archive", to="neutral")
    ckptconv.convert(tmp_path / "archive", tmp_path / "back", to="tensorflow")
    again = blank(generation, name)
    again.load_weights(str(tmp_path / "back")).assert_consumed()
    assert same(again, model)
    model.save(tmp_path / "saved", save_format="tf", save_traces=False)
    assert_every_key(tmp_path / "saved", tmp_path / "saved/variables/variables")
    check(opened(tmp_path / "saved", generation), model)


CROSSINGS = [
    ("tf-keras-legacy", "keras3"),
    ("tf-keras", "keras3"),
    ("keras3", "tf-keras"),
    ("keras3", "tf-keras-legacy"),
]


def slots(model: Any) -> list[Any]:
    """First and second moment of every variable that is trained."""
    optimizer, variables = model.optimizer, model.trainable_variables
    if hasattr(optimizer, "_create_all_weights"):
        return [np.asarray(optimizer.get_slot(v, name)) for v in variables for name in ("m", "v")]
    pairs = zip(optimizer._momentums, optimizer._velocities, strict=True)
    return [np.asarray(variable) for pair in pairs for variable in pair]


@pytest.mark.slow
@pytest.mark.parametrize(("source", "target"), CROSSINGS)
@pytest.mark.parametrize("name", MODELS)
def test_onto_another_generation(source: str, target: str, name: str, tmp_path: Path) -> None:
    model, other = made(source, name), blank(target, name)
    other.optimizer.learning_rate = 0.5
    run, template = (
        checkpoint(one).save(str(tmp_path / f"of{place}")) for place, one in enumerate((model, other))
    )
    ckptconv.convert(run, tmp_path / "out", template=template)
    checkpoint(other).restore(str(tmp_path / "out")).assert_consumed()
    assert int(other.optimizer.iterations) == 3
    assert float(other.optimizer.learning_rate) == pytest.approx(0.01)
    ours = [
        *map(np.asarray, (*other.trainable_variables, *stored(other.non_trainable_variables))),
        *slots(other),
    ]
    theirs = [
        *map(np.asarray, (*model.trainable_variables, *stored(model.non_trainable_variables))),
        *slots(model),
    ]
    for one, wanted in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(one, wanted)


def alike(k: Any) -> Any:
    """Layers of one shape: no slot finds its variable by it."""
    layers = k.layers
    return k.Sequential(
        [layers.Input((4,)), layers.Dense(4), layers.BatchNormalization(), layers.Dense(4), layers.Dense(4)]
    )


ARGUMENTS = {
    "adam": {"amsgrad": True},
    "adamw": {"amsgrad": True},
    "sgd": {"momentum": 0.9},
    "rmsprop": {"momentum": 0.9, "centered": True},
}
CATALOG = [
    (generation, name)
    for generation in KERAS
    for name in algorithms()
    if row(name, generation.replace("-", "_")) is not None
]


@pytest.mark.parametrize(("generation", "name"), CATALOG)
def test_each_slot_of_every_optimizer_is_its_variable_s(generation: str, name: str, tmp_path: Path) -> None:
    """From the checkpoint alone, every value another: lists in a row, dealt in turn, none at all, by name."""
    k, known = KERAS[generation], row(name, generation.replace("-", "_"))
    assert known is not None
    optimizers = k.optimizers.legacy if generation == "tf-keras-legacy" else k.optimizers
    make = getattr(optimizers, known.class_name.rpartition(".")[2])
    model = compiled(k, alike(k), make(0.01, **ARGUMENTS.get(name, {})))
    run = opened(checkpoint(model).save(str(tmp_path / "run")), generation, name)
    (own,) = run.optimizers
    assert own.algorithm == name
    assert own.slots.keys() == known.slots.keys()
    check(run, model)


@pytest.mark.parametrize("generation", KERAS)
def test_what_layers_the_edges_tell(generation: str, tmp_path: Path) -> None:
    """Kinds of recurrent layers and of statistics, from the checkpoint alone."""
    told = {}
    for name in ("embedding_lstm", "gru", "normalization", "bidirectional", "cells"):
        run = ckptconv.open(checkpoint(made(generation, name)).save(str(tmp_path / name)))
        told[name] = [param.layer for param in run.params.values()]
    assert told["embedding_lstm"] == ["embedding", *["lstm"] * 3, "dense", "dense"]
    assert told["gru"] == [*["gru"] * 3, *["gru_reset_before"] * 3]
    assert told["normalization"] == [*["normalization"] * 3, "dense", "dense"]
    assert told["bidirectional"] == [*["lstm"] * 6, *["gru"] * 6]


def test_a_convolution_in_a_list_may_be_a_transposed_one(tmp_path: Path) -> None:
    """Only the optimizer refers to it, and no edge tells `_kernel` from `kernel`: both readings stay."""

    class Net(keras.Model):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.blocks = [keras.layers.Conv1D(3, 2), keras.layers.Dense(2)]

        def call(self, x: Any) -> Any:
            return self.blocks[1](self.blocks[0](x))

    model = Net()
    model(np.zeros((1, 4, 3)))
    model = compiled(keras, model, keras.optimizers.Adam(0.01))
    run = ckptconv.open(checkpoint(model).save(str(tmp_path / "run")))
    kernel = run.params["untracked-0/kernel"]
    assert (kernel.role, kernel.axes) == ("kernel", None)
    assert {"conv1d", "conv_transpose1d"} <= {layout.layer for layout in kernel.candidates}
    assert run.params["untracked-1/kernel"].layer == "dense"
