"""Update rules of other frameworks for the optimizers of Keras 3 and of tf_keras (2.11 and later).

Each class overrides a part of a stock class that stands behind it in a class made by `keras_exact`; its own
number is the attribute of the name in `SETTINGS`. Both packages run on TensorFlow, and their hooks differ in
little: Keras 3 hands the learning rate to `update_step`, tf_keras has it in the optimizer, and the index of a
variable has another name (`Keras3`, `TfKeras`).

Source: keras 3.15.1 `keras/src/optimizers/base_optimizer.py`, tf_keras 2.21.0
`tf_keras/src/optimizers/optimizer.py`, and the classes' own files.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from ckptconv.errors import CkptError

if TYPE_CHECKING:
    from tensorflow import Tensor

    class Stock:
        """What an optimizer of either package has, as far as the rules below use it."""

        epsilon: float
        rho: float
        beta_1: float
        beta_2: float
        momentum: float
        nesterov: bool
        centered: bool
        built: bool
        iterations: Tensor
        gradient_accumulation_steps: int | None
        learning_rate: Tensor
        momentums: list[Tensor]
        _iterations: Tensor
        _learning_rate: Tensor
        _index_dict: Mapping[object, int]
        _accumulators: list[Tensor]
        _average_gradients: list[Tensor]
        _m: list[Tensor]
        _momentums: list[Tensor]
        _u: list[Tensor]
        _u_product: Tensor
        _velocities: list[Tensor]

        def apply(self, grads: Sequence[Tensor], trainable_variables: Sequence[Tensor] | None) -> object: ...
        def update_step(self, gradient: Tensor, variable: Tensor, *rate: Tensor) -> None: ...
        def _get_variable_index(self, variable: Tensor) -> int: ...
        def _var_key(self, variable: Tensor) -> object: ...
        def _use_weight_decay(self, variable: Tensor) -> bool: ...
        def _backend_update_step(self, *args: object) -> None: ...
        def _internal_apply_gradients(self, grads_and_vars: Iterable[tuple[Tensor, Tensor]]) -> object: ...

    class Rule(Stock):
        def place(self, variable: Tensor) -> int: ...
else:
    Stock = Rule = object


class Keras3(Stock):
    """Where a variable's slots stand in Keras 3's lists."""

    def place(self, variable: Tensor) -> int:
        return self._get_variable_index(variable)


class TfKeras(Stock):
    """Where a variable's slots stand in tf_keras' lists."""

    def place(self, variable: Tensor) -> int:
        return self._index_dict[self._var_key(variable)]


class Dense(Rule):
    """Gradients as dense tensors, in which an embedding's repeated tokens are summed."""

    def apply(self, grads: Sequence[Tensor], trainable_variables: Sequence[Tensor] | None = None) -> object:
        return super().apply([_dense(g) for g in grads], trainable_variables)

    def update_step(self, gradient: Tensor, variable: Tensor, *rate: Tensor) -> None:
        super().update_step(_dense(gradient), variable, *rate)


class CoupledDecay(Rule):
    """The gradient with weight_decay * p added, which moments and momenta then see."""

    coupled_decay: float

    def update_step(self, gradient: Tensor, variable: Tensor, *rate: Tensor) -> None:
        if self._use_weight_decay(variable):
            gradient = _cast(gradient, variable.dtype) + self.coupled_decay * variable
        super().update_step(gradient, variable, *rate)


class CorrectedEpsilon(Rule):
    """Adam: m / (sqrt(v) / c + epsilon), c = sqrt(1 - beta_2^t): epsilon * c beside the raw root."""

    corrected_epsilon: float

    def update_step(self, gradient: Tensor, variable: Tensor, *rate: Tensor) -> None:
        dtype = variable.dtype
        square = 1 - _cast(self.beta_2, dtype) ** _cast(self.iterations + 1, dtype)
        with _during(self, epsilon=self.corrected_epsilon * square**0.5):
            super().update_step(gradient, variable, *rate)


class OutsideEpsilon(Rule):
    """sqrt(d) + epsilon, which is sqrt(d + e) with e = epsilon (2 sqrt(d) + epsilon)."""

    outside_epsilon: float

    def next_square(self, gradient: Tensor, place: int) -> Tensor:
        """What the rule takes the root of in this update."""
        raise NotImplementedError

    def update_step(self, gradient: Tensor, variable: Tensor, *rate: Tensor) -> None:
        root = self.next_square(_cast(gradient, variable.dtype), self.place(variable)) ** 0.5
        with _during(self, epsilon=self.outside_epsilon * (2 * root + self.outside_epsilon)):
            super().update_step(gradient, variable, *rate)


class OutsideEpsilonOfAverage(OutsideEpsilon):
    """RMSprop's."""

    def next_square(self, gradient: Tensor, place: int) -> Tensor:
        d = self.rho * self._velocities[place] + (1 - self.rho) * gradient**2
        if self.centered:
            d = d - (self.rho * self._average_gradients[place] + (1 - self.rho) * gradient) ** 2
        return d


class OutsideEpsilonOfSum(OutsideEpsilon):
    """Adagrad's."""

    def next_square(self, gradient: Tensor, place: int) -> Tensor:
        return self._accumulators[place] + gradient**2


class InMaxEpsilon(Rule):
    """Adamax: u = max(beta_2 u, |g| + epsilon), and nothing beside u."""

    in_max_epsilon: float

    def update_step(self, gradient: Tensor, variable: Tensor, *rate: Tensor) -> None:
        import tensorflow as tf

        dtype, place = variable.dtype, self.place(variable)
        g, m, u = _cast(gradient, dtype), self._m[place], self._u[place]
        m.assign(m + (g - m) * (1 - self.beta_1))
        u.assign(tf.maximum(self.beta_2 * u, tf.abs(g) + self.in_max_epsilon))
        done = 1 - _cast(self.beta_1, dtype) ** _cast(self.iterations + 1, dtype)
        variable.assign_sub(_rate(self, rate, dtype) * m / (done * u))


class MomentumDecay(Rule):
    """Nadam: mu_t = beta_1 (1 - 0.5 * 0.96^(t * momentum_decay)), where the stock class has a decay of 1.

    The product of the momenta goes on in the precision that it has come in. PyTorch's is float32 in float64
    models, too, unless `torch.set_default_dtype` was called; float32 does not hold a product of float64.
    """

    momentum_decay: float

    def _mu(self, step: Tensor, dtype: object) -> Tensor:
        import tensorflow as tf

        # 0.96^x by exp: a cast of 0.96 goes through float32, in float64 models too.
        power = tf.exp(_cast(step, dtype) * (self.momentum_decay * math.log(0.96)))
        return _cast(self.beta_1, dtype) * (1.0 - 0.5 * power)

    def _multiply(self) -> None:
        import tensorflow as tf

        product, mu = self._u_product, self._mu(self.iterations + 1, "float64")
        present = tf.convert_to_tensor(product)
        single = _cast(present, "float32")
        short = (_cast(single, present.dtype) == present) & (present != 1)  # at 1 no update has been made
        product.assign(
            tf.where(
                short, _cast(single * _cast(mu, "float32"), present.dtype), present * _cast(mu, present.dtype)
            )
        )

    def _backend_update_step(self, *args: object) -> None:
        import keras

        self._multiply()
        # Not Nadam's own, which multiplies the product by its momentum.
        super(keras.optimizers.Nadam, self)._backend_update_step(*args)

    def _internal_apply_gradients(self, grads_and_vars: Iterable[tuple[Tensor, Tensor]]) -> object:
        self._multiply()
        return super()._internal_apply_gradients(grads_and_vars)

    def update_step(self, gradient: Tensor, variable: Tensor, *rate: Tensor) -> None:
        dtype, place = variable.dtype, self.place(variable)
        g, beta_2 = _cast(gradient, dtype), _cast(self.beta_2, dtype)
        m, v = self._momentums[place], self._velocities[place]
        mu, following = self._mu(self.iterations + 1, dtype), self._mu(self.iterations + 2, dtype)
        product = _cast(self._u_product, dtype)
        m.assign(m + (g - m) * (1 - _cast(self.beta_1, dtype)))
        v.assign(v + (g**2 - v) * (1 - beta_2))
        ahead = following * m / (1 - product * following) + (1 - mu) * g / (1 - product)
        root = (v / (1 - beta_2 ** _cast(self.iterations + 1, dtype))) ** 0.5
        variable.assign_sub(_rate(self, rate, dtype) * ahead / (root + self.epsilon))


class GradientMomentum(Rule):
    """SGD whose buffer follows the rate: it stays -rate * m, the rate always that of the next update."""

    def prepare(self) -> None:
        """The buffers follow the rate's variable, whoever assigns it: a setter, a callback, `K.set_value`."""
        rate = self._learning_rate
        if callable(rate):  # a schedule
            return
        assign = rate.assign

        def followed(value: object, *args: object, **more: object) -> object:
            import tensorflow as tf

            buffers = (getattr(self, "momentums", None) or []) if self.momentum else []
            if buffers and tf.executing_eagerly():
                _check_rates(float(rate), value)
            before = tf.identity(tf.convert_to_tensor(rate))
            result = assign(value, *args, **more)
            for buffer in buffers:
                ratio = _cast(rate, buffer.dtype) / _cast(before, buffer.dtype)  # as the variable rounds it
                buffer.assign(buffer * ratio)
            return result

        rate.assign = followed

    def update_step(self, gradient: Tensor, variable: Tensor, *rate: Tensor) -> None:
        import tensorflow as tf

        super().update_step(gradient, variable, *rate)
        schedule = self._learning_rate
        if not self.momentum or not callable(schedule):
            return
        now = _rate(self, rate, variable.dtype)
        tf.debugging.assert_positive(now, "the buffer of a momentum SGD is lost in an update at the rate 0")
        ahead = getattr(self, "gradient_accumulation_steps", None) or 1
        following = _cast(schedule(self._iterations + ahead), variable.dtype)
        # A schedule that ends at 0 leaves the buffer as it was: no update follows.
        ratio = tf.where(following > 0, following / now, tf.ones_like(now))
        buffer = self.momentums[self.place(variable)]
        buffer.assign(buffer * ratio)


class CycledBeta(Rule):
    """Adam whose beta_1 is the one that its one-cycle schedule has for the update.

    Its correction for bias is 1 - beta_1^t with this beta_1, in both frameworks.
    """

    def update_step(self, gradient: Tensor, variable: Tensor, *rate: Tensor) -> None:
        with _during(self, beta_1=_cycled(self, variable.dtype)):
            super().update_step(gradient, variable, *rate)


class CycledMomentum(Rule):
    """SGD whose momentum is the one that its one-cycle schedule has for the update."""

    def update_step(self, gradient: Tensor, variable: Tensor, *rate: Tensor) -> None:
        dtype = variable.dtype
        momentum, buffer = _cycled(self, dtype), self.momentums[self.place(variable)]
        step = _rate(self, rate, dtype) * _cast(gradient, dtype)
        buffer.assign(momentum * buffer - step)
        variable.assign_add(momentum * buffer - step if self.nesterov else buffer)


def _cycled(optimizer: Stock, dtype: object) -> Tensor:
    """The momentum of the update at the counter that the learning rate follows."""
    return _cast(optimizer._learning_rate.momentum_at(optimizer._iterations), dtype)


def _check_rates(before: float, value: object) -> None:
    """Raises: unsupported-feature where one of two rates is 0, so that the buffer's ratio is lost."""
    if not number(value) > 0 or not before > 0:
        raise CkptError.of(
            "unsupported-feature",
            f"a momentum SGD's buffer cannot follow the rate from {before!r} to {value!r}",
            "Keep the rate above 0: at 0 the buffer, which is a multiple of it, is lost.",
            loc=("optimizer", "learning_rate"),
        )


def number(value: object) -> float:
    """A plain number or a scalar; NaN for anything else."""
    try:
        return float(value)  # type: ignore[arg-type]  # what has no float() is caught
    except (TypeError, ValueError):
        return float("nan")


SETTINGS: Mapping[str, type] = {
    "coupled_decay": CoupledDecay,
    "corrected_epsilon": CorrectedEpsilon,
    "outside_epsilon": OutsideEpsilon,
    "in_max_epsilon": InMaxEpsilon,
    "momentum_decay": MomentumDecay,
}
"""Name of a rule's number, and of the setting that tells a converter of it -> the rule."""

ORDER: tuple[type, ...] = (
    Dense,
    CoupledDecay,
    CorrectedEpsilon,
    OutsideEpsilonOfAverage,
    OutsideEpsilonOfSum,
    InMaxEpsilon,
    MomentumDecay,
    GradientMomentum,
    CycledBeta,
    CycledMomentum,
)
"""A decay first: every other rule has to see the gradient with it. A momentum of the schedule's last: the
others see the plain one, which is that of the optimizer's configuration."""


def _cast(value: object, dtype: object) -> Tensor:
    import tensorflow as tf

    return tf.cast(value, dtype)


def _dense(gradient: Tensor) -> Tensor:
    import tensorflow as tf

    return tf.convert_to_tensor(gradient) if isinstance(gradient, tf.IndexedSlices) else gradient


def _rate(optimizer: Stock, given: tuple[Tensor, ...], dtype: object) -> Tensor:
    return _cast(given[0] if given else optimizer.learning_rate, dtype)


@contextmanager
def _during(optimizer: object, **values: object) -> Iterator[None]:
    """Other values of plain attributes for one update; past `__setattr__`, which would track a tensor."""
    kept = {name: vars(optimizer)[name] for name in values}
    vars(optimizer).update(values)
    try:
        yield
    finally:
        vars(optimizer).update(kept)
