"""PyTorch optimizers that follow Keras' rule to the last digit, where the stock class comes near.

Each function changes an optimizer, by hooks or by a subclass, and returns it; `lion` makes one. The state's
keys and the groups are the stock class's: a converted file loads with `load_state_dict`. Call them before a
scheduler is made. A file does not tell that its run used a helper: `describe` and `capture` tell, or
`--set raw_epsilon=1e-7` (the helper's name and its number).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING

from ckptconv.adapters import torch_rules
from ckptconv.adapters.torch_rules import (
    Update,
    adamax_after_max,
    muon_full,
    rmsprop_inside,
    stepping,
    torch_module,
)
from ckptconv.adapters.torch_rules import lion as lion_update
from ckptconv.errors import CkptError

if TYPE_CHECKING:
    import torch

_MARK = "_ckptconv_rules"


def raw_epsilon(optimizer: torch.optim.Optimizer, epsilon: float) -> torch.optim.Optimizer:
    """Adam or AdamW with Keras' rule, epsilon beside the raw root: `epsilon / sqrt(1 - beta_2^t)` here.

    Raises: unequal-steps in an update, where the parameters of a group have done different numbers of them.
    """
    _check(optimizer, ("Adam", "AdamW"), epsilon=epsilon)
    _marked(optimizer, raw_epsilon=epsilon)
    resting: list[tuple[dict[str, object], object]] = []

    def settle() -> None:
        while resting:
            group, value = resting.pop()
            group["eps"] = value

    def before(optimizer: torch.optim.Optimizer, *_: object) -> None:
        settle()  # an update that failed half-way has left them
        for position, group in enumerate(optimizer.param_groups):
            steps = {
                int(optimizer.state[p]["step"]) if optimizer.state.get(p) else 0
                for p in group["params"]
                if p.grad is not None
            }
            if not steps:
                continue
            if len(steps) > 1:
                raise CkptError.of(
                    "unequal-steps",
                    f"the group's parameters have done between {min(steps)} and {max(steps)} updates, "
                    "and the group has one epsilon",
                    "Give every parameter a gradient in every update, or parameters of their own group.",
                    loc=("optimizer", "param_groups", position),
                )
            resting.append((group, group["eps"]))
            corrected = 1 - float(group["betas"][1]) ** (steps.pop() + 1)
            group["eps"] = epsilon / math.sqrt(corrected)

    optimizer.register_step_pre_hook(before)
    optimizer.register_step_post_hook(lambda *_: settle())
    return optimizer


def velocity_momentum(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """SGD whose momentum stays under a changing rate as Keras' does: the buffer shrinks as the rate grows.

    At rest the buffer is that of the present rate, in `state_dict()` too.
    Raises: unsupported-feature in an update at the rate 0, from which Keras' momentum still moves weights.
    """
    _check(optimizer, ("SGD",))
    rates: dict[int, float] = {}

    def follow(optimizer: torch.optim.Optimizer, *_: object) -> None:
        for position, group in enumerate(optimizer.param_groups):
            rate = float(group["lr"])
            before = rates.get(position, rate)
            if group["momentum"] and not rate > 0:
                raise CkptError.of(
                    "unsupported-feature",
                    f"the momentum buffer cannot follow the rate from {before!r} to {rate!r}",
                    "Keep the rate above 0: Keras' buffer is a multiple of it.",
                    loc=("optimizer", "param_groups", position, "lr"),
                )
            if rate != before:
                for parameter in group["params"]:
                    buffer = optimizer.state.get(parameter, {}).get("momentum_buffer")
                    if buffer is not None:
                        buffer.mul_(before / rate)
            rates[position] = rate

    def loaded(optimizer: torch.optim.Optimizer) -> None:
        rates.update((i, float(group["lr"])) for i, group in enumerate(optimizer.param_groups))

    loaded(optimizer)
    optimizer.register_step_pre_hook(follow)
    optimizer.register_state_dict_pre_hook(follow)
    optimizer.register_load_state_dict_post_hook(loaded)
    return optimizer


def decoupled_decay(optimizer: torch.optim.Optimizer, weight_decay: float) -> torch.optim.Optimizer:
    """Any class with Keras' decoupled decay: `p *= 1 - lr * weight_decay` before the update.

    Of every parameter that has a gradient; the groups' own weight_decay must be 0.
    """
    _check(optimizer, (), weight_decay=weight_decay)
    _marked(optimizer, decoupled_decay=weight_decay)
    no_grad = torch_module().no_grad

    def before(optimizer: torch.optim.Optimizer, *_: object) -> None:
        for position, group in enumerate(optimizer.param_groups):
            if group.get("weight_decay"):
                raise CkptError.of(
                    "unsupported-feature",
                    f"the group has a weight_decay = {group['weight_decay']!r} of its own, expected 0",
                    "Leave one of the two out.",
                    loc=("optimizer", "param_groups", position, "weight_decay"),
                )
            with no_grad():
                for parameter in group["params"]:
                    if parameter.grad is not None:
                        parameter.mul_(1 - float(group["lr"]) * weight_decay)

    optimizer.register_step_pre_hook(before)
    return optimizer


def inside_epsilon(optimizer: torch.optim.Optimizer, epsilon: float) -> torch.optim.Optimizer:
    """RMSprop with Keras' rule: sqrt(v + epsilon) where PyTorch has sqrt(v) + epsilon.

    The groups' `eps` is not read any more.
    Raises: unsupported-feature once a scheduler has been made for it.
    """
    _check(optimizer, ("RMSprop",), epsilon=epsilon)
    return _marked(_stepping(optimizer, rmsprop_inside(epsilon)), inside_epsilon=epsilon)


def after_max_epsilon(optimizer: torch.optim.Optimizer, epsilon: float) -> torch.optim.Optimizer:
    """Adamax with Keras' rule: max(beta_2 u, |g|) + epsilon where PyTorch has max(beta_2 u, |g| + epsilon).

    The groups' `eps` is not read any more.
    Raises: unsupported-feature once a scheduler has been made for it.
    """
    _check(optimizer, ("Adamax",), epsilon=epsilon)
    return _marked(_stepping(optimizer, adamax_after_max(epsilon)), after_max_epsilon=epsilon)


def full_orthogonalization(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """Muon with Keras' rule: Newton-Schulz in the parameters' precision where PyTorch has bfloat16.

    The groups' `eps` is not read any more. In float32 an update takes twice the memory of PyTorch's own.
    Raises: unsupported-feature once a scheduler has been made for it.
    """
    _check(optimizer, ("Muon",))
    return _stepping(optimizer, muon_full)


def lion(
    params: Iterable[torch.Tensor] | Iterable[dict[str, object]],
    lr: float = 1e-4,
    betas: tuple[float, float] = (0.9, 0.99),
    weight_decay: float = 0.0,
) -> torch.optim.Optimizer:
    """Keras' Lion as a PyTorch optimizer, which PyTorch does not have.

    Keys of the state and of the groups are those of the `lion-pytorch` package, so that its files load here
    and these there. Raises: usage for a number that is none.
    """
    _check_numbers(lr=lr, weight_decay=weight_decay, beta_1=betas[0], beta_2=betas[1])
    cls = stepping(torch_module().optim.Optimizer, "Lion", lion_update)
    made: torch.optim.Optimizer = cls(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})
    return made


def rules_of(optimizer: object) -> dict[str, float]:
    """The numbers of the rules that helpers gave an optimizer, by the names that `--set` takes."""
    return dict(vars(optimizer).get(_MARK, {}))


def stock_class(optimizer: object) -> type:
    """The class that PyTorch ships, of an optimizer that helpers may have changed."""
    kinds = type(optimizer).__mro__
    return next((c for c in kinds if c.__module__ != torch_rules.__name__), type(optimizer))


def _marked(optimizer: torch.optim.Optimizer, **values: float) -> torch.optim.Optimizer:
    """The optimizer, which tells `describe` and `capture` of its rules."""
    vars(optimizer).setdefault(_MARK, {}).update(values)
    return optimizer


def _stepping(optimizer: torch.optim.Optimizer, update: Update) -> torch.optim.Optimizer:
    """The optimizer with another step, its groups, state and hooks as they are."""
    if "step" in vars(optimizer):
        raise CkptError.of(
            "unsupported-feature",
            "a scheduler has bound the optimizer's step already, which would go on as it was",
            "Call the helper before the scheduler is made.",
            loc=("optimizer", "step"),
        )
    stock = type(optimizer)
    # The object that others hold; `step` in its constructor's own class has the hooks already, not this one.
    optimizer.__class__ = stepping(stock, stock.__name__, update)
    optimizer._patch_step_function()
    return optimizer


def _check(optimizer: torch.optim.Optimizer, classes: tuple[str, ...], **numbers: float) -> None:
    """Raises: unsupported-feature for another class; usage for a number that is none."""
    torch = torch_module()
    if not isinstance(optimizer, torch.optim.Optimizer) or (
        classes and type(optimizer).__name__ not in classes
    ):
        expected = " or ".join(f"torch.optim.{name}" for name in classes) or "a PyTorch optimizer"
        raise CkptError.of(
            "unsupported-feature",
            f"expected {expected}, got {type(optimizer).__module__}.{type(optimizer).__qualname__}",
            "This helper changes the rule of that class alone.",
            loc=("optimizer",),
        )
    _check_numbers(**numbers)


def _check_numbers(**numbers: float) -> None:
    for name, value in numbers.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
            raise CkptError.of(
                "usage",
                f"{name} = {value!r}, expected a number of at least 0",
                "Pass the number that the report's line has.",
                loc=("optimizer", name),
            )
