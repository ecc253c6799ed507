"""A ZeRO 3 run of DeepSpeed goes on in Keras 3 and in PyTorch as it went on in DeepSpeed itself.

DeepSpeed clips gradients to a norm of 1 unless it is told otherwise, so the code that goes on does, too.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("tensorflow")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("KERAS_BACKEND", "tensorflow")
keras = pytest.importorskip("keras")

import ckptconv  # noqa: E402
from tests.support.command import FIXTURES  # noqa: E402

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.slow]
CASE = FIXTURES / "deepspeed" / "zero3-mlp"
CLOSE = 1e-4
"""Of the largest move: epsilon stands elsewhere in Keras' Adam."""

Weights = dict[str, "np.ndarray[Any, Any]"]


@pytest.fixture(scope="module")
def truth() -> dict[str, Any]:
    told: dict[str, Any] = json.loads((CASE / "expected.json").read_text(encoding="utf-8"))
    return told


def apart(ours: Weights, truth: dict[str, Any]) -> float:
    """How far weights are from those that DeepSpeed reached, by how far it moved."""
    theirs = {name: np.asarray(value, "f4") for name, value in truth["after"].items()}
    before = {name: param.read() for name, param in ckptconv.open(CASE / "run").params.items()}
    travelled = max(float(np.abs(theirs[name] - before[name]).max()) for name in theirs)
    return max(float(np.abs(ours[name] - theirs[name]).max()) for name in theirs) / travelled


def torch_twin(path: Path) -> Any:
    """A fresh run of a plain loop, on disk."""
    model = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Tanh(), torch.nn.Linear(7, 3))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.5)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 3, 0.5)
    parts = {"model": model, "optimizer": optimizer, "scheduler": scheduler}
    torch.save({key: part.state_dict() for key, part in parts.items()}, path)
    return parts


def test_it_goes_on_in_a_plain_loop(truth: dict[str, Any], tmp_path: Path) -> None:
    parts = torch_twin(tmp_path / "fresh.pt")
    ckptconv.convert(CASE / "run", tmp_path / "run.pt", template=tmp_path / "fresh.pt")
    state = torch.load(tmp_path / "run.pt")
    for key, part in parts.items():
        part.load_state_dict(state[key])
    for x, y in truth["more"]:
        parts["optimizer"].zero_grad()
        (parts["model"](torch.tensor(x)) - torch.tensor(y)).square().mean().backward()
        torch.nn.utils.clip_grad_norm_(parts["model"].parameters(), 1.0)
        parts["optimizer"].step()
        parts["scheduler"].step()
    ended = {name: value.numpy() for name, value in parts["model"].state_dict().items()}
    assert apart(ended, truth) < 1e-5


def keras_twin(path: Path) -> Path:
    keras.utils.set_random_seed(3)
    layers = [keras.layers.Dense(7, activation="tanh"), keras.layers.Dense(3)]
    model = keras.Sequential([keras.Input((5,)), *layers])
    steps = keras.optimizers.schedules.PiecewiseConstantDecay([3, 6, 9], [0.01, 0.005, 0.0025, 0.00125])
    optimizer = keras.optimizers.AdamW(steps, weight_decay=0.01, epsilon=1e-8, global_clipnorm=1.0)
    model.compile(optimizer=optimizer, loss="mse")
    optimizer.build(model.trainable_variables)
    model.save(path)
    return path


@pytest.mark.parametrize("withheld", ["", "state", "step"])
def test_it_goes_on_in_keras(withheld: str, truth: dict[str, Any], tmp_path: Path) -> None:
    report = ckptconv.convert(
        CASE / "run", tmp_path / "there.keras", template=keras_twin(tmp_path / "fresh.keras")
    )
    assert report.progress["step"] == truth["progress"]["step"]
    model = keras.models.load_model(tmp_path / "there.keras")
    assert int(model.optimizer.iterations) == truth["progress"]["step"]
    for variable in model.optimizer.variables:
        if withheld == "state" and "/" in variable.path and variable.shape:
            variable.assign(np.zeros(variable.shape, "f4"))
    if withheld == "step":
        model.optimizer.iterations.assign(0)
    for x, y in truth["more"]:
        model.train_on_batch(np.asarray(x, "f4"), np.asarray(y, "f4"))
    ended: Weights = {}
    for number, layer in zip((0, 2), model.layers, strict=True):
        ended[f"{number}.weight"] = layer.kernel.numpy().T
        ended[f"{number}.bias"] = layer.bias.numpy()
    error = apart(ended, truth)
    assert error > 100 * CLOSE if withheld else error < CLOSE
