"""One model in PyTorch and in Keras, all of it random, compared by a table written by hand.

A table has one row per parameter: PyTorch's name, the way to Keras' variable, and how an array of PyTorch's
becomes one of Keras'. It knows nothing of ckptconv; both directions are compared with the same rows.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tests.support.command import convert_here

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("KERAS_BACKEND", "tensorflow")

Array = np.ndarray[Any, np.dtype[Any]]
STEP = 9
KINDS = ("keras3", "tf_keras", "tf_keras_legacy")


def same(x: Array) -> Array:
    return x


def dense(x: Array) -> Array:
    """(out, in) -> (in, out)."""
    return x.T


def conv1d(x: Array) -> Array:
    """(out, in, w) -> (w, in, out)."""
    return x.transpose(2, 1, 0)


def conv2d(x: Array) -> Array:
    """(out, in, h, w) -> (h, w, in, out); a transposed convolution's (in, out, h, w) -> (h, w, out, in)."""
    return x.transpose(2, 3, 1, 0)


def conv3d(x: Array) -> Array:
    """(out, in, d, h, w) -> (d, h, w, in, out)."""
    return x.transpose(2, 3, 4, 1, 0)


def depthwise(channels: int) -> Callable[[Array], Array]:
    """(in*multiplier, 1, h, w) -> (h, w, in, multiplier)."""

    def convert(x: Array) -> Array:
        return x.reshape(channels, x.shape[0] // channels, *x.shape[2:]).transpose(2, 3, 0, 1)

    return convert


class Row(NamedTuple):
    """One parameter on both sides."""

    torch: str
    keras: Callable[[Any], Any]
    to_keras: Callable[[Array], Array] = same


def layer(number: int, name: str) -> Callable[[Any], Any]:
    """The variable of that attribute in the model's layer of that number."""
    return lambda model: getattr(model.layers[number], name)


def linear(torch_name: str, number: int, *, bias: bool = True) -> list[Row]:
    """The rows of a dense layer."""
    rows = [Row(f"{torch_name}.weight", layer(number, "kernel"), dense)]
    return rows + [Row(f"{torch_name}.bias", layer(number, "bias"))] * bias


def framework(kind: str) -> Any:
    """The module `keras` or `tf_keras`."""
    if kind == "keras3":
        import keras

        return keras
    import tf_keras

    return tf_keras


def adam(kind: str) -> Any:
    """Keras' Adam of that generation."""
    optimizers = framework(kind).optimizers
    return (optimizers.legacy if kind == "tf_keras_legacy" else optimizers).Adam(0.03, epsilon=1e-8)


def numpy_of(tensor: Any) -> Array:
    """A tensor's values; those of bfloat16 as float32, which NumPy has."""
    tensor = tensor.detach()
    return (tensor.float() if str(tensor.dtype) == "torch.bfloat16" else tensor).numpy()


@dataclass(kw_only=True)
class TorchRun:
    """A PyTorch model with the state of an optimizer."""

    model: Any
    optimizer: Any
    extra: Mapping[str, Any] = field(default_factory=dict)

    @property
    def arrays(self) -> dict[str, Array]:
        return {name: numpy_of(tensor) for name, tensor in self.model.state_dict().items()}

    def slots(self, name: str) -> dict[str, Array]:
        """Adam's moments of a parameter, {} where it has none."""
        state = self.optimizer.state.get(self.model.get_parameter(name), {})
        return {slot: numpy_of(state[slot]) for slot in ("exp_avg", "exp_avg_sq") if slot in state}

    def save(self, path: Path) -> Path:
        import torch

        path.parent.mkdir(parents=True, exist_ok=True)
        state = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(), **self.extra}
        torch.save(state, path)
        return path

    def load(self, path: Path) -> TorchRun:
        import torch

        state = torch.load(path, weights_only=True)
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        return self


@dataclass(kw_only=True)
class KerasRun:
    """A Keras model with the state of an optimizer."""

    kind: str
    model: Any
    optimizer: Any

    def slots(self, variable: Any) -> dict[str, Array]:
        """Adam's moments of a variable, {} where the optimizer does not know it."""
        if self.kind == "tf_keras_legacy":
            known = {id(v) for v in self.model.trainable_variables}
            if id(variable) not in known:
                return {}
            return {
                "exp_avg": self.optimizer.get_slot(variable, "m").numpy(),
                "exp_avg_sq": self.optimizer.get_slot(variable, "v").numpy(),
            }
        ours = [id(v) for v in self.model.trainable_variables]
        if id(variable) not in ours:
            return {}
        at = ours.index(id(variable))
        return {
            "exp_avg": self.optimizer._momentums[at].numpy(),
            "exp_avg_sq": self.optimizer._velocities[at].numpy(),
        }

    def save(self, path: Path) -> Path:
        import tensorflow as tf

        path.parent.mkdir(parents=True, exist_ok=True)
        return Path(tf.train.Checkpoint(model=self.model, optimizer=self.optimizer).save(str(path)))

    def load(self, path: Path) -> KerasRun:
        import tensorflow as tf

        tf.train.Checkpoint(model=self.model, optimizer=self.optimizer).restore(str(path)).assert_consumed()
        return self


def torch_run(model: Any, seed: int, *, optimizer: Any = None, without: Iterable[str] = ()) -> TorchRun:
    """Random values for everything; no optimizer state for the parameters `without` a gradient."""
    import torch

    rng = np.random.default_rng(seed)
    optimizer = optimizer or torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.02)
    without = set(without)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name.endswith("num_batches_tracked"):
                tensor.fill_(int(rng.integers(1000, 2000)))
            else:
                tensor.copy_(
                    torch.from_numpy(rng.normal(size=tensor.shape)) + (3.0 if "var" in name else 0.0)
                )
        for name, parameter in model.named_parameters():
            parameter.grad = None if name in without else torch.ones_like(parameter)
        held = [tensor.clone() for tensor in model.parameters()]
        optimizer.step()
        for tensor, value in zip(model.parameters(), held, strict=True):
            tensor.copy_(value)
            tensor.grad = None
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                state = optimizer.state.get(parameter)
                if not state:
                    continue
                state["step"].fill_(STEP)
                shape = parameter.shape
                state["exp_avg"].copy_(torch.from_numpy(rng.normal(size=shape)))
                state["exp_avg_sq"].copy_(torch.from_numpy(rng.uniform(0.5, 2.0, size=shape)))
    return TorchRun(model=model, optimizer=optimizer)


def keras_run(kind: str, model: Any, seed: int, *, step: int = STEP, optimizer: Any = None) -> KerasRun:
    """Random values for everything, and an optimizer that has made its variables."""
    rng = np.random.default_rng(seed)
    optimizer = optimizer or adam(kind)
    for variable in model.variables:
        variable.assign(rng.normal(size=variable.shape) + (3.0 if "variance" in variable.name else 0.0))
    if kind == "tf_keras_legacy":
        assert int(optimizer.iterations) == 0
        optimizer._create_all_weights(model.trainable_variables)
        for variable in model.trainable_variables:
            for slot, low in (("m", -1.0), ("v", 0.5)):
                optimizer.get_slot(variable, slot).assign(rng.uniform(low, 2.0, size=variable.shape))
    else:
        optimizer.build(model.trainable_variables)
        for variables, low in ((optimizer._momentums, -1.0), (optimizer._velocities, 0.5)):
            for variable in variables:
                variable.assign(rng.uniform(low, 2.0, size=variable.shape))
    optimizer.iterations.assign(step)
    return KerasRun(kind=kind, model=model, optimizer=optimizer)


def assert_equal(
    ours: TorchRun, theirs: KerasRun, rows: Sequence[Row], *, fresh_slots: Iterable[str] = ()
) -> None:
    """Every parameter, statistic and slot of both runs, by the table; the table itself must be complete.

    `fresh_slots`: parameters without state in PyTorch, whose slots are 0 in Keras.
    """
    arrays = ours.arrays
    named = {row.torch for row in rows}
    assert {name for name in arrays if not name.endswith("num_batches_tracked")} == named
    variables = [row.keras(theirs.model) for row in rows]
    assert {id(v) for v in variables} == {id(v) for v in theirs.model.variables if "seed" not in v.name}
    fresh, trainable = (
        set(fresh_slots),
        {name for name, _ in ours.model.named_parameters(remove_duplicate=False)},
    )
    for row, variable in zip(rows, variables, strict=True):
        want_array = row.to_keras(arrays[row.torch])
        assert variable.numpy().shape == want_array.shape
        np.testing.assert_array_equal(variable.numpy(), want_array, err_msg=row.torch)
        have = theirs.slots(variable)
        want = ours.slots(row.torch) if row.torch in trainable else {}
        if row.torch in fresh:
            assert not want
            want = {slot: np.zeros_like(arrays[row.torch]) for slot in have}
            assert have
        assert have.keys() == want.keys(), row.torch
        for slot, array in want.items():
            assert row.torch in fresh or np.any(array) or not array.size
            np.testing.assert_array_equal(have[slot], row.to_keras(array), err_msg=f"{row.torch} {slot}")
    assert int(theirs.optimizer.iterations) == STEP


def assert_resumes_alike(ours: TorchRun, theirs: KerasRun, rows: Sequence[Row], x: Array) -> None:
    """Both runs, equal now, do three steps on the same batch and are equal again, up to rounding."""
    import tensorflow as tf
    import torch

    before = {name: value.copy() for name, value in ours.arrays.items()}
    ours.model.train()
    for _ in range(3):
        ours.optimizer.zero_grad()
        torch.square(ours.model(torch.from_numpy(x))).mean().backward()
        ours.optimizer.step()
        variables = theirs.model.trainable_variables
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(tf.square(theirs.model(tf.constant(x), training=True)))
        gradients = [tf.convert_to_tensor(gradient) for gradient in tape.gradient(loss, variables)]
        theirs.optimizer.apply_gradients(zip(gradients, variables, strict=True))
    trainable = {name for name, p in ours.model.named_parameters(remove_duplicate=False) if p.requires_grad}
    for row in rows:
        value = row.to_keras(ours.arrays[row.torch])
        np.testing.assert_allclose(row.keras(theirs.model).numpy(), value, rtol=1e-4, atol=2e-6)
        moved = np.abs(ours.arrays[row.torch] - before[row.torch]).max()
        assert moved > 1e-4 if row.torch in trainable else moved == 0, row.torch


def both_ways(
    torch_model: Callable[[], Any],
    keras_model: Callable[[], Any],
    rows: Sequence[Row],
    folder: Path,
    *,
    kind: str = "keras3",
    allow: Sequence[str] = (),
    without: Sequence[str] = (),
    batch: Array | None = None,
) -> None:
    """Convert a run of either framework onto a fresh template of the other, and compare everything.

    `without`: parameters that never got a gradient in PyTorch. `batch`: what both runs go on with.
    """
    allowed = [argument for code in allow for argument in ("--allow", code)]
    ours = torch_run(torch_model(), 1, without=without)
    template = keras_run(kind, keras_model(), 2, step=0).save(folder / "fresh" / "ckpt")
    converted = convert_here(ours.save(folder / "run.pt"), folder / "out-1", "--template", template, *allowed)
    resumed_there = keras_run(kind, keras_model(), 3, step=0).load(converted)
    assert_equal(ours, resumed_there, rows, fresh_slots=without)
    if batch is not None:
        assert_resumes_alike(ours, resumed_there, rows, batch)

    theirs = keras_run(kind, keras_model(), 4)
    fresh = torch_run(torch_model(), 5).save(folder / "fresh.pt")
    source = theirs.save(folder / "run" / "ckpt")
    converted = convert_here(source, folder / "out.pt", "--template", fresh, *allowed)
    resumed = torch_run(torch_model(), 6).load(converted)
    assert_equal(resumed, theirs, rows)
    assert steps(resumed) == {STEP}
    if batch is not None:
        assert_resumes_alike(resumed, theirs, rows, batch)


def ledger(report: Path) -> dict[str, dict[str, Any]]:
    """The entries of a report by their item, `param/0.weight`."""
    entries = json.loads(report.read_text())["ledger"]
    return {"/".join(map(str, entry["item"])): entry for entry in entries}


def codes(problems: Iterable[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """(code, last part of the place) of problems, sorted."""
    return sorted((problem["code"], str(problem["loc"][-1])) for problem in problems)


def steps(run: TorchRun) -> set[int]:
    """The steps of the parameters that have state."""
    return {int(state["step"]) for state in run.optimizer.state.values() if state}
