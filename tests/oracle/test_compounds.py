"""Layers whose variables are one here and several there: recurrent cells, attention, separable convolutions.

Outputs are equal in both directions, the optimizer's state goes with them, and what goes there and back is
bit for bit what it was, except where two biases have become one.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("tensorflow")
pytest.importorskip("tf_keras")

from torch import nn  # noqa: E402

import ckptconv  # noqa: E402
from ckptconv.adapters.pytorch import describe  # noqa: E402
from ckptconv.rendering.plan import expression  # noqa: E402
from ckptconv.schema import report_to_json, schema_problems  # noqa: E402
from tests.support.live_twins import (  # noqa: E402
    Twin,
    apart,
    keras_adamw,
    random_keras,
    random_torch,
    torch_adamw,
    train_keras,
    train_torch,
)
from tests.support.twins import framework  # noqa: E402


class Recurrent(nn.Module):
    """A recurrent module that gives its outputs alone."""

    def __init__(self, cls: Any, inputs: int, units: int, **options: Any) -> None:
        super().__init__()
        self.rnn = cls(inputs, units, batch_first=True, **options)

    def forward(self, x: Any) -> Any:
        return self.rnn(x)[0]


class Attention(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True, **options)

    def forward(self, x: Any) -> Any:
        return self.attention(x, x, x, need_weights=False)[0]


class SplitAttention(nn.Module):
    """Attention as most write it by hand: a linear layer per projection."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value, self.output = (nn.Linear(8, 8) for _ in range(4))

    def forward(self, x: Any) -> Any:
        q, k, v = (
            layer(x).unflatten(-1, (2, 4)).transpose(1, 2) for layer in (self.query, self.key, self.value)
        )
        out = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.output(out.transpose(1, 2).flatten(2))


def recurrent(
    cls: str, *, layers: int = 1, bidirectional: bool = False, units: int = 6, **options: Any
) -> Twin:
    name = {"RNN": "SimpleRNN"}.get(cls, cls)

    def keras(k: Any) -> Any:
        x = inputs = k.Input((7, 5))
        for _ in range(layers):
            layer = getattr(k.layers, name)(units, return_sequences=True, **options)
            x = (k.layers.Bidirectional(layer) if bidirectional else layer)(x)
        return k.Model(inputs, x)

    def torch_model() -> Any:
        return Recurrent(getattr(nn, cls), 5, units, num_layers=layers, bidirectional=bidirectional)

    return Twin(torch=torch_model, keras=keras, shape=(4, 7, 5))


def attention(torch_model: Any, **options: Any) -> Twin:
    def keras(k: Any) -> Any:
        inputs = k.Input((7, 8))
        return k.Model(inputs, k.layers.MultiHeadAttention(2, 4, **options)(inputs, inputs))

    return Twin(torch=torch_model, keras=keras, shape=(4, 7, 8))


def separable(dimensions: int, multiplier: int) -> Twin:
    cls = (nn.Conv1d, nn.Conv2d)[dimensions - 1]
    size = (6,) * dimensions

    def keras(k: Any) -> Any:
        layer = (k.layers.SeparableConv1D, k.layers.SeparableConv2D)[dimensions - 1]
        return k.Sequential([k.Input((*size, 4)), layer(5, 3, depth_multiplier=multiplier)])

    def torch_model() -> Any:
        deep = cls(4, 4 * multiplier, 3, groups=4, bias=False)
        return nn.Sequential(deep, cls(4 * multiplier, 5, 1))

    return Twin(torch=torch_model, keras=keras, shape=(4, *size, 4), channels=True)


TWO_BIASES = {
    "lstm": recurrent("LSTM"),
    "square-lstm": recurrent("LSTM", units=5),
    "stacked-bidirectional-lstm": recurrent("LSTM", layers=2, bidirectional=True),
    "rnn": recurrent("RNN"),
    "square-bidirectional-rnn": recurrent("RNN", bidirectional=True, units=5),
}
EXACT = {
    "gru": recurrent("GRU"),
    "square-gru": recurrent("GRU", units=5),
    "stacked-bidirectional-gru": recurrent("GRU", layers=2, bidirectional=True),
    "attention": attention(Attention),
    "attention-without-bias": attention(lambda: Attention(bias=False), use_bias=False),
    "split-attention": attention(SplitAttention),
    "separable-1d": separable(1, 1),
    "separable-2d": separable(2, 3),
}
TWINS = {**TWO_BIASES, **EXACT}
BOTH = ("keras3", "tf_keras")


def built(name: str, kind: str) -> tuple[Twin, Any, Any]:
    twin = TWINS[name]
    return twin, random_torch(twin.torch(), 1), random_keras(twin.keras(framework(kind)), 2)


@pytest.mark.parametrize("kind", BOTH)
@pytest.mark.parametrize("name", TWINS)
def test_outputs_are_equal_in_both_directions(name: str, kind: str) -> None:
    twin, ours, theirs = built(name, kind)
    assert apart(twin, ours, theirs) > 0.1
    ckptconv.keras.restore(ckptconv.pytorch.capture(ours), theirs)
    assert apart(twin, ours, theirs) < 1e-5
    random_keras(theirs, 3)
    ckptconv.pytorch.restore(ckptconv.keras.capture(theirs), ours)
    assert apart(twin, ours, theirs) < 1e-5


@pytest.mark.parametrize("name", TWINS)
def test_there_and_back_is_bit_equal(name: str) -> None:
    twin, ours, theirs = built(name, "keras3")
    optimizer = torch_adamw(ours)
    train_torch(twin, ours, optimizer, 3)
    ckptconv.keras.restore(
        ckptconv.pytorch.capture(ours, optimizer), theirs, adam := keras_adamw("keras3", theirs)
    )
    again = random_torch(twin.torch(), 5)
    other = torch_adamw(again)
    ckptconv.pytorch.restore(ckptconv.keras.capture(theirs, adam), again, other)
    before, after = ours.state_dict(), again.state_dict()
    for key in before:
        if name in TWO_BIASES and "bias" in key:
            continue
        assert torch.equal(before[key], after[key]), key
    for key in (key for key in before if name in TWO_BIASES and "bias_ih" in key):
        partner = key.replace("_ih", "_hh")
        assert torch.equal(after[key], before[key] + before[partner])
        assert not after[partner].any()
    for (key, mine), its in zip(ours.named_parameters(), again.parameters(), strict=True):
        for slot in ("exp_avg", "exp_avg_sq", "step"):
            one, two = optimizer.state[mine][slot], other.state[its][slot]
            if "bias_hh" in key:  # both biases have one gradient, which torch adds up in two orders
                torch.testing.assert_close(one, two)
            else:
                assert torch.equal(one, two)


@pytest.mark.slow
@pytest.mark.parametrize("name", [*EXACT, *TWO_BIASES])
def test_a_run_goes_on_as_if_nothing_had_happened(name: str) -> None:
    """Of two biases one is frozen: a run of Keras has but one."""
    twin, ours, theirs = built(name, "keras3")
    ckptconv.pytorch.freeze_recurrent_bias(ours)
    optimizer = torch_adamw(ours)
    train_torch(twin, ours, optimizer, 3)
    adam = keras_adamw("keras3", theirs)
    captured = ckptconv.pytorch.capture(ours, optimizer)
    report = ckptconv.keras.restore(captured, theirs, adam)
    assert not any("biases" in line for line in report.verdicts[0].residuals)
    train_torch(twin, ours, optimizer, 4, seed=50)
    train_keras(twin, theirs, adam, 4, seed=50)
    assert apart(twin, ours, theirs) < 2e-5

    again = ckptconv.pytorch.freeze_recurrent_bias(random_torch(twin.torch(), 7))
    other = torch_adamw(again)
    ckptconv.pytorch.restore(ckptconv.keras.capture(theirs, adam), again, other)
    train_torch(twin, again, other, 4, seed=60)
    train_keras(twin, theirs, adam, 4, seed=60)
    assert apart(twin, again, theirs) < 2e-5


@pytest.mark.parametrize("direction", ["there", "back"])
def test_two_trained_biases_are_said_to_move_otherwise(direction: str) -> None:
    twin, ours, theirs = built("lstm", "keras3")
    optimizer, adam = torch_adamw(ours), keras_adamw("keras3", theirs)
    if direction == "there":
        train_torch(twin, ours, optimizer, 3)
        report = ckptconv.keras.restore(ckptconv.pytorch.capture(ours, optimizer), theirs, adam)
    else:
        train_keras(twin, theirs, adam, 3)
        report = ckptconv.pytorch.restore(ckptconv.keras.capture(theirs, adam), ours, optimizer)
    (verdict,) = report.verdicts
    assert verdict.verdict == "approximate"
    assert any("freeze_recurrent_bias" in line for line in verdict.residuals)
    assert apart(twin, ours, theirs) < 1e-5
    train_torch(twin, ours, optimizer, 4, seed=50)
    train_keras(twin, theirs, adam, 4, seed=50)
    assert apart(twin, ours, theirs) > 1e-3


def test_the_frozen_bias_changes_no_output() -> None:
    for cls in (nn.LSTM, nn.RNN, nn.GRU):
        model = random_torch(cls(5, 6, num_layers=2, bidirectional=True), 1)
        x = torch.randn(7, 3, 5)
        before = model(x)[0]
        assert ckptconv.pytorch.freeze_recurrent_bias(model) is model
        torch.testing.assert_close(model(x)[0], before, rtol=1e-5, atol=1e-6)
        frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
        expected = {name for name, _ in model.named_parameters() if "bias_hh" in name}
        assert frozen == (set() if cls is nn.GRU else expected)


def test_a_ledger_names_the_files_parameters_and_their_parts() -> None:
    _, ours, theirs = built("attention", "keras3")
    report = ckptconv.keras.restore(ckptconv.pytorch.capture(ours), theirs)
    made = {
        entry.target: entry for entry in report.ledger if entry.item == ("param", "attention.in_proj_weight")
    }
    assert [op["start"] for entry in made.values() for op in entry.ops if op["op"] == "slice"] == [0, 8, 16]
    assert {target.rpartition("/")[0].rpartition("/")[2] for target in made} == {
        "query_dense",
        "key_dense",
        "value_dense",
    }
    report = ckptconv.pytorch.restore(ckptconv.keras.capture(theirs), ours)
    joined = [entry for entry in report.ledger if entry.target == "attention.in_proj_weight"]
    assert [(op["op"], op["part"], op["of"]) for entry in joined for op in entry.ops[-1:]] == [
        ("concat", 0, 3),
        ("concat", 1, 3),
        ("concat", 2, 3),
    ]
    assert {entry.item[0] for entry in joined} == {"param"}


class FusedByHand(nn.Module):
    """One linear layer for all projections, keys first: no name and no shape tells which is which."""

    def __init__(self) -> None:
        super().__init__()
        self.mixed, self.last = nn.Linear(8, 24), nn.Linear(8, 8)

    def forward(self, x: Any) -> Any:
        k, q, v = (part.unflatten(-1, (2, 4)).transpose(1, 2) for part in self.mixed(x).chunk(3, -1))
        out = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.last(out.transpose(1, 2).flatten(2))


def test_a_fused_projection_comes_apart_as_its_run_splits_it(tmp_path: Path) -> None:
    """With the state of its optimizer, there and back."""
    twin = attention(FusedByHand)
    ours, theirs = random_torch(twin.torch(), 1), random_keras(twin.keras(framework("keras3")), 2)
    train_torch(twin, ours, optimizer := torch_adamw(ours), 3)
    adam = keras_adamw("keras3", theirs)
    x = twin.inputs()
    here = ckptconv.pytorch.describe(ours, optimizer, inputs=torch.from_numpy(x))
    there = ckptconv.keras.describe(theirs, adam, inputs=x)
    captured = ckptconv.pytorch.capture(ours, optimizer)
    ckptconv.convert(captured, tmp_path / "made", template=there, source_spec=here)
    ckptconv.keras.restore(tmp_path / "made", theirs, adam)
    assert apart(twin, ours, theirs) < 1e-5
    made = ckptconv.keras.capture(theirs, adam)
    ckptconv.convert(made, tmp_path / "back.pt", template=here, source_spec=there)
    back = torch.load(tmp_path / "back.pt", weights_only=True)
    for name, tensor in ours.state_dict().items():
        assert torch.equal(back["model"][name], tensor)
    for state, own in zip(back["optimizer"]["state"].values(), optimizer.state.values(), strict=True):
        assert all(torch.equal(state[slot], own[slot]) for slot in ("exp_avg", "exp_avg_sq", "step"))


@pytest.mark.parametrize("kind", BOTH)
def test_a_gru_that_resets_before_is_refused(kind: str) -> None:
    twin = recurrent("GRU", reset_after=False)
    theirs = twin.keras(framework(kind))
    with pytest.raises(ckptconv.CkptError) as caught:
        ckptconv.keras.restore(ckptconv.pytorch.capture(twin.torch()), theirs)
    assert {p.code for p in caught.value.problems} == {"form-mismatch"}
    with pytest.raises(ckptconv.CkptError) as caught:
        ckptconv.pytorch.restore(ckptconv.keras.capture(theirs), twin.torch())
    assert {p.code for p in caught.value.problems} == {"form-mismatch"}


def test_another_library_is_needed_to_take_anything_apart() -> None:
    twin = TWINS["attention"]
    report = ckptconv.pytorch.restore(ckptconv.pytorch.capture(twin.torch()), twin.torch())
    assert all(entry.fate == "copied" for entry in report.ledger if entry.item[0] == "param")


def test_the_names_of_cells_tell_their_kind() -> None:
    found = describe(TWINS["stacked-bidirectional-gru"].torch()).params
    one = found["rnn.weight_hh_l1_reverse"]
    assert (one.layer, one.role, one.evidence) == ("gru", "recurrent_kernel", "named")
    assert one.axes == ("gate(reset,update,new)*units", "units'")


def test_an_average_of_the_weights_is_summed_as_they_are() -> None:
    """What is made of values is the sum of both, not one of them."""
    from dataclasses import replace

    from ckptconv.catalog.wrappers import AVERAGE
    from ckptconv.compounds import compounds
    from ckptconv.pieces import apart as taken_apart
    from ckptconv.tensor import StoredTensor

    twin, ours, theirs = built("lstm", "keras3")
    train_torch(twin, ours, optimizer := torch_adamw(ours), 1)
    captured = ckptconv.pytorch.capture(ours, optimizer)
    (one,) = captured.optimizers
    averages = {
        name: StoredTensor.of_array(np.full(param.tensor.shape, i + 1, np.float32))
        for i, (name, param) in enumerate(captured.params.items())
    }
    captured = replace(captured, optimizers=(replace(one, slots={**one.slots, AVERAGE: averages}),))
    rewrites, _ = compounds(captured, ckptconv.keras.describe(theirs), ("torch", "keras3"))
    slots = taken_apart(captured, rewrites).optimizers[0].slots
    assert (slots[AVERAGE]["rnn.l0.bias"].read() == 3 + 4).all()
    moment = slots["first_moment"]["rnn.l0.bias"].read()
    np.testing.assert_array_equal(moment, optimizer.state[ours.rnn.bias_ih_l0]["exp_avg"])


@pytest.mark.parametrize(
    ("name", "place", "expected"),
    [
        ("lstm", "cell/bias", "sum(rnn.bias_ih_l0, rnn.bias_hh_l0)"),
        ("gru", "cell/kernel", "transpose(reorder(rnn.weight_ih_l0))"),
        ("gru", "cell/bias", "concat(reorder(rnn.bias_ih_l0), reorder(rnn.bias_hh_l0))"),
        ("attention", "key_dense/kernel", "transpose(attention.in_proj_weight[8:16])"),
        ("attention", "key_dense/bias", "reshape(attention.in_proj_bias[8:16])"),
        ("separable-2d", "pointwise_kernel", "transpose(1.weight)"),
    ],
)
def test_a_plan_says_what_is_taken_apart_and_joined(
    name: str, place: str, expected: str, tmp_path: Path
) -> None:
    _, ours, theirs = built(name, "keras3")
    source, template = ckptconv.pytorch.capture(ours), ckptconv.keras.capture(theirs)
    report = ckptconv.convert(source, tmp_path / "ckpt-1", template=template, dry_run=True)
    assert schema_problems(report_to_json(report), "report") == []
    assert report.plan is not None
    (row,) = [row for row in report.plan.rows if str(row.target[-1]).endswith(place)]
    assert expression(row.producers) == expected
    back = ckptconv.convert(template, tmp_path / "back.pt", template=source, dry_run=True)
    assert schema_problems(report_to_json(back), "report") == []
    assert back.plan is not None
    assert {row.target for row in back.plan.rows} == {address for address, _ in source.tensors()}


@pytest.mark.parametrize("kind", BOTH)
def test_a_file_of_the_same_library_needs_no_skeleton(kind: str, tmp_path: Path) -> None:
    """Its names tell another kind of layer than the live ones, whose axes stand where they stood."""
    import tensorflow

    def model() -> Any:
        k = framework(kind)
        inputs = k.Input((7, 8))
        x = k.layers.MultiHeadAttention(2, 4)(inputs, inputs)
        x = k.layers.EinsumDense("abc,dc->abd", output_shape=(7, 8), bias_axes="d")(x)
        return k.Model(inputs, k.layers.EinsumDense("abc,cde->abde", output_shape=(7, 2, 4))(x))

    written, restored = random_keras(model(), 1), random_keras(model(), 2)
    path = tensorflow.train.Checkpoint(model=written).write(str(tmp_path / "run"))
    ckptconv.keras.restore(path, restored)
    for one, other in zip(written.get_weights(), restored.get_weights(), strict=True):
        np.testing.assert_array_equal(one, other)
