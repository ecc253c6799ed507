"""A run of Megatron-LM goes on in Keras 3: weights, moments, step and the schedule that counts samples."""

from __future__ import annotations

import math
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

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.slow]
RUN = Path(__file__).parents[2] / "fixtures" / "megatron" / "mlp" / "run"
FILE = RUN / "iter_0000005" / "mp_rank_00" / "model_optim_rng.pt"
NAMES = ("first.linear_fc1", "first.linear_fc2", "second.linear_fc1", "second.linear_fc2")
BATCH, WIDTH, SWITCH, END = 4, 6, 5, 15
WARMUP, LENGTH, PEAK, LEAST = 2, 20, 1e-2, 1e-3
CLOSE = 1e-4
"""Of the largest move: epsilon stands elsewhere in Keras' Adam."""


def rate(step: int) -> float:
    """`OptimizerParamScheduler.get_lr` at an update, in plain numbers."""
    if step <= WARMUP:
        return PEAK * step / WARMUP
    ratio = (step - WARMUP) / (LENGTH - WARMUP)
    return LEAST + 0.5 * (math.cos(math.pi * ratio) + 1.0) * (PEAK - LEAST)


def batches() -> list[Any]:
    generator = np.random.default_rng(4)
    return [generator.standard_normal((BATCH, WIDTH)).astype(np.float32) for _ in range(END)]


def uninterrupted() -> dict[str, Any]:
    """What Megatron's modules and optimizer come to, in torch's own terms: END updates in all."""
    saved = torch.load(FILE, weights_only=False)
    weights = {n: torch.nn.Parameter(t.clone()) for n, t in saved["model"].items() if t is not None}
    decayed = [p for p in weights.values() if p.ndim > 1]
    rest = [p for p in weights.values() if p.ndim == 1]
    optimizer = torch.optim.AdamW([{"params": decayed}, {"params": rest}])
    optimizer.load_state_dict(saved["optimizer"])
    for step in range(SWITCH, END):
        for group in optimizer.param_groups:
            group["lr"] = rate(step)
        x = torch.from_numpy(batches()[step])
        out = x
        for outer in ("first", "second"):
            for inner in ("linear_fc1", "linear_fc2"):
                name = f"{outer}.{inner}"
                out = torch.nn.functional.linear(out, weights[f"{name}.weight"], weights[f"{name}.bias"])
                out = torch.nn.functional.gelu(out) if inner == "linear_fc1" else out
        optimizer.zero_grad()
        (out - x.flip(-1)).pow(2).mean().backward()
        optimizer.step()
    return {name: value.detach().numpy() for name, value in weights.items()}


def twin(path: Path) -> Path:
    keras.utils.set_random_seed(3)
    model = keras.Sequential([keras.Input((WIDTH,))])
    for name in NAMES:
        wide = name.endswith("fc1")
        layer = keras.layers.Dense(10 if wide else WIDTH, name=name.replace(".", "_"))
        model.add(layer)
        if wide:
            model.add(keras.layers.Activation("gelu"))
    curve = keras.optimizers.schedules.CosineDecay(
        0.0, LENGTH - WARMUP, alpha=LEAST / PEAK, warmup_target=PEAK, warmup_steps=WARMUP
    )
    optimizer = keras.optimizers.AdamW(curve, beta_2=0.95, weight_decay=0.1, epsilon=1e-8)
    model.compile(optimizer=optimizer, loss="mse")
    optimizer.build(model.trainable_variables)
    model.save(path)
    return path


def gone_on(path: Path, withheld: str = "") -> dict[str, Any]:
    """The weights after END updates in all; the code says what is not decayed."""
    model = keras.models.load_model(path)
    optimizer = model.optimizer
    built, optimizer.built = optimizer.built, False
    optimizer.exclude_from_weight_decay(
        var_list=[layer.bias for layer in model.layers if hasattr(layer, "bias")]
    )
    optimizer.built = built
    cold = {"moments": ("momentum", "velocity"), "step": ("iteration",)}.get(withheld, ())
    for variable in optimizer.variables:
        if any(word in variable.path for word in cold):
            variable.assign(np.zeros(variable.shape, variable.dtype))
    for step in range(SWITCH, END):
        x = batches()[step]
        model.train_on_batch(x, x[:, ::-1])
    found = {}
    for layer, name in zip([one for one in model.layers if hasattr(one, "bias")], NAMES, strict=True):
        found[f"{name}.weight"], found[f"{name}.bias"] = layer.kernel.numpy().T, layer.bias.numpy()
    return found


def test_keras_goes_on(tmp_path: Path) -> None:
    truth = uninterrupted()
    report = ckptconv.convert(RUN, tmp_path / "there.keras", template=twin(tmp_path / "fresh.keras"))
    assert report.progress["step"] == SWITCH
    assert any("exclude_from_weight_decay" in line for line in report.target_requires)
    model = keras.models.load_model(tmp_path / "there.keras")
    assert int(model.optimizer.iterations) == SWITCH
    assert float(model.optimizer.learning_rate) == pytest.approx(rate(SWITCH), rel=1e-6)
    saved = torch.load(FILE, weights_only=False)["model"]
    before = {name: value.numpy() for name, value in saved.items() if value is not None}
    travelled = max(float(np.abs(truth[name] - before[name]).max()) for name in truth)

    def error(withheld: str = "") -> float:
        ended = gone_on(tmp_path / "there.keras", withheld)
        return max(float(np.abs(ended[name] - truth[name]).max()) for name in truth) / travelled

    ours = error()
    assert ours < CLOSE
    for withheld in ("moments", "step"):
        assert error(withheld) > 100 * ours, withheld
