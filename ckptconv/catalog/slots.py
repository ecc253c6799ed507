"""The slots of an optimizer: which cross, with which op, which begin anew and which stay behind."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from ckptconv.catalog.findings import Findings
from ckptconv.catalog.hyperparameters import Settings
from ckptconv.catalog.optimizer_rows import Init, Row
from ckptconv.catalog.transitions import Transition, numbers
from ckptconv.document import Fact, Known, Optimizer, value_of
from ckptconv.tensor import MissingTensor, Op, TensorRef


@dataclass(frozen=True, slots=True, kw_only=True)
class SlotConversion:
    """How one slot of the target is made."""

    slot: str
    """Canonical name, the same on both sides."""
    created: bool = False
    """True: nothing of the source goes in, every element is `init`."""
    init: Init = 0.0
    """Value of a parameter's slot where the source has none for it: a number, `param` for the parameter's own
    value, or the name of the hyperparameter that neither side tells."""
    shape: str = "param"
    """How its shape follows from the parameter's (`optimizer_rows.shape_of_slot`)."""
    ops: tuple[tuple[Op, ...], ...] = ()
    """Per group of the target, what happens to the values (beside the parameter's own layout ops)."""


def convert_slots(
    source: Optimizer,
    target: Optimizer,
    ours: Row,
    theirs: Row,
    settings: Settings,
    steps: tuple[Transition, ...],
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
        if slot in theirs.scalars:
            continue  # kept once for all parameters, see `scalar_slots`
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
        # A run begins a slot as its own rule does; where it has none of them, the target's begins.
        beginner = ours if slot in source.slots and slot in ours.slots else theirs
        init = _init(beginner.slot_inits[slot], settings)
        shape = theirs.slot_shapes.get(slot, "param")
        if slot in source.slots:
            result.append(_slot(slot, init, shape, settings, steps, findings))
            continue
        if theirs.open_slots and shape not in ("param", "scalar"):
            continue  # the source has no parameter of the kind that has it
        if shape == "scalar" and isinstance(source.scalars.get(slot), Known):
            continue
        _created(slot, source, ours, theirs, settings, findings)
        result.append(SlotConversion(slot=slot, created=True, init=init, shape=shape, ops=((),) * count))
    return tuple(result), left


def _init(told: Init, settings: Settings) -> Init:
    """The number, where the name of a hyperparameter stands for it and one side tells it."""
    have = numbers(settings.target(0), settings.source[0])
    return have.get(told, told) if isinstance(told, str) else told


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
    init: Init,
    shape: str,
    settings: Settings,
    steps: tuple[Transition, ...],
    findings: Findings,
) -> SlotConversion:
    """What happens to a slot's values where the forms mean different numbers by it."""
    touching = [step for step in steps if slot in step.slots]
    ops: list[tuple[Op, ...]] = []
    created = False
    for index, values in enumerate(settings.source):
        done: list[Op] = []
        for step in touching:
            change = step.slots[slot]
            known = numbers(settings.target(index), {"learning_rate": None}, values)
            if "learning_rate" not in values:
                known.pop("learning_rate", None)  # the template's is of another run
            lacking = next((name for name in change.amount.names if name not in known), None)
            if lacking is not None:
                _lacking(lacking, slot, values.get(lacking), index, findings)
                continue
            amount = change.amount.of(known)
            if change.kind == "scale" and (amount == 0 or not math.isfinite(amount)):
                findings.refuse(
                    "form-mismatch",
                    f"{' and '.join(change.amount.names)} of the next update make the {slot} 0: it cannot be "
                    "told with that inside it",
                    "Convert a checkpoint of a step whose rate is not 0, "
                    "or allow form-mismatch to begin the buffer at 0.",
                    *("groups", index, "hyperparameters", change.amount.names[0]),
                )
                created = True
                continue
            done.append(change.op(known))
            if step.exclusive and all(values.get(name) for name in step.exclusive):
                findings.refuse(
                    "form-mismatch",
                    f"{' with '.join(step.exclusive)} is a rule that the target does not have",
                    f"Pass --set {step.exclusive[0]}=0 if the run had none.",
                    *("groups", index, "hyperparameters", step.exclusive[0]),
                )
        ops.append(tuple(done))
    return SlotConversion(slot=slot, created=created, init=init, shape=shape, ops=tuple(ops))


def _lacking(name: str, slot: str, have: object, index: int, findings: Findings) -> None:
    findings.stop(
        "hyperparameter-missing",
        f"the {slot} buffer holds {name} in one form and not in the other; "
        f"the source records {'none' if have is None else have}",
        f"Pass --set {name}=VALUE" + (", the rate of the next update." if name == "learning_rate" else "."),
        *("groups", index, "hyperparameters", name),
    )


def scalar_slots(
    source: Optimizer, theirs: Row, count: int, findings: Findings
) -> tuple[tuple[SlotConversion, ...], Mapping[str, Fact]]:
    """Numbers that one side keeps per parameter and the other once, or both once."""
    made, kept = [], {}
    for name in theirs.slot_shapes:
        if theirs.slot_shapes[name] != "scalar" or name in source.slots:
            continue
        value = value_of(source.scalars.get(name))
        if isinstance(value, (int, float)):
            made.append(
                SlotConversion(slot=name, created=True, init=value, shape="scalar", ops=((),) * count)
            )
    for name, key in theirs.scalars.items():
        fact = source.scalars.get(name)
        if not isinstance(fact, Known) and name in source.slots:
            fact = _common(source.slots[name], source.param_steps)
        if not isinstance(fact, Known) and value_of(source.step) in (0, None) and not source.slots:
            fact = Known(value=theirs.scalar_inits[name], status="derived", formula="before the first update")
        if isinstance(fact, Known):
            kept[name] = fact
            continue
        findings.stop(
            "slots-missing",
            f"the target keeps '{name}' ({key}), which the source does not tell",
            "Use a source that was saved with its optimizer's state.",
            "scalars",
            name,
        )
    return tuple(made), kept


def _common(tensors: Mapping[str, TensorRef], steps: Mapping[str, int]) -> Fact | None:
    """The number of the parameters that have done the most updates. I/O: reads one number."""
    if not tensors:
        return None
    name = max(tensors, key=lambda each: steps.get(each, 0))
    if isinstance(tensors[name], MissingTensor):
        return None
    return Known(
        value=float(tensors[name].read().reshape(-1)[0]), status="derived", formula=f"that of '{name}'"
    )
