"""The counters of a Lightning checkpoint: which stands where, what it counts, and how each is written again.

`global_step` counts the updates of all optimizers together (a GAN's two per batch); only the loops' copies of
it are read on resume. `epoch` is `epoch_progress.current.completed`: LAST0 at an epoch's end, COUNT after
fit. Finished are `epoch_progress.current.processed`, and one more where the last batch of the running epoch
is done (saved in its `on_train_batch_end`, or while it was validated): Lightning goes on with the next epoch.
`ready` and `started` run ahead, `completed` lags by one where the file was saved in a hook; each place keeps
its distance from the quantity (encoding `plus`). Where `epochs` or `batch_in_epoch` becomes another, or the
run is another, the loops are written as Lightning has them between two hooks.

Before 1.6: `epoch` is the running one plus 1, also in the midst of it. `global_step` counts batches that were
stepped on where a batch's hook or `ModelCheckpoint` saved, and one more where `save_checkpoint` was called
between epochs or after fit (seen with 1.5.10: 7 after 6 updates). The loops of 1.5 hold nothing that is read.

Sources: Lightning 2.6.6 `loops/{fit_loop,training_epoch_loop,progress}.py`, `checkpoint_connector.py`
`dump_checkpoint`, `utilities/migration/migration.py`; `checkpoint_connector.py` of 1.0.0, 1.4.0, 1.5.0,
1.6.0.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from ckptconv.dialects.residue import Lifter
from ckptconv.dialects.torch_progress import step_of_optimizers
from ckptconv.dialects.torch_table import LIGHTNING
from ckptconv.dialects.torch_values import Encoding, Number, count_of, dotted, number_of
from ckptconv.document import (
    NOT_RECORDED,
    Candidate,
    Fact,
    Known,
    Optimizer,
    Progress,
    Schedule,
    Unknown,
    value_of,
)
from ckptconv.rawtree import DictNode, Node, Path, at

FIT: Path = ("loops", "fit_loop")

_ALL = ("ready", "started", "processed", "completed")
_EPOCHS: Path = (*FIT, "epoch_progress")
_BATCHES: Path = (*FIT, "epoch_loop.batch_progress")
_SCHEDULERS: Path = (*FIT, "epoch_loop.scheduler_progress", "total")
_STEPPED: Path = (*FIT, "epoch_loop.state_dict", "_batches_that_stepped")
IS_LAST: Path = (*_BATCHES, "is_last_batch")

_AUTOMATIC: tuple[Path, ...] = (
    (*FIT, "epoch_loop.automatic_optimization.optim_progress", "optimizer"),  # 2.0 and later
    (*FIT, "epoch_loop.optimizer_loop.optim_progress", "optimizer"),
    (*FIT, "epoch_loop.batch_loop.optimizer_loop.optim_progress", "optimizer"),  # 1.6 to 1.9
)
_MANUAL: tuple[Path, ...] = (
    (*FIT, "epoch_loop.manual_optimization.optim_step_progress"),
    (*FIT, "epoch_loop.manual_loop.optim_step_progress"),
    (*FIT, "epoch_loop.batch_loop.manual_loop.optim_step_progress"),
)
_UPDATES: tuple[tuple[Path, tuple[Path, ...]], ...] = (
    *(((*path, "step"), ((*path, "step"), (*path, "zero_grad"))) for path in _AUTOMATIC),
    *((path, (path,)) for path in _MANUAL),
)
"""The counter that is `global_step` in one kind of optimization, and those that move with it."""

COUNTERS: Mapping[str, tuple[Path, ...]] = {
    "epochs": ((*_EPOCHS, "current"), (*_EPOCHS, "total")),
    "batch_in_epoch": ((*_BATCHES, "current"),),
    "micro_steps": ((*_BATCHES, "total"),),
}
"""Quantity of the progress -> trackers that count it, beside the top-level `epoch`."""

_MOST = 1 << 63

VERSION = "pytorch-lightning_version"

TOGETHER = (1, 6)
"""From here on `global_step` counts the updates of all optimizers, and the loops hold what is read."""


@dataclass(slots=True)
class _Reading:
    root: DictNode
    optimizers: tuple[Optimizer, ...]
    schedules: tuple[Schedule, ...]
    lifter: Lifter
    oddities: list[str] = field(default_factory=list)

    def count(self, path: Path) -> int | None:
        """The counter at `path`; None where there is none, or a number that nothing counts to."""
        found = count_of(_at(self.root, path))
        return found[0] if found is not None and 0 <= found[0] < _MOST else None

    def take(self, path: Path, to: Path, value: int, **more: str | int) -> None:
        """The counter at `path` is written as its distance from `value`."""
        found = count_of(_at(self.root, path))
        if found is not None and self.count(path) is not None:
            how: Encoding = {"as": "int", **found[1], "plus": found[0] - value, **more}
            self.lifter.take(path, to, **how)

    def take_tracker(self, path: Path, to: Path, value: int, **more: str | int) -> None:
        """All counters of a `{ready, started, processed, completed}`."""
        for key in _ALL:
            self.take((*path, key), to, value, **more)


def version_of(root: DictNode) -> tuple[int, int]:
    """Major and minor number of the Lightning that wrote the file; (0, 0) where it cannot be told."""
    match = re.match(r"(\d{1,4})\.(\d{1,4})", text) if isinstance(text := root.get(VERSION), str) else None
    return (int(match[1]), int(match[2])) if match is not None else (0, 0)


def read_loops(
    root: DictNode, optimizers: tuple[Optimizer, ...], schedules: tuple[Schedule, ...], lifter: Lifter
) -> tuple[Progress, tuple[str, ...]]:
    """Progress, and what is odd about it. I/O: reads 0-d counters.

    `optimizers` are as `with_steps` made them.
    """
    reading = _Reading(root, optimizers, schedules, lifter)
    together = version_of(root) >= TOGETHER
    has_loops = together and reading.count((*_EPOCHS, "current", "processed")) is not None
    loss_scale = _loss_scale(reading)
    step = _step(reading, together, has_loops)
    epochs, batch, micro = _epochs(reading) if has_loops else (_bare_epoch(reading, together), None, None)
    if has_loops:
        _logged(reading)
        _scheduler_calls(reading)
    accumulation: Fact = NOT_RECORDED
    if len(optimizers) == 1 and micro is not None and micro.value and micro.value == value_of(step):
        accumulation = Known(value=1, status="derived", formula="as many updates as batches")
    progress = Progress(
        step=step,
        epochs=epochs,
        batch_in_epoch=batch or Unknown(reason="no loop state that tells it"),
        micro_steps=micro or NOT_RECORDED,
        accumulation=accumulation,
        skipped_steps=_skipped(reading, together, loss_scale),
        loss_scale=loss_scale,
    )
    return progress, tuple(reading.oddities)


def _at(root: Node, path: Path) -> Node:
    try:
        return at(root, path)
    except (KeyError, IndexError):
        return None


def with_steps(root: DictNode, optimizers: tuple[Optimizer, ...]) -> tuple[Optimizer, ...]:
    """The optimizers; the only one that stores no step has what the others leave of `global_step`."""
    total = _Reading(root, optimizers, (), Lifter(root)).count(("global_step",))
    untold = [o for o in optimizers if not isinstance(o.step, Known)]
    only = len(optimizers) == 1
    together = version_of(root) >= TOGETHER
    if total is None or len(untold) != 1 or not (only or together):
        return optimizers
    told = (value_of(o.step) for o in optimizers if o is not untold[0])
    left = total - sum(step for step in told if isinstance(step, int))
    if left < 0:
        return optimizers
    fact: Fact = Known(
        value=left,
        status="recorded" if only else "derived",
        source="global_step",
        formula=None if only else "global_step less the updates of the other optimizers",
    )
    if _scale(root) is not None:
        candidate = Candidate(value=left, source="global_step", condition="loss scaling skipped no update")
        reason = "global_step counts the updates that loss scaling skipped, too"
        fact = Unknown(reason=reason, candidates=(candidate,))
    if not together:
        fact = _older_step(total)
    return tuple(replace(o, step=fact) if o is untold[0] else o for o in optimizers)


def _older_step(total: int) -> Unknown:
    """What `global_step` of before 1.6 leaves open."""
    readings = (
        (total, "saved by ModelCheckpoint or in a batch's hook"),
        (total - 1, "saved by save_checkpoint between epochs or after fit"),
    )
    return Unknown(
        reason="Lightning before 1.6 stores the updates or one more in global_step",
        candidates=tuple(
            Candidate(value=value, source="global_step", condition=condition)
            for value, condition in readings
            if value >= 0
        ),
    )


def _step(reading: _Reading, together: bool, has_loops: bool) -> Fact:
    """The run's step, with every place that counts updates taken."""
    total = reading.count(("global_step",))
    optimizers = reading.optimizers
    fact = step_of_optimizers(optimizers)
    if total is None:
        return fact
    steps = [step for o in optimizers if isinstance(step := value_of(o.step), int)]
    if not together and len(steps) < max(len(optimizers), 1):
        reading.take(("global_step",), ("progress", "step"), total, raw=total, low=total - 1)
        fact = _older_step(total)
    elif not optimizers:
        fact = Known(value=total, source="global_step")
        _take_updates(reading, ("progress", "step"), total, has_loops, {})
    elif len(steps) < len(optimizers):
        reading.take(("global_step",), ("progress", "step"), total, raw=total)
        both = Candidate(value=total, source="global_step", condition="updates of all optimizers together")
        if isinstance(fact, Unknown):
            fact = Unknown(reason=fact.reason, candidates=(*fact.candidates, both))
    elif together:
        _take_updates(reading, _base(optimizers), sum(steps), has_loops, {"of": "updates"})
        if sum(steps) != total:
            names = "the optimizers have" if len(optimizers) > 1 else "the optimizer has"
            reading.oddities.append(
                f"global_step is {total}, {names} made {sum(steps)} updates: the optimizers' count is taken."
            )
    else:
        near = min(optimizers, key=lambda o: abs(int(str(value_of(o.step))) - total))
        _take_updates(reading, ("step", near.name), int(str(value_of(near.step))), False, {})
    return fact


def _base(optimizers: tuple[Optimizer, ...]) -> Path:
    """The address of a sum over all optimizers: of one that has no place of its own, if there is one."""
    bare = [o for o in optimizers if not o.param_steps]
    return ("step", (bare or list(optimizers))[0].name)


def _take_updates(
    reading: _Reading, to: Path, value: int, has_loops: bool, more: Mapping[str, str | int]
) -> None:
    step = next((value_of(o.step) for o in reading.optimizers if to == ("step", o.name)), value)
    own = {**more, "was": step} if isinstance(step, int) else dict(more)
    reading.take(("global_step",), to, value, **own)
    total = reading.count(("global_step",))
    for tracker, moving in _UPDATES if has_loops else ():
        if reading.count((*tracker, "total", "completed")) == total:
            for path in moving:
                reading.take_tracker((*path, "total"), to, value, **own)


def _epochs(reading: _Reading) -> tuple[Fact, Known, Known | None]:
    """(epochs, batch in the epoch, batches of the run), with every place taken."""
    finished = reading.count((*_EPOCHS, "current", "processed")) or 0
    started = reading.count((*_EPOCHS, "current", "started")) or 0
    here = reading.count((*_BATCHES, "current", "processed")) or 0
    batch = 0
    source, formula = dotted((*_EPOCHS, "current", "processed")), None
    if started > finished:
        last = _at(reading.root, IS_LAST) is True
        if last and here and here == reading.count((*_BATCHES, "current", "ready")):
            finished, formula = finished + 1, "processed + 1: the running epoch's last batch is done"
        else:
            batch = here
    batches = reading.count((*_BATCHES, "total", "processed"))
    values = {"epochs": finished, "batch_in_epoch": batch, "micro_steps": batches}
    for quantity, trackers in COUNTERS.items():
        value = values[quantity]
        for tracker in trackers if value is not None else ():
            reading.take_tracker(tracker, ("progress", quantity), value or 0, was=value or 0)
    reading.take(("epoch",), ("progress", "epochs"), finished, was=finished)
    micro = None
    if batches is not None:
        micro = Known(value=batches, source=dotted((*_BATCHES, "total", "processed")))
    epochs = Known(
        value=finished,
        status="recorded" if formula is None else "derived",
        source=source,
        formula=formula,
    )
    where = dotted((*_BATCHES, "current", "processed"))
    in_epoch = (
        Known(value=batch, source=where)
        if batch
        else Known(
            value=0, status="derived", source=source, formula="between two epochs, or before the first batch"
        )
    )
    return epochs, in_epoch, micro


def _bare_epoch(reading: _Reading, together: bool) -> Fact:
    """The top-level `epoch` where no loop tells what it means."""
    epoch = reading.count(("epoch",))
    if epoch is None:
        return Unknown(reason="the file has no epoch")
    other = (
        Candidate(
            value=epoch + 1, source="epoch", condition="last finished, 0-based: saved at an epoch's end"
        )
        if together
        else Candidate(value=epoch - 1, source="epoch", condition="saved in the midst of an epoch")
    )
    as_it_is = "count of completed epochs: saved after fit, or in the midst of one"
    count = Candidate(
        value=epoch,
        source="epoch",
        condition=as_it_is if together else "count of completed epochs: saved at an epoch's end",
    )
    candidates = tuple(c for c in (count, other) if isinstance(c.value, int) and c.value >= 0)
    lowest = min(epoch, int(str(other.value)))
    reading.take(("epoch",), ("progress", "epochs"), lowest, raw=epoch, low=lowest)
    why = "the file has no loops" if together else "Lightning before 1.6 stores the running epoch plus 1"
    return Unknown(reason=f"{why}: 'epoch' is ambiguous", candidates=candidates)


def _logged(reading: _Reading) -> None:
    """`_batches_that_stepped`, by which loggers count: with the optimizer that stepped in every batch."""
    count = reading.count(_STEPPED)
    steps = {o.name: step for o in reading.optimizers if isinstance(step := value_of(o.step), int)}
    if count is None or len(steps) < len(reading.optimizers):
        return
    near = [name for name, step in steps.items() if step - count in (0, 1)] or list(steps)[: len(steps) == 1]
    if near:
        reading.take(_STEPPED, ("step", near[0]), steps[near[0]], of="logged")
    elif not reading.optimizers and (total := reading.count(("global_step",))) is not None:
        reading.take(_STEPPED, ("progress", "step"), total, of="logged")


def _scheduler_calls(reading: _Reading) -> None:
    """The calls of all schedulers together, where Lightning makes them (not in manual optimization)."""
    positions = [p for s in reading.schedules if isinstance(p := value_of(s.position), int)]
    if not positions or len(positions) < len(reading.schedules):
        return
    if reading.count((*_SCHEDULERS, "completed")) == sum(positions):
        to: Path = ("position", reading.schedules[0].name)
        reading.take_tracker(_SCHEDULERS, to, sum(positions), of="positions")


def _scale(root: DictNode) -> tuple[str, Number, Encoding] | None:
    """(key, loss scale, how it is written) of the precision plugin."""
    for (key,) in LIGHTNING.scaler:
        node = root.get(key)
        found = number_of(node.get("scale")) if isinstance(node, DictNode) else None
        if found is not None and not isinstance(found[0], bool):
            return str(key), *found
    return None


def _loss_scale(reading: _Reading) -> Fact:
    found = _scale(reading.root)
    if found is None:
        return NOT_RECORDED
    key, scale, how = found
    reading.lifter.take((key, "scale"), ("progress", "loss_scale"), **how)
    return Known(value=scale, source=f"{key}.scale")


def _skipped(reading: _Reading, together: bool, loss_scale: Fact) -> Fact:
    """What loss scaling skipped: `global_step` counts it, an optimizer's own step does not."""
    total, optimizers = reading.count(("global_step",)), reading.optimizers
    own = value_of(optimizers[0].step) if len(optimizers) == 1 and optimizers[0].param_steps else None
    if not isinstance(loss_scale, Known) or total is None or not isinstance(own, int) or own > total:
        return NOT_RECORDED
    if not together:
        return NOT_RECORDED
    return Known(
        value=total - own, status="derived", source="global_step", formula="global_step less the updates"
    )
