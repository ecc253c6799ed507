"""What two documents tell differently beside their arrays: progress, optimizers, schedules.

What one side does not record, such as betas in a bundle, does not tell them apart; that one of them has no
such optimizer does.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from ckptconv.document import PROGRESS_FIELDS, Checkpoint, Fact, Known, Optimizer, Value

_ALGORITHM = ".algorithm"
_SHOWN = 8
"""Names of parameters that stand in another group."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FieldDifference:
    """A number or word that the two tell differently; None where one does not tell it."""

    field: str
    first: Value
    second: Value


def field_differences(one: Checkpoint, other: Checkpoint) -> Iterator[FieldDifference]:
    """What both tell, and tell differently; of progress and of which optimizers there are, what one tells."""
    ours, theirs = dict(_fields(one)), dict(_fields(other, like=one))
    for field in {**ours, **theirs}:
        mine, its = ours.get(field), theirs.get(field)
        if None in (mine, its) and field not in PROGRESS_FIELDS and not field.endswith(_ALGORITHM):
            continue
        if isinstance(mine, _Members) and isinstance(its, _Members):
            ours_only, theirs_only = mine.without(its), its.without(mine)
            mine, its = ours_only, theirs_only
        if mine != its and not (_is_number(mine) and _is_number(its) and _as_float32(mine, its)):
            yield FieldDifference(field=field, first=mine, second=its)


class _Members(tuple[str, ...]):
    """Names of a group's parameters, in any order; those that only one side has are shown."""

    __slots__ = ()

    def without(self, other: _Members) -> Value:
        lacking = set(other)
        return ", ".join(sorted(name for name in self if name not in lacking)[:_SHOWN])


def _is_number(value: Value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _as_float32(first: Value, second: Value) -> bool:
    """Whether two hyperparameters are one number that a framework keeps in single precision."""
    assert isinstance(first, (int, float))
    assert isinstance(second, (int, float))
    return math.isclose(first, second, rel_tol=6e-8, abs_tol=0) and isinstance(first, float)


def _fields(checkpoint: Checkpoint, like: Checkpoint | None = None) -> Iterator[tuple[str, Value]]:
    """What is known of progress, and what both sides would tell of an optimizer."""
    for name in PROGRESS_FIELDS:
        yield from _known(name, getattr(checkpoint.progress, name))
    for optimizer in checkpoint.optimizers:
        name = called(optimizer, checkpoint, like)
        yield f"{name}{_ALGORITHM}", optimizer.algorithm
        yield from _known(f"{name}.step", optimizer.step)
        for number, group in enumerate(optimizer.groups):
            yield f"{name}.group {number}.parameters", _Members(group.params)
            for hyperparameter, fact in group.hyperparameters.items():
                yield from _known(f"{name}.group {number}.{hyperparameter}", fact)
        yield from ((f"{name}.step of {param}", step) for param, step in optimizer.param_steps.items())
    for number, schedule in enumerate(checkpoint.schedules):
        yield f"schedule {number}.family", schedule.family
        yield from _known(f"schedule {number}.position", schedule.position)


def _known(name: str, fact: Fact) -> Iterator[tuple[str, Value]]:
    if isinstance(fact, Known):
        yield name, fact.value


def called(optimizer: Optimizer, checkpoint: Checkpoint, like: Checkpoint | None) -> str:
    """An optimizer's name; a single one goes by the other side's name of its single one."""
    if like is not None and len(checkpoint.optimizers) == len(like.optimizers) == 1:
        return like.optimizers[0].name
    return optimizer.name
