"""The same two models in PyTorch, Keras 3 and tf_keras, trained eagerly on the same batches.

Each side has `save`, `restore`, `train` and `weights`; weights come out in PyTorch's layout under one set of
names, by a table of this file that knows nothing of ckptconv. The convolution's activation is smooth: with
a kink, one activation that rounds to the other side of it parts the runs by more than any conversion does.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("KERAS_BACKEND", "tensorflow")

BATCH, CLASSES, TOKENS, SIDE = 16, 4, 12, 4
LEARNING_RATE = {"sgd": 0.05, "momentum": 0.02, "nesterov": 0.02, "adam": 0.01, "adamw": 0.01}
SCALE = {"emb.weight": 0.6, "conv.weight": 0.1, "fc.weight": 0.8}
"""Of initial weights: gradients well above epsilon, as in a real run (behind a norm they fall with it)."""
EPSILON, WEIGHT_DECAY = 1e-7, 0.05

Array = np.ndarray[Any, np.dtype[Any]]


def batches(model: str, first: int, count: int) -> Iterator[tuple[Array, Array]]:
    """Batches number `first` to `first + count`, the same for every framework."""
    for number in range(first, first + count):
        rng = np.random.default_rng(1000 + number)
        labels = rng.integers(0, CLASSES, BATCH)
        if model == "mlp":
            yield rng.normal(size=(BATCH, 8)).astype("f4"), labels
        else:
            yield rng.integers(0, TOKENS, (BATCH, SIDE * SIDE)), labels


def initial(model: str, seed: int) -> dict[str, Array]:
    """Random and distinct values for every parameter, in PyTorch's layout."""
    shapes = {
        "mlp": {"fc1.weight": (16, 8), "fc1.bias": (16,), "fc2.weight": (4, 16), "fc2.bias": (4,)},
        "cnn": {
            "emb.weight": (TOKENS, 5),
            "conv.weight": (6, 5, 3, 3),
            "bn.weight": (6,),
            "bn.bias": (6,),
            "fc.weight": (CLASSES, 6),
            "fc.bias": (CLASSES,),
        },
    }[model]
    rng = np.random.default_rng(seed)
    return {
        name: (rng.normal(size=shape) * SCALE.get(name, 0.4) + float(name == "bn.weight")).astype("f4")
        for name, shape in shapes.items()
    }


@dataclass
class Side:
    """A model with its optimizer in one framework."""

    train: Callable[[int, int], list[float]]
    weights: Callable[[], dict[str, Array]]
    save: Callable[[Path], Path]
    restore: Callable[[Path], None]
    step: Callable[[], int]
    forget_slots: Callable[[], None]
    forget_step: Callable[[], None]


def torch_side(model_name: str, optimizer_name: str, seed: int) -> Side:
    import torch
    from torch import nn

    torch.set_num_threads(1)

    class Mlp(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc1, self.fc2 = nn.Linear(8, 16), nn.Linear(16, CLASSES)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fc2(torch.relu(self.fc1(x)))

    class Cnn(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.emb = nn.Embedding(TOKENS, 5)
            self.conv = nn.Conv2d(5, 6, 3, padding=1, bias=False)
            self.bn = nn.BatchNorm2d(6, eps=1e-3, momentum=0.01)
            self.fc = nn.Linear(6, CLASSES)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.emb(x).reshape(BATCH, SIDE, SIDE, 5).permute(0, 3, 1, 2)
            return self.fc(torch.tanh(self.bn(self.conv(x))).mean((2, 3)))

    model = Mlp() if model_name == "mlp" else Cnn()
    with torch.no_grad():
        for name, value in initial(model_name, seed).items():
            model.get_parameter(name).copy_(torch.from_numpy(value))
    rate = LEARNING_RATE[optimizer_name]
    optimizer = {
        "sgd": lambda p: torch.optim.SGD(p, lr=rate),
        "momentum": lambda p: torch.optim.SGD(p, lr=rate, momentum=0.9),
        "nesterov": lambda p: torch.optim.SGD(p, lr=rate, momentum=0.9, nesterov=True),
        "adam": lambda p: torch.optim.Adam(p, lr=rate, eps=EPSILON),
        "adamw": lambda p: torch.optim.AdamW(p, lr=rate, eps=EPSILON, weight_decay=WEIGHT_DECAY),
    }[optimizer_name](model.parameters())
    loss_of = nn.CrossEntropyLoss()

    def train(first: int, count: int) -> list[float]:
        model.train()
        losses = []
        for x, y in batches(model_name, first, count):
            optimizer.zero_grad()
            loss = loss_of(model(torch.from_numpy(x)), torch.from_numpy(y))
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
        return losses

    def save(directory: Path) -> Path:
        path = directory / "run.pt"
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, path)
        return path

    def restore(path: Path) -> None:
        state = torch.load(path, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])

    def step() -> int:
        steps = {int(s["step"]) for s in optimizer.state.values() if "step" in s}
        return steps.pop() if len(steps) == 1 else -1

    def forget_slots() -> None:
        for state in optimizer.state.values():
            for key in state:
                if key != "step" and state[key] is not None:
                    state[key].zero_()

    def forget_step() -> None:
        for state in optimizer.state.values():
            state["step"].zero_()

    return Side(
        train=train,
        weights=lambda: {n: p.detach().numpy().copy() for n, p in model.named_parameters()},
        save=save,
        restore=restore,
        step=step,
        forget_slots=forget_slots,
        forget_step=forget_step,
    )


def keras_side(kind: str, model_name: str, optimizer_name: str, seed: int) -> Side:
    """`kind`: keras3, tf_keras or tf_keras_legacy; epsilon as the conversion from PyTorch requires it."""
    import tensorflow as tf

    if kind == "keras3":
        import keras

        kl, ko = keras.layers, keras.optimizers
    else:
        import tf_keras as keras

        kl = keras.layers
        ko = keras.optimizers.legacy if kind == "tf_keras_legacy" else keras.optimizers

    if model_name == "mlp":
        model = keras.Sequential(
            [keras.Input((8,)), kl.Dense(16, activation="relu"), kl.Dense(CLASSES)], name="net"
        )
    else:
        model = keras.Sequential(
            [
                keras.Input((SIDE * SIDE,), dtype="int64"),
                kl.Embedding(TOKENS, 5),
                kl.Reshape((SIDE, SIDE, 5)),
                kl.Conv2D(6, 3, padding="same", use_bias=False),
                kl.BatchNormalization(epsilon=1e-3, momentum=0.99),
                kl.Activation("tanh"),
                kl.GlobalAveragePooling2D(),
                kl.Dense(CLASSES),
            ],
            name="net",
        )
    layout = {2: (1, 0), 4: (3, 2, 0, 1)}
    names = list(initial(model_name, seed))
    variables = dict(zip(names, model.trainable_variables, strict=True))
    for name, value in initial(model_name, seed).items():
        if name != "emb.weight" and value.ndim in layout:
            value = value.transpose(np.argsort(layout[value.ndim]))
        variables[name].assign(value)
    rate = LEARNING_RATE[optimizer_name]
    adaptive = {"adaptive_epsilon": True} if kind == "tf_keras" and optimizer_name == "adam" else {}
    optimizer = {
        "sgd": lambda: ko.SGD(rate),
        "momentum": lambda: ko.SGD(rate, momentum=0.9),
        "nesterov": lambda: ko.SGD(rate, momentum=0.9, nesterov=True),
        "adam": lambda: ko.Adam(rate, epsilon=EPSILON, **adaptive),
        "adamw": lambda: ko.AdamW(rate, epsilon=EPSILON, weight_decay=WEIGHT_DECAY),
    }[optimizer_name]()
    if kind == "tf_keras_legacy":
        optimizer.iterations  # noqa: B018  creates the counter
        optimizer._create_all_weights(model.trainable_variables)
    else:
        optimizer.build(model.trainable_variables)
    loss_of = keras.losses.SparseCategoricalCrossentropy(from_logits=True)

    def train(first: int, count: int) -> list[float]:
        losses = []
        for x, y in batches(model_name, first, count):
            with tf.GradientTape() as tape:
                loss = loss_of(y, model(x, training=True))
            # Densified: Keras 3 squares an embedding's gradients before summing duplicates.
            gradients = [tf.convert_to_tensor(g) for g in tape.gradient(loss, model.trainable_variables)]
            optimizer.apply_gradients(zip(gradients, model.trainable_variables, strict=True))
            losses.append(float(loss))
        return losses

    def weights() -> dict[str, Array]:
        result = {}
        for name, variable in variables.items():
            value = variable.numpy().copy()
            turned = value.ndim in layout and name != "emb.weight"
            result[name] = value.transpose(layout[value.ndim]) if turned else value
        return result

    def state() -> Any:
        return tf.train.Checkpoint(model=model, optimizer=optimizer)

    def forget_slots() -> None:
        if kind == "tf_keras_legacy":
            kept = {"iter", "learning_rate", "decay", "beta_1", "beta_2", "momentum"}
            for variable in optimizer.weights[1:]:
                assert variable.name.split(":")[0] not in kept
                variable.assign(tf.zeros_like(variable))
            return
        skip = 2 if kind == "keras3" else 1
        for variable in list(optimizer.variables)[skip:]:
            if variable.shape.rank if hasattr(variable.shape, "rank") else len(variable.shape):
                variable.assign(tf.zeros(variable.shape))

    return Side(
        train=train,
        weights=weights,
        save=lambda directory: Path(state().save(str(directory / "ckpt"))),
        restore=lambda path: state().restore(str(path)).assert_consumed(),
        step=lambda: int(optimizer.iterations.numpy()),
        forget_slots=forget_slots,
        forget_step=lambda: optimizer.iterations.assign(0),
    )


def side(kind: str, model_name: str, optimizer_name: str, seed: int) -> Side:
    if kind == "torch":
        return torch_side(model_name, optimizer_name, seed)
    return keras_side(kind, model_name, optimizer_name, seed)
