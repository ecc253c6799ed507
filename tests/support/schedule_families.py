"""The table of schedules that cross: each as torch's classes and as Keras'."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import ckptconv
from tests.support.schedule_runs import BASE, Made, S, tf, torch

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
