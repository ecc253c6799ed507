"""How far an HF Trainer's run has come, and what moves with it: `trainer_state.json` beside the optimizer.

| place | counts |
|---|---|
| `global_step` | calls of the optimizer, those that a loss scaler skipped included |
| optimizer's `step` | updates |
| scheduler's `last_epoch` | updates |
| `epoch` | batches of the run / batches of an epoch; the Trainer computes it anew from `global_step` |
| `num_input_tokens_seen` | tokens; 0 where the Trainer does not count them |
| `train_batch_size` | no counter: samples per device and backward pass |

An edited step takes `global_step` with it, and `epoch` where the updates of an epoch are a whole number.
`log_history`, `best_global_step` and `max_steps` tell of other moments and stay. Source: transformers 5.24
`trainer.py` `_inner_training_loop`, `trainer_callback.py` `TrainerState`.
"""

from __future__ import annotations

from dataclasses import replace

from ckptconv.dialects.residue import Lifter
from ckptconv.dialects.torch_folder_parts import scalars
from ckptconv.dialects.torch_lower import is_carried
from ckptconv.dialects.torch_progress import step_of_optimizers
from ckptconv.dialects.torch_table import HF_TRAINER
from ckptconv.dialects.torch_values import count_of, dotted, number_of, places
from ckptconv.document import (
    NOT_RECORDED,
    Absent,
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

STATE, ARGUMENTS, SCALER = "trainer_state.json", "training_args.bin", "scaler.pt"

_STEP, _, _EPOCH, _TOKENS = (counter.key for counter in HF_TRAINER.counters)
_ALIKE = 1e-9
_MOST = 1 << 53
"""No run counts further; beyond it a double skips numbers."""


def read_state(
    root: DictNode, optimizers: tuple[Optimizer, ...], lifter: Lifter, engine: Progress | None = None
) -> tuple[Progress, tuple[str, ...]]:
    """The progress of the run, and what is odd about it; `engine`: what DeepSpeed counts of it.

    I/O: reads 0-d counters. Raises: progress-conflict.
    """
    state = root.get(STATE)
    if not isinstance(state, DictNode):
        if engine is not None:
            return engine, ()
        unknown = Unknown(reason=f"there is no {STATE}")
        step = step_of_optimizers(optimizers) if optimizers else unknown
        return Progress(step=step, epochs=unknown), ()
    own = engine.step if engine is not None else step_of_optimizers(optimizers) if optimizers else None
    scaled = SCALER in root or (engine is not None and bool(value_of(engine.skipped_steps)))
    step, skipped, odd = _step(state, own, scaled, lifter)
    accumulation = _accumulation(root.get(ARGUMENTS))
    epochs, batches = _epochs(state, step, value_of(skipped), value_of(accumulation) == 1, lifter)
    every = isinstance(step, Known) and value_of(accumulation) == 1 and value_of(skipped) in (0, None)
    micro = (
        Known(value=step.value, status="derived", source=step.source, formula="no accumulation")
        if every and isinstance(step, Known)
        else NOT_RECORDED
    )
    return Progress(
        step=step,
        epochs=epochs,
        batch_in_epoch=batches,
        micro_steps=micro,
        accumulation=accumulation,
        tokens=_tokens(state, lifter),
        skipped_steps=skipped if engine is None else engine.skipped_steps,
        samples=engine.samples if engine is not None else NOT_RECORDED,
        loss_scale=engine.loss_scale if engine is not None else _loss_scale(root.get(SCALER), lifter),
    ), odd


def _step(
    state: DictNode, own: Fact | None, scaled: bool, lifter: Lifter
) -> tuple[Fact, Fact, tuple[str, ...]]:
    """(updates, skipped ones, oddities); `own`: the optimizer's, `scaled`: a loss scaler may skip some."""
    counted = count_of(state.get("global_step"))
    if counted is None or not 0 <= counted[0] < _MOST:
        reason = Unknown(reason=f"'{dotted(_STEP)}' is no count")
        return (own if own is not None else reason), NOT_RECORDED, ()
    calls, how = counted
    done = own.value if isinstance(own, Known) and isinstance(own.value, int) else calls
    if done > calls or (done < calls and not scaled):
        raise MappingError.of(
            "progress-conflict",
            f"'{dotted(_STEP)}' is {calls}, the optimizer has made {done} updates",
            "The files are of two moments of the run: copy the folder again, or pass --set step=N.",
            loc=_STEP,
        )
    lifter.take(_STEP, ("progress", "step"), **how, plus=calls - done, was=done)
    skipped: Fact = Absent(reason="there is no loss scaler")
    odd: tuple[str, ...] = ()
    if scaled:
        skipped = Known(
            value=calls - done,
            status="derived",
            source=dotted(_STEP),
            formula="global_step - the optimizer's step",
        )
        if calls > done:
            odd = (
                f"The Trainer counts {calls} steps, the optimizer has made {done} updates: the loss scaler "
                f"skipped {calls - done}.",
            )
    step = own if isinstance(own, Known) else Known(value=calls, source=dotted(_STEP))
    return step, skipped, odd


def _accumulation(arguments: Node) -> Fact:
    for key, value in scalars(arguments):
        if key == "gradient_accumulation_steps" and isinstance(value, int) and value > 0:
            return Known(value=value, source=dotted((ARGUMENTS, key)))
    return NOT_RECORDED


def _epochs(
    state: DictNode, step: Fact, skipped: object, each_batch: bool, lifter: Lifter
) -> tuple[Fact, Fact]:
    """Epochs, whole ones or a fraction, and the batches since the last one began."""
    found = number_of(state.get("epoch"))
    if found is None or isinstance(found[0], bool) or not 0 <= found[0] < _MOST:
        return Unknown(reason=f"{STATE} has no epoch"), NOT_RECORDED
    epoch = found[0]
    done = value_of(step)
    calls = done + (skipped if isinstance(skipped, int) else 0) if isinstance(done, int) else 0
    per_epoch = round(calls / epoch) if epoch * _MOST > calls else 0
    whole = per_epoch > 0 and abs(calls / per_epoch - epoch) <= _ALIKE * epoch
    how = {"per_epoch": per_epoch} if whole else {}
    lifter.take(_EPOCH, ("progress", "epochs"), **how, at=epoch)
    known = Known(value=epoch, source=dotted(_EPOCH))
    if float(epoch).is_integer():
        return known, Known(
            value=0, status="derived", source=dotted(_EPOCH), formula="a whole number of epochs"
        )
    if whole and each_batch:
        formula = f"{per_epoch} batches are an epoch"
        return known, Known(value=calls % per_epoch, status="derived", source=dotted(_STEP), formula=formula)
    return known, Unknown(reason=f"{STATE} has the share of the epoch, not the batches that it has")


def _tokens(state: DictNode, lifter: Lifter) -> Fact:
    found = count_of(state.get("num_input_tokens_seen"))
    if found is None or not 0 <= found[0] < _MOST:
        return NOT_RECORDED
    if not found[0]:
        return Unknown(reason="num_input_tokens_seen is 0: the Trainer was not told to count tokens")
    lifter.take(_TOKENS, ("progress", "tokens"), **found[1])
    return Known(value=found[0], source=dotted(_TOKENS))


def _loss_scale(node: Node, lifter: Lifter) -> Fact:
    if not isinstance(node, DictNode):
        return Absent(reason=f"there is no {SCALER}")
    found = number_of(node.get("scale"))
    if found is None or isinstance(found[0], bool):
        return Absent(reason=f"'{SCALER}' is a disabled GradScaler")
    lifter.take((SCALER, "scale"), ("progress", "loss_scale"), **found[1])
    return Known(value=found[0], source=f"{SCALER}.scale")


def settle_state(checkpoint: Checkpoint, root: Node) -> tuple[Checkpoint, Node]:
    """The document whose epochs follow its step, where that was edited or is another run's, and the residue.

    Raises: residue-stale.
    """
    spots = {path: lifted.encoding for path, lifted in places(root) if path in (_STEP, _EPOCH)}
    progress, calls, share = checkpoint.progress, spots.get(_STEP, {}), spots.get(_EPOCH)
    plus, step, was = calls.get("plus", 0), value_of(progress.step), calls.get("was")
    if is_carried(checkpoint, root):
        skipped = value_of(progress.skipped_steps)
        plus = skipped if isinstance(skipped, int) else 0

    def follow(path: Path, node: Node) -> Node:
        if path != _STEP or not isinstance(node, Lifted):
            return node
        return Lifted(to=node.to, encoding={**node.encoding, "plus": plus})

    root = transform(root, follow)
    kept = isinstance(progress.epochs, Known) and (
        step == was or share is None or progress.epochs.value != share.get("at")
    )
    if share is None or kept or not isinstance(step, int) or not isinstance(plus, int):
        return checkpoint, root
    per_epoch = share.get("per_epoch")
    if not isinstance(per_epoch, int):
        raise MappingError.of(
            "residue-stale",
            f"the step is {step} now, '{dotted(_EPOCH)}' is {share.get('at')} at step {was}: how many "
            "updates an epoch has does not follow",
            "Pass --set epochs=X as well; the Trainer computes it anew when it resumes.",
            loc=_EPOCH,
        )
    moved = Known(
        value=(step + plus) / per_epoch,
        status="derived",
        source=dotted(_EPOCH),
        formula=f"{per_epoch} updates are an epoch",
    )
    return replace(checkpoint, progress=replace(progress, epochs=moved)), root
