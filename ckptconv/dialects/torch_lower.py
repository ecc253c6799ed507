"""From a document back to PyTorch's dictionaries: one step in every place, and state for what has slots.

`settle` makes a document of one mind about the step: an edited one is written to every parameter and to a
schedule that moved with it. `rebuild_state` gives a residue the state entries that the document has slots
for, whether the residue is a fresh template (`state` is `{}`) or a run of its own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

from ckptconv.catalog.optimizer_rows import row
from ckptconv.catalog.schedule_rates import NotExpressibleError, curve_of, momentum
from ckptconv.catalog.schedule_source import named_rates, placed
from ckptconv.catalog.wrappers import bare
from ckptconv.dialects.torch_scheduler import moved, rate_at
from ckptconv.dialects.torch_values import Encoding, dotted, places
from ckptconv.document import Checkpoint, Known, Optimizer, Schedule, Unknown, value_of
from ckptconv.errors import CkptError, LossError, MappingError, Problem
from ckptconv.note import EXTENSION, KEY
from ckptconv.rawtree import DictNode, Lifted, ListNode, Node, Path

_STEP: Mapping[str, str] = {"as": "tensor", "dtype": "float32"}
"""How torch writes `step` since 1.12."""


def settle(checkpoint: Checkpoint, root: Node) -> Checkpoint:
    """The document with one step everywhere, where it was edited in one place.

    `root`: the residue that will be filled. Raises: progress-conflict, residue-stale.
    """
    edits: dict[str, tuple[int, int]] = {}
    stood = {} if is_carried(checkpoint, root) else steps_at_lift(root)
    shared = _shared_step(checkpoint)
    optimizers = []
    for optimizer in checkpoint.optimizers:
        new, recorded = _step_of(optimizer, shared, stood.get(optimizer.name))
        optimizers.append(_with_step(optimizer, new, edited=new != recorded))
        old = stood.get(optimizer.name)
        if old is not None and new is not None and old != new:
            edits[optimizer.name] = (old, new)
    progress = checkpoint.progress
    own = {value_of(o.step) for o in optimizers} - {None}
    if shared is not None and len(own) == 1 and own != {shared}:
        step = progress.step
        progress = replace(progress, step=replace(step, value=own.pop()) if isinstance(step, Known) else step)
    epochs = None if is_carried(checkpoint, root) else _edited_epochs(checkpoint, root)
    positions = moved(checkpoint.schedules, edits, epochs)
    _refuse_stale(checkpoint, root, edits, epochs, positions)
    optimizers = list(_with_rates(tuple(optimizers), checkpoint.schedules, positions))
    schedules = tuple(
        replace(s, position=Known(value=positions[s.name], status="derived", formula="moves with the run"))
        if s.name in positions
        else s
        for s in checkpoint.schedules
    )
    return replace(
        checkpoint,
        progress=progress,
        optimizers=tuple(optimizers),
        schedules=_placed(schedules, {o.name: o for o in optimizers}, root),
    )


def _placed(
    schedules: tuple[Schedule, ...], optimizers: Mapping[str, Optimizer], root: Node
) -> tuple[Schedule, ...]:
    """The schedules, those that stand elsewhere than when the residue was taken with all that follows."""
    stood = {
        str(lifted.to[1]): lifted.encoding.get("was")
        for _, lifted in places(root)
        if lifted.to[0] == "position" and "was" in lifted.encoding
    }
    result, problems = [], []
    for schedule in schedules:
        moved_from = stood.get(schedule.name, value_of(schedule.position))
        if moved_from == value_of(schedule.position):
            result.append(schedule)
            continue
        try:
            result.append(placed(schedule, optimizers.get(schedule.optimizer)))
        except NotExpressibleError as error:
            problems.append(
                Problem(
                    code="residue-stale",
                    loc=("schedules", schedule.name, "position"),
                    message=f"it stood at {moved_from} and is at {value_of(schedule.position)} now; "
                    f"the rest of its state cannot follow: {error}",
                    hint="Leave the position as it was.",
                )
            )
    if problems:
        raise MappingError(*problems)
    return tuple(result)


def is_carried(checkpoint: Checkpoint, root: Node) -> bool:
    """Whether the residue is a template's: a run that is carried onto one brings a note of its own.

    What moves with the step of a template's run says nothing about the run that takes its place.
    """
    note = checkpoint.extensions.get(EXTENSION)
    return note is not None and not (isinstance(root, DictNode) and root.get(KEY) == note)


def steps_at_lift(root: Node) -> dict[str, int]:
    """Optimizer -> its step when the residue was taken."""
    steps: dict[str, int] = {}
    for _, lifted in places(root):
        was = lifted.encoding.get("was")
        if lifted.to[0] in ("param_step", "step") and isinstance(was, int):
            name = str(lifted.to[1])
            steps[name] = max(was, steps.get(name, 0))
    return steps


def _edited_epochs(checkpoint: Checkpoint, root: Node) -> tuple[int, int] | None:
    """The epochs before and after they were edited; None where they were not."""
    now = value_of(checkpoint.progress.epochs)
    for _, lifted in places(root):
        was = lifted.encoding.get("was")
        if lifted.to == ("progress", "epochs") and isinstance(was, int) and isinstance(now, int):
            return (was, now) if now != was else None
    return None


def _shared_step(checkpoint: Checkpoint) -> int | None:
    """`progress.step`, where it is the step of every optimizer."""
    value = value_of(checkpoint.progress.step)
    if not isinstance(value, int) or isinstance(value, bool):
        return None
    recorded = {
        max(o.param_steps.values()) if o.param_steps else value_of(o.step) for o in checkpoint.optimizers
    }
    return value if len(recorded) == 1 else None


def _step_of(optimizer: Optimizer, shared: int | None, stood: int | None) -> tuple[int | None, int | None]:
    """(the step to write, the step before it was edited); `stood`: that of the residue."""
    table = row(optimizer.algorithm, "torch")
    in_group = table is not None and table.step_in_group
    recorded = max(optimizer.param_steps.values(), default=stood if in_group else None)
    own = value_of(optimizer.step)
    own = own if isinstance(own, int) and not isinstance(own, bool) else None
    base = own if recorded is None else recorded
    told = {value for value in (own, shared) if value is not None and value != base}
    if len(told) > 1 or (recorded is None and own is not None and told):
        raise MappingError.of(
            "progress-conflict",
            f"the step of '{optimizer.name}' is {own}, progress.step is {shared}",
            "Give both the same value.",
            loc=("progress", "step"),
        )
    return (told.pop() if told else base), base


def _with_step(optimizer: Optimizer, step: int | None, *, edited: bool) -> Optimizer:
    if step is None:
        return optimizer
    known = replace(optimizer.step, value=step) if isinstance(optimizer.step, Known) else Known(value=step)
    steps = dict(optimizer.param_steps)
    if edited:
        steps = dict.fromkeys(steps, step)
    table = row(optimizer.algorithm, "torch")
    if table is None or (table.step_key is not None and not table.step_in_group):
        for by_param in bare(optimizer).slots.values():
            for name in by_param:
                steps.setdefault(name, step)
    return replace(optimizer, step=known, param_steps=steps)


def _refuse_stale(
    checkpoint: Checkpoint,
    root: Node,
    edits: Mapping[str, tuple[int, int]],
    epochs: tuple[int, int] | None,
    positions: Mapping[str, int],
) -> None:
    """Places that moved with a step or epochs that were edited, and that no rule can rewrite."""
    if not edits and epochs is None:
        return
    problems: list[CkptError] = []
    for path, lifted in places(root):
        match lifted.to:
            case ("position", str(name)) if name not in positions and lifted.encoding.get("plus") is None:
                schedule = checkpoint.schedule(name)
                fact = schedule.position
                by_epoch = schedule.unit == "epoch"
                follows = epochs is not None if by_epoch else schedule.optimizer in edits
                if follows and isinstance(fact, Known) and fact.status != "supplied":
                    problems.append(_stale(path, fact.value, f"the position of schedule '{name}'"))
            case ("position", str(name)) if name in positions and "frozen" in lifted.encoding:
                problems.append(
                    _stale(path, value_of(checkpoint.schedule(name).position), f"schedule '{name}'")
                )
            case ("progress", str(name)) if lifted.encoding.get("moves") == "step" and edits:
                fact = getattr(checkpoint.progress, name)
                was = lifted.encoding.get("was")
                if was and isinstance(fact, Known) and fact.status != "supplied" and fact.value == was:
                    problems.append(_stale(path, was, f"'{name}'", f"Pass --set {name}=N as well."))
            case ("progress", "micro_steps") if edits and isinstance(
                checkpoint.progress.micro_steps, Unknown
            ):
                problems.append(_stale(path, lifted.encoding.get("raw"), "a counter that is not the step"))
    if problems:
        raise MappingError(*(problem for error in problems for problem in error.problems))


def _with_rates(
    optimizers: tuple[Optimizer, ...], schedules: tuple[Schedule, ...], positions: Mapping[str, int]
) -> tuple[Optimizer, ...]:
    """The optimizers whose learning rates follow schedules that moved: torch goes on from what is recorded.

    Raises: residue-stale where the rate is not known at the new position, or was not the schedule's before.
    """
    problems: list[CkptError] = []
    followed = []
    for optimizer in optimizers:
        for schedule in schedules:
            if schedule.name in positions and schedule.optimizer == optimizer.name:
                optimizer = _with_rate(optimizer, schedule, positions[schedule.name], problems)
        followed.append(optimizer)
    if problems:
        raise MappingError(*(problem for error in problems for problem in error.problems))
    return tuple(followed)


def _with_rate(
    optimizer: Optimizer, schedule: Schedule, position: int, problems: list[CkptError]
) -> Optimizer:
    groups = []
    for number, group in enumerate(optimizer.groups):
        fact = group.hyperparameters.get("learning_rate")
        if not isinstance(fact, Known) or fact.status == "supplied":
            groups.append(group)
            continue
        base, stood = value_of(group.hyperparameters.get("base_learning_rate")), value_of(schedule.position)
        was, due = None, None
        if isinstance(base, (int, float)) and isinstance(stood, int):
            named = named_rates(group.hyperparameters)
            was, due = (rate_at(schedule, float(base), tick, named) for tick in (stood, position))
        if due is not None and _alike(fact.value, due):
            groups.append(group)
        elif due is not None and was is not None and _alike(fact.value, was):
            driven = {"learning_rate": due}
            curve = curve_of(schedule)
            cycled = momentum(curve, position, named_rates(group.hyperparameters))
            if cycled is not None:
                driven["beta_1" if curve.parameters["beta_1_cycles"] else "momentum"] = cycled
            facts = {
                name: Known(value=value, status="derived", source=schedule.name, formula=f"at {position}")
                for name, value in driven.items()
            }
            groups.append(replace(group, hyperparameters={**group.hyperparameters, **facts}))
        else:
            groups.append(group)
            wanted = f"is {due} there" if due is not None else f"there is not known ('{schedule.family}')"
            problems.append(
                MappingError.of(
                    "residue-stale",
                    f"the run was moved and '{schedule.name}' moves with it to {position}: the rate "
                    f"{wanted}, the document has {fact.value}, which was not the schedule's before",
                    "Edit learning_rate as well, with the status 'supplied'.",
                    loc=("optimizers", optimizer.name, "groups", number, "hyperparameters", "learning_rate"),
                )
            )
    return replace(optimizer, groups=tuple(groups))


def _alike(rate: object, due: float) -> bool:
    return isinstance(rate, (int, float)) and math.isclose(rate, due, rel_tol=1e-6)


def _stale(path: Path, value: object, what: str, hint: str = "") -> CkptError:
    return MappingError.of(
        "residue-stale",
        f"the run was moved, and '{dotted(path)}' still holds {value}: {what}, which moves with it at an "
        "unknown pace",
        hint or "Edit that value in the document as well, with the status 'supplied'.",
        loc=path,
    )


def rebuild_state(
    node: DictNode, optimizer: Optimizer, path: Path, layouts: Mapping[str, Encoding]
) -> DictNode:
    """An optimizer's part of a residue with exactly the state entries that the document has slots for.

    `layouts`: parameter -> how its tensor lies in the target; torch makes slots alike.
    Raises: template-mismatch, state-dropped, order-ambiguous.
    """
    optimizer = bare(optimizer)  # averages stand beside the optimizer
    state = node.get("state")
    entries = dict(state.items) if isinstance(state, DictNode) else {}
    names = _names(node, optimizer, path)
    keys = _native_keys(entries, optimizer, path)
    how = next((v.encoding for _, v in places(node) if v.to[0] == "param_step"), _STEP)
    rebuilt: list[tuple[Node, Node]] = []
    for index, entry in entries.items():
        name = names.pop(index, None)
        kept = _entry(entry, name, keys, optimizer, how, layouts.get(name, {})) if name is not None else entry
        if kept is not None:
            rebuilt.append((index, kept))
    for index, name in names.items():
        made = _entry(DictNode(), name, keys, optimizer, how, layouts.get(name, {}))
        if isinstance(made, DictNode) and made.items:
            rebuilt.append((index, made))
    if not isinstance(state, DictNode):
        return node
    renewed = replace(state, items=tuple(rebuilt))
    return replace(node, items=tuple((k, renewed if k == "state" else v) for k, v in node.items))


def _names(node: DictNode, optimizer: Optimizer, path: Path) -> dict[Node, str]:
    """Index -> name, by the place in the groups."""
    groups = node.get("param_groups")
    listed = [
        g.get("params")
        for g in (groups.items if isinstance(groups, ListNode) else ())
        if isinstance(g, DictNode)
    ]
    indices = [p.items if isinstance(p, ListNode) else () for p in listed]
    sizes, wanted = [len(i) for i in indices], [len(g.params) for g in optimizer.groups]
    if sizes != wanted:
        raise MappingError.of(
            "template-mismatch",
            f"'{dotted(path)}' has groups of {sizes} parameters, '{optimizer.name}' of the document {wanted}",
            "Pass a template with the same model and parameter groups.",
            loc=path,
        )
    pairs = zip(indices, optimizer.groups, strict=True)
    return {i: n for numbers, group in pairs for i, n in zip(numbers, group.params, strict=True)}


def _native_keys(entries: Mapping[Node, Node], optimizer: Optimizer, path: Path) -> dict[str, str]:
    """Slot -> torch's key: as the residue has it, else as the catalog names it, in torch's order."""
    table = row(optimizer.algorithm, "torch")
    keys = dict(table.slots) if table is not None else {}
    for entry in entries.values():
        for key, value in entry.items if isinstance(entry, DictNode) else ():
            inner = next((v for _, v in places(value) if v.to[0] == "slot"), None)
            if inner is not None and isinstance(key, str):
                keys[str(inner.to[2])] = key
    lacking = [slot for slot in optimizer.slots if slot not in keys and optimizer.slots[slot]]
    if lacking and table is not None:
        raise LossError.of(
            "state-dropped",
            f"'{dotted(path)}' ({table.class_name}) has no place for the slot '{lacking[0]}'",
            "Use a template whose optimizer keeps it, or allow the loss with --allow state-dropped.",
            loc=(*path, "state", lacking[0]),
        )
    return keys | {slot: slot for slot in lacking}


def _entry(
    entry: Node,
    name: str,
    keys: Mapping[str, str],
    optimizer: Optimizer,
    how: Mapping[str, object],
    layout: Encoding,
) -> Node | None:
    """One parameter's state with the slots that the document has for it; None where none is left."""
    if not isinstance(entry, DictNode):
        return entry
    here = {keys[slot]: slot for slot, by_param in optimizer.slots.items() if name in by_param}
    items: list[tuple[Node, Node]] = []
    emptied = False
    for key, value in entry.items:
        gone = any(v.to[0] == "slot" for _, v in places(value)) and key not in here
        slot = here.pop(key, None) if isinstance(key, str) else None
        emptied = emptied or gone
        if gone or (key == "step" and isinstance(value, Lifted) and name not in optimizer.param_steps):
            continue
        fresh = slot is not None and not any(v.to[0] == "slot" for _, v in places(value))
        items.append((key, _slot(optimizer, slot, name, layout) if fresh and slot else value))
    if name in optimizer.param_steps and "step" not in entry and (here or items):
        count = ("param_step", optimizer.name, name)
        items.insert(0, ("step", Lifted(to=count, encoding=how)))  # type: ignore[arg-type]
    order = [key for key in keys.values() if key in here]
    items += [(key, _slot(optimizer, here[key], name, layout)) for key in order]
    if emptied and all(key == "step" for key, _ in items):
        return None  # its slots are gone: a step without them would be worse than none
    return replace(entry, items=tuple(items))


def _slot(optimizer: Optimizer, slot: str, param: str, layout: Encoding) -> Lifted:
    table = row(optimizer.algorithm, "torch")
    if table is not None and slot in table.slot_shapes:
        layout = {}  # it does not have the parameter's shape
    return Lifted(to=("slot", optimizer.name, slot, param), encoding=layout)
