"""The parts of a document that `--select` names.

- `model`: the trained weights, as every document has them by itself;
- `ema`: the average of the weights that stands beside them, by this word or by its own key; it has no
  optimizer, since the optimizer's state is of the weights it was averaged from;
- `model:NAME`, or `NAME` alone: the parameters below `NAME`, without that prefix, with what their optimizers
  know of them;
- `optimizer:0` or `optimizer:NAME`: one of several optimizers with its schedules, and its step as the run's.

A part is a document of its own: it has no residue, and is written onto a template or as weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from ckptconv.dialects.torch_averages import Average, averages
from ckptconv.document import Checkpoint, Group, Known, Optimizer, Param, value_of
from ckptconv.errors import CkptError, MappingError

MODEL, AVERAGE, OPTIMIZER = "model", "ema", "optimizer"


def selected(checkpoint: Checkpoint, names: Sequence[str], candidates: Sequence[str] = ()) -> Checkpoint:
    """The document of what `names` says; `candidates` are what the folder offered, for the message.

    Raises: usage for a name that means nothing here, with what there is; order-ambiguous where it is not
    known which parameters an optimizer holds.
    """
    for name in sorted(names, key=lambda name: not name.startswith(f"{OPTIMIZER}:")):
        kind, _, which = name.partition(":")
        found = averages(checkpoint)
        chosen = [a for a in found if name == a.key or (kind == AVERAGE and which in ("", a.key))]
        if len(chosen) == 1:
            checkpoint = _averaged(checkpoint, chosen[0])
        elif kind == OPTIMIZER and (optimizer := _optimizer(checkpoint, which)) is not None:
            checkpoint = _of_optimizers(checkpoint, (optimizer,))
        elif (below := which if kind == MODEL else name) and _is_prefix(checkpoint, below):
            checkpoint = _below(checkpoint, below)
        elif name != MODEL:
            _refuse(name, [*candidates, *_parts(checkpoint, found)])
    return checkpoint


def _is_prefix(checkpoint: Checkpoint, name: str) -> bool:
    return any(param.startswith(f"{name}.") for param in checkpoint.params)


def _refuse(name: str, there: list[str]) -> None:
    raise CkptError.of(
        "usage",
        f"there is no '{name}' to select, or more than one",
        f"There is: {', '.join(dict.fromkeys(there))}.",
        loc=("--select", name),
    )


def _parts(checkpoint: Checkpoint, found: tuple[Average, ...]) -> Iterator[str]:
    """What can be selected."""
    yield MODEL
    yield from [AVERAGE] if len(found) == 1 else [average.key for average in found]
    heads = dict.fromkeys(name.partition(".")[0] for name in checkpoint.params if "." in name)
    yield from (f"{MODEL}:{head}" for head in heads)
    yield from (f"{OPTIMIZER}:{position}" for position in range(len(checkpoint.optimizers)))


def _optimizer(checkpoint: Checkpoint, which: str) -> Optimizer | None:
    """By its name, or by its number."""
    named = [o for o in checkpoint.optimizers if o.name == which]
    if which.isascii() and which.isdigit() and int(which) < len(checkpoint.optimizers):
        named = named or [checkpoint.optimizers[int(which)]]
    return named[0] if named else None


def _averaged(checkpoint: Checkpoint, average: Average) -> Checkpoint:
    params = {
        name: replace(param, tensor=average.tensors.get(param.tied_to or name, param.tensor))
        for name, param in average.params.items()
    }
    part = _of_optimizers(checkpoint, ())
    said = f"These are the averaged weights of '{average.key}'."
    return replace(part, params=params, progress=checkpoint.progress, oddities=(said, *part.oddities))


def _of_optimizers(checkpoint: Checkpoint, optimizers: tuple[Optimizer, ...]) -> Checkpoint:
    """The document with these optimizers only, and what goes with them."""
    kept = {optimizer.name for optimizer in optimizers}
    kept_blocks = (*checkpoint.rng, *checkpoint.data, *checkpoint.described)
    blocks = {name for block in kept_blocks for name in block.tensors}
    progress = checkpoint.progress
    if len(optimizers) == 1 and len(checkpoint.optimizers) > 1:
        progress = replace(progress, step=optimizers[0].step)
    return replace(
        checkpoint,
        progress=progress,
        optimizers=optimizers,
        schedules=tuple(s for s in checkpoint.schedules if s.optimizer in kept),
        extras={name: tensor for name, tensor in checkpoint.extras.items() if name in blocks},
        residue=None,
    )


def _below(checkpoint: Checkpoint, prefix: str) -> Checkpoint:
    """The part of the model below a prefix. Raises: order-ambiguous."""
    inside = {n: n.removeprefix(f"{prefix}.") for n in checkpoint.params if n.startswith(f"{prefix}.")}
    unknown = [o for o in checkpoint.optimizers if o.params and not set(o.params) <= checkpoint.params.keys()]
    if unknown:
        raise MappingError.of(
            "order-ambiguous",
            f"which parameters '{unknown[0].name}' holds is not known, so neither is what '{prefix}' needs",
            "Save with named parameters, or convert the whole with --source-spec first.",
            loc=("--select", f"{MODEL}:{prefix}"),
        )
    optimizers = tuple(
        _of_params(optimizer, inside)
        for optimizer in checkpoint.optimizers
        if inside.keys() & set(optimizer.params)
    )
    owners: dict[str, str] = {}
    params: dict[str, Param] = {}
    for name, bare in inside.items():
        param = checkpoint.params[name]
        first = owners.setdefault(param.tied_to or name, bare)
        params[bare] = replace(param, name=bare, tied_to=None if first == bare else first)
    return replace(_of_optimizers(checkpoint, optimizers), params=params)


def _of_params(optimizer: Optimizer, inside: Mapping[str, str]) -> Optimizer:
    """What an optimizer holds of these parameters, under their new names."""
    steps = {inside[n]: step for n, step in optimizer.param_steps.items() if n in inside}
    step = optimizer.step
    if steps and max(steps.values()) != value_of(step):
        step = Known(value=max(steps.values()), source=f"{optimizer.name}, of the parameters selected")
    return replace(
        optimizer,
        step=step,
        param_steps=steps,
        groups=tuple(
            Group(params=tuple(inside[n] for n in g.params if n in inside), hyperparameters=g.hyperparameters)
            for g in optimizer.groups
            if inside.keys() & set(g.params)
        ),
        slots={
            slot: {inside[n]: tensor for n, tensor in by_param.items() if n in inside}
            for slot, by_param in optimizer.slots.items()
        },
    )
