"""torch's ReduceLROnPlateau and Keras' callback of that name: one rule, counted differently.

Keras lets `patience - 1` bad epochs pass where torch lets `patience`, and counts the epoch that ends a
cooldown. A threshold is a difference in Keras and, unless told otherwise, a fraction of the best in torch;
torch makes no fall below `smallest_change`. Keras' callback is in no checkpoint, and is reset when training
begins.
Source: torch 2.13.0 `torch/optim/lr_scheduler.py`; keras 3.15.1
`keras/src/callbacks/reduce_lr_on_plateau.py`, `monitor_callback.py`; tf_keras 2.21, the same rules.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from ckptconv.catalog.schedule_rates import Curve, NotExpressibleError
from ckptconv.catalog.texts import number
from ckptconv.document import Value

WORST: Mapping[str, float] = {"min": math.inf, "max": -math.inf}
"""Mode -> what every metric is better than."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Callback:
    """A Keras callback's arguments and state."""

    mode: str
    factor: float
    patience: int
    threshold: float
    threshold_mode: str
    cooldown: int
    minimum: float
    best: float
    wait: int
    cooling: int


def of_callback(callback: Callback) -> Curve:
    """The curve of a callback, in the terms of torch."""
    parameters: dict[str, Value] = {
        "mode": callback.mode,
        "factor": callback.factor,
        "patience": max(callback.patience - 1, 0),
        "threshold": callback.threshold,
        "threshold_mode": callback.threshold_mode,
        "cooldown": max(callback.cooldown - 1, 0),
        "minimum.0": callback.minimum,
        "default_minimum": callback.minimum,
        "smallest_change": 0.0,
        "worst": WORST[callback.mode],
        "best": callback.best,
        "bad": callback.wait,
        "cooling": max(callback.cooling - 1, 0),
    }
    return Curve(family="plateau", parameters=parameters)


def as_callback(curve: Curve) -> Callback:
    """The callback that goes on as a curve does. Raises: NotExpressibleError."""
    values = curve.parameters
    try:
        minimum = {value for name, value in values.items() if name.startswith("minimum.")}
        if len(minimum) != 1:
            raise NotExpressibleError("its groups have different lowest rates")
        cooldown, cooling = int(curve.number("cooldown")), int(curve.number("cooling"))
        mode, threshold_mode = str(values["mode"]), str(values["threshold_mode"])
        if mode not in WORST or threshold_mode not in ("rel", "abs"):
            raise NotExpressibleError(f"its mode is '{mode}', its threshold_mode '{threshold_mode}'")
        return Callback(
            mode=mode,
            factor=curve.number("factor"),
            patience=int(curve.number("patience")) + 1,
            threshold=curve.number("threshold"),
            threshold_mode=threshold_mode,
            cooldown=cooldown + 1 if cooldown else 0,
            minimum=float(minimum.pop() or 0),  # type: ignore[arg-type]  # of anything that is no number: TypeError
            best=curve.number("best"),
            wait=int(curve.number("bad")),
            cooling=cooling + 1 if cooling else 0,
        )
    except (KeyError, TypeError, ValueError) as error:
        raise NotExpressibleError(f"the parameters of 'plateau' are not complete ({error})") from error


def plateau_code(curve: Curve, rate: object, package: str, monitor: str = "val_loss") -> tuple[str, ...]:
    """The lines of the Keras callback that goes on as torch's ReduceLROnPlateau. Raises: NotExpressibleError.

    `rate`: that of the next update.
    """
    callback = as_callback(curve)
    relative = callback.threshold_mode == "rel"
    arguments = {
        "monitor": monitor,
        "factor": callback.factor,
        "patience": callback.patience,
        "mode": callback.mode,
        "min_delta": 0.0 if relative else callback.threshold,
        "cooldown": callback.cooldown,
        "min_lr": callback.minimum,
    }
    best = repr(callback.best) if math.isfinite(callback.best) else f"float({str(callback.best)!r})"
    state = [f"best={best}", f"wait={callback.wait}", f"cooldown_counter={callback.cooling}"]
    if relative:
        rule = f"ckptconv.keras.better_by_fraction({callback.threshold!r}, {callback.mode!r})"
        state.append(f"monitor_op={rule}")
    told = ", ".join(f"{name}={value!r}" for name, value in arguments.items())
    smallest = curve.parameters.get("smallest_change")
    return (
        f"callback = ckptconv.keras.resumed({package}.callbacks.ReduceLROnPlateau({told}), "
        f"{', '.join(state)})",
        "# monitor is the metric that the source's loop gave to scheduler.step(metric), once per epoch",
        *_unmade_falls(callback, smallest, rate),
    )


_SMALL = 1e-6
"""Of the present rate: where torch's falls end below this the two rates are the same."""


def _unmade_falls(callback: Callback, smallest: Value, rate: object) -> tuple[str, ...]:
    """What to say where torch stops falling at a rate that matters."""
    if not isinstance(smallest, (int, float)) or not isinstance(rate, (int, float)):
        return ()
    end = max(smallest / (1 - callback.factor), callback.minimum)
    if end <= max(callback.minimum, _SMALL * rate):
        return ()
    return (f"# torch makes no fall smaller than {number(smallest)}; this one goes on below {number(end)}",)
