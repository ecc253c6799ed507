"""A curve as the Keras schedule that follows it: the constructor that the target's code must say.

A TensorFlow checkpoint holds no schedule, only the counter that it follows. Keras computes in float32 and,
in `PiecewiseConstantDecay`, changes the rate after a boundary where torch changes it at a milestone. Source:
keras 3.15.1 `keras/src/optimizers/schedules/learning_rate_schedule.py`; tf_keras 2.21, the same rules.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from ckptconv.catalog.schedule_rates import Curve, NotExpressibleError, part_at, rate


@dataclass(frozen=True, slots=True, kw_only=True)
class Code:
    """What the target's code must say."""

    expression: str
    """The constructor."""
    remark: str = ""
    """Where it stops being the same."""


def keras_code(
    curve: Curve, base: float, index: int, package: str, named: Mapping[str, float] | None = None
) -> Code:
    """The Keras schedule with the rates of a curve from `index` on. Raises: NotExpressibleError.

    `package`: `keras` or `tf_keras`. `named`: see `schedule_rates.rate`.
    """
    write = _WRITERS.get(curve.family)
    if write is None:
        raise NotExpressibleError(f"Keras has no counterpart of '{curve.family}'")
    try:
        code = write(curve, _Place(base, index, package, named or {}))
    except (KeyError, TypeError, ValueError, IndexError, ZeroDivisionError, OverflowError) as error:
        raise NotExpressibleError(f"the parameters of '{curve.family}' are not complete ({error})") from error
    if rate(curve, base, index, named) is None:
        raise NotExpressibleError(f"the parameters of '{curve.family}' make no rate at {index}")
    return code


@dataclass(frozen=True, slots=True)
class _Place:
    """What a curve itself does not say."""

    base: float
    index: int
    package: str
    named: Mapping[str, float]

    def call(self, name: str, **arguments: object) -> str:
        """A constructor of the package."""
        inner = ", ".join(f"{key}={_text(value)}" for key, value in arguments.items())
        return f"{self.package}.optimizers.schedules.{name}({inner})"

    def helper(self, name: str, *arguments: str) -> str:
        """A helper of this package."""
        more = [] if self.package == "keras" else [f"package={self.package!r}"]
        return f"ckptconv.keras.{name}({', '.join([*arguments, *more])})"


def _text(value: object) -> str:
    if isinstance(value, list):
        return "[" + ", ".join(map(_text, value)) + "]"
    if isinstance(value, float) and value.is_integer() and abs(value) < 1 << 53:
        return f"{value!r}"
    return repr(value)


def whole(value: float) -> float:
    """Ticks as an int where they are whole."""
    return int(value) if float(value).is_integer() else value


def _step(v: Curve, at: _Place) -> Code:
    return Code(
        expression=at.call(
            "ExponentialDecay",
            initial_learning_rate=at.base,
            decay_steps=whole(v.number("interval")),
            decay_rate=v.number("factor"),
            staircase=True,
        )
    )


def _exponential(v: Curve, at: _Place) -> Code:
    return Code(
        expression=at.call(
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
    return Code(expression=at.call("PiecewiseConstantDecay", boundaries=ends, values=list(values)))


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
        expression=at.call(
            "PolynomialDecay",
            initial_learning_rate=at.base * v.number("start_factor"),
            decay_steps=whole(v.number("length")),
            end_learning_rate=at.base * v.number("end_factor"),
            power=1.0,
        )
    )


def _polynomial(v: Curve, at: _Place) -> Code:
    return Code(
        expression=at.call(
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
        expression=at.call(
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
        expression=at.call(
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
        expression=at.call(
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
        expression=at.call(
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
    now, _ = part_at(v, at.index)
    codes = [
        keras_code(part, at.base, max(at.index - begin, 0) if place == now else 0, at.package, at.named)
        for place, (part, begin) in enumerate(zip(v.parts, begins, strict=True))
    ]
    parts = ", ".join(code.expression for code in codes)
    remarks = [f"part {place}: {code.remark}" for place, code in enumerate(codes) if code.remark]
    return Code(
        expression=at.helper("sequential", f"[{parts}]", f"milestones={begins[1:]}"),
        remark="; ".join(remarks),
    )


def _chained(v: Curve, at: _Place) -> Code:
    for part in v.parts:
        if part.family == "cosine" and part.number("minimum") != 0:
            raise NotExpressibleError(
                "a chained cosine with a minimum adds to the rate instead of multiplying it"
            )
    codes = [keras_code(part, 1.0, at.index, at.package) for part in v.parts]
    parts = ", ".join(code.expression for code in codes)
    remarks = [code.remark for code in codes if code.remark]
    return Code(expression=at.helper("chained", repr(at.base), f"[{parts}]"), remark="; ".join(remarks))


def _one_cycle(v: Curve, at: _Place) -> Code:
    if v.parameters.get("cycle_momentum"):
        raise NotExpressibleError(
            "cycle_momentum=True moves momentum or beta_1 with the rate, which Keras cannot"
        )
    names = {"initial_lr": at.base, **at.named}
    phases: list[str] = []
    while f"phase.{len(phases)}.end" in v.parameters:
        name = f"phase.{len(phases)}."
        ends = [names[str(v.parameters[name + which])] for which in ("from", "to")]
        phases.append(f"({v.number(name + 'end')!r}, {ends[0]!r}, {ends[1]!r})")
    how = f"anneal={v.parameters['anneal']!r}"
    length = whole(v.number("length"))
    return Code(
        expression=at.helper("one_cycle", f"{length}", f"[{', '.join(phases)}]", how),
        remark=f"torch stops with an error after {length} updates, this one stays at its last rate",
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
    rates = ", ".join(repr(at.base * factor) for factor in factors)
    end = start + len(factors) - 1
    return Code(
        expression=at.helper("table", f"[{rates}]", f"start={start}"),
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


def plateau_code(curve: Curve, package: str, monitor: str = "val_loss") -> tuple[str, ...]:
    """The lines of the Keras callback that goes on as torch's ReduceLROnPlateau. Raises: NotExpressibleError.

    Keras lets `patience - 1` bad epochs pass where torch lets `patience`, and counts the epoch that ends a
    cooldown. Its state is in no checkpoint, and is reset when training begins: the lines set it after that.
    """
    values = curve.parameters
    if values.get("threshold_mode") != "abs":
        raise NotExpressibleError(
            "threshold_mode='rel' measures against a fraction of the best, Keras a difference"
        )
    try:
        minimum = {value for name, value in values.items() if name.startswith("minimum.")}
        if len(minimum) != 1:
            raise NotExpressibleError("its groups have different lowest rates")
        cooldown, cooling = int(curve.number("cooldown")), int(curve.number("cooling"))
        arguments = {
            "monitor": monitor,
            "factor": curve.number("factor"),
            "patience": int(curve.number("patience")) + 1,
            "mode": values["mode"],
            "min_delta": curve.number("threshold"),
            "cooldown": cooldown + 1 if cooldown else 0,
            "min_lr": minimum.pop(),
        }
        best, wait = curve.number("best"), int(curve.number("bad"))
    except (KeyError, TypeError) as error:
        raise NotExpressibleError(f"the parameters of 'plateau' are not complete ({error})") from error
    told = ", ".join(f"{name}={value!r}" for name, value in arguments.items())
    state = f"best={best!r}" if best not in (float("inf"), float("-inf")) else f"best=float({str(best)!r})"
    return (
        f"callback = ckptconv.keras.resumed({package}.callbacks.ReduceLROnPlateau({told}), "
        f"{state}, wait={wait}, cooldown_counter={cooling + 1 if cooling else 0})",
        "# monitor is the metric that the source's loop gave to scheduler.step(metric), once per epoch",
    )
