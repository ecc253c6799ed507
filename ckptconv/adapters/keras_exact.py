"""Optimizers of Keras 3 and tf_keras that follow another framework's rule exactly, where theirs comes near.

Each function takes an optimizer that is not built yet, gives its class one rule more (`keras_rules`) and
returns it, with its settings and the same variables: a converted checkpoint restores into it and passes
`assert_consumed()`. They may be put around each other. All of them make sparse gradients dense first, see
`densified`. tf_keras' legacy classes are refused: its others have the same rules.

What they cannot do: a `.keras` file names the class, so loading one needs `custom_objects`; TensorFlow
checkpoints and `.weights.h5` files hold variables only. A file does not tell that its run used a helper:
`describe` and `capture` tell, or `--set corrected_epsilon=1e-8` (the helper's name and its number).
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from types import ModuleType
from typing import TypeVar

from ckptconv.adapters import keras_rules as rules
from ckptconv.document import Value
from ckptconv.errors import CkptError, missing_extra

Optimizer = TypeVar("Optimizer")
_PACKAGES = {"keras": rules.Keras3, "tf_keras": rules.TfKeras}


def densified(optimizer: Optimizer) -> Optimizer:
    """The optimizer with gradients made dense: any class, needed in Keras 3 on TensorFlow.

    The gradient of an embedding comes as `tf.IndexedSlices` with one row per occurrence of a token. Keras 3
    squares these rows before it sums them, so that second moments of repeated tokens come out too small, and
    trajectories part from PyTorch's and tf_keras'. It costs memory of the embedding's size per update.
    """
    return _with(optimizer, rules.Dense)


def corrected_epsilon(optimizer: Optimizer, epsilon: float) -> Optimizer:
    """Adam or AdamW with PyTorch's rule: epsilon beside the root that is corrected for bias."""
    chosen = dict.fromkeys(("Adam", "AdamW"), rules.CorrectedEpsilon)
    return _with(optimizer, chosen, corrected_epsilon=epsilon)


def outside_epsilon(optimizer: Optimizer, epsilon: float) -> Optimizer:
    """RMSprop or Adagrad with PyTorch's rule: sqrt(v) + epsilon where Keras has sqrt(v + epsilon)."""
    chosen = {"RMSprop": rules.OutsideEpsilonOfAverage, "Adagrad": rules.OutsideEpsilonOfSum}
    return _with(optimizer, chosen, outside_epsilon=epsilon)


def in_max_epsilon(optimizer: Optimizer, epsilon: float) -> Optimizer:
    """Adamax with PyTorch's rule: max(beta_2 u, |g| + epsilon) where Keras adds epsilon to u afterwards."""
    return _with(optimizer, {"Adamax": rules.InMaxEpsilon}, in_max_epsilon=epsilon)


def momentum_decay(optimizer: Optimizer, momentum_decay: float) -> Optimizer:
    """Nadam with PyTorch's `momentum_decay` (0.004 by default there); Keras has it fixed at 1."""
    return _with(optimizer, {"Nadam": rules.MomentumDecay}, momentum_decay=momentum_decay)


def gradient_momentum(optimizer: Optimizer) -> Optimizer:
    """SGD whose momentum follows a changing rate as PyTorch's does: the buffer is scaled along with it.

    With a schedule, or a rate that is set, as callbacks do. An update at the rate 0 is an error.
    """
    return _with(optimizer, {"SGD": rules.GradientMomentum})


def cycled_momentum(optimizer: Optimizer) -> Optimizer:
    """Adam's or AdamW's beta_1, or SGD's momentum, moved against the rate by PyTorch's OneCycleLR.

    The learning rate is a `one_cycle(..., momentum=(base, max))`; both follow the optimizer's counter. SGD
    needs `gradient_momentum` as well, which makes its buffer follow the rate.
    """
    if getattr(getattr(optimizer, "_learning_rate", None), "momentum", None) is None:
        raise CkptError.of(
            "unsupported-feature",
            "the optimizer's learning rate has no momentum to follow, expected one_cycle(..., momentum=...)",
            "Make the optimizer with the learning_rate that the report's lines make.",
            loc=("optimizer", "learning_rate"),
        )
    if stock_class(optimizer).__name__ == "SGD" and not getattr(optimizer, "momentum", None):
        raise CkptError.of(
            "unsupported-feature",
            "the optimizer has momentum = 0.0 and so no buffers, expected a number above 0",
            "Make it with any momentum above 0: the schedule's takes its place.",
            loc=("optimizer", "momentum"),
        )
    chosen = {"Adam": rules.CycledBeta, "AdamW": rules.CycledBeta, "SGD": rules.CycledMomentum}
    return _with(optimizer, chosen)


def follows_momentum(optimizer: object) -> bool:
    """Whether `cycled_momentum` changed the optimizer."""
    return isinstance(optimizer, (rules.CycledBeta, rules.CycledMomentum))


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
    return _with(optimizer, rules.CoupledDecay, coupled_decay=weight_decay)


def rules_of(optimizer: object) -> dict[str, float]:
    """The numbers of the rules that helpers gave an optimizer, by the names that `--set` takes."""
    cls = type(optimizer)
    return {name: float(getattr(cls, name)) for name, rule in rules.SETTINGS.items() if issubclass(cls, rule)}


def stock_class(optimizer: object) -> type:
    """The class that Keras or tf_keras ships, of an optimizer that helpers may have changed."""
    return next((c for c in type(optimizer).__mro__ if _package(c) in _PACKAGES), type(optimizer))


def _package(cls: type) -> str:
    return cls.__module__.partition(".")[0]


def _with(optimizer: Optimizer, chosen: type | Mapping[str, type], **values: Value) -> Optimizer:
    """The optimizer with one rule more: that of its class, or one for all classes.

    Raises: unsupported-feature for another class and for a built one; usage for a number that is none.
    """
    stock = stock_class(optimizer)
    keras = _keras(_package(stock))
    rule = chosen if isinstance(chosen, type) else chosen.get(stock.__name__)
    if not isinstance(optimizer, keras.optimizers.Optimizer) or rule is None:
        names = ("Optimizer",) if isinstance(chosen, type) else tuple(chosen)
        expected = " or ".join(f"keras.optimizers.{name}" for name in names)
        raise CkptError.of(
            "unsupported-feature",
            f"expected {expected}, got {type(optimizer).__module__}.{type(optimizer).__qualname__}",
            "This helper changes the rule of that class of Keras 3 or tf_keras alone.",
            loc=("optimizer",),
        )
    if getattr(optimizer, "built", getattr(optimizer, "_built", False)):
        raise CkptError.of(
            "unsupported-feature",
            "the optimizer is built already: compiled updates would go on by its old rule",
            "Call the helper before build(), compile() and restoring.",
            loc=("optimizer",),
        )
    for name, value in values.items():
        if not rules.number(value) >= 0:
            raise CkptError.of(
                "usage",
                f"{name} = {value!r}, expected a number of at least 0",
                "Pass the number that the report's line has.",
                loc=("optimizer", name),
            )
    before = [c for c in type(optimizer).__mro__ if c in rules.ORDER]
    ordered = [c for c in rules.ORDER if c in {*before, rules.Dense, rule}]
    attributes = {"__module__": __name__, **rules_of(optimizer), **values}
    bases = (*ordered, _PACKAGES[_package(stock)], stock)
    # The object that others may hold already; past `__setattr__`, which tracks what it is given.
    object.__setattr__(optimizer, "__class__", type(stock.__name__, bases, attributes))
    if rule is rules.GradientMomentum and rule not in before:
        rule.prepare(optimizer)
    return optimizer


def _keras(package: str) -> ModuleType:
    """The package of an optimizer: Keras 3, unless tf_keras has been imported and made it."""
    if package == "tf_keras":
        return sys.modules["tf_keras"]
    try:
        import keras
        import tensorflow  # noqa: F401  the backend whose gradients and checkpoints these are
    except ImportError as error:
        raise missing_extra("tensorflow", "tensorflow", "ckptconv.keras") from error
    module: ModuleType = keras
    return module
