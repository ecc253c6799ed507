"""One architecture in both frameworks: random values, a few updates, and the way across."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("KERAS_BACKEND", "tensorflow")

import keras
import numpy as np
import tensorflow as tf
import torch

import ckptconv
from ckptconv import Checkpoint

Array = np.ndarray[Any, np.dtype[Any]]
DECAY, EPSILON = 0.01, 1e-8
"""Adam minds the size of gradients beside its epsilon alone, which Keras adds to a root not yet corrected for
bias. So losses are sums: a mean over the logits of GPT-2 leaves gradients of the size of epsilon."""


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """How the users of either framework build the model, and what goes in."""

    name: str
    torch_model: Callable[[], Any]
    keras_model: Callable[[], Any]
    batch: Callable[[np.random.Generator], Any]
    """Inputs as Keras takes them, several as a tuple: images with their channels last."""
    prepared: Callable[[Any], Any] = field(default=lambda model: model)
    """What is done to a new torch model before its optimizer is made."""
    rate: float = 1e-5
    """Of learning: such that a few updates tell a fresh optimizer from one that goes on."""
    drift: float = 1e-4
    """How far a loss may be from the source's, relative to it: rounding grows with depth."""
    control: float = 10
    """How many times farther it is at least where the optimizer starts anew."""


def images(*shape: int) -> Callable[[np.random.Generator], Array]:
    """Batches of two images."""
    return lambda rng: rng.normal(size=(2, *shape)).astype(np.float32)


def tokens(vocabulary: int, length: int) -> Callable[[np.random.Generator], Array]:
    """Batches of two sequences."""
    return lambda rng: rng.integers(vocabulary, size=(2, length), dtype=np.int32)


def channels_first(x: Array) -> Array:
    return np.ascontiguousarray(np.moveaxis(x, -1, 1)) if x.ndim > 3 else x


def drawn(name: str, value: Array, rng: np.random.Generator) -> Array:
    """A value like the framework's own in which nothing is 0, 1 or equal to another."""
    if "var" in name:
        return rng.uniform(0.5, 1.5, size=value.shape)
    if "layer_scale" in name:
        return rng.uniform(0.05, 0.15, size=value.shape)
    return value + (0.1 * rng.normal(size=value.shape) if value.ndim < 2 else 0)


class TorchSide:
    """A PyTorch model with AdamW."""

    def __init__(self, architecture: Architecture, seed: int) -> None:
        torch.manual_seed(seed)
        rng = np.random.default_rng(seed)
        self.model = architecture.torch_model()
        self._rate = architecture.rate
        with torch.no_grad():
            for name, tensor in self.model.state_dict().items():
                if tensor.is_floating_point():
                    tensor.copy_(torch.from_numpy(drawn(name, tensor.numpy(), rng)))
        architecture.prepared(self.model)
        self.forget()

    def describe(self, x: Any) -> Checkpoint:
        return ckptconv.pytorch.describe(self.model, self.optimizer, inputs=self._given(x))

    def _given(self, x: Any) -> tuple[Any, ...]:
        return tuple(torch.from_numpy(channels_first(one)) for one in (x if isinstance(x, tuple) else (x,)))

    def output(self, x: Any) -> Array:
        self.model.eval()
        with torch.no_grad():
            out: Array = self.model(*self._given(x)).numpy()
        return np.moveaxis(out, 1, -1) if out.ndim > 3 else out

    def train(self, batches: Sequence[tuple[Any, Array]]) -> list[float]:
        self.model.train()
        losses = []
        for x, y in batches:
            self.optimizer.zero_grad()
            loss = torch.square(self.model(*self._given(x)) - torch.from_numpy(channels_first(y))).sum()
            loss.backward()
            self.optimizer.step()
            losses.append(float(loss.detach()))
        return losses

    def save(self, folder: Path) -> Path:
        state = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        torch.save(state, folder / "run.pt")
        return folder / "run.pt"

    def target(self, folder: Path) -> Path:
        return folder / "converted.pt"

    def load(self, path: Path) -> None:
        state = torch.load(path, weights_only=True, mmap=True)
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])

    def forget(self) -> None:
        """Go on with a fresh optimizer."""
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, self._rate, weight_decay=DECAY, eps=EPSILON)


class KerasSide:
    """A Keras model with AdamW."""

    def __init__(self, architecture: Architecture, seed: int) -> None:
        keras.utils.set_random_seed(seed)
        rng = np.random.default_rng(seed)
        self.model = architecture.keras_model()
        self._rate = architecture.rate
        for variable in self.model.variables:
            if "seed" not in variable.name:
                variable.assign(drawn(variable.path, variable.numpy(), rng))
        self.forget()

    def describe(self, x: Any) -> Checkpoint:
        return ckptconv.keras.describe(self.model, self.optimizer, inputs=x)

    def output(self, x: Any) -> Array:
        return np.asarray(self.model(x, training=False))

    def train(self, batches: Sequence[tuple[Any, Array]]) -> list[float]:
        losses = []
        for x, y in batches:
            with tf.GradientTape() as tape:
                loss = tf.reduce_sum(tf.square(self.model(x, training=True) - y))
            variables = self.model.trainable_variables
            self.optimizer.apply(tape.gradient(loss, [v.value for v in variables]), variables)
            losses.append(float(loss))
        return losses

    def save(self, folder: Path) -> Path:
        return Path(self._root().write(str(folder / "run")))

    def target(self, folder: Path) -> Path:
        return folder / "converted"

    def load(self, path: Path) -> None:
        self._root().read(str(path)).assert_consumed()

    def forget(self) -> None:
        """Go on with a fresh optimizer."""
        self.optimizer = keras.optimizers.AdamW(self._rate, weight_decay=DECAY, epsilon=EPSILON)
        self.optimizer.build(self.model.trainable_variables)

    def _root(self) -> Any:
        root = tf.train.Checkpoint(model=self.model, optimizer=self.optimizer)
        root.save_counter  # noqa: B018  makes the variable
        return root


def batches(architecture: Architecture, output: Array, count: int) -> Iterator[tuple[Any, Array]]:
    rng = np.random.default_rng(5)
    for _ in range(count):
        yield architecture.batch(rng), rng.normal(size=output.shape).astype(np.float32)


def distance(one: Array, other: Array) -> float:
    """The largest difference, relative to the largest value."""
    return float(np.abs(one - other).max() / np.abs(other).max())
