"""The optimizers of a transfer: whose state goes where, what is made of it, and what has no place."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace

import numpy as np

from ckptconv import dtypes
from ckptconv.account import MASTER, Account, through
from ckptconv.catalog import sparse
from ckptconv.catalog.conversion import Conversion, convert
from ckptconv.catalog.factored import FACTORS, factor_of
from ckptconv.catalog.optimizer_rows import row, shape_of_slot
from ckptconv.catalog.slots import SlotConversion
from ckptconv.document import (
    Checkpoint,
    Fact,
    Known,
    Optimizer,
    Unknown,
    Value,
    value_of,
)
from ckptconv.errors import Problem
from ckptconv.ops import Reshape
from ckptconv.report import Entry
from ckptconv.tensor import FilledTensor, TensorRef, TensorSpec
from ckptconv.ties import Pair

_NUMBER = TensorSpec(dtype=dtypes.BY_NAME["float32"], shape=())
_WIDE_NUMBER = TensorSpec(dtype=dtypes.BY_NAME["float64"], shape=())
"""How a number per parameter stands that the source keeps once (torch's `mu_product`): float32 as torch makes
it, where that holds the number. Loading it, torch gives it the dtype of its parameter."""


def transfer_optimizers(
    source: Checkpoint, template: Checkpoint, pairs: Mapping[str, Pair], account: Account
) -> tuple[Optimizer, ...]:
    if not template.optimizers:
        for optimizer in source.optimizers:
            _no_place(optimizer, account)
        return ()
    partners = _partners(source, template, account)
    result = []
    for target in template.optimizers:
        partner = partners.get(target.name)
        if partner is None:
            result.append(_cold(target, source, account))
        else:
            result.append(_optimizer(partner, target, source, template, pairs, account))
    return tuple(result)


def _no_place(optimizer: Optimizer, account: Account) -> None:
    allowed = account.refuse(
        Problem(
            code="state-dropped",
            loc=("optimizers", optimizer.name),
            message=f"the template has no optimizer for the state of '{optimizer.name}' "
            f"({optimizer.algorithm})",
            hint="Use a template with a built optimizer, or --allow state-dropped to carry weights alone.",
        )
    )
    if allowed:
        for slot in optimizer.slots:
            account.ledger.append(
                Entry(
                    item=("slot", optimizer.name, slot),
                    fate="left",
                    detail="the template has no optimizer",
                    allowed_by="state-dropped",
                )
            )


def _partners(source: Checkpoint, template: Checkpoint, account: Account) -> dict[str, Optimizer]:
    """Target optimizer name -> source optimizer: the only ones, or those of the same name."""
    if len(source.optimizers) == 1 and len(template.optimizers) == 1:
        return {template.optimizers[0].name: source.optimizers[0]}
    partners = {}
    names = {optimizer.name: optimizer for optimizer in source.optimizers}
    for target in template.optimizers:
        if target.name in names:
            partners[target.name] = names.pop(target.name)
    for left in names.values():
        _no_place(left, account)
    return partners


def _cold(target: Optimizer, source: Checkpoint, account: Account) -> Optimizer:
    """An optimizer of the template that the source has no state for: fresh slots under the run's step.

    A step without its slots is no better than a cold start, so both need the caller's word.
    """
    known = row(target.algorithm, target.framework)
    keeps_state = bool(target.slots) or known is None or bool(known.slots_present({}))
    if keeps_state:
        names = ", ".join(f"'{o.name}'" for o in source.optimizers)
        account.refuse(
            Problem(
                code="slots-missing",
                loc=("optimizers", target.name),
                message=f"the template's optimizer '{target.name}' would start cold: the source has "
                + (f"the state of {names} only" if names else "no optimizer state"),
                hint="Use a template without an optimizer, or --allow slots-missing.",
            )
        )
    account.ledger.append(
        Entry(
            item=("template", target.name),
            fate="kept-from-template",
            target=target.name,
            detail="fresh state: the source has none",
            allowed_by="slots-missing" if keeps_state else "",
        )
    )
    step = source.progress.step
    if not isinstance(step, Known):
        if _counts(target.algorithm, target.framework):
            account.problems.append(_no_step(target, step))
        return target
    return replace(target, step=step, param_steps=dict.fromkeys(target.param_steps, _whole(step.value)))


def _whole(value: Value) -> int:
    assert isinstance(value, int)
    return value


def _optimizer(
    origin: Optimizer,
    target: Optimizer,
    source: Checkpoint,
    template: Checkpoint,
    pairs: Mapping[str, Pair],
    account: Account,
) -> Optimizer:
    if origin.param_order == "unknown" and origin.slots:
        account.problems.append(_no_names(origin, "source"))
        return target
    if target.param_order == "unknown" and origin.slots and not any(name in pairs for name in target.params):
        account.problems.append(_no_names(target, "template"))
        return target
    producers = {
        name: source.params[pairs[name].source].tied_to or pairs[name].source
        for name in target.params
        if name in pairs
    }
    renamed = _in_target_names(origin, producers)
    conversion = convert(renamed, target, allow=account.allow)
    account.problems += conversion.problems
    squared = sparse.residuals(
        origin.framework, target.framework, (s.slot for s in conversion.slots), target.params, template.params
    )
    account.verdicts.append(replace(conversion.verdict, residuals=(*conversion.verdict.residuals, *squared)))
    if not conversion.hyperparameters:
        return target  # refused: nothing of it can be written
    if conversion.residual is not None:
        account.residuals.append((len(account.verdicts) - 1, conversion.residual))
    account.requires += conversion.target_requires
    if not isinstance(conversion.step, Known) and _counts(conversion.algorithm, target.framework):
        account.problems.append(_no_step(origin, conversion.step))
    slots = _slots(origin, target, producers, pairs, source, conversion, account)
    held = {name for by_param in slots.values() for name in by_param}
    matched = {source.params[pair.source].tied_to or pair.source for pair in pairs.values()}
    _without_place(origin, account.merged.union(producers.values()), matched, account)
    account.ledger.append(
        Entry(
            item=("step", origin.name),
            fate="supplied" if getattr(conversion.step, "status", "") == "supplied" else "copied",
            target=f"{target.name}.step",
            detail=str(value_of(conversion.step)),
        )
    )
    _hyperparameters(origin, target, conversion, account)
    groups = tuple(
        replace(group, hyperparameters=dict(facts))
        for group, facts in zip(target.groups, conversion.hyperparameters, strict=True)
    )
    return replace(
        target,
        algorithm=conversion.algorithm,
        form=dict(conversion.form),
        step=conversion.step,
        # A step without slots would be worse than none: a parameter that begins anew has neither.
        param_steps={
            name: step for name, step in conversion.param_steps.items() if not slots or name in held
        },
        groups=groups,
        slots=slots,
        scalars={**target.scalars, **conversion.scalars},
    )


def _hyperparameters(origin: Optimizer, target: Optimizer, conversion: Conversion, account: Account) -> None:
    """What the target's hyperparameters are and who says so; a value of the source that changed is shown."""
    for position, facts in enumerate(conversion.hyperparameters):
        for name, fact in facts.items():
            if not isinstance(fact, Known):
                continue
            account.ledger.append(
                Entry(
                    item=("hyperparameter", origin.name, position, name),
                    fate="supplied" if fact.status == "supplied" else "copied",
                    target=f"{target.name}.{name}",
                    detail=f"{fact.value}"
                    + (f" ({fact.formula})" if fact.formula else "")
                    + (f", said by {fact.source}" if fact.status == "supplied" else ""),
                )
            )


def _counts(algorithm: str, framework: str) -> bool:
    """Whether the target's class has a counter to fill."""
    known = row(algorithm, framework)
    return known is None or known.step_key is not None


def _no_names(optimizer: Optimizer, side: str) -> Problem:
    return Problem(
        code="order-ambiguous",
        loc=("optimizers", optimizer.name),
        message=f"the state of '{optimizer.name}' of the {side} is numbered, and more than one order of the "
        f"{len(optimizer.params)} parameters fits",
        hint=f"Pass --{side}-spec with a skeleton of the {side}'s model and optimizer (describe()).",
    )


def _no_step(optimizer: Optimizer, step: Fact) -> Problem:
    reason = step.reason if isinstance(step, Unknown) else "the source has none"
    readings = ""
    if isinstance(step, Unknown) and step.candidates:
        readings = "; seen: " + ", ".join(
            f"{c.value} from {c.source} ({c.condition})" for c in step.candidates
        )
    return Problem(
        code="progress-unknown",
        loc=("optimizers", optimizer.name, "step"),
        message="the target counts updates and the source does not tell how many were done: "
        f"{reason}{readings}",
        hint="Pass --set step=N.",
    )


def _in_target_names(origin: Optimizer, producers: Mapping[str, str]) -> Optimizer:
    """The source's optimizer with its parameters called as in the target."""
    names: dict[str, list[str]] = {}
    for made, made_from in producers.items():
        names.setdefault(made_from, []).append(made)
    return replace(
        origin,
        groups=tuple(
            replace(group, params=tuple(new for old in group.params for new in names.get(old, ())))
            for group in origin.groups
        ),
        slots={
            slot: {new: tensor for old, tensor in by_param.items() for new in names.get(old, ())}
            for slot, by_param in origin.slots.items()
        },
        param_steps={new: step for old, step in origin.param_steps.items() for new in names.get(old, ())},
    )


def _slots(
    origin: Optimizer,
    target: Optimizer,
    producers: Mapping[str, str],
    pairs: Mapping[str, Pair],
    source: Checkpoint,
    conversion: Conversion,
    account: Account,
) -> dict[str, dict[str, TensorRef]]:
    result: dict[str, dict[str, TensorRef]] = {}
    rows = list(conversion.slots)
    counted = conversion.param_steps
    if MASTER in origin.slots and MASTER in target.slots and MASTER in conversion.left:
        rows.append(SlotConversion(slot=MASTER, ops=((),) * len(target.groups)))
    for slot_row in rows:
        made: dict[str, TensorRef] = {}
        places = target.slots.get(slot_row.slot)
        for position, group in enumerate(target.groups):
            for name in group.params:
                layout = pairs[name].ops if name in pairs else ()
                origin_slot: str | None = slot_row.slot
                if slot_row.shape in FACTORS:
                    origin_slot = factor_of(slot_row.slot, layout)
                if origin_slot is None:
                    if producers.get(name) in origin.slots.get(slot_row.slot, {}):
                        _no_factors(name, slot_row.slot, target, account)
                    if places and name in places:
                        made[name] = _begun(slot_row, name, places[name], target, source, pairs, account)
                    continue
                have = (
                    None
                    if slot_row.created
                    else origin.slots.get(origin_slot, {}).get(producers.get(name, ""))
                )
                place = places.get(name) if places else None
                if have is None and places is None and slot_row.shape == "scalar" and name in counted:
                    number = FilledTensor(spec=_NUMBER)
                    made[name] = _begun(slot_row, name, number, target, source, pairs, account)
                    continue
                if have is None and places is None:
                    continue  # a target that creates state per parameter has none for this one either
                if have is None:
                    if place is None:
                        continue
                    if name not in producers:
                        made[name] = place
                        account.ledger.append(
                            Entry(
                                item=("template", f"{name}/{slot_row.slot}"),
                                fate="kept-from-template",
                                target=f"{name}/{slot_row.slot}",
                                detail="its parameter has no partner in the source",
                                allowed_by="param-unmatched",
                            )
                        )
                        continue
                    made[name] = _begun(slot_row, name, place, target, source, pairs, account)
                    account.ledger.append(
                        Entry(
                            item=("slot", origin.name, slot_row.slot, producers.get(name, name)),
                            fate="created",
                            target=f"{name}/{slot_row.slot}",
                            detail=f"the source has none for it; {slot_row.init} before the first update",
                        )
                    )
                    continue
                shape = shape_of_slot(slot_row.shape, _shape_of(target, name, pairs, source)) or ()
                spec = place.spec if place else TensorSpec(dtype=have.dtype, shape=shape)
                if slot_row.shape in FACTORS:
                    layout = (Reshape(have.shape, spec.shape),) if have.shape != spec.shape else ()
                elif slot_row.shape == "scalar":
                    layout = ()
                ops = (*layout, *slot_row.ops[position])
                made[name], done = through(
                    have, ops, spec, ("optimizers", target.name, slot_row.slot, name), account
                )
                account.ledger.append(
                    Entry(
                        item=("slot", origin.name, origin_slot, producers[name]),
                        fate="transformed" if done else "copied",
                        target=f"{name}/{slot_row.slot}",
                        ops=tuple(op.to_json() for op in done),
                    )
                )
        result[slot_row.slot] = made
    for slot in conversion.left:
        if slot in conversion.scalars:
            account.ledger.append(
                Entry(item=("slot", origin.name, slot), fate="transformed", target=f"{target.name}.{slot}")
            )
        elif slot != MASTER:
            detail = "the target's rule does not read it"
            account.ledger.append(Entry(item=("slot", origin.name, slot), fate="left", detail=detail))
    return result


def _begun(
    slot: SlotConversion,
    name: str,
    place: TensorRef,
    target: Optimizer,
    source: Checkpoint,
    pairs: Mapping[str, Pair],
    account: Account,
) -> TensorRef:
    """A slot as before the first update."""
    loc = ("optimizers", target.name, slot.slot, name)
    if slot.init == "param":
        pair = pairs[name]
        return through(source.params[pair.source].tensor, pair.ops, place.spec, loc, account)[0]
    if not isinstance(slot.init, str):
        wide = slot.shape == "scalar" and float(np.float32(slot.init)) != slot.init
        return FilledTensor(spec=_WIDE_NUMBER if wide else place.spec, value=slot.init)
    account.problems.append(
        Problem(
            code="hyperparameter-missing",
            loc=loc,
            message=f"the {slot.slot} of '{name}' begins at {slot.init}, which neither side records",
            hint=f"Pass --set {slot.init}=VALUE.",
        )
    )
    return place


def _no_factors(name: str, slot: str, target: Optimizer, account: Account) -> None:
    message = f"the two frameworks factor the second moment of '{name}' over different axes"
    problem = Problem(
        code="form-mismatch",
        loc=("optimizers", target.name, slot, name),
        message=message,
        hint="Allow form-mismatch to begin its second moment anew.",
    )
    if account.refuse(problem):
        verdict = account.verdicts[-1]
        residuals = tuple(dict.fromkeys((*verdict.residuals, f"{message}: it begins anew")))
        account.verdicts[-1] = replace(verdict, verdict="lossy", residuals=residuals)


def _shape_of(target: Optimizer, name: str, pairs: Mapping[str, Pair], source: Checkpoint) -> tuple[int, ...]:
    tensor = source.params[pairs[name].source].tensor
    for op in pairs[name].ops:
        tensor = tensor.apply(op)
    return tensor.shape


def _without_place(
    origin: Optimizer, consumed: frozenset[str], matched: Collection[str], account: Account
) -> None:
    """State of parameters that the target's optimizer does not train."""
    for slot, by_param in origin.slots.items():
        for name in by_param:
            if name in consumed:
                continue
            if name not in matched:  # its parameter is a problem already, or was allowed to be left
                account.ledger.append(
                    Entry(
                        item=("slot", origin.name, slot, name),
                        fate="left",
                        detail="its parameter has no partner in the template",
                        allowed_by="param-unmatched",
                    )
                )
                continue
            allowed = account.refuse(
                Problem(
                    code="state-dropped",
                    loc=("optimizers", origin.name, slot, name),
                    message=f"the target's optimizer does not train '{name}', whose {slot} the source holds",
                    hint="Make it trainable in the template, or --allow state-dropped.",
                )
            )
            if allowed:
                account.ledger.append(
                    Entry(
                        item=("slot", origin.name, slot, name),
                        fate="left",
                        detail="not trained in the target",
                        allowed_by="state-dropped",
                    )
                )
