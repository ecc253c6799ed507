"""The remaining rates of a live torch scheduler, for a schedule whose function no file holds.

A copy of the scheduler is stepped over a stand-in for its optimizer; the live ones stay as they are.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Sequence
from typing import Protocol

from ckptconv.catalog.schedule_rates import Curve
from ckptconv.errors import CkptError

_ALIKE = 1e-12
"""Relative difference within which two groups follow one table."""


class Stepped(Protocol):
    """A scheduler, as far as it is used here."""

    last_epoch: int

    def step(self) -> None: ...


class _Optimizer(Protocol):
    param_groups: list[dict[str, object]]


class _StandIn:
    """What a scheduler needs of its optimizer."""

    _opt_called = True

    def __init__(self, groups: Sequence[dict[str, object]]) -> None:
        self.param_groups = [{k: v for k, v in group.items() if k != "params"} for group in groups]

    def step(self) -> None:
        """Nothing: only its mark is asked for."""

    step._wrapped_by_lr_sched = True  # type: ignore[attr-defined]  # the mark that torch asks for


def table_of(scheduler: Stepped, optimizer: _Optimizer, remaining: int) -> Curve:
    """The next `remaining` rates over the base rate, the first that of the next update.

    Raises: usage for a number below 1; unsupported-feature where the scheduler cannot be copied or stepped
    so far, or where its groups do not follow one table.
    """
    if remaining < 1:
        raise CkptError.of(
            "usage",
            f"remaining is {remaining}",
            "Give the number of updates that the run is still to make.",
            loc=("remaining",),
        )
    stand_in = _StandIn(optimizer.param_groups)
    try:
        copied = copy.deepcopy(scheduler, {id(optimizer): stand_in})
        rows = [_factors(stand_in)]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for _ in range(remaining - 1):
                copied.step()
                rows.append(_factors(stand_in))
    except CkptError:
        raise
    except Exception as error:  # whatever the function of a scheduler raises
        raise _unsupported(f"a copy of the scheduler cannot be stepped {remaining} times: {error}") from error
    for row in rows:
        if any(not math.isclose(factor, row[0], rel_tol=_ALIKE) for factor in row):
            raise _unsupported("the groups follow different functions: one table cannot hold them")
    return Curve(
        family="lambda",
        parameters={"factors": tuple(row[0] for row in rows), "start": int(scheduler.last_epoch)},
    )


def _factors(optimizer: _StandIn) -> list[float]:
    """Rate over base rate, of each group."""
    factors = []
    for group in optimizer.param_groups:
        rate, base = float(group["lr"]), float(group.get("initial_lr", 0.0))  # type: ignore[arg-type]  # numbers
        if base == 0 or not math.isfinite(rate):
            raise _unsupported(f"a group's rate is {rate}, its base rate {base}")
        factors.append(rate / base)
    return factors


def _unsupported(message: str) -> CkptError:
    return CkptError.of(
        "unsupported-feature",
        message,
        "Leave remaining out; the schedule is then left to the target's code.",
        loc=("scheduler",),
    )
