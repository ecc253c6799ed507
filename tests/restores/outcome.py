"""What a restoring call left behind, in the words of the catalog's table."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

STEPS = 8
"""Updates of every run that is saved."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What the catalog says of a call."""

    step: str
    weights: str
    state: str
    signal: str


REFUSED = Outcome("refused", "kept", "zero", "error")


@dataclass(slots=True)
class Held:
    """What a program holds: of its counter None where it has none."""

    step: int | None
    weights: list[np.ndarray]
    state: list[np.ndarray] = field(default_factory=list)
    """The optimizer's arrays, in the order of the weights; those that it has not made are left out."""


Make = Callable[[Path], tuple[Path, Held]]
Call = Callable[[Path], Held]


def judged(call: Call, path: Path, saved: Held) -> Outcome:
    """Make a call that warns of nothing, and compare with what was saved."""
    try:
        found = call(path)
    except (AssertionError, KeyboardInterrupt):  # a test's own, and a person's
        raise
    except (
        BaseException
    ):  # whatever class the framework has for a refusal: that of torch's DCP is no Exception
        return REFUSED
    assert found.step in (None, 0, STEPS)
    return Outcome(
        step={None: "absent", 0: "zero", STEPS: "restored"}[found.step],
        weights=weights_are(found.weights, saved.weights),
        state=state_is(found.state, saved.state),
        signal="none",
    )


def weights_are(found: list[Any], saved: list[Any]) -> str:
    """`restored` or `kept`; a mixture is neither."""
    same = [np.array_equal(a, b) for a, b in zip(found, saved, strict=True)]
    if all(same):
        return "restored"
    assert not any(one for one, array in zip(same, saved, strict=True) if array.ndim > 1)
    return "kept"


def state_is(found: list[Any], saved: list[Any]) -> str:
    """`restored`, `zero` where nothing was put in place, or `wrong`."""
    same = [np.array_equal(a, b) for a, b in zip(found, saved, strict=False)]
    if saved and len(found) == len(saved) and all(same):
        return "restored"
    return "wrong" if any(array.any() for array in found) else "zero"
