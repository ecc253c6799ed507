"""A Lightning run goes on in Keras 3, under its schedule, and comes back to `Trainer.fit`."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
lightning = pytest.importorskip("lightning", reason="needs Lightning to go on from the file")
pytest.importorskip("tensorflow")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("KERAS_BACKEND", "tensorflow")
keras = pytest.importorskip("keras")

import ckptconv  # noqa: E402
from tests.support.command import convert_here  # noqa: E402
from tests.support.wrapped import apart  # noqa: E402

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.slow]
COMMON = Path(__file__).parents[2] / "fixtures" / "lightning" / "common.py"
SWITCH, BACK, EPOCHS = 5, 11, 8
"""Updates: the first lies within the second epoch, the other at the rate after two falls of it."""
CLOSE = 1e-4
"""Of the largest move: epsilon stands elsewhere in Keras' Adam."""

Weights = dict[str, "np.ndarray[Any, Any]"]


@pytest.fixture(scope="module")
def cases() -> ModuleType:
    """The models and trainers that made the fixtures."""
    spec = importlib.util.spec_from_file_location("lightning_cases", COMMON)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def weights_of(state: dict[str, Any]) -> Weights:
    return {name: value.numpy().copy() for name, value in state.items()}


def twin(path: Path) -> Path:
    """A fresh Keras model of the same shape, under the same schedule."""
    keras.utils.set_random_seed(3)
    model = keras.Sequential(
        [
            keras.Input((3,)),
            keras.layers.Dense(4, activation="tanh", name="0"),
            keras.layers.Dense(2, name="2"),
        ]
    )
    fall = keras.optimizers.schedules.ExponentialDecay(1e-2, 4, 0.5, staircase=True)
    model.compile(optimizer=keras.optimizers.Adam(fall, epsilon=1e-8), loss="mse")
    model.optimizer.build(model.trainable_variables)
    model.save(path)
    return path


def train(cases: ModuleType, model: Any, first: int, last: int) -> None:
    batches = [(x.numpy(), y.numpy()) for x, y in cases.loader()]
    for number in range(first, last):
        model.train_on_batch(*batches[number % cases.BATCHES])


def of_keras(model: Any) -> Weights:
    found: Weights = {}
    for layer in model.layers:
        found[f"net.{layer.name}.weight"] = layer.kernel.numpy().T
        found[f"net.{layer.name}.bias"] = layer.bias.numpy()
    return found


def test_there_and_back(cases: ModuleType, tmp_path: Path) -> None:
    torch.manual_seed(7)
    at = {step: tmp_path / f"{step}.ckpt" for step in (SWITCH, BACK)}
    whole = cases.Net()
    saves = [cases.AtUpdate(path, step) for step, path in at.items()]
    run = cases.trainer(tmp_path, *saves, enable_checkpointing=False, max_epochs=EPOCHS)
    run.fit(whole, cases.loader())
    weights = {
        step: weights_of(torch.load(path, weights_only=False)["state_dict"]) for step, path in at.items()
    }

    report = ckptconv.convert(at[SWITCH], tmp_path / "there.keras", template=twin(tmp_path / "fresh.keras"))
    assert report.progress["step"] == SWITCH
    model = keras.models.load_model(tmp_path / "there.keras")
    assert int(model.optimizer.iterations) == SWITCH
    assert float(model.optimizer.learning_rate) == pytest.approx(0.01 * 0.5 ** (SWITCH // 4), rel=1e-6)
    train(cases, model, SWITCH, BACK)
    assert apart(of_keras(model), weights[BACK], weights[SWITCH]) < CLOSE
    model.save(tmp_path / "later.keras")

    back = convert_here(
        tmp_path / "later.keras", tmp_path / "back.ckpt", "--template", at[SWITCH],
        "--set", f"micro_steps={BACK}",
        "--set", f"epochs={BACK // cases.BATCHES}", "--set", f"batch_in_epoch={BACK % cases.BATCHES}",
    )  # fmt: skip

    def resumed(file: Path) -> tuple[Weights, int, float]:
        held: list[tuple[int, float]] = []

        class Watch(lightning.Callback):
            def on_train_start(self, trainer: Any, module: Any) -> None:
                held.append((trainer.global_step, trainer.optimizers[0].param_groups[0]["lr"]))

        again = cases.Net()
        goes_on = cases.trainer(tmp_path, Watch(), enable_checkpointing=False, max_epochs=EPOCHS)
        goes_on.fit(again, cases.loader(), ckpt_path=str(file), weights_only=False)
        assert again.seen[0] == BACK % cases.BATCHES
        assert goes_on.global_step == EPOCHS * cases.BATCHES
        return weights_of(again.state_dict()), *held[0]

    ended, *_ = resumed(at[BACK])  # Lightning draws the loader's batches from the first again
    reached, step, rate = resumed(back)
    assert step == BACK
    assert rate == pytest.approx(0.01 * 0.5 ** (BACK // 4), rel=1e-6)
    error = apart(reached, ended, weights[SWITCH])
    assert error < CLOSE

    for withheld in ("state", "step", "schedule"):
        held = torch.load(back, weights_only=False)
        for entry in held["optimizer_states"][0]["state"].values():
            if withheld == "state":
                entry["exp_avg"].zero_()
                entry["exp_avg_sq"].zero_()
            elif withheld == "step":
                entry["step"].zero_()
        if withheld == "schedule":
            held["lr_schedulers"][0]["last_epoch"] = 0
            held["optimizer_states"][0]["param_groups"][0]["lr"] = 0.01
        torch.save(held, tmp_path / f"without-{withheld}.ckpt")
        cold, *_ = resumed(tmp_path / f"without-{withheld}.ckpt")
        assert apart(cold, ended, weights[SWITCH]) > 100 * error, withheld
