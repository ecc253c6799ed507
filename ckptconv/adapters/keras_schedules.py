"""Schedules that Keras has no class for, made of its own, and a callback that goes on where it stood.

    learning_rate = ckptconv.keras.sequential([warm_up, cosine], milestones=[100])
    optimizer = keras.optimizers.Adam(learning_rate)

They are `LearningRateSchedule`s of Keras 3 or tf_keras, computed in TensorFlow and saved with
`get_config()`; the report of a conversion prints the lines. `package` is `"keras"` or `"tf_keras"`.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Protocol

from ckptconv.errors import CkptError, missing_extra

Rates = Callable[[object], object]
"""A schedule: index -> learning rate, both tensors."""


class _Callback(Protocol):
    def on_train_begin(self, logs: Mapping[str, object] | None = None) -> None: ...


def sequential(parts: Sequence[Rates], milestones: Sequence[int], package: str = "keras") -> Rates:
    """Several schedules one after the other: from each milestone on the next one, from its own index 0.

    Raises: usage unless there is one milestone less than there are parts; missing-dependency.
    """
    if len(milestones) != len(parts) - 1:
        raise CkptError.of(
            "usage",
            f"{len(parts)} schedules need {len(parts) - 1} milestones, there are {len(milestones)}",
            "Give the index at which each schedule but the first begins.",
            loc=("milestones",),
        )
    made: Rates = _classes(package)["Sequential"](parts=list(parts), milestones=list(milestones))
    return made


def chained(base: float, parts: Sequence[Rates], package: str = "keras") -> Rates:
    """Several schedules at once: the base rate times what each gives of the rate 1.

    Raises: missing-dependency.
    """
    made: Rates = _classes(package)["Chained"](base=base, parts=list(parts))
    return made


def table(rates: Sequence[float], start: int = 0, package: str = "keras") -> Rates:
    """The rates of the indices from `start` on; before it the first, behind them the last.

    Raises: usage for an empty table; missing-dependency.
    """
    if not rates:
        raise CkptError.of("usage", "the table has no rates", "Give at least one.", loc=("rates",))
    made: Rates = _classes(package)["Table"](rates=[float(rate) for rate in rates], start=start)
    return made


def one_cycle(
    length: int, phases: Sequence[tuple[float, float, float]], anneal: str = "cos", package: str = "keras"
) -> Rates:
    """torch's OneCycleLR: `phases` are (last index, rate at its beginning, rate at its end).

    Raises: missing-dependency.
    """
    rates = []
    for index in range(length):
        begin, place = 0.0, 0
        while place + 1 < len(phases) and index > phases[place][0]:
            begin, place = phases[place][0], place + 1
        end, first, last = phases[place]
        share = (index - begin) / (end - begin)
        moved = share if anneal == "linear" else (1 - math.cos(math.pi * share)) / 2.0
        rates.append(first + (last - first) * moved)
    return table(rates, package=package)


def resumed(callback: _Callback, **state: float) -> _Callback:
    """A Keras callback that has this state when training begins, instead of starting anew.

    callback = resumed(keras.callbacks.ReduceLROnPlateau(patience=4), best=0.31, wait=2)
    """
    begin = callback.on_train_begin

    def on_train_begin(logs: Mapping[str, object] | None = None) -> None:
        begin(logs)
        for name, value in state.items():
            setattr(callback, name, value)

    callback.on_train_begin = on_train_begin  # type: ignore[method-assign]  # of this one object
    return callback


@cache
def _classes(package: str) -> Mapping[str, Callable[..., Rates]]:
    """The classes, of the package's LearningRateSchedule."""
    try:
        import tensorflow as tf

        keras = importlib.import_module(package)
    except ImportError as error:
        raise missing_extra(package, "tensorflow", "ckptconv.keras") from error
    schedules = keras.optimizers.schedules

    def part_of(config: object) -> object:
        return schedules.deserialize(config) if isinstance(config, dict) else config

    class Base(schedules.LearningRateSchedule):  # type: ignore[misc, name-defined]  # a class of a live module
        def __init__(self, **config: object) -> None:
            super().__init__()
            for name, value in config.items():
                setattr(self, name, [part_of(v) for v in value] if isinstance(value, list) else value)
            self._names = tuple(config)

        def get_config(self) -> dict[str, object]:
            return {name: getattr(self, name) for name in self._names} | (
                {"parts": [schedules.serialize(part) for part in self.parts]}
                if "parts" in self._names
                else {}
            )

    class Sequential(Base):
        def __call__(self, step: object) -> object:
            index = tf.cast(step, tf.int64)
            rate = tf.cast(self.parts[0](index), tf.float32)
            for begin, part in zip(self.milestones, self.parts[1:], strict=True):
                local = tf.maximum(index - begin, 0)
                rate = tf.where(index >= begin, tf.cast(part(local), tf.float32), rate)
            return rate

    class Chained(Base):
        def __call__(self, step: object) -> object:
            rate = tf.constant(self.base, tf.float32)
            for part in self.parts:
                rate = rate * tf.cast(part(step), tf.float32)
            return rate

    class Table(Base):
        def __call__(self, step: object) -> object:
            place = tf.clip_by_value(tf.cast(step, tf.int64) - self.start, 0, len(self.rates) - 1)
            return tf.gather(tf.constant(self.rates, tf.float32), place)

    register = getattr(keras, "saving", keras.utils).register_keras_serializable("ckptconv")
    return {cls.__name__: register(cls) for cls in (Sequential, Chained, Table)}
