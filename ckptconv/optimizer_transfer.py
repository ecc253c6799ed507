"""The optimizers of a transfer: whose state goes where, what is made of it, and what has no place."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace

from ckptconv.account import Account
from ckptconv.catalog import sparse
from ckptconv.catalog.conversion import Conversion, convert
from ckptconv.catalog.optimizer_rows import row
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
from ckptconv.report import Entry
from ckptconv.slot_transfer import transfer_slots
from ckptconv.ties import Pair


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
    slots = transfer_slots(origin, target, producers, pairs, source, conversion, account)
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
