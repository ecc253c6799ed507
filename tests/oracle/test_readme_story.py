"""What the README tells a user to type works: its own Python and its own commands, in its own order."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent

pytest.importorskip("torch")
pytest.importorskip("tensorflow")

BUILD_KERAS = """
import os
os.environ["KERAS_BACKEND"] = "tensorflow"
import keras
import tensorflow as tf

def build_model():
    return keras.Sequential(
        [keras.Input((8,)), keras.layers.Dense(16, "relu", name="fc1"), keras.layers.Dense(4, name="fc2")]
    )
"""

BUILD_TORCH = """
import torch
from torch import nn

class Mlp(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(8, 16), nn.Linear(16, 4)

    def forward(self, x):
        return self.fc2(torch.relu(self.fc1(x)))

model = Mlp()
optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, eps=1e-7, weight_decay=0.05)
"""


def section(title: str) -> tuple[list[str], list[str]]:
    """(Python blocks, commands after `Convert:`) of a section."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    (body,) = re.findall(rf"^## {title}\n(.*?)(?=^## )", text, re.MULTILINE | re.DOTALL)
    blocks = re.findall(r"^( *)```python\n(.*?)^ *```", body, re.MULTILINE | re.DOTALL)
    return [textwrap.dedent(code) for _, code in blocks], re.findall(r"Convert: `ckptconv (.+?)`", body)


def python(code: str, where: Path) -> None:
    environment = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT), "TF_CPP_MIN_LOG_LEVEL": "3"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=where, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def convert(command: str, where: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "ckptconv", *command.split()],
        cwd=where,
        env={"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory in which `run.pt` is a PyTorch run of 9 steps and `ckpts/ckpt-9` the same in Keras."""
    where = tmp_path_factory.mktemp("story")
    shutil.copy(ROOT / "fixtures/plain/mlp-adamw/run.pt", where / "run.pt")
    for directory in ("out", "ckpts"):
        (where / directory).mkdir()
    template = ROOT / "fixtures/keras3/mlp-adamw-fresh/ckpt-1"
    convert(f"convert run.pt ckpts/ckpt-9 --template {template}", where)
    return where


def test_from_pytorch_to_keras(place: Path) -> None:
    (make_template, go_on), (command,) = section("Resume in Keras what PyTorch began")
    python(BUILD_KERAS + make_template, place)
    convert(command, place)
    python(BUILD_KERAS + make_template.rpartition("tf.train")[0] + go_on, place)


def test_from_keras_to_pytorch_and_the_library(place: Path) -> None:
    (make_template, go_on), (command,) = section("Resume in PyTorch what Keras began")
    (place / "run.pt").unlink()
    python(BUILD_TORCH + make_template, place)
    convert(command, place)
    steps = "\nassert {float(s['step']) for s in optimizer.state.values()} == {9.0}\n"
    python(BUILD_TORCH + go_on + steps, place)

    (files, live), _ = section("Library")
    python(files + "\nassert ckpt.progress.step.value == 9 and ckptconv.validate('again.pt') == []\n", place)
    torch_names = BUILD_TORCH + "torch_model, torch_optimizer = model, optimizer\n"
    keras_names = BUILD_KERAS + (
        "keras_model = build_model()\n"
        "keras_optimizer = keras.optimizers.AdamW(0.01, weight_decay=0.05, epsilon=1e-7)\n"
        "keras_optimizer.build(keras_model.trainable_variables)\n"
    )
    batch = "import ckptconv\nimport numpy as np\nbatch = np.ones((2, 8), np.float32)\n"
    check = "\nassert int(keras_optimizer.iterations) == 9 and found.equal, str(found)\n" + steps
    python(torch_names + keras_names + batch + live + check, place)
