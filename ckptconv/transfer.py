"""From a source document and a template's to the document that is written: every value finds its place.

The result has the template's names, axes, dtypes, groups and residue, and the source's values. Each item
of the source is in the ledger with what became of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from types import MappingProxyType

from ckptconv.account import MASTER, Account, Transfer, through
from ckptconv.document import (
    PROGRESS_FIELDS,
    Checkpoint,
    Known,
    Param,
)
from ckptconv.errors import Problem
from ckptconv.extras import own_param, place_extras
from ckptconv.mapping import Cover
from ckptconv.optimizer_parts import divide
from ckptconv.optimizer_transfer import transfer_optimizers
from ckptconv.rawtree import Lifted, Node, Path, transform, walk
from ckptconv.report import Entry, Fate
from ckptconv.schedules import place_schedules, with_rates
from ckptconv.supply import CONVENTIONS, COUNT, LAST
from ckptconv.tensor import TensorRef
from ckptconv.ties import Pair
from ckptconv.wrappers import unwrapped, wrap


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
    account = Account(allow)
    template = _with_conventions(template, conventions, account)
    source = with_rates(source, template, conventions)
    pairs = {pair.target: pair for pair in cover.pairs}
    masters = {
        name: (("slot", optimizer.name, MASTER, name), tensor)
        for optimizer in source.optimizers
        for name, tensor in optimizer.slots.get(MASTER, {}).items()
    }
    for name, param in source.params.items():
        if param.tied_to in masters:  # the optimizer has one name of a parameter that has several
            masters.setdefault(name, masters[param.tied_to])
    target_holds_masters = any(MASTER in optimizer.slots for optimizer in template.optimizers)
    params = {
        name: _param(param, pairs[name], source, {} if target_holds_masters else masters, account)
        if name in pairs
        else _own(param, account, unmatched=name not in cover.target_only)
        for name, param in template.params.items()
    }
    _source_only(source, cover, account)
    account.merged = frozenset(merge.source for merge in cover.merged)
    division = divide(source, template, pairs, account)
    ours, theirs = (division.source, division.template) if division else (source, template)
    optimizers = transfer_optimizers(unwrapped(ours), unwrapped(theirs), pairs, account)
    wrapped = wrap(ours, theirs, optimizers, params, pairs, account)
    made = division.undone(wrapped.optimizers, account) if division else wrapped.optimizers
    schedules = place_schedules(source, template, account.allow, optimizers=made, conventions=conventions)
    for rate, code in schedules.codes.items():
        account.requires = [line.replace(rate, code) for line in account.requires]
    account.requires = [*schedules.requires, *account.requires, *schedules.helpers]
    extras = place_extras(source, template, params, account.allow)
    account.ledger += (*schedules.ledger, *extras.ledger)
    account.problems += (*schedules.problems, *extras.problems)
    account.ledger += progress_entries(replace(template, progress=wrapped.progress))
    checkpoint = replace(
        template,
        progress=wrapped.progress,
        loss_scaling=wrapped.loss_scaling,
        params=params,
        optimizers=schedules.optimizers,
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


def _with_conventions(template: Checkpoint, conventions: Mapping[str, str], account: Account) -> Checkpoint:
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


def _own(param: Param, account: Account, *, unmatched: bool) -> Param:
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
    account: Account,
) -> Param:
    tensor = source.params[pair.source].tensor
    detail = ""
    if pair.source in masters:
        tensor, detail = _from_master(tensor, *masters[pair.source], param, account)
    made, ops = through(tensor, pair.ops, param.tensor.spec, ("params", param.name), account)
    account.ledger.append(
        Entry(
            item=("param", pair.source),
            fate="aliased" if pair.matched_by == "alias" else "transformed" if ops else "copied",
            target=param.name,
            ops=tuple(op.to_json() for op in ops),
            evidence=f"{pair.layout}, by {pair.matched_by}",
            detail=detail,
            allowed_by="assumed-layout" if pair.layout == "assumed" else "",
        )
    )
    return replace(param, tensor=made)


def _from_master(
    copy: TensorRef, address: Path, master: TensorRef, param: Param, account: Account
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


def _source_only(source: Checkpoint, cover: Cover, account: Account) -> None:
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
