"""One optimizer of two parts here, two optimizers there: Keras 3's Muon, and torch's Muon with its AdamW.

The one is divided before the optimizers are transferred, as if its class were two; the two are joined after
it, under one step. Which parameter is whose, tell the slots of the one and the groups of the two: a parameter
of which they do not agree is refused by its name.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import TypeVar

from ckptconv.account import Account
from ckptconv.catalog.conversion import in_float64
from ckptconv.catalog.hyperparameters import Settings
from ckptconv.catalog.optimizer_rows import Row, row
from ckptconv.catalog.parts import Part
from ckptconv.catalog.texts import target_code
from ckptconv.document import Checkpoint, Fact, Group, Known, Optimizer, value_of
from ckptconv.errors import Problem
from ckptconv.report import Entry
from ckptconv.ties import Pair

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Division:
    """Both documents with two optimizers of the same names, and what is needed to undo it."""

    source: Checkpoint
    template: Checkpoint
    whole: Optimizer
    """The optimizer that was divided."""
    known: Row
    """Its class."""
    part: Part
    names: Mapping[str, str]
    """Name of each of the two optimizers -> its algorithm."""
    joins: bool
    """Whether the template's was divided, so that the two become one again."""

    def undone(self, optimizers: tuple[Optimizer, ...], account: Account) -> tuple[Optimizer, ...]:
        """The target's optimizers, and an account that speaks of what the files hold."""
        if not self.joins:
            account.ledger[:] = map(self._of_whole, account.ledger)
            account.requires = list(dict.fromkeys(account.requires))  # what stands around either
            return optimizers
        by_part = {self.names[made.name]: made for made in optimizers}
        rest, part = by_part[self.known.algorithm], by_part[self.part.algorithm]
        facts = self._hyperparameters(rest, part, account)
        account.ledger[:] = [self._onto_whole(entry, facts) for entry in account.ledger]
        account.verdicts[:] = [replace(each, optimizer=self.whole.name) for each in account.verdicts]
        settings = Settings(facts=(facts,), source=({},))
        constructor = f"{self.known.class_name}("
        account.requires = [
            *target_code(self.known, settings, self.whole.form, rest.step, exact=in_float64(rest))[:1],
            f"# {' and '.join(self.part.divided_by)} of {self.known.class_name} as in the template",
            *(line for line in account.requires if not line.startswith(constructor)),
        ]
        slots = {slot: dict(by_param) for slot, by_param in rest.slots.items()}
        for slot, by_param in part.slots.items():
            slots.setdefault(self.part.slots.get(slot, slot), {}).update(by_param)
        one = replace(
            self.whole,
            step=rest.step,
            groups=tuple(replace(group, hyperparameters=facts) for group in self.whole.groups),
            slots=slots,
            scalars={**rest.scalars, **part.scalars},
        )
        return (one,)

    def _hyperparameters(self, rest: Optimizer, part: Optimizer, account: Account) -> dict[str, Fact]:
        """Those of the one optimizer: its rate is the rest's, the part's follows from it."""
        own, other = (each.groups[0].hyperparameters for each in (rest, part))
        facts = {**self.whole.groups[0].hyperparameters, **own}
        facts |= {ours: other[name] for name, ours in self.part.hyperparameters.items() if name in other}
        base, rate = (_number(each.get("learning_rate")) for each in (own, other))
        if base is None or rate is None:
            return facts  # refused
        if base == 0:
            account.problems.append(self.no_ratio(f"{rate} is none of 0"))
            return facts
        formula = f"the learning rate of '{part.name}' / that of '{rest.name}'"
        facts[self.part.rate] = Known(value=rate / base, status="derived", formula=formula)
        decay = self.part.hyperparameters["weight_decay"]
        if decay in facts:
            facts[decay] = _scaled("weight_decay", facts[decay], rate / base, self.part.rate)
        return facts

    def no_ratio(self, reason: str) -> Problem:
        return Problem(
            code="hyperparameter-unsupported",
            loc=("optimizers", self.whole.name, "groups", 0, "hyperparameters", self.part.rate),
            message=f"the rate of {self.part.algorithm} is a multiple of that of {self.known.class_name}: "
            f"{reason}",
            hint="Convert a checkpoint of a step whose learning rates are not 0.",
        )

    def _terms(self, entry: Entry) -> Mapping[str, str] | None:
        """What the whole calls the slots and hyperparameters of an entry's part; None for other entries."""
        kind, *path = entry.item
        algorithm = self.names.get(str(path[0])) if path else None
        if kind not in ("slot", "step", "hyperparameter") or algorithm is None:
            return None
        if algorithm != self.part.algorithm:
            return {}
        return self.part.slots if kind == "slot" else self.part.hyperparameters

    def _of_whole(self, entry: Entry) -> Entry:
        """An entry that names its item as the source's one optimizer does."""
        terms = self._terms(entry)
        if terms is None:
            return entry
        kind, _, *path = entry.item
        more = (
            terms.get(step, step) if isinstance(step, str) and n < 2 else step for n, step in enumerate(path)
        )
        return replace(entry, item=(kind, self.whole.name, *more))

    def _onto_whole(self, entry: Entry, facts: Mapping[str, Fact]) -> Entry:
        """An entry that names its target as the template's one optimizer does."""
        terms = self._terms(entry)
        if terms is None or not entry.target:
            return entry
        kind, optimizer, *_ = entry.item
        if kind == "slot":
            param, _, slot = entry.target.rpartition("/")
            return replace(entry, target=f"{param}/{terms.get(slot, slot)}")
        name = entry.target.removeprefix(f"{optimizer}.")
        name = self.part.rate if terms and name == "learning_rate" else terms.get(name, name)
        fact = facts.get(name)
        changed = isinstance(fact, Known) and fact.status == "derived" and terms
        detail = f"{fact.value} ({fact.formula})" if changed and isinstance(fact, Known) else entry.detail
        return replace(entry, target=f"{self.whole.name}.{name}", detail=detail)


def divide(
    source: Checkpoint, template: Checkpoint, pairs: Mapping[str, Pair], account: Account
) -> Division | None:
    """Both sides with two optimizers, where one has them as one; None where there is nothing to divide.

    Problems: template-mismatch for a parameter that is another part's on the other side, unequal-steps,
    hyperparameter-unsupported, schedule-unsupported where both sides have schedules: those of the two would
    have to be the same.
    """
    for mine, other in ((source, template), (template, source)):
        if len(mine.optimizers) != 1 or len(other.optimizers) != 2:
            continue
        whole, joins = mine.optimizers[0], mine is template
        known = row(whole.algorithm, whole.framework)
        if known is None or known.part is None:
            continue
        names = _names(known, known.part, other)
        if len(names) != 2:
            continue
        found = Division(
            source=_in_step(source, account) if joins else source,
            template=template,
            whole=whole,
            known=known,
            part=known.part,
            names=names,
            joins=joins,
        )
        divided = replace(mine, optimizers=tuple(_part(found, name, account) for name in names))
        found = replace(found, template=divided) if joins else replace(found, source=divided)
        _agree(found, pairs, account)
        return found
    return None


def _names(known: Row, part: Part, other: Checkpoint) -> Mapping[str, str]:
    """Names of the other side's optimizers that are a part of the class, and which."""
    names: dict[str, str] = {}
    for algorithm in (known.algorithm, part.algorithm):
        alone = row(f"{known.algorithm}.{algorithm}", known.framework)
        fits = [each.name for each in other.optimizers if alone and alone.family in _families(each)]
        names |= dict.fromkeys(fits[:1], algorithm)
    return names


def _families(optimizer: Optimizer) -> set[str]:
    rows = (row(n, optimizer.framework) for n in (optimizer.algorithm, *optimizer.algorithm_candidates))
    return {found.family for found in rows if found is not None}


def _part(found: Division, name: str, account: Account) -> Optimizer:
    """One part of the optimizer, with its parameters, under the name of the other side's."""
    whole, part, algorithm = found.whole, found.part, found.names[name]
    theirs = frozenset(whole.slots.get(part.told_by, {}))
    slots = {slot: slot for slot in whole.slots if slot not in found.known.slots}  # what stands around it
    if algorithm == part.algorithm:
        members, slots = theirs, {**slots, **part.slots}
        facts = [_facts_of_part(found, group, account) for group in whole.groups]
    else:
        members = frozenset(whole.params) - theirs
        slots |= {slot: slot for slot in found.known.slots if slot != part.told_by}
        facts = [{n: f for n, f in g.hyperparameters.items() if n not in part.own} for g in whole.groups]
    return replace(
        whole,
        name=name,
        algorithm=f"{found.known.algorithm}.{algorithm}",
        groups=tuple(
            Group(params=tuple(param for param in group.params if param in members), hyperparameters=own)
            for group, own in zip(whole.groups, facts, strict=True)
        ),
        slots={slot: _of(whole.slots[ours], members) for slot, ours in slots.items() if ours in whole.slots},
        param_steps=_of(whole.param_steps, members),
    )


def _of(by_param: Mapping[str, T], members: Collection[str]) -> dict[str, T]:
    return {name: value for name, value in by_param.items() if name in members}


def _facts_of_part(found: Division, group: Group, account: Account) -> dict[str, Fact]:
    """The part's hyperparameters; its rate and decay only where their ratio is known."""
    part, have = found.part, group.hyperparameters
    names = {"learning_rate": "learning_rate", **part.hyperparameters}
    around = {name: fact for name, fact in have.items() if name not in found.known.hyperparameters}
    facts = {**around, **{name: have[ours] for name, ours in names.items() if ours in have}}
    ratio = _number(have.get(part.rate))
    if ratio == 0 and not found.joins:
        account.problems.append(found.no_ratio(f"{part.rate} is 0"))
    factors = (
        {"learning_rate": (ratio, part.rate), "weight_decay": (1 / ratio, f"1 / {part.rate}")}
        if ratio
        else {}
    )
    return {
        name: _scaled(name, fact, *factors[name]) if name in factors else fact
        for name, fact in facts.items()
        if ratio or name not in ("learning_rate", "weight_decay")
    }


def _number(fact: Fact | None) -> float | None:
    value = value_of(fact)
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def _scaled(name: str, fact: Fact, factor: float, formula: str) -> Fact:
    """The number times the factor."""
    value = _number(fact)
    if not isinstance(fact, Known) or value is None or factor == 1:
        return fact
    return replace(fact, value=value * factor, status="derived", formula=f"{name} * {formula}")


def _in_step(source: Checkpoint, account: Account) -> Checkpoint:
    """The run whose optimizers count together: one that counts no updates has done the other's."""
    told = {o.name: o.step for o in source.optimizers if isinstance(o.step, Known)}
    counts = {name: step.value for name, step in told.items() if isinstance(step.value, int)}
    if not counts:
        return source
    name = max(counts, key=lambda each: counts[each])
    if len(set(counts.values())) > 1:
        account.refuse(
            Problem(
                code="unequal-steps",
                loc=("optimizers", name, "step"),
                message="the target's optimizer counts for both of the source's, which have done "
                + " and ".join(f"{count} ('{each}')" for each, count in counts.items()),
                hint=f"Allow unequal-steps to write {counts[name]}.",
            )
        )
    step = replace(told[name], status="derived", formula=f"that of '{name}'")
    progress = source.progress
    return replace(
        source,
        optimizers=tuple(replace(o, step=told[name] if o.name == name else step) for o in source.optimizers),
        progress=progress if isinstance(progress.step, Known) else replace(progress, step=step),
    )


def _agree(found: Division, pairs: Mapping[str, Pair], account: Account) -> None:
    """Notes what the two sides do not have in common."""
    owners = {name: one.name for one in found.source.optimizers for name in one.params}
    for target in found.template.optimizers:
        for name in target.params:
            owner = owners.get(pairs[name].source) if name in pairs else None
            if owner not in (None, target.name):
                account.problems.append(
                    Problem(
                        code="template-mismatch",
                        loc=("optimizers", target.name, "params", name),
                        message=f"'{name}' is trained by {found.names[target.name]} in the template and by "
                        f"{found.names[str(owner)]} in the source",
                        hint="Make the template with the source's division: what the groups of torch's two "
                        f"optimizers hold, {found.known.class_name} says by "
                        f"{' and '.join(found.part.divided_by)}.",
                    )
                )
    if found.source.schedules and found.template.schedules:
        account.problems.append(
            Problem(
                code="schedule-unsupported",
                loc=("schedules", found.template.schedules[0].name),
                message=f"one schedule moves both rates of {found.known.class_name}, two optimizers have "
                "one each",
                hint="Use a template without schedules and allow schedule-unsupported: the rates are frozen.",
            )
        )
