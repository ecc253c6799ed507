"""What stands around the optimizers of a transfer: averages, accumulated gradients, loss scaling, clipping.

None of it belongs to an update rule, so none of it is in the optimizers' conversion: it is taken off before
and put around the result.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from ckptconv.account import Account, Addresses
from ckptconv.accumulation import place_accumulation, window_of
from ckptconv.averages import average_code, place_averages
from ckptconv.catalog.texts import number
from ckptconv.catalog.wrappers import ACCUMULATED, AVERAGE, bare, settings, wrappers
from ckptconv.document import Checkpoint, Fact, Group, Known, Optimizer, Param, Progress, value_of
from ckptconv.loss_scaling import place_loss_scaling
from ckptconv.rawtree import Lifted, walk
from ckptconv.report import Entry
from ckptconv.ties import Pair


@dataclass(frozen=True, slots=True, kw_only=True)
class Wrapped:
    """The optimizers with what stands around them, and the progress that follows."""

    optimizers: tuple[Optimizer, ...]
    progress: Progress
    loss_scaling: Mapping[str, Fact]


def unwrapped(checkpoint: Checkpoint) -> Checkpoint:
    """The document whose optimizers have their rules' state alone."""
    return replace(checkpoint, optimizers=tuple(map(bare, checkpoint.optimizers)))


def wrap(
    source: Checkpoint,
    template: Checkpoint,
    optimizers: tuple[Optimizer, ...],
    params: Mapping[str, Param],
    pairs: Mapping[str, Pair],
    account: Account,
) -> Wrapped:
    """`optimizers` and `params`: the target's, with the source's values."""
    residue = template.residue
    places: Addresses = frozenset(
        leaf.to for _, leaf in walk(residue.root if residue else None) if isinstance(leaf, Lifted)
    )
    progress, result = source.progress, []
    for made in optimizers:
        target = template.optimizer(made.name)
        origin = _origin(made, source, template)
        if origin is None:
            result.append(replace(made, slots={**target.slots, **made.slots}, groups=target.groups))
            continue
        averages, counts = place_averages(origin, target, params, source, pairs, account)
        sums, progress = place_accumulation(origin, target, source, template, pairs, places, account)
        around = {AVERAGE: averages, ACCUMULATED: sums}
        result.append(
            replace(
                made,
                slots={**made.slots, **{slot: arrays for slot, arrays in around.items() if arrays}},
                scalars={**made.scalars, **counts},
                groups=_with_settings(origin, target, made, places, account, average=bool(averages)),
            )
        )
        if averages and origin.slots.get(AVERAGE):
            _by_batch(origin, target, source.progress, progress, account)
    scaling = place_loss_scaling(source, template, places, account)
    return Wrapped(optimizers=tuple(result), progress=progress, loss_scaling=scaling)


def _origin(made: Optimizer, source: Checkpoint, template: Checkpoint) -> Optimizer | None:
    if len(source.optimizers) == len(template.optimizers) == 1:
        return source.optimizers[0]
    return next((one for one in source.optimizers if one.name == made.name), None)


def _with_settings(
    origin: Optimizer,
    target: Optimizer,
    made: Optimizer,
    places: Addresses,
    account: Account,
    *,
    average: bool,
) -> tuple[Group, ...]:
    """The groups with the settings of averages and clipping: in the file, or as lines of code."""
    table = wrappers(target.framework)
    mine = origin.groups[0].hyperparameters if origin.groups else {}
    theirs = target.groups[0].hyperparameters if target.groups else {}
    facts: dict[str, Fact] = {}
    for name in settings():
        own, offered = mine.get(name), theirs.get(name)
        held = ("hyperparameter", target.name, 0, name) in places
        if own is None and held and offered is not None:
            own = offered
            if isinstance(own, Known):
                own = replace(own, status="supplied", source="template")
        if own is None:
            continue
        facts[name] = own
        if not isinstance(own, Known):
            continue
        line = table.line(name, number(own.value)) if table is not None and not held else None
        if line is not None and not (name.startswith("ema_") and not average) and name != "ema_momentum":
            account.requires.append(line)
        account.ledger.append(
            Entry(
                item=("hyperparameter", origin.name, 0, name),
                fate="supplied" if own.status == "supplied" else "copied" if held else "noted",
                target=f"{target.name}.{name}" if held else "",
                detail=str(own.value),
            )
        )
    if average and ("hyperparameter", target.name, 0, "ema_momentum") not in places:
        account.requires.append(average_code(origin, target))
    return tuple(replace(group, hyperparameters={**group.hyperparameters, **facts}) for group in made.groups)


def _by_batch(
    origin: Optimizer, target: Optimizer, before: Progress, after: Progress, account: Account
) -> None:
    """An average of Keras 3 moves with every batch of an update, one of torch where the loop moves it."""
    per_batch = [ACCUMULATED in one.slots for one in (origin, target)]
    count = value_of(after.accumulation) or window_of(before).per_update
    if per_batch[0] != per_batch[1]:
        name = (origin if per_batch[0] else target).framework
        said = f"the average moves {count} times per update in {name}, elsewhere as often as the loop says"
        account.differ("approximate", said)
