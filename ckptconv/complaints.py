"""What may go wrong with a checkpoint whoever restores it, in plain sentences."""

from __future__ import annotations

from collections.abc import Iterator

from ckptconv.dialects import torch_adapter
from ckptconv.dialects.torch_objects import NAMES_CODE
from ckptconv.document import Checkpoint, Known, Optimizer, Unknown
from ckptconv.rawtree import Lifted, walk

_OF_TORCH = ("pytorch", "dcp")
_EPOCHS = ("progress", "epochs")


def complaints(checkpoint: Checkpoint, container: str) -> tuple[str, ...]:
    """Of optimizers, epochs and schedules in a container of that format, and what it lacks."""
    return tuple(_sentence(said) for said in _all(checkpoint, container))


def _sentence(said: str) -> str:
    return f"{said[:1].upper()}{said[1:].removesuffix('.')}."


def _all(checkpoint: Checkpoint, container: str) -> Iterator[str]:
    if not checkpoint.params:
        yield "There are no weights in the file"
    if not checkpoint.optimizers:
        yield (
            "There is no optimizer in the file: whoever goes on from it counts from step 0, and Adam's "
            "averages (or the momentum) begin at zero"
        )
    if torch_adapter.EXTENSION not in checkpoint.extensions and (parts := torch_adapter.parts(checkpoint)):
        yield f"Weights of an adapter ({', '.join(parts)}) are among those in the file"
        yield torch_adapter.UNMERGED
    yield from _of_numbers(checkpoint.optimizers, container)
    for optimizer in checkpoint.optimizers:
        yield from _of_counts(optimizer)
    yield from _of_epochs(checkpoint)
    yield from _of_passes(checkpoint)
    yield from _of_schedules(checkpoint, of_torch=container in _OF_TORCH)
    # that a pickle names code is for those who unpickle it, and no answer here
    yield from (said for said in checkpoint.oddities if not said.startswith(NAMES_CODE))


def _of_numbers(optimizers: tuple[Optimizer, ...], container: str) -> Iterator[str]:
    numbered = [f"'{o.name}'" for o in optimizers if o.param_order == "declaration-order" and o.slots]
    if numbered and container != "neutral":
        checker = "torch" if container in _OF_TORCH else "Keras"
        yield (
            f"The state of {' and of '.join(numbered)} is numbered, not named: number 0 belongs to the first "
            "parameter of the model that was trained, and so on. It is right only for an optimizer over the "
            f"same parameters in the same order, and {checker} does not check that"
        )


def _of_counts(optimizer: Optimizer) -> Iterator[str]:
    steps = set(optimizer.param_steps.values())
    if len(steps) > 1:
        yield (
            f"The parameters of '{optimizer.name}' have not all had as many updates: {min(steps)} to "
            f"{max(steps)}"
        )


def _of_epochs(checkpoint: Checkpoint) -> Iterator[str]:
    epochs = checkpoint.progress.epochs
    if isinstance(epochs, Unknown) and epochs.candidates:
        readings = " or ".join(f"{c.value} ({c.condition})" for c in epochs.candidates)
        yield (
            f"How many epochs are done is ambiguous, for '{epochs.candidates[0].source}' may be meant in two "
            f"ways: {readings}. Whoever begins at the wrong one repeats an epoch or leaves one out"
        )
    if not isinstance(epochs, Known) or not isinstance(epochs.value, int):
        return
    for key, apart in _counters_of_epochs(checkpoint):
        if apart:
            yield (
                f"'{key}' says {epochs.value + apart}, but {_count(epochs.value)} done: "
                + ("it names the last finished one, counted from 0" if apart < 0 else "it names the next one")
                + f". A loop of one's own goes on with epoch {epochs.value}, counted from 0"
            )


def _count(epochs: int) -> str:
    return "1 epoch is" if epochs == 1 else f"{epochs} epochs are"


def _counters_of_epochs(checkpoint: Checkpoint) -> Iterator[tuple[str, int]]:
    """The keys that people read epochs from, and by how much they differ from the epochs that are done."""
    for path, leaf in walk(checkpoint.residue.root) if checkpoint.residue else ():
        if isinstance(leaf, Lifted) and leaf.to == _EPOCHS and path[-1] == "epoch":
            apart = leaf.encoding.get("plus")
            if isinstance(apart, int):
                yield ".".join(map(str, path)), apart


def _of_passes(checkpoint: Checkpoint) -> Iterator[str]:
    """accelerate keeps a 'step' that people take for the run's."""
    batches = checkpoint.progress.batch_in_epoch
    if isinstance(batches, Unknown):
        for reading in batches.candidates:
            yield f"'{reading.source}' is {reading.value}, and is not the run's step: {batches.reason}"


def _of_schedules(checkpoint: Checkpoint, *, of_torch: bool) -> Iterator[str]:
    positions = [schedule.position for schedule in checkpoint.schedules]
    for position in positions:
        if isinstance(position, Unknown):
            yield f"Where the learning-rate schedule stands is not in the file: {position.reason}"
    if of_torch and any(isinstance(position, Known) for position in positions):
        yield (
            "The learning-rate schedule has a counter of its own: a scheduler that is not loaded "
            "(scheduler.load_state_dict) begins at its first rate, whatever the optimizer's step is"
        )
