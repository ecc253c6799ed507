"""Every kind of layer across and back: outputs, and what an optimizer holds for it.

Layers that are several of the other library's are in `test_compounds`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("tensorflow")
pytest.importorskip("tf_keras")

from torch import nn  # noqa: E402

import ckptconv  # noqa: E402
from tests.support.live_twins import (  # noqa: E402
    Twin,
    apart,
    keras_adamw,
    torch_adamw,
    train_keras,
    train_torch,
)
from tests.support.twins import framework  # noqa: E402

BOTH = ("keras3", "tf_keras")
IMAGE = {1: (6,), 2: (6, 5), 3: (6, 5, 4)}
"""Number of dimensions -> the positions of an image with as many."""


class Moved(nn.Module):
    """A layer that takes its channels last."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Any) -> Any:
        return self.layer(x.movedim(-1, 1).contiguous()).movedim(1, -1)


class Tokens(nn.Module):
    """An embedding of what the numbers are rounded to."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Any) -> Any:
        return self.layer(x.abs().int())


class Reversible(nn.Module):
    """An embedding, and the layer back to the words, tied to it or not."""

    def __init__(self, *, tied: bool) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 4)
        self.out = nn.Linear(4, 7, bias=False)
        if tied:
            self.out.weight = self.embedding.weight

    def forward(self, x: Any) -> Any:
        return self.out(self.embedding(x.abs().int()))


class Heads(nn.Module):
    """Linear layers around axes of a head each."""

    def __init__(self) -> None:
        super().__init__()
        self.split, self.joined = nn.Linear(4, 6), nn.Linear(6, 4)

    def forward(self, x: Any) -> Any:
        return self.joined(torch.tanh(self.split(x)))


def reversible(*, tied: bool) -> Twin:
    def layer(k: Any) -> Any:
        both = k.layers.ReversibleEmbedding(7, 4, tie_weights=tied)
        return lambda x: both(both(x), reverse=True)

    return Twin(torch=lambda: Reversible(tied=tied), keras=keras_tokens(layer), shape=(3, 5))


def einsum(equation: str, bias_axes: str | None, inputs: int, outputs: int) -> Twin:
    return twin(
        lambda: nn.Linear(inputs, outputs, bias=bias_axes is not None),
        lambda kl: kl.EinsumDense(
            equation, (outputs,) if "." in equation else (None, outputs), bias_axes=bias_axes
        ),
        5,
        inputs,
    )


def heads() -> Twin:
    def keras(k: Any) -> Any:
        kl = k.layers
        split = kl.EinsumDense("abc,cde->abde", (None, 2, 3), bias_axes="de", activation="tanh")
        joined = kl.EinsumDense("abde,dec->abc", (None, 4), bias_axes="c")
        return k.Sequential([k.Input((5, 4)), split, joined])

    return Twin(torch=Heads, keras=keras, shape=(3, 5, 4))


def keras_tokens(layer: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def model(k: Any) -> Any:
        inputs = k.Input((5,))
        tokens = k.layers.Lambda(lambda x: abs(x) // 1, output_shape=(5,))(inputs)
        return k.Model(inputs, layer(k)(tokens))

    return model


def twin(ours: Callable[[], Any], theirs: Callable[[Any], Any], *shape: int) -> Twin:
    """Layers whose input has no channels that would stand elsewhere."""
    return Twin(
        torch=lambda: nn.Sequential(ours()),
        keras=lambda k: k.Sequential([k.Input(shape), theirs(k.layers)]),
        shape=(3, *shape),
    )


def image(ours: Callable[[], Any], theirs: Callable[[Any], Any], dimensions: int, channels: int = 4) -> Twin:
    return twin(lambda: Moved(ours()), theirs, *IMAGE[dimensions], channels)


def convolutions(dimensions: int) -> dict[str, Twin]:
    """Kernels of unequal sides, strides, groups, and those that only a declaration tells apart."""
    d, side = dimensions, (2, 3, 2)[:dimensions]
    conv, back = getattr(nn, f"Conv{d}d"), getattr(nn, f"ConvTranspose{d}d")

    def keras(name: str, *args: Any, **options: Any) -> Callable[[Any], Any]:
        return lambda kl: getattr(kl, name)(*args, side, **options)

    found = {
        f"conv{d}d": image(lambda: conv(4, 5, side), keras(f"Conv{d}D", 5), d),
        f"conv{d}d-square": image(lambda: conv(4, 4, side), keras(f"Conv{d}D", 4), d),
        f"conv{d}d-groups": image(lambda: conv(4, 6, side, groups=2), keras(f"Conv{d}D", 6, groups=2), d),
        f"conv{d}d-no-bias": image(
            lambda: conv(4, 5, side, bias=False), keras(f"Conv{d}D", 5, use_bias=False), d
        ),
        f"conv-transpose{d}d": image(
            lambda: back(4, 5, side, stride=2), keras(f"Conv{d}DTranspose", 5, strides=2), d
        ),
        f"conv-transpose{d}d-square": image(
            lambda: back(4, 4, side, bias=False), keras(f"Conv{d}DTranspose", 4, use_bias=False), d
        ),
    }
    if d < 3:  # neither Keras has one of three
        found |= {
            f"depthwise{d}d": image(lambda: conv(4, 4, side, groups=4), keras(f"DepthwiseConv{d}D"), d),
            f"depthwise{d}d-multiplied": image(
                lambda: conv(4, 12, side, groups=4), keras(f"DepthwiseConv{d}D", depth_multiplier=3), d
            ),
        }
    return found


def normalizations(dimensions: int) -> dict[str, Twin]:
    d = dimensions
    instance = getattr(nn, f"InstanceNorm{d}d")
    return {
        f"batch-norm{d}d": image(
            lambda: getattr(nn, f"BatchNorm{d}d")(4, eps=1e-3, momentum=0.01),
            lambda kl: kl.BatchNormalization(),
            d,
        ),
        f"group-norm{d}d": image(
            lambda: nn.GroupNorm(2, 4), lambda kl: kl.GroupNormalization(2, epsilon=1e-5), d
        ),
        f"instance-norm{d}d": image(
            lambda: instance(4, affine=True), lambda kl: kl.GroupNormalization(-1, epsilon=1e-5), d
        ),
    }


def prelu(dimensions: int) -> dict[str, Twin]:
    d, shared = dimensions, tuple(range(1, dimensions + 1))
    return {
        f"prelu{d}d": image(lambda: nn.PReLU(4), lambda kl: kl.PReLU(shared_axes=shared), d),
        f"prelu{d}d-one": image(lambda: nn.PReLU(), lambda kl: kl.PReLU(shared_axes=(*shared, d + 1)), d),
    }


TWINS: dict[str, Twin] = {
    "dense": twin(lambda: nn.Linear(4, 5), lambda kl: kl.Dense(5), 4),
    "dense-square": twin(lambda: nn.Linear(4, 4), lambda kl: kl.Dense(4), 6, 4),
    "dense-square-no-bias": twin(
        lambda: nn.Linear(4, 4, bias=False), lambda kl: kl.Dense(4, use_bias=False), 4
    ),
    "embedding": Twin(
        torch=lambda: Tokens(nn.Embedding(7, 4)),
        keras=keras_tokens(lambda k: k.layers.Embedding(7, 4)),
        shape=(3, 5),
    ),
    "embedding-square": Twin(
        torch=lambda: Tokens(nn.Embedding(5, 5)),
        keras=keras_tokens(lambda k: k.layers.Embedding(5, 5)),
        shape=(3, 5),
    ),
    "reversible-tied": reversible(tied=True),
    "reversible": reversible(tied=False),
    "einsum": einsum("abc,cd->abd", "d", 4, 6),
    "einsum-square": einsum("...x,xy->...y", "y", 4, 4),
    "einsum-transposed": einsum("abc,dc->abd", None, 4, 4),
    "einsum-heads": heads(),
    "layer-norm": twin(lambda: nn.LayerNorm(4), lambda kl: kl.LayerNormalization(epsilon=1e-5), 6, 4),
    "layer-norm-two-axes": twin(
        lambda: nn.LayerNorm((6, 4)), lambda kl: kl.LayerNormalization((1, 2), epsilon=1e-5), 6, 4
    ),
    "layer-norm-square": twin(
        lambda: nn.LayerNorm((4, 4)), lambda kl: kl.LayerNormalization((1, 2), epsilon=1e-5), 4, 4
    ),
    "rms-norm": twin(lambda: nn.RMSNorm(4, eps=1e-6), lambda kl: kl.RMSNormalization(epsilon=1e-6), 6, 4),
    "batch-norm": twin(
        lambda: nn.BatchNorm1d(4, eps=1e-3, momentum=0.01), lambda kl: kl.BatchNormalization(), 4
    ),
    "prelu": twin(lambda: nn.PReLU(4), lambda kl: kl.PReLU(), 4),
}
for dimensions in IMAGE:
    TWINS |= convolutions(dimensions) | normalizations(dimensions) | prelu(dimensions)

KERAS_3_ONLY = {"rms-norm", "reversible", "reversible-tied"}
CASES = [
    pytest.param(name, kind, marks=() if kind == "keras3" else pytest.mark.slow, id=f"{name}-{kind}")
    for name in TWINS
    for kind in BOTH
    if kind == "keras3" or name not in KERAS_3_ONLY
]
each = pytest.mark.parametrize(("name", "kind"), CASES)


def random_state(model: Any, seed: int) -> Any:
    """The model with all its parameters and statistics random."""
    rng = np.random.default_rng(seed)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point():
                tensor.copy_(torch.from_numpy(value(name, tuple(tensor.shape), rng)))
    return model


def random_variables(model: Any, seed: int) -> Any:
    rng = np.random.default_rng(seed)
    for variable in model.weights:
        variable.assign(value(variable.name, tuple(variable.shape), rng))
    return model


def value(name: str, shape: tuple[int, ...], rng: np.random.Generator) -> Any:
    return rng.uniform(0.5, 1.5, shape) if "var" in name else 0.5 * rng.standard_normal(shape)


@each
def test_outputs_and_slots_cross_both_ways(name: str, kind: str) -> None:
    it = TWINS[name]
    ours, theirs = random_state(it.torch(), 1), random_variables(it.keras(framework(kind)), 2)
    optimizer, adam = torch_adamw(ours), keras_adamw(kind, theirs)
    ours.train()
    train_torch(it, ours, optimizer, 2)
    ours.eval()
    assert apart(it, ours, theirs) > 1e-2
    ckptconv.keras.restore(ckptconv.pytorch.capture(ours, optimizer), theirs, adam)
    assert apart(it, ours, theirs) < 1e-5
    again = random_state(it.torch(), 3)
    other = torch_adamw(again)
    ckptconv.pytorch.restore(ckptconv.keras.capture(theirs, adam), again, other)
    again.eval()
    for (key, before), after in zip(ours.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(before, after) or key.endswith("num_batches_tracked")
    for mine, its in zip(ours.parameters(), again.parameters(), strict=True):
        for slot in ("exp_avg", "exp_avg_sq", "step"):
            assert optimizer.state[mine][slot].count_nonzero()
            assert torch.equal(optimizer.state[mine][slot], other.state[its][slot])
    train_keras(it, theirs, adam, 2, seed=9)
    again.train()
    train_torch(it, again, other, 2, seed=9)
    for key, parameter in again.named_parameters():
        moved = (parameter - ours.get_parameter(key)).abs().max()
        assert moved > 1e-3
    ckptconv.pytorch.restore(ckptconv.keras.capture(theirs, adam), ours, optimizer)
    for key, parameter in again.named_parameters():
        torch.testing.assert_close(parameter, ours.get_parameter(key), rtol=1e-4, atol=1e-5, msg=key)


@pytest.mark.slow
@each
def test_a_file_of_the_model_tells_as_much(name: str, kind: str, tmp_path: Path) -> None:
    """What a `.keras` file declares by its config."""
    it = TWINS[name]
    ours, theirs = random_state(it.torch(), 1), random_variables(it.keras(framework(kind)), 2)
    theirs.save(tmp_path / "model.keras")
    ckptconv.pytorch.restore(tmp_path / "model.keras", ours)
    ours.eval()
    assert apart(it, ours, theirs) < 1e-5


REFUSED: dict[str, tuple[Twin, str]] = {
    "a slope for each position": (
        image(lambda: nn.PReLU(4), lambda kl: kl.PReLU(), 2),
        "shape-mismatch",
    ),
    "one slope and many": (
        image(lambda: nn.PReLU(), lambda kl: kl.PReLU(shared_axes=(1, 2)), 2),
        "shape-mismatch",
    ),
    "many slopes and one": (
        image(lambda: nn.PReLU(4), lambda kl: kl.PReLU(shared_axes=(1, 2, 3)), 2),
        "shape-mismatch",
    ),
    "statistics of instances": (
        image(
            lambda: nn.InstanceNorm2d(4, affine=True, track_running_stats=True),
            lambda kl: kl.GroupNormalization(-1),
            2,
        ),
        "form-mismatch",
    ),
    "statistics of instances and of batches": (
        image(
            lambda: nn.InstanceNorm2d(4, affine=True, track_running_stats=True),
            lambda kl: kl.BatchNormalization(),
            2,
        ),
        "form-mismatch",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_layers_that_compute_something_else_are_refused(name: str) -> None:
    it, code = REFUSED[name]
    ours, theirs = random_state(it.torch(), 1), random_variables(it.keras(framework("keras3")), 2)
    before = theirs.get_weights()
    with pytest.raises(ckptconv.CkptError) as caught:
        ckptconv.keras.restore(ckptconv.pytorch.capture(ours), theirs)
    assert caught.value.problems[0].code == code
    assert all(map(np.array_equal, before, theirs.get_weights()))
    with pytest.raises(ckptconv.CkptError) as caught:
        ckptconv.pytorch.restore(ckptconv.keras.capture(theirs), ours)
    assert caught.value.problems[0].code == code
