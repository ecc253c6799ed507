"""The layer catalog against the installed classes: every variable that they make, its name, axes and order.

Sizes are such that no two axes of a layer are equal, so that an axis in another place has another size.
Classes that make variables and are not in the catalog are listed here: a new one of a framework's next
version fails.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest

from ckptconv.catalog import layers
from ckptconv.catalog.axes import bind
from ckptconv.dialects import tf1_layers

KERAS = {"keras3": "keras", "tf_keras": "tf_keras"}
IMAGE = {"in": 5, "out": 3}
DEEP = {"in": 5, "multiplier": 3}
CELL = {"in": 5, "units": 7}
NORM = {"features": 6}


class Made(NamedTuple):
    """How a layer of a kind is made."""

    kind: str
    sizes: Mapping[str, int]
    make: Callable[[Any], Any]
    shape: tuple[int, ...] = ()
    """Of the batch that a Keras layer is built for."""


TORCH = {
    "Linear": Made("dense", IMAGE, lambda nn: nn.Linear(5, 3)),
    "NonDynamicallyQuantizableLinear": Made(
        "dense", IMAGE, lambda nn: nn.modules.linear.NonDynamicallyQuantizableLinear(5, 3)
    ),
    "Embedding": Made("embedding", {"vocabulary": 7, "features": 4}, lambda nn: nn.Embedding(7, 4)),
    "EmbeddingBag": Made("embedding", {"vocabulary": 7, "features": 4}, lambda nn: nn.EmbeddingBag(7, 4)),
    "Conv1d": Made("conv1d", {**IMAGE, "w": 2}, lambda nn: nn.Conv1d(5, 3, 2)),
    "Conv2d": Made("conv2d", {**IMAGE, "h": 4, "w": 2}, lambda nn: nn.Conv2d(5, 3, (4, 2))),
    "Conv3d": Made("conv3d", {**IMAGE, "d": 6, "h": 4, "w": 2}, lambda nn: nn.Conv3d(5, 3, (6, 4, 2))),
    "ConvTranspose1d": Made("conv_transpose1d", {**IMAGE, "w": 2}, lambda nn: nn.ConvTranspose1d(5, 3, 2)),
    "ConvTranspose2d": Made(
        "conv_transpose2d", {**IMAGE, "h": 4, "w": 2}, lambda nn: nn.ConvTranspose2d(5, 3, (4, 2))
    ),
    "ConvTranspose3d": Made(
        "conv_transpose3d",
        {**IMAGE, "d": 6, "h": 4, "w": 2},
        lambda nn: nn.ConvTranspose3d(5, 3, (6, 4, 2)),
    ),
    "Conv1d of groups": Made(
        "depthwise_conv1d", {"in*multiplier": 15, "w": 2}, lambda nn: nn.Conv1d(5, 15, 2, groups=5)
    ),
    "Conv2d of groups": Made(
        "depthwise_conv2d",
        {"in*multiplier": 15, "h": 4, "w": 2},
        lambda nn: nn.Conv2d(5, 15, (4, 2), groups=5),
    ),
    "LSTMCell": Made("lstm", CELL, lambda nn: nn.LSTMCell(5, 7)),
    "GRUCell": Made("gru", CELL, lambda nn: nn.GRUCell(5, 7)),
    "RNNCell": Made("simple_rnn", CELL, lambda nn: nn.RNNCell(5, 7)),
    "BatchNorm1d": Made("batch_norm", NORM, lambda nn: nn.BatchNorm1d(6)),
    "BatchNorm2d": Made("batch_norm", NORM, lambda nn: nn.BatchNorm2d(6)),
    "BatchNorm3d": Made("batch_norm", NORM, lambda nn: nn.BatchNorm3d(6)),
    "SyncBatchNorm": Made("batch_norm", NORM, lambda nn: nn.SyncBatchNorm(6)),
    "LayerNorm": Made("layer_norm", {"features_0": 5, "features_1": 4}, lambda nn: nn.LayerNorm((5, 4))),
    "GroupNorm": Made("group_norm", NORM, lambda nn: nn.GroupNorm(2, 6)),
    "RMSNorm": Made("rms_norm", NORM, lambda nn: nn.RMSNorm(6)),
    "InstanceNorm1d": Made("instance_norm", NORM, lambda nn: nn.InstanceNorm1d(6, affine=True)),
    "InstanceNorm2d": Made("instance_norm", NORM, lambda nn: nn.InstanceNorm2d(6, affine=True)),
    "InstanceNorm3d": Made("instance_norm", NORM, lambda nn: nn.InstanceNorm3d(6, affine=True)),
    "PReLU": Made("prelu", NORM, lambda nn: nn.PReLU(6)),
}
TORCH_OF_SEVERAL = {"LSTM", "GRU", "RNN", "MultiheadAttention"}
"""Modules whose parameters are taken apart first (`catalog/compounds.json`)."""
TORCH_OTHERS = {"Bilinear", "Module", "ParameterDict", "ParameterList", "RNNBase", "RNNCellBase"}
"""Classes with parameters that are no layers by themselves, or that Keras has no counterpart of."""
KERAS_OTHERS = {
    *("Layer", "RNN", "AbstractRNNCell", "JaxLayer", "TFSMLayer"),  # what others are made of, or around
    *("Attention", "AdditiveAttention", "LocallyConnected1D", "LocallyConnected2D"),  # Keras' own
    *("Discretization", "STFTSpectrogram", "SpectralNormalization"),
}
"""The same of Keras."""

KERAS_LAYERS = {
    "Dense": Made("dense", IMAGE, lambda k: k.Dense(3), (2, 5)),
    "Embedding": Made("embedding", {"vocabulary": 7, "features": 4}, lambda k: k.Embedding(7, 4), (2, 9)),
    "Conv1D": Made("conv1d", {**IMAGE, "w": 2}, lambda k: k.Conv1D(3, 2), (2, 9, 5)),
    "Conv2D": Made("conv2d", {**IMAGE, "h": 4, "w": 2}, lambda k: k.Conv2D(3, (4, 2)), (2, 9, 9, 5)),
    "Conv3D": Made(
        "conv3d", {**IMAGE, "d": 6, "h": 4, "w": 2}, lambda k: k.Conv3D(3, (6, 4, 2)), (2, 9, 9, 9, 5)
    ),
    "Conv1DTranspose": Made(
        "conv_transpose1d", {**IMAGE, "w": 2}, lambda k: k.Conv1DTranspose(3, 2), (2, 9, 5)
    ),
    "Conv2DTranspose": Made(
        "conv_transpose2d", {**IMAGE, "h": 4, "w": 2}, lambda k: k.Conv2DTranspose(3, (4, 2)), (2, 9, 9, 5)
    ),
    "Conv3DTranspose": Made(
        "conv_transpose3d",
        {**IMAGE, "d": 6, "h": 4, "w": 2},
        lambda k: k.Conv3DTranspose(3, (6, 4, 2)),
        (2, 9, 9, 9, 5),
    ),
    "DepthwiseConv1D": Made(
        "depthwise_conv1d", {**DEEP, "w": 2}, lambda k: k.DepthwiseConv1D(2, depth_multiplier=3), (2, 9, 5)
    ),
    "DepthwiseConv2D": Made(
        "depthwise_conv2d",
        {**DEEP, "h": 4, "w": 2},
        lambda k: k.DepthwiseConv2D((4, 2), depth_multiplier=3),
        (2, 9, 9, 5),
    ),
    "SeparableConv1D": Made(
        "separable_conv1d",
        {**DEEP, "w": 2, "out": 7},
        lambda k: k.SeparableConv1D(7, 2, depth_multiplier=3),
        (2, 9, 5),
    ),
    "SeparableConv2D": Made(
        "separable_conv2d",
        {**DEEP, "h": 4, "w": 2, "out": 7},
        lambda k: k.SeparableConv2D(7, (4, 2), depth_multiplier=3),
        (2, 9, 9, 5),
    ),
    "LSTM": Made("lstm", CELL, lambda k: k.LSTM(7), (2, 9, 5)),
    "LSTMCell": Made("lstm", CELL, lambda k: k.LSTMCell(7), (2, 5)),
    "GRU": Made("gru", CELL, lambda k: k.GRU(7, reset_after=True), (2, 9, 5)),
    "GRUCell": Made("gru", CELL, lambda k: k.GRUCell(7, reset_after=True), (2, 5)),
    "GRU that resets before": Made(
        "gru_reset_before", CELL, lambda k: k.GRU(7, reset_after=False), (2, 9, 5)
    ),
    "SimpleRNN": Made("simple_rnn", CELL, lambda k: k.SimpleRNN(7), (2, 9, 5)),
    "SimpleRNNCell": Made("simple_rnn", CELL, lambda k: k.SimpleRNNCell(7), (2, 5)),
    "ConvLSTM1D": Made("conv_lstm1d", {**CELL, "w": 2}, lambda k: k.ConvLSTM1D(7, 2), (2, 3, 9, 5)),
    "ConvLSTM2D": Made(
        "conv_lstm2d", {**CELL, "h": 4, "w": 2}, lambda k: k.ConvLSTM2D(7, (4, 2)), (2, 3, 9, 9, 5)
    ),
    "ConvLSTM3D": Made(
        "conv_lstm3d",
        {**CELL, "d": 6, "h": 4, "w": 2},
        lambda k: k.ConvLSTM3D(7, (6, 4, 2)),
        (2, 3, 9, 9, 9, 5),
    ),
    "BatchNormalization": Made("batch_norm", NORM, lambda k: k.BatchNormalization(), (2, 9, 6)),
    "LayerNormalization": Made(
        "layer_norm",
        {"features_0": 5, "features_1": 4},
        lambda k: k.LayerNormalization(axis=[1, 2]),
        (2, 5, 4),
    ),
    "GroupNormalization": Made("group_norm", NORM, lambda k: k.GroupNormalization(2), (2, 9, 6)),
    "RMSNormalization": Made("rms_norm", NORM, lambda k: k.RMSNormalization(), (2, 9, 6)),
    "Normalization": Made("normalization", NORM, lambda k: k.Normalization(), (2, 6)),
    "PReLU": Made("prelu", {"shared": 9, "features": 6}, lambda k: k.PReLU(), (2, 9, 6)),
}


def checked(framework: str, made: Made, variables: Mapping[str, tuple[int, ...]]) -> None:
    """Every variable is one of the kind's, all that have to be there are, and axes and order agree."""
    kind = layers._table().kinds[made.kind]
    column = kind.variables[framework]
    assert variables.keys() <= column.keys()
    assert {key for key, variable in column.items() if not variable.optional} <= variables.keys()
    assert list(variables) == [key for key in column if key in variables]
    told = {}
    for key, shape in variables.items():
        found = layers.declared(framework, made.kind, key, shape)
        assert found is not None
        told[key] = found[1]
    sizes = bind([*((told[key], shape) for key, shape in variables.items()), *_due(made.sizes)])
    assert sizes is not None
    assert set(_atoms(made.sizes)) <= sizes.keys()


def _due(sizes: Mapping[str, int]) -> Iterator[tuple[tuple[str, ...], tuple[int, ...]]]:
    yield from (((axis,), (size,)) for axis, size in sizes.items() if axis != "in*multiplier")


def _atoms(sizes: Mapping[str, int]) -> list[str]:
    return [axis for axis in sizes if "*" not in axis]


@pytest.mark.parametrize("name", TORCH)
def test_torch(name: str) -> None:
    torch = pytest.importorskip("torch")
    made = TORCH[name]
    module = made.make(torch.nn)
    assert layers.kind_of_class("torch", type(module), module) == made.kind
    assert f"torch.{name.partition(' ')[0]}" in layers._table().kinds[made.kind].classes["torch"]
    checked("torch", made, {key: tuple(value.shape) for key, value in module.state_dict().items()})


def test_conv1d_of_transformers() -> None:
    pytest.importorskip("torch")
    utils = pytest.importorskip("transformers.pytorch_utils")
    module = utils.Conv1D(3, 5)
    assert layers.kind_of_class("torch", type(module), module) == "gpt2_conv1d"
    checked(
        "torch",
        Made("gpt2_conv1d", IMAGE, lambda _: module),
        {key: tuple(value.shape) for key, value in module.state_dict().items()},
    )


def test_torch_has_no_other_class_with_parameters() -> None:
    torch = pytest.importorskip("torch")
    known = {
        name.partition(".")[2]
        for kind in layers._table().kinds.values()
        for name in kind.classes.get("torch", ())
        if name.startswith("torch.")
    }
    known |= TORCH_OF_SEVERAL
    lazy = torch.nn.modules.lazy.LazyModuleMixin
    others = set()
    for name in torch.nn.modules.__all__:
        cls = getattr(torch.nn.modules, name)
        makes = "Parameter(" in inspect.getsource(cls)
        bases = {base.__name__ for base in cls.__mro__}
        if makes and not known & bases and not issubclass(cls, lazy):
            others.add(name)
    assert others == TORCH_OTHERS


@pytest.mark.parametrize("framework", KERAS)
def test_keras_has_no_other_class_with_weights(framework: str) -> None:
    pytest.importorskip("tensorflow")
    keras = pytest.importorskip(KERAS[framework])
    known = {
        name.partition(".")[2]
        for kind in layers._table().kinds.values()
        for name in kind.classes.get(framework, ())
    }
    others = {
        name
        for name, cls in vars(keras.layers).items()
        if inspect.isclass(cls)
        and "add_weight(" in inspect.getsource(cls)
        and not known & {base.__name__ for base in cls.__mro__}
    }
    assert others <= KERAS_OTHERS


def edges_of(layer: Any) -> dict[str, tuple[int, ...]]:
    """The layer's own variables in their order, by the edges of its object graph."""
    layer = getattr(layer, "cell", layer)
    children = {
        **vars(layer),
        **(layer._trackable_children() if hasattr(layer, "_trackable_children") else {}),
    }
    names = {id(value): name for name, value in children.items() if hasattr(value, "assign")}
    return {
        names[id(v)]: tuple(v.shape) for v in layer.weights if id(v) in names and "seed" not in names[id(v)]
    }


@pytest.mark.parametrize("framework", KERAS)
@pytest.mark.parametrize("name", KERAS_LAYERS)
def test_keras(name: str, framework: str) -> None:
    pytest.importorskip("tensorflow")
    keras = pytest.importorskip(KERAS[framework])
    made = KERAS_LAYERS[name]
    if framework not in layers._table().kinds[made.kind].variables:
        assert not hasattr(keras.layers, name)
        return
    layer = made.make(keras.layers)
    layer.build(made.shape)
    assert layers.kind_of_class(framework, type(layer), layer) == made.kind
    assert f"{KERAS[framework]}.{type(layer).__name__}" in layers._table().kinds[made.kind].classes[framework]
    checked(framework, made, edges_of(layer))


TF1 = {
    "Dense": ("dense", IMAGE, lambda k: k.Dense(3), (2, 5)),
    "Conv1D": ("conv1d", {**IMAGE, "w": 2}, lambda k: k.Conv1D(3, 2), (2, 9, 5)),
    "Conv2D": ("conv2d", {**IMAGE, "h": 4, "w": 2}, lambda k: k.Conv2D(3, (4, 2)), (2, 9, 9, 5)),
    "Conv3D": (
        "conv3d",
        {**IMAGE, "d": 6, "h": 4, "w": 2},
        lambda k: k.Conv3D(3, (6, 4, 2)),
        (2, 9, 9, 9, 5),
    ),
    "Conv2DTranspose": (
        "conv_transpose2d",
        {**IMAGE, "h": 4, "w": 2},
        lambda k: k.Conv2DTranspose(3, (4, 2)),
        (2, 9, 9, 5),
    ),
    "Conv3DTranspose": (
        "conv_transpose3d",
        {**IMAGE, "d": 6, "h": 4, "w": 2},
        lambda k: k.Conv3DTranspose(3, (6, 4, 2)),
        (2, 9, 9, 9, 5),
    ),
    "SeparableConv2D": (
        "separable_conv2d",
        {**DEEP, "h": 4, "w": 2, "out": 7},
        lambda k: k.SeparableConv2D(7, (4, 2), depth_multiplier=3),
        (2, 9, 9, 5),
    ),
    "BatchNormalization": ("batch_norm", NORM, lambda k: k.BatchNormalization(), (2, 9, 6)),
}


@pytest.mark.parametrize("name", TF1)
def test_tf1(name: str) -> None:
    """`tf.layers` in a graph: names of variables are those of tf_keras' edges, below the layer's scope."""
    tf = pytest.importorskip("tensorflow")
    pytest.importorskip("tf_keras")
    kind, sizes, make, shape = TF1[name]
    parts = ("core", "convolutional", "normalization")
    modules = [importlib.import_module(f"tf_keras.src.legacy_tf_layers.{part}") for part in parts]
    legacy = SimpleNamespace(**{key: cls for module in modules for key, cls in vars(module).items()})
    with tf.Graph().as_default():
        layer = make(legacy)
        layer.apply(tf.zeros(shape))
        variables = tf.compat.v1.global_variables()
        found = {v.op.name.rpartition("/")[2]: tuple(v.shape.as_list()) for v in variables}
        scopes = {v.op.name.rpartition("/")[0] for v in variables}
    checked("tf_keras", Made(kind, sizes, make), found)
    (scope,) = scopes
    assert tf1_layers._SCOPES.get(scope, kind) == kind


def test_scopes_of_tf1_name_kinds_of_the_catalog() -> None:
    assert set(tf1_layers._SCOPES.values()) <= set(layers.kinds())
