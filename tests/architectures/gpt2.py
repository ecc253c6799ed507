"""GPT-2: transformers' `GPT2LMHeadModel`, its embedding tied to its output; functional Keras."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor


class Size(NamedTuple):
    """The small model of the paper unless said otherwise."""

    vocabulary: int = 50257
    positions: int = 1024
    width: int = 768
    depth: int = 12
    heads: int = 12
    length: int = 16
    """Of the sequences that go in."""


BASE = Size()
SMALL = Size(vocabulary=40, positions=16, width=24, depth=2, heads=3)


def torch_model(size: Size) -> Any:
    """`transformers.GPT2LMHeadModel` of a configuration, its logits alone."""
    from transformers import GPT2Config, GPT2LMHeadModel

    class Logits(GPT2LMHeadModel):  # type: ignore[misc]
        def forward(self, tokens: Tensor) -> Any:
            return super().forward(tokens, use_cache=False).logits

    return Logits(
        GPT2Config(
            vocab_size=size.vocabulary,
            n_positions=size.positions,
            n_embd=size.width,
            n_layer=size.depth,
            n_head=size.heads,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            bos_token_id=0,
            eos_token_id=0,
        )
    )


def keras_model(size: Size) -> Any:
    """Functional, with `ReversibleEmbedding` at both ends."""
    import keras
    from keras import activations, layers

    from tests.architectures.keras_layers import Positions

    inputs = keras.Input((size.length,), dtype="int32")
    embedding = layers.ReversibleEmbedding(size.vocabulary, size.width)
    x = Positions(size.positions, size.width)(embedding(inputs))
    for _ in range(size.depth):
        normed = layers.LayerNormalization(epsilon=1e-5)(x)
        attention = layers.MultiHeadAttention(size.heads, size.width // size.heads)
        x = x + attention(normed, normed, use_causal_mask=True)
        normed = layers.LayerNormalization(epsilon=1e-5)(x)
        hidden = layers.Dense(4 * size.width)(normed)
        x = x + layers.Dense(size.width)(activations.gelu(hidden, approximate=True))
    x = layers.LayerNormalization(epsilon=1e-5)(x)
    return keras.Model(inputs, embedding(x, reverse=True))
