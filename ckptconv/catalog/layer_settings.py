"""Numbers that a layer computes with beside its variables, under one name and in one convention.

A column says how a framework calls the number, what its class takes where nothing is given (`default`), what
it computes with where that is None (`none`), and whether it is one minus the number (`complement`): torch's
momentum is the share of the new batch, Keras' that of the old average.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from ckptconv.catalog.loading import Record

_ALIKE = 1e-6
"""Relative difference within which two numbers are one: a file may hold it in float32."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """One framework's argument."""

    key: str
    default: float
    none: float | None
    complement: bool

    def read(self, read: Callable[[str], object]) -> float | None:
        """The number of a layer whose arguments `read` gives; None where it tells none."""
        value = read(self.key)
        if value is None:
            value = self.none
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            return None
        return self._turned(float(value))

    def argument(self, value: float) -> float:
        """The number as the framework's constructor takes it."""
        return self._turned(value)

    @property
    def usual(self) -> float:
        """What a layer has where nothing is given."""
        return self._turned(self.default)

    def _turned(self, value: float) -> float:
        return float(f"{1 - value:.12g}") if self.complement else value


Settings = Mapping[str, Setting]
"""Canonical name -> the framework's argument."""


def settings_of(record: Record) -> dict[str, dict[str, Setting]]:
    """Framework -> its arguments, of a kind's `settings`."""
    found: dict[str, dict[str, Setting]] = {}
    for name, entry in record.records("settings"):
        for framework in entry.keys:
            column = entry.record(framework)
            found.setdefault(framework, {})[name] = Setting(
                key=column.text("key"),
                default=column.number("default"),
                none=column.number("none") if column.has("none") else None,
                complement=column.flag("complement", False),
            )
            column.close()
    return found


def alike(one: float, other: float) -> bool:
    """Whether two numbers are one setting."""
    return math.isclose(one, other, rel_tol=_ALIKE)
