"""The remaining rates of a live Keras schedule of a class that nobody else knows."""

from __future__ import annotations

import math
from collections.abc import Callable

from ckptconv.catalog.schedule_config import Declared
from ckptconv.catalog.schedule_rates import Curve
from ckptconv.errors import CkptError


def table_of(optimizer: object, remaining: int) -> Declared:
    """The next `remaining` rates over the largest of them, the first that of the next update.

    Raises: usage for a number below 1; unsupported-feature for a schedule that gives no such rates.
    """
    if remaining < 1:
        raise CkptError.of(
            "usage",
            f"remaining is {remaining}",
            "Give the number of updates that the run is still to make.",
            loc=("remaining",),
        )
    schedule = _schedule_of(optimizer)
    start = int(optimizer.iterations)  # type: ignore[attr-defined]  # of every Keras optimizer
    try:
        rates = [float(schedule(start + ahead)) for ahead in range(remaining)]  # type: ignore[arg-type]  # a scalar
    except Exception as error:  # whatever a user's schedule raises
        raise _unsupported(f"the schedule gives no rate from {start} on: {error}") from error
    base = max(rates, key=abs)
    if base == 0 or not all(map(math.isfinite, rates)):
        raise _unsupported(f"its next {remaining} rates are 0, or not finite")
    factors = tuple(rate / base for rate in rates)
    return Declared(curve=Curve(family="lambda", parameters={"factors": factors, "start": start}), base=base)


def _schedule_of(optimizer: object) -> Callable[[int], object]:
    """The schedule that an optimizer follows; the legacy classes have it among their hyperparameters."""
    for found in (
        getattr(optimizer, "_learning_rate", None),
        getattr(optimizer, "_hyper", {}).get("learning_rate"),
    ):
        if callable(found):
            schedule: Callable[[int], object] = found
            return schedule
    raise _unsupported("the optimizer follows no schedule that can be called")


def _unsupported(message: str) -> CkptError:
    return CkptError.of(
        "unsupported-feature",
        message,
        "Leave remaining out; the schedule is then left to the target's code.",
        loc=("optimizer",),
    )
