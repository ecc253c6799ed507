"""Transitions between forms: what happens to slots and hyperparameters where update rules differ.

The table stands in the family's file (`data/optimizers/<family>.json`, `transitions`), one entry per point
and direction: `"epsilon: inside -> outside"`, or `"momentum: gradient <-> velocity"` where the way back is
the inverse. An amount is a product of hyperparameters, `{"coefficient": -1, "learning_rate": 1}` for -lr;
`"1-momentum"` stands for 1 - momentum. What is in no entry is refused.

`helper` names, per framework of the target, the function of `ckptconv.keras` or `ckptconv.pytorch` with which
the target has the source's rule itself: the report says it beside what would remain different.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Literal, get_args

from ckptconv.catalog.loading import Record, load
from ckptconv.document import Value
from ckptconv.ops import Scale, Shift
from ckptconv.report import Verdict
from ckptconv.tensor import Op

Kind = Literal["scale", "shift"]
_NAME = re.compile(r"(\w+): (\w+) (->|<->) (\w+)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Product:
    """A number times powers of hyperparameters."""

    coefficient: float = 1.0
    powers: Mapping[str, float] = field(default_factory=dict)

    @property
    def names(self) -> tuple[str, ...]:
        """The hyperparameters that it needs."""
        return tuple(name.removeprefix("1-") for name in self.powers)

    def of(self, values: Mapping[str, float]) -> float:
        """Its value; infinite where it divides by 0."""
        result = self.coefficient
        for name, power in self.powers.items():
            base = values[name.removeprefix("1-")]
            base = 1 - base if name.startswith("1-") else base
            if base == 0 and power < 0:
                return math.inf
            result *= base**power
        return result

    def inverse(self) -> Product:
        return Product(
            coefficient=1 / self.coefficient, powers={name: -power for name, power in self.powers.items()}
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """What is done to a slot's values."""

    kind: Kind
    amount: Product

    def op(self, values: Mapping[str, float]) -> Op:
        amount = self.amount.of(values)
        return Scale(amount) if self.kind == "scale" else Shift(amount)

    def inverse(self) -> Change:
        if self.kind == "shift":
            raise ValueError("a shift has no inverse in the table: write both directions")
        return Change(kind=self.kind, amount=self.amount.inverse())


@dataclass(frozen=True, slots=True, kw_only=True)
class Transition:
    """One step from a form to another."""

    point: str
    before: str
    after: str
    verdict: Verdict
    text: str
    """What remains different; empty where nothing does."""
    moves: str | None = None
    """The hyperparameter whose place differs: where it is 0 both forms are one."""
    slots: Mapping[str, Change] = field(default_factory=dict)
    settings: Mapping[str, Product] = field(default_factory=dict)
    """Hyperparameter of the target -> its value from those of the source."""
    fit: str | None = None
    """Name of the fit (`residuals.FITS`) that chooses `moves` on the state itself."""
    measure: str | None = None
    """Name of the formula (`residuals.FORMULAS`) of the relative difference of the next update."""
    helper: Mapping[str, str] = field(default_factory=dict)
    """Framework of the target -> the call that makes its optimizer follow the source's rule exactly;
    `{epsilon}` stands for the source's."""
    exclusive: tuple[str, ...] = ()
    """Hyperparameters that, set together, make a rule that the other form does not have."""


def transitions(record: Record) -> Mapping[tuple[str, str, str], Transition]:
    """The transitions in an algorithm's file, by (point, before, after)."""
    table: dict[tuple[str, str, str], Transition] = {}
    for name, entry in record.records("transitions"):
        parsed = _NAME.fullmatch(name)
        if parsed is None:
            raise ValueError(f"{entry.where}: expected 'point: form -> form'")
        point, before, arrow, after = parsed.groups()
        verdict = entry.text("verdict")
        if verdict not in get_args(Verdict):
            raise ValueError(f"{entry.where}: unknown verdict '{verdict}'")
        slots = {}
        for slot, change in entry.records("slots"):
            (kind,) = change.keys
            if kind not in get_args(Kind):
                raise ValueError(f"{change.where}: unknown change '{kind}'")
            slots[slot] = Change(kind=kind, amount=_product(change, kind))  # type: ignore[arg-type]  # checked
        inner = entry.record("settings") if entry.has("settings") else None
        forward = Transition(
            point=point,
            before=before,
            after=after,
            verdict=verdict,  # type: ignore[arg-type]  # checked above
            text=entry.text("text", ""),
            moves=entry.optional_text("moves"),
            slots=slots,
            settings={key: _product(inner, key) for key in inner.keys} if inner is not None else {},
            fit=entry.optional_text("fit"),
            measure=entry.optional_text("measure"),
            helper=entry.text_map("helper"),
            exclusive=entry.texts("exclusive"),
        )
        entry.close()
        table[point, before, after] = forward
        if arrow == "<->":
            table[point, after, before] = _backward(forward)
    return table


def _product(record: Record, key: str) -> Product:
    inner = record.record(key)
    powers = {name: inner.number(name) for name in inner.keys if name != "coefficient"}
    return Product(
        coefficient=inner.number("coefficient") if inner.has("coefficient") else 1.0, powers=powers
    )


def _backward(one: Transition) -> Transition:
    if one.settings:
        raise ValueError(f"{one.point}: hyperparameters that change have no inverse in the table")
    return Transition(
        point=one.point,
        before=one.after,
        after=one.before,
        verdict=one.verdict,
        text=one.text,
        moves=one.moves,
        slots={slot: change.inverse() for slot, change in one.slots.items()},
        fit=one.fit,
        measure=one.measure,
        helper=one.helper,
        exclusive=one.exclusive,
    )


@cache
def _family(name: str) -> Mapping[tuple[str, str, str], Transition]:
    return transitions(load(f"optimizers/{name}.json"))


def between(
    family: str, mine: Mapping[str, str], other: Mapping[str, str]
) -> tuple[tuple[Transition, ...], tuple[str, ...]]:
    """The transitions from one form to another, and the points for which the table has none.

    Weight decay is not among them: it moves between optimizer and model, see `hyperparameters.py`.
    """
    table = _family(family)
    steps, lacking = [], []
    for point in dict.fromkeys((*mine, *other)):
        before, after = mine.get(point), other.get(point)
        if before == after or point == "weight_decay":
            continue
        step = table.get((point, str(before), str(after)))
        if step is None:
            lacking.append(point)
        else:
            steps.append(step)
    return tuple(steps), tuple(lacking)


def numbers(*layers: Mapping[str, Value]) -> dict[str, float]:
    """The finite numbers among hyperparameters; of a name in several layers the last wins."""
    found: dict[str, float] = {}
    for values in layers:
        for name, value in values.items():
            if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
                found[name] = float(value)
    return found
