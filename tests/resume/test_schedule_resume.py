"""Adam under a cosine, taken up half-way by the other framework: the weights after more updates.

Distances are the largest difference of a weight relative to the largest distance that one has travelled since
the conversion. The controls have everything but the schedule, or have it one update ahead.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import ckptconv

torch = pytest.importorskip("torch")
tf = pytest.importorskip("tensorflow")
keras = pytest.importorskip("keras")

BASE, LENGTH, LOWEST, EPSILON = 0.02, 40, 0.001, 1e-7
BETAS = (0.875, 1 - 2**-10)
"""What float32 holds: Keras' corrections for bias go through it."""
BEFORE, AFTER = 15, 20
BOUND = {"float32": 2e-5, "float64": 1e-10}
NOTICED = 1e-3
"""A control's distance: an update's share of what is travelled."""

Live = tuple[Any, Any, Any]


@pytest.fixture(params=[pytest.param("float32", marks=pytest.mark.slow), "float64"])
def dtype(request: pytest.FixtureRequest) -> Iterator[str]:
    """The type of all weights, moments and rates."""
    was = keras.config.floatx(), keras.config.dtype_policy()
    keras.config.set_floatx(request.param)
    keras.config.set_dtype_policy(request.param)
    yield request.param
    keras.config.set_floatx(was[0])
    keras.config.set_dtype_policy(was[1])


def batches(first: int, count: int, dtype: str) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    for number in range(first, first + count):
        rng = np.random.default_rng(number)
        yield rng.normal(size=(8, 5)).astype(dtype), rng.normal(size=(8, 3)).astype(dtype)


def torch_live(dtype: str, scheduled: bool = True) -> Live:
    torch.manual_seed(1)
    parts = torch.nn.Linear(5, 7), torch.nn.Tanh(), torch.nn.Linear(7, 3)
    model = torch.nn.Sequential(*parts).to(getattr(torch, dtype))
    optimizer = torch.optim.Adam(model.parameters(), lr=BASE, betas=BETAS, eps=EPSILON)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, LENGTH, eta_min=LOWEST)
    return model, optimizer, cosine if scheduled else None


def torch_steps(live: Live, first: int, count: int, dtype: str) -> None:
    model, optimizer, scheduler = live
    for x, y in batches(first, count, dtype):
        optimizer.zero_grad()
        (model(torch.from_numpy(x)) - torch.from_numpy(y)).square().mean().backward()
        optimizer.step()
        if scheduler is not None:
            scheduler.step()


def torch_weights(model: Any) -> list[np.ndarray]:
    return [p.detach().numpy().T.copy() for p in model.parameters()]


def written(path: Path, live: Live) -> Path:
    model, optimizer, scheduler = live
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    torch.save({**state, **({"scheduler": scheduler.state_dict()} if scheduler else {})}, path)
    return path


def keras_live(rate: Any) -> tuple[Any, Any]:
    """A model and an Adam with PyTorch's epsilon, so that the schedule alone could differ."""
    layers = keras.layers
    model = keras.Sequential([layers.Input((5,)), layers.Dense(7, "tanh"), layers.Dense(3)])
    optimizer = ckptconv.keras.corrected_epsilon(keras.optimizers.Adam(rate, *BETAS), EPSILON)
    optimizer.build(model.trainable_variables)
    return model, optimizer


def keras_steps(model: Any, optimizer: Any, first: int, count: int, dtype: str) -> None:
    for x, y in batches(first, count, dtype):
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(tf.square(model(tf.constant(x)) - y))
        optimizer.apply(tape.gradient(loss, model.trainable_variables), model.trainable_variables)


def saved(path: Path, live: tuple[Any, Any]) -> Path:
    tf.train.Checkpoint(model=live[0], optimizer=live[1]).write(str(path))
    return path


def restored(path: Path, rate: Any) -> tuple[Any, Any]:
    live = keras_live(rate)
    tf.train.Checkpoint(model=live[0], optimizer=live[1]).read(str(path)).assert_consumed()
    return live


class Ahead(keras.optimizers.schedules.LearningRateSchedule):  # type: ignore[misc, name-defined]
    """A schedule that is one update too far."""

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.inner = inner

    def __call__(self, step: Any) -> Any:
        return self.inner(step + 1)


def distance(ours: list[np.ndarray], theirs: list[np.ndarray], start: list[np.ndarray]) -> float:
    moved = max(float(np.abs(a - b).max()) for a, b in zip(theirs, start, strict=True))
    return max(float(np.abs(a - b).max()) for a, b in zip(ours, theirs, strict=True)) / moved


def test_from_torch_to_keras(dtype: str, tmp_path: Path) -> None:
    live = torch_live(dtype)
    torch_steps(live, 0, BEFORE, dtype)
    start = torch_weights(live[0])
    source = written(tmp_path / "run.pt", live)
    other = saved(tmp_path / "fresh", keras_live(keras.optimizers.schedules.ExponentialDecay(1.0, 2, 0.5)))
    report = ckptconv.convert(source, tmp_path / "ckpt", template=other)
    (line,) = [line for line in report.target_requires if line.startswith("learning_rate = ")]
    assert ("import numpy" in report.target_requires) == (dtype == "float64")
    schedule = eval(line.partition(" = ")[2], {"keras": keras, "numpy": np})
    plain = saved(tmp_path / "plain", keras_live(0.5))
    ckptconv.convert(source, tmp_path / "frozen", template=plain, allow=["schedule-unsupported"])
    resumed = {
        "converted": restored(tmp_path / "ckpt", schedule),
        "dropped": restored(tmp_path / "frozen", 0.5),
        "ahead": restored(tmp_path / "ckpt", Ahead(schedule)),
    }
    torch_steps(live, BEFORE, AFTER, dtype)
    found = {}
    for name, (model, optimizer) in resumed.items():
        keras_steps(model, optimizer, BEFORE, AFTER, dtype)
        found[name] = distance(model.get_weights(), torch_weights(live[0]), start)
    assert found["converted"] < BOUND[dtype]
    assert min(found["dropped"], found["ahead"]) > NOTICED


def test_from_keras_to_torch(dtype: str, tmp_path: Path) -> None:
    model, optimizer = keras_live(
        keras.optimizers.schedules.CosineDecay(
            np.float64(BASE) if dtype == "float64" else BASE, LENGTH, alpha=LOWEST / BASE
        )
    )
    keras_steps(model, optimizer, 0, BEFORE, dtype)
    start = model.get_weights()
    source = saved(tmp_path / "ckpt", (model, optimizer))
    spec = ckptconv.keras.describe(model, optimizer)
    template = written(tmp_path / "fresh.pt", torch_live(dtype))
    ckptconv.convert(source, tmp_path / "run.pt", template=template, source_spec=spec)
    plain = written(tmp_path / "plain.pt", torch_live(dtype, scheduled=False))
    allow = ["schedule-unsupported"]
    ckptconv.convert(source, tmp_path / "frozen.pt", template=plain, source_spec=spec, allow=allow)
    keras_steps(model, optimizer, BEFORE, AFTER, dtype)
    found = {}
    for name, file in (("converted", "run.pt"), ("dropped", "frozen.pt"), ("ahead", "run.pt")):
        live = torch_live(dtype, scheduled=name != "dropped")
        state = torch.load(tmp_path / file, weights_only=True)
        live[0].load_state_dict(state["model"])
        live[1].load_state_dict(state["optimizer"])
        if name != "dropped":
            live[2].load_state_dict(state["scheduler"])
        if name == "ahead":
            live[1]._opt_called = True
            live[2].step()
        torch_steps(live, BEFORE, AFTER, dtype)
        found[name] = distance(torch_weights(live[0]), model.get_weights(), start)
    assert found["converted"] < BOUND[dtype]
    assert min(found["dropped"], found["ahead"]) > NOTICED
