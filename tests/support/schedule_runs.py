"""Small runs under a schedule, of PyTorch and of Keras: made, saved, taken up again, and their rates."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import ckptconv
from ckptconv.errors import CkptError
from ckptconv.report import Report

torch = pytest.importorskip("torch")
tf = pytest.importorskip("tensorflow")
keras = pytest.importorskip("keras")
tf_keras = pytest.importorskip("tf_keras")

S = torch.optim.lr_scheduler
K = keras.optimizers.schedules
DONE, NEXT, BASE = 7, 50, 0.1
PACKAGES = {"keras": keras, "tf_keras": tf_keras}
SCHEDULE = ("schedules", "scheduler")

Made = Callable[[Any], Any]
"""A torch optimizer -> its scheduler."""


def torch_steps(model: Any, optimizer: Any, scheduler: Any, count: int) -> list[float]:
    """`count` updates on random batches; the rate of each."""
    rates = []
    for _ in range(count):
        optimizer.zero_grad()
        model(torch.randn(4, 3)).square().sum().backward()
        rates.append(float(optimizer.param_groups[0]["lr"]))
        optimizer.step()
        scheduler.step()
    return rates


def written(path: Path, model: Any, optimizer: Any, scheduler: Any, **extra: object) -> Path:
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    torch.save({**state, "scheduler": scheduler.state_dict(), **extra}, path)
    return path


def torch_objects(make: Made, lr: float = BASE) -> tuple[Any, Any, Any]:
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.Adam(model.parameters(), lr=lr, eps=1e-7)
    return model, optimizer, make(optimizer)


def torch_run(path: Path, make: Made, updates: int = DONE, **extra: object) -> tuple[Any, Any]:
    """A run of `updates` updates with a scheduler that steps with each, saved; the live objects."""
    live = torch_objects(make)
    torch_steps(*live, updates)
    written(path, *live, **extra)
    return live[1:]


def torch_rates(optimizer: Any, scheduler: Any, count: int = NEXT) -> list[float]:
    """The rates of the next updates."""
    rates = []
    for _ in range(count):
        rates.append(float(optimizer.param_groups[0]["lr"]))
        optimizer.step()
        scheduler.step()
    return rates


def torch_template(path: Path, make: Made) -> tuple[Any, Any, Any]:
    live = torch_objects(make, lr=0.5)
    written(path, *live)
    return live


def resumed(path: Path, model: Any, optimizer: Any, scheduler: Any) -> dict[str, Any]:
    state = loaded(path)
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    scheduler.load_state_dict(state["scheduler"])
    return state


def loaded(path: Path) -> dict[str, Any]:
    state: dict[str, Any] = torch.load(path, weights_only=True)
    return state


def keras_model(package: str, rate: Any) -> tuple[Any, Any]:
    """A built model and optimizer under a learning rate or a schedule."""
    lib = PACKAGES[package]
    model = lib.Sequential([lib.layers.Input((3,)), lib.layers.Dense(2)])
    optimizer = lib.optimizers.Adam(rate, epsilon=1e-7)
    optimizer.build(model.trainable_variables)
    return model, optimizer


def keras_steps(model: Any, optimizer: Any, count: int) -> list[float]:
    """`count` updates; the rate of each."""
    rates = []
    variables = model.trainable_variables
    for _ in range(count):
        follows = optimizer._learning_rate
        now = follows(optimizer.iterations) if callable(follows) else follows
        rates.append(float(now))
        optimizer.apply_gradients([(tf.random.normal(v.shape), v) for v in variables])
    return rates


def saved(path: Path, model: Any, optimizer: Any) -> Path:
    tf.train.Checkpoint(model=model, optimizer=optimizer).write(str(path))
    return path


def fresh_keras(path: Path, rate: Any, package: str = "keras") -> Path:
    return saved(path, *keras_model(package, rate))


def made_by(report: Report, name: str) -> Any:
    """What the report's lines make of `name`."""
    space: dict[str, Any] = {"keras": keras, "tf_keras": tf_keras, "ckptconv": ckptconv}
    lines = [
        line for line in report.target_requires if line.startswith(("import ", "learning_rate = ", name))
    ]
    exec("\n".join(lines), space)
    return space[name]


def schedule_of(report: Report) -> Any:
    return made_by(report, "learning_rate")


def scheduler_of(report: Report) -> Made:
    """The LambdaLR that the report's line makes."""
    lines = [line for line in report.target_requires if line.startswith(("import bisect", "torch.optim.lr"))]
    space: dict[str, Any] = {"torch": torch}
    exec("\n".join(lines[:-1]), space)
    return lambda optimizer: eval(lines[-1], {**space, "optimizer": optimizer})


def keras_rates(schedule: Any, start: int, count: int = NEXT) -> list[float]:
    return [float(schedule(tf.constant(start + i, tf.int64))) for i in range(count)]


def close(ours: list[float], theirs: list[float]) -> None:
    peak = max(map(abs, theirs))
    assert max(abs(a - b) for a, b in zip(ours, theirs, strict=True)) <= 1e-6 * peak


def same(a: object, b: object, rel: float = 0.0, abs_: float = 0.0) -> None:
    """Equal, keys in order; types too, but for numbers that are to be near each other."""
    if isinstance(a, dict) and isinstance(b, dict):
        assert list(a) == list(b)
        for key, value in a.items():
            same(value, b[key], rel, abs_)
    elif isinstance(a, (list, tuple)):
        assert isinstance(b, (list, tuple))
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            same(x, y, rel, abs_)
    elif isinstance(a, (int, float)) and not isinstance(a, bool) and rel:
        assert isinstance(b, (int, float))
        assert b == pytest.approx(a, rel=rel, abs=abs_)
    else:
        assert type(a) is type(b)
        assert a == b


def code_of(*arguments: Any, **options: Any) -> tuple[str, tuple[str | int, ...]]:
    with pytest.raises(CkptError) as caught:
        ckptconv.convert(*arguments, **options)
    (problem,) = caught.value.problems
    return problem.code, problem.loc
