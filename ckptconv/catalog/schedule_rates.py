"""The closed form of each schedule: the rate at an index in float64, and the state that torch keeps there.

A curve's rate depends on the base rate of the group, so one curve serves all groups. Where torch multiplies
its way from rate to rate the closed form is what it approximates, to 2e-14 after 1e5 ticks. Sources: the
`get_lr` and `_get_closed_form_lr` of torch 2.13's classes; `__call__` of those of keras 3.15.1.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from ckptconv.catalog.schedules import CUSTOM, UNKNOWN
from ckptconv.document import Known, Schedule, Value

TICK = "updates_per_tick"
"""Parameter of a schedule that counts the optimizer's updates and moves only every so many of them."""

_MOST_CYCLES = 10_000
"""A schedule that restarts more often than this before an index is none that anybody trains with."""


class NotExpressibleError(Exception):
    """Why a curve has no counterpart; for the message of the problem that the caller makes of it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    """A family with its parameters as plain values, free of the base rate and of where it stands."""

    family: str
    parameters: Mapping[str, Value] = field(default_factory=dict)
    parts: tuple[Curve, ...] = ()
    """Of `sequential` and `chained`."""

    @property
    def moves_momentum(self) -> bool:
        """Whether it moves the optimizer's momentum or beta_1 against its rate."""
        return bool(self.parameters.get("cycle_momentum"))

    def number(self, name: str, default: float | None = None) -> float:
        """A parameter as a float. Raises: KeyError, TypeError."""
        value = self.parameters[name] if default is None else self.parameters.get(name, default)
        if not isinstance(value, (int, float)):
            raise TypeError(name)
        return float(value)

    def numbers(self, name: str) -> tuple[float, ...]:
        """A parameter that is a sequence. Raises: KeyError, TypeError."""
        value = self.parameters[name]
        if not isinstance(value, tuple):
            raise TypeError(name)
        return tuple(float(part) for part in value if isinstance(part, (int, float)))


def curve_of(schedule: Schedule) -> Curve:
    """The curve of a document's schedule: `0.family`, `0.length` ... are those of its first part."""
    known = {name: fact.value for name, fact in schedule.parameters.items() if isinstance(fact, Known)}
    own = {name: value for name, value in known.items() if not name.partition(".")[0].isdigit()}
    parts: list[Curve] = []
    while f"{len(parts)}.family" in known:
        prefix = f"{len(parts)}."
        inner = {n.removeprefix(prefix): v for n, v in known.items() if n.startswith(prefix)}
        parts.append(Curve(family=str(inner.pop("family")), parameters=inner))
    return Curve(family=schedule.family, parameters=own, parts=tuple(parts))


def flat(curve: Curve) -> dict[str, Value]:
    """The parameters of a curve as a document has them."""
    result = dict(curve.parameters)
    for position, part in enumerate(curve.parts):
        result[f"{position}.family"] = part.family
        result.update({f"{position}.{name}": value for name, value in part.parameters.items()})
    return result


def rate(curve: Curve, base: float, index: int, named: Mapping[str, float] | None = None) -> float | None:
    """The learning rate at an index; None where the curve has no closed form, or none there.

    `named`: rates that a one-cycle schedule names, beside `initial_lr`: `max_lr` and `min_lr` of the group.
    """
    formula = _FORMULAS.get(curve.family)
    if formula is None or index < 0:
        return None
    try:
        index //= int(curve.number(TICK, 1.0))
        value = formula(curve, base, index, {"initial_lr": base, **(named or {})})
    except (KeyError, TypeError, ValueError, IndexError, ZeroDivisionError, OverflowError):
        return None
    return value if value is not None and math.isfinite(value) else None


_Named = Mapping[str, float]


def _constant(v: Curve, base: float, t: int, _: _Named) -> float:
    return base * (v.number("factor") if t < v.number("length") else 1.0)


def _linear(v: Curve, base: float, t: int, _: _Named) -> float:
    start, end, length = v.number("start_factor"), v.number("end_factor"), v.number("length")
    return base * (start + (end - start) * min(t, length) / length)


def _step(v: Curve, base: float, t: int, _: _Named) -> float:
    return base * math.pow(v.number("factor"), math.floor(t / v.number("interval")))


def _multi_step(v: Curve, base: float, t: int, _: _Named) -> float:
    return base * math.pow(v.number("factor"), bisect_right(sorted(v.numbers("milestones")), t))


def _exponential(v: Curve, base: float, t: int, _: _Named) -> float:
    return base * math.pow(v.number("factor"), t / v.number("interval", 1.0))


def _polynomial(v: Curve, base: float, t: int, _: _Named) -> float:
    length, end = v.number("length"), v.number("end", 0.0)
    if v.parameters.get("cycle"):
        length *= max(1, math.ceil(t / length))
    return end + (base - end) * math.pow(1.0 - min(t, length) / length, v.number("power"))


def _cosine(v: Curve, base: float, t: int, _: _Named) -> float:
    length, minimum = v.number("length"), v.number("minimum")
    done = min(t, length) if v.parameters.get("after") == "hold" else t
    return minimum + (base - minimum) * (1.0 + math.cos(math.pi * done / length)) / 2.0


def cycle_at(v: Curve, t: int) -> tuple[int, float, float]:
    """(restarts so far, ticks since the last one, ticks of this cycle). Raises: as `Curve.number`."""
    length, growth = v.number("first"), v.number("growth", 1.0)
    if length <= 0 or growth < 1:
        raise ValueError(length)
    if growth == 1:
        return int(t // length), t % length, length
    done, count = 0.0, 0
    while t - done >= length:
        done, length, count = done + length, length * growth, count + 1
        if count > _MOST_CYCLES:
            raise OverflowError(count)
    return count, t - done, length


def _cosine_restarts(v: Curve, base: float, t: int, _: _Named) -> float:
    count, since, length = cycle_at(v, t)
    minimum, height = v.number("minimum"), math.pow(v.number("shrink", 1.0), count)
    return minimum + (base - minimum) * height * (1.0 + math.cos(math.pi * since / length)) / 2.0


def _inverse_time(v: Curve, base: float, t: int, _: _Named) -> float:
    units = t / v.number("interval")
    return base / (1.0 + v.number("rate") * (math.floor(units) if v.parameters.get("staircase") else units))


def _piecewise(v: Curve, base: float, t: int, _: _Named) -> float:
    return base * v.numbers("factors")[bisect_left(v.numbers("boundaries"), t)]


def _table(v: Curve, base: float, t: int, _: _Named) -> float | None:
    factors, place = v.numbers("factors"), t - int(v.number("start"))
    return base * factors[place] if 0 <= place < len(factors) else None


ONE_CYCLE_MOMENTA = ("base_momentum", "max_momentum")
"""Where OneCycleLR's momentum is at the highest rate, and where at its ends."""

_OPPOSITE = {"initial_lr": "max_momentum", "max_lr": "base_momentum", "min_lr": "max_momentum"}
"""Rate that a phase of OneCycleLR goes from or to -> the momentum there."""


def rate_alone(curve: Curve) -> Curve:
    """The curve without the momentum that it moves."""
    if not curve.moves_momentum:
        return curve
    kept = {name: value for name, value in curve.parameters.items() if name != "beta_1_cycles"}
    return replace(curve, parameters={**kept, "cycle_momentum": False})


def momentum(curve: Curve, index: int, named: Mapping[str, float]) -> float | None:
    """The momentum, or beta_1, of the update at `index`; None where the curve does not tell one.

    `named`: both of `ONE_CYCLE_MOMENTA`.
    """
    if not curve.moves_momentum or any(name not in named for name in ONE_CYCLE_MOMENTA):
        return None
    return rate(curve, 0.0, index, {name: named[opposite] for name, opposite in _OPPOSITE.items()})


def _one_cycle(v: Curve, _base: float, t: int, named: _Named) -> float | None:
    if t > v.number("length"):
        return None
    begin, phase = 0.0, 0
    while f"phase.{phase + 1}.end" in v.parameters and t > v.number(f"phase.{phase}.end"):
        begin, phase = v.number(f"phase.{phase}.end"), phase + 1
    share = (t - begin) / (v.number(f"phase.{phase}.end") - begin)
    start = named[str(v.parameters[f"phase.{phase}.from"])]
    end = named[str(v.parameters[f"phase.{phase}.to"])]
    if v.parameters["anneal"] == "linear":
        return (end - start) * share + start
    return end + (start - end) / 2.0 * (math.cos(math.pi * share) + 1)


def part_at(curve: Curve, t: int) -> tuple[int, int]:
    """(which part of a sequence drives at an index, the index at which it began)."""
    begins = [0, *(int(m) for m in curve.numbers("milestones"))]
    place = bisect_right(begins[1:], t)
    return place, begins[place]


def _sequential(v: Curve, base: float, t: int, named: _Named) -> float | None:
    place, begin = part_at(v, t)
    return rate(v.parts[place], base, t - begin, named)


FACTORS_ALONE = frozenset(
    {
        "constant",
        "linear",
        "step",
        "multi-step",
        "exponential",
        "polynomial",
        "piecewise",
        "inverse-time",
    }
)
"""Families that multiply whatever the rate is: several at once multiply each other."""


def _chained(v: Curve, base: float, t: int, _: _Named) -> float | None:
    factor = 1.0
    for part in v.parts:
        within = (
            part.family == "cosine" and part.parameters.get("minimum") == 0 and t <= part.number("length")
        )
        one = rate(part, 1.0, t) if part.family in FACTORS_ALONE or within else None
        if one is None:
            return None
        factor *= one
    return base * factor if v.parts else None


_FORMULAS: Mapping[str, Callable[[Curve, float, int, _Named], float | None]] = {
    "constant": _constant,
    "linear": _linear,
    "step": _step,
    "multi-step": _multi_step,
    "exponential": _exponential,
    "polynomial": _polynomial,
    "cosine": _cosine,
    "cosine-restarts": _cosine_restarts,
    "inverse-time": _inverse_time,
    "piecewise": _piecewise,
    "lambda": _table,
    "cyclic": _table,
    "swa": _table,
    "one-cycle": _one_cycle,
    "sequential": _sequential,
    "chained": _chained,
}


TABLED = frozenset({UNKNOWN, CUSTOM, "lambda", "cyclic", "swa"})
"""Families that go by a table of their next rates, sampled from a live scheduler, or not at all."""


def state_at(
    schedule: Schedule, index: int, bases: Sequence[float | None], named: Sequence[Mapping[str, float]]
) -> dict[str, Value]:
    """What a torch scheduler keeps of where it stands, beside its position: parameter -> value at an index.

    Only parameters that the schedule has are answered. `bases`, `named`: per group, as for `rate`.
    Raises: NotExpressibleError where the parameters do not tell, or a part has parts of its own.
    """
    curve = curve_of(schedule)
    if any(part.family in (UNKNOWN, "sequential", "chained") for part in curve.parts):
        raise NotExpressibleError("it has a part whose own parts are not known")
    try:
        found = _state(curve, index, bases, named)
    except (KeyError, TypeError, ValueError, IndexError, ZeroDivisionError, OverflowError) as error:
        raise NotExpressibleError(f"the parameters of '{curve.family}' are not complete ({error})") from error
    return {name: value for name, value in found.items() if name in schedule.parameters}


def _state(
    curve: Curve, index: int, bases: Sequence[float | None], named: Sequence[Mapping[str, float]]
) -> dict[str, Value]:
    found = dict[str, Value]()
    if curve.family == "cosine-restarts":
        found.update(_cycle_state(curve, index, ""))
    for place, part in enumerate(curve.parts):
        local, seen = _part_at(curve, place, index)
        restarts = part.family == "cosine-restarts"
        found[f"{place}.position"] = local
        found[f"{place}.calls"] = 0 if restarts else max(local, 0) + 1
        if restarts:
            found.update(_cycle_state(part, max(local, 0), f"{place}."))
        for group, base in enumerate(bases):
            value = None
            if base is not None:
                value = _waiting(curve, place, base) if local < 0 else None
                value = value or _seen_by(curve, place, base, seen, named[group])
            if value is not None:
                found[f"{place}.last_rate.{group}"] = value
    return found


_SETS_THE_RATE = frozenset({"cosine-restarts"})
"""Families whose class gives its own rate when it is made, instead of changing the one that it finds."""


def _waiting(curve: Curve, place: int, base: float) -> float | None:
    """The rate of a part that has not begun: what it made of the ones before it when it was made."""
    value: float | None = base
    for part in curve.parts[: place + 1]:
        if part.family in _SETS_THE_RATE:
            value = rate(part, base, 0)
        elif part.family in FACTORS_ALONE and value is not None:
            factor = rate(part, 1.0, 0)
            value = None if factor is None else value * factor
    return value


def _seen_by(curve: Curve, place: int, base: float, index: int, named: _Named) -> float | None:
    """The rate after a part's last step: the later parts of a chain have not stepped yet."""
    if curve.family != "chained":
        return rate(curve, base, index, named)
    done = rate(Curve(family="chained", parts=curve.parts[: place + 1]), base, index)
    later = curve.parts[place + 1 :]
    if index == 0 or not later or done is None:
        return done
    return rate(Curve(family="chained", parts=later), done, index - 1)


def _part_at(curve: Curve, place: int, index: int) -> tuple[int, int]:
    """(where a part stands, the index of the whole at which it was last asked)."""
    if curve.family != "sequential":
        return index, index
    begins = [0, *(int(m) for m in curve.numbers("milestones"))]
    now, begin = part_at(curve, index)
    if place < now:
        return begins[place + 1] - 1 - begins[place], begins[place + 1] - 1
    return (index - begin, index) if place == now else (-1, 0)


def _cycle_state(curve: Curve, index: int, prefix: str) -> dict[str, Value]:
    _, since, length = cycle_at(curve, index)
    whole = (int(n) if float(n).is_integer() else n for n in (since, length))
    return dict(zip((f"{prefix}since_restart", f"{prefix}cycle"), whole, strict=True))


def is_known(curve: Curve) -> bool:
    """Whether the curve says more than that there is one."""
    return curve.family not in (UNKNOWN, CUSTOM)
