"""One curve in the terms of several families: what a torch scheduler of another class takes over.

piecewise      -> multi-step   where the rates are a geometric series; milestones = boundaries + 1
polynomial     -> linear       power 1, its ends as factors of the higher one
polynomial     -> polynomial   end 0 and no cycle: torch's class has neither
exponential    -> exponential  factor ** (1 / interval), as torch's counts single ticks
sequential     -> sequential   part by part, the parts of the template's classes and all of one base rate
chained        -> chained      part by part, the parts factors of the rate 1
anything known -> lambda       torch's file holds no function; the code has to say it
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise

from ckptconv.catalog.schedule_rates import Curve, NotExpressibleError, flat
from ckptconv.catalog.schedule_source import is_state
from ckptconv.document import Fact, Known, Schedule, Value, value_of

_ALIKE = 1e-6
"""Relative difference within which rates that came through float32 are one series."""


def as_family(curve: Curve, base: float, family: str, parts: Sequence[str] = ()) -> tuple[Curve, float]:
    """The curve in the terms of a torch class of that family, and the base rate to go with it.

    `parts`: the families of the class's parts. Raises: NotExpressibleError.
    """
    change = _CHANGES.get((curve.family, family))
    if change is None and curve.family != family:
        raise NotExpressibleError(f"the source's schedule is '{curve.family}', the template's '{family}'")
    if curve.parts:
        return _part_by_part(curve, base, parts), base
    try:
        made = change(curve, base) if change is not None else (curve, base)
    except (KeyError, TypeError, ValueError, IndexError, ZeroDivisionError, OverflowError) as error:
        raise NotExpressibleError(f"the parameters of '{curve.family}' are not complete ({error})") from error
    if made is None:
        raise NotExpressibleError(f"this '{curve.family}' is not one of the rates that '{family}' can have")
    return made


def _part_by_part(curve: Curve, base: float, families: Sequence[str]) -> Curve:
    """The curve whose parts are of these families. Raises: NotExpressibleError."""
    mine = [part.family for part in curve.parts]
    if len(mine) != len(families):
        raise NotExpressibleError(f"its parts are {mine}, the template's {list(families)}")
    own = 1.0 if curve.family == "chained" else base
    parts = []
    for part, family in zip(curve.parts, families, strict=True):
        if curve.family == "chained" and (family == "lambda" or part.parameters.get("minimum")):
            raise NotExpressibleError(f"torch's '{family}' sets the rate: in a chain it is no factor")
        made, root = as_family(part, own, family)
        parts.append(rebased(made, root, own))
    return replace(curve, parts=tuple(parts))


def rebased(curve: Curve, base: float, to: float) -> Curve:
    """The curve that has over another base rate the rates that this one has over its own.

    Raises: NotExpressibleError where the family's rates have no factor of their own.
    """
    if math.isclose(base, to, rel_tol=_ALIKE):
        return curve
    if curve.family == "polynomial" and (line := _line(curve, base)) is not None:
        curve, base = line
    names = _FACTORS.get(curve.family)
    if names is None or to == 0:
        raise NotExpressibleError(f"a '{curve.family}' begins at {base}, the whole at {to}")
    changed = {name: _times(curve.parameters[name], base / to) for name in names}
    return replace(curve, parameters={**curve.parameters, **changed})


_FACTORS: Mapping[str, tuple[str, ...]] = {
    "linear": ("start_factor", "end_factor"),
    "piecewise": ("factors",),
    "lambda": ("factors",),
}
"""Parameters by which a family multiplies its base rate everywhere."""


def _times(value: Value, by: float) -> Value:
    if isinstance(value, tuple):
        return tuple(float(part) * by for part in value if isinstance(part, (int, float)))
    return float(value) * by if isinstance(value, (int, float)) else value


_Made = tuple[Curve, float] | None


def _geometric(v: Curve, base: float) -> _Made:
    factors, boundaries = v.numbers("factors"), v.numbers("boundaries")
    ratios = [b / a for a, b in pairwise(factors)]
    if not ratios or any(not math.isclose(r, ratios[0], rel_tol=_ALIKE) for r in ratios):
        return None
    if not all(b.is_integer() for b in boundaries):
        return None
    milestones = tuple(int(b) + 1 for b in boundaries)
    steps = Curve(family="multi-step", parameters={"milestones": milestones, "factor": ratios[0]})
    return steps, base * factors[0]


def _until(v: Curve, base: float) -> _Made:
    factors, boundaries = v.numbers("factors"), v.numbers("boundaries")
    if len(boundaries) != 1 or not boundaries[0].is_integer():
        return None
    last = base * factors[1]
    parameters = {"factor": factors[0] / factors[1], "length": int(boundaries[0]) + 1}
    return Curve(family="constant", parameters=parameters), last


def _line(v: Curve, base: float) -> _Made:
    end = v.number("end", 0.0)
    if v.number("power") != 1 or v.parameters.get("cycle"):
        return None
    top = max(base, end)
    parameters = {"start_factor": base / top, "end_factor": end / top, "length": v.parameters["length"]}
    return Curve(family="linear", parameters=parameters), top


def _to_zero(v: Curve, base: float) -> _Made:
    if v.number("end", 0.0) != 0 or v.parameters.get("cycle"):
        return None
    return Curve(family="polynomial", parameters={n: v.parameters[n] for n in ("length", "power")}), base


def _of_line(v: Curve, base: float) -> _Made:
    if v.number("start_factor") != 1 or v.number("end_factor") != 0:
        return None
    return Curve(family="polynomial", parameters={"length": v.parameters["length"], "power": 1.0}), base


def _tick_by_tick(v: Curve, base: float) -> _Made:
    factor = math.pow(v.number("factor"), 1.0 / v.number("interval", 1.0))
    return Curve(family="exponential", parameters={"factor": factor}), base


def _whole_steps(v: Curve, base: float) -> _Made:
    return (v, base) if v.number("interval").is_integer() else None


def _plain_restarts(v: Curve, base: float) -> _Made:
    if v.number("shrink", 1.0) != 1 or not v.number("growth", 1.0).is_integer():
        return None
    parameters = {name: v.parameters[name] for name in ("first", "minimum")}
    return replace(v, parameters={**parameters, "growth": int(v.number("growth", 1.0))}), base


_CHANGES: Mapping[tuple[str, str], Callable[[Curve, float], _Made]] = {
    ("piecewise", "multi-step"): _geometric,
    ("piecewise", "constant"): _until,
    ("polynomial", "linear"): _line,
    ("polynomial", "polynomial"): _to_zero,
    ("linear", "polynomial"): _of_line,
    ("exponential", "exponential"): _tick_by_tick,
    ("step", "step"): _whole_steps,
    ("cosine-restarts", "cosine-restarts"): _plain_restarts,
}


def scaled(curve: Curve, scale: float) -> Curve:
    """The curve of rates that are all multiplied: those of its parameters that are rates themselves."""
    if scale == 1:
        return curve
    parameters = {
        name: value * scale if name in ("minimum", "end") and isinstance(value, (int, float)) else value
        for name, value in curve.parameters.items()
    }
    return replace(curve, parameters=parameters, parts=tuple(scaled(part, scale) for part in curve.parts))


def held(curve: Curve) -> Curve:
    """The curve with every cosine staying at its minimum, which is what a Keras schedule made of it does."""
    parameters = dict(curve.parameters)
    if curve.family == "cosine":
        parameters["after"] = "hold"
    return replace(curve, parameters=parameters, parts=tuple(held(part) for part in curve.parts))


def facts_of(curve: Curve, origin: Schedule) -> dict[str, Fact]:
    """A curve's parameters as facts: the source's own where they are unchanged."""
    facts: dict[str, Fact] = {}
    for name, value in flat(curve).items():
        own = origin.parameters.get(name)
        if is_state(name):
            continue
        same = isinstance(own, Known) and own.value == value
        facts[name] = (
            own if same and own is not None else Known(value=value, status="derived", source=origin.name)
        )
    return facts


def into(target: Schedule, curve: Curve, origin: Schedule) -> dict[str, Fact]:
    """The template's parameters with the values of a curve. Raises: NotExpressibleError."""
    made = flat(curve)
    facts = dict(target.parameters)
    for name, fact in target.parameters.items():
        if is_state(name) or name.rpartition(".")[2] == "after":
            continue
        if name.rpartition(".")[2] == "family" and made.get(name) != value_of(fact):
            raise NotExpressibleError(
                f"its parts are others than the template's ({made.get(name)}, {value_of(fact)})"
            )
        if name not in made:
            raise NotExpressibleError(
                f"the template's '{target.family}' has a {name} that the source does not tell"
            )
        own = origin.parameters.get(name)
        same = isinstance(own, Known) and own.value == made[name]
        facts[name] = (
            own if same and own is not None else Known(value=made[name], status="derived", source=origin.name)
        )
    extra = [n for n in made if n not in facts and n.rpartition(".")[2] not in ("after", "start", "interval")]
    if extra:
        raise NotExpressibleError(f"the template's '{target.family}' has no {extra[0]}")
    return facts


def check_ends(curve: Curve, index: int) -> str:
    """Where torch's class stops going on as the curve does; empty where it never does.

    Raises: NotExpressibleError where it does not even from `index` on.
    """
    remark = ""
    for part, local in _running(curve, index):
        held = part.parameters.get("after") == "hold"
        if part.family == "cosine" and held and local > part.number("length"):
            raise NotExpressibleError(
                f"it stands {local} ticks on, beyond its minimum at {part.parameters['length']}: "
                "torch's climbs again"
            )
        if part.family == "cosine" and held:
            end = part.number("length") + index - local
            remark = f"the same up to tick {end:g}; then torch's rate climbs again, the source's stays"
        if part.family == "linear" and part.parameters.get("start_factor") == 0 and local <= 0:
            raise NotExpressibleError("torch's LinearLR divides by its start_factor, which is 0")
    return remark


def _running(curve: Curve, index: int) -> list[tuple[Curve, int]]:
    """The parts with the index at which each stands, or is going to start."""
    if curve.family != "sequential":
        return [(curve, index), *((part, index) for part in curve.parts)]
    begins = [0, *(int(m) for m in curve.numbers("milestones"))]
    ends = [*begins[1:], index + 1]
    return [
        (part, index - begin)
        for part, begin, end in zip(curve.parts, begins, ends, strict=True)
        if index < end
    ]


def lambda_code(curve: Curve, base: float) -> str:
    """The function for a LambdaLR with the rates of a curve over its base. Raises: NotExpressibleError."""
    write = _LAMBDAS.get(curve.family)
    if write is None:
        raise NotExpressibleError(f"'{curve.family}' has no short form as a function")
    try:
        return f"lambda t: {write(curve, base)}"
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise NotExpressibleError(f"the parameters of '{curve.family}' are not complete ({error})") from error


def _inverse_time(v: Curve, _: float) -> str:
    interval = v.parameters["interval"]
    units = f"(t // {interval!r})" if v.parameters.get("staircase") else f"t / {interval!r}"
    return f"1 / (1 + {v.number('rate')!r} * {units})"


def _piecewise(v: Curve, _: float) -> str:
    boundaries = list(v.numbers("boundaries"))
    return f"{list(v.numbers('factors'))!r}[bisect.bisect_left({boundaries!r}, t)]"


def _polynomial(v: Curve, base: float) -> str:
    if v.parameters.get("cycle"):
        raise ValueError("cycle")
    length, end = v.parameters["length"], v.number("end", 0.0) / base
    return f"{end!r} + {1 - end!r} * (1 - min(t, {length!r}) / {length!r}) ** {v.number('power')!r}"


def _table(v: Curve, _: float) -> str:
    factors, start = list(v.numbers("factors")), int(v.number("start"))
    return f"{factors!r}[min(max(t - {start}, 0), {len(factors) - 1})]"


_LAMBDAS: Mapping[str, Callable[[Curve, float], str]] = {
    "lambda": _table,
    "inverse-time": _inverse_time,
    "piecewise": _piecewise,
    "polynomial": _polynomial,
    "step": lambda v, _: f"{v.number('factor')!r} ** (t // {v.number('interval')!r})",
    "exponential": lambda v, _: f"{v.number('factor')!r} ** (t / {v.number('interval', 1.0)!r})",
}
