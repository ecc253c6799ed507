"""The schedule table: families of learning-rate schedules, and which keys tell them in a state.

A family is recognised and kept; no schedule is rebuilt in another framework yet.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cache

from ckptconv.catalog.loading import load


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """One kind of schedule."""

    name: str
    definition: str
    classes: tuple[str, ...]
    """torch's classes."""
    keys: frozenset[str]
    """Keys of the state_dict that, all together, tell it."""
    is_numeric: bool
    """Whether its state is numbers alone: then another object of the class goes on where it stood."""


@cache
def _table() -> Mapping[str, Family]:
    record = load("schedules.json")
    record.text("source")
    table = {}
    for name, entry in record.records("families"):
        entry.text("source")
        torch = entry.record("torch")
        table[name] = Family(
            name=name,
            definition=entry.text("definition"),
            classes=torch.texts("classes"),
            keys=frozenset(torch.texts("keys")),
            is_numeric=torch.flag("numbers_alone", False),
        )
        torch.close()
        entry.close()
    record.close()
    return table


def families() -> tuple[str, ...]:
    """Names of the families, the more telling first."""
    return tuple(_table())


def family(name: str) -> Family | None:
    """The table row; None where there is no such family."""
    return _table().get(name)


def infer(keys: Collection[str]) -> str:
    """The family of a torch scheduler's state_dict with these keys; `unknown` where none fits."""
    have = set(keys)
    return next((name for name, row in _table().items() if row.keys <= have), "unknown")
