"""The embedded note of a bundle: what it adds to the document, and what is written back.

The note tells of the run that was converted, under that run's names and in its framework's terms. What the
bundle holds itself wins. Of hyperparameters the note adds those that
mean the same here: all of one framework, across frameworks the decay only where it acts alike.
"""

from __future__ import annotations

from dataclasses import replace

from ckptconv.catalog.optimizers import as_algorithm, row, with_form
from ckptconv.catalog.schedule_rates import ONE_CYCLE_MOMENTA
from ckptconv.catalog.schedule_source import ONE_CYCLE_RATES
from ckptconv.dialects.residue import untold
from ckptconv.document import (
    Checkpoint,
    Known,
    Optimizer,
    Residue,
    Schedule,
)
from ckptconv.note import EXTENSION, Note, current_note, read_note, settled

ATTRIBUTE = "note"
"""Attribute of the residue that holds the note that the file came with."""

_OF_ITS_OWN = frozenset(
    {"learning_rate", "base_learning_rate", "learning_rate_decay", "maximize", "dampening"}
)
"""Hyperparameters that are no other framework's: converted ones stand in the file, or cannot."""


def with_note(checkpoint: Checkpoint, text: str | None) -> Checkpoint:
    """The document completed from its file's note.

    Raises: those of `read_note`.
    """
    if text is None or checkpoint.residue is None:
        return checkpoint
    note, residue = read_note(text), checkpoint.residue
    progress, stale = settled(checkpoint.progress, note)
    result = replace(
        checkpoint,
        progress=progress,
        oddities=(*checkpoint.oddities, *stale),
        residue=replace(residue, attributes={**residue.attributes, ATTRIBUTE: text}),
        extensions={**checkpoint.extensions, EXTENSION: text},
    )
    if stale:
        return result
    optimizers = tuple(_completed(one, checkpoint, note) for one in checkpoint.optimizers)
    return replace(
        result,
        optimizers=tuple(_with_rates(one, checkpoint, note) for one in optimizers),
        schedules=tuple(_described(one, checkpoint, note) for one in checkpoint.schedules),
        loss_scaling={**note.loss_scaling, **checkpoint.loss_scaling},
        provenance=replace(checkpoint.provenance, history=note.provenance.history),
    )


def _completed(optimizer: Optimizer, checkpoint: Checkpoint, note: Note) -> Optimizer:
    noted = _counterpart(optimizer, checkpoint, note)
    if noted is None:
        return optimizer
    if optimizer.algorithm == "unknown" and noted.algorithm in optimizer.algorithm_candidates:
        optimizer = as_algorithm(optimizer, noted.algorithm)
    known = row(optimizer.algorithm, optimizer.framework)
    if known is None or noted.algorithm != optimizer.algorithm or not noted.groups:
        return optimizer
    same = noted.framework == optimizer.framework
    alike = noted.form.get("weight_decay") == optimizer.form.get("weight_decay")
    added = {
        name: fact
        for name, fact in noted.groups[0].hyperparameters.items()
        if name in known.hyperparameters
        and isinstance(fact, Known)
        and (same or name not in _OF_ITS_OWN)
        and (same or alike or name != "weight_decay")
    }
    groups = tuple(
        replace(
            group,
            hyperparameters={
                **{name: fact for name, fact in added.items() if name not in group.hyperparameters},
                **group.hyperparameters,
            },
        )
        for group in optimizer.groups
    )
    return with_form(replace(optimizer, groups=groups))


def _described(schedule: Schedule, checkpoint: Checkpoint, note: Note) -> Schedule:
    """The schedule as the note describes what the bundle only counts for."""
    if len(checkpoint.schedules) != 1 or len(note.schedules) != 1 or schedule.family != "unknown":
        return schedule
    noted = note.schedules[0]
    return replace(schedule, family=noted.family, parameters=noted.parameters)


def _with_rates(optimizer: Optimizer, checkpoint: Checkpoint, note: Note) -> Optimizer:
    """The optimizer with the rates that its schedule goes by, where it has one."""
    noted = _counterpart(optimizer, checkpoint, note)
    if noted is None or not checkpoint.schedules or noted.framework != optimizer.framework:
        return optimizer
    theirs = noted.groups[0].hyperparameters
    rates = {
        name: fact
        for name in ("base_learning_rate", *ONE_CYCLE_RATES, *ONE_CYCLE_MOMENTA)
        if isinstance(fact := theirs.get(name), Known)
    }
    groups = tuple(
        replace(group, hyperparameters={**rates, **group.hyperparameters}) for group in optimizer.groups
    )
    return replace(optimizer, groups=groups)


def _counterpart(optimizer: Optimizer, checkpoint: Checkpoint, note: Note) -> Optimizer | None:
    """The noted optimizer of one group that is this one; several groups are not told apart in a bundle."""
    if len(checkpoint.optimizers) == len(note.optimizers) == 1:
        found: Optimizer | None = note.optimizers[0]
    else:
        found = next((one for one in note.optimizers if one.name == optimizer.name), None)
    return found if found is not None and len(found.groups) == 1 else None


def note_of(checkpoint: Checkpoint, residue: Residue | None) -> str | None:
    """The note to write into a file with this residue."""
    own = residue.attributes.get(ATTRIBUTE) if residue is not None else None
    needed = residue is not None and bool(untold(checkpoint, residue.root))
    return current_note(checkpoint, own if isinstance(own, str) else None, untold=needed)
