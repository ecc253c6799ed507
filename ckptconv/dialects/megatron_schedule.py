"""The schedule of Megatron-LM's `OptimizerParamScheduler`, which counts samples, as one that counts updates.

`opt_param_scheduler` has the rates, `num_steps`, `lr_warmup_steps` and `lr_decay_steps` in samples, and the
style; `args` has the samples of an update (`global_batch_size`) and where the warmup begins
(`lr_warmup_init`). The rate rises from there to `max_lr`, then by the style to `min_lr`, and stays:

    style       after the warmup, of n updates
    constant    none
    linear      polynomial of power 1
    cosine      cosine, half a cycle

Other styles, groups with rates of their own, a batch that grows, and a decay of the weights that moves are
left unknown. Source: megatron-core 0.16 `optimizer_param_scheduler.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from ckptconv.catalog.schedule_rates import Curve, flat
from ckptconv.catalog.schedules import UNKNOWN
from ckptconv.dialects.torch_values import number_of
from ckptconv.document import Checkpoint, Group, Known, Schedule, Unknown, value_of
from ckptconv.rawtree import DictNode, Opaque

_NAME, _COUNT = "opt_param_scheduler", "num_steps"
_FORMULA = f"{_COUNT} // global_batch_size"
_UNTOLD = Unknown(reason="it counts samples, and the samples of an update are not recorded")

Numbers = Mapping[str, float]


def with_schedule(checkpoint: Checkpoint, root: DictNode) -> Checkpoint:
    """The document with the schedule of its only optimizer, whose groups have the rate that it rises to."""
    state, arguments = root.get(_NAME), root.get("args")
    if not isinstance(state, DictNode) or len(checkpoint.optimizers) != 1:
        return checkpoint
    (optimizer,) = checkpoint.optimizers
    said = arguments.state if isinstance(arguments, Opaque) else None
    told = {**_numbers(said), **_numbers(state)} if isinstance(said, DictNode) else _numbers(state)
    batch, count = told.get("global_batch_size", 0.0), told.get(_COUNT, 0.0)
    schedule = Schedule(name=_NAME, family=UNKNOWN, position=_UNTOLD, unit="update", optimizer=optimizer.name)
    if batch <= 0 or count % batch or _COUNT not in told:
        return replace(checkpoint, schedules=(schedule,))
    position = Known(
        value=int(count // batch), status="derived", source=f"{_NAME}.{_COUNT}", formula=_FORMULA
    )
    schedule = replace(schedule, position=position)
    rates = [told.get("max_lr"), told.get("min_lr")]
    style = state.get("lr_decay_style")
    own = {(_rate(g, "max_lr", rates[0]), _rate(g, "min_lr", rates[1])) for g in optimizer.groups}
    curve = _curve(style, told, batch) if own == {tuple(rates)} and _is_still(state) else None
    if curve is None:
        return replace(checkpoint, schedules=(schedule,))
    parameters = {
        name: Known(value=value, status="derived", source=_NAME, formula="in updates")
        for name, value in flat(curve).items()
    }
    base = Known(value=rates[0], source=f"{_NAME}.max_lr")
    groups = tuple(
        replace(g, hyperparameters={**g.hyperparameters, "base_learning_rate": base})
        for g in optimizer.groups
    )
    return replace(
        checkpoint,
        optimizers=(replace(optimizer, groups=groups),),
        schedules=(replace(schedule, family=curve.family, parameters=parameters),),
    )


def _numbers(node: DictNode) -> dict[str, float]:
    """The plain numbers of a dictionary or of an object's attributes."""
    found = {k: number_of(v) for k, v in node.items if isinstance(k, str) and isinstance(v, (int, float))}
    return {key: float(number[0]) for key, number in found.items() if number is not None}


def _rate(group: Group, name: str, otherwise: float | None) -> float | None:
    value = value_of(group.hyperparameters.get(name))
    return float(value) if isinstance(value, (int, float)) else otherwise


def _is_still(state: DictNode) -> bool:
    """Whether the decay of the weights stays what it is."""
    return state.get("start_wd") == state.get("end_wd")


def _curve(style: object, told: Numbers, batch: float) -> Curve | None:
    lengths = [told.get(name, -1.0) / batch for name in ("lr_warmup_steps", "lr_decay_steps")]
    begin, peak = told.get("lr_warmup_init"), told.get("max_lr")
    make = _STYLES.get(style) if isinstance(style, str) else None
    if make is None or not peak or not all(n.is_integer() and n >= 0 for n in lengths):
        return None
    warmup, end = map(int, lengths)
    main = make(end - warmup, told)
    if main is None or not warmup:
        return main
    if begin is None:
        return None
    factors = {"start_factor": begin / peak, "end_factor": 1.0, "length": warmup}
    rise = Curve(family="linear", parameters=factors)
    return Curve(family="sequential", parameters={"milestones": (warmup,)}, parts=(rise, main))


def _constant(length: int, told: Numbers) -> Curve | None:
    return Curve(family="constant", parameters={"factor": 1.0, "length": 0})


def _linear(length: int, told: Numbers) -> Curve | None:
    if length <= 0 or "min_lr" not in told:
        return None
    return Curve(family="polynomial", parameters={"length": length, "end": told["min_lr"], "power": 1.0})


def _cosine(length: int, told: Numbers) -> Curve | None:
    if length <= 0 or "min_lr" not in told:
        return None
    return Curve(family="cosine", parameters={"length": length, "minimum": told["min_lr"], "after": "hold"})


_STYLES: Mapping[str, Callable[[int, Numbers], Curve | None]] = {
    "constant": _constant,
    "linear": _linear,
    "cosine": _cosine,
}
