"""Moving averages of the weights in a transfer: whose goes where, and whether it goes on alike.

torch's `AveragedModel` copies the weights at its first update and counts its updates; Keras 3 copies them at
the run's first update; tf_keras, and the many who average a copy of the model, begin with the weights before
it. From the second update on all are one rule, with a decay that only a Keras config records.
"""

from __future__ import annotations

from collections.abc import Mapping

from ckptconv.account import Account, through
from ckptconv.catalog.texts import number
from ckptconv.catalog.wrappers import AVERAGE, AVERAGED, wrappers
from ckptconv.document import Checkpoint, Fact, Known, Optimizer, Param, Value, value_of
from ckptconv.errors import Problem
from ckptconv.report import Entry
from ckptconv.tensor import TensorRef
from ckptconv.ties import Pair


def place_averages(
    origin: Optimizer,
    target: Optimizer,
    made: Mapping[str, Param],
    source: Checkpoint,
    pairs: Mapping[str, Pair],
    account: Account,
) -> tuple[Mapping[str, TensorRef], Mapping[str, Fact]]:
    """The averages of the target's parameters, and how often they were moved, where it has places for them.

    `made`: the target's parameters with the source's values.
    """
    held, places = origin.slots.get(AVERAGE, {}), target.slots.get(AVERAGE, {})
    if not places:
        if held and target.param_order != "unknown":
            _left(origin, target, account)
        return {}, {}
    step = value_of(origin.step)
    begun = not isinstance(step, int) or step > 0
    if not held and begun:
        _lacking(origin, account)
    averages = {}
    for name, place in places.items():
        pair = pairs.get(name)
        producer = source.params[pair.source].tied_to or pair.source if pair is not None else ""
        have = held.get(producer)
        if have is None or pair is None:
            averages[name] = made[name].tensor if made[name].tensor.spec == place.spec else place
            account.ledger.append(
                Entry(
                    item=("slot", origin.name, AVERAGE, producer or name),
                    fate="created",
                    target=f"{name}/{AVERAGE}",
                    detail="it begins at the weights",
                    allowed_by="slots-missing" if begun and not held else "",
                )
            )
            continue
        loc = ("optimizers", target.name, AVERAGE, name)
        averages[name], done = through(have, pair.ops, place.spec, loc, account)
        account.ledger.append(
            Entry(
                item=("slot", origin.name, AVERAGE, producer),
                fate="transformed" if done else "copied",
                target=f"{name}/{AVERAGE}",
                ops=tuple(op.to_json() for op in done),
            )
        )
    return averages, _counted(origin, target, account) if held else _from_zero(target)


def _left(origin: Optimizer, target: Optimizer, account: Account) -> None:
    table = wrappers(target.framework)
    code = average_code(origin, target)
    if account.refuse(
        Problem(
            code="state-dropped",
            loc=("optimizers", origin.name, AVERAGE),
            message="the target has no place for the moving average of the weights "
            f"({len(origin.slots[AVERAGE])} parameters)",
            hint=f"Make the template with {code.partition('  #')[0]}; or allow state-dropped to leave it."
            if table is not None and table.average
            else "Allow state-dropped to leave it behind.",
        )
    ):
        account.differ("lossy", "the moving average of the weights stays behind (allowed: state-dropped)")
        detail, code_ = "the target keeps no average", "state-dropped"
        account.ledger.append(
            Entry(item=("slot", origin.name, AVERAGE), fate="left", detail=detail, allowed_by=code_)
        )


def _lacking(origin: Optimizer, account: Account) -> None:
    message = "the target keeps a moving average of the weights, the source has none"
    problem = Problem(
        code="slots-missing",
        loc=("optimizers", origin.name, AVERAGE),
        message=message,
        hint="Use a template without it, or allow slots-missing to begin it at the weights.",
    )
    if account.refuse(problem):
        account.differ("lossy", f"{message} (allowed: slots-missing)")


def _counted(origin: Optimizer, target: Optimizer, account: Account) -> Mapping[str, Fact]:
    """The target's count of averages: of nothing else than whether there was a first does the rule know."""
    step = value_of(origin.step)
    mine, theirs = _moved(origin, step), _moved(target, step)
    known = origin.scalars.get(AVERAGED)
    if AVERAGED in target.scalars:
        if isinstance(known, Known):
            return {AVERAGED: known}
        count = max(step, 1) if isinstance(step, int) and mine else int(mine)
        return {AVERAGED: Known(value=count, status="derived", formula="one average per update")}
    if mine != theirs:
        begins = {True: "moves the average", False: "begins the average anew"}
        message = f"the source's next update {begins[mine]}, the target's {begins[theirs]}"
        problem = Problem(
            code="form-mismatch",
            loc=("optimizers", origin.name, AVERAGED),
            message=message,
            hint="Convert a checkpoint of a later update, or allow form-mismatch to accept the difference.",
        )
        if account.refuse(problem):
            account.differ("lossy", f"{message} (allowed: form-mismatch)")
    return {}


def _from_zero(target: Optimizer) -> Mapping[str, Fact]:
    """A count that begins with the average."""
    begins = Known(value=0, status="derived", formula="the average begins here")
    return {AVERAGED: begins} if AVERAGED in target.scalars else {}


def _moved(optimizer: Optimizer, step: Value) -> bool:
    """Whether the next update moves the average, and does not begin it."""
    table = wrappers(optimizer.framework)
    match table.average_begins if table is not None else "counter":
        case "counter":
            count = value_of(optimizer.scalars.get(AVERAGED))
            return bool(count) if AVERAGED in optimizer.scalars else True
        case "first update":
            return step != 0
    return True


def average_code(origin: Optimizer, target: Optimizer) -> str:
    """The line that makes the target keep the average, with the source's decay."""
    table = wrappers(target.framework)
    facts = origin.groups[0].hyperparameters if origin.groups else {}
    decay = value_of(facts.get("ema_momentum"))
    line = (table.average or "") if table is not None else ""
    if decay is None:
        said = line.replace("{ema_momentum}", "DECAY")
        return f"{said}{',' if '#' in said else '  #'} the source's DECAY is recorded nowhere"
    return line.replace("{ema_momentum}", number(decay))
