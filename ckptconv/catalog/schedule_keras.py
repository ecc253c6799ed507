"""A curve as the Keras schedule that follows it: its constructor as text, and as Keras serializes it.

A TensorFlow checkpoint holds no schedule, only the counter that it follows: the target's code must say it. A
`.keras` file holds the constructor. Keras computes in float32 and, in `PiecewiseConstantDecay`, changes the
rate after a boundary where torch changes it at a milestone. Source: keras 3.15.1
`keras/src/optimizers/schedules/learning_rate_schedule.py`; tf_keras 2.21, the same rules.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from ckptconv.catalog.schedule_rates import ONE_CYCLE_MOMENTA, TICK, Curve, NotExpressibleError, part_at, rate
from ckptconv.document import Value

HELPERS: Mapping[str, str] = {
    "Sequential": "sequential",
    "Chained": "chained",
    "Table": "table",
    "OneCycle": "one_cycle",
    "Epochs": "epochs",
}
"""Class that is registered with Keras under `ckptconv>` -> the function of `ckptconv.keras` for it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """A schedule and its arguments: plain values, and other schedules."""

    name: str
    """Keras' class, or one of `HELPERS`."""
    arguments: Mapping[str, object]

    def text(self, package: str, precise: bool = False) -> str:
        """The expression of the target's code. `package`: `keras` or `tf_keras`.

        `precise`: in float64, which Keras computes in where its first rate is one of numpy's.
        """
        inner = []
        for key, value in self.arguments.items():
            wrap = precise and self.name not in HELPERS and key in _FIRST
            inner.append(f"{key}={_text(value, package, precise, _FLOAT64 if wrap else '{}')}")
        if self.name not in HELPERS:
            return f"{package}.optimizers.schedules.{self.name}({', '.join(inner)})"
        more = [] if package == "keras" else [f"package={package!r}"]
        return f"ckptconv.keras.{HELPERS[self.name]}({', '.join([*inner, *more])})"

    def config(self) -> dict[str, object]:
        """What Keras 3 serializes it to, and makes it of."""
        ours = self.name in HELPERS
        return {
            "module": "ckptconv.keras" if ours else "keras.optimizers.schedules",
            "class_name": self.name,
            "config": {key: _serialized(value) for key, value in self.arguments.items()},
            "registered_name": f"ckptconv>{self.name}" if ours else None,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Code:
    """What the target's code must say."""

    call: Call
    remark: str = ""
    """Where it stops being the same."""


def keras_code(curve: Curve, base: float, index: int, named: Mapping[str, float] | None = None) -> Code:
    """The Keras schedule with the rates of a curve from `index` on. Raises: NotExpressibleError.

    `named`: see `schedule_rates.rate`.
    """
    write = _WRITERS.get(curve.family)
    if write is None:
        raise NotExpressibleError(f"Keras has no counterpart of '{curve.family}'")
    if TICK in curve.parameters:
        return _by_the_tick(curve, base, index, named)
    try:
        code = write(curve, _Place(base, index, named or {}))
    except (KeyError, TypeError, ValueError, IndexError, ZeroDivisionError, OverflowError) as error:
        raise NotExpressibleError(f"the parameters of '{curve.family}' are not complete ({error})") from error
    if rate(curve, base, index, named) is None:
        raise NotExpressibleError(f"the parameters of '{curve.family}' make no rate at {index}")
    return code


def _by_the_tick(curve: Curve, base: float, index: int, named: Mapping[str, float] | None) -> Code:
    """A schedule whose ticks are several updates long."""
    ticks = int(curve.number(TICK))
    inner = replace(curve, parameters={n: v for n, v in curve.parameters.items() if n != TICK})
    _rate_alone(inner)
    stretch = _STRETCHED.get(curve.family)
    if stretch is not None:
        return keras_code(replace(inner, parameters=stretch(inner, ticks)), base, index, named)
    code = keras_code(inner, base, index // ticks, named)
    arguments = {"schedule": code.call, "steps_per_epoch": ticks}
    return Code(call=Call(name="Epochs", arguments=arguments), remark=code.remark.replace("update", "epoch"))


_STRETCHED: Mapping[str, Callable[[Curve, int], dict[str, Value]]] = {
    "step": lambda v, ticks: {**v.parameters, "interval": whole(v.number("interval") * ticks)},
    "multi-step": lambda v, ticks: {
        **v.parameters,
        "milestones": tuple(int(m) * ticks for m in v.numbers("milestones")),
    },
    "constant": lambda v, ticks: {**v.parameters, "length": whole(v.number("length") * ticks)},
    "piecewise": lambda v, ticks: {
        **v.parameters,
        "boundaries": tuple(whole((end + 1) * ticks - 1) for end in v.numbers("boundaries")),
    },
}
"""Families that change between ticks only: their parameters in updates."""


@dataclass(frozen=True, slots=True)
class _Place:
    """What a curve itself does not say."""

    base: float
    index: int
    named: Mapping[str, float] = field(default_factory=dict)

    def call(self, name: str, **arguments: object) -> Call:
        return Call(name=name, arguments=arguments)


_FIRST = frozenset({"initial_learning_rate", "values"})
"""Arguments whose type is the one that a schedule of Keras computes in."""

_FLOAT64 = "numpy.float64({})"


def _text(value: object, package: str, precise: bool, form: str) -> str:
    if isinstance(value, Call):
        return value.text(package, precise)
    if isinstance(value, list):
        return "[" + ", ".join(_text(part, package, precise, form) for part in value) + "]"
    return form.format(repr(value))


def _serialized(value: object) -> object:
    if isinstance(value, Call):
        return value.config()
    return [_serialized(part) for part in value] if isinstance(value, list) else value


def whole(value: float) -> float:
    """Ticks as an int where they are whole."""
    return int(value) if float(value).is_integer() else value


def _step(v: Curve, at: _Place) -> Code:
    return Code(
        call=at.call(
            "ExponentialDecay",
            initial_learning_rate=at.base,
            decay_steps=whole(v.number("interval")),
            decay_rate=v.number("factor"),
            staircase=True,
        )
    )


def _exponential(v: Curve, at: _Place) -> Code:
    return Code(
        call=at.call(
            "ExponentialDecay",
            initial_learning_rate=at.base,
            decay_steps=whole(v.number("interval", 1.0)),
            decay_rate=v.number("factor"),
        )
    )


def _piecewise(boundaries: Sequence[float], values: Sequence[float], at: _Place) -> Code:
    if not boundaries:
        boundaries, values = [0], [values[0], values[0]]
    ends = [whole(b) for b in boundaries]
    return Code(call=at.call("PiecewiseConstantDecay", boundaries=ends, values=list(values)))


def _multi_step(v: Curve, at: _Place) -> Code:
    milestones = sorted(v.numbers("milestones"))
    values = [at.base * v.number("factor") ** passed for passed in range(len(milestones) + 1)]
    ends = [m - 1 for m in milestones]
    distinct = [i for i, end in enumerate(ends) if i + 1 == len(ends) or ends[i + 1] != end]
    return _piecewise([ends[i] for i in distinct], [values[0], *(values[i + 1] for i in distinct)], at)


def _constant(v: Curve, at: _Place) -> Code:
    return _piecewise([v.number("length") - 1], [at.base * v.number("factor"), at.base], at)


def _stretches(v: Curve, at: _Place) -> Code:
    return _piecewise(v.numbers("boundaries"), [at.base * factor for factor in v.numbers("factors")], at)


def _linear(v: Curve, at: _Place) -> Code:
    return Code(
        call=at.call(
            "PolynomialDecay",
            initial_learning_rate=at.base * v.number("start_factor"),
            decay_steps=whole(v.number("length")),
            end_learning_rate=at.base * v.number("end_factor"),
            power=1.0,
        )
    )


def _polynomial(v: Curve, at: _Place) -> Code:
    return Code(
        call=at.call(
            "PolynomialDecay",
            initial_learning_rate=at.base,
            decay_steps=whole(v.number("length")),
            end_learning_rate=v.number("end", 0.0),
            power=v.number("power"),
            **({"cycle": True} if v.parameters.get("cycle") else {}),
        )
    )


def _climb(v: Curve, begin: int, index: int) -> str:
    """The remark on a cosine that torch lets climb again. Raises: NotExpressibleError beyond its minimum."""
    if v.parameters.get("after") == "hold":
        return ""
    end = begin + v.number("length")
    if index > end:
        raise NotExpressibleError(
            f"it stands at {index}, beyond its minimum at {whole(end)}: torch climbs, Keras stays"
        )
    return (
        f"the same up to update {whole(end)}; then torch's rate climbs again, this one stays at its minimum"
    )


def _alpha(v: Curve, base: float) -> float:
    return v.number("minimum") / base if v.number("minimum") else 0.0


def _cosine(v: Curve, at: _Place) -> Code:
    return Code(
        call=at.call(
            "CosineDecay",
            initial_learning_rate=at.base,
            decay_steps=whole(v.number("length")),
            alpha=_alpha(v, at.base),
        ),
        remark=_climb(v, 0, at.index),
    )


def _restarts(v: Curve, at: _Place) -> Code:
    growth = v.number("growth", 1.0)
    remark = "" if growth == 1 else "Keras may find a restart one update late: its logarithm is float32"
    return Code(
        call=at.call(
            "CosineDecayRestarts",
            initial_learning_rate=at.base,
            first_decay_steps=whole(v.number("first")),
            t_mul=growth,
            m_mul=v.number("shrink", 1.0),
            alpha=_alpha(v, at.base),
        ),
        remark=remark,
    )


def _inverse_time(v: Curve, at: _Place) -> Code:
    return Code(
        call=at.call(
            "InverseTimeDecay",
            initial_learning_rate=at.base,
            decay_steps=whole(v.number("interval")),
            decay_rate=v.number("rate"),
            **({"staircase": True} if v.parameters.get("staircase") else {}),
        )
    )


def _warm_up(v: Curve, at: _Place) -> Code | None:
    """A line up to the base rate, and a cosine from there: one class in Keras."""
    milestones = v.numbers("milestones")
    if [part.family for part in v.parts] != ["linear", "cosine"]:
        return None
    line, cosine = v.parts
    if line.number("end_factor") != 1 or line.number("length") != milestones[0]:
        return None
    return Code(
        call=at.call(
            "CosineDecay",
            initial_learning_rate=at.base * line.number("start_factor"),
            decay_steps=whole(cosine.number("length")),
            alpha=_alpha(cosine, at.base),
            warmup_target=at.base,
            warmup_steps=whole(milestones[0]),
        ),
        remark=_climb(cosine, int(milestones[0]), at.index),
    )


def _sequential(v: Curve, at: _Place) -> Code:
    known = _warm_up(v, at)
    if known is not None:
        return known
    begins = [0, *(int(m) for m in v.numbers("milestones"))]
    _rate_alone(*v.parts)
    now, _ = part_at(v, at.index)
    codes = [
        keras_code(part, at.base, max(at.index - begin, 0) if place == now else 0, at.named)
        for place, (part, begin) in enumerate(zip(v.parts, begins, strict=True))
    ]
    remarks = [f"part {place}: {code.remark}" for place, code in enumerate(codes) if code.remark]
    return Code(
        call=at.call("Sequential", parts=[code.call for code in codes], milestones=begins[1:]),
        remark="; ".join(remarks),
    )


def _chained(v: Curve, at: _Place) -> Code:
    for part in v.parts:
        if part.family == "cosine" and part.number("minimum") != 0:
            raise NotExpressibleError(
                "a chained cosine with a minimum adds to the rate instead of multiplying it"
            )
    codes = [keras_code(part, 1.0, at.index) for part in v.parts]
    remarks = [code.remark for code in codes if code.remark]
    call = at.call("Chained", base=at.base, parts=[code.call for code in codes])
    return Code(call=call, remark="; ".join(remarks))


def _one_cycle(v: Curve, at: _Place) -> Code:
    names = {"initial_lr": at.base, **at.named}
    phases: list[object] = []
    while f"phase.{len(phases)}.end" in v.parameters:
        name = f"phase.{len(phases)}."
        ends = [names[str(v.parameters[name + which])] for which in ("from", "to")]
        phases.append([v.number(name + "end"), *ends])
    length = whole(v.number("length"))
    cycled = {"momentum": [names[name] for name in ONE_CYCLE_MOMENTA]} if v.moves_momentum else {}
    return Code(
        call=at.call("OneCycle", length=length, phases=phases, anneal=str(v.parameters["anneal"]), **cycled),
        remark=f"torch stops with an error after {length} updates, this one stays at its last rate",
    )


def _rate_alone(*curves: Curve) -> None:
    """Raises: NotExpressibleError where one moves a momentum, which goes by the optimizer's counter alone."""
    if any(curve.moves_momentum for curve in curves):
        raise NotExpressibleError(
            "cycle_momentum=True moves momentum or beta_1, which Keras can only with every update of a "
            "OneCycleLR that is the whole schedule"
        )


def _table(v: Curve, at: _Place) -> Code:
    if "factors" not in v.parameters:
        raise NotExpressibleError(
            "the file does not hold the function; describe or capture the live scheduler with remaining=N"
        )
    factors, start = v.numbers("factors"), int(v.number("start"))
    if not start <= at.index < start + len(factors):
        raise NotExpressibleError(
            f"it stands at {at.index}, its table has {start}..{start + len(factors) - 1}"
        )
    end = start + len(factors) - 1
    return Code(
        call=at.call("Table", rates=[at.base * factor for factor in factors], start=start),
        remark=f"the table ends with update {end}; its last rate stays",
    )


_WRITERS: Mapping[str, Callable[[Curve, _Place], Code]] = {
    "step": _step,
    "multi-step": _multi_step,
    "exponential": _exponential,
    "constant": _constant,
    "linear": _linear,
    "polynomial": _polynomial,
    "cosine": _cosine,
    "cosine-restarts": _restarts,
    "inverse-time": _inverse_time,
    "piecewise": _stretches,
    "sequential": _sequential,
    "chained": _chained,
    "one-cycle": _one_cycle,
    "lambda": _table,
    "cyclic": _table,
    "swa": _table,
}
