"""The schedule table: families of schedules, their parameters, and what each framework calls them.

`data/schedules.json` says what each parameter means and which keys of a torch state_dict hold it. A tick is
one step of the schedule, in whatever unit it counts; index 0 is the rate of the first update everywhere.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cache

from ckptconv.catalog.loading import load

UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """One kind of schedule."""

    name: str
    definition: str
    parameters: Mapping[str, str]
    """Canonical name -> what it means."""
    classes: tuple[str, ...]
    """torch's classes; none where torch has only a `LambdaLR` for it."""
    keys: frozenset[str]
    """Keys of the state_dict that, all together, tell it."""
    native: Mapping[str, str]
    """Canonical name -> key of the state_dict, of parameters that are plain values there."""
    is_numeric: bool
    """Whether its state is numbers alone: then another object of the class goes on where it stood."""
    keras_class: str | None
    """The class of Keras or of this package that follows it; None where nothing does."""
    keras_exact: str
    """Where the two give the same rates, and where not."""


@cache
def _table() -> Mapping[str, Family]:
    record = load("schedules.json")
    record.text("source")
    table = {}
    for name, entry in record.records("families"):
        entry.text("source")
        torch = entry.record("torch")
        keras = entry.record("keras") if entry.has("keras") else None
        table[name] = Family(
            name=name,
            definition=entry.text("definition"),
            parameters=entry.text_map("parameters"),
            classes=torch.texts("classes"),
            keys=frozenset(torch.texts("keys")),
            native=torch.text_map("parameters"),
            is_numeric=torch.flag("numbers_alone", False),
            keras_class=keras.text("class") if keras is not None else None,
            keras_exact=keras.text("exact") if keras is not None else "",
        )
        for part in (torch, keras, entry):
            if part is not None:
                part.close()
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
    return next((name for name, row in _table().items() if row.keys and row.keys <= have), UNKNOWN)


def canonical(name: str, key: str) -> str:
    """The canonical name of a key of a family's state_dict; the key itself where the table has none."""
    row = family(name)
    return next((c for c, native in row.native.items() if native == key), key) if row is not None else key
