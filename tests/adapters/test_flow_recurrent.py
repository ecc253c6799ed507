"""Recurrent layers in a run: each layer and each direction of a stacked module is one of its own."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
tf = pytest.importorskip("tensorflow")
pytest.importorskip("tf_keras")

from torch import nn  # noqa: E402

import ckptconv  # noqa: E402
from ckptconv.catalog.compounds import home  # noqa: E402
from ckptconv.document import module_of  # noqa: E402
from tests.support.live_twins import random_torch  # noqa: E402
from tests.support.twins import framework  # noqa: E402

UNITS, LENGTH = 3, 4
X = np.random.default_rng(0).standard_normal((2, LENGTH, 2 * UNITS)).astype(np.float32)


class Stacked(nn.Module):
    """Declared backwards; every layer takes as much as it gives."""

    def __init__(self, cls: Any) -> None:
        super().__init__()
        self.c = nn.Linear(2 * UNITS, 2 * UNITS)
        self.b = cls(2 * UNITS, UNITS, num_layers=2, bidirectional=True, batch_first=True)
        self.a = nn.Linear(2 * UNITS, 2 * UNITS)

    def forward(self, x: Any) -> Any:
        return self.c(self.b(self.a(x))[0])


def keras_model(kind: str, name: str) -> Any:
    keras = framework(kind)
    kl = keras.layers
    x = inputs = keras.Input((LENGTH, 2 * UNITS))
    x = kl.Dense(2 * UNITS)(x)
    for _ in range(2):
        x = kl.Bidirectional(getattr(kl, name)(UNITS, return_sequences=True))(x)
    return keras.Model(inputs, kl.Dense(2 * UNITS)(x))


def layer_of(name: str) -> str:
    return module_of(home("torch", name))


def test_the_layers_of_a_stacked_module() -> None:
    described = ckptconv.pytorch.describe(Stacked(nn.LSTM), inputs=torch.from_numpy(X))
    found: dict[str, set[str]] = {}
    for site in described.flow:
        owner = layer_of(site.param)
        found.setdefault(owner, set()).update({*map(layer_of, site.after)} - {owner})
    below, above = {"b.l0", "b.l0_reverse"}, {"b.l1", "b.l1_reverse"}
    assert found == {
        "a": set(),
        **{name: {"a"} for name in below},
        **dict.fromkeys(above, below),
        "c": above,
    }


@pytest.mark.parametrize("kind", ["keras3", "tf_keras"])
@pytest.mark.parametrize(("cls", "name"), [(nn.LSTM, "LSTM"), (nn.GRU, "GRU"), (nn.RNN, "SimpleRNN")])
def test_matched_by_flow_and_direction(cls: Any, name: str, kind: str, tmp_path: Any) -> None:
    """Both directions have one shape and one place: their names alone tell them apart."""
    ours, theirs = random_torch(Stacked(cls), 1), keras_model(kind, name)
    described = ckptconv.keras.describe(theirs, inputs=X)
    torch.save(ours.state_dict(), tmp_path / "w.pt")
    spec = ckptconv.pytorch.describe(ours, inputs=torch.from_numpy(X))
    report = ckptconv.convert(tmp_path / "w.pt", tmp_path / "w", template=described, source_spec=spec)
    tf.train.Checkpoint(model=theirs).read(str(tmp_path / "w")).expect_partial()
    matched = [entry.evidence for entry in report.ledger if entry.item[0] == "param"]
    assert matched
    assert all("by flow" in evidence for evidence in matched)
    expected = ours(torch.from_numpy(X)).detach().numpy()
    np.testing.assert_allclose(np.asarray(theirs(X)), expected, rtol=1e-5, atol=1e-5)


def test_renamed_in_one_framework(tmp_path: Any) -> None:
    """Not taken apart, the module is one place in the flow."""

    class Renamed(Stacked):
        def __init__(self, cls: Any) -> None:
            super().__init__(cls)
            self.x, self.y, self.z = self.a, self.b, self.c
            del self.a, self.b, self.c

        def forward(self, x: Any) -> Any:
            return self.z(self.y(self.x(x))[0])

    ours, theirs = random_torch(Stacked(nn.GRU), 1), random_torch(Renamed(nn.GRU), 2)
    x = torch.from_numpy(X)
    torch.save(ours.state_dict(), tmp_path / "w.pt")
    spec, template = (ckptconv.pytorch.describe(model, inputs=x) for model in (ours, theirs))
    ckptconv.convert(tmp_path / "w.pt", tmp_path / "v.pt", template=template, source_spec=spec)
    theirs.load_state_dict(torch.load(tmp_path / "v.pt")["model"])
    assert torch.equal(ours(x), theirs(x))
