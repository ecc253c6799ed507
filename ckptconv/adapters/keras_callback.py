"""A live `ReduceLROnPlateau` of Keras 3 or tf_keras as a schedule of the document, and its rule by fractions.

Its state is in no file: between two `fit`s it is only in the callback.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from ckptconv.catalog.schedule_plateau import WORST, Callback, of_callback
from ckptconv.catalog.schedule_rates import Curve
from ckptconv.errors import CkptError

_HUGE = 1e30
"""A metric that differs from 0 by more than any `min_delta`."""


class Plateau(Protocol):
    """A `ReduceLROnPlateau` callback, as far as it is used here."""

    factor: float
    patience: int
    min_delta: float
    cooldown: int
    min_lr: float
    mode: str
    monitor_op: Callable[[float, float], object] | None
    best: float | None
    wait: int
    cooldown_counter: int


@dataclass(frozen=True, slots=True)
class Fraction:
    """Whether a metric is better than the best by a fraction of it: torch's `threshold_mode="rel"`."""

    threshold: float
    mode: str

    def __call__(self, value: float, best: float) -> bool:
        if self.mode == "min":
            return bool(value < best * (1.0 - self.threshold))
        return bool(value > best * (self.threshold + 1.0))


def better_by_fraction(threshold: float, mode: str) -> Fraction:
    """What `resumed(callback, monitor_op=...)` makes of Keras' difference; `mode` is `min` or `max`.

    Raises: usage for another mode.
    """
    if mode not in WORST:
        raise CkptError.of("usage", f"mode is '{mode}'", "Give 'min' or 'max'.", loc=("mode",))
    return Fraction(threshold, mode)


def curve_of_callback(callback: Plateau) -> Curve:
    """Arguments and state of a callback. Raises: unsupported-feature for what is none of Keras'."""
    package = type(callback).__module__.partition(".")[0]
    if type(callback).__name__ != "ReduceLROnPlateau" or package not in ("keras", "tf_keras"):
        raise _unsupported(f"the callback is a {type(callback).__module__}.{type(callback).__name__}")
    rule = callback.monitor_op
    if isinstance(rule, Fraction):
        mode, threshold, how = rule.mode, rule.threshold, "rel"
    else:
        mode, threshold, how = _mode(callback), abs(callback.min_delta), "abs"
    best = callback.best
    return of_callback(
        Callback(
            mode=mode,
            factor=float(callback.factor),
            patience=int(callback.patience),
            threshold=float(threshold),
            threshold_mode=how,
            cooldown=int(callback.cooldown),
            minimum=float(callback.min_lr),
            best=WORST[mode] if best is None else float(best),
            wait=int(callback.wait),
            cooling=int(callback.cooldown_counter),
        )
    )


def _mode(callback: Plateau) -> str:
    """Where better lies: `auto` is settled when training begins."""
    rule = callback.monitor_op
    if rule is None:
        if callback.mode in WORST:
            return callback.mode
        raise _unsupported(
            f"its mode is '{callback.mode}', which Keras settles at the end of the first epoch"
        )
    if getattr(rule, "__module__", "").partition(".")[0] not in ("keras", "tf_keras"):
        raise _unsupported(f"its monitor_op is no rule of Keras ({rule!r})")
    return "min" if bool(rule(-_HUGE, 0.0)) else "max"


def _unsupported(message: str) -> CkptError:
    return CkptError.of(
        "unsupported-feature",
        message,
        "Give the run's own keras.callbacks.ReduceLROnPlateau, with mode='min' or 'max'.",
        loc=("callback",),
    )
