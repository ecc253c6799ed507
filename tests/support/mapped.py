"""A model written in both frameworks by people who did not ask each other: other names, another order.

A convolution, blocks of attention with a dense layer and a normalization, a recurrent cell, a head; all
widths are equal, so that no shape tells anything. `NAMES` is the mapping file of docs/mapping.md.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from tests.support.live_twins import DECAY, EPSILON, RATE, Twin

NAMES = Path(__file__).resolve().parents[2] / "docs" / "mapping.json"
WIDTH, HEADS, BLOCKS = 12, 3, 12


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
        self.ff = nn.Linear(WIDTH, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, x: Any) -> Any:
        return self.norm(x + self.ff(self.attn(x, x, x, need_weights=False)[0]))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv1d(WIDTH, WIDTH, 3, padding=1)
        self.blocks = nn.ModuleList(Block() for _ in range(BLOCKS))
        self.rnn = nn.LSTM(WIDTH, WIDTH, batch_first=True)
        self.head = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Any) -> Any:
        x = self.stem(x.transpose(1, 2)).transpose(1, 2)
        for block in self.blocks:
            x = block(x)
        return self.head(self.rnn(x)[0])


def keras_net(k: Any) -> Any:
    """The same of `keras` or `tf_keras`: the head is declared first, blocks are counted from 1."""
    shape = (None, 5, WIDTH)

    class KerasBlock(k.layers.Layer):
        def __init__(self) -> None:
            super().__init__()
            self.mix = k.layers.MultiHeadAttention(HEADS, WIDTH // HEADS)
            self.dense = k.layers.Dense(WIDTH)
            self.ln = k.layers.LayerNormalization(epsilon=1e-5)

        def call(self, x: Any) -> Any:
            return self.ln(x + self.dense(self.mix(x, x)))

    class KerasNet(k.Model):
        def __init__(self) -> None:
            super().__init__()
            self.out = k.layers.Dense(WIDTH)
            self.first = k.layers.Conv1D(WIDTH, 3, padding="same")
            self.cell = k.layers.LSTM(WIDTH, return_sequences=True)
            for i in range(BLOCKS):
                setattr(self, f"b{i + 1}", KerasBlock())

        def call(self, x: Any) -> Any:
            x = self.first(x)
            for i in range(BLOCKS):
                x = getattr(self, f"b{i + 1}")(x)
            return self.out(self.cell(x))

    model = KerasNet()
    model(k.ops.zeros((1, *shape[1:])) if hasattr(k, "ops") else _zeros(shape))
    return model


def _zeros(shape: tuple[int | None, ...]) -> Any:
    import tensorflow

    return tensorflow.zeros((1, *shape[1:]))


def frozen(model: Any) -> Any:
    """The model with one trained bias in its cell, as Keras has it."""
    import ckptconv

    ckptconv.pytorch.freeze_recurrent_bias(model)
    return model


TWIN = Twin(torch=Net, keras=keras_net, shape=(4, 5, WIDTH))


def named_adamw(model: Any) -> Any:
    """PyTorch's AdamW that stores the names of what it trains: nothing else tells them of equal shapes."""
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    return torch.optim.AdamW(trained, RATE, eps=EPSILON, weight_decay=DECAY)


def run_of(model: Any, optimizer: Any) -> dict[str, Any]:
    """A training dictionary."""
    return {"model": model.state_dict(), "optimizer": optimizer.state_dict()}


def save(path: Path, model: Any, optimizer: Any) -> Path:
    torch.save(run_of(model, optimizer), path)
    return path
