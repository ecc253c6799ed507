"""Updates of one parameter by rules that PyTorch's classes do not have, with the keys of their state."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import ModuleType
from typing import TYPE_CHECKING

from ckptconv.errors import missing_extra

if TYPE_CHECKING:
    import torch

State = dict[str, "torch.Tensor"]
Settings = dict[str, object]
Update = Callable[["torch.Tensor", State, Settings], None]


def stepping(base: type, name: str, update: Update) -> type:
    """A subclass of a PyTorch optimizer whose step is `update` of every parameter that has a gradient."""
    module = torch_module()

    @module.no_grad()  # type: ignore[untyped-decorator]  # of a lazy module
    def step(self: torch.optim.Optimizer, closure: object = None) -> object:
        loss = None
        if callable(closure):
            with module.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    update(parameter, self.state[parameter], group)
        return loss

    return type(name, (base,), {"step": step, "__module__": __name__})


def rmsprop_inside(epsilon: float) -> Update:
    """v = alpha v + (1 - alpha) g^2; b = momentum b + g / sqrt(v [- a^2] + epsilon); p -= lr b."""

    def update(parameter: torch.Tensor, state: State, group: Settings) -> None:
        torch = torch_module()
        alpha, rate, mu = (_number(group, name) for name in ("alpha", "lr", "momentum"))
        gradient = _gradient(parameter, group)
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

    return update


def adamax_after_max(epsilon: float) -> Update:
    """u = max(beta_2 u, |g|); p -= lr / (1 - beta_1^t) m / (u + epsilon)."""

    def update(parameter: torch.Tensor, state: State, group: Settings) -> None:
        torch = torch_module()
        beta_1, beta_2 = _betas(group)
        gradient = _gradient(parameter, group)
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_inf"] = torch.zeros_like(parameter)
        state["step"] += 1
        mean = state["exp_avg"].lerp_(gradient, 1 - beta_1)
        norm = state["exp_inf"].mul_(beta_2)
        torch.maximum(norm, gradient.abs(), out=norm)
        rate = _number(group, "lr") / (1 - beta_1 ** float(state["step"]))
        parameter.addcdiv_(mean, norm + epsilon, value=-rate)

    return update


def lion(parameter: torch.Tensor, state: State, group: Settings) -> None:
    """p *= 1 - lr weight_decay; p -= lr sign(beta_1 m + (1 - beta_1) g); m = beta_2 m + (1 - beta_2) g."""
    torch = torch_module()
    beta_1, beta_2 = _betas(group)
    rate, decay = _number(group, "lr"), _number(group, "weight_decay")
    gradient = parameter.grad
    assert gradient is not None
    if "exp_avg" not in state:
        state["exp_avg"] = torch.zeros_like(parameter)
    mean = state["exp_avg"]
    parameter.mul_(1 - rate * decay)
    parameter.add_(mean.lerp(gradient, 1 - beta_1).sign_(), alpha=-rate)
    mean.lerp_(gradient, 1 - beta_2)


def muon_full(parameter: torch.Tensor, state: State, group: Settings) -> None:
    """PyTorch's Muon with Keras' Newton-Schulz: in the parameter's precision, of x / (|x| + 1e-7).

    The 1e-7 stands beside the norm of Keras' buffer, which is 1 / (1 - momentum) times PyTorch's.
    """
    torch = torch_module()
    momentum, rate = _number(group, "momentum"), _number(group, "lr")
    gradient = parameter.grad
    assert gradient is not None
    if "momentum_buffer" not in state:
        state["momentum_buffer"] = torch.zeros_like(gradient)
    mean = state["momentum_buffer"].lerp_(gradient, 1 - momentum)
    step = gradient.lerp(mean, momentum) if group["nesterov"] else mean
    tall = step.size(0) > step.size(1)
    x = step.T if tall else step
    x = x / (x.norm() + 1e-7 * (1 - momentum))
    coefficients = group["ns_coefficients"]
    assert isinstance(coefficients, (tuple, list))
    a, b, c = map(float, coefficients)
    for _ in range(int(_number(group, "ns_steps"))):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    rows, columns = parameter.shape
    wide = 0.2 * math.sqrt(max(rows, columns))
    scale = wide if group["adjust_lr_fn"] == "match_rms_adamw" else math.sqrt(max(1, rows / columns))
    parameter.mul_(1 - rate * _number(group, "weight_decay"))
    parameter.add_(x.T if tall else x, alpha=-rate * scale)


def _gradient(parameter: torch.Tensor, group: Settings) -> torch.Tensor:
    gradient = parameter.grad
    assert gradient is not None
    gradient = -gradient if group["maximize"] else gradient
    if group["weight_decay"]:
        gradient = gradient.add(parameter, alpha=_number(group, "weight_decay"))
    return gradient


def _number(group: Settings, name: str) -> float:
    return float(group[name])  # type: ignore[arg-type]  # torch lets a rate be a tensor


def _betas(group: Settings) -> tuple[float, float]:
    betas = group["betas"]
    assert isinstance(betas, (tuple, list))
    return float(betas[0]), float(betas[1])


def torch_module() -> ModuleType:
    """PyTorch. Raises: missing-dependency."""
    try:
        import torch
    except ImportError as error:
        raise missing_extra("torch", "torch", "ckptconv.pytorch") from error
    return torch
