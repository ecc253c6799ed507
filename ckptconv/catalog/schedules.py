"""The schedule table: families of schedules, their parameters, and what each framework calls them.

`data/schedules.json` says what each parameter means, which keys of a torch state_dict hold it, and what
becomes of the family in the other framework. A tick is one step of the schedule, in whatever unit it counts;
index 0 is the rate of the first update everywhere.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Literal, cast, get_args

from ckptconv.catalog.loading import Record, load

UNKNOWN = "unknown"
"""The source does not tell the family."""

CUSTOM = "custom"
"""The source tells that it is none of these."""


Verdict = Literal["exact", "refused"]

ALWAYS = "always"
"""The case of a direction that no other case is told from."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Way:
    """What becomes of a family in the other framework."""

    case: str
    """Of which schedules of the family this is said."""
    verdict: Verdict
    """`refused` is `schedule-unsupported`: where that is allowed, the learning rate is frozen."""
    made: str
    """What follows it there."""
    needs: str
    """Where the source's file does not tell enough: what does."""
    remark: str


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
    to_keras: tuple[Way, ...]
    """From torch's scheduler."""
    to_torch: tuple[Way, ...]
    """From Keras' schedule or callback."""


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
            parameters=entry.text_map("parameters"),
            classes=torch.texts("classes"),
            keys=frozenset(torch.texts("keys")),
            native=torch.text_map("parameters"),
            is_numeric=torch.flag("numbers_alone", False),
            to_keras=_ways(entry, "to_keras"),
            to_torch=_ways(entry, "to_torch"),
        )
        torch.close()
        entry.close()
    record.close()
    return table


def _ways(entry: Record, key: str) -> tuple[Way, ...]:
    ways = []
    for case, told in entry.records(key):
        verdict = told.text("verdict")
        if verdict not in get_args(Verdict):
            raise ValueError(f"{told.where}: '{verdict}' is no verdict")
        ways.append(
            Way(
                case=case,
                verdict=cast("Verdict", verdict),
                made=told.text("as"),
                needs=told.text("needs", ""),
                remark=told.text("remark", ""),
            )
        )
        told.close()
    return tuple(ways)


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
