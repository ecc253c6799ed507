"""The slots of an optimizer: which cross, with which op, which begin anew and which stay behind."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from ckptconv.catalog.findings import Findings
from ckptconv.catalog.hyperparameters import Settings
from ckptconv.catalog.optimizer_rows import Row
from ckptconv.document import Optimizer, value_of
from ckptconv.ops import Scale
from ckptconv.tensor import Op


@dataclass(frozen=True, slots=True, kw_only=True)
class SlotConversion:
    """How one slot of the target is made."""

    slot: str
    """Canonical name, the same on both sides."""
    created: bool = False
    """True: nothing of the source goes in, every element is `init`."""
    init: float = 0.0
    """Value of a parameter's slot where the source has none for it."""
    ops: tuple[tuple[Op, ...], ...] = ()
    """Per group of the target, what happens to the values (beside the parameter's own layout ops)."""


def convert_slots(
    source: Optimizer,
    target: Optimizer,
    ours: Row,
    theirs: Row,
    settings: Settings,
    forms: tuple[Mapping[str, str], Mapping[str, str]],
    findings: Findings,
) -> tuple[tuple[SlotConversion, ...], tuple[str, ...]]:
    """The target's slots with their ops, and the source's slots that stay behind."""
    count = len(settings.facts)
    if theirs.open_slots:
        wanted = {slot for i in range(count) for slot in theirs.slots_present(settings.target(i))}
        held = [slot for slot in theirs.slots if slot in wanted]
    else:
        held = [slot for slot in theirs.slots if slot in target.slots]
    left = tuple(slot for slot in source.slots if slot not in held)
    for slot in left:
        # A master copy is no state of the rule: whoever maps the parameters makes the weights from it.
        if slot != "master" and (slot not in ours.slots or not _is_idle(slot, ours, settings)):
            condition = theirs.slot_conditions.get(slot)
            findings.refuse(
                "state-dropped",
                f"the target has no place for the slot '{slot}'",
                f"Make the template with {condition} as in the source run."
                if condition
                else f"{theirs.class_name} has no such state; allow state-dropped to leave it behind.",
                "slots",
                slot,
            )
    result = []
    for slot in held:
        init = theirs.slot_inits[slot]
        if slot in source.slots:
            result.append(_slot(slot, init, settings, forms, findings))
            continue
        _created(slot, source, ours, theirs, settings, findings)
        result.append(SlotConversion(slot=slot, created=True, init=init, ops=((),) * count))
    return tuple(result), left


def _is_idle(slot: str, ours: Row, settings: Settings) -> bool:
    """Whether the source's rule does not read the slot, although it is there."""
    reader = ours.slot_readers.get(slot)
    if reader is None:
        return False
    told = settings.source
    if slot not in ours.slot_conditions and all(reader not in values for values in told):
        told = tuple(settings.target(i) for i in range(len(told)))
    return all(reader in values and not values[reader] for values in told)


def _created(
    slot: str, source: Optimizer, ours: Row, theirs: Row, settings: Settings, findings: Findings
) -> None:
    """Judges a slot that the target holds and the source does not have."""
    condition = theirs.slot_conditions.get(slot) or ours.slot_conditions.get(slot)
    off = condition is not None and all(not values.get(condition) for values in settings.source)
    if off and slot in theirs.slot_conditions and not theirs.open_slots:
        findings.refuse(
            "template-mismatch",
            f"the template was made with {condition}, the source run had none",
            f"Make the template without {condition}.",
            "slots",
            slot,
        )
    step = value_of(source.step)
    if not off and isinstance(step, int) and step > 0:
        findings.refuse(
            "slots-missing",
            f"the source has done {step} updates and has no '{slot}': a step alone is worse than none",
            "Use a source with its optimizer state, or allow slots-missing to begin at the initial value.",
            "slots",
            slot,
        )


def _slot(
    slot: str,
    init: float,
    settings: Settings,
    forms: tuple[Mapping[str, str], Mapping[str, str]],
    findings: Findings,
) -> SlotConversion:
    """What happens to a slot's values. Only a momentum buffer means different numbers in different forms."""
    mine, other = forms[0].get(slot), forms[1].get(slot)
    count = len(settings.facts)
    if mine == other:
        return SlotConversion(slot=slot, init=init, ops=((),) * count)
    ops: list[tuple[Op, ...]] = []
    created = False
    for index, values in enumerate(settings.source):
        rate = values.get("learning_rate")
        loc = ("groups", index, "hyperparameters", "learning_rate")
        if isinstance(rate, bool) or not isinstance(rate, (int, float)) or not math.isfinite(rate):
            findings.stop(
                "hyperparameter-missing",
                f"the {slot} buffer holds the learning rate in one form and not in the other; "
                f"the source records {'none' if rate is None else rate}",
                "Pass --set learning_rate=VALUE, the rate of the next update.",
                *loc,
            )
            ops.append(())
        elif rate == 0 or not math.isfinite(1 / rate):
            findings.refuse(
                "form-mismatch",
                f"the learning rate of the next update is 0: {slot} cannot be told with the rate inside it",
                "Convert a checkpoint of a step whose rate is not 0, "
                "or allow form-mismatch to begin the buffer at 0.",
                *loc,
            )
            created = True
            ops.append(())
        else:
            ops.append((Scale(-float(rate)),) if other == "velocity" else (Scale(-1 / float(rate)),))
        if values.get("dampening") and values.get("nesterov"):
            findings.refuse(
                "form-mismatch",
                "nesterov with dampening is a rule that only torch has (its constructor refuses it)",
                "Pass --set dampening=0 if the run had none.",
                "groups",
                index,
                "hyperparameters",
                "dampening",
            )
    if not created:
        findings.differ(
            "exact-at-constant-learning-rate",
            f"{slot}: the {'target' if other == 'velocity' else 'source'} keeps the learning rate inside it; "
            "the two frameworks part when the rate changes",
        )
    return SlotConversion(slot=slot, created=created, init=init, ops=tuple(ops))
