"""PyTorch optimizers that follow Keras' rule to the last digit, where the stock class comes near.

Each function changes an optimizer, by hooks or (`inside_epsilon`) by a subclass, and returns it. The state's
keys and the groups are the stock class's: a converted file loads with `load_state_dict`. Call them before a
scheduler is made.
"""

from __future__ import annotations

import math
from types import ModuleType
from typing import TYPE_CHECKING

from ckptconv.errors import CkptError, missing_extra

if TYPE_CHECKING:
    import torch


def raw_epsilon(optimizer: torch.optim.Optimizer, epsilon: float) -> torch.optim.Optimizer:
    """Adam or AdamW with Keras' rule, epsilon beside the raw root: `epsilon / sqrt(1 - beta_2^t)` here.

    Raises: unequal-steps in an update, where the parameters of a group have done different numbers of them.
    """
    _check(optimizer, ("Adam", "AdamW"), epsilon=epsilon)
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
    no_grad = _torch().no_grad

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
    torch = _torch()

    class RMSprop(torch.optim.RMSprop):  # type: ignore[misc, name-defined]  # a class of a lazy module
        """v = alpha v + (1 - alpha) g^2; b = momentum b + g / sqrt(v [- a^2] + epsilon); p -= lr b."""

        @torch.no_grad()  # type: ignore[untyped-decorator]  # as above
        def step(self, closure: object = None) -> object:
            loss = None
            if callable(closure):
                with torch.enable_grad():
                    loss = closure()
            for group in self.param_groups:
                for parameter in group["params"]:
                    if parameter.grad is not None:
                        _rmsprop_update(parameter, self.state[parameter], group, epsilon)
            return loss

    if "step" in vars(optimizer):
        raise CkptError.of(
            "unsupported-feature",
            "a scheduler has bound the optimizer's step already, which would go on as it was",
            "Call the helper before the scheduler is made.",
            loc=("optimizer", "step"),
        )
    optimizer.__class__ = RMSprop  # the object that others hold, with its groups, state and hooks
    optimizer._patch_step_function()  # runs the hooks; the constructor did it for the class before
    return optimizer


def _rmsprop_update(
    parameter: torch.Tensor, state: dict[str, torch.Tensor], group: dict[str, object], epsilon: float
) -> None:
    """One update of one parameter; its state has torch's own keys."""
    torch = _torch()
    alpha, rate, mu = (float(str(group[name])) for name in ("alpha", "lr", "momentum"))
    gradient = parameter.grad
    assert gradient is not None
    gradient = -gradient if group["maximize"] else gradient
    if group["weight_decay"]:
        gradient = gradient.add(parameter, alpha=float(str(group["weight_decay"])))
    if not state:
        state["step"] = torch.zeros((), dtype=torch.float32)
        state["square_avg"] = torch.zeros_like(parameter)
        if mu > 0:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        if group["centered"]:
            state["grad_avg"] = torch.zeros_like(parameter)
    state["step"] += 1
    mean = state["square_avg"].mul_(alpha).addcmul_(gradient, gradient, value=1 - alpha)
    if group["centered"]:
        average = state["grad_avg"].lerp_(gradient, 1 - alpha)
        mean = mean.addcmul(average, average, value=-1)
    step = gradient / (mean + epsilon).sqrt_()
    if mu > 0:
        step = state["momentum_buffer"].mul_(mu).add_(step)
    parameter.add_(step, alpha=-rate)


def _check(optimizer: torch.optim.Optimizer, classes: tuple[str, ...], **numbers: float) -> None:
    """Raises: unsupported-feature for another class; usage for a number that is none."""
    torch = _torch()
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
    for name, value in numbers.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
            raise CkptError.of(
                "usage",
                f"{name} = {value!r}, expected a number of at least 0",
                "Pass the number that the report's line has.",
                loc=("optimizer", name),
            )


def _torch() -> ModuleType:
    try:
        import torch
    except ImportError as error:
        raise missing_extra("torch", "torch", "ckptconv.pytorch") from error
    return torch
