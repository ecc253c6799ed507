"""Each schedule family resumed half-way, in both directions, through files that the frameworks wrote.

A run of `DONE` updates is saved, converted and taken up again by the other framework; the rates of its next
`NEXT` updates are those that the first one goes on with. The lines that a report prints are run as they
stand. One table, `FAMILIES`, has all of the catalog.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

import ckptconv
from ckptconv.catalog import schedules
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
Built = Callable[[Any, str], Any]
"""The package's schedules, and its name for `ckptconv.keras` -> a schedule."""


def warm_up(optimizer: Any) -> Any:
    parts = [S.LinearLR(optimizer, 0.1, total_iters=10), S.CosineAnnealingLR(optimizer, 60, eta_min=0.002)]
    return S.SequentialLR(optimizer, parts, [10])


def three_parts(optimizer: Any) -> Any:
    parts = [S.ConstantLR(optimizer, 0.5, 4), S.StepLR(optimizer, 5, 0.7), S.ExponentialLR(optimizer, 0.95)]
    return S.SequentialLR(optimizer, parts, [6, 30])


def other_parts(optimizer: Any) -> Any:
    parts = [S.ConstantLR(optimizer, 0.1, 9), S.StepLR(optimizer, 2, 0.2), S.ExponentialLR(optimizer, 0.5)]
    return S.SequentialLR(optimizer, parts, [2, 4])


def chained(optimizer: Any) -> Any:
    return S.ChainedScheduler([S.ConstantLR(optimizer, 0.1, 20), S.ExponentialLR(optimizer, 0.97)])


def one_cycle(optimizer: Any) -> Any:
    return S.OneCycleLR(optimizer, 0.4, total_steps=90, cycle_momentum=False)


def one_cycle_linear(optimizer: Any) -> Any:
    return S.OneCycleLR(
        optimizer, 0.4, total_steps=90, cycle_momentum=False, three_phase=True, anneal_strategy="linear"
    )


def three_in_keras(k: Any, package: str) -> Any:
    parts = [
        k.PiecewiseConstantDecay([3], [BASE / 2, BASE]),
        k.ExponentialDecay(BASE, 5, 0.7, staircase=True),
        k.ExponentialDecay(BASE, 1, 0.95),
    ]
    return ckptconv.keras.sequential(parts, [6, 30], package=package)


def chained_in_keras(k: Any, package: str) -> Any:
    parts = [k.PiecewiseConstantDecay([19], [0.1, 1.0]), k.ExponentialDecay(1.0, 1, 0.97)]
    return ckptconv.keras.chained(BASE, parts, package=package)


def line_and_restarts(optimizer: Any) -> Any:
    line = S.LinearLR(optimizer, 0.2, total_iters=9)
    return S.SequentialLR(optimizer, [line, S.CosineAnnealingWarmRestarts(optimizer, 20)], [12])


class Waves:
    """A schedule of a user's own class."""

    def __init__(self, base: Any) -> None:
        self.base = base

    def __call__(self, step: Any) -> Any:
        return BASE * (1.5 + tf.sin(tf.cast(step, tf.float32) / 5)) / 2.5

    def get_config(self) -> dict[str, Any]:
        return {}


def of_ones_own(k: Any, _: str) -> Any:
    return type("Waves", (Waves, k.LearningRateSchedule), {})(BASE)


@dataclass(frozen=True, kw_only=True)
class Case:
    """One schedule, as torch's classes and as Keras': the same rates, unless one of them is missing."""

    family: str
    """Key of the schedule table."""
    torch: Made | None = None
    keras: Built | None = None
    template: Made | None = None
    """The torch class that goes on with Keras', with other numbers."""
    climbs: int | None = None
    """Index of the minimum, from which torch's cosine climbs again and Keras' does not."""
    live: bool = False
    """Whether the file does not hold it, so that the live object's table is the source spec."""
    uncounted: tuple[str, ...] = field(default=())
    """Keys of torch's state that do not follow from where the schedule stands."""


FAMILIES: Mapping[str, Case] = {
    "step": Case(
        family="step",
        torch=lambda o: S.StepLR(o, 6, 0.5),
        keras=lambda k, _: k.ExponentialDecay(BASE, 6, 0.5, staircase=True),
        template=lambda o: S.StepLR(o, 2, 0.9),
    ),
    "multi-step": Case(
        family="multi-step",
        torch=lambda o: S.MultiStepLR(o, [3, 9, 20], 0.4),
        keras=lambda k, _: k.PiecewiseConstantDecay([2, 8, 19], [BASE * 0.4**i for i in range(4)]),
        template=lambda o: S.MultiStepLR(o, [1], 0.9),
    ),
    "multi-step-twice": Case(family="multi-step", torch=lambda o: S.MultiStepLR(o, [3, 9, 9, 20], 0.4)),
    "exponential": Case(
        family="exponential",
        torch=lambda o: S.ExponentialLR(o, 0.93),
        keras=lambda k, _: k.ExponentialDecay(BASE, 1, 0.93),
        template=lambda o: S.ExponentialLR(o, 0.8),
    ),
    "exponential-by-nine": Case(
        family="exponential",
        keras=lambda k, _: k.ExponentialDecay(BASE, 9, 0.5),
        template=lambda o: S.ExponentialLR(o, 0.8),
    ),
    "cosine": Case(
        family="cosine",
        torch=lambda o: S.CosineAnnealingLR(o, 60, eta_min=0.003),
        keras=lambda k, _: k.CosineDecay(BASE, 60, alpha=0.03),
        template=lambda o: S.CosineAnnealingLR(o, 5),
        climbs=60,
    ),
    "cosine-restarts": Case(
        family="cosine-restarts",
        torch=lambda o: S.CosineAnnealingWarmRestarts(o, 9, 1, eta_min=0.001),
        keras=lambda k, _: k.CosineDecayRestarts(BASE, 9, t_mul=1.0, alpha=0.01),
        template=lambda o: S.CosineAnnealingWarmRestarts(o, 3),
    ),
    "cosine-restarts-growing": Case(
        family="cosine-restarts",
        torch=lambda o: S.CosineAnnealingWarmRestarts(o, 5, 2, eta_min=0.001),
        keras=lambda k, _: k.CosineDecayRestarts(BASE, 5, t_mul=2.0, alpha=0.01),
        template=lambda o: S.CosineAnnealingWarmRestarts(o, 3),
    ),
    "polynomial": Case(
        family="polynomial",
        torch=lambda o: S.PolynomialLR(o, 40, 2.0),
        keras=lambda k, _: k.PolynomialDecay(BASE, 40, 0.0, power=2.0),
        template=lambda o: S.PolynomialLR(o, 3),
    ),
    "linear": Case(
        family="linear",
        torch=lambda o: S.LinearLR(o, 0.2, 1.0, 30),
        keras=lambda k, _: k.PolynomialDecay(0.02, 30, BASE, power=1.0),
        template=lambda o: S.LinearLR(o, 0.7),
    ),
    "linear-down": Case(
        family="linear",
        torch=lambda o: S.LinearLR(o, 1.0, 0.2, 30),
        keras=lambda k, _: k.PolynomialDecay(BASE, 30, 0.02),
        template=lambda o: S.LinearLR(o, 0.7),
    ),
    "constant": Case(
        family="constant",
        torch=lambda o: S.ConstantLR(o, 0.3, 15),
        keras=lambda k, _: k.PiecewiseConstantDecay([14], [0.03, BASE]),
        template=lambda o: S.ConstantLR(o),
    ),
    "warm-up": Case(
        family="sequential",
        torch=warm_up,
        keras=lambda k, _: k.CosineDecay(0.01, 60, alpha=0.02, warmup_target=BASE, warmup_steps=10),
        template=lambda o: S.SequentialLR(o, [S.LinearLR(o), S.CosineAnnealingLR(o, 9)], [3]),
        climbs=70,
    ),
    "sequential": Case(family="sequential", torch=three_parts, keras=three_in_keras, template=other_parts),
    "sequential-line": Case(
        family="sequential",
        torch=line_and_restarts,
        keras=lambda k, package: ckptconv.keras.sequential(
            [k.PolynomialDecay(0.02, 9, BASE), k.CosineDecayRestarts(BASE, 20, t_mul=1.0)],
            [12],
            package=package,
        ),
        template=lambda o: S.SequentialLR(o, [S.LinearLR(o), S.CosineAnnealingWarmRestarts(o, 9)], [3]),
    ),
    "chained": Case(
        family="chained",
        torch=chained,
        keras=chained_in_keras,
        template=lambda o: S.ChainedScheduler([S.ConstantLR(o), S.ExponentialLR(o, 0.5)]),
    ),
    "one-cycle": Case(
        family="one-cycle",
        torch=one_cycle,
        keras=lambda _, package: ckptconv.keras.one_cycle(
            90, [(26.0, 0.016, 0.4), (89.0, 0.4, 1.6e-6)], package=package
        ),
        template=lambda o: S.OneCycleLR(o, 0.9, total_steps=9, cycle_momentum=False),
    ),
    "one-cycle-linear": Case(
        family="one-cycle",
        torch=one_cycle_linear,
        keras=lambda _, package: ckptconv.keras.one_cycle(
            90,
            [(26.0, 0.016, 0.4), (52.0, 0.4, 0.016), (89.0, 0.016, 1.6e-6)],
            "linear",
            package=package,
        ),
        template=lambda o: S.OneCycleLR(o, 0.9, total_steps=9, cycle_momentum=False, three_phase=True),
    ),
    "inverse-time": Case(
        family="inverse-time",
        torch=lambda o: S.LambdaLR(o, lambda t: 1 / (1 + 0.7 * t / 10)),
        keras=lambda k, _: k.InverseTimeDecay(BASE, 10, 0.7),
        template=lambda o: S.LambdaLR(o, lambda t: 0.5**t),
        live=True,
    ),
    "inverse-time-stairs": Case(
        family="inverse-time",
        keras=lambda k, _: k.InverseTimeDecay(BASE, 10, 0.7, staircase=True),
        template=lambda o: S.LambdaLR(o, lambda t: 0.5**t),
    ),
    "piecewise": Case(
        family="piecewise",
        keras=lambda k, _: k.PiecewiseConstantDecay([3, 11, 30], [BASE, 0.07, 0.06, 0.01]),
        template=lambda o: S.LambdaLR(o, lambda t: 0.5**t),
    ),
    "polynomial-to-an-end": Case(
        family="polynomial",
        keras=lambda k, _: k.PolynomialDecay(BASE, 30, 0.02, power=2.0),
        template=lambda o: S.LambdaLR(o, lambda t: 0.5**t),
    ),
    "lambda": Case(
        family="lambda",
        torch=lambda o: S.LambdaLR(o, lambda t: 0.95**t),
        keras=of_ones_own,
        template=lambda o: S.LambdaLR(o, lambda t: 0.5**t),
        live=True,
    ),
    "multiplicative": Case(
        family="lambda", torch=lambda o: S.MultiplicativeLR(o, lambda t: 0.9 + 0.01 * (t % 9)), live=True
    ),
    "cyclic": Case(
        family="cyclic",
        torch=lambda o: S.CyclicLR(o, 0.01, 0.2, 7, cycle_momentum=False),
        live=True,
    ),
    "swa": Case(family="swa", torch=lambda o: torch.optim.swa_utils.SWALR(o, 0.01, 9), live=True),
}

TORCH: dict[str, Made] = {
    name: case.torch for name, case in FAMILIES.items() if case.torch is not None and not case.live
}


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
    state: dict[str, Any] = torch.load(path, weights_only=True)
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    scheduler.load_state_dict(state["scheduler"])
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


def both(names: list[str]) -> list[Any]:
    """(family, package) of each: Keras 3 in the quick suite, tf_keras beside it."""
    slow = {"tf_keras": [pytest.mark.slow]}
    return [pytest.param(n, p, marks=slow.get(p, [])) for n in names for p in PACKAGES]


@pytest.mark.parametrize(
    ("name", "package"), both([name for name, case in FAMILIES.items() if case.torch is not None])
)
def test_torch_to_keras(name: str, package: str, tmp_path: Path) -> None:
    case = FAMILIES[name]
    assert case.torch is not None
    live = torch_objects(case.torch)
    torch_steps(*live, DONE)
    source = written(tmp_path / "run.pt", *live)
    spec = ckptconv.pytorch.describe(*live, remaining=NEXT) if case.live else None
    lib = PACKAGES[package]
    other = lib.optimizers.schedules.ExponentialDecay(1.0, 5, 0.5)
    template = fresh_keras(tmp_path / "fresh", other, package)
    report = ckptconv.convert(source, tmp_path / "ckpt", template=template, source_spec=spec)
    model, optimizer = keras_model(package, schedule_of(report))
    tf.train.Checkpoint(model=model, optimizer=optimizer).read(str(tmp_path / "ckpt")).assert_consumed()
    assert int(optimizer.iterations) == DONE
    close(keras_steps(model, optimizer, NEXT), torch_steps(*live, NEXT))
    assert int(optimizer.iterations) == DONE + NEXT
    assert any("learning_rate=learning_rate" in line for line in report.target_requires)


@pytest.mark.parametrize(
    ("name", "package"), both([name for name, case in FAMILIES.items() if case.keras is not None])
)
@pytest.mark.parametrize("at", [DONE, pytest.param(25, marks=pytest.mark.slow)])
def test_keras_to_torch(name: str, package: str, at: int, tmp_path: Path) -> None:
    case = FAMILIES[name]
    assert case.keras is not None
    assert case.template is not None
    schedule = case.keras(PACKAGES[package].optimizers.schedules, package)
    model, optimizer = keras_model(package, schedule)
    keras_steps(model, optimizer, at)
    source = saved(tmp_path / "ckpt", model, optimizer)
    spec = ckptconv.keras.describe(model, optimizer, remaining=NEXT)
    live = torch_template(tmp_path / "fresh.pt", case.template)
    report = ckptconv.convert(source, tmp_path / "run.pt", template=tmp_path / "fresh.pt", source_spec=spec)
    if value_of_family(tmp_path / "fresh.pt") == "lambda":
        live = torch_objects(scheduler_of(report))
    state = resumed(tmp_path / "run.pt", *live)
    count = NEXT if case.climbs is None else min(NEXT, case.climbs + 1 - at)
    close(torch_steps(*live, count), keras_steps(model, optimizer, count))
    assert [line for line in report.target_requires if "climbs" in line] == (
        [
            f"# scheduler: the same up to tick {case.climbs}; "
            "then torch's rate climbs again, the source's stays"
        ]
        if case.climbs
        else []
    )
    consistent(state, at)
    if case.torch is not None and not case.live:
        like_torchs_own(state, case, at)


def value_of_family(path: Path) -> str:
    return ckptconv.open(path).schedules[0].family


def consistent(state: dict[str, Any], at: int) -> None:
    """What torch keeps of a schedule in two places is the same in both."""
    group, scheduler = state["optimizer"]["param_groups"][0], state["scheduler"]
    for one in (scheduler, *scheduler.get("_schedulers", [])):
        assert one.get("base_lrs", [group["initial_lr"]]) == [group["initial_lr"]]
        assert one.get("_get_lr_called_within_step", False) is False
        assert one.get("_is_initial", False) is False
    assert scheduler["_last_lr"] == [group["lr"]]
    assert scheduler.get("last_epoch", at) == at
    if "_step_count" in scheduler and "T_cur" not in scheduler:
        assert scheduler["_step_count"] == at + 1


def like_torchs_own(state: dict[str, Any], case: Case, at: int) -> None:
    """Every key of the scheduler and of its group has what torch's own class has there."""
    assert case.torch is not None
    model, optimizer, scheduler = torch_objects(case.torch)
    torch_steps(model, optimizer, scheduler, at)
    same(scheduler.state_dict(), state["scheduler"], 1e-6, 1e-8)
    rates = ("lr", "initial_lr", "max_lr", "min_lr")
    ours, theirs = state["optimizer"]["param_groups"][0], optimizer.param_groups[0]
    assert {name for name in rates if name in ours} == {name for name in rates if name in theirs}
    same([theirs[n] for n in rates if n in theirs], [ours[n] for n in rates if n in ours], 1e-6)


def test_every_family_is_resumed() -> None:
    told = {case.family for case in FAMILIES.values()} | {"plateau"}
    assert told == set(schedules.families())
