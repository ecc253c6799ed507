"""How far a plain training loop has come: what its counters say, and what they leave open.

Only the optimizer's own step is a count of updates by definition. A bare `step` or `epoch` may count what is
finished or name the last one, and a `step` may count batches: such a counter is a candidate, unless the
optimizer's step agrees with it. A candidate's place keeps its raw value (`residue`, encoding `raw`).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from ckptconv.catalog.optimizer_rows import row
from ckptconv.dialects import torch_keys
from ckptconv.dialects.residue import Lifter
from ckptconv.dialects.torch_values import Encoding, Number, count_of, dotted, number_of, unwrapped
from ckptconv.document import (
    NOT_RECORDED,
    Absent,
    Candidate,
    Fact,
    Known,
    Optimizer,
    Progress,
    Unknown,
    value_of,
)
from ckptconv.rawtree import DictNode, Node, Path

_LAST = "last finished, 0-based"


@dataclass(frozen=True, slots=True)
class _Counter:
    """A number of the loop."""

    key: str
    value: Number
    path: Path
    how: Encoding


@dataclass(slots=True)
class _Reading:
    root: DictNode
    optimizers: tuple[Optimizer, ...]
    lifter: Lifter
    oddities: list[str] = field(default_factory=list)
    micro_steps: list[Candidate] = field(default_factory=list)

    @property
    def never_stepped(self) -> bool:
        """Whether the optimizers prove that no update was made: they keep state from the first on."""
        tables = [row(o.algorithm, "torch") for o in self.optimizers]
        return bool(tables) and all(
            table is not None and table.step_key is not None and not o.slots and not o.param_steps
            for o, table in zip(self.optimizers, tables, strict=True)
        )


def read_progress(
    root: DictNode, optimizers: tuple[Optimizer, ...], lifter: Lifter
) -> tuple[Progress, tuple[str, ...]]:
    """The progress of a training dictionary, and what is odd about it. I/O: reads 0-d counters."""
    reading = _Reading(root, optimizers, lifter)
    step = _step(reading)
    epochs = _epochs(reading)
    micro: Fact = NOT_RECORDED
    if reading.micro_steps:
        micro = Unknown(
            reason="a counter differs from the optimizer's updates: it may count backward passes",
            candidates=tuple(reading.micro_steps),
        )
    scalers = [((key,), node) for key in torch_keys.SCALER if isinstance(node := root.get(key), DictNode)]
    progress = Progress(
        step=step,
        epochs=epochs,
        batch_in_epoch=Unknown(reason="the plain PyTorch loop stores none"),
        micro_steps=micro,
        samples=_recorded(reading, torch_keys.SAMPLES, "samples"),
        tokens=_recorded(reading, torch_keys.TOKENS, "tokens"),
        loss_scale=loss_scale_at(scalers, lifter),
    )
    return progress, tuple(reading.oddities)


def bare_epochs(
    root: DictNode, optimizers: tuple[Optimizer, ...], lifter: Lifter
) -> tuple[Fact, tuple[str, ...]]:
    """The epochs that a loop of one's own counts in the dictionary, and what is odd about them."""
    reading = _Reading(root, optimizers, lifter)
    return _epochs(reading), tuple(reading.oddities)


def step_of_optimizers(optimizers: tuple[Optimizer, ...]) -> Fact:
    """The step that the optimizers tell together."""
    if not optimizers:
        return Unknown(reason="there is no optimizer in the file")
    if len(optimizers) == 1:
        return optimizers[0].step
    known = [o for o in optimizers if isinstance(o.step, Known)]
    if len(known) == len(optimizers) and len({value_of(o.step) for o in known}) == 1:
        return optimizers[0].step
    candidates = tuple(
        Candidate(value=o.step.value, source=o.step.source, condition=f"the run is counted by '{o.name}'")
        for o in known
        if isinstance(o.step, Known)
    )
    return Unknown(reason=f"{len(optimizers)} optimizers count for themselves", candidates=candidates)


def _counters(root: DictNode, keys: tuple[str, ...]) -> list[_Counter]:
    found = []
    for key in keys:
        node, inside = unwrapped(root.get(key))
        counted = count_of(node) or number_of(node)
        if counted is not None and not isinstance(counted[0], bool):
            found.append(_Counter(key, counted[0], (key, *inside), counted[1]))
    return found


def _step(reading: _Reading) -> Fact:
    fact = step_of_optimizers(reading.optimizers)
    bare = [c for c in _counters(reading.root, torch_keys.STEP) if isinstance(c.value, int)]
    if isinstance(fact, Known) and isinstance(fact.value, int):
        for counter in bare:
            _beside(reading, fact.value, counter)
        return fact
    if bare and reading.never_stepped and all(counter.value == 0 for counter in bare):
        for counter in bare:
            reading.lifter.take(counter.path, ("progress", "step"), **counter.how)
        return Known(value=0, source=bare[0].key)
    if not bare:
        return fact
    candidates = list(fact.candidates) if isinstance(fact, Unknown) else []
    for counter in bare:
        candidates += _readings(counter, "completed updates")
        reading.lifter.take(counter.path, ("progress", "step"), **counter.how, raw=counter.value)
    reason = fact.reason if isinstance(fact, Unknown) else ""
    names = " and ".join(f"'{counter.key}'" for counter in bare)
    return Unknown(
        reason=f"{reason}; a plain loop's {names} may count updates, name the last, or count batches",
        candidates=tuple(candidates),
    )


def _beside(reading: _Reading, step: int, counter: _Counter) -> None:
    """A counter of the loop beside the optimizer's own step."""
    key, value, how = counter.key, counter.value, counter.how
    if value == step:
        reading.lifter.take(counter.path, ("progress", "step"), **how)
    elif value + 1 == step:
        reading.lifter.take(counter.path, ("progress", "step"), **{**how, "plus": -1})
        reading.oddities.append(
            f"'{key}' is {value}, the optimizer has made {step} updates: it names the last one."
        )
    else:
        reading.micro_steps.append(
            Candidate(value=value, source=key, condition="counts backward passes, not updates")
        )
        reading.lifter.take(counter.path, ("progress", "micro_steps"), **how, raw=value)
        reading.oddities.append(
            f"'{key}' is {value}, the optimizer has made {step} updates: it counts something else (batches, "
            "or updates that a loss scaler skipped). The optimizer's count is taken."
        )


def _readings(counter: _Counter, counted: str) -> list[Candidate]:
    key, value = counter.key, counter.value
    candidates = []
    if value >= 0:
        candidates.append(Candidate(value=value, source=key, condition=f"count of {counted}"))
    if isinstance(value, int) and value >= -1:
        candidates.append(Candidate(value=value + 1, source=key, condition=_LAST))
    return candidates


def _epochs(reading: _Reading) -> Fact:
    found = _counters(reading.root, torch_keys.EPOCH)
    if not found:
        return Unknown(reason="the dictionary has no epoch")
    counter = found[0]
    key, value = counter.key, counter.value
    address: Path = ("progress", "epochs")
    if value == 0 and reading.never_stepped:
        reading.lifter.take(counter.path, address, **counter.how)
        return Known(value=0, source=key)
    reading.lifter.take(counter.path, address, **counter.how, raw=value)
    plan = ", or the planned total" if key == "epochs" else ""
    return Unknown(
        reason=f"a plain loop's '{key}' may count finished epochs or name the last one{plan}",
        candidates=tuple(_readings(counter, "completed epochs")),
    )


def _recorded(reading: _Reading, keys: tuple[str, ...], field_: str) -> Fact:
    for counter in _counters(reading.root, keys):
        if counter.value >= 0:
            reading.lifter.take(counter.path, ("progress", field_), **counter.how)
            return Known(value=counter.value, source=counter.key)
    return NOT_RECORDED


def loss_scale_at(found: Iterable[tuple[Path, Node]], lifter: Lifter) -> Fact:
    """The loss scale of the first of these that is a GradScaler's state, or the scale itself."""
    for path, node in found:
        if isinstance(node, DictNode):
            if not node.items:
                return Absent(reason=f"'{dotted(path)}' is a disabled GradScaler")
            path, node = (*path, "scale"), node.get("scale")
        number = number_of(node)
        if number is not None and not isinstance(number[0], bool):
            lifter.take(path, ("progress", "loss_scale"), **number[1])
            return Known(value=number[0], source=dotted(path))
    return Unknown(reason="the dictionary holds no GradScaler")
