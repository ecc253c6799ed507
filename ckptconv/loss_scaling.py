"""The loss scaling of a transfer: scale, counter and settings, and what the target's scaler cannot be given.

A scaler belongs to float16 training. A target without one is no loss: its update does not read the scale, and
the note keeps it. Where the target has one, what its class leaves no choice of must be the source's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from ckptconv.account import Account, Addresses
from ckptconv.catalog.texts import number
from ckptconv.catalog.wrappers import SCALE, Scaler, loss_scaling, wrappers
from ckptconv.document import Checkpoint, Fact, Known, value_of
from ckptconv.errors import Problem
from ckptconv.report import Entry, Fate

_TRACKER = "growth_tracker"
_PLACE = ("progress", SCALE)


def place_loss_scaling(
    source: Checkpoint, template: Checkpoint, places: Addresses, account: Account
) -> Mapping[str, Fact]:
    """What the target's scaler keeps beside the scale, which stays a field of the source's progress."""
    frameworks = [optimizer.framework for optimizer in template.optimizers] or ["torch"]
    table, scale = wrappers(frameworks[0]), source.progress.loss_scale
    if table is None:
        return source.loss_scaling
    if not isinstance(scale, Known):
        return _unscaled(source, template, places, account)
    told = {name: fact for name, fact in source.loss_scaling.items() if isinstance(fact, Known)}
    facts: dict[str, Fact] = dict(told)
    if any(place == _PLACE or place[0] == "loss_scaling" for place in places):
        facts = _settled(scale, told, template, table.scaler, places, account)
    every = {**facts, SCALE: scale}
    open_ = {n: f for n, f in every.items() if (_PLACE if n == SCALE else ("loss_scaling", n)) not in places}
    if table.scaler.arguments.keys() & open_.keys():
        account.requires.append(_in_code(table.scaler, open_))
    for name, fact in facts.items():
        held = ("loss_scaling", name) in places
        fate: Fate = "copied" if held else "noted"
        if isinstance(fact, Known) and fact.status == "supplied":
            fate = "supplied"
        target, detail = name if held else "", str(value_of(fact))
        account.ledger.append(Entry(item=("loss_scaling", name), fate=fate, target=target, detail=detail))
    return facts


def _unscaled(
    source: Checkpoint, template: Checkpoint, places: Addresses, account: Account
) -> Mapping[str, Fact]:
    """The settings of a scaler for a run that had none, which must be told the scale."""
    if _PLACE not in places:
        return {**template.loss_scaling, **source.loss_scaling}
    account.problems.append(
        Problem(
            code="progress-unknown",
            loc=_PLACE,
            message="the target scales the loss, and the source does not tell its scale",
            hint="Pass --set loss_scale=N to begin with, or use a template that does not scale the loss.",
        )
    )
    return source.loss_scaling


def _settled(
    scale: Known,
    told: Mapping[str, Known],
    template: Checkpoint,
    scaler: Scaler,
    places: Addresses,
    account: Account,
) -> dict[str, Fact]:
    """Each setting of the target's scaler: its class's own, the source's, the template's."""
    if isinstance(scale.value, (int, float)) and scale.value < scaler.least:
        _refuse(SCALE, scale.value, f"never falls below {scaler.least:g}", scaler, account)
    facts: dict[str, Fact] = {}
    for name in loss_scaling():
        mine, own = told.get(name), template.loss_scaling.get(name)
        if name in scaler.fixed:
            fixed = scaler.fixed[name]
            if mine is not None and mine.value != fixed:
                _refuse(name, mine.value, f"has {fixed:g}", scaler, account)
            facts[name] = Known(value=fixed, status="derived", formula=f"the one of {scaler.class_name}")
        elif mine is not None:
            facts[name] = mine
        elif name == _TRACKER and scale.status == "supplied":
            facts[name] = Known(value=0, status="derived", formula="the scale begins here")
        elif name != _TRACKER and isinstance(own, Known):
            facts[name] = replace(own, status="supplied", source="template")
        elif ("loss_scaling", name) in places:
            account.problems.append(
                Problem(
                    code="progress-unknown",
                    loc=("loss_scaling", name),
                    message=f"the target's scaler keeps {name}, which the source does not tell",
                    hint=f"Pass --set {name}=N.",
                )
            )
    return facts


def _refuse(name: str, value: object, have: str, scaler: Scaler, account: Account) -> None:
    message = f"the source's loss scaling has {name} = {value}, {scaler.class_name} {have}"
    problem = Problem(
        code="form-mismatch",
        loc=("loss_scaling", name),
        message=message,
        hint="The weights go on alike until the scale changes; allow form-mismatch to accept that it changes "
        "otherwise.",
    )
    if account.refuse(problem):
        account.differ("lossy", f"{message} (allowed: form-mismatch)")


def _in_code(scaler: Scaler, facts: Mapping[str, Fact]) -> str:
    """The scaler's constructor with what the target's file has no place for."""
    given = [scaler.wraps] if scaler.wraps else []
    given += [
        f"{argument}={number(value_of(facts[name]))}"
        for name, argument in scaler.arguments.items()
        if isinstance(facts.get(name), Known)
    ]
    return f"{scaler.class_name}({', '.join(given)})  # the file has no place for it"
