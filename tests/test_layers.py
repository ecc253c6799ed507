"""The layer table against the layers themselves: converted weights give the same output."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from ckptconv.catalog import layers
from ckptconv.catalog.axes import bind, expand
from ckptconv.ops import Permute, Reorder, Reshape
from ckptconv.tensor import StoredTensor, TensorRef

DENSE, GPT2 = ("dense", "kernel", ("out", "in")), ("gpt2_conv1d", "kernel", ("in", "out"))
EMBEDDING = ("embedding", "embeddings", ("vocabulary", "features"))
BATCH_NORM = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


def kinds_of(found: tuple[layers.Candidate, ...]) -> set[str]:
    return {candidate.kind for candidate in found}


def test_torch_by_names_alone() -> None:
    assert set(layers.torch_candidates("weight", 2, {"weight", "bias"})) == {DENSE, GPT2}
    assert set(layers.torch_candidates("weight", 2, {"weight"})) == {DENSE, GPT2, EMBEDDING}
    assert kinds_of(layers.torch_candidates("weight", 1, {"weight", "bias"})) == {"layer_norm", "group_norm"}
    assert kinds_of(layers.torch_candidates("running_mean", 1, BATCH_NORM)) == {"batch_norm"}
    assert layers.torch_candidates("num_batches_tracked", 0, BATCH_NORM) == (
        ("batch_norm", "batch_count", ()),
    )
    assert kinds_of(layers.torch_candidates("weight_ih", 2, {"weight_ih", "weight_hh"})) == {
        "lstm",
        "gru",
        "simple_rnn",
    }
    assert layers.torch_candidates("weight", 2, {"weight", "weight_g"}) == ()


@pytest.mark.parametrize(
    ("framework", "key", "shape", "siblings", "expected"),
    [
        ("torch", "weight", (8, 16), {"bias": (8,)}, {"dense"}),
        ("torch", "weight", (8, 16), {"bias": (16,)}, {"gpt2_conv1d"}),
        ("torch", "weight", (8, 8), {"bias": (8,)}, {"dense", "gpt2_conv1d"}),
        ("torch", "weight", (8, 16), {}, {"dense", "gpt2_conv1d", "embedding"}),
        ("torch", "weight", (5, 6), {"bias": (5, 6)}, {"layer_norm"}),
        ("torch", "weight", (8, 4, 3, 3), {"bias": (8,)}, {"conv2d"}),
        ("torch", "weight", (8, 4, 3, 3), {"bias": (4,)}, {"conv_transpose2d"}),
        ("torch", "weight", (8, 1, 3, 3), {"bias": (8,)}, {"conv2d", "depthwise_conv2d"}),
        ("torch", "bias", (8,), {"weight": (8, 4, 3, 3)}, {"conv2d"}),
        ("torch", "bias", (8,), {"weight": (8,)}, {"layer_norm", "group_norm"}),
        ("torch", "weight", (8,), dict.fromkeys(BATCH_NORM[:-1], (8,)), {"batch_norm"}),
        ("torch", "weight", (8,), {}, {"layer_norm", "group_norm", "rms_norm", "prelu"}),
        ("keras3", "_kernel", (5, 3), {"bias": (3,)}, {"dense"}),
        ("keras3", "_kernel", (2, 5, 3), {"bias": (3,)}, {"conv1d", "einsum_dense"}),
        ("keras3", "_kernel", (5, 3, 4), {"bias": (3, 4)}, {"einsum_dense"}),
        ("keras3", "_kernel", (2, 2, 5, 3), {"bias": (3,)}, {"conv2d"}),
        ("keras3", "kernel", (2, 2, 3, 5), {"bias": (3,)}, {"conv_transpose2d"}),
        ("keras3", "kernel", (2, 2, 5, 2), {"bias": (10,)}, {"depthwise_conv2d"}),
        ("keras3", "kernel", (2, 2, 5, 1), {"bias": (5,)}, {"conv_transpose2d", "depthwise_conv2d"}),
        ("keras3", "kernel", (2, 2, 5, 2), {}, {"conv_transpose2d", "depthwise_conv2d"}),
        ("keras3", "gamma", (5,), {"beta": (5,)}, {"layer_norm", "group_norm"}),
        (
            "keras3",
            "gamma",
            (5,),
            dict.fromkeys(("moving_mean", "moving_variance"), (5,)),
            {"batch_norm"},
        ),
        (
            "keras3",
            "depthwise_kernel",
            (2, 2, 5, 1),
            {"pointwise_kernel": (1, 1, 5, 3)},
            {"separable_conv2d"},
        ),
        ("keras3", "scale", (5,), {}, {"rms_norm"}),
        ("keras3", "_kernel", (5, 3), {"lora_kernel_a": (5, 1)}, set()),
        ("tf_keras", "kernel", (2, 2, 5, 3), {"bias": (3,)}, {"conv2d"}),
        ("tf_keras", "kernel", (2, 2, 3, 5), {"bias": (3,)}, {"conv_transpose2d"}),
        ("tf_keras", "kernel", (2, 2, 4, 4), {"bias": (4,)}, {"conv2d", "conv_transpose2d"}),
        ("tf_keras", "depthwise_kernel", (2, 2, 5, 2), {"bias": (10,)}, {"depthwise_conv2d"}),
        ("tf_keras", "kernel", (5, 20), {"recurrent_kernel": (5, 20), "bias": (20,)}, {"lstm"}),
        ("tf_keras", "bias", (2, 9), {"recurrent_kernel": (3, 9), "kernel": (5, 9)}, {"gru"}),
        ("keras3", "bias", (9,), {"recurrent_kernel": (3, 9), "kernel": (5, 9)}, {"gru_reset_before"}),
        ("keras3", "kernel", (5, 3), {"recurrent_kernel": (3, 3)}, {"simple_rnn"}),
        ("keras3", "kernel", (5, 6), {"recurrent_kernel": (3, 6)}, set()),
        ("keras3", "kernel", (2, 5, 8), {"recurrent_kernel": (2, 2, 8), "bias": (8,)}, {"conv_lstm1d"}),
        ("keras3", "count", (), {"adapt_mean": (4,), "adapt_variance": (4,)}, {"normalization"}),
        ("tf_keras", "mean", (4,), {"variance": (4,), "count": ()}, {"normalization"}),
        ("keras3", "kernel", (5, 18), {"recurrent_kernel": (6, 18), "bias": (2, 18)}, {"gru"}),
        ("keras3", "kernel", (5, 18), {"recurrent_kernel": (6, 18), "bias": (18,)}, {"gru_reset_before"}),
        ("keras3", "kernel", (5, 18), {"recurrent_kernel": (6, 18)}, {"gru", "gru_reset_before"}),
        ("keras3", "kernel", (5, 6), {"recurrent_kernel": (6, 6), "bias": (6,)}, {"simple_rnn"}),
        ("keras3", "kernel", (5, 12), {"recurrent_kernel": (6, 12), "bias": (12,)}, set()),
        ("tf_keras_legacy", "embeddings", (9, 4), {}, {"embedding"}),
        ("torch", "nonsense", (8,), {}, set()),
    ],
)
def test_candidates(
    framework: str,
    key: str,
    shape: tuple[int, ...],
    siblings: dict[str, tuple[int, ...]],
    expected: set[str],
) -> None:
    assert kinds_of(layers.candidates(framework, key, shape, siblings)) == expected


def test_which_kinds_are_one() -> None:
    assert layers.same_layer("gpt2_conv1d", "dense")
    assert not layers.same_layer("conv2d", "conv_transpose2d")
    assert not layers.same_layer("nonsense", "nonsense")
    assert layers.is_framework_only("batch_count")
    assert not layers.is_framework_only("kernel")


def test_expand_and_bind() -> None:
    assert expand(("x...", "y"), 3) == ("x_0", "x_1", "y")
    assert expand(("x...",), 1) == ("x",)
    assert expand(("x", "y"), 3) is None
    assert bind([(("a*b", "1"), (6, 1)), (("a",), (2,))]) == {"a": 2, "b": 3}
    assert bind([(("a*b",), (6,)), (("a",), (4,))]) is None
    assert bind([(("a", "1"), (6, 2))]) is None
    assert bind([(("a",), (6,)), (("a",), (5,))]) is None
    assert bind([(("a*b",), (0,)), (("a",), (0,))]) is not None


def test_layout_ops() -> None:
    conv = (("out", "in", "h", "w"), ("h", "w", "in", "out"))
    assert layers.layout_ops(conv[0], (8, 4, 3, 2), conv[1], (3, 2, 4, 8)) == (Permute((2, 3, 1, 0)),)
    assert layers.layout_ops(conv[0], (8, 4, 3, 2), conv[0], (8, 4, 3, 2)) == ()
    assert layers.layout_ops(conv[0], (8, 4, 3, 2), conv[1], (3, 2, 8, 4)) is None
    merged = (("in*multiplier", "1", "h", "w"), ("h", "w", "in", "multiplier"))
    forth = layers.layout_ops(merged[0], (8, 1, 3, 2), merged[1], (3, 2, 4, 2))
    assert forth == (Reshape((8, 1, 3, 2), (4, 2, 3, 2)), Permute((2, 3, 0, 1)))
    assert layers.layout_ops(("a*b",), (6,), ("a*b",), (6,)) == ()
    assert layers.layout_ops(("a*b", "c"), (6, 2), ("c", "a*b"), (2, 6)) == (Permute((1, 0)),)
    assert layers.layout_ops(("a*b",), (6,), ("a", "b"), (4, 2)) is None
    assert layers.layout_ops(("1", "a"), (1, 3), ("a",), (3,)) == (Reshape((1, 3), (3,)),)
    turned = layers.layout_ops(("-h", "in"), (3, 2), ("in", "h"), (2, 3))
    assert turned == (Reorder(0, (2, 1, 0)), Permute((1, 0)))
    assert layers.layout_ops(("in", "h"), (2, 3), ("-h", "in"), (3, 2)) == (
        Reorder(1, (2, 1, 0)),
        Permute((1, 0)),
    )
    assert layers.layout_ops(("-h", "in"), (3, 2), ("-h", "in"), (3, 2)) == ()
    assert layers.layout_ops(("-h", "in"), (1, 2), ("in", "h"), (2, 1)) == (Reshape((1, 2), (2, 1)),)
    assert layers.layout_ops(("a", "b"), (2, 3), ("a",), (2,)) is None


KERAS_EDGES = {"kernel", "_kernel", "depthwise_kernel", "bias", "embeddings", "_embeddings", "gamma", "beta"}
KERAS_EDGES |= {"moving_mean", "moving_variance", "scale", "alpha"}

Maker = Callable[[Any], Any]
Case = tuple[str, str, Maker, Maker, tuple[int, ...]]

# kind, torch layer, Keras layer, shape of a channels-last batch; sizes such that no two axes are equal
CASES: list[Case] = [
    ("dense", "Linear", lambda nn: nn.Linear(5, 3), lambda k: k.Dense(3), (2, 5)),
    ("embedding", "Embedding", lambda nn: nn.Embedding(7, 4), lambda k: k.Embedding(7, 4), (2, 5)),
    ("conv1d", "Conv1d", lambda nn: nn.Conv1d(5, 3, 2), lambda k: k.Conv1D(3, 2), (2, 9, 5)),
    ("conv2d", "Conv2d", lambda nn: nn.Conv2d(5, 3, (2, 4)), lambda k: k.Conv2D(3, (2, 4)), (2, 9, 8, 5)),
    (
        "conv3d",
        "Conv3d",
        lambda nn: nn.Conv3d(5, 3, (2, 4, 6)),
        lambda k: k.Conv3D(3, (2, 4, 6)),
        (2, 9, 8, 7, 5),
    ),
    (
        "conv_transpose1d",
        "ConvTranspose1d",
        lambda nn: nn.ConvTranspose1d(5, 3, 2),
        lambda k: k.Conv1DTranspose(3, 2),
        (2, 9, 5),
    ),
    (
        "conv_transpose2d",
        "ConvTranspose2d",
        lambda nn: nn.ConvTranspose2d(5, 3, (2, 4)),
        lambda k: k.Conv2DTranspose(3, (2, 4)),
        (2, 9, 8, 5),
    ),
    (
        "conv_transpose3d",
        "ConvTranspose3d",
        lambda nn: nn.ConvTranspose3d(5, 3, (2, 4, 6)),
        lambda k: k.Conv3DTranspose(3, (2, 4, 6)),
        (2, 9, 8, 7, 5),
    ),
    (
        "depthwise_conv1d",
        "Conv1d",
        lambda nn: nn.Conv1d(5, 15, 2, groups=5),
        lambda k: k.DepthwiseConv1D(2, depth_multiplier=3),
        (2, 9, 5),
    ),
    (
        "depthwise_conv2d",
        "Conv2d",
        lambda nn: nn.Conv2d(5, 15, (2, 4), groups=5),
        lambda k: k.DepthwiseConv2D((2, 4), depth_multiplier=3),
        (2, 9, 8, 5),
    ),
    (
        "batch_norm",
        "BatchNorm2d",
        lambda nn: nn.BatchNorm2d(5, eps=1e-3),
        lambda k: k.BatchNormalization(),
        (2, 9, 8, 5),
    ),
    (
        "layer_norm",
        "LayerNorm",
        lambda nn: nn.LayerNorm(5, eps=1e-3),
        lambda k: k.LayerNormalization(),
        (2, 9, 5),
    ),
    (
        "group_norm",
        "GroupNorm",
        lambda nn: nn.GroupNorm(3, 6, eps=1e-3),
        lambda k: k.GroupNormalization(3),
        (2, 9, 6),
    ),
    ("rms_norm", "RMSNorm", lambda nn: nn.RMSNorm(5, eps=1e-6), lambda k: k.RMSNormalization(), (2, 9, 5)),
    ("prelu", "PReLU", lambda nn: nn.PReLU(5), lambda k: k.PReLU(), (2, 5)),
]


@pytest.mark.parametrize("framework", ["keras3", "tf_keras"])
@pytest.mark.parametrize("case", CASES, ids=[case[0] for case in CASES])
def test_outputs_are_equal(case: Case, framework: str) -> None:
    torch = pytest.importorskip("torch")
    pytest.importorskip("tensorflow")
    keras = pytest.importorskip({"keras3": "keras"}.get(framework, framework))
    kind, name, make_torch, make_keras, shape = case
    if kind == "rms_norm" and framework == "tf_keras":
        assert not hasattr(keras.layers, "RMSNormalization")
        return
    rng = np.random.default_rng(7)
    x = rng.integers(0, 7, shape) if kind == "embedding" else rng.normal(size=shape).astype(np.float32)
    module, layer = make_torch(torch.nn), make_keras(keras.layers)
    assert type(module).__name__ == name
    assert layers.kind_of_class("torch", type(module), module) == kind
    assert layers.kind_of_class(framework, type(layer), layer) == kind
    layer.build(shape)

    state = {}
    for key, value in module.state_dict().items():
        if key != "num_batches_tracked":
            drawn = (
                rng.uniform(0.5, 1.5, value.shape) if key == "running_var" else rng.normal(size=value.shape)
            )
            state[key] = drawn.astype(np.float32)
    module.load_state_dict({k: torch.from_numpy(v) for k, v in state.items()}, strict=False)
    shapes = {key: value.shape for key, value in state.items()}
    edges = edges_of(layer, framework)
    assert len(edges) == len(state)
    for key, array in state.items():
        assert kind in kinds_of(layers.candidates("torch", key, array.shape, shapes))
        (role,) = {c.role for c in layers.candidates("torch", key, array.shape, shapes) if c.kind == kind}
        for edge, variable in edges.items():
            theirs = layers.declared(framework, kind, edge, tuple(variable.shape))
            assert theirs is not None
            if theirs[0] != role:
                continue
            known = {e: tuple(v.shape) for e, v in edges.items()}
            assert kind in kinds_of(layers.candidates(framework, edge, tuple(variable.shape), known))
            mine = layers.declared("torch", kind, key, array.shape)
            assert mine is not None
            ops = layers.layout_ops(mine[1], array.shape, theirs[1], tuple(variable.shape))
            assert ops is not None
            back = layers.layout_ops(theirs[1], tuple(variable.shape), mine[1], array.shape)
            assert back is not None
            values = apply(array, ops)
            np.testing.assert_array_equal(apply(values, back), array)
            variable.assign(values)
            break
        else:
            pytest.fail(f"no variable of role {role}")

    last_to_first = (0, len(shape) - 1, *range(1, len(shape) - 1))
    moves = len(shape) > 2 and kind not in ("layer_norm", "rms_norm")
    given = torch.from_numpy(np.ascontiguousarray(x.transpose(last_to_first) if moves else x))
    module.eval()
    with torch.no_grad():
        expected = module(given).numpy()
    if moves:
        expected = np.moveaxis(expected, 1, -1)
    got = np.asarray(layer(x))
    assert np.abs(got - expected).max() <= 1e-5 * max(1.0, np.abs(expected).max())


def apply(array: np.ndarray, ops: tuple[Any, ...]) -> np.ndarray:
    tensor: TensorRef = StoredTensor.of_array(array)
    for op in ops:
        tensor = tensor.apply(op)
    return tensor.read()


def edges_of(layer: Any, framework: str) -> dict[str, Any]:
    """The layer's variables by the edges under which a checkpoint's object graph has them."""
    children = layer._trackable_children() if framework == "tf_keras" else vars(layer)
    return {e: v for e, v in children.items() if e in KERAS_EDGES and hasattr(v, "assign")}


def test_separable_is_two_modules() -> None:
    torch = pytest.importorskip("torch")
    pytest.importorskip("tensorflow")
    keras = pytest.importorskip("keras")
    layer = keras.layers.SeparableConv2D(3, (2, 4), depth_multiplier=2)
    layer.build((2, 9, 8, 5))
    assert layers.kind_of_class("keras3", type(layer)) == "separable_conv2d"
    rng = np.random.default_rng(1)
    x = rng.normal(size=(2, 9, 8, 5)).astype(np.float32)
    depth, point = layer.depthwise_kernel, layer.pointwise_kernel
    deep = layers.declared("keras3", "separable_conv2d", "depthwise_kernel", tuple(depth.shape))
    target = layers.declared("torch", "depthwise_conv2d", "weight", (10, 1, 2, 4))
    assert deep is not None
    assert target is not None
    ops = layers.layout_ops(deep[1], tuple(depth.shape), target[1], (10, 1, 2, 4))
    assert ops is not None
    first = torch.nn.Conv2d(5, 10, (2, 4), groups=5, bias=False)
    second = torch.nn.Conv2d(10, 3, 1)
    with torch.no_grad():
        first.weight.copy_(torch.from_numpy(apply(np.asarray(depth), ops)))
        second.weight.copy_(torch.from_numpy(np.asarray(point).transpose(3, 2, 0, 1)))
        second.bias.copy_(torch.from_numpy(np.asarray(layer.bias)))
        expected = second(first(torch.from_numpy(x.transpose(0, 3, 1, 2).copy()))).numpy()
    np.testing.assert_allclose(np.asarray(layer(x)), expected.transpose(0, 2, 3, 1), atol=1e-5)


def test_subclasses_and_unknown_classes() -> None:
    torch = pytest.importorskip("torch")

    class Mine(torch.nn.Linear):
        pass

    assert layers.kind_of_class("torch", Mine) == "dense"
    assert layers.kind_of_class("torch", torch.nn.LSTM) is None  # a module of cells
    assert layers.kind_of_class("torch", torch.nn.LSTMCell) == "lstm"
    assert layers.kind_of_class("torch", torch.nn.Conv2d, torch.nn.Conv2d(4, 4, 1)) == "conv2d"
    assert layers.kind_of_class("torch", torch.nn.Conv2d) == "conv2d"
