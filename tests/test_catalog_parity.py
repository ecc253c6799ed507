"""Converted optimizer state against the real classes: k updates, the conversion, k more in both."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from ckptconv.catalog import optimizers
from ckptconv.document import Group, Known, Optimizer, Value, value_of
from ckptconv.tensor import StoredTensor, TensorRef

SHAPE = (4, 3)
STEPS = 12

SGD: dict[str, Value] = {"learning_rate": 0.125, "momentum": 0.875, "nesterov": False, "weight_decay": 0.0}
ADAM: dict[str, Value] = {
    "learning_rate": 0.03125,
    "beta_1": 0.875,
    "beta_2": 0.96875,
    "epsilon": 1e-7,
    "weight_decay": 0.0,
    "amsgrad": False,
}
TORCH_ONLY: dict[str, Value] = {"maximize": False}
CASES: list[tuple[str, dict[str, Value], float]] = [
    ("sgd", {**SGD, "momentum": 0.0}, 2e-6),
    ("sgd", SGD, 2e-6),
    ("sgd", {**SGD, "nesterov": True}, 2e-6),
    ("sgd", {**SGD, "dampening": 0.25}, 2e-6),
    ("adam", ADAM, 2e-5),
    ("adam", {**ADAM, "amsgrad": True}, 2e-5),
    ("adamw", {**ADAM, "weight_decay": 0.0625}, 2e-5),
]
IDS = ["plain", "momentum", "nesterov", "dampening", "adam", "amsgrad", "adamw"]


def gradients() -> list[np.ndarray]:
    rng = np.random.default_rng(11)
    return [rng.normal(size=SHAPE).astype(np.float32) for _ in range(2 * STEPS)]


class Torch:
    """A torch optimizer of one parameter."""

    framework = "torch"

    def __init__(self, algorithm: str, hypers: Mapping[str, Value]) -> None:
        import torch

        self.torch = torch
        self.row = row_of(algorithm, "torch")
        self.weight = torch.nn.Parameter(torch.ones(SHAPE))
        keys: dict[str, Any] = {}
        for name, value in hypers.items():
            entry = self.row.hyperparameters[name]
            assert entry.argument is not None
            keys[entry.argument] = (
                (*keys.get(entry.argument, ()), value) if entry.index is not None else value
            )
        self.optimizer = getattr(torch.optim, self.row.class_name.rpartition(".")[2])([self.weight], **keys)

    def update(self, gradient: np.ndarray) -> None:
        self.weight.grad = self.torch.from_numpy(gradient.copy())
        self.optimizer.step()

    def values(self) -> np.ndarray:
        return self.weight.detach().numpy().copy()

    def slots(self) -> dict[str, np.ndarray]:
        state = self.optimizer.state_dict()["state"].get(0, {})
        return {slot: state[key].numpy().copy() for slot, key in self.row.slots.items() if key in state}

    def load(
        self, values: np.ndarray, slots: Mapping[str, np.ndarray], conversion: optimizers.Conversion
    ) -> None:
        with self.torch.no_grad():
            self.weight.copy_(self.torch.from_numpy(values))
        entry: dict[str, Any] = {
            self.row.slots[slot]: self.torch.from_numpy(array.copy()) for slot, array in slots.items()
        }
        if self.row.step_key:
            entry[self.row.step_key] = self.torch.tensor(float(conversion.param_steps["w"]))
        groups = self.optimizer.state_dict()["param_groups"]
        state = {0: entry} if entry else {}
        self.optimizer.load_state_dict({"state": state, "param_groups": groups})


class Keras:
    """An optimizer of any Keras, of one variable."""

    def __init__(self, framework: str, algorithm: str, hypers: Mapping[str, Value]) -> None:
        tf = pytest.importorskip("tensorflow")
        self.framework = framework
        self.row = row_of(algorithm, framework)
        package = pytest.importorskip("keras" if framework == "keras3" else "tf_keras")
        module = package.optimizers.legacy if framework == "tf_keras_legacy" else package.optimizers
        arguments = {}
        for name, value in hypers.items():
            entry = self.row.hyperparameters.get(name)
            if entry is not None and entry.argument and value is not None:
                arguments[entry.argument] = value
        self.optimizer = getattr(module, self.row.class_name.rpartition(".")[2])(**arguments)
        self.tf = tf
        one = np.ones(SHAPE, np.float32)
        self.variable = package.Variable(one) if framework == "keras3" else tf.Variable(one)
        if framework == "tf_keras_legacy":
            self.optimizer._create_all_weights([self.variable])
        else:
            self.optimizer.build([self.variable])

    def update(self, gradient: np.ndarray) -> None:
        pairs = [(self.tf.constant(gradient), self.variable)]
        if self.framework == "keras3":
            self.optimizer.apply([pairs[0][0]], [self.variable])
        else:
            self.optimizer.apply_gradients(pairs)

    def values(self) -> np.ndarray:
        return np.asarray(self.variable).copy()

    def variables(self) -> dict[str, Any]:
        if self.framework == "tf_keras_legacy":
            have = self.optimizer.get_slot_names()
            return {
                s: self.optimizer.get_slot(self.variable, k) for s, k in self.row.slots.items() if k in have
            }
        lists = {slot: getattr(self.optimizer, edge, None) for slot, edge in self.row.slots.items()}
        return {slot: entries[0] for slot, entries in lists.items() if entries}

    def slots(self) -> dict[str, np.ndarray]:
        return {slot: np.asarray(variable).copy() for slot, variable in self.variables().items()}

    def load(
        self, values: np.ndarray, slots: Mapping[str, np.ndarray], conversion: optimizers.Conversion
    ) -> None:
        self.variable.assign(values)
        variables = self.variables()
        assert set(slots) == set(variables)
        for slot, array in slots.items():
            variables[slot].assign(array)
        step = value_of(conversion.step)
        assert isinstance(step, int)
        self.optimizer.iterations.assign(step)


def row_of(algorithm: str, framework: str) -> optimizers.Row:
    row = optimizers.row(algorithm, framework)
    assert row is not None
    return row


def make(framework: str, algorithm: str, hypers: Mapping[str, Value]) -> Torch | Keras:
    if framework == "torch":
        own = row_of(algorithm, "torch").hyperparameters
        return Torch(algorithm, {k: v for k, v in hypers.items() if k in own})
    return Keras(framework, algorithm, hypers)


def document(side: Torch | Keras, algorithm: str, hypers: Mapping[str, Value], step: int) -> Optimizer:
    per_param = side.row.step_per_param
    return Optimizer(
        name="optimizer",
        algorithm=algorithm,
        framework=side.framework,
        step=Known(value=step),
        param_steps={"w": step} if per_param else {},
        groups=(Group(params=("w",), hyperparameters={k: Known(value=v) for k, v in hypers.items()}),),
        slots={slot: {"w": StoredTensor.of_array(array)} for slot, array in side.slots().items()},
    )


PAIRS = [
    ("torch", "keras3"),
    ("torch", "tf_keras"),
    ("torch", "tf_keras_legacy"),
    ("keras3", "torch"),
    ("tf_keras", "torch"),
    ("tf_keras_legacy", "torch"),
    ("tf_keras_legacy", "keras3"),
]


@pytest.mark.parametrize("case", CASES, ids=IDS)
@pytest.mark.parametrize(("ours", "theirs"), PAIRS, ids=["-".join(pair) for pair in PAIRS])
def test_goes_on(case: tuple[str, dict[str, Value], float], ours: str, theirs: str) -> None:
    pytest.importorskip("torch")
    pytest.importorskip("tensorflow")
    algorithm, hypers, tolerance = case
    if ("dampening" in hypers and ours != "torch") or (
        algorithm == "adamw" and "tf_keras_legacy" in (ours, theirs)
    ):
        return
    source = make(ours, algorithm, hypers)
    stream = gradients()
    for gradient in stream[:STEPS]:
        source.update(gradient)
    recorded = {**hypers, **(TORCH_ONLY if ours == "torch" else {})}
    if ours == "torch" and algorithm == "sgd":
        recorded.setdefault("dampening", 0)

    template = make(theirs, algorithm, hypers)
    # Another value of everything in the template: what the source records must win.
    offered = {"learning_rate": 0.5, "learning_rate_decay": 0.0} if theirs != "torch" else {"maximize": False}
    skeleton = document(template, algorithm, offered, 0)
    if theirs == "torch":
        skeleton = Optimizer(
            name="optimizer",
            algorithm=algorithm,
            framework="torch",
            step=Known(value=0),
            groups=skeleton.groups,
        )
    conversion = optimizers.convert(document(source, algorithm, recorded, STEPS), skeleton)
    assert conversion.problems == ()
    settled = {k: value_of(f) for k, f in conversion.hyperparameters[0].items() if isinstance(f, Known)}
    if any("adaptive_epsilon=True" in line for line in conversion.target_requires):
        settled["adaptive_epsilon"] = True
        algorithm = "adam"
    target = make(theirs, algorithm, settled)
    slots = {}
    for slot in conversion.slots:
        tensor: TensorRef = StoredTensor.of_array(source.slots().get(slot.slot, np.zeros(SHAPE, np.float32)))
        for op in () if slot.created else conversion.ops(slot.slot, 0):
            tensor = tensor.apply(op)
        slots[slot.slot] = tensor.read()
    before = source.values()
    target.load(before, slots, conversion)
    for gradient in stream[STEPS:]:
        source.update(gradient)
        target.update(gradient)
    moved = np.abs(source.values() - before).max()
    assert np.abs(source.values() - target.values()).max() <= tolerance * moved
