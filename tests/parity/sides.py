"""One model in PyTorch, Keras 3 and tf_keras, in float64 or float32, with any optimizer of the catalog.

Constructor arguments come from the catalog's rows; those of a converted Keras optimizer are the line that the
report says the target's code must have. Weights come out in PyTorch's layout by a table of this file. All
numbers are rounded to float32 first: Keras passes hyperparameters through float32 in float64 models too.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

import numpy as np

import ckptconv
from ckptconv.catalog.optimizer_rows import FRAMEWORKS, Row, row
from ckptconv.catalog.parts import Part
from ckptconv.document import Value

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("KERAS_BACKEND", "tensorflow")

Array = np.ndarray[Any, np.dtype[Any]]
BATCH, CLASSES, TOKENS, SPAN = 16, 4, 12, 4
SHAPES: Mapping[str, Mapping[str, tuple[int, ...]]] = {
    "mlp": {"fc1.weight": (16, 8), "fc1.bias": (16,), "fc2.weight": (4, 16), "fc2.bias": (4,)},
    "cnn": {
        "emb.weight": (TOKENS, 5),
        "conv.weight": (6, 5, 3, 3),
        "bn.weight": (6,),
        "bn.bias": (6,),
        "fc.weight": (CLASSES, 6),
        "fc.bias": (CLASSES,),
    },
}
SCALE = {"emb.weight": 0.6, "conv.weight": 0.1, "fc.weight": 0.8}
GAIN = {"mlp": 1.0, "cnn": 3.0}
"""What a loss is multiplied by: behind a normalization gradients are three times smaller, and an epsilon
would weigh three times as much as in the dense model, of which the limits were measured."""
EAGER = frozenset({("tf_keras", "nadam")})
"""Classes that follow another rule in a compiled step: a Python number of theirs is fixed there."""
FLOATX = frozenset({("keras3", "muon")})
"""Classes that mix numbers of Keras' `floatx` in: it has to be that of the model."""
FIXED = frozenset({"rms_rate"})
"""Hyperparameters that Keras does not pass through float32, and PyTorch has fixed in float64."""
LAYOUT = {2: (1, 0), 4: (3, 2, 0, 1)}
"""Axes of a Keras kernel in PyTorch's order, by rank."""


class Side(Protocol):
    """A model with its optimizer in one framework."""

    def train(self, first: int, count: int) -> list[float]: ...
    def weights(self) -> dict[str, Array]: ...
    def save(self, directory: Path) -> Path: ...
    def restore(self, path: Path) -> None: ...
    def steps(self) -> set[int]: ...
    def forget_step(self) -> None: ...
    def forget_slots(self) -> None: ...
    def put(self, weights: Mapping[str, Array]) -> None: ...


def batch(model: str, number: int, dtype: str) -> tuple[Array, Array]:
    """Batch number `number`, the same for every framework."""
    rng = np.random.default_rng(1000 + number)
    labels = rng.integers(0, CLASSES, BATCH)
    if model == "mlp":
        return rng.normal(size=(BATCH, 8)).astype("f4").astype(dtype), labels
    return rng.integers(0, TOKENS, (BATCH, SPAN * SPAN)), labels


def initial(model: str, seed: int, dtype: str) -> dict[str, Array]:
    """Random and distinct values for every parameter, in PyTorch's layout."""
    rng = np.random.default_rng(seed)
    return {
        name: (rng.normal(size=shape) * SCALE.get(name, 0.4) + (name == "bn.weight"))
        .astype("f4")
        .astype(dtype)
        for name, shape in SHAPES[model].items()
    }


def part_of(algorithm: str) -> Part | None:
    """The other algorithm within the algorithm's class, of the framework where it is one class."""
    rows = (row(algorithm, framework) for framework in FRAMEWORKS)
    return next((known.part for known in rows if known is not None and known.part is not None), None)


def hypers_of_part(part: Part, hypers: Mapping[str, Value]) -> dict[str, Value]:
    """What the class of the part alone is told for the whole class's hyperparameters."""
    own = {name: hypers[ours] for name, ours in part.hyperparameters.items()}
    ratio = hypers[part.rate]
    assert isinstance(ratio, (int, float))
    for name, factor in (("learning_rate", ratio), ("weight_decay", 1 / ratio)):
        value = own.get(name, hypers[name])
        assert isinstance(value, (int, float))
        own[name] = value * factor
    return own


def rounded(value: Value) -> Value:
    return float(np.float32(value)) if isinstance(value, float) else value


def arguments(known: Row, hypers: Mapping[str, Value]) -> dict[str, Any]:
    """Constructor arguments of a class, by the catalog's row."""
    indexed: dict[str, dict[int, Value]] = {}
    plain: dict[str, Any] = {}
    for name, value in hypers.items():
        entry = known.hyperparameters.get(name)
        if entry is None or entry.argument is None:
            continue
        if entry.index is None:
            plain[entry.argument] = value if name in FIXED else rounded(value)
        else:
            indexed.setdefault(entry.argument, {})[entry.index] = rounded(value)
    return {**plain, **{name: tuple(parts[i] for i in sorted(parts)) for name, parts in indexed.items()}}


class TorchSide:
    """The model in PyTorch."""

    def __init__(
        self,
        model: str,
        algorithm: str,
        hypers: Mapping[str, Value],
        seed: int,
        dtype: str,
        helpers: Mapping[str, str],
    ) -> None:
        import torch
        from torch import nn

        torch.set_num_threads(1)

        class Mlp(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.fc1, self.fc2 = nn.Linear(8, 16), nn.Linear(16, CLASSES)

            def forward(self, x: Any) -> Any:
                return self.fc2(torch.relu(self.fc1(x)))

        class Cnn(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.emb = nn.Embedding(TOKENS, 5)
                self.conv = nn.Conv2d(5, 6, 3, padding=1, bias=False)
                self.bn = nn.BatchNorm2d(6, eps=1e-3, momentum=0.01)
                self.fc = nn.Linear(6, CLASSES)

            def forward(self, x: Any) -> Any:
                x = self.emb(x).reshape(BATCH, SPAN, SPAN, 5).permute(0, 3, 1, 2)
                return self.fc(torch.tanh(self.bn(self.conv(x))).mean((2, 3)))

        self.torch, self.name, self.dtype = torch, model, dtype
        self.model = (Mlp() if model == "mlp" else Cnn()).to(getattr(torch, dtype))
        self.put(initial(model, seed, dtype))
        named, part = dict(self.model.named_parameters()), part_of(algorithm)
        if part is None:
            self.optimizers = {"optimizer": self._made(algorithm, [*named.values()], hypers)}
            return
        ours = [(name, p) for name, p in named.items() if p.ndim == 2 and not name.startswith("emb")]
        theirs = [(name, p) for name, p in named.items() if name not in dict(ours)]
        self.optimizers = {
            algorithm: self._made(algorithm, ours, hypers),
            part.algorithm: self._made(part.algorithm, theirs, hypers_of_part(part, hypers)),
        }
        for name, call in helpers.items():
            told = {"ckptconv": ckptconv, "optimizer": self.optimizers[name]}
            self.optimizers[name] = eval(call, told)  # of cases.json

    def _made(self, algorithm: str, parameters: Sequence[Any], hypers: Mapping[str, Value]) -> Any:
        known = row(algorithm, "torch")
        assert known is not None
        cls: Any = {"torch": self.torch, "ckptconv": ckptconv}[known.class_name.partition(".")[0]]
        for part in known.class_name.split(".")[1:]:
            cls = getattr(cls, part)
        return cls(parameters, **arguments(known, hypers))

    @property
    def optimizer(self) -> Any:
        """The only one."""
        return self.optimizers["optimizer"]

    @optimizer.setter
    def optimizer(self, made: Any) -> None:
        self.optimizers = {"optimizer": made}

    def _states(self) -> list[dict[str, Any]]:
        """Of every parameter that has one."""
        return [state for optimizer in self.optimizers.values() for state in optimizer.state.values()]

    def put(self, weights: Mapping[str, Array]) -> None:
        with self.torch.no_grad():
            for name, value in weights.items():
                self.model.get_parameter(name).copy_(self.torch.from_numpy(value))

    def train(self, first: int, count: int) -> list[float]:
        losses = []
        for number in range(first, first + count):
            x, y = batch(self.name, number, self.dtype)
            self.model.zero_grad()
            loss = self.torch.nn.functional.cross_entropy(
                self.model(self.torch.from_numpy(x)), self.torch.from_numpy(y)
            )
            (loss * GAIN[self.name]).backward()
            for optimizer in self.optimizers.values():
                optimizer.step()
            losses.append(float(loss.detach()))
        return losses

    def weights(self) -> dict[str, Array]:
        return {name: p.detach().numpy().copy() for name, p in self.model.named_parameters()}

    def save(self, directory: Path) -> Path:
        path = directory / "run.pt"
        states = {name: optimizer.state_dict() for name, optimizer in self.optimizers.items()}
        self.torch.save({"model": self.model.state_dict(), **states}, path)
        return path

    def restore(self, path: Path) -> None:
        state = self.torch.load(path, weights_only=True)
        self.model.load_state_dict(state["model"])
        for name, optimizer in self.optimizers.items():
            optimizer.load_state_dict(state[name])

    def steps(self) -> set[int]:
        return {int(state["step"]) for state in self._states() if "step" in state}

    def forget_step(self) -> None:
        for state in self._states():
            if "step" in state:
                state["step"].zero_()

    def forget_slots(self) -> None:
        for state in self._states():
            for key in state.keys() - {"step"}:
                state[key].zero_()


class KerasSide:
    """The model in Keras 3 or tf_keras, its optimizer by the catalog's arguments or by a line of code."""

    def __init__(
        self,
        kind: str,
        model: str,
        algorithm: str,
        hypers: Mapping[str, Value],
        seed: int,
        dtype: str,
        code: Sequence[str] = (),
    ) -> None:
        import keras as keras3
        import tensorflow as tf
        import tf_keras

        self.tf, self.kind, self.name, self.dtype = tf, kind, model, dtype
        keras = keras3 if kind == "keras3" else tf_keras
        kl = keras.layers
        if model == "mlp":
            layers = [kl.Dense(16, activation="relu", dtype=dtype), kl.Dense(CLASSES, dtype=dtype)]
            shape, inputs = (8,), dtype
        else:
            layers = [
                kl.Embedding(TOKENS, 5, dtype=dtype),
                kl.Reshape((SPAN, SPAN, 5), dtype=dtype),
                kl.Conv2D(6, 3, padding="same", use_bias=False, dtype=dtype),
                kl.BatchNormalization(epsilon=1e-3, momentum=0.99, dtype=dtype),
                kl.Activation("tanh", dtype=dtype),
                kl.GlobalAveragePooling2D(dtype=dtype),
                kl.Dense(CLASSES, dtype=dtype),
            ]
            shape, inputs = (SPAN * SPAN,), "int64"
        self.model = keras.Sequential([keras.Input(shape, dtype=inputs), *layers], name="net")
        self.variables = dict(zip(SHAPES[model], self.model.trainable_variables, strict=True))
        self.put(initial(model, seed, dtype))
        self.floatx = dtype if (kind, algorithm) in FLOATX else keras3.config.floatx()
        with self._in_floatx():
            self._make(algorithm, hypers, code)
        self._update = self._one if (kind, algorithm) in EAGER else tf.function(self._one, autograph=False)

    def _make(self, algorithm: str, hypers: Mapping[str, Value], code: Sequence[str]) -> None:
        """The optimizer with its variables."""
        import keras as keras3
        import tf_keras

        kind = self.kind
        line = next((text for text in code if not text.startswith("#")), "")
        if line:
            self.optimizer = eval(line, {"keras": keras3, "tf_keras": tf_keras})  # the report's own line
        else:
            known = row(algorithm, kind)
            assert known is not None
            cls: Any = {"keras": keras3, "tf_keras": tf_keras}[known.class_name.partition(".")[0]]
            for part in known.class_name.split(".")[1:]:
                cls = getattr(cls, part)
            self.optimizer = cls(**arguments(known, hypers))
        self.after = [text for text in code[1:] if text.startswith("optimizer.")]
        if kind == "tf_keras_legacy":
            self.optimizer.iterations  # noqa: B018  creates the counter
            self.optimizer._create_all_weights(self.model.trainable_variables)
        else:
            self.optimizer.build(self.model.trainable_variables)

    @contextmanager
    def _in_floatx(self) -> Iterator[None]:
        from keras import config

        before = config.floatx()
        config.set_floatx(self.floatx)
        yield
        config.set_floatx(before)

    def put(self, weights: Mapping[str, Array]) -> None:
        for name, value in weights.items():
            turned = name != "emb.weight" and value.ndim in LAYOUT
            self.variables[name].assign(value.transpose(np.argsort(LAYOUT[value.ndim])) if turned else value)

    def train(self, first: int, count: int) -> list[float]:
        numbers = range(first, first + count)
        batches = (batch(self.name, number, self.dtype) for number in numbers)
        with self._in_floatx():
            return [float(self._update(self.tf.constant(x), self.tf.constant(y))) for x, y in batches]

    def _one(self, x: Any, y: Any) -> Any:
        tf, variables = self.tf, self.model.trainable_variables
        with tf.GradientTape() as tape:
            logits = self.model(x, training=True)
            loss = tf.reduce_mean(tf.nn.sparse_softmax_cross_entropy_with_logits(y, logits))
            gained = loss * GAIN[self.name]
        # Densified: Keras 3 squares an embedding's gradients before summing duplicates.
        gradients = [tf.convert_to_tensor(g) for g in tape.gradient(gained, variables)]
        self.optimizer.apply_gradients(zip(gradients, variables, strict=True))
        return loss

    def weights(self) -> dict[str, Array]:
        result = {}
        for name, variable in self.variables.items():
            value = variable.numpy().copy()
            turned = name != "emb.weight" and value.ndim in LAYOUT
            result[name] = value.transpose(LAYOUT[value.ndim]) if turned else value
        return result

    def _state(self) -> Any:
        return self.tf.train.Checkpoint(model=self.model, optimizer=self.optimizer)

    def save(self, directory: Path) -> Path:
        return Path(self._state().save(str(directory / "ckpt")))

    def restore(self, path: Path) -> None:
        self._state().restore(str(path)).assert_consumed()
        for line in self.after:
            exec(line, {"optimizer": self.optimizer})  # the report's own line

    def steps(self) -> set[int]:
        return {int(self.optimizer.iterations.numpy())}

    def forget_step(self) -> None:
        self.optimizer.iterations.assign(0)

    def forget_slots(self) -> None:
        """Of optimizers whose state is slots and a step alone; hyperparameters are scalars."""
        legacy = self.kind == "tf_keras_legacy"
        for variable in self.optimizer.weights if legacy else self.optimizer.variables:
            if len(variable.shape):
                variable.assign(self.tf.zeros_like(variable))


def side(
    kind: str,
    model: str,
    algorithm: str,
    hypers: Mapping[str, Value],
    *,
    seed: int,
    dtype: str,
    code: Sequence[str] = (),
    helpers: Mapping[str, str] = MappingProxyType({}),
) -> Side:
    """`helpers`: calls around torch's optimizers, by name, of an algorithm that is two of them."""
    if kind == "torch":
        return TorchSide(model, algorithm, hypers, seed, dtype, helpers)
    return KerasSide(kind, model, algorithm, hypers, seed, dtype, code)
