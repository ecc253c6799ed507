"""What a Keras optimizer's configuration says of its schedule, as a curve.

Keras' own classes, and those of `ckptconv.keras`, which are registered as `ckptconv>Name`. Source:
`get_config` of keras 3.15.1 its schedules; tf_keras 2.21.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from ckptconv.catalog.schedule_forms import rebased
from ckptconv.catalog.schedule_keras import whole
from ckptconv.catalog.schedule_rates import ONE_CYCLE_MOMENTA, TICK, Curve, NotExpressibleError
from ckptconv.document import Value


@dataclass(frozen=True, slots=True, kw_only=True)
class Declared:
    """A schedule as a live Keras optimizer's configuration says it."""

    curve: Curve
    base: float
    named: Mapping[str, float] = field(default_factory=dict)
    """Rates and momenta that the curve names, beside its base."""


def from_keras_config(config: object) -> Declared | None:
    """The curve of `optimizer.get_config()["learning_rate"]`; None for a number or a class of one's own.

    Both generations write `{"class_name": ..., "config": {...}}`.
    """
    if not isinstance(config, Mapping):
        return None
    registered = str(config.get("registered_name"))
    name = registered if registered.startswith(_OURS) else str(config.get("class_name"))
    inner, read = config.get("config"), _READERS.get(name)
    if read is None or not isinstance(inner, Mapping):
        return None
    try:
        return read({str(name): value for name, value in inner.items()})
    except (LookupError, TypeError, ValueError, ArithmeticError, NotExpressibleError):
        return None


_OURS = "ckptconv>"
"""What Keras puts before the names of the classes of `ckptconv.keras`."""

_Config = dict[str, Value]


def _float(config: _Config, name: str, default: float | None = None) -> float:
    value = config[name] if default is None else config.get(name, default)
    return float(value)  # type: ignore[arg-type]  # of anything that is no number: TypeError, which the caller expects


def _of(family: str, base: float, **parameters: Value) -> Declared:
    facts = {
        name: int(v) if isinstance(v, float) and name in _TICKS and v.is_integer() else v
        for name, v in parameters.items()
    }
    return Declared(curve=Curve(family=family, parameters=facts), base=base)


_TICKS = frozenset({"length", "interval", "first", "growth"})
"""Parameters that torch has as whole numbers."""


def _read_exponential(c: _Config) -> Declared:
    base, steps, factor = (_float(c, n) for n in ("initial_learning_rate", "decay_steps", "decay_rate"))
    if c.get("staircase"):
        return _of("step", base, interval=steps, factor=factor)
    return _of("exponential", base, interval=steps, factor=factor)


def _read_piecewise(c: _Config) -> Declared:
    ends, rates = _floats(c, "boundaries"), _floats(c, "values")
    factors = tuple(rate / rates[0] for rate in rates)
    return _of("piecewise", rates[0], boundaries=tuple(whole(end) for end in ends), factors=factors)


def _floats(config: _Config, name: str) -> list[float]:
    values: object = config[name]
    if not isinstance(values, (list, tuple)) or not values:
        raise TypeError(name)
    return [float(value) for value in values]


def _read_polynomial(c: _Config) -> Declared:
    return _of(
        "polynomial",
        _float(c, "initial_learning_rate"),
        length=_float(c, "decay_steps"),
        end=_float(c, "end_learning_rate", 0.0001),
        power=_float(c, "power", 1.0),
        cycle=bool(c.get("cycle", False)),
    )


def _read_cosine(c: _Config) -> Declared:
    base, warm = _float(c, "initial_learning_rate"), c.get("warmup_target")
    length, alpha = _float(c, "decay_steps"), _float(c, "alpha", 0.0)
    if warm is None:
        return _of("cosine", base, length=length, minimum=alpha * base, after="hold")
    target, steps = _float(c, "warmup_target"), _float(c, "warmup_steps", 0)
    cosine = _of("cosine", target, length=length, minimum=alpha * target, after="hold")
    if steps == 0:
        return cosine
    line = _of("linear", target, start_factor=base / target, end_factor=1.0, length=steps)
    return Declared(
        curve=Curve(
            family="sequential",
            parameters={"milestones": (int(steps),)},
            parts=(line.curve, cosine.curve),
        ),
        base=target,
    )


def _read_restarts(c: _Config) -> Declared:
    base = _float(c, "initial_learning_rate")
    return _of(
        "cosine-restarts",
        base,
        first=_float(c, "first_decay_steps"),
        growth=_float(c, "t_mul", 2.0),
        shrink=_float(c, "m_mul", 1.0),
        minimum=_float(c, "alpha", 0.0) * base,
    )


def _read_inverse_time(c: _Config) -> Declared:
    return _of(
        "inverse-time",
        _float(c, "initial_learning_rate"),
        interval=_float(c, "decay_steps"),
        rate=_float(c, "decay_rate"),
        staircase=bool(c.get("staircase", False)),
    )


def _parts(config: _Config) -> list[Declared]:
    parts: object = config["parts"]
    if not isinstance(parts, (list, tuple)) or not parts:
        raise TypeError("parts")
    read = [from_keras_config(part) for part in parts]
    found = [
        one for one in read if one is not None and not one.curve.parts and TICK not in one.curve.parameters
    ]
    if len(found) != len(parts) or any(one.named for one in found):
        raise ValueError("parts")
    return found


def _read_sequential(c: _Config) -> Declared:
    parts = _parts(c)
    milestones = tuple(int(end) for end in _floats(c, "milestones"))
    if len(milestones) != len(parts) - 1:
        raise ValueError("milestones")
    failed: Exception | None = None
    for base in dict.fromkeys(part.base for part in parts):
        try:
            curves = tuple(rebased(part.curve, part.base, base) for part in parts)
        except NotExpressibleError as error:
            failed = error
            continue
        curve = Curve(family="sequential", parameters={"milestones": milestones}, parts=curves)
        return Declared(curve=curve, base=base)
    raise failed or ValueError("parts")


def _read_chained(c: _Config) -> Declared:
    curves = tuple(rebased(part.curve, part.base, 1.0) for part in _parts(c))
    return Declared(curve=Curve(family="chained", parts=curves), base=_float(c, "base"))


def _read_table(c: _Config) -> Declared:
    rates, start = _floats(c, "rates"), int(_float(c, "start", 0))
    base = max(rates, key=abs)
    curve = Curve(family="lambda", parameters={"factors": tuple(r / base for r in rates), "start": start})
    return Declared(curve=curve, base=base)


def _read_one_cycle(c: _Config) -> Declared:
    phases: object = c["phases"]
    if not isinstance(phases, (list, tuple)) or not phases:
        raise TypeError("phases")
    rows = [[float(number) for number in phase] for phase in phases]
    rates = {"initial_lr": rows[0][1], "max_lr": rows[0][2], "min_lr": rows[-1][2]}
    parameters: dict[str, Value] = {"length": whole(_float(c, "length")), "anneal": str(c["anneal"])}
    for place, (end, first, last) in enumerate(rows):
        parameters[f"phase.{place}.end"] = end
        for which, rate in (("from", first), ("to", last)):
            (parameters[f"phase.{place}.{which}"], *_) = [n for n, value in rates.items() if value == rate]
    moves = c.get("momentum") is not None
    momenta = dict(zip(ONE_CYCLE_MOMENTA, _floats(c, "momentum"), strict=True)) if moves else {}
    curve = Curve(family="one-cycle", parameters={**parameters, "cycle_momentum": moves})
    return Declared(curve=curve, base=rates.pop("initial_lr"), named={**rates, **momenta})


def _read_epochs(c: _Config) -> Declared:
    inner = from_keras_config(c["schedule"])
    if inner is None or TICK in inner.curve.parameters:
        raise ValueError("schedule")
    ticks = int(_float(c, "steps_per_epoch"))
    if ticks < 1:
        raise ValueError(ticks)
    return replace(inner, curve=replace(inner.curve, parameters={**inner.curve.parameters, TICK: ticks}))


_READERS: Mapping[str, Callable[[_Config], Declared]] = {
    "ExponentialDecay": _read_exponential,
    "PiecewiseConstantDecay": _read_piecewise,
    "PolynomialDecay": _read_polynomial,
    "CosineDecay": _read_cosine,
    "CosineDecayRestarts": _read_restarts,
    "InverseTimeDecay": _read_inverse_time,
    f"{_OURS}Sequential": _read_sequential,
    f"{_OURS}Chained": _read_chained,
    f"{_OURS}Table": _read_table,
    f"{_OURS}OneCycle": _read_one_cycle,
    f"{_OURS}Epochs": _read_epochs,
}
