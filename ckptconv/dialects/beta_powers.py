"""The powers of its betas that TF1's Adam keeps instead of a step: from them to a step, and back.

After t updates `beta1_power` is beta_1^(t+1) and `beta2_power` beta_2^(t+1), each multiplied once an update
in float32. The betas are constants of the program and in no file. So a step follows only under an assumption,
that of the class's defaults, and is taken only where both powers, each for itself, lead to the same whole
number. A power that has underflowed says nothing: TensorFlow flushes it to 0.

Uncertainty: every multiplication rounds by at most 2^-24, so that t is known to (t+1) 2^-24 / |ln beta|
updates; a power that leaves more than a quarter of an update open is not used.

Source: tensorflow v2.21 `python/training/adam.py`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from ckptconv.document import Candidate, Fact, Known, Unknown

BETAS = {"beta_1": 0.9, "beta_2": 0.999}
"""The class's defaults."""

_ROUNDING = 2.0**-24
_TINY = float(np.finfo(np.float32).tiny)
_ONE_BY_ONE = 1 << 20
"""Updates up to which the rounding of each is repeated; 0.999 has underflowed long before."""
_OPEN = 0.25
"""Of an update: a power that leaves more of it open tells no whole number."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """What one power tells, for one beta."""

    step: int | None
    uncertainty: float = 0.0
    """Updates that rounding leaves open."""
    why_not: str = ""


def read_power(power: float, beta: float) -> Reading:
    """The step that a power of this beta stands for."""
    if not _TINY <= power <= 1:
        return Reading(step=None, why_not=f"{power!r} has underflowed" if power < _TINY else "it is over 1")
    exact = math.log(power) / math.log(float(np.float32(beta))) - 1
    uncertainty = (exact + 1) * _ROUNDING / -math.log(beta)
    step = round(exact)
    if uncertainty > _OPEN:
        return Reading(step=None, why_not=f"rounding leaves {uncertainty:.2g} updates open")
    if step < 0 or abs(exact - step) > uncertainty + 0.001:
        return Reading(step=None, why_not=f"{power!r} is no whole power of {beta}")
    return Reading(step=step, uncertainty=uncertainty)


def derive(first: tuple[str, float], second: tuple[str, float]) -> Fact:
    """The step that both powers agree on, under the default betas; `first`, `second`: key and power."""
    readings = {
        name: read_power(power, BETAS[name]) for name, (_, power) in zip(BETAS, (first, second), strict=True)
    }
    steps = {reading.step for reading in readings.values()}
    if len(steps) == 1 and None not in steps:
        worst = max(reading.uncertainty for reading in readings.values())
        return Known(
            value=steps.pop(),
            status="derived",
            source=f"{first[0]}, {second[0]}",
            formula="ln(power) / ln(beta) - 1, the same from both powers, if beta_1 = 0.9 and beta_2 = 0.999 "
            f"(the class's defaults; the file holds no betas); rounding leaves {worst:.1g} updates open",
        )
    candidates, reasons = [], []
    for (name, reading), (key, _) in zip(readings.items(), (first, second), strict=True):
        if reading.step is None:
            reasons.append(f"'{key}' tells none ({reading.why_not})")
        else:
            reasons.append(f"'{key}' tells {reading.step} if {name} = {BETAS[name]}")
            condition = f"{name} is {BETAS[name]}, the class's default"
            candidates.append(Candidate(value=reading.step, source=key, condition=condition))
    return Unknown(
        reason="a step follows from Adam's powers only where both agree: " + "; ".join(reasons),
        candidates=tuple(candidates),
    )


def beta_of(power: float, step: int, name: str) -> float | None:
    """The beta whose power this is after that many updates: the default where it fits, else the only
    number of six digits that does; None where the power tells none.
    """
    if not _TINY <= power < 1 or step < 0:
        return None
    for beta in (BETAS[name], float(f"{power ** (1 / (step + 1)):.6g}")):
        if beta < 1 and abs(float(power_after(step, beta)) - power) <= 2 * _ROUNDING * (step + 2) * power:
            return beta
    return None


def power_after(step: int, beta: float) -> np.float32:
    """What the variable holds after that many updates: multiplied one by one, flushed to 0 on underflow."""
    if step >= _ONE_BY_ONE:
        power = np.float32(beta ** (step + 1))
    else:
        power = np.multiply.accumulate(np.full(step + 1, beta, np.float32))[-1]
    return np.float32(0) if power < _TINY else power
