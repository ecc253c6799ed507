"""`compare_outputs`: equal models are equal, and where two part the layer at fault is named, no later one."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("tensorflow")
pytest.importorskip("tf_keras")

from torch import nn  # noqa: E402

import ckptconv  # noqa: E402
from ckptconv.errors import CkptError  # noqa: E402
from tests.oracle.test_compounds import TWINS, built  # noqa: E402
from tests.support.twins import framework  # noqa: E402

KINDS = ("keras3", "tf_keras")


class Net(nn.Module):
    """Convolutions, three batch norms, a pooling and a flatten before two dense layers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.conv2, self.norm2 = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.conv3, self.norm3 = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.relu = nn.ReLU(inplace=True)
        self.fc1, self.fc2 = nn.Linear(4 * 3 * 4, 8), nn.Linear(8, 3)

    def forward(self, x: Any) -> Any:
        for conv, norm in (
            (self.conv1, self.norm1),
            (self.conv2, self.norm2),
            (self.conv3, self.norm3),
        ):
            x = self.relu(norm(conv(x)))
        x = nn.functional.max_pool2d(x, 2)
        return self.fc2(torch.relu(self.fc1(x.flatten(1))))


def keras_net(kind: str, *, epsilon: float = 1e-5, activation: str = "relu") -> Any:
    """The same in Keras; the arguments are those of the middle block."""
    keras = framework(kind)
    kl = keras.layers
    x = inputs = keras.Input((6, 8, 2))
    for number, (size, bias) in enumerate(((3, True), (3, False), (1, True)), 1):
        middle = number == 2
        x = kl.Conv2D(4, size, padding="same", use_bias=bias, name=f"conv{number}")(x)
        x = kl.BatchNormalization(epsilon=epsilon if middle else 1e-5, name=f"norm{number}")(x)
        x = kl.Activation(activation if middle else "relu")(x)
    x = kl.Flatten()(kl.MaxPooling2D(2)(x))
    return keras.Model(inputs, kl.Dense(3, name="fc2")(kl.Dense(8, activation="relu", name="fc1")(x)))


def random_net(seed: int = 0) -> Net:
    torch.manual_seed(seed)
    model = Net()
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.is_floating_point():
                tensor.copy_(torch.rand_like(tensor) + 0.1)
    return model


IMAGES = np.random.default_rng(5).standard_normal((3, 2, 6, 8)).astype(np.float32)


@pytest.fixture(scope="module")
def net() -> Net:
    return random_net()


@pytest.mark.parametrize("kind", KINDS)
def test_equal_models_are_equal_in_every_layer(net: Net, kind: str) -> None:
    keras_model = keras_net(kind)
    report = restored(net, keras_model)
    modes = {name: module.training for name, module in net.named_modules()}
    for told in (None, report):
        found = ckptconv.compare_outputs(net, keras_model, told, IMAGES)
        assert found.equal, str(found)
        assert [row.torch for row in found.rows] == [
            "conv1", "norm1", "conv2", "norm2", "conv3", "norm3", "fc1", "fc2", "",
        ]  # fmt: skip
        assert not any(row.untold for row in found.rows)
        assert found.rows[0].shape == (3, 4, 6, 8)
        assert found.rows[0].keras_shape == (3, 6, 8, 4)
        assert 0 < max(row.max_rel for row in found.rows) < 1e-5
    assert {name: module.training for name, module in net.named_modules()} == modes
    assert not any("call" in vars(layer) for layer in keras_model.layers)


def test_a_plan_pairs_what_its_report_does(net: Net, tmp_path: Any) -> None:
    """Also of a compiled model, whose optimizer has no variables yet."""
    keras_model = keras_net("keras3")
    restored(net, keras_model)
    keras_model.compile("adam", "mse")
    report = ckptconv.convert(
        ckptconv.pytorch.capture(net),
        tmp_path / "ckpt-1",
        template=ckptconv.keras.describe(keras_net("keras3"), inputs=np.zeros((1, 6, 8, 2), np.float32)),
        dry_run=True,
    )
    found = ckptconv.compare_outputs(net, keras_model, report.plan, IMAGES)
    assert found.equal, str(found)
    assert len(found.rows) == 9


def restored(net: Net, keras_model: Any) -> Any:
    spec = ckptconv.pytorch.describe(net, inputs=torch.zeros(1, 2, 6, 8))
    return ckptconv.keras.restore(ckptconv.pytorch.capture(net), keras_model, source_spec=spec)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("fault", "where"), [({"epsilon": 1e-2}, "norm2"), ({"activation": "sigmoid"}, "conv3")]
)
def test_the_layer_at_fault_is_the_first_that_differs(net: Net, kind: str, fault: Any, where: str) -> None:
    keras_model = keras_net(kind, **fault)
    report = restored(net, keras_model)
    found = ckptconv.compare_outputs(net, keras_model, report, IMAGES)
    assert not found.equal
    assert found.first is not None
    assert found.first.torch == where
    assert where in found.first.keras
    assert f"{where} of torch" in str(found)


def test_rows_of_a_dense_layer_in_another_order_are_found_at_it(net: Net) -> None:
    keras_model = keras_net("keras3")
    report = restored(net, keras_model)
    layer = keras_model.get_layer("fc1")
    kernel, bias = layer.get_weights()
    layer.set_weights([kernel.reshape(3, 4, 4, 8).transpose(2, 0, 1, 3).reshape(48, 8), bias])
    found = ckptconv.compare_outputs(net, keras_model, report, IMAGES)
    assert found.first is not None
    assert found.first.torch == "fc1"


def test_a_report_of_the_other_direction_pairs_the_same_layers(net: Net) -> None:
    keras_model, copy = keras_net("keras3"), random_net(1)
    report = ckptconv.pytorch.restore(
        ckptconv.keras.capture(keras_model),
        copy,
        source_spec=ckptconv.keras.describe(keras_model, inputs=np.zeros((1, 6, 8, 2), np.float32)),
    )
    found = ckptconv.compare_outputs(copy, keras_model, report, IMAGES)
    assert found.equal, str(found)
    assert len(found.rows) == 9


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", TWINS)
def test_layers_that_are_several_on_the_other_side(name: str, kind: str) -> None:
    twin, ours, theirs = built(name, kind)
    report = ckptconv.keras.restore(ckptconv.pytorch.capture(ours), theirs)
    x = twin.inputs(3)
    found = ckptconv.compare_outputs(ours, theirs, report, np.moveaxis(x, -1, 1) if twin.channels else x)
    assert found.equal, str(found)
    assert len([row for row in found.rows if not row.untold]) > 1


@pytest.mark.parametrize(("name", "where"), [("attention", "attention"), ("split-attention", "query")])
def test_a_query_in_the_place_of_a_key(name: str, where: str) -> None:
    twin, ours, theirs = built(name, "keras3")
    report = ckptconv.keras.restore(ckptconv.pytorch.capture(ours), theirs)
    (layer,) = (layer for layer in theirs.layers if layer.weights)
    query, key = layer.query_dense.get_weights(), layer.key_dense.get_weights()
    layer.query_dense.set_weights(key)
    layer.key_dense.set_weights(query)
    found = ckptconv.compare_outputs(ours, theirs, report, twin.inputs(3))
    assert found.first is not None
    assert found.first.torch == where


class Tagger(nn.Module):
    """Time before the batch, as nn.LSTM has it where nothing is said."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.rnn, self.head = nn.Embedding(9, 5), nn.LSTM(5, 6), nn.Linear(6, 4)

    def forward(self, tokens: Any) -> Any:
        return self.head(self.rnn(self.embed(tokens))[0])


def keras_tagger(kind: str) -> Any:
    keras = framework(kind)
    kl = keras.layers
    inputs = keras.Input((None,), dtype="int32")
    return keras.Model(inputs, kl.Dense(4)(kl.LSTM(6, return_sequences=True)(kl.Embedding(9, 5)(inputs))))


def test_time_before_the_batch_has_to_be_told() -> None:
    torch.manual_seed(0)
    ours, theirs = Tagger(), keras_tagger("keras3")
    report = ckptconv.keras.restore(ckptconv.pytorch.capture(ours), theirs)
    tokens = np.random.default_rng(0).integers(0, 9, (7, 3))
    with pytest.raises(CkptError) as caught:
        ckptconv.compare_outputs(ours, theirs, report, tokens)
    assert [(p.code, p.loc) for p in caught.value.problems] == [("layout-ambiguous", ("inputs", "0"))]
    found = ckptconv.compare_outputs(ours, theirs, report, tokens, axes=("time batch", "batch time"))
    assert found.equal, str(found)
    assert [row.torch for row in found.rows] == ["embed", "rnn", "head", ""]
    square = ckptconv.compare_outputs(ours, theirs, report, tokens[:3], axes=("lb", "bl"))
    assert not square.equal
    assert [bool(row.untold) for row in square.rows] == [True, False, True, True]


def test_layers_may_be_paired_by_a_mapping_file(tmp_path: Any) -> None:
    """Two layers of one size that nothing else tells apart, in another order on the other side."""
    keras = framework("keras3")
    first, second = keras.layers.Dense(4, name="first"), keras.layers.Dense(4, name="second")
    inputs = keras.Input((4,))
    theirs = keras.Model(inputs, second(keras.ops.tanh(first(inputs))))

    class Backwards(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.after, self.before = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Any) -> Any:
            return self.after(torch.tanh(self.before(x)))

    ours = Backwards()
    names = {"before": "first", "after": "second"}
    rules = [
        {"left": f"{mine}.{leaf}", "right": f"{its}/{variable}"}
        for mine, its in names.items()
        for leaf, variable in (("weight", "kernel"), ("bias", "bias"))
    ]
    mapping = {"schema": "ckptconv/mapping", "schema_version": "1.0.0", "rules": rules}
    file = tmp_path / "names.json"
    file.write_text(json.dumps(mapping), encoding="utf-8")
    for mine, its in names.items():
        module, layer = ours.get_submodule(mine), theirs.get_layer(its)
        layer.set_weights([module.weight.detach().numpy().T, module.bias.detach().numpy()])
    x = np.random.default_rng(0).standard_normal((3, 4)).astype(np.float32)
    for told in (mapping, file):
        found = ckptconv.compare_outputs(ours, theirs, told, x)
        assert found.equal, str(found)
        assert [(row.torch, row.keras) for row in found.rows] == [
            ("before", "first"),
            ("after", "second"),
            ("", ""),
        ]


def test_an_image_that_a_function_takes_first_has_to_be_told() -> None:
    class Moved(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(2, 3, 2)

        def forward(self, x: Any) -> Any:
            return self.conv(x.permute(0, 3, 1, 2))

    keras = framework("keras3")
    theirs = keras.Sequential([keras.Input((5, 4, 2)), keras.layers.Conv2D(3, 2)])
    ours = Moved()
    ckptconv.keras.restore(ckptconv.pytorch.capture(ours), theirs)
    x = np.random.default_rng(0).standard_normal((2, 5, 4, 2)).astype(np.float32)
    with pytest.raises(CkptError) as caught:
        ckptconv.compare_outputs(ours, theirs, inputs=x)
    assert [p.code for p in caught.value.problems] == ["layout-ambiguous"]
    assert ckptconv.compare_outputs(ours, theirs, inputs=x, axes=("nhwc", "nhwc")).equal
    with pytest.raises(CkptError) as caught:
        ckptconv.compare_outputs(ours, theirs, inputs=x, axes=("nhwc", "nhw"))
    assert [(p.code, p.loc) for p in caught.value.problems] == [("usage", ("inputs", "0"))]


def test_outputs_of_other_shapes_differ() -> None:
    keras = framework("keras3")
    ours = nn.Sequential(
        nn.Conv2d(2, 3, 3, padding=1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 2)
    )
    theirs = keras.Sequential(
        [
            keras.Input((6, 8, 2)),
            keras.layers.Conv2D(3, 3),
            keras.layers.GlobalAveragePooling2D(),
            keras.layers.Dense(2),
        ]
    )
    ckptconv.keras.restore(ckptconv.pytorch.capture(ours), theirs, allow=["flatten-layout"])
    found = ckptconv.compare_outputs(ours, theirs, inputs=IMAGES)
    assert found.first is not None
    assert (found.first.torch, found.first.max_abs) == ("0", np.inf)
    assert (found.first.shape, found.first.keras_shape) == ((3, 3, 6, 8), (3, 4, 6, 3))


def test_a_layer_that_is_used_twice_is_compared_at_every_call() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x: Any, y: Any) -> Any:
            return self.fc(self.fc(x)) + y

    keras = framework("keras3")
    dense = keras.layers.Dense(4)
    x, y = keras.Input((4,)), keras.Input((4,))
    theirs = keras.Model([x, y], dense(dense(x)) + y)
    ours = Twice()
    ckptconv.keras.restore(
        ckptconv.pytorch.capture(ours), theirs, source_spec=ckptconv.pytorch.describe(ours)
    )
    arrays = tuple(np.random.default_rng(0).standard_normal((2, 3, 4)).astype(np.float32))
    found = ckptconv.compare_outputs(ours, theirs, None, arrays)
    assert found.equal, str(found)
    assert [(row.torch, row.call) for row in found.rows] == [("fc", 0), ("fc", 1), ("", 0)]


def test_what_cannot_be_compared_is_an_error(net: Net) -> None:
    keras_model = keras_net("keras3")
    report = restored(net, keras_model)
    twin, ours, theirs = built("gru", "keras3")
    for call, code in (
        (lambda: ckptconv.compare_outputs(ours, theirs, report, twin.inputs(0)), "mapping-invalid"),
        (lambda: ckptconv.compare_outputs(net, keras_model, report), "usage"),
        (lambda: ckptconv.compare_outputs(net, keras_model, report, IMAGES[:, :1]), "usage"),
        (lambda: ckptconv.compare_outputs(net, theirs, None, IMAGES, axes=("nchw", "nhwc")), "usage"),
    ):
        with pytest.raises(CkptError) as caught:
            call()
        assert [p.code for p in caught.value.problems] == [code]
    assert not any("call" in vars(layer) for layer in keras_model.layers)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in net.modules())
