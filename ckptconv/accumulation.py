"""Gradient accumulation in a transfer: batches and updates, and the gradients of an update not yet complete.

Keras 3 counts batches and keeps the sum of their gradients beside the slots. In torch both are in the loop:
the counter counts updates, and the sum is `.grad`, which no checkpoint holds. A target that counts batches is
given the updates times the batches of each; a window that is open crosses where both sides hold it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from ckptconv.account import Account, Addresses, through
from ckptconv.catalog.wrappers import ACCUMULATED
from ckptconv.document import Checkpoint, Fact, Known, Optimizer, Progress, value_of
from ckptconv.errors import Problem
from ckptconv.report import Entry
from ckptconv.tensor import FilledTensor, TensorRef
from ckptconv.ties import Pair

_LOC = ("progress", "accumulation")


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """How far the source has come in the update that is not complete."""

    per_update: int | None
    """Batches per update; None where it cannot be told."""
    done: int | None
    """Batches of the open update."""


def window_of(progress: Progress) -> Window:
    """The source's open update, by its counters: they tell the batches of each where one number fits."""
    step, micro, told = (value_of(f) for f in (progress.step, progress.micro_steps, progress.accumulation))
    per_update = told if isinstance(told, int) and told > 0 else None
    if not isinstance(micro, int) or not isinstance(step, int):
        return Window(per_update=per_update, done=None)
    if per_update is None and step > 0:
        fits = range(micro // (step + 1) + 1, micro // step + 1)
        per_update = fits[0] if len(fits) == 1 else None
    return Window(per_update=per_update, done=None if per_update is None else micro - step * per_update)


def place_accumulation(
    origin: Optimizer,
    target: Optimizer,
    source: Checkpoint,
    template: Checkpoint,
    pairs: Mapping[str, Pair],
    places: Addresses,
    account: Account,
) -> tuple[Mapping[str, TensorRef], Progress]:
    """The target's sums of gradients, and the progress with its count of batches."""
    progress, window = source.progress, window_of(source.progress)
    if ("progress", "micro_steps") not in places or ACCUMULATED not in target.slots:
        if ACCUMULATED in origin.slots:
            progress = _closed(origin, progress, window, account)
        return {}, progress
    told = template.progress.accumulation
    per_update: Fact = progress.accumulation
    if isinstance(told, Known):
        per_update = replace(told, status="supplied", source="template")
    elif not isinstance(per_update, Known) and window.per_update is not None:
        per_update = Known(value=window.per_update, status="derived", formula="micro_steps / step")
    count, step = value_of(per_update), value_of(progress.step)
    if not isinstance(count, int) or count < 1:
        account.problems.append(
            Problem(
                code="progress-unknown",
                loc=_LOC,
                message="the target counts batches and makes an update of several; of how many, neither "
                "source nor template tells",
                hint="Pass --set accumulation=N (gradient_accumulation_steps).",
            )
        )
        return target.slots[ACCUMULATED], progress
    held = origin.slots.get(ACCUMULATED, {})
    crosses = bool(held) and window.per_update == count
    if not crosses and window.done:
        _dropped(
            origin, window, account, f"the target's updates are of {count} batches" if held else _IN_GRAD
        )
    if crosses or not isinstance(step, int):
        batches = progress.micro_steps
    else:
        batches = Known(value=step * count, status="derived", formula="step * accumulation")
    sums = {}
    for name, place in target.slots[ACCUMULATED].items():
        pair = pairs.get(name)
        producer = source.params[pair.source].tied_to or pair.source if pair is not None else name
        item = ("slot", origin.name, ACCUMULATED, producer)
        if crosses and pair is not None and producer in held:
            loc = ("optimizers", target.name, ACCUMULATED, name)
            sums[name], done = through(held[producer], pair.ops, place.spec, loc, account)
            ops = tuple(op.to_json() for op in done)
            entry = Entry(item=item, fate="transformed" if done else "copied", ops=ops)
        else:
            sums[name] = FilledTensor(spec=place.spec, value=0.0)
            entry = Entry(item=item, fate="created", detail="0 at the beginning of an update")
        account.ledger.append(replace(entry, target=f"{name}/{ACCUMULATED}"))
    return sums, replace(progress, micro_steps=batches, accumulation=per_update)


_IN_GRAD = "the gradients of them are in no file of the source (torch keeps them in .grad)"


def _closed(origin: Optimizer, progress: Progress, window: Window, account: Account) -> Progress:
    """The progress for a target without sums: of an update's end, where the sums are 0."""
    if window.done is None:
        account.problems.append(
            Problem(
                code="progress-unknown",
                loc=_LOC,
                message="the source accumulates gradients and the target does not: whether an update is open "
                "cannot be told without the batches per update",
                hint="Pass --set accumulation=N (gradient_accumulation_steps).",
            )
        )
        return progress
    allowed = ""
    if window.done:
        _dropped(origin, window, account, "the target keeps no gradients")
        allowed = "state-dropped"
    account.ledger.append(
        Entry(
            item=("slot", origin.name, ACCUMULATED),
            fate="left",
            detail="the gradients of the open update" if window.done else "0: no update is open",
            allowed_by=allowed,
        )
    )
    account.requires.append(f"# an update of {window.per_update} batches: the mean of their gradients")
    told: Fact = Known(value=window.per_update, status="derived", formula="micro_steps / step")
    if isinstance(progress.accumulation, Known):
        told = progress.accumulation
    micro = progress.micro_steps
    if isinstance(micro, Known) and isinstance(micro.value, int):
        count = micro.value - window.done
        formula = "step * accumulation"
        micro = replace(micro, value=count, status="derived", formula=formula) if window.done else micro
    return replace(progress, micro_steps=micro, accumulation=told)


def _dropped(origin: Optimizer, window: Window, account: Account, why: str) -> None:
    message = f"{window.done} of the {window.per_update} batches of the next update are done, and {why}"
    problem = Problem(
        code="state-dropped",
        loc=("optimizers", origin.name, ACCUMULATED),
        message=message,
        hint="Convert a checkpoint of an update's end, or allow state-dropped to begin the update anew.",
    )
    if account.refuse(problem):
        account.differ("lossy", f"{message} (allowed: state-dropped)")
