"""flax linen's rows of the layer catalog against its classes, and what they compute against torch's."""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pytest

from ckptconv.catalog import layers
from ckptconv.catalog.axes import entries
from ckptconv.catalog.compounds import cut_rows, direction
from ckptconv.tensor import StoredTensor, TensorRef
from tests.test_layer_drift import CELL, IMAGE, NORM, Made, checked

FLAX = {
    "Dense": Made("dense", IMAGE, lambda nn: nn.Dense(3), (2, 5)),
    "Embed": Made("embedding", {"vocabulary": 7, "features": 4}, lambda nn: nn.Embed(7, 4), (2, 9)),
    "Conv of one dimension": Made("conv1d", {**IMAGE, "w": 2}, lambda nn: nn.Conv(3, 2), (2, 9, 5)),
    "Conv of two": Made("conv2d", {**IMAGE, "h": 4, "w": 2}, lambda nn: nn.Conv(3, (4, 2)), (2, 9, 9, 5)),
    "Conv of three": Made(
        "conv3d", {**IMAGE, "d": 6, "h": 4, "w": 2}, lambda nn: nn.Conv(3, (6, 4, 2)), (2, 9, 9, 9, 5)
    ),
    "ConvTranspose of one dimension": Made(
        "conv_transpose1d", {**IMAGE, "w": 2}, lambda nn: nn.ConvTranspose(3, (2,)), (2, 9, 5)
    ),
    "ConvTranspose of two": Made(
        "conv_transpose2d", {**IMAGE, "h": 4, "w": 2}, lambda nn: nn.ConvTranspose(3, (4, 2)), (2, 9, 9, 5)
    ),
    "ConvTranspose of three": Made(
        "conv_transpose3d",
        {**IMAGE, "d": 6, "h": 4, "w": 2},
        lambda nn: nn.ConvTranspose(3, (6, 4, 2)),
        (2, 9, 9, 9, 5),
    ),
    "ConvTranspose of one dimension, turned": Made(
        "conv_transpose1d_turned",
        {**IMAGE, "w": 2},
        lambda nn: nn.ConvTranspose(3, (2,), transpose_kernel=True),
        (2, 9, 5),
    ),
    "ConvTranspose of two, turned": Made(
        "conv_transpose2d_turned",
        {**IMAGE, "h": 4, "w": 2},
        lambda nn: nn.ConvTranspose(3, (4, 2), transpose_kernel=True),
        (2, 9, 9, 5),
    ),
    "ConvTranspose of three, turned": Made(
        "conv_transpose3d_turned",
        {**IMAGE, "d": 6, "h": 4, "w": 2},
        lambda nn: nn.ConvTranspose(3, (6, 4, 2), transpose_kernel=True),
        (2, 9, 9, 9, 5),
    ),
    "BatchNorm": Made("batch_norm", NORM, lambda nn: nn.BatchNorm(use_running_average=False), (2, 9, 6)),
    "LayerNorm": Made("layer_norm", {"features": 6}, lambda nn: nn.LayerNorm(), (2, 9, 6)),
    "GroupNorm": Made("group_norm", NORM, lambda nn: nn.GroupNorm(2), (2, 9, 6)),
    "InstanceNorm": Made("instance_norm", NORM, lambda nn: nn.InstanceNorm(), (2, 9, 6)),
    "RMSNorm": Made("rms_norm", NORM, lambda nn: nn.RMSNorm(), (2, 9, 6)),
    "PReLU": Made("prelu", {}, lambda nn: nn.PReLU(), (2, 9, 6)),
    "LSTMCell": Made("lstm", CELL, lambda nn: nn.LSTMCell(7), (2, 5)),
    "OptimizedLSTMCell": Made("lstm", CELL, lambda nn: nn.OptimizedLSTMCell(7), (2, 5)),
    "GRUCell": Made("gru", CELL, lambda nn: nn.GRUCell(7), (2, 5)),
    "SimpleCell": Made("simple_rnn", CELL, lambda nn: nn.SimpleCell(7), (2, 5)),
    "SimpleCell, residual": Made(
        "simple_rnn_residual", CELL, lambda nn: nn.SimpleCell(7, residual=True), (2, 5)
    ),
}
FLAX_ATTENTION = {"MultiHeadDotProductAttention", "MultiHeadAttention", "SelfAttention"}
"""Modules whose parameters are taken apart first (`catalog/compounds.json`)."""
FLAX_OTHERS = {
    *("Module", "RNN", "RNNCellBase", "Bidirectional", "Sequential", "Dropout"),  # of others, or of none
    *(
        "DenseGeneral",
        "Einsum",
        "ConvLocal",
        "ConvLSTMCell",
        "MGUCell",
    ),  # flax' own, or of any axes
    *("SpectralNorm", "WeightNorm"),
    *("Fp8DirectDotGeneralOp", "Fp8DotGeneral", "Fp8DotGeneralOp", "Fp8Einsum", "NANOOFp8DotGeneralOp"),
}
"""Classes of flax without a row."""


def flattened(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from flattened(value, f"{prefix}{key}/")
        else:
            yield prefix + key, value


def init_of_flax(name: str, made: Made) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """The module, what it is called with, and its variables."""
    nn = pytest.importorskip("flax.linen")
    jax = importlib.import_module("jax")
    key, module = jax.random.PRNGKey(0), made.make(nn)
    batch = (jax.random.normal(key, made.shape) if name != "Embed" else jax.numpy.zeros(made.shape, "int32"),)
    if hasattr(module, "initialize_carry"):
        batch = (module.initialize_carry(key, made.shape), *batch)
    return module, batch, module.init(key, *batch)


@pytest.mark.parametrize("name", FLAX)
def test_flax(name: str) -> None:
    made = FLAX[name]
    module, _, variables = init_of_flax(name, made)
    parts = [variables.get(part, {}) for part in ("params", "batch_stats")]
    found = {key: tuple(v.shape) for part in parts for key, v in flattened(part)}
    column = layers._table().kinds[made.kind].variables["flax"]
    assert found.keys() <= column.keys()
    checked("flax", made, {key: found[key] for key in column if key in found})
    assert layers.kind_of_class("flax", type(module), module) == made.kind


def test_a_convolution_of_flax_with_a_group_for_each_channel() -> None:
    """Its class does not tell, for it does not know its input's channels; its kernel does."""
    made = Made(
        "depthwise_conv2d",
        {"in*multiplier": 15, "h": 4, "w": 2},
        lambda nn: nn.Conv(15, (4, 2), feature_group_count=5),
        (2, 9, 9, 5),
    )
    _, _, variables = init_of_flax("Conv", made)
    checked("flax", made, {key: tuple(variables["params"][key].shape) for key in ("kernel", "bias")})


def test_flax_has_no_other_class() -> None:
    nn = pytest.importorskip("flax.linen")
    known = {
        name.partition(".")[2]
        for kind in layers._table().kinds.values()
        for name in kind.classes.get("flax", ())
    }
    modules = {name for name, cls in vars(nn).items() if inspect.isclass(cls) and issubclass(cls, nn.Module)}
    assert modules - known == FLAX_OTHERS | FLAX_ATTENTION
    assert known <= modules


def laid_out(
    value: np.ndarray, source: tuple[str, ...], axes: tuple[str, ...], shape: tuple[int, ...]
) -> np.ndarray:
    """A variable as other axes have it."""
    ops = layers.layout_ops(source, value.shape, axes, shape)
    assert ops is not None
    tensor: TensorRef = StoredTensor.of_array(value)
    for op in ops:
        tensor = tensor.apply(op)
    return tensor.read()


def in_torch(kind: str, params: Mapping[str, np.ndarray], role: str, due: tuple[int, ...]) -> np.ndarray:
    """What torch's variable of a role is, by the two columns of the catalog."""
    table = layers._table().kinds
    column = {**table[layers.counterpart(kind)].variables["torch"], **table[kind].variables.get("torch", {})}
    (axes,) = [variable.axes for variable in column.values() if variable.role == role]
    own = {key: variable for key, variable in table[kind].variables["flax"].items() if variable.role == role}
    gates = [entry for axis in axes for atom in axis.split("*") for entry in entries(atom)[1]]
    if not gates:
        ((key, variable),) = own.items()
        return laid_out(params[key], variable.axes, axes, due)
    rows = []
    for gate in gates:
        found = [key for key, variable in own.items() if any(f"({gate})" in axis for axis in variable.axes)]
        one = tuple(re.sub(r"\(.*\)", f"({gate})", axis) for axis in axes)
        size = (due[0] // len(gates), *due[1:])
        rows += [laid_out(params[key], own[key].axes, one, size) for key in found] or [
            np.zeros(size, np.float32)
        ]
    return np.concatenate(rows)


TORCH_OF_FLAX = {
    "ConvTranspose of one dimension": lambda nn: nn.ConvTranspose1d(5, 3, 2),
    "ConvTranspose of two": lambda nn: nn.ConvTranspose2d(5, 3, (4, 2)),
    "ConvTranspose of three": lambda nn: nn.ConvTranspose3d(5, 3, (6, 4, 2)),
    "ConvTranspose of one dimension, turned": lambda nn: nn.ConvTranspose1d(5, 3, 2),
    "ConvTranspose of two, turned": lambda nn: nn.ConvTranspose2d(5, 3, (4, 2)),
    "ConvTranspose of three, turned": lambda nn: nn.ConvTranspose3d(5, 3, (6, 4, 2)),
    "PReLU": lambda nn: nn.PReLU(),
    "LSTMCell": lambda nn: nn.LSTMCell(5, 7),
    "OptimizedLSTMCell": lambda nn: nn.LSTMCell(5, 7),
    "GRUCell": lambda nn: nn.GRUCell(5, 7),
    "SimpleCell": lambda nn: nn.RNNCell(5, 7),
}


@pytest.mark.parametrize("name", TORCH_OF_FLAX)
def test_flax_computes_what_torch_does(name: str) -> None:
    """The axes of the two columns lead from one to the other, kernels that run the other way included."""
    torch = pytest.importorskip("torch")
    made = FLAX[name]
    if name.startswith("ConvTranspose"):
        made = made._replace(make=lambda nn, make=made.make: make(nn).clone(padding="VALID"))
    module, batch, variables = init_of_flax(name, made)
    rng = np.random.default_rng(0)
    params = {key: rng.normal(size=v.shape).astype("float32") for key, v in flattened(variables["params"])}
    nested: dict[str, Any] = {}
    for key, value in params.items():
        *path, leaf = key.split("/")
        inner = nested
        for part in path:
            inner = inner.setdefault(part, {})
        inner[leaf] = value
    theirs = TORCH_OF_FLAX[name](torch.nn)
    weights = {}
    kinds, own = layers._table().kinds, theirs.state_dict()
    roles = {variable.role for variable in kinds[made.kind].variables["flax"].values()}
    column = kinds[layers.counterpart(made.kind)].variables["torch"]
    for key, value in own.items():
        role = column[key].role
        role = "bias" if role == "input_bias" and role not in roles else role
        if role in roles:
            weights[key] = torch.from_numpy(in_torch(made.kind, params, role, tuple(value.shape)).copy())
        else:  # torch's second bias
            assert role == "recurrent_bias"
            weights[key] = torch.zeros_like(value)
    theirs.load_state_dict(weights)
    if "Cell" not in name:
        image = torch.from_numpy(np.moveaxis(np.array(batch[0]), -1, 1).copy())
        found = module.apply({"params": nested}, *batch)
        due = np.moveaxis(theirs(image).detach().numpy(), 1, -1)
    else:
        state = rng.normal(size=(2, 7)).astype("float32")
        pair = made.kind == "lstm"
        _, found = module.apply({"params": nested}, (state, state) if pair else state, batch[1])
        x, h = torch.from_numpy(np.array(batch[1])), torch.from_numpy(state)
        due = (theirs(x, (h, h))[0] if pair else theirs(x, h)).detach().numpy()
    np.testing.assert_allclose(np.array(found), due, rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore:SelfAttention will be deprecated")
@pytest.mark.parametrize("name", sorted(FLAX_ATTENTION))
def test_attention_of_flax(name: str) -> None:
    nn = pytest.importorskip("flax.linen")
    jax = importlib.import_module("jax")
    x = jax.numpy.zeros((2, 9, 5))
    module = getattr(nn, name)(num_heads=3, qkv_features=12, out_features=7)
    made = dict(flattened(module.init(jax.random.PRNGKey(0), x)["params"]))
    heads, parts = {"heads": 3, "width": 4}, {}
    known = {f"block/{key}" for key in made}
    for key in made:
        (row,) = [row for row in cut_rows("flax") if row.names(f"block/{key}", "unknown", known)]
        kind = row.kind_of("unknown")
        assert kind is not None
        parts.setdefault((key.partition("/")[0], kind), {})[key.partition("/")[2]] = tuple(made[key].shape)
    assert parts.keys() == {
        *((part, "attention_input") for part in ("query", "key", "value")),
        ("out", "attention_output"),
    }
    for (part, kind), found in parts.items():
        sizes = {"out": 7, **heads} if part == "out" else {"in": 5, **heads}
        checked("flax", Made(kind, sizes, lambda nn: nn), {key: found[key] for key in ("kernel", "bias")})


def test_directions_of_flax() -> None:
    nn = pytest.importorskip("flax.linen")
    jax = importlib.import_module("jax")
    both = nn.Bidirectional(nn.RNN(nn.GRUCell(7)), nn.RNN(nn.GRUCell(7)))
    params = both.init(jax.random.PRNGKey(0), jax.numpy.zeros((2, 9, 5)))["params"]
    told = {direction("flax", (name, "cell")) for name in params}
    assert told == {"forward", "backward"}
    column = layers._table().kinds["gru"].variables["flax"]
    assert {key for key, _ in flattened(params["forward_rnn"]["cell"])} == column.keys()
