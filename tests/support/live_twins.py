"""Live models of one architecture in PyTorch and Keras: random weights, a few updates, outputs.

Both are trained on the same inputs with the mean squared error, so that the loss and its gradients are one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

import ckptconv
from tests.support.twins import framework

Array = np.ndarray[Any, np.dtype[Any]]

RATE, DECAY, EPSILON = 1e-2, 1e-2, 1e-7


@dataclass(frozen=True, kw_only=True)
class Twin:
    """One architecture, written in both frameworks."""

    torch: Callable[[], Any]
    keras: Callable[[Any], Any]
    """Gets the module `keras` or `tf_keras`."""
    shape: tuple[int, ...]
    """Of Keras' inputs, the batch first."""
    channels: bool = False
    """Whether torch has the last axis second."""

    def inputs(self, seed: int = 0) -> Array:
        return np.random.default_rng(seed).standard_normal(self.shape).astype(np.float32)

    def of_torch(self, model: Any, x: Array) -> Any:
        """PyTorch's outputs in Keras' order of axes."""
        tensor = torch.from_numpy(np.moveaxis(x, -1, 1).copy() if self.channels else x)
        out = model(tensor)
        return out.movedim(1, -1) if self.channels else out


def random_torch(model: Any, seed: int) -> Any:
    """The model with all its parameters random."""
    rng = np.random.default_rng(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.from_numpy(0.5 * rng.standard_normal(tuple(parameter.shape))))
    return model


def random_keras(model: Any, seed: int) -> Any:
    """The model with all its variables random."""
    rng = np.random.default_rng(seed)
    model.set_weights([0.5 * rng.standard_normal(array.shape) for array in model.get_weights()])
    return model


def torch_adamw(model: Any) -> Any:
    return torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], RATE, eps=EPSILON, weight_decay=DECAY
    )


def keras_adamw(kind: str, model: Any) -> Any:
    """AdamW with its epsilon where PyTorch has it."""
    optimizers = framework(kind).optimizers
    optimizer = optimizers.AdamW(RATE, epsilon=EPSILON, weight_decay=DECAY)
    optimizer = ckptconv.keras.corrected_epsilon(optimizer, EPSILON)
    optimizer.build(model.trainable_variables)
    return optimizer


def train_torch(twin: Twin, model: Any, optimizer: Any, updates: int, seed: int = 0) -> None:
    for step in range(updates):
        out = twin.of_torch(model, twin.inputs(seed + step))
        target = torch.from_numpy(target_of(tuple(out.shape), seed + step))
        optimizer.zero_grad()
        (out - target).square().mean().backward()
        optimizer.step()


def train_keras(twin: Twin, model: Any, optimizer: Any, updates: int, seed: int = 0) -> None:
    import tensorflow

    for step in range(updates):
        with tensorflow.GradientTape() as tape:
            out = model(twin.inputs(seed + step), training=True)
            loss = tensorflow.reduce_mean(tensorflow.square(out - target_of(tuple(out.shape), seed + step)))
        variables = model.trainable_variables
        optimizer.apply_gradients(zip(tape.gradient(loss, variables), variables, strict=True))


def target_of(shape: tuple[int, ...], seed: int) -> Array:
    return np.random.default_rng(1000 + seed).standard_normal(shape).astype(np.float32)


def apart(twin: Twin, torch_model: Any, keras_model: Any) -> float:
    """The largest difference of both models' outputs, relative to the largest output."""
    x = twin.inputs(99)
    ours = twin.of_torch(torch_model, x).detach().numpy()
    theirs = np.asarray(keras_model(x))
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())
