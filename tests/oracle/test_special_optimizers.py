"""What is special about parameters, with optimizers other than Adam, whose steps and slots real updates made.

Frozen and never updated ones, groups with settings of their own, bfloat16 under float32 moments, sparse
gradients: from PyTorch to Keras 3 and back. Muon, which is two optimizers in PyTorch, has
`test_special_muon.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("tensorflow")
keras = pytest.importorskip("keras")

import tensorflow as tf  # noqa: E402
from torch import nn  # noqa: E402

import ckptconv  # noqa: E402
from ckptconv.errors import CkptError, Problem  # noqa: E402

STEPS = 3


class Case(NamedTuple):
    """One optimizer on both sides: arguments, and PyTorch's slots with Keras' lists of them."""

    arguments: Mapping[str, Any]
    keras: str
    slots: Mapping[str, str]
    told: Mapping[str, str] = {}
    """What PyTorch's file does not hold."""


MOMENTS = {"exp_avg": "_momentums", "exp_avg_sq": "_velocities"}
CASES = {
    "AdamW": Case({}, "AdamW", MOMENTS),
    "NAdam": Case({"momentum_decay": 1.0}, "Nadam", MOMENTS),
    "Adamax": Case({}, "Adamax", {"exp_avg": "_m", "exp_inf": "_u"}),
    "Adagrad": Case({}, "Adagrad", {"sum": "_accumulators"}),
    "Adadelta": Case(
        {}, "Adadelta", {"square_avg": "_accumulated_grads", "acc_delta": "_accumulated_delta_vars"}
    ),
    "RMSprop": Case({}, "RMSprop", {"square_avg": "_velocities"}),
    "Lion": Case({}, "Lion", {"exp_avg": "_momentums"}, {"step": str(STEPS)}),
    "Adafactor": Case(
        {"eps": (1e-15, 1e-3)}, "Adafactor", {"row_var": "_c", "col_var": "_r", "variance": "_v"}
    ),
}
"""Their rows are the factors of a transposed matrix's columns."""
DENSE_ONLY = {"AdamW", "NAdam", "Adamax", "Adadelta", "RMSprop", "Lion", "Adafactor", "Muon"}
"""They take no sparse gradients in PyTorch: of what crosses, Adagrad does, and SGD without momentum."""
every = pytest.mark.parametrize("name", CASES)
counting = pytest.mark.parametrize("name", [name for name in CASES if name != "Lion"])
"""Those that count updates for each parameter."""


def torch_model(seed: int, dtype: str = "float32") -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3), nn.Linear(3, 2)).to(getattr(torch, dtype))


def state_of(model: Any, optimizer: Any) -> dict[str, Any]:
    return {"model": model.state_dict(), "optimizer": optimizer.state_dict()}


def updated(model: Any, optimizer: Any, *, late: str | None = None) -> dict[str, Any]:
    """The state after three updates; the parameter `late` has no gradient in the first."""
    named = dict(model.named_parameters())
    for number in range(STEPS):
        rng = np.random.default_rng(number)
        for name, parameter in named.items():
            gradient = torch.from_numpy(rng.normal(size=parameter.shape)).to(parameter.dtype)
            held = parameter.requires_grad and not (name == late and number == 0)
            parameter.grad = gradient if held else None
        optimizer.step()
    return state_of(model, optimizer)


def optimizer_of(name: str, groups: Any, **more: Any) -> Any:
    cls = ckptconv.pytorch.lion if name == "Lion" else getattr(torch.optim, name)
    return cls(groups, **{"lr": 0.01, **CASES[name].arguments, **more})


class KerasSide:
    """The same model and optimizer in Keras 3."""

    def __init__(self, name: str, frozen: int | None = None) -> None:
        layers = [keras.layers.Dense(n) for n in (5, 3, 2)]
        self.model = keras.Sequential([keras.Input((4,)), *layers])
        if frozen is not None:
            layers[frozen].trainable = False
        self.optimizer = getattr(keras.optimizers, CASES[name].keras)(0.01)
        self.optimizer.build(self.model.trainable_variables)
        self.checkpoint = tf.train.Checkpoint(model=self.model, optimizer=self.optimizer)

    def load(self, path: Path) -> KerasSide:
        self.checkpoint.restore(str(path)).assert_consumed()
        return self

    def slots(self, name: str) -> dict[str, list[np.ndarray[Any, Any]]]:
        """PyTorch's name of each slot -> arrays in PyTorch's order of axes, as they are trained."""
        return {
            key: [np.asarray(v).T for v in getattr(self.optimizer, attribute)]
            for key, attribute in CASES[name].slots.items()
        }


def save(state: Any, path: Path) -> Path:
    torch.save(state, path)
    return path


def refused(*arguments: Any, **more: Any) -> tuple[Problem, ...]:
    with pytest.raises(CkptError) as caught:
        ckptconv.convert(*arguments, **more)
    return caught.value.problems


def assert_slots(side: KerasSide, name: str, state: Mapping[int, Any]) -> None:
    for key, arrays in side.slots(name).items():
        for index, array in enumerate(arrays):
            entry = state[sorted(state)[index]]  # the late one stands last
            if key in entry:  # Adafactor's are factors, or none
                values = entry[key].float().numpy()
                factor = array.ndim < values.ndim
                np.testing.assert_array_equal(array, values.squeeze() if factor else values, err_msg=key)


@counting
def test_steps_that_differ_are_allowed_by_name(name: str, tmp_path: Path) -> None:
    model = torch_model(1)
    state = updated(model, optimizer_of(name, model.named_parameters()), late="1.bias")
    assert {int(entry["step"]) for entry in state["optimizer"]["state"].values()} == {STEPS - 1, STEPS}
    run, out = save(state, tmp_path / "run.pt"), tmp_path / "out-1"
    fresh = KerasSide(name).checkpoint.save(str(tmp_path / "fresh" / "ckpt"))
    assert [p.code for p in refused(run, out, template=fresh)] == ["unequal-steps"]
    ckptconv.convert(run, out, template=fresh, allow=["unequal-steps"])
    side = KerasSide(name).load(out)
    assert int(side.optimizer.iterations) == STEPS
    assert_slots(side, name, state["optimizer"]["state"])

    other = torch_model(2)
    template = save(state_of(other, optimizer_of(name, other.named_parameters())), tmp_path / "fresh.pt")
    ckptconv.convert(run, tmp_path / "same.pt", template=template)
    kept = torch.load(tmp_path / "same.pt")["optimizer"]["state"]
    was = state["optimizer"]["state"]
    assert {i: int(e["step"]) for i, e in kept.items()} == {i: int(e["step"]) for i, e in was.items()}


@every
def test_bfloat16_parameters_with_float32_moments_and_a_frozen_layer(name: str, tmp_path: Path) -> None:
    model = torch_model(1, "bfloat16")
    model[1].requires_grad_(False)
    trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    state = updated(model, optimizer_of(name, trained))
    rng = np.random.default_rng(7)
    for entry in state["optimizer"]["state"].values():
        for key in CASES[name].slots.keys() & entry.keys():
            values = torch.from_numpy(rng.uniform(0.5, 2.0, size=entry[key].shape)).float()
            entry[key] = values  # no bfloat16 is this exact
    run, out = save(state, tmp_path / "run.pt"), tmp_path / "out-1"
    fresh = KerasSide(name, frozen=1).checkpoint.save(str(tmp_path / "fresh" / "ckpt"))
    report = ckptconv.convert(run, out, template=fresh, set_=CASES[name].told)
    side = KerasSide(name, frozen=1).load(out)
    assert_slots(side, name, state["optimizer"]["state"])
    upcast = {
        e.item[1] for e in report.ledger if e.item[0] == "param" and any("float32" in str(o) for o in e.ops)
    }
    assert upcast == set(state["model"])
    assert not [
        e for e in report.ledger if e.item[0] == "slot" and any("cast" in str(o).lower() for o in e.ops)
    ]
    for (key, value), variable in zip(state["model"].items(), side.model.variables, strict=True):
        array = variable.numpy().T if value.ndim == 2 else variable.numpy()
        np.testing.assert_array_equal(array, value.float().numpy(), err_msg=key)

    back = tmp_path / "back.pt"
    problems = refused(out, back, template=run)  # it has float32 moments beside bfloat16 parameters
    assert {(p.code, p.loc[0]) for p in problems} == {("precision-loss", "params")}
    assert {p.loc[1] for p in problems} == set(state["model"])
    ckptconv.convert(out, back, template=run, allow=["precision-loss"])
    returned = torch.load(back)
    assert all(torch.equal(returned["model"][key], value) for key, value in state["model"].items())
    for entry, was in zip(
        returned["optimizer"]["state"].values(), state["optimizer"]["state"].values(), strict=True
    ):
        assert entry.keys() == was.keys()
        assert all(torch.equal(entry[key], was[key]) for key in CASES[name].slots.keys() & was.keys())


@every
def test_groups_of_their_own_rates(name: str, tmp_path: Path) -> None:
    def grouped(seed: int, first: float, second: float) -> tuple[Any, Any]:
        model = torch_model(seed)
        items = list(model.named_parameters())
        groups = [{"params": items[:2], "lr": first}, {"params": items[2:], "lr": second}]
        return model, optimizer_of(name, groups)

    run, out = save(updated(*grouped(1, 0.25, 0.5)), tmp_path / "run.pt"), tmp_path / "out-1"
    fresh = KerasSide(name).checkpoint.save(str(tmp_path / "fresh" / "ckpt"))
    told = CASES[name].told
    (problem,) = refused(run, out, template=fresh, set_=told)
    assert (problem.code, problem.loc[-1]) == ("groups-differ", "learning_rate")
    ckptconv.convert(run, out, template=fresh, set_=told, allow=["groups-differ"])
    assert float(KerasSide(name).load(out).optimizer.learning_rate) == 0.25
    template = save(state_of(*grouped(2, 0.1, 0.1)), tmp_path / "fresh.pt")
    ckptconv.convert(run, tmp_path / "same.pt", template=template)
    assert [g["lr"] for g in torch.load(tmp_path / "same.pt")["optimizer"]["param_groups"]] == [0.25, 0.5]
    ckptconv.convert(out, tmp_path / "back.pt", template=template)
    assert [g["lr"] for g in torch.load(tmp_path / "back.pt")["optimizer"]["param_groups"]] == [0.25, 0.25]


def sparse(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Embedding(7, 3, sparse=True), nn.Flatten(), nn.Linear(6, 2))


class SparseKeras(KerasSide):
    """An embedding before a dense layer."""

    def __init__(self, optimizer: Any) -> None:
        inputs = keras.Input((2,), dtype="int32")
        values = keras.layers.Embedding(7, 3)(inputs)
        self.model = keras.Model(inputs, keras.layers.Dense(2)(keras.layers.Flatten()(values)))
        self.optimizer = optimizer
        self.optimizer.build(self.model.trainable_variables)
        self.checkpoint = tf.train.Checkpoint(model=self.model, optimizer=self.optimizer)


def sparse_batch(number: int) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    rng = np.random.default_rng(number)
    return rng.integers(0, 7, (4, 2)), rng.normal(size=(4, 2)).astype("f4")


def train_sparse(model: Any, optimizer: Any, numbers: range) -> dict[str, Any]:
    for number in numbers:
        x, y = map(torch.from_numpy, sparse_batch(number))
        optimizer.zero_grad()
        (model(x) - y).square().mean().backward()
        assert model[0].weight.grad.is_sparse
        optimizer.step()
    return state_of(model, optimizer)


@pytest.mark.parametrize("name", sorted(DENSE_ONLY))
def test_sparse_gradients_are_an_error_in_torch(name: str) -> None:
    model = nn.Sequential(nn.Embedding(7, 3, sparse=True))
    optimizer = (
        torch.optim.Muon(model.parameters()) if name == "Muon" else optimizer_of(name, model.parameters())
    )
    model(torch.tensor([1, 4])).sum().backward()
    with pytest.raises(RuntimeError):
        optimizer.step()


def test_sparse_gradients_fill_the_slots_of_dense_ones(tmp_path: Path) -> None:
    model = sparse(1)
    optimizer = torch.optim.Adagrad(model.parameters(), lr=0.1)
    run, out = save(train_sparse(model, optimizer, range(5)), tmp_path / "run.pt"), tmp_path / "out-1"
    build = lambda: SparseKeras(keras.optimizers.Adagrad(0.1, epsilon=1e-10))  # noqa: E731
    fresh = build().checkpoint.save(str(tmp_path / "fresh" / "ckpt"))
    ckptconv.convert(run, out, template=fresh, allow=["flatten-layout", "assumed-layout"])
    side = build().load(out)
    for number in range(5, 10):
        x, y = map(tf.constant, sparse_batch(number))
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(tf.square(side.model(x) - y))
        variables = side.model.trainable_variables
        gradients = [tf.convert_to_tensor(g) for g in tape.gradient(loss, variables)]  # as the report says
        side.optimizer.apply_gradients(zip(gradients, variables, strict=True))
    before = model[0].weight.detach().clone()
    train_sparse(model, optimizer, range(5, 10))
    weight = model[0].weight.detach()
    assert (weight - before).abs().max() > 1e-3
    np.testing.assert_allclose(side.model.layers[1].embeddings.numpy(), weight.numpy(), atol=2e-6)

    template = sparse(2)
    other = torch.optim.Adagrad(template.parameters(), lr=0.1)
    saved = save(state_of(template, other), tmp_path / "fresh.pt")
    ckptconv.convert(out, tmp_path / "back.pt", template=saved, allow=["flatten-layout", "assumed-layout"])
    returned, was = (
        torch.load(tmp_path / "back.pt")["optimizer"]["state"],
        torch.load(run)["optimizer"]["state"],
    )
    for index, entry in was.items():
        np.testing.assert_allclose(
            returned[index]["sum"].numpy(), entry["sum"].numpy(), atol=2e-10, rtol=1e-6
        )


def test_the_lazy_rule_of_sparse_adam_stays_in_torch(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Embedding(7, 3, sparse=True))
    optimizer = torch.optim.SparseAdam(list(model.parameters()), lr=0.1)
    for _ in range(4):
        optimizer.zero_grad()
        model(torch.tensor([1, 1, 4])).square().sum().backward()
        optimizer.step()
    state = state_of(model, optimizer)
    run = save(state, tmp_path / "run.pt")
    inputs = keras.Input((2,), dtype="int32")
    network = keras.Model(inputs, keras.layers.Embedding(7, 3)(inputs))
    adam = keras.optimizers.Adam(0.1)
    adam.build(network.trainable_variables)
    fresh = tf.train.Checkpoint(model=network, optimizer=adam).save(str(tmp_path / "fresh" / "ckpt"))
    codes = {p.code for p in refused(run, tmp_path / "out-1", template=fresh)}
    assert codes == {"optimizer-mismatch"}
    other = nn.Sequential(nn.Embedding(7, 3, sparse=True))
    template = save(state_of(other, torch.optim.SparseAdam(list(other.parameters()))), tmp_path / "fresh.pt")
    ckptconv.convert(run, tmp_path / "out.pt", template=template)
    returned = torch.load(tmp_path / "out.pt")["optimizer"]["state"][0]
    for key, value in state["optimizer"]["state"][0].items():
        same = (
            torch.equal(returned[key], value) if isinstance(value, torch.Tensor) else returned[key] == value
        )
        assert same, key
