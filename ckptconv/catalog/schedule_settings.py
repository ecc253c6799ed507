"""What a caller says of schedules with `--set`: what a position counts, and what no Keras file holds."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from ckptconv.document import Value

UNIT = "schedule_unit"
"""The setting that says what a position counts."""

UNITS = ("update", "epoch", "micro-step")

STEPS_PER_EPOCH = "steps_per_epoch"
"""The setting that says how many updates an epoch has."""

PLATEAU: Mapping[str, str] = {"plateau_best": "best", "plateau_bad": "bad", "plateau_cooling": "cooling"}
"""Setting -> the parameter of a plateau that it tells."""


@dataclass(frozen=True, slots=True)
class _Number:
    """What a setting's number may be."""

    kind: str
    example: str
    lowest: float = -math.inf
    is_whole: bool = True


_NUMBERS: Mapping[str, _Number] = {
    STEPS_PER_EPOCH: _Number("a whole number from 1 on", "100", lowest=1),
    "plateau_best": _Number("a number", "0.31", is_whole=False),
    "plateau_bad": _Number("a whole number from 0 on", "2", lowest=0),
    "plateau_cooling": _Number("a whole number from 0 on", "0", lowest=0),
}

NAMES: tuple[str, ...] = (UNIT, *_NUMBERS)
"""All of these settings."""


def kind(name: str) -> str:
    """What the setting's value is, in words."""
    return " or ".join(f"'{unit}'" for unit in UNITS) if name == UNIT else _NUMBERS[name].kind


def example(name: str) -> str:
    """A value that the setting can have."""
    return UNITS[0] if name == UNIT else _NUMBERS[name].example


def parsed(name: str, text: str) -> Value:
    """The setting's value. Raises: ValueError where it can have no such value."""
    if name == UNIT:
        if text not in UNITS:
            raise ValueError(text)
        return text
    number = _NUMBERS[name]
    value = int(text) if number.is_whole else float(text)
    if value < number.lowest or not math.isfinite(value):
        raise ValueError(text)
    return value
