"""A Lightning document of one mind: the loops follow the optimizers' steps, and stand as epochs and batch do.

What is unchanged is written as it was, hooks and all. An edited step takes `global_step`, the loops' copies
and the schedulers' calls with it, and the batches of the run where each one was stepped on. Edited epochs or
batches, and a run that is carried onto a template, are written as Lightning's loops stand between two hooks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from ckptconv.dialects.lightning_loops import IS_LAST
from ckptconv.dialects.torch_lower import is_carried, steps_at_lift
from ckptconv.dialects.torch_values import dotted, places
from ckptconv.document import Checkpoint, Known, Progress, value_of
from ckptconv.errors import CkptError, LossError, MappingError
from ckptconv.rawtree import Lifted, Node, Path, transform

_BEGUN = ("ready", "started")


def settle_loops(checkpoint: Checkpoint, root: Node) -> tuple[Checkpoint, Node]:
    """The document and the residue whose loops follow it.

    Raises: progress-range, progress-unknown, residue-stale.
    """
    carried = is_carried(checkpoint, root)
    was = _at_lift(root)
    if not carried:
        checkpoint = _with_batches(checkpoint, root, was)
        _refuse_stale_schedules(checkpoint, root)
    progress = checkpoint.progress
    _refuse_fraction(progress, root)
    again = carried or any(
        name in was and value_of(getattr(progress, name)) != was[name]
        for name in ("epochs", "batch_in_epoch")
    )
    steps = {("step", o.name): value_of(o.step) for o in checkpoint.optimizers}
    positions = {("position", s.name): value_of(s.position) for s in checkpoint.schedules}
    lag = _lag(root)
    running = bool(value_of(progress.batch_in_epoch))

    def follow(path: Path, node: Node) -> Node:
        if path == IS_LAST and again:
            return False
        if not isinstance(node, Lifted):
            return node
        plus, of = node.encoding.get("plus", 0), node.encoding.get("of")
        assert isinstance(plus, int)
        if node.to[0] == "progress" and "was" in node.encoding and again and of is None:
            ahead = running and node.to[1] == "epochs" and path[-1] in _BEGUN
            plus = 1 if ahead else 0
        elif of == "logged":
            plus = 0 if carried else plus + lag if again else plus
        elif of in ("updates", "positions"):
            plus = (0 if carried else plus) + _others(steps if of == "updates" else positions, node.to, path)
        else:
            return node
        return Lifted(to=node.to, encoding={**node.encoding, "plus": plus})

    return checkpoint, transform(root, follow)


def _at_lift(root: Node) -> dict[str, int]:
    """Progress field -> its value when the residue was taken."""
    return {
        str(lifted.to[1]): was
        for _, lifted in places(root)
        if lifted.to[0] == "progress" and isinstance(was := lifted.encoding.get("was"), int)
    }


def _lag(root: Node) -> int:
    """1 where the file was saved before the last batch was `completed`."""
    for path, lifted in places(root):
        plus = lifted.encoding.get("plus")
        if lifted.to == ("progress", "micro_steps") and path[-1] == "completed" and isinstance(plus, int):
            return -plus
    return 0


def _others(values: Mapping[tuple[str, str], object], here: Path, path: Path) -> int:
    """What all but one of the optimizers (or schedules) add to a sum. Raises: progress-unknown."""
    total = 0
    for address, value in values.items():
        if address == here:
            continue
        if not isinstance(value, int):
            raise MappingError.of(
                "progress-unknown",
                f"'{dotted(path)}' counts {' '.join(address)} as well, which is not known",
                "Pass --set step=N.",
                loc=path,
            )
        total += value
    return total


def _with_batches(checkpoint: Checkpoint, root: Node, was: Mapping[str, int]) -> Checkpoint:
    """The document whose batches moved with an edited step. Raises: residue-stale."""
    before = steps_at_lift(root)
    after = {o.name: value_of(o.step) for o in checkpoint.optimizers}
    edited = {name for name, step in before.items() if step != after.get(name)}
    fact, batches = checkpoint.progress.micro_steps, was.get("micro_steps")
    if not edited or batches is None or not isinstance(fact, Known) or fact.value != batches:
        return checkpoint
    if fact.status == "supplied":
        return checkpoint
    if set(before.values()) != {batches} or before.keys() != after.keys() or len(set(after.values())) != 1:
        raise MappingError.of(
            "residue-stale",
            f"the step of '{min(edited)}' was edited, and the loops still count {batches} batches: how many "
            "there are to an update is not recorded",
            "Pass --set micro_steps=N as well.",
            loc=("progress", "micro_steps"),
        )
    moved = Known(value=after[min(edited)], status="derived", formula="every batch was stepped on")
    return replace(checkpoint, progress=replace(checkpoint.progress, micro_steps=moved))


def _refuse_stale_schedules(checkpoint: Checkpoint, root: Node) -> None:
    """Schedules of nobody knows which optimizer, whose step was edited. Raises: residue-stale."""
    steps = {o.name: value_of(o.step) for o in checkpoint.optimizers}
    if all(steps.get(name) == step for name, step in steps_at_lift(root).items()):
        return
    for path, lifted in places(root):
        if lifted.to[0] != "position" or "was" not in lifted.encoding:
            continue
        schedule = checkpoint.schedule(str(lifted.to[1]))
        fact = schedule.position
        kept = isinstance(fact, Known) and fact.status != "supplied" and fact.value == lifted.encoding["was"]
        if kept and schedule.optimizer not in steps:
            raise MappingError.of(
                "residue-stale",
                f"'{dotted(path)}' still holds {lifted.encoding['was']}, and a step that "
                f"'{schedule.name}' may move with was edited",
                "Edit its position in the document as well, with the status 'supplied'.",
                loc=path,
            )


def _refuse_fraction(progress: Progress, root: Node) -> None:
    """Raises: progress-range for epochs that the loops cannot hold."""
    epochs = value_of(progress.epochs)
    if not isinstance(epochs, float) or epochs.is_integer():
        return
    for path, lifted in places(root):
        if lifted.to == ("progress", "epochs"):
            error: CkptError = LossError.of(
                "progress-range",
                f"'{dotted(path)}' counts whole epochs, the run has done {epochs}",
                "Pass --set epochs=N --set batch_in_epoch=N.",
                loc=path,
            )
            raise error
