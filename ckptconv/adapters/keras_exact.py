"""Keras 3 optimizers that follow another framework's rule exactly, where the stock class comes near.

Each function takes an optimizer that is not built yet and returns one of a subclass with the same settings
and the same variables: a converted checkpoint restores into it and passes `assert_consumed()`. They may be
put around each other. All of them make sparse gradients dense first, see `densified`.

What they cannot do: a `.keras` file names the class, so loading one needs `custom_objects`; TensorFlow
checkpoints and `.weights.h5` files hold variables only.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import TYPE_CHECKING, TypeVar, cast

from ckptconv.document import Value
from ckptconv.errors import CkptError, missing_extra

if TYPE_CHECKING:
    from tensorflow import Tensor

    class _Stock:
        """What a Keras 3 optimizer has, as far as the rules below use it."""

        epsilon: float
        rho: float
        beta_1: float
        beta_2: float
        momentum: float
        nesterov: bool
        centered: bool
        iterations: Tensor
        gradient_accumulation_steps: int | None
        learning_rate: Tensor
        momentums: list[Tensor]
        _iterations: Tensor
        _learning_rate: Tensor
        _momentums: list[Tensor]
        _velocities: list[Tensor]
        _average_gradients: list[Tensor]
        _u_product: Tensor

        @classmethod
        def from_config(cls, config: dict[str, object]) -> _Stock: ...
        def apply(self, grads: Sequence[Tensor], trainable_variables: Sequence[Tensor] | None) -> object: ...
        def update_step(self, gradient: Tensor, variable: Tensor, learning_rate: Tensor) -> None: ...
        def assign(self, variable: Tensor, value: Tensor) -> None: ...
        def assign_add(self, variable: Tensor, value: Tensor) -> None: ...
        def assign_sub(self, variable: Tensor, value: Tensor) -> None: ...
        def _get_variable_index(self, variable: Tensor) -> int: ...
        def _use_weight_decay(self, variable: Tensor) -> bool: ...
        def _backend_update_step(
            self, grads: Sequence[Tensor], trainable_variables: Sequence[Tensor], learning_rate: Tensor
        ) -> None: ...
else:
    _Stock = object

Optimizer = TypeVar("Optimizer")


class _Dense(_Stock):
    """Gradients as dense tensors, in which an embedding's repeated tokens are summed."""

    def apply(self, grads: Sequence[Tensor], trainable_variables: Sequence[Tensor] | None = None) -> object:
        import tensorflow as tf

        dense = [tf.convert_to_tensor(g) if isinstance(g, tf.IndexedSlices) else g for g in grads]
        return super().apply(dense, trainable_variables)


class _CorrectedEpsilon(_Stock):
    """Adam: m / (sqrt(v) / c + epsilon), c = sqrt(1 - beta_2^t): epsilon * c beside the raw root."""

    rule_epsilon: float

    def update_step(self, gradient: Tensor, variable: Tensor, learning_rate: Tensor) -> None:
        from keras import ops

        step = ops.cast(self.iterations + 1, variable.dtype)
        corrected = ops.sqrt(1 - ops.power(ops.cast(self.beta_2, variable.dtype), step))
        with _during(self, epsilon=self.rule_epsilon * corrected):
            super().update_step(gradient, variable, learning_rate)


class _OutsideEpsilon(_Stock):
    """RMSprop: sqrt(d) + epsilon, which is sqrt(d + e) with e = epsilon (2 sqrt(d) + epsilon)."""

    rule_epsilon: float

    def update_step(self, gradient: Tensor, variable: Tensor, learning_rate: Tensor) -> None:
        from keras import ops

        index = self._get_variable_index(variable)
        g = ops.cast(gradient, variable.dtype)
        d = self.rho * self._velocities[index] + (1 - self.rho) * ops.square(g)
        if self.centered:
            d = d - ops.square(self.rho * self._average_gradients[index] + (1 - self.rho) * g)
        with _during(self, epsilon=self.rule_epsilon * (2 * ops.sqrt(d) + self.rule_epsilon)):
            super().update_step(gradient, variable, learning_rate)


class _MomentumDecay(_Stock):
    """Nadam: mu_t = beta_1 (1 - 0.5 * 0.96^(t * momentum_decay)), where the stock class has a decay of 1."""

    rule_momentum_decay: float

    def _mu(self, step: Tensor, dtype: str) -> Tensor:
        from keras import ops

        # 0.96^x by exp: a cast of 0.96 goes through float32, in float64 models too.
        power = ops.exp(ops.cast(step, dtype) * (self.rule_momentum_decay * math.log(0.96)))
        return ops.cast(self.beta_1, dtype) * (1.0 - 0.5 * power)

    def _backend_update_step(
        self, grads: Sequence[Tensor], trainable_variables: Sequence[Tensor], learning_rate: Tensor
    ) -> None:
        import keras

        product = self._u_product
        self.assign(product, product * self._mu(self.iterations + 1, product.dtype))
        # Not Nadam's own, which multiplies the product by its momentum.
        super(keras.optimizers.Nadam, self)._backend_update_step(grads, trainable_variables, learning_rate)

    def update_step(self, gradient: Tensor, variable: Tensor, learning_rate: Tensor) -> None:
        from keras import ops

        dtype, index = variable.dtype, self._get_variable_index(variable)
        g, beta_2 = ops.cast(gradient, dtype), ops.cast(self.beta_2, dtype)
        m, v = self._momentums[index], self._velocities[index]
        mu, following = self._mu(self.iterations + 1, dtype), self._mu(self.iterations + 2, dtype)
        product = ops.cast(self._u_product, dtype)
        self.assign_add(m, (g - m) * (1 - ops.cast(self.beta_1, dtype)))
        self.assign_add(v, (ops.square(g) - v) * (1 - beta_2))
        ahead = following * m / (1 - product * following) + (1 - mu) * g / (1 - product)
        root = ops.sqrt(v / (1 - ops.power(beta_2, ops.cast(self.iterations + 1, dtype))))
        self.assign_sub(variable, ops.cast(learning_rate, dtype) * ahead / (root + self.epsilon))


class _GradientMomentum(_Stock):
    """SGD whose buffer follows the rate: it stays -rate * m, the rate always that of the next update."""

    def update_step(self, gradient: Tensor, variable: Tensor, learning_rate: Tensor) -> None:
        import keras
        import tensorflow as tf
        from keras import ops

        super().update_step(gradient, variable, learning_rate)
        schedule = self._learning_rate
        if not self.momentum or not isinstance(schedule, keras.optimizers.schedules.LearningRateSchedule):
            return
        now = ops.cast(learning_rate, variable.dtype)
        tf.debugging.assert_positive(now, "the buffer of a momentum SGD is lost in an update at the rate 0")
        following = schedule(self._iterations + (self.gradient_accumulation_steps or 1))
        following = ops.cast(following, variable.dtype)
        # A schedule that ends at 0 leaves the buffer as it was: no update follows.
        ratio = ops.where(following > 0, following / now, ops.ones_like(now))
        buffer = self.momentums[self._get_variable_index(variable)]
        self.assign(buffer, buffer * ratio)

    def __setattr__(self, name: str, value: object) -> None:
        if name != "learning_rate" or not getattr(self, "built", False) or not self.momentum:
            super().__setattr__(name, value)
            return
        before = float(self.learning_rate)
        if not _number(value) > 0 or not before > 0:
            raise CkptError.of(
                "unsupported-feature",
                f"a momentum SGD's buffer cannot follow the rate from {before!r} to {value!r}",
                "Keep the rate above 0: at 0 the buffer, which is a multiple of it, is lost.",
                loc=("optimizer", "learning_rate"),
            )
        super().__setattr__(name, value)
        after = float(self.learning_rate)  # as its variable rounds it
        if after != before:
            for buffer in self.momentums:
                buffer.assign(buffer * (after / before))


class _CoupledDecay(_Stock):
    """The gradient with weight_decay * p added, which moments and momenta then see."""

    rule_weight_decay: float

    def update_step(self, gradient: Tensor, variable: Tensor, learning_rate: Tensor) -> None:
        from keras import ops

        if self._use_weight_decay(variable):
            gradient = ops.cast(gradient, variable.dtype) + self.rule_weight_decay * variable
        super().update_step(gradient, variable, learning_rate)


_ORDER: tuple[type, ...] = (
    _Dense,
    _CoupledDecay,
    _CorrectedEpsilon,
    _OutsideEpsilon,
    _MomentumDecay,
    _GradientMomentum,
)
"""A decay first: every other rule has to see the gradient with it."""


def densified(optimizer: Optimizer) -> Optimizer:
    """The optimizer with gradients made dense: any Keras 3 class on TensorFlow.

    The gradient of an embedding comes as `tf.IndexedSlices` with one row per occurrence of a token. Keras 3
    squares these rows before it sums them, so that second moments of repeated tokens come out too small, and
    trajectories part from PyTorch's and tf_keras'. It costs memory of the embedding's size per update.
    """
    return _with(optimizer, _Dense, (), {})


def corrected_epsilon(optimizer: Optimizer, epsilon: float) -> Optimizer:
    """Adam or AdamW with PyTorch's rule: epsilon beside the root that is corrected for bias."""
    return _with(optimizer, _CorrectedEpsilon, ("Adam", "AdamW"), {"rule_epsilon": epsilon})


def outside_epsilon(optimizer: Optimizer, epsilon: float) -> Optimizer:
    """RMSprop with PyTorch's rule: sqrt(v) + epsilon where Keras has sqrt(v + epsilon)."""
    return _with(optimizer, _OutsideEpsilon, ("RMSprop",), {"rule_epsilon": epsilon})


def momentum_decay(optimizer: Optimizer, momentum_decay: float) -> Optimizer:
    """Nadam with PyTorch's `momentum_decay` (0.004 by default there); Keras has it fixed at 1."""
    return _with(optimizer, _MomentumDecay, ("Nadam",), {"rule_momentum_decay": momentum_decay})


def gradient_momentum(optimizer: Optimizer) -> Optimizer:
    """SGD whose momentum follows a changing rate as PyTorch's does: the buffer is scaled along with it.

    With a schedule, or a rate that is set (`optimizer.learning_rate = x`, as callbacks do) outside of a
    compiled function. An update at the rate 0 is an error.
    """
    return _with(optimizer, _GradientMomentum, ("SGD",), {})


def coupled_decay(optimizer: Optimizer, weight_decay: float) -> Optimizer:
    """Any class with PyTorch's coupled decay: `weight_decay * p` is added to the gradient, after clipping.

    `exclude_from_weight_decay` says of which variables it is not. The optimizer's own, decoupled decay must
    be off.
    """
    own = getattr(optimizer, "weight_decay", None)
    if own:
        raise CkptError.of(
            "unsupported-feature",
            f"the optimizer has a decoupled weight_decay = {own!r} of its own, expected none",
            "Make it without weight_decay: the coupled decay takes its place.",
            loc=("optimizer", "weight_decay"),
        )
    return _with(optimizer, _CoupledDecay, (), {"rule_weight_decay": weight_decay})


def _with(optimizer: Optimizer, rule: type, classes: tuple[str, ...], values: dict[str, Value]) -> Optimizer:
    """An optimizer of the same settings and rules, and one rule more.

    Raises: unsupported-feature for another class and for a built one; usage for a number that is none.
    """
    keras = _keras()
    stock = next((c for c in type(optimizer).__mro__ if c.__module__.startswith("keras.")), None)
    named = {getattr(keras.optimizers, name) for name in classes}
    if (
        stock is None
        or not isinstance(optimizer, keras.optimizers.Optimizer)
        or (named and stock not in named)
    ):
        expected = " or ".join(f"keras.optimizers.{name}" for name in classes) or "a Keras 3 optimizer"
        raise CkptError.of(
            "unsupported-feature",
            f"expected {expected}, got {type(optimizer).__module__}.{type(optimizer).__qualname__}",
            "This helper changes the rule of that class alone.",
            loc=("optimizer",),
        )
    if optimizer.built:
        raise CkptError.of(
            "unsupported-feature",
            "the optimizer is built already: its variables cannot move into another object",
            "Call the helper before build(), compile() and restoring.",
            loc=("optimizer",),
        )
    for name, value in values.items():
        if not _number(value) >= 0:
            raise CkptError.of(
                "usage",
                f"{name.removeprefix('rule_')} = {value!r}, expected a number of at least 0",
                "Pass the number that the report's line has.",
                loc=("optimizer", name.removeprefix("rule_")),
            )
    chosen = {*(c for c in type(optimizer).__mro__ if c in _ORDER), _Dense, rule}
    bases = (*(c for c in _ORDER if c in chosen), stock)
    held = {name: value for name, value in vars(type(optimizer)).items() if name.startswith("rule_")}
    cls = type(stock.__name__, bases, {"__module__": __name__, **held, **values})
    make = cast("type[_Stock]", cls).from_config
    return cast("Optimizer", make(optimizer.get_config()))


def _number(value: object) -> float:
    """A plain number or a scalar; NaN for anything else."""
    try:
        return float(value)  # type: ignore[arg-type]  # what has no float() is caught
    except (TypeError, ValueError):
        return float("nan")


@contextmanager
def _during(optimizer: object, **values: object) -> Iterator[None]:
    """Other values of plain attributes for one update; past `__setattr__`, which would track a tensor."""
    kept = {name: vars(optimizer)[name] for name in values}
    vars(optimizer).update(values)
    try:
        yield
    finally:
        vars(optimizer).update(kept)


def _keras() -> ModuleType:
    try:
        import keras
        import tensorflow  # noqa: F401  the backend whose gradients and checkpoints these are
    except ImportError as error:
        raise missing_extra("tensorflow", "tensorflow", "ckptconv.keras") from error
    module: ModuleType = keras
    return module
