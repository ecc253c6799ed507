"""Transformer encoders: `nn.TransformerEncoder` and one written by hand; functional Keras."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class Size(NamedTuple):
    """The base model of the paper unless said otherwise."""

    width: int = 512
    heads: int = 8
    hidden: int = 2048
    depth: int = 6
    vocabulary: int = 8000
    length: int = 24
    classes: int = 10


BASE = Size()
SMALL = Size(width=16, heads=4, hidden=24, depth=2, vocabulary=30, length=7, classes=3)


class FusedEncoder(nn.Module):
    """PyTorch's own layers, whose attention has one matrix for query, key and value; normalized behind."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.embedding = nn.Embedding(size.vocabulary, size.width)
        self.positions = nn.Parameter(torch.empty(1, size.length, size.width))
        layer = nn.TransformerEncoderLayer(
            size.width, size.heads, size.hidden, dropout=0.0, layer_norm_eps=1e-6, batch_first=True
        )
        self.encoder = nn.TransformerEncoder(layer, size.depth, enable_nested_tensor=False)
        self.head = nn.Linear(size.width, size.classes)
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.encoder(self.embedding(tokens) + self.positions)
        return self.head(x.mean(1))


class SelfAttention(nn.Module):
    """A linear layer for each projection."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.wq, self.wk, self.wv, self.wo = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (w(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for w in (self.wq, self.wk, self.wv))
        scores = (q @ k.transpose(-2, -1)) * q.shape[-1] ** -0.5
        return self.wo((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Attention and two dense layers, each normalized before."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.norm1, self.norm2 = (nn.LayerNorm(size.width, eps=1e-6) for _ in range(2))
        self.attention = SelfAttention(size.width, size.heads)
        self.mlp = nn.Sequential(
            nn.Linear(size.width, size.hidden), nn.GELU(), nn.Linear(size.hidden, size.width)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class SplitEncoder(nn.Module):
    """The same by hand, normalized before."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.embedding = nn.Embedding(size.vocabulary, size.width)
        self.positions = nn.Embedding(size.length, size.width)
        self.blocks = nn.ModuleList(Block(size) for _ in range(size.depth))
        self.norm = nn.LayerNorm(size.width, eps=1e-6)
        self.head = nn.Linear(size.width, size.classes)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens) + self.positions(torch.arange(tokens.shape[1]))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x).mean(1))


def keras_fused(size: Size) -> Any:
    """Normalized behind, as `nn.TransformerEncoderLayer` is."""
    from keras import layers

    def block(x: Any) -> Any:
        attended = layers.MultiHeadAttention(size.heads, size.width // size.heads)(x, x)
        x = layers.LayerNormalization(epsilon=1e-6)(x + attended)
        hidden = layers.Dense(size.hidden, activation="relu")(x)
        return layers.LayerNormalization(epsilon=1e-6)(x + layers.Dense(size.width)(hidden))

    return _keras(size, block, last_norm=False)


def keras_split(size: Size) -> Any:
    """Normalized before."""
    from keras import layers

    def block(x: Any) -> Any:
        normed = layers.LayerNormalization(epsilon=1e-6)(x)
        x = x + layers.MultiHeadAttention(size.heads, size.width // size.heads)(normed, normed)
        normed = layers.LayerNormalization(epsilon=1e-6)(x)
        return x + layers.Dense(size.width)(layers.Dense(size.hidden, activation="gelu")(normed))

    return _keras(size, block, last_norm=True)


def _keras(size: Size, block: Any, *, last_norm: bool) -> Any:
    import keras
    from keras import layers

    from tests.architectures.keras_layers import Positions, PositionWeights

    inputs = keras.Input((size.length,), dtype="int32")
    x = layers.Embedding(size.vocabulary, size.width)(inputs)
    x = (Positions if last_norm else PositionWeights)(size.length, size.width)(x)
    for _ in range(size.depth):
        x = block(x)
    if last_norm:
        x = layers.LayerNormalization(epsilon=1e-6)(x)
    x = layers.GlobalAveragePooling1D()(x)
    return keras.Model(inputs, layers.Dense(size.classes)(x))
