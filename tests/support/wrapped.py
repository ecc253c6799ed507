"""One small network in PyTorch and in Keras, trained with what stands around an optimizer.

A loss scaler, an average of the weights, accumulated gradients: each run takes batches one by one, tells its
numbers under one set of names, and is saved and loaded by its framework alone.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("KERAS_BACKEND", "tensorflow")

Array = np.ndarray[Any, np.dtype[Any]]
DECAY, RATE, MOMENTUM, GROWTH = 0.75, 0.0625, 0.875, 4
"""Numbers that float32 holds exactly: Keras keeps its settings in it."""


def batch(number: int) -> tuple[Array, Array]:
    """Batch number `number`, the same for every framework."""
    rng = np.random.default_rng(500 + number)
    return rng.normal(size=(8, 5)), rng.normal(size=(8, 2))


@dataclass(kw_only=True)
class Torch:
    """`Linear, BatchNorm, tanh, Linear` under SGD with momentum.

    `around` has arguments of a `scaler`, or says `average`, or how many batches `accumulate`.
    """

    seed: int
    around: Mapping[str, Any] = field(default_factory=dict)
    frozen: bool = False

    def __post_init__(self) -> None:
        import torch
        from torch import nn
        from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

        torch.manual_seed(self.seed)
        layers = (nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 2))
        self.model = nn.Sequential(*layers).double()
        if self.frozen:
            self.model[3].bias.requires_grad_(False)
        trained = [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]
        self.optimizer = torch.optim.SGD(trained, RATE, momentum=MOMENTUM)
        self.scaler = self.average = None
        if "scaler" in self.around:
            self.scaler = torch.amp.GradScaler("cpu", **self.around["scaler"])
        if "average" in self.around:
            self.average = AveragedModel(self.model, multi_avg_fn=get_ema_multi_avg_fn(DECAY))
        self.per_update, self.micro = int(self.around.get("accumulate", 1)), 0

    def take(self, number: int, *, overflow: bool = False) -> None:
        """One batch; with an infinite loss if it is to overflow."""
        import torch

        x, y = map(torch.from_numpy, batch(number))
        loss = (self.model(x) - y).square().mean() / self.per_update * (float("inf") if overflow else 1.0)
        (self.scaler.scale(loss) if self.scaler else loss).backward()
        self.micro += 1
        if self.micro % self.per_update:
            return
        if self.scaler:
            self.scaler.step(self.optimizer)
            self.scaler.update()
        else:
            self.optimizer.step()
        self.optimizer.zero_grad()
        if self.average is not None:
            self.average.update_parameters(self.model)

    def weights(self) -> dict[str, Array]:
        return {name: t.detach().numpy().copy() for name, t in self.model.named_parameters()}

    def averages(self) -> dict[str, Array]:
        assert self.average is not None
        return {name: t.detach().numpy().copy() for name, t in self.average.module.named_parameters()}

    def scaling(self) -> tuple[float, int]:
        assert self.scaler is not None
        return self.scaler.get_scale(), self.scaler._get_growth_tracker()

    def state(self) -> dict[str, Any]:
        parts = {"scaler": self.scaler, "ema": self.average}
        kept = {name: part.state_dict() for name, part in parts.items() if part is not None}
        return {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(), **kept}

    def save(self, folder: Path) -> Path:
        import torch

        folder.mkdir(parents=True, exist_ok=True)
        torch.save(self.state(), folder / "run.pt")
        return folder / "run.pt"

    def load(self, path: Path) -> Torch:
        import torch

        state = torch.load(path, weights_only=True)
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.scaler is not None:
            self.scaler.load_state_dict(state["scaler"])
        if self.average is not None:
            self.average.load_state_dict(state["ema"])
        return self


NAMES = {"0.weight": (0, "kernel"), "0.bias": (0, "bias"), "1.weight": (1, "gamma"), "1.bias": (1, "beta")}
NAMES |= {"3.weight": (3, "kernel"), "3.bias": (3, "bias")}
"""In the order of `model.trainable_variables`, by which Keras' own files have them."""


@dataclass(kw_only=True)
class Keras:
    """The same in Keras 3, tf_keras or tf_keras' legacy optimizers, by `kind`."""

    kind: str
    seed: int
    around: Mapping[str, Any] = field(default_factory=dict)
    frozen: bool = False

    def __post_init__(self) -> None:
        import importlib

        library = importlib.import_module("keras" if self.kind == "keras3" else "tf_keras")
        library.utils.set_random_seed(self.seed)
        kinds = [library.layers.Dense(4, dtype="float64")]
        kinds += [library.layers.BatchNormalization(momentum=0.9, epsilon=1e-5, dtype="float64")]
        kinds += [
            library.layers.Activation("tanh", dtype="float64"),
            library.layers.Dense(2, dtype="float64"),
        ]
        self.model = library.Sequential([library.Input((5,), dtype="float64"), *kinds])
        self.variables = {name: getattr(kinds[i], attribute) for name, (i, attribute) in NAMES.items()}
        for name, variable in self.variables.items():
            rng = np.random.default_rng([self.seed, *map(ord, name)])
            variable.assign(rng.normal(size=variable.shape))
        module = library.optimizers.legacy if self.kind == "tf_keras_legacy" else library.optimizers
        arguments = dict(self.around.get("more", {}))
        if "average" in self.around:
            arguments |= {"use_ema": True, "ema_momentum": DECAY}
        if "accumulate" in self.around:
            arguments |= {"gradient_accumulation_steps": self.around["accumulate"]}
        self.inner = self.optimizer = module.SGD(RATE, momentum=MOMENTUM, **arguments)
        if "scaler" in self.around:
            place = library.optimizers if self.kind == "keras3" else library.mixed_precision
            self.optimizer = place.LossScaleOptimizer(self.inner, **self.around["scaler"])
        self.trained = [v for name, v in self.variables.items() if not (self.frozen and name == "3.bias")]
        if self.kind == "tf_keras_legacy":
            self.optimizer._create_all_weights(self.trained)
        else:
            self.optimizer.build(self.trained)

    def take(self, number: int, *, overflow: bool = False) -> None:
        import tensorflow as tf

        x, y = map(tf.constant, batch(number))
        scaled = "scaler" in self.around
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(tf.square(self.model(x, training=True) - y))
            loss *= tf.constant(float("inf") if overflow else 1.0, tf.float64)
            if scaled:
                keras3 = self.kind == "keras3"
                loss = self.optimizer.scale_loss(loss) if keras3 else self.optimizer.get_scaled_loss(loss)
        gradients = tape.gradient(loss, self.trained)
        if scaled and self.kind != "keras3":
            gradients = self.optimizer.get_unscaled_gradients(gradients)
        self.optimizer.apply_gradients(zip(gradients, self.trained, strict=True))

    def weights(self) -> dict[str, Array]:
        return _in_torch(self.variables.values())

    def averages(self) -> dict[str, Array]:
        return _in_torch(self.inner._model_variables_moving_average)

    def sums(self) -> dict[str, Array]:
        """The accumulated gradients."""
        return _in_torch(self.inner._accumulated_gradients)

    def scaling(self) -> tuple[float, int]:
        if self.kind == "keras3":
            return float(self.optimizer.dynamic_scale), int(self.optimizer.step_counter)
        return float(self.optimizer.loss_scale), int(self.optimizer.dynamic_counter)

    def save(self, folder: Path) -> Path:
        import tensorflow as tf

        folder.mkdir(parents=True, exist_ok=True)
        path = tf.train.Checkpoint(model=self.model, optimizer=self.optimizer).save(str(folder / "ckpt"))
        return Path(path)

    def load(self, path: Path) -> Keras:
        import tensorflow as tf

        tf.train.Checkpoint(model=self.model, optimizer=self.optimizer).restore(str(path)).assert_consumed()
        return self


def _in_torch(variables: Iterable[Any]) -> dict[str, Array]:
    """Arrays in the order of `NAMES`, in PyTorch's layout under its names."""
    arrays = [np.array(variable.numpy()) for variable in variables]
    return {name: a.T if a.ndim == 2 else a for name, a in zip(NAMES, arrays, strict=False)}


def apart(ours: Mapping[str, Array], theirs: Mapping[str, Array], before: Mapping[str, Array]) -> float:
    """The largest difference, relative to the largest distance that `theirs` has travelled."""
    travelled = max(float(np.abs(theirs[name] - before[name]).max()) for name in theirs)
    assert travelled > 0
    return max(float(np.abs(ours[name] - theirs[name]).max()) for name in theirs) / travelled


def keras_file(side: Keras, path: Path, *, load: bool = False) -> Path:
    """The model and its optimizer in Keras' own file, `.keras` or `.weights.h5`; or loaded from one."""
    side.model.compile(side.optimizer, "mse")
    if not load:
        path.parent.mkdir(parents=True, exist_ok=True)
        (side.model.save if path.suffix == ".keras" else side.model.save_weights)(str(path))
    elif path.suffix != ".keras":
        side.model.load_weights(str(path))
    else:
        import importlib

        library = importlib.import_module("keras" if side.kind == "keras3" else "tf_keras")
        side.model = library.saving.load_model(str(path))
        kinds = side.model.layers
        side.variables = {name: getattr(kinds[i], attribute) for name, (i, attribute) in NAMES.items()}
        side.trained = [v for name, v in side.variables.items() if not (side.frozen and name == "3.bias")]
        side.optimizer = side.model.optimizer
        side.inner = getattr(side.optimizer, "inner_optimizer", side.optimizer)
    return path
