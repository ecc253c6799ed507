"""Recurrent layers as their users write them: merged directions, dropout, cells, no biases, projected."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
tf = pytest.importorskip("tensorflow")
pytest.importorskip("tf_keras")

from torch import nn  # noqa: E402

import ckptconv  # noqa: E402
from tests.support.live_twins import (  # noqa: E402
    Twin,
    apart,
    keras_adamw,
    random_keras,
    random_torch,
    torch_adamw,
    train_torch,
)
from tests.support.twins import framework  # noqa: E402

UNITS, LENGTH, INPUTS = 4, 5, 3
KERAS = {"LSTM": "LSTM", "GRU": "GRU", "RNN": "SimpleRNN"}
MERGED: dict[str, Callable[[Any, Any], Any]] = {
    "concat": lambda a, b: torch.cat([a, b], -1),
    "sum": lambda a, b: a + b,
    "mul": lambda a, b: a * b,
    "ave": lambda a, b: (a + b) / 2,
}


class Recurrent(nn.Module):
    """A recurrent module, then what becomes of its outputs."""

    def __init__(self, rnn: Any, then: Callable[[Any], Any] = lambda x: x) -> None:
        super().__init__()
        self.rnn = rnn
        self.then = then

    def forward(self, x: Any) -> Any:
        return self.then(self.rnn(x)[0])


class Steps(nn.Module):
    """Cells, one upon the other, step by step."""

    def __init__(self, *cells: Any) -> None:
        super().__init__()
        self.cells = nn.ModuleList(cells)

    def forward(self, x: Any) -> Any:
        states: list[Any] = [None] * len(self.cells)
        outputs = []
        for given in x.unbind(1):
            for i, cell in enumerate(self.cells):
                states[i] = cell(given, states[i])
                given = states[i][0] if isinstance(states[i], tuple) else states[i]
            outputs.append(given)
        return torch.stack(outputs, 1)


def twin(ours: Callable[[], Any], theirs: Callable[[Any, Any], Any]) -> Twin:
    def keras(k: Any) -> Any:
        inputs = k.Input((LENGTH, INPUTS))
        return k.Model(inputs, theirs(k.layers, inputs))

    return Twin(torch=ours, keras=keras, shape=(2, LENGTH, INPUTS))


def merged(mode: str) -> Twin:
    def ours() -> Any:
        rnn = nn.GRU(INPUTS, UNITS, bidirectional=True, batch_first=True)
        return Recurrent(rnn, lambda x: MERGED[mode](*x.chunk(2, -1)))

    def theirs(kl: Any, x: Any) -> Any:
        return kl.Bidirectional(kl.GRU(UNITS, return_sequences=True), merge_mode=mode)(x)

    return twin(ours, theirs)


def stacked(name: str, *, layers: int = 2, dropout: float = 0.0, bias: bool = True, **given: float) -> Twin:
    def ours() -> Any:
        options = {"num_layers": layers, "dropout": dropout, "bias": bias, "batch_first": True}
        return Recurrent(getattr(nn, name)(INPUTS, UNITS, **options))

    def theirs(kl: Any, x: Any) -> Any:
        for i in range(layers):
            inner = {"dropout": dropout} if i else {}
            x = getattr(kl, KERAS[name])(UNITS, return_sequences=True, use_bias=bias, **inner, **given)(x)
        return x

    return twin(ours, theirs)


def cells(name: str, layers: int) -> Twin:
    def ours() -> Any:
        made = getattr(nn, f"{name}Cell")
        return Steps(*(made(INPUTS if i == 0 else UNITS, UNITS) for i in range(layers)))

    def theirs(kl: Any, x: Any) -> Any:
        made = [getattr(kl, f"{KERAS[name]}Cell")(UNITS) for _ in range(layers)]
        return kl.RNN(kl.StackedRNNCells(made) if layers > 1 else made[0], return_sequences=True)(x)

    return twin(ours, theirs)


FORMS = {
    **{f"merged-{mode}": merged(mode) for mode in MERGED},
    **{f"{name}-no-bias": stacked(name, bias=False) for name in KERAS},
    **{f"{name}-dropout": stacked(name, dropout=0.3, recurrent_dropout=0.2) for name in KERAS},
    **{f"{name}-cell": cells(name, 1) for name in KERAS},
    **{f"{name}-cells": cells(name, 2) for name in KERAS},
}


@pytest.mark.parametrize("kind", ["keras3", pytest.param("tf_keras", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", FORMS)
def test_outputs_and_slots_cross_both_ways(name: str, kind: str) -> None:
    it = FORMS[name]
    ours, theirs = random_torch(it.torch(), 1), random_keras(it.keras(framework(kind)), 2)
    ours = ckptconv.pytorch.freeze_recurrent_bias(ours)
    optimizer, adam = torch_adamw(ours), keras_adamw(kind, theirs)
    train_torch(it, ours, optimizer, 2)
    ours.eval()
    assert apart(it, ours, theirs) > 1e-2
    ckptconv.keras.restore(ckptconv.pytorch.capture(ours, optimizer), theirs, adam)
    assert apart(it, ours, theirs) < 1e-5
    again = ckptconv.pytorch.freeze_recurrent_bias(random_torch(it.torch(), 3))
    other = torch_adamw(again)
    ckptconv.pytorch.restore(ckptconv.keras.capture(theirs, adam), again, other)
    again.eval()
    assert apart(it, again, theirs) < 1e-5
    trained = [name for name, p in ours.named_parameters() if p.requires_grad]
    for name in trained:
        one, two = ours.get_parameter(name), again.get_parameter(name)
        assert torch.equal(one, two)
        for slot in ("exp_avg", "exp_avg_sq", "step"):
            assert optimizer.state[one][slot].count_nonzero()
            assert torch.equal(optimizer.state[one][slot], other.state[two][slot])


def projected() -> Twin:
    return twin(
        lambda: Recurrent(nn.LSTM(INPUTS, UNITS, proj_size=2, batch_first=True)),
        lambda kl, x: kl.LSTM(UNITS, return_sequences=True)(x),
    )


@pytest.mark.parametrize("kind", ["keras3", "tf_keras"])
def test_a_projected_state_is_refused(kind: str) -> None:
    it = projected()
    ours, theirs = it.torch(), it.keras(framework(kind))
    for call in (
        lambda: ckptconv.keras.restore(ckptconv.pytorch.capture(ours), theirs),
        lambda: ckptconv.pytorch.restore(ckptconv.keras.capture(theirs), ours),
    ):
        with pytest.raises(ckptconv.CkptError) as caught:
            call()
        assert {problem.code for problem in caught.value.problems} == {"form-mismatch"}


@pytest.mark.parametrize("kind", ["keras3", "tf_keras"])
def test_statistics_of_the_data_are_refused_or_left_out(kind: str, tmp_path: Path) -> None:
    k = framework(kind)
    norm = k.layers.Normalization()
    norm.adapt(np.random.default_rng(0).standard_normal((20, 4)))
    theirs = k.Sequential([k.Input((4,)), norm, k.layers.Dense(3)])
    ours = nn.Sequential(nn.Linear(4, 3))
    with pytest.raises(ckptconv.CkptError) as caught:
        ckptconv.pytorch.restore(ckptconv.keras.capture(theirs), ours)
    assert {problem.code for problem in caught.value.problems} == {"form-mismatch"}
    with pytest.raises(ckptconv.CkptError) as caught:
        ckptconv.keras.restore(ckptconv.pytorch.capture(ours), theirs)
    assert {problem.code for problem in caught.value.problems} == {"form-mismatch"}
    params = ckptconv.keras.capture(theirs).params.values()
    own = [param.name for param in params if param.layer == "normalization"]
    source = tf.train.Checkpoint(model=theirs).write(str(tmp_path / "run"))
    torch.save(ours.state_dict(), tmp_path / "fresh.pt")
    ckptconv.convert(
        source,
        tmp_path / "out.pt",
        template=tmp_path / "fresh.pt",
        exclude=own,
        allow=["assumed-layout"],
    )
    ours.load_state_dict(torch.load(tmp_path / "out.pt"))
    np.testing.assert_array_equal(theirs.layers[-1].kernel.numpy().T, ours[0].weight.detach().numpy())
