"""Progress of a run as an object graph tells it: the optimizers' counters, and those of users.

A user's `step` variable has no defined meaning. Where its value is the optimizer's count, or one more (the
tutorial's loop counts from 1), it is taken to follow it and is rewritten with it; that is said. An `epoch`
variable may count what is finished or name the current one: both readings are offered, the value stays.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from ckptconv.dialects.graph_bundle import Bundle
from ckptconv.dialects.keras_optimizers import OptimizerNode
from ckptconv.dialects.keras_scaling import UNSCALED, fixed_scaling
from ckptconv.document import Absent, Candidate, Fact, Known, Optimizer, Progress, Unknown, value_of

_STEP_NAMES = frozenset({"step", "global_step", "steps", "iteration", "iterations", "iter"})
_EPOCH_NAMES = frozenset({"epoch", "epochs", "cur_epoch", "current_epoch"})


def progress_of(bundle: Bundle, nodes: Sequence[OptimizerNode], lifted: Sequence[Optimizer]) -> Progress:
    """What the optimizers tell."""
    if not lifted:
        return Progress(step=Unknown(reason="there is no optimizer in the checkpoint"))
    if len(lifted) > 1:
        candidates = tuple(
            Candidate(
                value=optimizer.step.value, source=optimizer.step.source, condition=f"of '{optimizer.name}'"
            )
            for optimizer in lifted
            if isinstance(optimizer.step, Known)
        )
        return Progress(
            step=Unknown(reason="there are several optimizers, each with its own", candidates=candidates)
        )
    node, optimizer = nodes[0], lifted[0]
    micro: Fact = Absent(reason="gradients are not accumulated")
    accumulation: Fact = micro
    if node.generation != "keras3":
        micro = accumulation = Unknown(reason="tf_keras does not accumulate gradients itself; a loop may")
    elif node.accumulates and node.step is not None:
        micro = Known(value=bundle.number(node.step), source=bundle.source(node.step))
        accumulation = Unknown(reason="gradient_accumulation_steps is not stored")
    scale: Fact = UNSCALED
    if node.loss_scale is not None:
        scale = Known(value=bundle.number(node.loss_scale), source=bundle.source(node.loss_scale))
        bundle.take_number(node.loss_scale, ("progress", "loss_scale"))
    return Progress(step=optimizer.step, micro_steps=micro, accumulation=accumulation, loss_scale=scale)


def scaling_of(bundle: Bundle, nodes: Sequence[OptimizerNode]) -> Mapping[str, Fact]:
    """What the loss scaling of the only optimizer keeps beside the scale."""
    if len(nodes) != 1 or nodes[0].growth_tracker is None:
        return {}
    tracker = nodes[0].growth_tracker
    bundle.take_number(tracker, ("loss_scaling", "growth_tracker"))
    counted = Known(value=bundle.number(tracker), source=bundle.source(tracker))
    return {"growth_tracker": counted, **fixed_scaling(nodes[0].generation)}


@dataclass(frozen=True, slots=True, kw_only=True)
class UserCounters:
    """What variables beside the model add."""

    step: Unknown | None = None
    epochs: Unknown | None = None
    oddities: tuple[str, ...] = ()

    def apply(self, progress: Progress) -> Progress:
        """The progress with these readings where the optimizers tell nothing."""
        if self.step is not None and not isinstance(progress.step, Known):
            known = progress.step.candidates if isinstance(progress.step, Unknown) else ()
            progress = replace(progress, step=replace(self.step, candidates=(*known, *self.step.candidates)))
        if self.epochs is not None:
            progress = replace(progress, epochs=self.epochs)
        return progress


def user_counters(bundle: Bundle, lifted: Sequence[Optimizer], user: Mapping[str, int]) -> UserCounters:
    """Read the counters that stand at the checkpoint's root, and couple a step to the only optimizer's."""
    step = epochs = None
    oddities = []
    counted = value_of(lifted[0].step) if len(lifted) == 1 else None
    for edge, node in user.items():
        tensor = bundle.tensor(node)
        if tensor.spec.numel != 1 or tensor.dtype.kind not in ("int", "uint"):
            continue
        value = int(bundle.number(node))
        if edge in _EPOCH_NAMES and epochs is None:
            epochs = Unknown(
                reason=f"the variable '{edge}' may count finished epochs or name the last one",
                candidates=(
                    Candidate(value=value, source=bundle.source(node), condition="it counts finished epochs"),
                    Candidate(
                        value=value + 1,
                        source=bundle.source(node),
                        condition="it names the last finished, from 0",
                    ),
                ),
            )
        elif edge in _STEP_NAMES:
            if isinstance(counted, int) and value - counted in (0, 1):
                bundle.take_number(node, ("step", lifted[0].name), plus=value - counted)
                follows = "follows the optimizer's count" + (", from 1" if value != counted else "")
                oddities.append(f"the variable '{edge}' ({value}) {follows}; it is rewritten with it")
            elif counted is not None:
                oddities.append(
                    f"the variable '{edge}' is {value}, the optimizer has counted {counted}: both are kept"
                )
            elif step is None:
                step = Unknown(
                    reason=f"only the variable '{edge}' tells, and what it counts is not recorded",
                    candidates=(
                        Candidate(
                            value=value, source=bundle.source(node), condition="it counts completed updates"
                        ),
                    ),
                )
    return UserCounters(step=step, epochs=epochs, oddities=tuple(oddities))
