"""An optimizer's document completed by what a caller or a live object knows of its class."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import cache

from ckptconv.catalog.optimizer_rows import FRAMEWORKS, Row, algorithms, row
from ckptconv.document import Known, Optimizer, Value, value_of


@cache
def hyperparameter_names() -> tuple[str, ...]:
    """Canonical names of all hyperparameters in the catalog."""
    names: dict[str, None] = {}
    for algorithm in algorithms():
        for framework in FRAMEWORKS:
            known = row(algorithm, framework)
            names.update(dict.fromkeys((*known.hyperparameters, *known.rules) if known else ()))
    return tuple(names)


def row_of_class(framework: str, class_name: str) -> Row | None:
    """The row of a class by its bare name (`AdamW`), None where the catalog has none."""
    for algorithm in algorithms():
        known = row(algorithm, framework)
        if known is not None and known.class_name.rpartition(".")[2] == class_name:
            return known
    return None


def as_algorithm(optimizer: Optimizer, algorithm: str) -> Optimizer:
    """The optimizer, said to be of this algorithm: slots under native names get their canonical ones.

    So do slots that are numbered, for want of names, in the order of the class's own.
    """
    known = row(algorithm, optimizer.framework)
    if known is None:
        return replace(optimizer, algorithm=algorithm, algorithm_candidates=())
    names = {str(number): slot for number, slot in enumerate(known.slots)}
    slots = {
        known.slot_of(slot) or names.get(slot, slot): by_param for slot, by_param in optimizer.slots.items()
    }
    return with_form(replace(optimizer, algorithm=algorithm, algorithm_candidates=(), slots=slots))


def with_form(optimizer: Optimizer) -> Optimizer:
    """The optimizer with the form that follows from its class and hyperparameters."""
    known = row(optimizer.algorithm, optimizer.framework)
    if known is None:
        return optimizer
    return replace(optimizer, form=known.form(shared_hyperparameters(optimizer)))


def shared_hyperparameters(optimizer: Optimizer) -> dict[str, Value]:
    """Known hyperparameters of the first group that has each."""
    values: dict[str, Value] = {}
    for group in optimizer.groups:
        for name, fact in group.hyperparameters.items():
            if (value := value_of(fact)) is not None:
                values.setdefault(name, value)
    return values


def with_arguments(
    optimizer: Optimizer,
    class_name: str,
    arguments: Mapping[str, object],
    rules: Mapping[str, float],
    who: str,
) -> Optimizer:
    """The optimizer as a live object declares it: its class, and its constructor's arguments by their names.

    `rules`: numbers of its helpers. Arguments that are no plain number or flag (a schedule object) are left
    out; recorded values win.
    """
    known = row_of_class(optimizer.framework, class_name)
    if known is None:
        return optimizer
    facts = {name: Known(value=value, status="supplied", source=who) for name, value in rules.items()}
    for name, entry in known.hyperparameters.items():
        value = arguments.get(entry.argument) if entry.argument else None
        if value is None:
            value = known.neutral.get(name) if entry.argument in arguments else None
        if isinstance(value, (bool, int, float)):
            facts[name] = Known(value=value, status="supplied", source=who)
    groups = tuple(
        replace(
            group,
            hyperparameters={
                **{k: v for k, v in group.hyperparameters.items() if k not in facts or isinstance(v, Known)},
                **{k: v for k, v in facts.items() if not isinstance(group.hyperparameters.get(k), Known)},
            },
        )
        for group in optimizer.groups
    )
    return as_algorithm(replace(optimizer, groups=groups), known.algorithm)
