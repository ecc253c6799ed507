"""Translation with attention: an encoder and a decoder of GRUs, which is told the words before.

The dot product of Luong, Pham and Manning (2015) compares the decoder's outputs with the encoder's.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

SOURCE, TARGET, WIDTH, UNITS = 8_000, 6_000, 256, 512
LENGTHS = (9, 7)


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(SOURCE, WIDTH)
        self.gru = nn.GRU(WIDTH, UNITS, batch_first=True)

    def forward(self, words: Tensor) -> tuple[Tensor, Tensor]:
        return self.gru(self.embedding(words))


class Decoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(TARGET, WIDTH)
        self.gru = nn.GRU(WIDTH, UNITS, batch_first=True)
        self.combine = nn.Linear(2 * UNITS, UNITS)
        self.out = nn.Linear(UNITS, TARGET)

    def forward(self, words: Tensor, encoded: Tensor, state: Tensor) -> Tensor:
        decoded, _ = self.gru(self.embedding(words), state)
        weights = torch.softmax(decoded @ encoded.transpose(1, 2), dim=-1)
        return self.out(torch.tanh(self.combine(torch.cat([weights @ encoded, decoded], dim=-1))))


class Seq2Seq(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = Encoder()
        self.decoder = Decoder()

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        return self.decoder(target, *self.encoder(source))


def keras_model() -> Any:
    """Functional."""
    import keras
    from keras import layers

    source, target = (keras.Input((length,), dtype="int32") for length in LENGTHS)
    x = layers.Embedding(SOURCE, WIDTH)(source)
    encoded, state = layers.GRU(UNITS, return_sequences=True, return_state=True)(x)
    x = layers.Embedding(TARGET, WIDTH)(target)
    decoded = layers.GRU(UNITS, return_sequences=True)(x, initial_state=state)
    context = layers.Attention()([decoded, encoded])
    x = layers.Dense(UNITS, activation="tanh")(layers.Concatenate()([context, decoded]))
    return keras.Model([source, target], layers.Dense(TARGET)(x))


def batch(rng: np.random.Generator) -> tuple[np.ndarray[Any, Any], ...]:
    """Sentences, and their translations up to the word before the last."""
    return tuple(
        rng.integers(1, words, size=(2, length), dtype=np.int32)
        for words, length in zip((SOURCE, TARGET), LENGTHS, strict=True)
    )
