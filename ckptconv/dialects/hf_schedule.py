"""The schedule that transformers' Trainer builds from its arguments: the scheduler's file has no function.

`training_args.bin` has the kind (`lr_scheduler_type`), the warmup in steps or, below 1, as a share of the run
(`warmup_ratio` before 5.0) and `lr_scheduler_kwargs`; `trainer_state.json` has the length of the run
(`max_steps`). After a warmup from 0 to the base rate in `w` ticks every kind is a curve of this package:

    kind                    after the warmup, of n ticks in all
    linear                  linear from 1 to 0 in n - w
    cosine                  cosine to 0 in n - w (half a cycle)
    cosine_with_restarts    restarts every (n - w) / num_cycles
    polynomial              to lr_end (1e-7) with power (1)
    constant                none, and no warmup either
    constant_with_warmup    none

Other kinds, other numbers of cosine cycles and restarts that are no whole ticks are left unknown, as a
function of the user's own is.
Source: transformers 5.24 `optimization.py`, `training_args.py` `get_warmup_steps`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from ckptconv.catalog.schedule_rates import Curve
from ckptconv.dialects.torch_folder_parts import argument, scalars
from ckptconv.rawtree import DictNode, Node

_Number = int | float
_MOST_TICKS = 1 << 40


def curve_of_arguments(arguments: Node, max_steps: Node) -> Curve | None:
    """The curve that the Trainer of these arguments follows; None where it is none of the table's."""
    told = dict(scalars(arguments))
    kind, length = argument(told.get("lr_scheduler_type")), _count(told.get("max_steps")) or _count(max_steps)
    own = told.get("lr_scheduler_kwargs")
    options = {k: v for k, v in scalars(own) if isinstance(v, (int, float))}
    if isinstance(own, DictNode) and len(options) != len(own.items):
        return None
    if kind is None or length is None or kind not in _KINDS:
        return None
    warmup = 0 if kind == "constant" else _warmup(told, length)
    if warmup is None or warmup > length:
        return None
    main = _KINDS[kind](length - warmup, options)
    if main is None or not warmup:
        return main
    rise = Curve(family="linear", parameters={"start_factor": 0.0, "end_factor": 1.0, "length": warmup})
    if kind == "constant_with_warmup":
        return rise
    return Curve(family="sequential", parameters={"milestones": (warmup,)}, parts=(rise, main))


def _count(node: Node) -> int | None:
    whole = isinstance(node, int) and not isinstance(node, bool)
    return node if whole and isinstance(node, int) and 0 < node < _MOST_TICKS else None


def _warmup(told: Mapping[str, Node], length: int) -> int | None:
    steps, ratio = told.get("warmup_steps", 0), told.get("warmup_ratio", 0)
    if not isinstance(steps, (int, float)) or not 0 <= steps < _MOST_TICKS:
        return None
    if steps >= 1:
        return int(steps)
    share = steps or ratio or 0
    return math.ceil(length * share) if isinstance(share, (int, float)) and 0 <= share < 1 else None


def _flat(_length: int, options: Mapping[str, _Number]) -> Curve | None:
    return None if options else Curve(family="constant", parameters={"factor": 1.0, "length": 0})


def _line(length: int, options: Mapping[str, _Number]) -> Curve | None:
    if options or not length:
        return None
    return Curve(family="linear", parameters={"start_factor": 1.0, "end_factor": 0.0, "length": length})


def _cosine(length: int, options: Mapping[str, _Number]) -> Curve | None:
    if options.get("num_cycles", 0.5) != 0.5 or set(options) - {"num_cycles"} or not length:
        return None
    return Curve(family="cosine", parameters={"length": length, "minimum": 0.0, "after": "rebound"})


def _restarts(length: int, options: Mapping[str, _Number]) -> Curve | None:
    cycles = options.get("num_cycles", 1)
    if set(options) - {"num_cycles"} or cycles < 1 or not length or length % cycles:
        return None
    return Curve(
        family="cosine-restarts", parameters={"first": int(length // cycles), "growth": 1, "minimum": 0.0}
    )


def _polynomial(length: int, options: Mapping[str, _Number]) -> Curve | None:
    if set(options) - {"lr_end", "power"} or not length:
        return None
    end, power = options.get("lr_end", 1e-7), options.get("power", 1.0)
    return Curve(family="polynomial", parameters={"length": length, "end": end, "power": power})


_KINDS: Mapping[str, Callable[[int, Mapping[str, _Number]], Curve | None]] = {
    "linear": _line,
    "cosine": _cosine,
    "cosine_with_restarts": _restarts,
    "polynomial": _polynomial,
    "constant": _flat,
    "constant_with_warmup": _flat,
}
