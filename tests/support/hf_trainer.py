"""A small model in a transformers Trainer, deterministic, with what it stands at when it goes on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import Dataset, SequentialSampler
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

SAMPLES, BATCH = 24, 4
PER_EPOCH = SAMPLES // BATCH


class Net(nn.Module):
    """Two dense layers; every shape once, so that the file itself tells the optimizer's order."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(5, 7)
        self.fc2 = nn.Linear(7, 3)

    def forward(self, x: torch.Tensor, labels: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        logits = self.fc2(torch.tanh(self.fc1(x)))
        if labels is None:
            return {"logits": logits}
        return {"loss": nn.functional.mse_loss(logits, labels), "logits": logits}


def regression() -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    rng = np.random.default_rng(0)
    return rng.normal(size=(SAMPLES, 5)).astype("f4"), rng.normal(size=(SAMPLES, 3)).astype("f4")


class Regression(Dataset[dict[str, torch.Tensor]]):
    def __init__(self) -> None:
        self._x, self._y = map(torch.from_numpy, regression())

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"x": self._x[index], "labels": self._y[index]}


class Sentences(Dataset[dict[str, torch.Tensor]]):
    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(index)
        words = torch.randint(0, 20, (6,), generator=generator)
        return {"input_ids": words, "labels": torch.tensor(index % 2)}


def bert() -> nn.Module:
    """Several parameters of every shape: nothing but the model tells the optimizer's order."""
    config = BertConfig(
        vocab_size=20, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=12,
        max_position_embeddings=8, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return BertForSequenceClassification(config)


class Watch(TrainerCallback):  # type: ignore[misc]  # untyped
    """What the run stands at before each update."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, float, float, int, float]] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **parts: Any) -> None:
        optimizer, scheduler = parts["optimizer"], parts["lr_scheduler"]
        steps = [float(entry["step"]) for entry in optimizer.state.values() if "step" in entry]
        rate = optimizer.param_groups[0]["lr"]
        self.seen.append(
            (state.global_step, state.epoch, rate, scheduler.last_epoch, max(steps, default=0.0))
        )


class InOrder(Trainer):  # type: ignore[misc]  # untyped
    def _get_train_sampler(self, *_: Any) -> Any:
        return SequentialSampler(self.train_dataset)


def trainer(folder: Path, model: nn.Module | None = None, *, seed: int = 0, **options: Any) -> Any:
    """A Trainer of 4 epochs under a warmup and a cosine, and its `Watch` as `watch`."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    model = Net() if model is None else model
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.4)
    settings = {
        "per_device_train_batch_size": BATCH, "num_train_epochs": 4, "save_steps": 8, "weight_decay": 0.1,
        "learning_rate": 1e-2, "lr_scheduler_type": "cosine", "warmup_steps": 3, "max_grad_norm": 0.0,
        "report_to": [], "use_cpu": True, "disable_tqdm": True, "logging_steps": 100,
    } | options  # fmt: skip
    data = Regression() if isinstance(model, Net) else Sentences()
    watch = Watch()
    made = InOrder(model, TrainingArguments(str(folder), **settings), train_dataset=data, callbacks=[watch])
    made.watch = watch
    return made
