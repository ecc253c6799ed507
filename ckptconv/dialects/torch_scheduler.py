"""`LRScheduler.state_dict()` of PyTorch as a schedule of the document.

`last_epoch` is the number of `step()` calls, whatever the loop calls it for: per update or per epoch is the
user's choice and not recorded; where it equals the optimizer's step it is taken for that. `_step_count` is
`last_epoch + 1`; `_last_lr` and `base_lrs` repeat the groups' `lr` and `initial_lr`. The class is not stored:
the family is told by the keys that only it has. Lambdas are not stored at all. `SequentialLR` and
`ChainedScheduler` hold the states of their parts, whose parameters get the part's number in front: a part
of a sequence counts from its own beginning, stands at -1 before and stays one short of the next one's
beginning after. Source: torch 2.13 `torch/optim/lr_scheduler.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from ckptconv.catalog.schedule_rates import curve_of, rate
from ckptconv.catalog.schedules import canonical, infer
from ckptconv.dialects import torch_keys
from ckptconv.dialects.residue import Lifter
from ckptconv.dialects.torch_values import Encoding, count_of, dotted, number_of
from ckptconv.document import Fact, Known, Optimizer, Schedule, Unknown, value_of
from ckptconv.rawtree import DictNode, ListNode, Node, Path

_MOST_MILESTONES = 10_000


def is_scheduler(node: Node) -> bool:
    """Whether a node is a scheduler's state_dict."""
    if not isinstance(node, DictNode):
        return False
    keys = set(node.keys)
    if keys >= torch_keys.MMENGINE_SCHEDULER:
        return True
    return "_schedulers" in keys or ("last_epoch" in keys and bool(keys & torch_keys.SCHEDULER_MARKS))


def lift_schedule(
    node: DictNode, path: Path, name: str, optimizer: Optimizer | None, lifter: Lifter
) -> tuple[Schedule, tuple[str, ...]]:
    """The schedule whose state_dict stands at `path`, and what is odd about it."""
    lift = _Lift(name, optimizer, lifter)
    if set(node.keys) >= torch_keys.MMENGINE_SCHEDULER:
        return lift.mmengine(node, path), ()
    family = _family(node)
    position = lift.position(node, path)
    lift.parameters(node, path, family, "")
    lift.rates(node, path, "")
    inner = node.get("_schedulers")
    parts = inner.items if isinstance(inner, ListNode) else ()
    for number, part in enumerate(parts):
        if isinstance(part, DictNode):
            lift.part(part, (*path, "_schedulers", number), number)
    if family == "chained":
        position = lift.position_of_parts(parts, path)
    schedule = Schedule(
        name=name,
        family=family,
        position=position,
        unit=_unit(position, optimizer),
        parameters=lift.facts,
        optimizer=optimizer.name if optimizer is not None else "unknown",
    )
    odd = f"'{name}' counts in {dotted((*path, 'last_epoch'))}, whether updates or epochs is not recorded."
    open_unit = isinstance(position, Known) and position.value and schedule.unit == "unknown"
    return schedule, (odd,) if open_unit else ()


def _unit(position: Fact, optimizer: Optimizer | None) -> Literal["update", "epoch", "unknown"]:
    where, step = value_of(position), value_of(optimizer.step) if optimizer is not None else None
    return "update" if where and where == step else "unknown"


def _family(node: DictNode) -> str:
    return infer([key for key in node.keys if isinstance(key, str)])


class _Lift:
    """Takes one scheduler's leaves."""

    def __init__(self, name: str, optimizer: Optimizer | None, lifter: Lifter) -> None:
        self.facts: dict[str, Fact] = {}
        self._name, self._optimizer, self._lifter = name, optimizer, lifter

    def _take(self, node: Node, where: Path, parameter: str) -> None:
        number = number_of(node)
        if number is not None:
            self._lifter.take(where, ("schedule", self._name, parameter), **number[1])
            self.facts[parameter] = Known(value=number[0], source=dotted(where))
        elif isinstance(node, str):
            self._lifter.take(where, ("schedule", self._name, parameter))
            self.facts[parameter] = Known(value=node, source=dotted(where))

    def position(self, node: DictNode, path: Path) -> Fact:
        """`last_epoch`, and the count of calls where it is one more."""
        where = (*path, "last_epoch")
        found = count_of(node.get("last_epoch"))
        if found is None:
            return Unknown(reason="the scheduler stores no position of its own")
        last, how = found
        self._lifter.take(where, ("position", self._name), **how, was=last)
        count = count_of(node.get("_step_count"))
        if count is not None and count[0] == last + 1:
            self._lifter.take((*path, "_step_count"), ("position", self._name), **{**count[1], "plus": 1})
        return Known(value=last, source=dotted(where))

    def mmengine(self, node: DictNode, path: Path) -> Schedule:
        """A `_ParamScheduler` of MMEngine, which makes each rate from the last one: no curve tells it.

        `_global_step` counts calls, the one of its making included, and `last_step` those from `begin` on
        up to `end`; a schedule that stands outside of these is `frozen`, and cannot be moved.
        """
        by_epoch, calls = node.get("by_epoch"), count_of(node.get("_global_step"))
        last, begin = count_of(node.get("last_step")), count_of(node.get("begin"))
        position: Fact = Unknown(reason="the scheduler stores no position of its own")
        if calls is not None and calls[0] > 0:
            where, here, to = (*path, "_global_step"), calls[0] - 1, ("position", self._name)
            moves = last is not None and begin is not None and last[0] == here - begin[0]
            how: Encoding = {} if moves else {"frozen": True}
            self._lifter.take(where, to, **{**calls[1], "plus": 1, "was": here, **how})
            if moves and last is not None:
                self._lifter.take((*path, "last_step"), to, **{**last[1], "plus": last[0] - here})
            position = Known(value=here, status="derived", source=dotted(where), formula="calls - 1")
        if node.get("param_name") == "lr":
            self._copies(node, "_last_value", "learning_rate", path, "last_rate")
        unit = _unit(position, self._optimizer) if by_epoch is False else "epoch"
        return Schedule(
            name=self._name,
            family="unknown",
            position=position,
            unit="micro-step" if unit == "unknown" else unit,
            parameters=self.facts,
            optimizer=self._optimizer.name if self._optimizer is not None else "unknown",
        )

    def parameters(self, node: DictNode, path: Path, family: str, prefix: str) -> None:
        """The arguments, under their canonical names."""
        for key, value in node.items:
            if not isinstance(key, str) or key in torch_keys.SCHEDULER_BOOKKEEPING:
                continue
            self._take(value, (*path, key), prefix + canonical(family, key))
        if family == "multi-step":
            self._milestones(node.get("milestones"), (*path, "milestones"), prefix + "milestones", "counter")
        elif family == "sequential":
            self._milestones(node.get("_milestones"), (*path, "_milestones"), prefix + "milestones", "list")
        elif family == "one-cycle":
            self._phases(node.get("_schedule_phases"), (*path, "_schedule_phases"), prefix)
        elif family == "plateau":
            lowest = node.get("min_lrs")
            for group, value in enumerate(lowest.items if isinstance(lowest, ListNode) else ()):
                self._take(value, (*path, "min_lrs", group), f"{prefix}minimum.{group}")
        elif family == "cosine":
            self.facts[prefix + "after"] = Known(
                value="rebound", status="derived", formula="CosineAnnealingLR climbs again after T_max"
            )

    def _milestones(self, node: Node, where: Path, parameter: str, how: str) -> None:
        """A `Counter` of ticks, or a list."""
        found: list[int] = []
        if isinstance(node, ListNode) and node.kind == "list":
            found = [n for n in node.items if isinstance(n, int) and not isinstance(n, bool)]
            complete = len(found) == len(node.items)
        elif isinstance(node, DictNode) and node.kind == "collections.Counter":
            pairs = [
                (tick, times)
                for tick, times in node.items
                if type(tick) is int and type(times) is int and 0 < times <= _MOST_MILESTONES
            ]
            complete = len(pairs) == len(node.items) and sum(n for _, n in pairs) <= _MOST_MILESTONES
            found = [tick for tick, times in pairs for _ in range(times)] if complete else []
        else:
            return
        if complete:
            self._lifter.take(where, ("schedule", self._name, parameter), **{"as": how})
            self.facts[parameter] = Known(value=tuple(found), source=dotted(where))

    def _phases(self, node: Node, where: Path, prefix: str) -> None:
        for number, phase in enumerate(node.items if isinstance(node, ListNode) else ()):
            for key, name in (("end_step", "end"), ("start_lr", "from"), ("end_lr", "to")):
                if isinstance(phase, DictNode):
                    self._take(phase.get(key), (*where, number, key), f"{prefix}phase.{number}.{name}")

    def part(self, node: DictNode, path: Path, number: int) -> None:
        """A scheduler within a scheduler."""
        prefix, family = f"{number}.", _family(node)
        self.facts[prefix + "family"] = Known(
            value=family, status="derived", source=dotted(path), formula="by its keys"
        )
        self.parameters(node, path, family, prefix)
        self._take(node.get("last_epoch"), (*path, "last_epoch"), prefix + "position")
        self._take(node.get("_step_count"), (*path, "_step_count"), prefix + "calls")
        self.rates(node, path, prefix)
        rates = node.get("_last_lr")
        for group, value in enumerate(rates.items if isinstance(rates, ListNode) else ()):
            where = (*path, "_last_lr", group)
            self._take(value, where, f"{prefix}last_rate.{group}")

    def position_of_parts(self, parts: tuple[Node, ...], path: Path) -> Fact:
        """Where a chained schedule stands, which only its parts tell."""
        where = {value_of(self.facts.get(f"{number}.position")) for number in range(len(parts))}
        if len(where) != 1 or not isinstance(value := where.pop(), int):
            return Unknown(reason="the scheduler stores no position of its own, and its parts differ")
        for number, part in enumerate(parts):
            assert isinstance(part, DictNode)
            spot = (*path, "_schedulers", number)
            found, count = count_of(part.get("last_epoch")), count_of(part.get("_step_count"))
            how = found[1] if found is not None else {}
            self._lifter.take((*spot, "last_epoch"), ("position", self._name), **how, was=value)
            del self.facts[f"{number}.position"]
            if count is not None and count[0] == value + 1:
                self._lifter.take((*spot, "_step_count"), ("position", self._name), **{**count[1], "plus": 1})
                del self.facts[f"{number}.calls"]
        return Known(
            value=value, status="derived", source=dotted((*path, "_schedulers")), formula="all alike"
        )

    def rates(self, node: DictNode, path: Path, prefix: str) -> None:
        """The scheduler's copies of the groups' rates: taken where they are copies."""
        self._copies(node, "base_lrs", "base_learning_rate", path, prefix + "base_rate")
        if not prefix:
            self._copies(node, "_last_lr", "learning_rate", path, "last_rate")

    def _copies(self, node: DictNode, key: str, hyperparameter: str, path: Path, parameter: str) -> None:
        optimizer, rates = self._optimizer, node.get(key)
        if optimizer is None or not isinstance(rates, ListNode) or len(rates.items) != len(optimizer.groups):
            return
        for position, (value, group) in enumerate(zip(rates.items, optimizer.groups, strict=True)):
            found, fact = number_of(value), group.hyperparameters.get(hyperparameter)
            if found is not None and isinstance(fact, Known) and found[0] == fact.value:
                address: Path = ("hyperparameter", optimizer.name, position, hyperparameter)
                self._lifter.take((*path, key, position), address, **found[1])
            else:
                self._take(value, (*path, key, position), f"{parameter}.{position}")


def moved(
    schedules: tuple[Schedule, ...],
    edits: Mapping[str, tuple[int, int]],
    epochs: tuple[int, int] | None = None,
) -> dict[str, int]:
    """New positions of the schedules that stood where what they count stood before it was edited."""
    positions = {}
    for schedule in schedules:
        edit = epochs if schedule.unit == "epoch" else edits.get(schedule.optimizer)
        if edit is not None and value_of(schedule.position) == edit[0]:
            positions[schedule.name] = edit[1]
    return positions


def rate_at(
    schedule: Schedule, base: float, position: int, named: Mapping[str, float] | None = None
) -> float | None:
    """The learning rate of a schedule in closed form; None where the family has none there.

    Units: `position` as `last_epoch`. `named`: see `catalog.schedule_rates.rate`.
    """
    return rate(curve_of(schedule), base, position, named)
