"""A transformers Trainer's run goes on in Keras 3 and comes back: weights, moments, steps, schedule."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("transformers", reason="needs transformers to go on from the folder")
pytest.importorskip("accelerate", reason="transformers' Trainer needs it")
pytest.importorskip("tensorflow")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("KERAS_BACKEND", "tensorflow")
keras = pytest.importorskip("keras")

import ckptconv  # noqa: E402
from tests.support.hf_trainer import BATCH, PER_EPOCH, regression, trainer  # noqa: E402
from tests.support.wrapped import apart  # noqa: E402

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.slow]
SWITCH, BACK, END = 8, 16, 24
CLOSE = 1e-4
"""Of the largest move: epsilon stands elsewhere in Keras' Adam: updates change by 1e-5 of themselves."""

Weights = dict[str, "np.ndarray[Any, Any]"]


def weights_of(folder: Path) -> Weights:
    from safetensors.numpy import load_file

    return load_file(folder / "model.safetensors")


def twin(path: Path) -> Path:
    """A fresh Keras model of the same shape, under the same schedule, without decay of biases."""
    keras.utils.set_random_seed(3)
    model = keras.Sequential(
        [
            keras.Input((5,)),
            keras.layers.Dense(7, activation="tanh", name="fc1"),
            keras.layers.Dense(3, name="fc2"),
        ]
    )
    rise = keras.optimizers.schedules.CosineDecay(0.0, END - 3, warmup_target=1e-2, warmup_steps=3)
    optimizer = keras.optimizers.AdamW(rise, weight_decay=0.1, epsilon=1e-8)
    model.compile(optimizer=optimizer, loss="mse")
    optimizer.build(model.trainable_variables)
    model.save(path)
    return path


def loaded(path: Path) -> Any:
    """The model as its code has to build it: the file does not say what is not decayed."""
    model = keras.models.load_model(path)
    biases = [layer.bias for layer in model.layers]
    optimizer = model.optimizer
    built, optimizer.built = optimizer.built, False
    optimizer.exclude_from_weight_decay(var_list=biases)
    optimizer.built = built
    return model


def train(model: Any, first: int, last: int) -> None:
    x, y = regression()
    for number in range(first, last):
        begin = number % PER_EPOCH * BATCH
        model.train_on_batch(x[begin : begin + BATCH], y[begin : begin + BATCH])


def torch_weights(model: Any) -> Weights:
    found: Weights = {}
    for layer in model.layers:
        found[f"{layer.name}.weight"] = layer.kernel.numpy().T
        found[f"{layer.name}.bias"] = layer.bias.numpy()
    return found


def test_there_and_back(tmp_path: Path) -> None:
    run = trainer(tmp_path / "run")
    run.train()
    at = {step: tmp_path / "run" / f"checkpoint-{step}" for step in (SWITCH, BACK, END)}
    weights = {step: weights_of(folder) for step, folder in at.items()}

    report = ckptconv.convert(at[SWITCH], tmp_path / "there.keras", template=twin(tmp_path / "fresh.keras"))
    assert report.progress["step"] == SWITCH
    assert any("exclude_from_weight_decay" in line for line in report.target_requires)
    model = loaded(tmp_path / "there.keras")
    assert int(model.optimizer.iterations) == SWITCH
    assert float(model.optimizer.learning_rate) == pytest.approx(run.watch.seen[SWITCH][2], rel=1e-6)
    train(model, SWITCH, BACK)
    assert apart(torch_weights(model), weights[BACK], weights[SWITCH]) < CLOSE
    model.save(tmp_path / "later.keras")

    back = tmp_path / "back"
    ckptconv.convert(tmp_path / "later.keras", back, template=at[SWITCH], allow=("opaque-globals",))
    again = trainer(tmp_path / "again", seed=5)
    again.train(resume_from_checkpoint=str(back))
    for ours, theirs in zip(again.watch.seen, run.watch.seen[BACK:], strict=True):
        assert (ours[0], *ours[3:]) == (theirs[0], *theirs[3:])
        assert ours[1:3] == pytest.approx(theirs[1:3], rel=1e-6)
    ended = {name: value.numpy() for name, value in again.model.state_dict().items()}
    error = apart(ended, weights[END], weights[SWITCH])
    assert error < CLOSE

    for withheld in ("state", "step"):
        import torch

        control = tmp_path / f"without-{withheld}"
        ckptconv.convert(tmp_path / "later.keras", control, template=at[SWITCH], allow=("opaque-globals",))
        held = torch.load(control / "optimizer.pt")
        for entry in held["state"].values():
            if withheld == "state":
                entry["exp_avg"].zero_()
                entry["exp_avg_sq"].zero_()
            else:
                entry["step"].zero_()
        torch.save(held, control / "optimizer.pt")
        cold = trainer(tmp_path / f"cold-{withheld}", seed=5)
        cold.train(resume_from_checkpoint=str(control))
        reached = {name: value.numpy() for name, value in cold.model.state_dict().items()}
        assert apart(reached, weights[END], weights[SWITCH]) > 100 * error, withheld
