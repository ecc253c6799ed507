"""Weight norm and spectral norm: folded where the caller allows it, refused otherwise."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
tf = pytest.importorskip("tensorflow")
pytest.importorskip("tf_keras")

from torch import nn  # noqa: E402
from torch.nn import utils  # noqa: E402
from torch.nn.utils import parametrizations  # noqa: E402

import ckptconv  # noqa: E402
from ckptconv.ops import SpectralNorm, WeightNorm, normalized  # noqa: E402
from ckptconv.tensor import StoredTensor  # noqa: E402
from tests.support.live_twins import keras_adamw, random_torch, torch_adamw  # noqa: E402
from tests.support.twins import framework  # noqa: E402

Made = Callable[..., Any]


def _old(rule: Callable[..., Any]) -> Made:
    def made(*layer: Any) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # deprecated, and what most files are of
            return rule(*layer)

    return made


RULES: dict[str, Made] = {
    "weight": parametrizations.weight_norm,
    "weight-old": _old(utils.weight_norm),
    "spectral": parametrizations.spectral_norm,
    "spectral-old": _old(utils.spectral_norm),
}
LAYERS: dict[str, tuple[Callable[[], Any], Callable[[Any], Any], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(4, 5), lambda kl: kl.Dense(5), (4,)),
    "conv1d": (lambda: nn.Conv1d(4, 5, 3), lambda kl: kl.Conv1D(5, 3), (9, 4)),
    "conv2d": (lambda: nn.Conv2d(4, 4, (2, 3)), lambda kl: kl.Conv2D(4, (2, 3)), (6, 5, 4)),
    "transposed": (
        lambda: nn.ConvTranspose2d(4, 5, (2, 3)),
        lambda kl: kl.Conv2DTranspose(5, (2, 3)),
        (6, 5, 4),
    ),
    "square-transposed": (
        lambda: nn.ConvTranspose1d(4, 4, 3),
        lambda kl: kl.Conv1DTranspose(4, 3),
        (6, 4),
    ),
}
each = pytest.mark.parametrize("rule", RULES)


def built(rule: str, layer: str) -> tuple[Any, Any, Any]:
    """The model in torch, in Keras, and how far apart their outputs are."""
    ours, theirs, shape = LAYERS[layer]
    torch.manual_seed(1)
    model = random_torch(nn.Sequential(RULES[rule](ours())), 1)
    x = np.random.default_rng(2).standard_normal((3, *shape)).astype(np.float32)
    given = torch.from_numpy(np.moveaxis(x, -1, 1).copy())
    model.train()
    for _ in range(3):  # singular vectors are iterated while it trains
        model(given)
    k = framework("keras3")
    other = k.Sequential([k.Input(shape), theirs(k.layers)])

    def apart() -> float:
        model.eval()
        with torch.no_grad():
            expected = model(given).movedim(1, -1).numpy()
        return float(np.abs(expected - np.asarray(other(x))).max() / np.abs(expected).max())

    return model, other, apart


def codes(call: Callable[[], object]) -> set[str]:
    with pytest.raises(ckptconv.CkptError) as caught:
        call()
    return {problem.code for problem in caught.value.problems}


@pytest.mark.parametrize("layer", LAYERS)
@each
def test_what_is_folded_has_the_same_outputs(rule: str, layer: str) -> None:
    ours, theirs, apart = built(rule, layer)
    captured = ckptconv.pytorch.capture(ours)
    assert codes(lambda: ckptconv.keras.restore(captured, theirs)) == {"form-mismatch"}
    assert apart() > 0.1
    report = ckptconv.keras.restore(captured, theirs, allow=["form-mismatch"])
    assert apart() < 1e-5
    accounted = {entry.item[1] for entry in report.ledger if entry.item[0] == "param"}
    assert accounted == set(captured.params)


@each
def test_its_slots_stay_behind(rule: str) -> None:
    ours, theirs, apart = built(rule, "linear")
    optimizer, adam = torch_adamw(ours), keras_adamw("keras3", theirs)
    ours(torch.ones(2, 4)).square().mean().backward()
    optimizer.step()
    captured = ckptconv.pytorch.capture(ours, optimizer)
    allowed = ["form-mismatch"]
    assert codes(lambda: ckptconv.keras.restore(captured, theirs, adam, allow=allowed)) == {"slots-missing"}
    report = ckptconv.keras.restore(captured, theirs, adam, allow=[*allowed, "slots-missing"])
    assert apart() < 1e-5
    slots = {entry.item[2:]: entry.fate for entry in report.ledger if entry.item[0] == "slot"}
    held = {(slot, name) for slot, by in captured.optimizers[0].slots.items() for name in by}
    assert set(slots) >= held
    assert {slots["first_moment", name] for _, name in held if name != "0.bias"} == {"left"}
    assert slots["first_moment", "0.bias"] == "copied"
    assert [verdict.verdict for verdict in report.verdicts] == ["lossy"]


@each
def test_a_target_with_it_is_refused_and_what_the_hint_says_works(rule: str) -> None:
    ours, theirs, apart = built(rule, "linear")
    captured = ckptconv.keras.capture(theirs)
    found = codes(lambda: ckptconv.pytorch.restore(captured, ours, allow=["form-mismatch"]))
    assert found == {"template-mismatch"}
    if "weight" in rule:
        ours[0] = nn.Linear(4, 5)
        ckptconv.pytorch.restore(captured, ours)
        ours[0] = RULES[rule](ours[0])
        assert apart() < 1e-5


@each
def test_within_one_library_it_stays_as_it_is(rule: str) -> None:
    ours, other = built(rule, "linear")[0], built(rule, "linear")[0]
    random_torch(other, 7)
    report = ckptconv.pytorch.restore(ckptconv.pytorch.capture(ours), other)
    assert {entry.fate for entry in report.ledger if entry.item[0] == "param"} == {"copied"}
    for one, two in zip(ours.state_dict().values(), other.state_dict().values(), strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("rule", ["weight", "weight-old"])
def test_a_matrix_of_a_recurrent_layer(rule: str) -> None:
    """The state's matrix alone, as AWD-LSTM's followers have it."""
    ours = random_torch(RULES[rule](nn.GRU(4, 5, batch_first=True), "weight_hh_l0"), 1)
    k = framework("keras3")
    theirs = k.Sequential([k.Input((6, 4)), k.layers.GRU(5, return_sequences=True)])
    ckptconv.keras.restore(ckptconv.pytorch.capture(ours), theirs, allow=["form-mismatch"])
    x = np.random.default_rng(0).standard_normal((2, 6, 4)).astype(np.float32)
    expected = ours(torch.from_numpy(x))[0].detach().numpy()
    np.testing.assert_allclose(np.asarray(theirs(x)), expected, rtol=1e-5, atol=1e-5)


class Backwards(nn.Module):
    """Two layers alike, declared in another order than they are used in."""

    def __init__(self) -> None:
        super().__init__()
        self.second, self.first = (parametrizations.weight_norm(nn.Linear(4, 4)) for _ in range(2))

    def forward(self, x: Any) -> Any:
        return self.second(torch.tanh(self.first(x)))


def test_what_is_folded_is_matched_by_what_it_takes(tmp_path: Any) -> None:
    ours = random_torch(Backwards(), 1)
    k = framework("keras3")
    theirs = k.Sequential([k.Input((4,)), k.layers.Dense(4, activation="tanh"), k.layers.Dense(4)])
    x = np.random.default_rng(0).standard_normal((3, 4)).astype(np.float32)
    given = torch.from_numpy(x)
    torch.save(ours.state_dict(), tmp_path / "w.pt")
    ckptconv.convert(
        tmp_path / "w.pt",
        tmp_path / "w",
        template=ckptconv.keras.describe(theirs, inputs=x),
        source_spec=ckptconv.pytorch.describe(ours, inputs=given),
        allow=["form-mismatch"],
    )
    tf.train.Checkpoint(model=theirs).read(str(tmp_path / "w")).expect_partial()
    np.testing.assert_allclose(np.asarray(theirs(x)), ours(given).detach().numpy(), rtol=1e-5, atol=1e-5)


def test_a_convolution_that_may_be_transposed(tmp_path: Any) -> None:
    """Without a bias nothing tells what a file's square weight is of."""
    model = nn.Sequential(parametrizations.spectral_norm(nn.ConvTranspose1d(4, 4, 3, bias=False)))
    k = framework("keras3")
    theirs = k.Sequential([k.Input((6, 4)), k.layers.Conv1DTranspose(4, 3, use_bias=False)])
    allowed = ["form-mismatch"]
    found = codes(lambda: ckptconv.keras.restore(ckptconv.pytorch.capture(model), theirs, allow=allowed))
    assert "layout-ambiguous" in found


def test_the_wrapper_of_keras_is_another_rule() -> None:
    k = framework("keras3")  # that of tf_keras 2.21 cannot be built beside Keras 3
    theirs = k.Sequential([k.Input((4,)), k.layers.SpectralNormalization(k.layers.Dense(5))])
    ours = nn.Sequential(nn.Linear(4, 5))
    assert codes(lambda: ckptconv.pytorch.restore(ckptconv.keras.capture(theirs), ours)) == {"form-mismatch"}
    assert codes(lambda: ckptconv.keras.restore(ckptconv.pytorch.capture(ours), theirs)) == {"form-mismatch"}


def test_arrays_that_are_only_called_so() -> None:
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight_g, self.weight_v = (nn.Parameter(torch.ones(4, 4)) for _ in range(2))

    described = ckptconv.pytorch.describe(Gated())
    k = framework("keras3")
    theirs = k.Sequential([k.Input((4,)), k.layers.Dense(4)])
    assert "form-mismatch" not in codes(lambda: ckptconv.keras.restore(described, theirs))


@pytest.mark.parametrize("shape", [(6, 5), (3, 4, 5), (1, 7), (4, 1)])
@pytest.mark.parametrize("panel", [16, 1 << 20])
def test_any_part_of_the_result(shape: tuple[int, ...], panel: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(normalized, "_PANEL_NBYTES", panel)
    rng = np.random.default_rng(0)
    v = rng.standard_normal(shape)
    low, high = tuple(size // 3 for size in shape), shape
    box = tuple(slice(a, b) for a, b in zip(low, high, strict=True))
    for dim in (None, *range(len(shape))):
        axes = tuple(axis for axis in range(len(shape)) if axis != dim)
        g = rng.standard_normal([size if axis == dim else 1 for axis, size in enumerate(shape)])
        g = g.reshape(()) if dim is None else g
        expected = g * v / np.sqrt(np.square(v).sum(axis=axes, keepdims=True))
        made = StoredTensor.of_array(g).apply(WeightNorm(), StoredTensor.of_array(v))
        np.testing.assert_allclose(made.read(), expected, rtol=1e-12)
        np.testing.assert_allclose(made.block(low, high), expected[box], rtol=1e-12)
    for axis in range(2):
        u, w = rng.standard_normal(shape[axis]), rng.standard_normal(v.size // shape[axis])
        sigma = u @ np.moveaxis(v, axis, 0).reshape(shape[axis], -1) @ w
        parts = map(StoredTensor.of_array, (u, w))
        made = StoredTensor.of_array(v).apply(SpectralNorm(axis), *parts)
        np.testing.assert_allclose(made.read(), v / sigma, rtol=1e-10)
        np.testing.assert_allclose(made.block(low, high), (v / sigma)[box], rtol=1e-10)
