"""What the source lacks and the caller sets: `--set` fields, each labelled `supplied`."""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Mapping
from dataclasses import replace

from ckptconv.catalog import completion, schedule_settings, wrappers
from ckptconv.catalog.optimizer_rows import algorithms
from ckptconv.catalog.schedule_settings import UNIT as SCHEDULE_UNIT
from ckptconv.catalog.wrappers import loss_scaling
from ckptconv.document import (
    PROGRESS_FIELDS,
    Checkpoint,
    Fact,
    Known,
    Optimizer,
    Unknown,
    Value,
    value_of,
)
from ckptconv.errors import CkptError, MappingError, Problem

BY_CALLER = "--set"

CONVENTIONS = {"epoch_convention": "epochs", "step_convention": "step"}
"""Setting -> the progress field whose bare counter it explains."""

COUNT, LAST = "count", "last"
"""A bare counter's two readings: how many are finished, or the 0-based number of the last finished one."""

_FRACTIONAL = frozenset({"epochs", "loss_scale", "growth_factor", "backoff_factor"})


def settings(texts: Mapping[str, str]) -> dict[str, Value]:
    """`--set` texts as values of the fields that they name.

    Raises: usage for a field that does not exist or a value that the field cannot have.
    """
    known = settable_fields()
    problems: list[Problem] = []
    values: dict[str, Value] = {}
    for name, text in texts.items():
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            problems.append(
                _usage(
                    name,
                    f"there is no field '{name}' to set"
                    + (f" (did you mean '{close[0]}'?)" if close else ""),
                    "Fields: " + ", ".join(known) + ".",
                )
            )
            continue
        try:
            values[name] = _parsed(name, text)
        except ValueError:
            shown = text if len(text) <= 40 else f"{text[:40]}..."
            problems.append(
                _usage(name, f"'{shown}' is not {_kind(name)}", f"Write --set {name}={_example(name)}.")
            )
    if problems:
        raise CkptError(*problems)
    return values


def settable_fields() -> tuple[str, ...]:
    """Names that `--set` accepts."""
    ours = (*PROGRESS_FIELDS, *CONVENTIONS, *schedule_settings.NAMES)
    wrapped = (*loss_scaling(), *wrappers.settings())
    return (*ours, "optimizer", *completion.hyperparameter_names(), *wrapped)


def _kind(name: str) -> str:
    if name in CONVENTIONS:
        return f"'{COUNT}' or '{LAST}'"
    if name in schedule_settings.NAMES:
        return schedule_settings.kind(name)
    return "a whole number from 0 on" if _is_count(name) else "a number"


def _example(name: str) -> str:
    """A value that the field can have."""
    if name in CONVENTIONS:
        return COUNT
    if name in schedule_settings.NAMES:
        return schedule_settings.example(name)
    return "9" if name in (*PROGRESS_FIELDS, *loss_scaling()) else "0.001"


def _is_count(name: str) -> bool:
    return name in (*PROGRESS_FIELDS, *loss_scaling()) and name not in _FRACTIONAL


def _parsed(name: str, text: str) -> Value:
    if name == "optimizer":
        return text
    if name in CONVENTIONS:
        if text not in (COUNT, LAST):
            raise ValueError(text)
        return text
    if name in schedule_settings.NAMES:
        return schedule_settings.parsed(name, text)
    if _is_count(name):
        if not (text.isascii() and text.isdigit()):
            raise ValueError(text)
        return int(text)
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        if name.endswith("_mode"):
            return text
        raise ValueError(text) from None
    if isinstance(value, bool) or (isinstance(value, (int, float)) and math.isfinite(value)):
        if name in _FRACTIONAL and (isinstance(value, bool) or value < 0):
            raise ValueError(text)
        return value
    raise ValueError(text)


def set_fields(checkpoint: Checkpoint, values: Mapping[str, Value], *, who: str = BY_CALLER) -> Checkpoint:
    """The document with the caller's values in place of what was unknown or recorded; `who` names the caller.

    Raises: usage for an optimizer's field where the document has no optimizer.
    """
    for name, value in values.items():
        if name in CONVENTIONS:
            checkpoint = _under_convention(checkpoint, CONVENTIONS[name], str(value), who)
            continue
        if name == SCHEDULE_UNIT:
            checkpoint = _counting(checkpoint, str(value), who)
            continue
        if name in schedule_settings.NAMES:
            checkpoint = supplied(checkpoint, name, who)
            continue
        fact = Known(value=value, status="supplied", source=who)
        if name in PROGRESS_FIELDS:
            if name == "step":
                checkpoint = with_step(_without_derived(checkpoint, values), fact)
            else:
                checkpoint = replace(checkpoint, progress=replace(checkpoint.progress, **{name: fact}))
                checkpoint = _with_updates(checkpoint, name, who)
        elif name in loss_scaling():
            scaling = {**checkpoint.loss_scaling, name: fact}
            checkpoint = replace(checkpoint, loss_scaling=scaling)
        elif not checkpoint.optimizers:
            raise CkptError(
                _usage(name, f"'{name}' belongs to an optimizer, and the source has none", "Leave it out.")
            )
        elif name == "optimizer":
            checkpoint = _with_algorithm(checkpoint, str(value))
        else:
            changed = tuple(_with_hyperparameter(o, name, fact) for o in checkpoint.optimizers)
            checkpoint = replace(checkpoint, optimizers=changed)
        checkpoint = supplied(checkpoint, name, who)
    return checkpoint


def _without_derived(checkpoint: Checkpoint, values: Mapping[str, Value]) -> Checkpoint:
    """The document without what was derived from the step that is about to be set."""
    step = checkpoint.progress.step
    changed: dict[str, Fact] = {
        name: Unknown(reason=f"it was derived from {fact.source}, and the step was set")
        for name in PROGRESS_FIELDS
        if isinstance(fact := getattr(checkpoint.progress, name), Known)
        and fact.status == "derived"
        and isinstance(step, Known)
        and fact.source == step.source
        and name not in ("step", *values)
    }
    return replace(checkpoint, progress=replace(checkpoint.progress, **changed))


def _under_convention(checkpoint: Checkpoint, name: str, convention: str, who: str) -> Checkpoint:
    """The document with a bare counter read as the caller says it is meant."""
    fact = getattr(checkpoint.progress, name)
    if not isinstance(fact, Unknown):
        return checkpoint
    fitting = [c for c in fact.candidates if (LAST in c.condition) == (convention == LAST)]
    if len(fitting) != 1:
        return checkpoint
    known = Known(
        value=fitting[0].value, status="supplied", source=f"{fitting[0].source}, {who}: {convention}"
    )
    checkpoint = replace(checkpoint, progress=replace(checkpoint.progress, **{name: known}))
    if name == "step":
        checkpoint = with_step(checkpoint, known)
    return supplied(checkpoint, f"convention of {name}", who)


def _counting(checkpoint: Checkpoint, unit: str, who: str) -> Checkpoint:
    """The document whose schedules count what the caller says, where they do not tell themselves."""
    if not checkpoint.schedules:
        return checkpoint
    schedules = tuple(
        replace(s, unit=unit) if s.unit == "unknown" else s  # type: ignore[arg-type]  # one of the units
        for s in checkpoint.schedules
    )
    return supplied(replace(checkpoint, schedules=schedules), "unit of schedules", who)


def conventions(values: Mapping[str, Value]) -> dict[str, str]:
    """Progress field -> how the target's bare counter of it is meant, as far as the caller says.

    Beside them what the caller says of schedules.
    """
    units = {name: str(values[name]) for name in schedule_settings.NAMES if name in values}
    return {**units, **{field: str(values[name]) for name, field in CONVENTIONS.items() if name in values}}


def _with_updates(checkpoint: Checkpoint, name: str, who: str) -> Checkpoint:
    """The document whose updates follow from its batches, where nothing else tells them."""
    progress = checkpoint.progress
    micro, per_update = value_of(progress.micro_steps), value_of(progress.accumulation)
    if name not in ("micro_steps", "accumulation") or isinstance(progress.step, Known):
        return checkpoint
    if not isinstance(micro, int) or not isinstance(per_update, int):
        return checkpoint
    done = micro // max(per_update, 1)
    fact = Known(value=done, status="derived", source=who, formula="micro_steps // accumulation")
    return with_step(checkpoint, fact)


def with_step(checkpoint: Checkpoint, fact: Known) -> Checkpoint:
    """The document whose optimizers have done this many updates, in every parameter that counts them."""
    assert isinstance(fact.value, int)
    number = fact.value
    changed = tuple(
        replace(o, step=fact, param_steps=dict.fromkeys(o.param_steps, number)) for o in checkpoint.optimizers
    )
    return replace(checkpoint, progress=replace(checkpoint.progress, step=fact), optimizers=changed)


def _with_algorithm(checkpoint: Checkpoint, algorithm: str) -> Checkpoint:
    if algorithm not in algorithms():
        close = difflib.get_close_matches(algorithm, algorithms(), n=1)
        raise CkptError(
            Problem(
                code="optimizer-unknown",
                loc=("optimizer",),
                message=f"the catalog has no optimizer '{algorithm}'"
                + (f" (did you mean '{close[0]}'?)" if close else ""),
                hint="Known: " + ", ".join(algorithms()) + ".",
            )
        )
    changed = []
    for optimizer in checkpoint.optimizers:
        if optimizer.algorithm_candidates and algorithm not in optimizer.algorithm_candidates:
            raise MappingError(
                Problem(
                    code="optimizer-mismatch",
                    loc=("optimizers", optimizer.name),
                    message=f"the state of '{optimizer.name}' is that of "
                    f"{' or '.join(optimizer.algorithm_candidates)}, not of {algorithm}",
                    hint="Set one of those.",
                )
            )
        changed.append(completion.as_algorithm(optimizer, algorithm))
    return replace(checkpoint, optimizers=tuple(changed))


def _with_hyperparameter(optimizer: Optimizer, name: str, fact: Fact) -> Optimizer:
    groups = tuple(
        replace(group, hyperparameters={**group.hyperparameters, name: fact}) for group in optimizer.groups
    )
    return completion.with_form(replace(optimizer, groups=groups))


def supplied(checkpoint: Checkpoint, name: str, who: str) -> Checkpoint:
    """The document that says who supplied a field."""
    provenance = checkpoint.provenance
    return replace(checkpoint, provenance=replace(provenance, supplied=(*provenance.supplied, (name, who))))


def _usage(name: str, message: str, hint: str) -> Problem:
    return Problem(code="usage", loc=("--set", name), message=message, hint=hint)
