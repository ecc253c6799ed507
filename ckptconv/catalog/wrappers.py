"""What stands around an optimizer's rule: loss scaling, averages of the weights, accumulation, clipping.

`data/wrappers.json` says what each framework calls them, what its classes leave no choice of, and how the
code of one that keeps a setting in no file has to say it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Literal, get_args

from ckptconv.catalog.loading import Record, load
from ckptconv.document import Optimizer

Begin = Literal["counter", "first update", "initial weights"]
"""What an average is before it is moved the first time: what the count of averages that is kept says, what
the first update gives, or the weights before it."""

SCALE = "loss_scale"
"""The scale itself, which is a field of the progress."""
AVERAGE = "moving_average"
ACCUMULATED = "accumulated_gradient"
EXTRA = "average of "
"""What the key of an extra array begins with that is the average of a parameter no optimizer trains."""
AVERAGED = "averaged"
"""Scalar of an optimizer: how often its averages were moved, where a file counts that."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scaler:
    """The class that scales the loss."""

    class_name: str
    wraps: str
    """Its first argument."""
    arguments: Mapping[str, str]
    """Canonical setting -> the constructor's argument."""
    keys: Mapping[str, str]
    """Canonical setting -> key or edge in the framework's files."""
    fixed: Mapping[str, float]
    """Settings that the class leaves no choice of."""
    least: float
    """The scale is never lowered below this."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Wrappers:
    """One framework's."""

    scaler: Scaler
    average: str | None
    """The code that keeps averages; None where the framework's optimizers keep none."""
    average_begins: Begin
    arguments: Mapping[str, str] = field(default_factory=dict)
    """Canonical setting -> argument of the optimizer."""
    settings: Mapping[str, str] = field(default_factory=dict)
    """Canonical setting -> the line of code, with `{value}`, where it is no argument of the optimizer."""

    def line(self, setting: str, value: str) -> str | None:
        """The line that gives the target a setting; None where another line has it already."""
        if setting in self.arguments:
            return f"{self.arguments[setting]}={value}  # argument of the optimizer"
        return self.settings[setting].replace("{value}", value) if setting in self.settings else None


@cache
def _tables() -> tuple[Mapping[str, str], tuple[str, ...], Mapping[str, Wrappers]]:
    record = load("wrappers.json")
    record.text("source")
    slots = {}
    for name, entry in record.records("slots"):
        entry.text("definition")
        slots[name] = entry.text("where")
        entry.close()
    scaling = tuple(record.text_map("loss_scaling"))
    frameworks = {name: _wrappers(entry) for name, entry in record.records("frameworks")}
    record.close()
    return slots, scaling, frameworks


def _wrappers(record: Record) -> Wrappers:
    record.text("source")
    inner = record.record("scaler")
    scaler = Scaler(
        class_name=inner.text("class"),
        wraps=inner.text("wraps"),
        arguments=inner.text_map("arguments"),
        keys=inner.text_map("keys"),
        fixed=inner.number_map("fixed"),
        least=inner.number("least") if inner.has("least") else 0.0,
    )
    inner.close()
    begins = record.text("average_begins", "first update")
    if begins not in get_args(Begin):
        raise ValueError(f"{record.where}: unknown beginning '{begins}'")
    result = Wrappers(
        scaler=scaler,
        average=record.optional_text("average"),
        average_begins=begins,  # type: ignore[arg-type]  # checked above
        arguments=record.text_map("arguments"),
        settings=record.text_map("settings"),
    )
    record.close()
    return result


def slots() -> Mapping[str, str]:
    """Canonical slots that belong to no optimizer's rule -> what they hold, for messages."""
    return _tables()[0]


def loss_scaling() -> tuple[str, ...]:
    """Canonical names of what a scaler keeps beside the scale, which is a field of the progress."""
    return _tables()[1]


def wrappers(framework: str) -> Wrappers | None:
    """A framework's table; None for one without any."""
    return _tables()[2].get(framework)


def bare(optimizer: Optimizer) -> Optimizer:
    """The optimizer with what its rule reads, and nothing around it."""
    return replace(
        optimizer,
        slots={slot: by_param for slot, by_param in optimizer.slots.items() if slot not in slots()},
        scalars={name: fact for name, fact in optimizer.scalars.items() if name != AVERAGED},
        groups=tuple(
            replace(
                group,
                hyperparameters={n: f for n, f in group.hyperparameters.items() if n not in settings()},
            )
            for group in optimizer.groups
        ),
    )


@cache
def settings() -> tuple[str, ...]:
    """Canonical names of the settings of averages and clipping: hyperparameters that no rule reads."""
    return tuple(dict.fromkeys(name for one in _tables()[2].values() for name in one.arguments))
