"""Models of both generations of Keras, every variable of which is another number, and what they hold."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("KERAS_BACKEND", "tensorflow")

from ckptconv.catalog.optimizer_rows import Row, row, shape_of_slot
from ckptconv.document import Checkpoint

Keras = Any
"""The module `keras` or `tf_keras`."""
Model = Any
Array = np.ndarray[Any, np.dtype[Any]]


def mlp(k: Keras) -> Model:
    dense = k.layers.Dense
    return k.Sequential([k.layers.Input((4,)), dense(3, name="first"), dense(3, use_bias=False), dense(2)])


def cnn(k: Keras) -> Model:
    """A batch normalization between layers that are trained; a frozen one."""
    layers = k.layers
    return k.Sequential(
        [
            layers.Input((6, 6, 2)),
            layers.Conv2D(3, 3, name="conv"),
            layers.BatchNormalization(),
            layers.BatchNormalization(trainable=False, scale=False, name="fixed"),
            layers.Flatten(),
            layers.Dense(2),
        ]
    )


def embedding_lstm(k: Keras) -> Model:
    layers = k.layers
    return k.Sequential([layers.Input((5,)), layers.Embedding(7, 3), layers.LSTM(2), layers.Dense(2)])


def gru(k: Keras) -> Model:
    """Both forms of the bias."""
    layers = k.layers
    return k.Sequential(
        [
            layers.Input((5, 3)),
            layers.GRU(2, return_sequences=True),
            layers.GRU(3, reset_after=False, name="before"),
        ]
    )


def attention(k: Keras) -> Model:
    layers = k.layers
    start = k.Input((4, 3))
    value = layers.MultiHeadAttention(2, 3, name="attention")(start, start)
    return k.Model(start, layers.Dense(2)(layers.LayerNormalization()(value)))


def bidirectional(k: Keras) -> Model:
    layers = k.layers
    return k.Sequential(
        [
            layers.Input((4, 3)),
            layers.Bidirectional(layers.LSTM(2, return_sequences=True)),
            layers.Bidirectional(layers.GRU(2), name="both"),
        ]
    )


def convolutions(k: Keras) -> Model:
    """Separable, depthwise, transposed; a slope per channel."""
    layers = k.layers
    return k.Sequential(
        [
            layers.Input((6, 6, 2)),
            layers.SeparableConv2D(3, 3),
            layers.DepthwiseConv2D(2, depth_multiplier=2),
            layers.PReLU(shared_axes=[1, 2]),
            layers.Conv2DTranspose(2, 2),
            layers.Reshape((8, 4)),
            layers.Conv1D(2, 3, use_bias=False),
            layers.GroupNormalization(2),
        ]
    )


def normalization(k: Keras) -> Model:
    return k.Sequential([k.layers.Input((4,)), k.layers.Normalization(), k.layers.Dense(2)])


def nested(k: Keras) -> Model:
    """A model with a batch normalization inside a model, a frozen layer, twelve layers of one class."""
    layers = k.layers
    parts = [layers.Input((3,)), layers.Dense(3), layers.BatchNormalization(), layers.Dense(3)]
    inner = k.Sequential(parts, name="inner")
    value = start = k.Input((4,))
    value = layers.Dense(3, trainable=False, name="frozen")(value)
    value = inner(value)
    for _ in range(12):
        value = layers.Dense(3)(value)
    return k.Model(start, layers.Dropout(0.1)(value))


def partly_frozen(k: Keras) -> Model:
    """A model inside a model, one layer of which is not trained."""
    layers = k.layers
    parts = [
        layers.Input((3,)),
        layers.Dense(3, trainable=False),
        layers.Dense(3),
        layers.BatchNormalization(),
    ]
    return k.Sequential([layers.Input((3,)), k.Sequential(parts, name="inner"), layers.Dense(2)])


def shared(k: Keras) -> Model:
    """A layer that stands in two places."""
    layers = k.layers
    start = k.Input((4,))
    both = layers.Dense(4, name="both")
    return k.Model(start, layers.Dense(2)(both(layers.Dense(4)(both(start)))))


def time_distributed(k: Keras) -> Model:
    layers = k.layers
    inner = k.layers.TimeDistributed(layers.Dense(3, name="each"), name="times")
    return k.Sequential([layers.Input((4, 3)), inner, layers.TimeDistributed(layers.BatchNormalization())])


def cells(k: Keras) -> Model:
    """A row of cells in one layer, and a recurrent convolution."""
    layers = k.layers
    return k.Sequential(
        [
            layers.Input((4, 3)),
            layers.RNN([layers.LSTMCell(2), layers.GRUCell(3)], return_sequences=True),
            layers.Reshape((4, 3, 1)),
            layers.ConvLSTM1D(2, 2),
        ]
    )


ZOO: dict[str, Callable[[Keras], Model]] = {
    one.__name__: one
    for one in (
        mlp,
        cnn,
        embedding_lstm,
        gru,
        attention,
        bidirectional,
        convolutions,
        normalization,
        nested,
        partly_frozen,
        shared,
        time_distributed,
        cells,
    )
}


def subclassed(k: Keras) -> Model:
    """Layers as attributes, in a layer of its own, in a tuple, in a list; one stands in two places."""
    layers = k.layers

    class Block(layers.Layer):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.dense, self.norm = layers.Dense(3), layers.LayerNormalization()

        def call(self, x: Any) -> Any:
            return self.norm(self.dense(x))

    class Net(k.Model):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.encoder = layers.Embedding(7, 3), layers.LSTM(3)
            self.norm, self.fixed = layers.BatchNormalization(), layers.Dense(3, trainable=False)
            self.block, self.again = Block(), layers.Dense(3)
            self.pair = (layers.Dense(3), layers.Dense(3))
            self.heads = [layers.Dense(3), layers.Dense(2)]

        def call(self, x: Any, training: bool = False) -> Any:
            x = self.norm(self.fixed(self.encoder(self.embed(x))), training=training)
            x = self.pair[1](self.pair[0](self.again(self.again(self.block(x)))))
            return self.heads[1](self.heads[0](x))

    model = Net()
    model(np.zeros((1, 5), "int32"))
    return model


def compiled(k: Keras, model: Model, optimizer: Any, step: int = 3) -> Model:
    """The model with an optimizer that is built, every variable of both another number."""
    k.utils.set_random_seed(0)
    model.compile(optimizer, k.losses.MeanSquaredError())
    inner = getattr(optimizer, "inner_optimizer", optimizer)
    if hasattr(inner, "_create_all_weights"):
        inner._create_all_weights(model.trainable_variables)
    else:
        optimizer.build(model.trainable_variables)
    random = np.random.default_rng(0)
    for variable in (*stored(model.variables), *state(inner)):
        if variable.dtype not in ("int64", "int32") and "learning_rate" not in name_of(variable):
            variable.assign(random.uniform(0.1, 1.0, variable.shape))
    inner.iterations.assign(step) if hasattr(inner, "_create_all_weights") else counter(inner).assign(step)
    return model


def counter(optimizer: Any) -> Any:
    return optimizer._iterations


def name_of(variable: Any) -> str:
    return str(getattr(variable, "path", variable.name))


def stored(variables: Any) -> list[Any]:
    """Those that files hold: Keras brings no states of generators back."""
    return [variable for variable in variables if "seed" not in name_of(variable)]


def state(optimizer: Any) -> list[Any]:
    """The optimizer's variables, counter first."""
    found = optimizer.variables
    return list(found() if callable(found) else found)


def arrays(model: Model) -> list[Array]:
    """All that a file should bring back."""
    return [np.asarray(variable) for variable in (*stored(model.variables), *state(model.optimizer))]


def same(one: Model, other: Model) -> bool:
    pairs = list(zip(arrays(one), arrays(other), strict=True))
    return all(a.dtype == b.dtype and np.array_equal(a, b) for a, b in pairs)


class SlotOf(NamedTuple):
    """One slot variable of an optimizer."""

    slot: str
    variable: Any
    array: Array


def slots_of(optimizer: Any, row: Row, variables: list[Any]) -> Iterator[SlotOf]:
    """Every slot that the optimizer has for its parameters, by what it calls its lists."""
    inner = getattr(optimizer, "inner_optimizer", optimizer)
    for slot, key in row.slots.items():
        for number, variable in enumerate(variables):
            if shape_of_slot(row.slot_shapes.get(slot, "param"), tuple(variable.shape)) is None:
                continue  # Adafactor's placeholder
            if hasattr(inner, "_create_all_weights"):
                if key in inner.get_slot_names():
                    yield SlotOf(slot, variable, np.asarray(inner.get_slot(variable, key)))
            else:
                found = getattr(inner, key, None) or []
                if number < len(found) and found[number] is not None:
                    yield SlotOf(slot, variable, np.asarray(found[number]))


def check(run: Checkpoint, model: Any, *, declared: bool = True) -> None:
    """That the document has every variable of the model once, with its flag and its slots."""
    trained = [id(variable) for variable in model.trainable_variables]
    left = {id(variable): np.asarray(variable) for variable in stored(model.variables)}
    owner = {}
    for param in run.params.values():
        if param.tied_to is not None:
            continue
        array = param.read()
        (found,) = [
            key for key, value in left.items() if value.dtype == array.dtype and np.array_equal(value, array)
        ]
        del left[found]
        owner[param.name] = found
        if declared:
            assert param.trainable is (found in trained), param.name
    assert not left
    if not run.optimizers:
        return
    (own,) = run.optimizers
    known = row(own.algorithm, own.framework)
    assert known is not None
    held = {
        (slot, owner[name]): tensor.read() for slot, by in own.slots.items() for name, tensor in by.items()
    }
    for one in slots_of(model.optimizer, known, model.trainable_variables):
        array = held.pop((one.slot, id(one.variable)), None)
        assert array is not None, (one.slot, one.variable.name)
        assert np.array_equal(array, one.array)
    assert not held
