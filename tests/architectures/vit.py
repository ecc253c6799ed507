"""ViT-B/16: transformers' `ViTForImageClassification`, functional Keras."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor


class Size(NamedTuple):
    """The base model of the paper unless said otherwise."""

    image: int = 224
    patch: int = 16
    width: int = 768
    hidden: int = 3072
    depth: int = 12
    heads: int = 12
    classes: int = 10

    @property
    def tokens(self) -> int:
        return (self.image // self.patch) ** 2 + 1


BASE = Size()
SMALL = Size(image=12, patch=4, width=16, hidden=24, depth=2, heads=4, classes=3)


def torch_model(size: Size) -> Any:
    """`transformers.ViTForImageClassification` of a configuration, its logits alone."""
    from transformers import ViTConfig, ViTForImageClassification

    class Logits(ViTForImageClassification):  # type: ignore[misc]
        def forward(self, images: Tensor) -> Any:
            return super().forward(images).logits

    return Logits(
        ViTConfig(
            image_size=size.image,
            patch_size=size.patch,
            hidden_size=size.width,
            intermediate_size=size.hidden,
            num_hidden_layers=size.depth,
            num_attention_heads=size.heads,
            layer_norm_eps=1e-6,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            num_labels=size.classes,
        )
    )


def keras_model(size: Size) -> Any:
    """Functional."""
    import keras
    from keras import layers

    from tests.architectures.keras_layers import ClassToken, PositionWeights

    inputs = keras.Input((size.image, size.image, 3))
    x = layers.Conv2D(size.width, size.patch, size.patch)(inputs)
    x = layers.Reshape((-1, size.width))(x)
    x = PositionWeights(size.tokens, size.width)(ClassToken()(x))
    for _ in range(size.depth):
        normed = layers.LayerNormalization(epsilon=1e-6)(x)
        x = x + layers.MultiHeadAttention(size.heads, size.width // size.heads)(normed, normed)
        normed = layers.LayerNormalization(epsilon=1e-6)(x)
        x = x + layers.Dense(size.width)(layers.Dense(size.hidden, activation="gelu")(normed))
    x = layers.LayerNormalization(epsilon=1e-6)(x)
    return keras.Model(inputs, layers.Dense(size.classes)(x[:, 0]))
