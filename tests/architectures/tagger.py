"""A tagger of words: embeddings, two bidirectional LSTMs, a layer per word; sizes as in the NER tutorials."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor, nn

WORDS, WIDTH, UNITS, TAGS = 20_000, 128, 256, 17
LENGTH = 11


class Tagger(nn.Module):
    """As PyTorch's users write it: one module for both layers and both directions."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(WORDS, WIDTH)
        self.lstm = nn.LSTM(WIDTH, UNITS, num_layers=2, batch_first=True, bidirectional=True)
        self.hidden2tag = nn.Linear(2 * UNITS, TAGS)

    def forward(self, words: Tensor) -> Tensor:
        return self.hidden2tag(self.lstm(self.embedding(words))[0])


def keras_model() -> Any:
    """As Keras' users write it: a wrapper around each layer, and one around that of each word."""
    import keras
    from keras import layers

    words = keras.Input((LENGTH,), dtype="int32")
    x = layers.Embedding(WORDS, WIDTH, mask_zero=True)(words)
    for _ in range(2):
        x = layers.Bidirectional(layers.LSTM(UNITS, return_sequences=True))(x)
    return keras.Model(words, layers.TimeDistributed(layers.Dense(TAGS))(x))


def batch(rng: np.random.Generator) -> np.ndarray[Any, Any]:
    """Sentences without padding."""
    return rng.integers(1, WORDS, size=(4, LENGTH), dtype=np.int32)
