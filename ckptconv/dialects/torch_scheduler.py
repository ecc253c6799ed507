"""`LRScheduler.state_dict()` of PyTorch as a schedule of the document.

`last_epoch` is the number of `step()` calls, whatever the loop calls it for: per update or per epoch is the
user's choice and not recorded. `_step_count` is `last_epoch + 1`; `_last_lr` and `base_lrs` repeat the
groups' `lr` and `initial_lr`. The class is not stored: the family is told by the keys that only it has.
Lambdas are not stored at all. Source: torch 2.13 `torch/optim/lr_scheduler.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from ckptconv.dialects import torch_keys
from ckptconv.dialects.residue import Lifter
from ckptconv.dialects.torch_values import count_of, dotted, number_of
from ckptconv.document import Fact, Known, Optimizer, Schedule, Unknown
from ckptconv.rawtree import DictNode, ListNode, Node, Path


def is_scheduler(node: Node) -> bool:
    """Whether a node is a scheduler's state_dict."""
    if not isinstance(node, DictNode):
        return False
    keys = set(node.keys)
    return "_schedulers" in keys or ("last_epoch" in keys and bool(keys & torch_keys.SCHEDULER_MARKS))


def lift_schedule(
    node: DictNode, path: Path, name: str, optimizer: Optimizer | None, lifter: Lifter
) -> tuple[Schedule, tuple[str, ...]]:
    """The schedule whose state_dict stands at `path`, and what is odd about it."""
    position = _position(node, path, name, lifter)
    parameters: dict[str, Fact] = {}
    for key, value in node.items:
        if not isinstance(key, str) or key in torch_keys.SCHEDULER_BOOKKEEPING:
            continue
        where, number = (*path, key), number_of(value)
        if number is not None:
            parameters[key] = Known(value=number[0], source=dotted(where))
            lifter.take(where, ("schedule", name, key), **number[1])
        elif isinstance(value, str):
            parameters[key] = Known(value=value, source=dotted(where))
            lifter.take(where, ("schedule", name, key))
    if optimizer is not None:
        _rates(node, "_last_lr", "learning_rate", path, optimizer, lifter)
        _rates(node, "base_lrs", "base_learning_rate", path, optimizer, lifter)
    schedule = Schedule(
        name=name,
        family=_family(node),
        position=position,
        parameters=parameters,
        optimizer=optimizer.name if optimizer is not None else "unknown",
    )
    odd = f"'{name}' counts in {dotted((*path, 'last_epoch'))}, whether updates or epochs is not recorded."
    return schedule, (odd,) if isinstance(position, Known) and position.value else ()


def _family(node: DictNode) -> str:
    keys = {key for key in node.keys if isinstance(key, str)}
    return next((family for family, marks in torch_keys.FAMILIES if marks <= keys), "unknown")


def _position(node: DictNode, path: Path, name: str, lifter: Lifter) -> Fact:
    where = (*path, "last_epoch")
    found = count_of(node.get("last_epoch"))
    if found is None:
        return Unknown(reason="the scheduler stores no position of its own")
    last, how = found
    lifter.take(where, ("position", name), **how)
    count = count_of(node.get("_step_count"))
    if count is not None and count[0] == last + 1:
        lifter.take((*path, "_step_count"), ("position", name), **{**count[1], "plus": 1})
    return Known(value=last, source=dotted(where))


def _rates(
    node: DictNode, key: str, canonical: str, path: Path, optimizer: Optimizer, lifter: Lifter
) -> None:
    """The scheduler's copies of the groups' rates: taken where they are copies, else left as they stand."""
    rates = node.get(key)
    if not isinstance(rates, ListNode) or len(rates.items) != len(optimizer.groups):
        return
    for position, (rate, group) in enumerate(zip(rates.items, optimizer.groups, strict=True)):
        found, fact = number_of(rate), group.hyperparameters.get(canonical)
        if found is not None and isinstance(fact, Known) and found[0] == fact.value:
            address: Path = ("hyperparameter", optimizer.name, position, canonical)
            lifter.take((*path, key, position), address, **found[1])


def moved(schedules: tuple[Schedule, ...], edits: Mapping[str, tuple[int, int]]) -> dict[str, int]:
    """New positions of the schedules that stood where their optimizer's step stood before it was edited."""
    positions = {}
    for schedule in schedules:
        if schedule.optimizer in edits and isinstance(schedule.position, Known):
            old, new = edits[schedule.optimizer]
            if schedule.position.value == old:
                positions[schedule.name] = new
    return positions


def rate_at(schedule: Schedule, base: float, position: int) -> float | None:
    """The learning rate of a torch schedule in closed form; None where the family has none here.

    Units: `position` as `last_epoch`. Source: the `_get_closed_form_lr` of torch 2.13's classes.
    """
    named = {name: fact.value for name, fact in schedule.parameters.items() if isinstance(fact, Known)}
    values = {name: float(v) for name, v in named.items() if isinstance(v, (int, float))}
    formula = _FORMULAS.get(schedule.family)
    if formula is None:
        return None
    try:
        return formula(values, base, position)
    except (KeyError, ZeroDivisionError, OverflowError):
        return None


def _done(values: Mapping[str, float], position: int) -> float:
    return min(position, values["total_iters"]) / values["total_iters"]


_FORMULAS: Mapping[str, Callable[[Mapping[str, float], float, int], float]] = {
    "step": lambda v, base, t: base * v["gamma"] ** (t // v["step_size"]),
    "exponential": lambda v, base, t: base * v["gamma"] ** t,
    "constant": lambda v, base, t: base * (v["factor"] if t < v["total_iters"] else 1.0),
    "linear": lambda v, base, t: (
        base * (v["start_factor"] + (v["end_factor"] - v["start_factor"]) * _done(v, t))
    ),
    "polynomial": lambda v, base, t: base * (1.0 - _done(v, t)) ** v["power"],
    "cosine": lambda v, base, t: (
        v["eta_min"] + (base - v["eta_min"]) * (1.0 + math.cos(math.pi * t / v["T_max"])) / 2.0
    ),
}
