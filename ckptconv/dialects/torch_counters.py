"""How far a run of a known dialect has come: its counters, read as its row of the table says they count.

The optimizer's own step is a count of updates by definition; a loop's counter that equals it is another place
of it. One that does not counts the updates that a loss scaler skipped, too, or several batches to an update:
it is kept as `micro_steps`. Where several places hold one quantity the first of the row is read, and each
keeps its distance from the quantity (encoding `plus`). `was` is what the quantity was when it was read.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

from ckptconv.dialects.residue import Lifter
from ckptconv.dialects.torch_progress import bare_epochs, loss_scale_at, step_of_optimizers
from ckptconv.dialects.torch_rows import Counter, Quantity, Row, matching
from ckptconv.dialects.torch_survey import scalers
from ckptconv.dialects.torch_values import Encoding, Number, count_of, dotted, number_of, places
from ckptconv.document import (
    NOT_RECORDED,
    Absent,
    Candidate,
    Checkpoint,
    Fact,
    Known,
    Optimizer,
    Progress,
    Unknown,
    value_of,
)
from ckptconv.errors import MappingError
from ckptconv.rawtree import DictNode, Lifted, Node, Path, transform

MOVING = ("micro_steps", "samples", "tokens")
"""Totals that move with the step, at a pace that no file tells."""


@dataclass(frozen=True, slots=True)
class _Place:
    """A counter that is there."""

    counter: Counter
    path: Path
    raw: int
    how: Encoding

    @property
    def value(self) -> int:
        return self.raw - self.counter.plus


@dataclass(slots=True)
class _Reading:
    root: DictNode
    row: Row
    file: str
    lifter: Lifter
    oddities: list[str] = field(default_factory=list)

    def places(self, *quantities: Quantity) -> list[_Place]:
        """Where these quantities stand, the best first; a key counts what the first row says that holds."""
        found: list[_Place] = []
        for counter in self.row.counters:
            if counter.counts not in quantities or not _holds(counter, self):
                continue
            for path, node in matching(self.root, counter.key):
                number = count_of(node)
                if number is not None and all(path != place.path for place in found):
                    found.append(_Place(counter, path, *number))
        return found

    def length(self, place: _Place) -> int:
        """The iterations of an epoch, where epochs follow from this place; else 0."""
        if not place.counter.per_epoch:
            return 0
        lengths = [count_of(node) for _, node in matching(self.root, place.counter.per_epoch)]
        return max(lengths[0][0], 0) if lengths and lengths[0] is not None else 0

    def take(self, places: list[_Place], to: Path, value: int) -> None:
        """Each of the places is written as its distance from `value`."""
        for place in places:
            how: Encoding = {"as": "int", **place.how, "plus": place.raw - value, "was": value}
            if length := self.length(place):
                how["per_epoch"] = length
            if to[1] in MOVING:
                how["moves"] = "step"
            self.lifter.take(place.path, to, **how)


def _holds(counter: Counter, reading: _Reading) -> bool:
    return counter.when is None or counter.when.holds(reading.root, reading.file)


def read_counters(
    root: DictNode, row: Row, optimizers: tuple[Optimizer, ...], lifter: Lifter, file: str
) -> tuple[Progress, tuple[Optimizer, ...], tuple[str, ...]]:
    """The progress, the optimizers with the step that only the loop tells, and what is odd.

    `file`: the file's name. I/O: reads 0-d counters.
    """
    reading = _Reading(root, row, file, lifter)
    scale = loss_scale_at(scalers(root, row), lifter)
    loop = reading.places("updates", "iterations")
    skips = reading.places("skipped_steps")
    optimizers = _with_step(optimizers, loop, skips, scale)
    step, micro, skipped = _updates(reading, optimizers, loop, skips, scale)
    epochs, batch = _epochs(reading, optimizers, loop, step)
    progress = Progress(
        step=step,
        epochs=epochs,
        batch_in_epoch=batch,
        micro_steps=micro,
        samples=_recorded(reading, "samples"),
        tokens=_recorded(reading, "tokens") if not row.tokens_per_update else _tokens(reading, step),
        skipped_steps=skipped,
        loss_scale=scale,
    )
    return progress, optimizers, tuple(reading.oddities)


def _made(loop: list[_Place], skips: list[_Place]) -> Known:
    """The updates that were made, of those that the loop tried."""
    first, source = loop[0], dotted(loop[0].path)
    if not skips or not skips[0].value:
        return Known(value=first.value, source=source)
    formula = f"{source} - {dotted(skips[0].path)}"
    return Known(value=first.value - skips[0].value, status="derived", source=source, formula=formula)


def _with_step(
    optimizers: tuple[Optimizer, ...], loop: list[_Place], skips: list[_Place], scale: Fact
) -> tuple[Optimizer, ...]:
    """The only optimizer, with the loop's count where it stores none and every count is an update."""
    if len(optimizers) != 1 or isinstance(optimizers[0].step, Known) or not loop:
        return optimizers
    first, own = loop[0], optimizers[0].step
    assert isinstance(own, Unknown)
    reason = own.reason
    if first.counter.counts == "updates" and (skips or not isinstance(scale, Known)):
        return (replace(optimizers[0], step=_made(loop, skips)),)
    if first.counter.counts == "updates":
        why, condition = "the loop also counts what loss scaling skipped", "loss scaling skipped no update"
    else:
        why, condition = "the loop counts batches", "every batch made an update"
    candidate = Candidate(value=first.value, source=dotted(first.path), condition=condition)
    return (replace(optimizers[0], step=Unknown(reason=f"{reason}; {why}", candidates=(candidate,))),)


def _updates(
    reading: _Reading,
    optimizers: tuple[Optimizer, ...],
    loop: list[_Place],
    skips: list[_Place],
    scale: Fact,
) -> tuple[Fact, Fact, Fact]:
    """(step, micro steps, skipped steps), with the loop's places taken."""
    if not loop:
        return step_of_optimizers(optimizers), NOT_RECORDED, NOT_RECORDED
    first = loop[0]
    counted, source = first.value, dotted(first.path)
    if first.counter.unset is not None and first.raw == first.counter.unset[0]:
        return Unknown(reason=first.counter.unset[1]), NOT_RECORDED, NOT_RECORDED
    made, skipped = _made(loop, skips), _recorded(reading, "skipped_steps")
    done = made.value
    assert isinstance(done, int)
    if not optimizers:
        reading.take(loop, ("progress", "step"), done)
        return made, NOT_RECORDED, skipped
    step = step_of_optimizers(optimizers)
    own = value_of(step)
    if isinstance(own, int) and 0 <= own - done <= reading.row.updates_before:
        bare = len(optimizers) == 1 and not optimizers[0].param_steps
        reading.take(loop, ("step", optimizers[0].name) if bare else ("progress", "step"), own)
        if own > done:
            reading.oddities.append(
                f"'{source}' tells of {done} updates, the optimizer has made {own}: "
                f"{reading.row.producer} makes {own - done} without gradients when it sets it up."
            )
        return step, NOT_RECORDED, skipped
    reading.take(loop, ("progress", "micro_steps"), counted)
    if isinstance(own, int):
        why = "it counts batches, of which an update takes several"
        if first.counter.counts == "updates":
            why = "it also counts the updates that loss scaling skipped"
            if isinstance(scale, Known) and own < counted and not skips:
                formula = f"{source} less the optimizer's updates"
                skipped = Known(value=counted - own, status="derived", source=source, formula=formula)
        reading.oddities.append(
            f"'{source}' tells of {counted}, the optimizer has made {own} updates: {why}. The optimizer's "
            "count is taken."
        )
    return step, Known(value=counted, source=source), skipped


def _epochs(
    reading: _Reading, optimizers: tuple[Optimizer, ...], loop: list[_Place], step: Fact
) -> tuple[Fact, Fact]:
    """(completed epochs, batch in the next one)."""
    batch = _recorded(reading, "batch_in_epoch")
    if places := reading.places("epochs"):
        return _doubted(reading, places[0], step) or _recorded(reading, "epochs"), batch
    for place in loop:
        if length := reading.length(place):
            by = dotted(place.counter.per_epoch)
            source = (
                step.source if isinstance(step, Known) and step.value == place.value else dotted(place.path)
            )
            return (
                Known(value=place.value // length, status="derived", source=source, formula=f"// {by}"),
                Known(value=place.value % length, status="derived", source=source, formula=f"% {by}"),
            )
    own, odd = bare_epochs(reading.root, optimizers, reading.lifter)
    reading.oddities += odd
    return own, batch


def _doubted(reading: _Reading, place: _Place, step: Fact) -> Fact | None:
    """Both readings of an epoch that a scheduler contradicts: a copy of the program may count otherwise."""
    ticks = set()
    for pattern in reading.row.schedulers:
        for _, node in matching(reading.root, pattern):
            calls = count_of(node.get("last_epoch")) if isinstance(node, DictNode) else None
            ticks.add(calls[0] if calls is not None else None)
    others = ticks & {place.value - 1, place.value + 1} - {value_of(step)}
    if place.value in ticks or len(others) != 1:
        return None
    other, source = others.pop() or 0, dotted(place.path)
    low = min(place.value, other)
    reading.lifter.take(place.path, ("progress", "epochs"), **place.how, raw=place.raw, low=low)
    program = f"{reading.row.producer} counts so"
    return Unknown(
        reason=f"'{source}' is {place.raw}, and a scheduler made {other} steps where {reading.row.producer} "
        f"would have made {place.value}: the file may be of a copy of it that counts otherwise",
        candidates=(
            Candidate(value=place.value, source=source, condition=program),
            Candidate(value=other, source=source, condition="the scheduler is stepped once per epoch"),
        ),
    )


def _recorded(reading: _Reading, quantity: Quantity) -> Fact:
    places = reading.places(quantity)
    if not places:
        return NOT_RECORDED
    first, source = places[0], dotted(places[0].path)
    if first.counter.unset is not None and first.raw == first.counter.unset[0]:
        return Absent(reason=first.counter.unset[1])
    if first.value < 0:
        return Unknown(reason=f"'{source}' is {first.raw}, which nothing counts to")
    reading.take(places, ("progress", quantity), first.value)
    for place in places[1:]:
        if abs(place.value - first.value) > 1:  # hooks run before one of them is counted and after another
            reading.oddities.append(f"'{source}' is {first.raw}, '{dotted(place.path)}' is {place.raw}.")
    return Known(value=first.value, source=source)


def _tokens(reading: _Reading, step: Fact) -> Fact:
    """The tokens of all updates, where the file tells those of one."""
    numbers: list[Number] = []
    for pattern in reading.row.tokens_per_update:
        found = next((number_of(node) for _, node in matching(reading.root, pattern)), None)
        if found is None or isinstance(found[0], bool) or not isinstance(found[0], int):
            return NOT_RECORDED
        numbers.append(found[0])
    updates = value_of(step)
    if not isinstance(updates, int) or not isinstance(step, Known):
        return NOT_RECORDED
    names = " * ".join(dotted(pattern) for pattern in reading.row.tokens_per_update)
    value = updates * int(math.prod(numbers))
    return Known(value=value, status="derived", source=step.source, formula=f"step * {names}")


def settle_counters(checkpoint: Checkpoint, root: DictNode, row: Row | None) -> DictNode:
    """The residue whose counters follow edited epochs and batches.

    Raises: progress-conflict where an edited step says otherwise; residue-stale.
    """
    progress = checkpoint.progress
    within = _within_epoch(checkpoint, root, row) if row is not None else {}

    def follow(path: Path, node: Node) -> Node:
        if path in within:
            return within[path]
        if not isinstance(node, Lifted) or "per_epoch" not in node.encoding:
            return node
        length, was = node.encoding["per_epoch"], node.encoding["was"]
        assert isinstance(length, int)
        assert isinstance(was, int)
        epochs, batch = value_of(progress.epochs), value_of(progress.batch_in_epoch)
        now = checkpoint.lookup(node.to)
        derived = all(
            isinstance(fact, Unknown) or (isinstance(fact, Known) and fact.status == "derived")
            for fact in (progress.epochs, progress.batch_in_epoch)
        )
        if derived:
            return node
        if not isinstance(epochs, (int, float)) or not isinstance(now, int):
            return node
        rest = now % length if now // length == epochs else 0
        wanted = int(epochs * length) + (batch if isinstance(batch, int) else rest)
        if now != was and now != wanted:
            raise MappingError.of(
                "progress-conflict",
                f"'{dotted(path)}' is {now} by the step and {wanted} by the epochs, of {length} iterations",
                "Leave one of them as it is, or give both the same meaning.",
                loc=path,
            )
        return replace(node, encoding={**node.encoding, "plus": wanted - now})

    followed = transform(root, follow)
    assert isinstance(followed, DictNode)
    return followed


def _within_epoch(checkpoint: Checkpoint, root: DictNode, row: Row) -> dict[Path, int]:
    """What the numbers that begin with an epoch become, where the batch in it was edited.

    Raises: residue-stale in the midst of an epoch.
    """
    now = value_of(checkpoint.progress.batch_in_epoch)
    address: Path = ("progress", "batch_in_epoch")
    was = next((lifted.encoding.get("was") for _, lifted in places(root) if lifted.to == address), now)
    if was == now:
        return {}
    found = [place for pattern in row.within_epoch for place in matching(root, pattern)]
    stale = [(path, node) for path, node in found if isinstance(node, int) and node and now]
    if stale:
        path, node = stale[0]
        raise MappingError.of(
            "residue-stale",
            f"batch_in_epoch was {was} and is {now}, and '{dotted(path)}' still holds {node}: how many there "
            "are to a batch is not recorded",
            f"Pass --set batch_in_epoch=0, or leave it at {was}.",
            loc=path,
        )
    return {path: 0 for path, _ in found}
