"""From a source document and a template's to the document that is written: every value finds its place.

The result has the template's names, axes, dtypes, groups and residue, and the source's values. Each item
of the source is in the ledger with what became of it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType

from ckptconv import dtypes
from ckptconv.catalog.conversion import Conversion, convert
from ckptconv.catalog.optimizer_rows import row
from ckptconv.catalog.residuals import Residual
from ckptconv.catalog.slots import SlotConversion
from ckptconv.document import (
    PROGRESS_FIELDS,
    Checkpoint,
    Fact,
    Known,
    Optimizer,
    Param,
    Unknown,
    Value,
    value_of,
)
from ckptconv.errors import Loc, Problem
from ckptconv.extras import own_param, place_extras
from ckptconv.mapping import Cover, Pair
from ckptconv.ops import Cast
from ckptconv.rawtree import Lifted, Node, Path, transform, walk
from ckptconv.report import Entry, Fate, OptimizerVerdict
from ckptconv.schedules import place_schedules
from ckptconv.supply import CONVENTIONS, COUNT, LAST
from ckptconv.tensor import FilledTensor, Op, TensorRef, TensorSpec

MASTER = "master"
"""The slot that holds a parameter in higher precision than the model does."""

_NUMBER = TensorSpec(dtype=dtypes.BY_NAME["float32"], shape=())
"""How a number per parameter stands that the source keeps once (torch's `mu_product`)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Transfer:
    """The target's document, and the account of how it came about."""

    checkpoint: Checkpoint
    ledger: tuple[Entry, ...]
    verdicts: tuple[OptimizerVerdict, ...] = ()
    target_requires: tuple[str, ...] = ()
    residuals: tuple[tuple[int, Residual], ...] = ()
    """(position in `verdicts`, what to compute on the state) where a difference has a size."""
    problems: tuple[Problem, ...] = ()


@dataclass(slots=True)
class _Account:
    """What is collected on the way."""

    allow: frozenset[str]
    ledger: list[Entry] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    verdicts: list[OptimizerVerdict] = field(default_factory=list)
    requires: list[str] = field(default_factory=list)
    residuals: list[tuple[int, Residual]] = field(default_factory=list)
    merged: frozenset[str] = frozenset()
    """Parameters of the source in whose place another one stands."""

    def refuse(self, problem: Problem) -> bool:
        """Note a loss; True where the caller allowed it by its code."""
        if problem.code in self.allow:
            return True
        self.problems.append(problem)
        return False


def transfer(
    source: Checkpoint,
    template: Checkpoint,
    cover: Cover,
    *,
    allow: frozenset[str] = frozenset(),
    conventions: Mapping[str, str] = MappingProxyType({}),
) -> Transfer:
    """Fill the template's document with the source's run.

    `conventions`: how bare counters of the target are meant (`supply.CONVENTIONS`).
    Every problem is collected; nothing is read but what is in memory already.
    """
    account = _Account(allow)
    template = _with_conventions(template, conventions, account)
    pairs = {pair.target: pair for pair in cover.pairs}
    masters = {
        name: (("slot", optimizer.name, MASTER, name), tensor)
        for optimizer in source.optimizers
        for name, tensor in optimizer.slots.get(MASTER, {}).items()
    }
    target_holds_masters = any(MASTER in optimizer.slots for optimizer in template.optimizers)
    params = {
        name: _param(param, pairs[name], source, {} if target_holds_masters else masters, account)
        if name in pairs
        else _own(param, account, unmatched=name not in cover.target_only)
        for name, param in template.params.items()
    }
    _source_only(source, cover, account)
    account.merged = frozenset(merge.source for merge in cover.merged)
    optimizers = _optimizers(source, template, pairs, account)
    schedules, extras = place_schedules(source, template, account.allow), place_extras(source, template)
    account.ledger += (*schedules.ledger, *extras.ledger)
    account.problems += (*schedules.problems, *extras.problems)
    account.ledger += progress_entries(replace(template, progress=source.progress))
    checkpoint = replace(
        template,
        progress=source.progress,
        params=params,
        optimizers=optimizers,
        schedules=schedules.schedules,
        extras=extras.tensors,
        provenance=replace(
            source.provenance,
            history=(
                *source.provenance.history,
                f"{source.provenance.format}:{source.provenance.dialect} -> "
                f"{template.provenance.format}:{template.provenance.dialect}",
            ),
        ),
        oddities=(),
    )
    return Transfer(
        checkpoint=checkpoint,
        ledger=tuple(account.ledger),
        verdicts=tuple(account.verdicts),
        target_requires=tuple(account.requires),
        residuals=tuple(account.residuals),
        problems=tuple(account.problems),
    )


def _with_conventions(template: Checkpoint, conventions: Mapping[str, str], account: _Account) -> Checkpoint:
    """The template with every bare counter's place saying how it is meant.

    The template's own number is of another run: it is no evidence for the convention.
    """
    residue = template.residue
    if residue is None:
        return template

    def settle(path: Path, node: Node) -> Node:
        if not isinstance(node, Lifted) or "raw" not in node.encoding or node.to[0] != "progress":
            return node
        name = str(node.to[1])
        if name in conventions:
            encoding = {key: value for key, value in node.encoding.items() if key != "raw"}
            return Lifted(to=node.to, encoding={**encoding, "plus": -1 if conventions[name] == LAST else 0})
        setting = next((key for key, field in CONVENTIONS.items() if field == name), None)
        where = "/".join(map(str, path))
        account.problems.append(
            Problem(
                code="progress-unknown",
                loc=path,
                message=f"the target has a counter at '{where}', and whether it counts what is finished or "
                "names the last one is not recorded",
                hint=f"Pass --set {name}=N --set {setting}={COUNT} (or {LAST}), or leave the key out of "
                "the template."
                if setting
                else f"Leave the key out of the template; {name} is in the embedded note.",
            )
        )
        return node

    return replace(template, residue=replace(residue, root=transform(residue.root, settle)))


def _own(param: Param, account: _Account, *, unmatched: bool) -> Param:
    """A parameter of the template that no parameter of the source makes."""
    own, entry, problems = own_param(param.name, param.role, param.tensor)
    if unmatched:
        entry = replace(entry, detail="no partner in the source", allowed_by="param-unmatched")
    account.ledger.append(entry)
    account.problems += problems
    return replace(param, tensor=own)


def _param(
    param: Param,
    pair: Pair,
    source: Checkpoint,
    masters: Mapping[str, tuple[Path, TensorRef]],
    account: _Account,
) -> Param:
    tensor = source.params[pair.source].tensor
    detail = ""
    if pair.source in masters:
        tensor, detail = _from_master(tensor, *masters[pair.source], param, account)
    made, ops = _through(tensor, pair.ops, param.tensor.spec, ("params", param.name), account)
    account.ledger.append(
        Entry(
            item=("param", pair.source),
            fate="aliased" if pair.matched_by == "alias" else "transformed" if ops else "copied",
            target=param.name,
            ops=tuple(op.to_json() for op in ops),
            evidence=f"matched by {pair.matched_by}, layout {pair.layout}",
            detail=detail,
            allowed_by="assumed-layout" if pair.layout == "assumed" else "",
        )
    )
    return replace(param, tensor=made)


def _from_master(
    copy: TensorRef, address: Path, master: TensorRef, param: Param, account: _Account
) -> tuple[TensorRef, str]:
    """The array that makes the parameter, its master or the copy that the model ran with, and why."""
    if param.tensor.dtype != copy.dtype or copy.dtype == master.dtype:
        account.ledger.append(
            Entry(item=address, fate="copied", target=param.name, detail="the weights are made from it")
        )
        return master, f"from the {master.dtype.name} master; the {copy.dtype.name} copy follows from it"
    allowed = account.refuse(
        Problem(
            code="precision-loss",
            loc=("params", param.name),
            message=f"'{param.name}' is {copy.dtype.name} in the target, which has no place for the "
            f"{master.dtype.name} master of the source",
            hint=f"Use a template with {master.dtype.name} variables, or --allow precision-loss to go on "
            f"from the {copy.dtype.name} copy.",
        )
    )
    if allowed:
        account.ledger.append(
            Entry(item=address, fate="left", detail="the target has the copy", allowed_by="precision-loss")
        )
    return copy, f"the {copy.dtype.name} copy of the {master.dtype.name} master"


def _through(
    tensor: TensorRef, ops: tuple[Op, ...], spec: TensorSpec, loc: Loc, account: _Account
) -> tuple[TensorRef, tuple[Op, ...]]:
    """The tensor after its ops, in the target's dtype."""
    done = list(ops)
    for op in ops:
        tensor = tensor.apply(op)
    if tensor.dtype != spec.dtype:
        cast = Cast(spec.dtype.name)
        if not cast.is_exact(tensor.dtype):
            account.refuse(
                Problem(
                    code="precision-loss",
                    loc=loc,
                    message=f"'{'/'.join(map(str, loc[1:]))}' is {tensor.dtype.name} in the source "
                    f"and {spec.dtype.name} in the target",
                    hint="Use a template of the source's precision, or --allow precision-loss.",
                )
            )
        tensor = tensor.apply(cast)
        done.append(cast)
    return tensor, tuple(done)


def _source_only(source: Checkpoint, cover: Cover, account: _Account) -> None:
    """Parameters of the source that make none of the target."""
    accounted = {pair.source for pair in cover.pairs}.union(
        cover.source_only, (merge.source for merge in cover.merged)
    )
    for name in source.params:
        if name not in accounted:
            account.ledger.append(
                Entry(
                    item=("param", name),
                    fate="left",
                    detail="no partner in the template",
                    allowed_by="param-unmatched",
                )
            )
    for name in cover.source_only:
        param = source.params[name]
        detail = (
            f"shares its memory with '{param.tied_to}'"
            if param.tied_to
            else "only the source's framework has it"
        )
        account.ledger.append(
            Entry(item=("param", name), fate="aliased" if param.tied_to else "left", detail=detail)
        )
    slots = [(o.name, slot, by_param) for o in source.optimizers for slot, by_param in o.slots.items()]
    for merge in cover.merged:
        items: list[Path] = [("param", merge.source)]
        items += [("slot", name, slot, merge.source) for name, slot, held in slots if merge.source in held]
        for item in items:
            account.ledger.append(
                Entry(
                    item=item,
                    fate="aliased" if merge.equal else "left",
                    detail=f"the template ties it to '{merge.kept}'"
                    + (", which is equal" if merge.equal else ""),
                    allowed_by="" if merge.equal else "tie-mismatch",
                )
            )


def _optimizers(
    source: Checkpoint, template: Checkpoint, pairs: Mapping[str, Pair], account: _Account
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
            result.append(_optimizer(partner, target, source, pairs, account))
    return tuple(result)


def _no_place(optimizer: Optimizer, account: _Account) -> None:
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


def _partners(source: Checkpoint, template: Checkpoint, account: _Account) -> dict[str, Optimizer]:
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


def _cold(target: Optimizer, source: Checkpoint, account: _Account) -> Optimizer:
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
    origin: Optimizer, target: Optimizer, source: Checkpoint, pairs: Mapping[str, Pair], account: _Account
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
    account.verdicts.append(conversion.verdict)
    if not conversion.hyperparameters:
        return target  # refused: nothing of it can be written
    if conversion.residual is not None:
        account.residuals.append((len(account.verdicts) - 1, conversion.residual))
    account.requires += conversion.target_requires
    if not isinstance(conversion.step, Known) and _counts(conversion.algorithm, target.framework):
        account.problems.append(_no_step(origin, conversion.step))
    slots = _slots(origin, target, producers, pairs, source, conversion, account)
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
        param_steps=dict(conversion.param_steps),
        groups=groups,
        slots=slots,
        scalars={**target.scalars, **conversion.scalars},
    )


def _hyperparameters(origin: Optimizer, target: Optimizer, conversion: Conversion, account: _Account) -> None:
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
        hint=f"Pass {'--source-spec' if side == 'source' else '--template'} with a skeleton of the {side}'s "
        "model and optimizer (describe()).",
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
    account: _Account,
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
                have = (
                    None
                    if slot_row.created
                    else origin.slots.get(slot_row.slot, {}).get(producers.get(name, ""))
                )
                place = places.get(name) if places else None
                if have is None and places is None and slot_row.shape == "scalar" and name in counted:
                    made[name] = FilledTensor(spec=_NUMBER, value=slot_row.init)
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
                    made[name] = FilledTensor(spec=place.spec, value=slot_row.init)
                    account.ledger.append(
                        Entry(
                            item=("slot", origin.name, slot_row.slot, producers.get(name, name)),
                            fate="created",
                            target=f"{name}/{slot_row.slot}",
                            detail=f"the source has none for it; {slot_row.init} before the first update",
                        )
                    )
                    continue
                layout = () if slot_row.shape == "scalar" else pairs[name].ops
                shape = () if slot_row.shape == "scalar" else _shape_of(target, name, pairs, source)
                spec = place.spec if place else TensorSpec(dtype=have.dtype, shape=shape)
                ops = (*layout, *slot_row.ops[position])
                made[name], done = _through(
                    have, ops, spec, ("optimizers", target.name, slot_row.slot, name), account
                )
                account.ledger.append(
                    Entry(
                        item=("slot", origin.name, slot_row.slot, producers[name]),
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


def _shape_of(target: Optimizer, name: str, pairs: Mapping[str, Pair], source: Checkpoint) -> tuple[int, ...]:
    tensor = source.params[pairs[name].source].tensor
    for op in pairs[name].ops:
        tensor = tensor.apply(op)
    return tensor.shape


def _without_place(
    origin: Optimizer, consumed: frozenset[str], matched: Collection[str], account: _Account
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


def progress_entries(checkpoint: Checkpoint) -> Iterator[Entry]:
    """Where each known counter goes: into its places of the target's file, or into the note."""
    places = {
        str(node.to[1]) if node.to[0] == "progress" else "step"
        for _, node in walk(checkpoint.residue.root if checkpoint.residue else None)
        if isinstance(node, Lifted) and node.to[0] in ("progress", "step", "param_step")
    }
    for name in PROGRESS_FIELDS:
        fact = getattr(checkpoint.progress, name)
        if isinstance(fact, Known):
            fate: Fate = "supplied" if fact.status == "supplied" else "copied" if name in places else "noted"
            yield Entry(item=("progress", name), fate=fate, detail=str(fact.value))
