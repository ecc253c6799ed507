"""Each schedule family resumed half-way, in both directions: the next 50 learning rates of real schedulers.

torch's schedulers and Keras' schedules tell the rates; the lines that a report prints are run as they stand.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
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

Made = Callable[[Any], Any]


def warm_up(optimizer: Any) -> Any:
    parts = [S.LinearLR(optimizer, 0.1, total_iters=10), S.CosineAnnealingLR(optimizer, 60, eta_min=0.002)]
    return S.SequentialLR(optimizer, parts, [10])


def three_parts(optimizer: Any) -> Any:
    parts = [S.ConstantLR(optimizer, 0.5, 4), S.StepLR(optimizer, 5, 0.7), S.ExponentialLR(optimizer, 0.95)]
    return S.SequentialLR(optimizer, parts, [6, 30])


def chained(optimizer: Any) -> Any:
    return S.ChainedScheduler([S.ConstantLR(optimizer, 0.1, 20), S.ExponentialLR(optimizer, 0.97)])


def one_cycle(optimizer: Any) -> Any:
    return S.OneCycleLR(optimizer, 0.4, total_steps=60, cycle_momentum=False)


def one_cycle_linear(optimizer: Any) -> Any:
    return S.OneCycleLR(
        optimizer, 0.4, total_steps=60, cycle_momentum=False, three_phase=True, anneal_strategy="linear"
    )


TORCH: dict[str, Made] = {
    "step": lambda o: S.StepLR(o, 6, 0.5),
    "multi-step": lambda o: S.MultiStepLR(o, [3, 9, 9, 20], 0.4),
    "exponential": lambda o: S.ExponentialLR(o, 0.93),
    "cosine": lambda o: S.CosineAnnealingLR(o, 60, eta_min=0.003),
    "cosine-restarts": lambda o: S.CosineAnnealingWarmRestarts(o, 9, 1, eta_min=0.001),
    "cosine-restarts-growing": lambda o: S.CosineAnnealingWarmRestarts(o, 5, 2, eta_min=0.001),
    "polynomial": lambda o: S.PolynomialLR(o, 40, 2.0),
    "linear": lambda o: S.LinearLR(o, 0.2, 0.9, 30),
    "constant": lambda o: S.ConstantLR(o, 0.3, 15),
    "warm-up": warm_up,
    "sequential": three_parts,
    "chained": chained,
    "one-cycle": one_cycle,
    "one-cycle-linear": one_cycle_linear,
}


def torch_run(path: Path, make: Made, updates: int = DONE, **extra: object) -> tuple[Any, Any]:
    """A run of `updates` updates with a scheduler that steps with each, saved; the live objects."""
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.Adam(model.parameters(), lr=BASE, eps=1e-7)
    scheduler = make(optimizer)
    for _ in range(updates):
        optimizer.zero_grad()
        model(torch.randn(4, 3)).square().sum().backward()
        optimizer.step()
        scheduler.step()
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    torch.save({**state, "scheduler": scheduler.state_dict(), **extra}, path)
    return optimizer, scheduler


def torch_rates(optimizer: Any, scheduler: Any, count: int = NEXT) -> list[float]:
    """The rates of the next updates."""
    rates = []
    for _ in range(count):
        rates.append(float(optimizer.param_groups[0]["lr"]))
        optimizer.step()
        scheduler.step()
    return rates


def keras_model(package: str, rate: Any) -> tuple[Any, Any]:
    """A built model and optimizer under a learning rate or a schedule."""
    lib = PACKAGES[package]
    model = lib.Sequential([lib.layers.Input((3,)), lib.layers.Dense(2)])
    optimizer = lib.optimizers.Adam(rate, epsilon=1e-7)
    optimizer.build(model.trainable_variables)
    return model, optimizer


def saved(path: Path, model: Any, optimizer: Any) -> Path:
    tf.train.Checkpoint(model=model, optimizer=optimizer).write(str(path))
    return path


def schedule_of(report: Report) -> Any:
    """What the report's lines make `learning_rate`."""
    space: dict[str, Any] = {"keras": keras, "tf_keras": tf_keras, "ckptconv": ckptconv}
    lines = [line for line in report.target_requires if line.startswith(("import ", "learning_rate = "))]
    exec("\n".join(lines), space)
    return space["learning_rate"]


def keras_rates(schedule: Any, start: int, count: int = NEXT) -> list[float]:
    return [float(schedule(tf.constant(start + i, tf.int64))) for i in range(count)]


def close(ours: list[float], theirs: list[float]) -> None:
    peak = max(map(abs, theirs))
    assert max(abs(a - b) for a, b in zip(ours, theirs, strict=True)) <= 1e-6 * peak


def code_of(*arguments: Any, **options: Any) -> tuple[str, tuple[str | int, ...]]:
    with pytest.raises(CkptError) as caught:
        ckptconv.convert(*arguments, **options)
    (problem,) = caught.value.problems
    return problem.code, problem.loc


@pytest.mark.parametrize("package", PACKAGES)
@pytest.mark.parametrize("family", TORCH)
def test_torch_to_keras(family: str, package: str, tmp_path: Path) -> None:
    optimizer, scheduler = torch_run(tmp_path / "run.pt", TORCH[family])
    lib = PACKAGES[package]
    fresh = keras_model(package, lib.optimizers.schedules.ExponentialDecay(1.0, 5, 0.5))
    template = saved(tmp_path / "fresh", *fresh)
    report = ckptconv.convert(tmp_path / "run.pt", tmp_path / "ckpt", template=template)
    schedule = schedule_of(report)
    model, restored = keras_model(package, schedule)
    tf.train.Checkpoint(model=model, optimizer=restored).read(str(tmp_path / "ckpt")).assert_consumed()
    assert int(restored.iterations) == DONE
    close(keras_rates(schedule, DONE), torch_rates(optimizer, scheduler))
    if package == "keras":  # tf_keras computes it anew when it updates
        assert float(restored.learning_rate) == pytest.approx(keras_rates(schedule, DONE)[0], rel=1e-6)
    assert any("learning_rate=learning_rate" in line for line in report.target_requires)


KERAS: Mapping[str, tuple[Callable[[Any], Any], Made]] = {
    "step": (lambda k: k.ExponentialDecay(BASE, 6, 0.5, staircase=True), lambda o: S.StepLR(o, 2, 0.9)),
    "multi-step": (
        lambda k: k.PiecewiseConstantDecay([8, 20], [BASE, BASE * 0.4, BASE * 0.16]),
        lambda o: S.MultiStepLR(o, [1], 0.9),
    ),
    "exponential": (lambda k: k.ExponentialDecay(BASE, 9, 0.5), lambda o: S.ExponentialLR(o, 0.8)),
    "cosine": (lambda k: k.CosineDecay(BASE, 60, alpha=0.03), lambda o: S.CosineAnnealingLR(o, 5)),
    "cosine-restarts": (
        lambda k: k.CosineDecayRestarts(BASE, 9, t_mul=1.0, alpha=0.01),
        lambda o: S.CosineAnnealingWarmRestarts(o, 3),
    ),
    "polynomial": (lambda k: k.PolynomialDecay(BASE, 40, 0.0, power=2.0), lambda o: S.PolynomialLR(o, 3)),
    "linear": (lambda k: k.PolynomialDecay(0.02, 30, BASE, power=1.0), lambda o: S.LinearLR(o, 0.7)),
    "linear-down": (lambda k: k.PolynomialDecay(BASE, 30, 0.02), lambda o: S.LinearLR(o, 0.7)),
    "constant": (lambda k: k.PiecewiseConstantDecay([14], [0.03, BASE]), lambda o: S.ConstantLR(o)),
    "warm-up": (
        lambda k: k.CosineDecay(0.01, 60, alpha=0.02, warmup_target=BASE, warmup_steps=10),
        lambda o: S.SequentialLR(o, [S.LinearLR(o), S.CosineAnnealingLR(o, 9)], [3]),
    ),
}


CLIMBS = {"cosine": 60, "warm-up": 70}
"""Index of the minimum, from which torch's cosine climbs again and Keras' does not."""


def torch_template(path: Path, make: Made) -> tuple[Any, Any, Any]:
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.5, eps=1e-7)
    scheduler = make(optimizer)
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    torch.save({**state, "scheduler": scheduler.state_dict()}, path)
    return model, optimizer, scheduler


def resumed(path: Path, model: Any, optimizer: Any, scheduler: Any) -> dict[str, Any]:
    state: dict[str, Any] = torch.load(path, weights_only=True)
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    scheduler.load_state_dict(state["scheduler"])
    return state


@pytest.mark.parametrize("package", PACKAGES)
@pytest.mark.parametrize("family", KERAS)
@pytest.mark.parametrize("at", [DONE, 25])
def test_keras_to_torch(family: str, package: str, at: int, tmp_path: Path) -> None:
    make, theirs = KERAS[family]
    schedule = make(PACKAGES[package].optimizers.schedules)
    model, optimizer = keras_model(package, schedule)
    optimizer.iterations.assign(at)
    source = saved(tmp_path / "ckpt", model, optimizer)
    spec = ckptconv.keras.describe(model, optimizer)
    live = torch_template(tmp_path / "fresh.pt", theirs)
    report = ckptconv.convert(source, tmp_path / "run.pt", template=tmp_path / "fresh.pt", source_spec=spec)
    state = resumed(tmp_path / "run.pt", *live)
    end = CLIMBS.get(family)
    assert [line for line in report.target_requires if "climbs" in line] == (
        [f"# scheduler: the same up to tick {end}; then torch's rate climbs again, the source's stays"]
        if end
        else []
    )
    count = NEXT if end is None else min(NEXT, end + 1 - at)
    close(torch_rates(*live[1:], count), keras_rates(schedule, at, count))
    group = state["optimizer"]["param_groups"][0]
    assert state["scheduler"]["last_epoch"] == at
    assert state["scheduler"]["_last_lr"] == [group["lr"]]
    assert state["scheduler"].get("base_lrs", [group["initial_lr"]]) == [group["initial_lr"]]
    if "_step_count" in state["scheduler"] and family != "cosine-restarts":
        assert state["scheduler"]["_step_count"] == at + 1
