"""What a run of a live model tells: the same of a model in PyTorch and in Keras, however it is written."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("tensorflow")
pytest.importorskip("tf_keras")

from torch import nn  # noqa: E402

import ckptconv  # noqa: E402
from ckptconv.document import Checkpoint  # noqa: E402
from tests.support.twins import adam, framework  # noqa: E402


class Branches(nn.Module):
    """A shortcut, a concatenation, a normalization and a module that is used twice; functions between."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(8 * 6, 3)
        self.again = nn.Conv2d(4, 4, 1)
        self.norm = nn.LayerNorm(4)
        self.left, self.right = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)
        self.stem = nn.Conv2d(2, 4, 2)
        self.scale = nn.BatchNorm2d(8, affine=False)

    def forward(self, x: Any) -> Any:
        x = torch.relu(self.stem(x))
        normed = self.norm(x.movedim(1, -1)).movedim(-1, 1)
        x = x + normed
        both = torch.cat([self.left(x), self.again(self.again(self.right(x))).relu_()], 1)
        return self.head(self.scale(both).flatten(1))


def keras_model(kind: str, *, subclassed: bool) -> Any:
    keras = framework(kind)
    kl = keras.layers
    parts = {
        "stem": kl.Conv2D(4, 2, name="stem"),
        "norm": kl.LayerNormalization(name="norm"),
        "left": kl.Conv2D(4, 1, name="left"),
        "right": kl.Conv2D(4, 1, name="right"),
        "again": kl.Conv2D(4, 1, name="again"),
        "scale": kl.BatchNormalization(center=False, scale=False, name="scale"),
        "head": kl.Dense(3, name="head"),
    }
    relu, joined, flat, added = kl.ReLU(), kl.Concatenate(), kl.Flatten(), kl.Add()

    def call(p: Mapping[str, Any], x: Any) -> Any:
        x = relu(p["stem"](x))
        x = added([x, p["norm"](x)])
        both = joined([p["left"](x), relu(p["again"](p["again"](p["right"](x))))])
        return p["head"](flat(p["scale"](both)))

    if not subclassed:
        inputs = keras.Input((3, 4, 2))
        return keras.Model(inputs, call(parts, inputs))

    class Mine(keras.Model):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            for name, part in parts.items():
                setattr(self, name, part)

        def call(self, x: Any) -> Any:
            return call({name: getattr(self, name) for name in parts}, x)

    model = Mine()
    model(np.zeros((1, 3, 4, 2), np.float32))
    return model


def named(checkpoint: Checkpoint) -> dict[str, set[str]]:
    """The flow of modules as sets: branches are used in any order."""
    found: dict[str, set[str]] = {}
    for site in checkpoint.flow:
        found.setdefault(module_of(site.param), set()).update(map(module_of, site.after))
    return {module: after - {module} for module, after in found.items()}


def module_of(name: str) -> str:
    return name[: max(name.rfind("."), name.rfind("/"), 0)]


EXPECTED = {
    "stem": set(),
    "norm": {"stem"},
    "left": {"norm"},
    "right": {"norm"},
    "again": {"right"},
    "scale": {"left", "again"},
    "head": {"scale"},
}


def test_pytorch() -> None:
    model = Branches()
    model.stem.eval()
    described = ckptconv.pytorch.describe(model, inputs=torch.zeros(2, 2, 3, 4))
    assert named(described) == EXPECTED
    assert [module_of(site.param) for site in described.flow][:4] == ["stem", "stem", "norm", "norm"]
    assert described.params["head.weight"].axes == ("out", "in*h=2*w=3")
    assert described.params["again.weight"].axes == ("out", "in", "h", "w")
    assert model.training
    assert not model.stem.training
    assert ckptconv.pytorch.describe(model).flow == ()


def test_pytorch_takes_arguments_by_place_and_by_name() -> None:
    model = nn.Bilinear(2, 3, 4)
    x, y = torch.zeros(1, 2), torch.zeros(1, 3)
    for inputs in ((x, y), {"input1": x, "input2": y}):
        assert named(ckptconv.pytorch.describe(model, inputs=inputs)) == {"": set()}


@pytest.mark.parametrize("kind", ["keras3", "tf_keras"])
@pytest.mark.parametrize("subclassed", [True, False])
def test_keras(kind: str, subclassed: bool) -> None:
    model = keras_model(kind, subclassed=subclassed)
    optimizer = adam(kind)
    optimizer.build(model.trainable_variables)
    described = ckptconv.keras.describe(model, optimizer, inputs=np.zeros((2, 3, 4, 2), np.float32))
    assert named(described) == EXPECTED
    assert described.params["head/kernel"].axes == ("h=2*w=3*in", "out")


def test_channels_moved_before_flattening() -> None:
    """The order of the rows follows from the run, not from the framework."""

    class Moved(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm, self.fc = nn.Conv2d(2, 4, 2), nn.BatchNorm1d(24), nn.Linear(24, 24)
            self.last = nn.Linear(24, 5)

        def forward(self, x: Any) -> Any:
            x = torch.relu(self.conv(x)).permute(0, 2, 3, 1).reshape(len(x), -1)
            return self.last(self.fc(self.norm(x)))

    params = ckptconv.pytorch.describe(Moved(), inputs=torch.zeros(2, 2, 3, 4)).params
    assert params["norm.running_mean"].axes == ("h=2*w=3*features",)
    assert params["fc.weight"].axes == ("out", "h=2*w=3*in")
    assert params["fc.bias"].axes == ("out",)
    assert params["last.weight"].axes == ("out", "in")


def test_a_skeleton_keeps_the_flow(tmp_path: Any) -> None:
    described = ckptconv.pytorch.describe(Branches(), inputs=torch.zeros(2, 2, 3, 4))
    ckptconv.write_skeleton(described, tmp_path / "spec.json")
    assert ckptconv.read_skeleton(tmp_path / "spec.json").flow == described.flow


class Attention(nn.Module):
    """Four linear layers, whose names tell nothing, and one of the ways to write attention."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way
        self.a, self.b, self.c, self.d = (nn.Linear(8, 8) for _ in range(4))

    def forward(self, x: Any) -> Any:
        q, k, v = (layer(x).unflatten(-1, (2, 4)).transpose(1, 2) for layer in (self.c, self.a, self.b))
        if self.way == "one operation":
            out = nn.functional.scaled_dot_product_attention(q, k, v)
        elif self.way == "products":
            out = (q @ k.mT / 2).masked_fill(torch.ones(7, 7).triu(1) > 0, -1e9).softmax(-1) @ v
        elif self.way == "keys first":
            out = v.mT @ (k @ q.mT / 2).softmax(-2)
            out = out.mT
        else:
            scores = torch.einsum("bhqd,bhkd->bqhk", q, k).softmax(-1)
            out = torch.einsum("bqhk,bhkd->bhqd", scores, v)
        return self.d(out.transpose(1, 2).flatten(2))


ATTENDED = {"c.weight": "query", "a.weight": "key", "b.weight": "value", "d.weight": ""}


@pytest.mark.parametrize("way", ["one operation", "products", "keys first", "sums"])
def test_what_is_done_with_the_projections_of_an_attention(way: str) -> None:
    described = ckptconv.pytorch.describe(Attention(way), inputs=torch.zeros(2, 7, 8))
    parts = {site.param: site.part for site in described.flow}
    assert {name: parts[name] for name in ATTENDED} == ATTENDED


@pytest.mark.parametrize("kind", ["keras3", "tf_keras"])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_keras_attention_is_seen_by_what_it_does(kind: str, dropout: float) -> None:
    keras = framework(kind)
    inputs = keras.Input((7, 8))
    model = keras.Model(inputs, keras.layers.MultiHeadAttention(2, 4, dropout=dropout)(inputs, inputs))
    described = ckptconv.keras.describe(model, inputs=np.zeros((2, 7, 8), np.float32))
    parts = {site.param.rpartition("/")[0].rpartition("/")[2]: site.part for site in described.flow}
    names = {name.strip("_").partition("_")[0]: part for name, part in parts.items()}
    assert names == {"query": "query", "key": "key", "value": "value", "output": ""}


class Fused(nn.Module):
    """One linear layer for all three, in an order of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.d = nn.Linear(8, 24), nn.Linear(8, 8)

    def forward(self, x: Any) -> Any:
        k, q, v = (one.unflatten(-1, (2, 4)).transpose(1, 2) for one in self.a(x).relu().split(8, dim=-1))
        return self.d(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def test_the_parts_of_a_fused_projection_are_told_in_their_order() -> None:
    described = ckptconv.pytorch.describe(Fused(), inputs=torch.zeros(2, 7, 8))
    parts = {site.param: site.part for site in described.flow}
    assert parts["a.weight"] == parts["a.bias"] == "key,query,value"
    assert parts["d.weight"] == ""


def test_the_parts_of_a_fused_projection_in_keras() -> None:
    keras = framework("keras3")
    inputs = keras.Input((7, 8))
    q, v, k = keras.ops.split(keras.layers.Dense(24, name="a")(inputs), 3, axis=-1)
    weights = keras.ops.softmax(keras.ops.matmul(q, keras.ops.transpose(k, (0, 2, 1))))
    model = keras.Model(inputs, keras.ops.matmul(weights, v))
    described = ckptconv.keras.describe(model, inputs=np.zeros((2, 7, 8), np.float32))
    assert {site.param: site.part for site in described.flow}["a/bias"] == "query,value,key"


def test_unequal_parts_tell_nothing() -> None:
    class Grouped(Fused):
        def forward(self, x: Any) -> Any:
            q, k, v = self.a(x).split((8, 12, 4), dim=-1)
            return self.d((q @ k[..., :8].mT).softmax(-1) @ v.repeat(1, 1, 2))

    described = ckptconv.pytorch.describe(Grouped(), inputs=torch.zeros(2, 7, 8))
    assert {site.part for site in described.flow} == {""}


def test_a_fused_projection_that_is_not_split_is_none_of_the_three() -> None:
    model = nn.MultiheadAttention(8, 2, batch_first=True)
    x = torch.zeros(2, 7, 8)
    described = ckptconv.pytorch.describe(model, inputs=(x, x, x))
    assert {site.part for site in described.flow} == {""}
