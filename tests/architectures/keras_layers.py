"""Layers of one's own, as those of the Keras examples: positions and class tokens."""

from __future__ import annotations

from typing import Any

from keras import layers, ops


class Positions(layers.Layer):  # type: ignore[misc]
    """Adds an embedding of each position."""

    def __init__(self, length: int, width: int, **options: Any) -> None:
        super().__init__(**options)
        self.length, self.width = length, width
        self.embedding = layers.Embedding(length, width)

    def build(self, shape: Any) -> None:
        self.embedding.build()

    def call(self, x: Any) -> Any:
        return x + self.embedding(ops.arange(x.shape[1]))

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "length": self.length, "width": self.width}


class PositionWeights(layers.Layer):  # type: ignore[misc]
    """Adds a weight of its own to each position."""

    def __init__(self, length: int, width: int, **options: Any) -> None:
        super().__init__(**options)
        self.length, self.width = length, width

    def build(self, shape: Any) -> None:
        self.position = self.add_weight(
            shape=(self.length, self.width), initializer="random_normal", name="position"
        )

    def call(self, x: Any) -> Any:
        return x + self.position

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "length": self.length, "width": self.width}


class ClassToken(layers.Layer):  # type: ignore[misc]
    """Sets a token of its own before the others."""

    def build(self, shape: Any) -> None:
        self.token = self.add_weight(shape=(1, 1, shape[-1]), initializer="random_normal", name="token")

    def call(self, x: Any) -> Any:
        return ops.concatenate([ops.tile(self.token, [ops.shape(x)[0], 1, 1]), x], axis=1)
