"""Schedules that Keras has no class for, made of its own, and a callback that goes on where it stood.

    learning_rate = ckptconv.keras.sequential([warm_up, cosine], milestones=[100])
    optimizer = keras.optimizers.Adam(learning_rate)

They are `LearningRateSchedule`s of Keras 3 or tf_keras, computed in TensorFlow in Keras' float type and saved
with `get_config()`; the report of a conversion prints the lines, which also register the classes that
`load_model` asks for. `package` is `"keras"` or `"tf_keras"`.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING, Protocol

from ckptconv.errors import CkptError, missing_extra

if TYPE_CHECKING:
    from tensorflow import Tensor

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
    length: int,
    phases: Sequence[tuple[float, float, float]],
    anneal: str = "cos",
    momentum: tuple[float, float] | None = None,
    package: str = "keras",
) -> Rates:
    """torch's OneCycleLR: `phases` are (last index, rate at its beginning, rate at its end).

    `momentum`: that at the highest rate and that at both ends, which `cycled_momentum` follows.
    Raises: missing-dependency.
    """
    cycled = {} if momentum is None else {"momentum": [float(value) for value in momentum]}
    made: Rates = _classes(package)["OneCycle"](
        length=length, phases=[list(phase) for phase in phases], anneal=anneal, **cycled
    )
    return made


def epochs(schedule: Rates, steps_per_epoch: int, package: str = "keras") -> Rates:
    """A schedule that counts epochs: the rate moves after every `steps_per_epoch` updates.

    Raises: usage for a number below 1; missing-dependency.
    """
    if steps_per_epoch < 1:
        raise CkptError.of(
            "usage",
            f"steps_per_epoch is {steps_per_epoch}",
            "Give the number of updates in an epoch.",
            loc=("steps_per_epoch",),
        )
    made: Rates = _classes(package)["Epochs"](schedule=schedule, steps_per_epoch=steps_per_epoch)
    return made


def resumed(callback: _Callback, **state: object) -> _Callback:
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

    def made_of(config: object) -> object:
        if isinstance(config, (list, tuple)):
            return [made_of(part) for part in config]
        return schedules.deserialize(config) if isinstance(config, dict) else config

    def told(value: object) -> object:
        if isinstance(value, list):
            return [told(part) for part in value]
        return schedules.serialize(value) if isinstance(value, schedules.LearningRateSchedule) else value

    def real(value: object) -> Tensor:
        """As the type that Keras computes rates in, which a plain cast of a float would round to float32."""
        dtype = keras.backend.floatx()
        return tf.cast(value, dtype) if tf.is_tensor(value) else tf.constant(value, dtype)

    class Base(schedules.LearningRateSchedule):  # type: ignore[misc, name-defined]  # a class of a live module
        def __init__(self, **config: object) -> None:
            super().__init__()
            for name, value in config.items():
                setattr(self, name, made_of(value))
            self._names = tuple(config)

        def get_config(self) -> dict[str, object]:
            return {name: told(getattr(self, name)) for name in self._names}

    class Sequential(Base):
        def __call__(self, step: object) -> object:
            index = tf.cast(step, tf.int64)
            rate = real(self.parts[0](index))
            for begin, part in zip(self.milestones, self.parts[1:], strict=True):
                local = tf.maximum(index - begin, 0)
                rate = tf.where(index >= begin, real(part(local)), rate)
            return rate

    class Chained(Base):
        def __call__(self, step: object) -> object:
            rate = real(self.base)
            for part in self.parts:
                rate = rate * real(part(step))
            return rate

    class Table(Base):
        def __call__(self, step: object) -> object:
            place = tf.clip_by_value(tf.cast(step, tf.int64) - self.start, 0, len(self.rates) - 1)
            return tf.gather(real(self.rates), place)

    class OneCycle(Base):
        def __call__(self, step: object) -> object:
            return self._moved(step, self.phases)

        def momentum_at(self, step: object) -> object:
            """The momentum, or beta_1, of an update: low where the rate is high."""
            low, high = self.momentum
            ends = [phase[0] for phase in self.phases]
            # Down while the rate climbs, up while it falls; a third phase stays.
            ways = [(high, low), (low, high), (high, high)]
            return self._moved(step, [(end, *way) for end, way in zip(ends, ways, strict=False)])

        def _moved(self, step: object, phases: Sequence[tuple[float, float, float]]) -> Tensor:
            index = tf.minimum(tf.cast(step, tf.float64), self.length - 1)
            begin, value = 0.0, None
            for end, first, last in phases:
                share = (index - begin) / (end - begin)
                moved = share if self.anneal == "linear" else (1 - tf.cos(math.pi * share)) / 2
                here = first + (last - first) * moved
                value = here if value is None else tf.where(index > begin, here, value)
                begin = end
            return real(value)

    class Epochs(Base):
        def __call__(self, step: object) -> object:
            return self.schedule(tf.cast(step, tf.int64) // self.steps_per_epoch)

    register = getattr(keras, "saving", keras.utils).register_keras_serializable("ckptconv")
    return {cls.__name__: register(cls) for cls in (Sequential, Chained, Table, OneCycle, Epochs)}
