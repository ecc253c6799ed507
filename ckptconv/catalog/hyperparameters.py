"""The target's hyperparameters: what the source records wins, what it lacks comes from the template.

Nothing here is a default: a value that neither side tells stays open, and is a problem where the target's
file holds it. A class that has no such hyperparameter (Keras' SGD no dampening) stands at its neutral value.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from ckptconv.catalog.optimizer_rows import Row
from ckptconv.document import Fact, Group, Known, Optimizer, Value, value_of

Refuse = Callable[..., None]
"""`(code, message, hint, *loc, helper=)`: a problem, unless the caller allowed its code."""

_FOLDED = frozenset({"base_learning_rate", "learning_rate_decay", "dampening", "weight_decay", "epsilon"})
"""Hyperparameters that a rule of their own carries over to a class that has none."""

_LARGEST = 1 << 53
"""Whole numbers up to here are doubles."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """The hyperparameters of both sides, per group of the target."""

    facts: tuple[Mapping[str, Fact], ...]
    """What the target's groups hold, or its code must say."""
    source: tuple[Mapping[str, Value], ...]
    """What the source trained with, as far as the source itself tells."""
    open: tuple[str, ...] = ()
    """Hyperparameters of the target's class that neither side tells."""
    excluded: tuple[str, ...] = ()
    """Parameters that do not decay, where the target has one group for all."""
    coupled_decay: float = 0.0
    """A decay that the target's code has to express as a regularizer."""
    maximize: bool = False
    """The source maximizes, which the target's class cannot say."""

    def target(self, group: int) -> dict[str, Value]:
        """Plain values of the target's group, those that are known."""
        return {name: fact.value for name, fact in self.facts[group].items() if isinstance(fact, Known)}


def settle(source: Optimizer, target: Optimizer, ours: Row, theirs: Row, refuse: Refuse) -> Settings:
    """Which value each hyperparameter of each target group has."""
    groups = target.groups or (Group(params=source.params),)
    owner = {name: group for group in source.groups for name in group.params}
    facts: list[Mapping[str, Fact]] = []
    sources: list[Mapping[str, Value]] = []
    unknown: list[str] = []
    missing: dict[str, int] = {}
    excluded: tuple[str, ...] = ()
    coupled = 0.0
    for index, group in enumerate(groups):
        members = _members(group, owner, source)
        own = _own(source, members, ours, theirs, index, refuse)
        if "weight_decay" in own and len(members) > 1 and _takes_exclusions(theirs):
            own["weight_decay"], excluded = _exclusions(members, own["weight_decay"], group, index, refuse)
        if _takes_exclusions(ours) and _is_excluded(group, groups):
            own["weight_decay"] = Known(value=0.0, status="supplied", source="template")
        sources.append({name: fact.value for name, fact in own.items()})
        told, dropped = _translate(own, group, ours, theirs, source, index, refuse)
        coupled = coupled or dropped
        for name, row in theirs.hyperparameters.items():
            if name in told or row.optional:
                continue
            if row.stored and group.hyperparameters:
                missing.setdefault(name, index)
            elif name not in unknown and name not in theirs.switches:
                unknown.append(name)
        facts.append(told)
    if missing:
        names = ", ".join(missing)
        refuse(
            "hyperparameter-missing",
            f"{theirs.class_name} keeps {names} in its file; neither source nor template records them",
            "Pass " + " ".join(f"--set {name}=VALUE" for name in missing) + ", or a template that has them.",
            "groups",
            min(missing.values()),
            "hyperparameters",
            next(iter(missing)),
        )
    return Settings(
        facts=tuple(facts),
        source=tuple(sources),
        open=tuple(unknown),
        excluded=excluded,
        coupled_decay=coupled,
        maximize=any(values.get("maximize") is True for values in sources)
        and "maximize" not in theirs.hyperparameters,
    )


def _members(group: Group, owner: Mapping[str, Group], source: Optimizer) -> tuple[Group, ...]:
    """The source's groups that a target group's parameters come from, in the source's order."""
    wanted = {id(owner[name]) for name in group.params if name in owner}
    return tuple(g for g in source.groups if id(g) in wanted) or source.groups


def _own(
    source: Optimizer, members: tuple[Group, ...], ours: Row, theirs: Row, index: int, refuse: Refuse
) -> dict[str, Known]:
    """What the source tells of a target group's hyperparameters: recorded, or implied by class and slots."""
    told: dict[str, Known] = {}
    names = dict.fromkeys(name for group in members for name in group.hyperparameters)
    for name in names:
        known = [f for g in members if isinstance(f := g.hyperparameters.get(name), Known)]
        if any(_is_absurd(fact.value) for fact in known):
            refuse(
                "hyperparameter-unsupported",
                f"the source's {name} is no number that a {theirs.class_name} can use",
                f"Pass --set {name}=VALUE.",
                "groups",
                index,
                "hyperparameters",
                name,
            )
            continue
        if not known:
            continue
        told[name] = known[0]
        differing = {_comparable(fact.value) for fact in known}
        if len(differing) > 1 and not (name == "weight_decay" and _takes_exclusions(theirs)):
            refuse(
                "groups-differ",
                f"the source's groups have {name} = {', '.join(map(str, sorted(differing, key=str)))}, "
                f"the target has one group for their parameters",
                f"Pass --set {name}=VALUE for all, or allow groups-differ to use the first group's.",
                "groups",
                index,
                "hyperparameters",
                name,
            )
    for name, rule in ours.rules.items():
        if name in told:  # a helper ran: what it stands for is its number
            told.update(dict.fromkeys(rule.form, replace(told[name], formula=f"that of {name}")))
    for name, entry in ours.hyperparameters.items():
        if entry.none is not None and name not in told and source.slots:
            told[name] = Known(value=entry.none, status="derived", formula=f"{entry.argument} is None")
    for same in ours.equivalents:
        if any(name in told and told[name].value == value for name, value in same.items()):
            said = Known(value=None, status="derived", formula="says the same as another")
            told.update((name, replace(said, value=v)) for name, v in same.items() if name not in told)
    for name, value in {**theirs.neutral, **ours.neutral}.items():
        if name not in told and name not in ours.hyperparameters:
            told[name] = Known(value=value, status="derived", formula=f"{ours.class_name} has none")
    for slot, name in ours.slot_conditions.items():
        flag = isinstance(ours.hyperparameters[name].default, bool)
        if name in told or (slot in source.slots and not flag):
            continue
        has = "has" if slot in source.slots else "has no"
        value = slot in source.slots if flag else 0.0
        told[name] = Known(value=value, status="derived", formula=f"the state {has} {slot}")
    return told


def _is_absurd(value: Value) -> bool:
    """Whether a damaged file's number is not finite, or beyond what a double holds."""
    if isinstance(value, float):
        return not math.isfinite(value)
    return isinstance(value, int) and abs(value) > _LARGEST


def _comparable(value: Value) -> Value:
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else value


def _takes_exclusions(theirs: Row) -> bool:
    """Whether the class can leave parameters out of its decay: one that keeps no decay per group."""
    decay = theirs.hyperparameters.get("weight_decay")
    return theirs.base_form.get("weight_decay") == "decoupled" and decay is not None and not decay.stored


def _is_excluded(group: Group, groups: tuple[Group, ...]) -> bool:
    """Whether the template leaves the group's parameters out of a decay that others have.

    A class that takes exclusions is told them by its code: no file says which parameters they are.
    """
    decays = [value_of(g.hyperparameters.get("weight_decay")) for g in groups]
    return value_of(group.hyperparameters.get("weight_decay")) == 0 and any(decays)


def _exclusions(
    members: tuple[Group, ...], first: Known, group: Group, index: int, refuse: Refuse
) -> tuple[Known, tuple[str, ...]]:
    """One decay for all groups, and the parameters of those that have none."""
    values = {id(g): value_of(g.hyperparameters.get("weight_decay")) or 0.0 for g in members}
    decays = sorted({float(v) for v in values.values() if isinstance(v, (int, float)) and v})
    if len(decays) > 1:
        refuse(
            "groups-differ",
            f"the source's groups have weight_decay = {', '.join(map(str, decays))}; the target has one",
            "Pass --set weight_decay=VALUE for all, or allow groups-differ to use the first group's.",
            "groups",
            index,
            "hyperparameters",
            "weight_decay",
        )
        return first, ()
    if not decays:
        return first, ()
    held = set(group.params)
    out = tuple(name for g in members if not values[id(g)] for name in g.params if name in held)
    return replace(first, value=decays[0]), out


def _translate(
    own: Mapping[str, Known],
    group: Group,
    ours: Row,
    theirs: Row,
    source: Optimizer,
    index: int,
    refuse: Refuse,
) -> tuple[dict[str, Fact], float]:
    """The source's values in the target's terms, completed from the template; and a dropped decay."""
    told: dict[str, Fact] = {name: fact for name, fact in own.items() if name in theirs.hyperparameters}
    loc = ("groups", index, "hyperparameters")
    for name, fact in own.items():
        said = (*theirs.hyperparameters, *_FOLDED, *ours.settled, *ours.switches, *ours.rules)
        if name in said:
            continue
        same = (e for e in theirs.equivalents if name in e and e[name] == fact.value)
        if any(other in theirs.hyperparameters for each in same for other in each):
            continue
        if fact.value != theirs.neutral.get(name, None if name in ours.hyperparameters else fact.value):
            refuse(
                "hyperparameter-unsupported",
                f"{theirs.class_name} has no {name}, the source has {name} = {fact.value}",
                "Express it in the target's code (negate the loss for maximize) and allow it by this code.",
                *loc,
                name,
                helper=theirs.helpers.get(name, "").replace(f"{{{name}}}", repr(fact.value)),
            )
    _learning_rate(own, told, theirs, source, loc, refuse)
    dropped = _weight_decay(own, told, group, ours, theirs, loc, refuse)
    for name, rule in theirs.rules.items():
        offered = group.hyperparameters.get(name)
        if isinstance(offered, Known):
            fact = replace(offered, status="supplied", source="template")
            told[name] = fact
            for point in rule.form:
                told.setdefault(point, fact)
    for name in theirs.hyperparameters:
        offered = group.hyperparameters.get(name)
        if name not in told and isinstance(offered, Known):
            told[name] = replace(offered, status="supplied", source="template")
    return told, dropped


def _learning_rate(
    own: Mapping[str, Known],
    told: dict[str, Fact],
    theirs: Row,
    source: Optimizer,
    loc: tuple[str | int, ...],
    refuse: Refuse,
) -> None:
    """The rate of the target's next update: less the dampening, and along a decay that the target has not."""
    rate = own.get("learning_rate")
    if rate is None or not isinstance(rate.value, (int, float)):
        return
    value, formulas = float(rate.value), []
    decay = own.get("learning_rate_decay")
    if decay is not None and decay.value and "learning_rate_decay" not in theirs.hyperparameters:
        step = value_of(source.step)
        refuse(
            "schedule-unsupported",
            f"the source's rate falls by 1 / (1 + {decay.value} step), {theirs.class_name} has no such decay",
            "Give the target's code a schedule and allow schedule-unsupported: the rate is then frozen.",
            *loc,
            "learning_rate_decay",
        )
        fallen = (
            1 + decay.value * step if isinstance(step, int) and isinstance(decay.value, (int, float)) else 0
        )
        if fallen > 0:
            value /= fallen
            formulas.append(f"learning_rate / (1 + {decay.value} * {step})")
    dampening = own.get("dampening")
    if dampening is not None and dampening.value and "dampening" not in theirs.hyperparameters:
        assert isinstance(dampening.value, (int, float))
        if dampening.value == 1:
            refuse(
                "form-mismatch",
                f"dampening = 1 keeps the gradient out of the buffer: {theirs.class_name} gets the rate 0",
                "Allow form-mismatch if the run is meant so: the buffer alone goes on moving the weights.",
                *loc,
                "dampening",
            )
        value *= 1 - dampening.value
        formulas.append(f"learning_rate * (1 - {dampening.value})")
    if formulas:
        told["learning_rate"] = replace(rate, value=value, status="derived", formula=" and ".join(formulas))


def _weight_decay(
    own: Mapping[str, Known],
    told: dict[str, Fact],
    group: Group,
    ours: Row,
    theirs: Row,
    loc: tuple[str | int, ...],
    refuse: Refuse,
) -> float:
    """Carries a decay over where both sides mean the same by it; what was dropped of a coupled one."""
    mine = ours.form({name: fact.value for name, fact in own.items()}).get("weight_decay", "none")
    offers = {name: value_of(fact) for name, fact in group.hyperparameters.items() if name in theirs.rules}
    other = theirs.form(offers).get("weight_decay", "none")
    switch = next((n for n, change in theirs.switches.items() if change.get("weight_decay") == mine), None)
    fact = own.get("weight_decay")
    offered = value_of(group.hyperparameters.get("weight_decay"))
    if fact is None:
        if mine != other and offered:
            refuse(
                "form-mismatch",
                f"the template's {other} weight_decay = {offered} is another rule than {ours.class_name}'s, "
                f"whose value the source does not record",
                "Pass --set weight_decay=0 if the source run had none, or use a template that matches.",
                *loc,
                "weight_decay",
            )
        return 0.0
    value = fact.value or 0.0
    if not isinstance(value, (int, float)) or value == 0 or mine in (other, "none"):
        if "weight_decay" in theirs.hyperparameters:
            told["weight_decay"] = replace(fact, value=value)
        return 0.0
    if switch is not None:
        told["weight_decay"] = replace(fact, value=value)
        told[switch] = Known(value=True, status="derived", formula=f"the source's decay is {mine}")
        return 0.0
    regularizer = f"kernel_regularizer=keras.regularizers.L2({value / 2!r})"
    way = {
        "coupled": f"The same rule in Keras is {regularizer} (and bias_regularizer) in the model's code",
        "decoupled": "Use a template whose optimizer decays decoupled (AdamW)",
    }[mine]
    refuse(
        "form-mismatch",
        f"the source's weight_decay = {value} is {mine}, that of {theirs.class_name} is {other}",
        f"{way}; then allow form-mismatch, and the optimizer itself does not decay.",
        *loc,
        "weight_decay",
        helper=theirs.helper("weight_decay", mine).replace("{weight_decay}", repr(value)),
    )
    if "weight_decay" in theirs.hyperparameters:
        told["weight_decay"] = Known(value=0.0, status="derived", formula=f"the source's decay is {mine}")
    return float(value) if mine == "coupled" and math.isfinite(value) else 0.0
