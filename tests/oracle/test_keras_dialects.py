"""The TensorFlow dialects against live objects: lifted is what they hold, what is written they restore."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

tf = pytest.importorskip("tensorflow")
keras = pytest.importorskip("keras")
tf_keras = pytest.importorskip("tf_keras")

from ckptconv.detect import detect_dialect, read_raw  # noqa: E402 -- after importorskip
from ckptconv.dialects.table import DIALECTS  # noqa: E402
from ckptconv.document import Checkpoint, Known, Param, Progress, Unknown, value_of  # noqa: E402
from ckptconv.formats.tensor_bundle import FORMAT  # noqa: E402
from ckptconv.rawtree import RawTree  # noqa: E402
from ckptconv.tensor import StoredTensor  # noqa: E402
from tests.support.write_layout import write_layout  # noqa: E402

STEPS = 3


@dataclass
class Run:
    """A model and its optimizer, and how to read the optimizer's state."""

    model: Any
    optimizer: Any
    slots: Callable[[], Mapping[str, Any]]
    """Canonical slot -> variables in the order of `model.trainable_variables`."""
    dialect: str
    batch: Callable[[np.random.Generator], Any]

    def checkpoint(self) -> Any:
        return tf.train.Checkpoint(model=self.model, optimizer=self.optimizer)

    def train(self, steps: int, seed: int) -> None:
        rng = np.random.default_rng(seed)
        for _ in range(steps):
            with tf.GradientTape() as tape:
                loss = tf.reduce_mean(tf.square(self.model(self.batch(rng), training=True)))
            variables = self.model.trainable_variables
            gradients = tape.gradient(loss, variables)
            self.optimizer.apply_gradients(zip(gradients, variables, strict=True))

    def distinct(self, seed: int) -> None:
        rng = np.random.default_rng(seed)
        for variable in self.model.weights:
            variable.assign(rng.uniform(0.1, 0.9, tuple(variable.shape)).astype("float32"))

    @property
    def inner(self) -> Any:
        return getattr(self.optimizer, "inner_optimizer", self.optimizer)


def vectors(width: int) -> Callable[[np.random.Generator], Any]:
    return lambda rng: rng.normal(size=(4, width)).astype("float32")


def images(rng: np.random.Generator) -> Any:
    return rng.normal(size=(2, 5, 5, 2)).astype("float32")


def tokens(rng: np.random.Generator) -> Any:
    return rng.integers(0, 6, (3, 5))


def moments(optimizer: Any) -> Callable[[], Mapping[str, Any]]:
    return lambda: {"first_moment": optimizer._momentums, "second_moment": optimizer._velocities}


def momentum(optimizer: Any) -> Callable[[], Mapping[str, Any]]:
    return lambda: {"momentum": optimizer.momentums}


def by_slot(run_model: Any, optimizer: Any, names: Mapping[str, str]) -> Callable[[], Mapping[str, Any]]:
    return lambda: {
        canonical: [optimizer.get_slot(v, name) for v in run_model.trainable_variables]
        for canonical, name in names.items()
    }


def keras3_sequential() -> Run:
    k = keras.layers
    model = keras.Sequential([keras.Input((4,)), k.Dense(4), k.Dense(4), k.Dense(2)])
    optimizer = keras.optimizers.Adam(0.01)
    optimizer.build(model.trainable_variables)
    return Run(model, optimizer, moments(optimizer), "keras3", vectors(4))


def keras3_functional() -> Run:
    k = keras.layers
    inputs = keras.Input((5, 5, 2))
    x = k.BatchNormalization()(k.Conv2D(3, 2, name="stem")(inputs))
    x = k.DepthwiseConv2D(2)(x)
    x = keras.Sequential([k.Flatten(), k.Dense(3), k.LayerNormalization()], name="inner")(x)
    model = keras.Model(inputs, k.Dense(3, name="head")(x))
    model.get_layer("stem").trainable = False
    optimizer = keras.optimizers.SGD(0.01, momentum=0.9)
    optimizer.build(model.trainable_variables)
    return Run(model, optimizer, momentum(optimizer), "keras3", images)


class Keras3Net(keras.Model):
    def __init__(self) -> None:
        super().__init__()
        self.embed = keras.layers.Embedding(6, 4)
        self.encoder = keras.layers.LSTM(3)
        self.norm = keras.layers.BatchNormalization()
        self.pair = (keras.layers.Dense(3), keras.layers.Dense(3))

    def call(self, x: Any, training: bool = False) -> Any:
        x = self.norm(self.encoder(self.embed(x)), training=training)
        return self.pair[1](self.pair[0](x))


def keras3_subclassed() -> Run:
    model = Keras3Net()
    model(np.zeros((1, 5), "int32"))
    optimizer = keras.optimizers.AdamW(0.01)
    optimizer.build(model.trainable_variables)
    return Run(model, optimizer, moments(optimizer), "keras3", tokens)


def keras3_loss_scale() -> Run:
    run = keras3_sequential()
    inner = keras.optimizers.Adam(0.01)
    outer = keras.optimizers.LossScaleOptimizer(inner)
    outer.build(run.model.trainable_variables)
    return replace(run, optimizer=outer, slots=moments(inner))


def keras3_amsgrad() -> Run:
    run = keras3_sequential()
    optimizer = keras.optimizers.Adam(0.01, amsgrad=True)
    optimizer.build(run.model.trainable_variables)
    slots = moments(optimizer)
    return replace(
        run, optimizer=optimizer, slots=lambda: {**slots(), "max_second_moment": optimizer._velocity_hats}
    )


def tf_keras_sequential() -> Run:
    k = tf_keras.layers
    layers = [k.Dense(4, input_shape=(4,)), k.Dense(4), k.BatchNormalization(), k.Dense(2)]
    model = tf_keras.Sequential(layers)
    optimizer = tf_keras.optimizers.Adam(0.01)
    optimizer.build(model.trainable_variables)
    return Run(model, optimizer, moments(optimizer), "tf-keras", vectors(4))


def tf_keras_functional() -> Run:
    k = tf_keras.layers
    inputs = tf_keras.Input((5, 5, 2))
    x = k.Flatten()(k.Conv2D(3, 2, name="stem")(inputs))
    model = tf_keras.Model(inputs, k.Dense(3, name="head")(x))
    optimizer = tf_keras.optimizers.SGD(0.01, momentum=0.9)
    optimizer.build(model.trainable_variables)
    return Run(model, optimizer, momentum(optimizer), "tf-keras", images)


def legacy_adam() -> Run:
    run = tf_keras_sequential()
    optimizer = tf_keras.optimizers.legacy.Adam(0.01)
    optimizer._create_all_weights(run.model.trainable_variables)
    slots = by_slot(run.model, optimizer, {"first_moment": "m", "second_moment": "v"})
    return replace(run, optimizer=optimizer, slots=slots, dialect="tf-keras-legacy")


class TfKerasNet(tf_keras.Model):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = [tf_keras.layers.Dense(3), tf_keras.layers.Dense(3)]
        self.heads = {"a": tf_keras.layers.Dense(3)}

    def call(self, x: Any, training: bool = False) -> Any:
        return self.heads["a"](self.blocks[1](self.blocks[0](x)))


def legacy_momentum() -> Run:
    model = TfKerasNet()
    model(np.zeros((1, 4), "float32"))
    optimizer = tf_keras.optimizers.legacy.SGD(0.01, momentum=0.9)
    optimizer._create_all_weights(model.trainable_variables)
    return Run(
        model,
        optimizer,
        by_slot(model, optimizer, {"momentum": "momentum"}),
        "tf-keras-legacy",
        vectors(4),
    )


RUNS = [
    keras3_sequential,
    keras3_functional,
    keras3_subclassed,
    keras3_loss_scale,
    keras3_amsgrad,
    tf_keras_sequential,
    tf_keras_functional,
    legacy_adam,
    legacy_momentum,
]


def trained(make: Callable[[], Run]) -> Run:
    run = make()
    run.distinct(1)
    run.train(STEPS, 2)
    return run


def iterations(run: Run) -> int:
    return int(run.inner.iterations.numpy())


def lift(path: str | Path) -> tuple[RawTree, Checkpoint]:
    raw = read_raw(Path(path))
    dialect, _ = detect_dialect(raw)
    return raw, dialect.lift(raw)


def write(raw: RawTree, path: Path) -> Path:
    path.parent.mkdir(exist_ok=True)
    write_layout(FORMAT.layout(raw, path), path)
    return path


def array(variable: Any) -> Any:
    return np.asarray(variable.numpy() if hasattr(variable, "numpy") else variable)


def names_by_value(checkpoint: Checkpoint, variables: Any) -> list[str]:
    """The parameter that holds each variable's value; values are distinct."""
    result = []
    for variable in variables:
        value = array(variable)
        (name,) = (
            name
            for name, param in checkpoint.params.items()
            if param.tensor.shape == value.shape and np.array_equal(param.tensor.read(), value)
        )
        result.append(name)
    return result


def assert_holds(run: Run, checkpoint: Checkpoint) -> None:
    """The document says what the objects hold."""
    (optimizer,) = checkpoint.optimizers
    assert value_of(optimizer.step) == iterations(run)
    assert len(checkpoint.params) == len(run.model.weights)
    names_by_value(checkpoint, run.model.weights)
    names = names_by_value(checkpoint, run.model.trainable_variables)
    assert list(optimizer.params) == names
    assert set(optimizer.slots) == set(run.slots())
    for slot, variables in run.slots().items():
        for name, variable in zip(names, variables, strict=True):
            assert np.array_equal(optimizer.slots[slot][name].read(), array(variable)), (slot, name)


@pytest.mark.parametrize("make", RUNS)
def test_lifted_is_what_the_objects_hold(make: Callable[[], Run], tmp_path: Path) -> None:
    run = trained(make)
    _, checkpoint = lift(run.checkpoint().save(str(tmp_path / "ckpt")))
    assert checkpoint.provenance.dialect == run.dialect
    assert_holds(run, checkpoint)


@pytest.mark.parametrize("make", RUNS)
def test_there_and_back_is_the_same_bundle(make: Callable[[], Run], tmp_path: Path) -> None:
    run = trained(make)
    path = run.checkpoint().save(str(tmp_path / "ckpt"))
    _, checkpoint = lift(path)
    target = write(DIALECTS["tensorflow", run.dialect].lower(checkpoint), tmp_path / "out" / "ckpt-1")
    ours, theirs = tf.train.load_checkpoint(str(target)), tf.train.load_checkpoint(path)
    assert ours.get_variable_to_shape_map() == theirs.get_variable_to_shape_map()
    assert ours.get_variable_to_dtype_map() == theirs.get_variable_to_dtype_map()
    for key in theirs.get_variable_to_shape_map():
        a, b = ours.get_tensor(key), theirs.get_tensor(key)
        assert a == b if isinstance(b, bytes) else np.array_equal(a, b), key


@pytest.mark.parametrize("make", RUNS)
def test_an_edited_step_restores_as_edited(make: Callable[[], Run], tmp_path: Path) -> None:
    run = trained(make)
    _, checkpoint = lift(run.checkpoint().save(str(tmp_path / "ckpt")))
    edited = replace(checkpoint, progress=replace(checkpoint.progress, step=Known(value=4242)))
    target = write(DIALECTS["tensorflow", run.dialect].lower(edited), tmp_path / "out" / "ckpt-1")
    fresh = make()
    fresh.checkpoint().restore(str(target)).assert_consumed()
    assert iterations(fresh) == 4242
    for ours, theirs in zip(fresh.model.weights, run.model.weights, strict=True):
        assert np.array_equal(array(ours), array(theirs))
    for slot, variables in run.slots().items():
        for ours, theirs in zip(fresh.slots()[slot], variables, strict=True):
            assert np.array_equal(array(ours), array(theirs))


@pytest.mark.parametrize("make", RUNS)
def test_a_fresh_template_has_the_same_names(make: Callable[[], Run], tmp_path: Path) -> None:
    run, template = trained(make), make()
    _, checkpoint = lift(run.checkpoint().save(str(tmp_path / "run")))
    _, fresh = lift(template.checkpoint().save(str(tmp_path / "template")))
    assert list(checkpoint.params) == list(fresh.params)
    assert checkpoint.optimizers[0].params == fresh.optimizers[0].params
    assert checkpoint.optimizers[0].slots.keys() == fresh.optimizers[0].slots.keys()


@pytest.mark.parametrize("make", [keras3_sequential, keras3_subclassed, tf_keras_sequential, legacy_adam])
def test_a_template_filled_from_a_run_restores(make: Callable[[], Run], tmp_path: Path) -> None:
    run, template = trained(make), make()
    _, checkpoint = lift(run.checkpoint().save(str(tmp_path / "run")))
    _, fresh = lift(template.checkpoint().save(str(tmp_path / "template")))
    filled = replace(
        fresh, params=checkpoint.params, optimizers=checkpoint.optimizers, progress=checkpoint.progress
    )
    target = write(DIALECTS["tensorflow", run.dialect].lower(filled), tmp_path / "out" / "ckpt-1")
    again = make()
    again.checkpoint().restore(str(target)).assert_consumed()
    assert iterations(again) == STEPS
    for ours, theirs in zip(again.model.weights, run.model.weights, strict=True):
        assert np.array_equal(array(ours), array(theirs))


@pytest.mark.parametrize("make", [keras3_sequential, keras3_subclassed, tf_keras_sequential])
def test_the_model_as_root(make: Callable[[], Run], tmp_path: Path) -> None:
    """`Checkpoint(model)` and `Checkpoint(model=model)` give the same names."""
    run = trained(make)
    _, below = lift(tf.train.Checkpoint(net=run.model).save(str(tmp_path / "below")))
    _, root = lift(tf.train.Checkpoint(run.model).save(str(tmp_path / "root")))
    _, both = lift(run.checkpoint().save(str(tmp_path / "both")))
    assert list(below.params) == list(root.params) == list(both.params)


def test_two_optimizers_count_for_themselves(tmp_path: Path) -> None:
    first, second = trained(keras3_sequential), trained(keras3_sequential)
    second.train(4, 5)
    path = tf.train.Checkpoint(
        a=first.model, b=second.model, a_optimizer=first.optimizer, b_optimizer=second.optimizer
    ).save(str(tmp_path / "ckpt"))
    _, checkpoint = lift(path)
    assert {one.name: value_of(one.step) for one in checkpoint.optimizers} == {
        "a_optimizer": STEPS,
        "b_optimizer": STEPS + 4,
    }
    assert isinstance(checkpoint.progress.step, Unknown)
    assert {candidate.value for candidate in checkpoint.progress.step.candidates} == {STEPS, STEPS + 4}
    assert {name.split("/")[0] for name in checkpoint.params} == {"a", "b"}


class Layer(tf.Module):
    def __init__(self, rows: int, columns: int) -> None:
        super().__init__()
        self.weight = tf.Variable(tf.zeros((rows, columns)))
        self.bias = tf.Variable(tf.zeros((columns,)))


class Module(tf.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = [Layer(2, 3), Layer(3, 2)]
        self.head = Layer(2, 2)
        self.tied = self.head.weight


NAMES = [f"{part}.{leaf}" for part in ("layers.0", "layers.1", "head") for leaf in ("weight", "bias")]


def document() -> Checkpoint:
    rng = np.random.default_rng(0)
    shapes = [(2, 3), (3,), (3, 2), (2,), (2, 2), (2,)]
    params = {
        name: Param(name=name, tensor=StoredTensor.of_array(rng.normal(size=shape).astype("float32")))
        for name, shape in zip(NAMES, shapes, strict=True)
    }
    params["tied"] = replace(params["head.weight"], name="tied", tied_to="head.weight")
    return Checkpoint(progress=Progress(step=Unknown(reason="test")), params=params)


@pytest.mark.parametrize("as_root", [True, False])
def test_a_module_without_a_template_restores(as_root: bool, tmp_path: Path) -> None:
    source = document()
    target = write(DIALECTS["tensorflow", "tf-module"].lower(source), tmp_path / "ckpt-1")
    module = Module()
    checkpoint = tf.train.Checkpoint(module) if as_root else tf.train.Checkpoint(model=module)
    checkpoint.restore(str(target)).assert_consumed()
    live = [module.layers[0].weight, module.layers[0].bias, module.layers[1].weight, module.layers[1].bias]
    live += [module.head.weight, module.head.bias]
    for name, variable in zip(NAMES, live, strict=True):
        assert np.array_equal(source.params[name].tensor.read(), variable.numpy())
    _, again = lift(target)
    assert again.provenance.dialect == "tf-module"
    assert set(again.params) == {name.replace(".", "/") for name in source.params}
    assert again.params["head/weight"].tied_to == "tied" or again.params["tied"].tied_to == "head/weight"


def test_the_restore_snippet_runs(tmp_path: Path) -> None:
    run = trained(keras3_sequential)
    _, checkpoint = lift(run.checkpoint().save(str(tmp_path / "ckpt")))
    dialect = DIALECTS["tensorflow", "keras3"]
    target = write(dialect.lower(checkpoint), tmp_path / "out" / "ckpt-1")
    fresh = keras3_sequential()
    scope = {"model": fresh.model, "optimizer": keras.optimizers.Adam(0.5)}
    exec(dialect.restore_code(checkpoint, str(target)), scope)
    assert int(scope["optimizer"].iterations.numpy()) == STEPS
