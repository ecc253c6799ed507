"""Every `convert` command that `doctor` spells out, for every kind of file and framework, does what it says.

The text of the command and the lines before it are those of its own JSON. They are run; the result is loaded
by the framework.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

for needed in ("torch", "tensorflow", "tf_keras", "h5py", "lightning", "transformers", "accelerate"):
    pytest.importorskip(needed)

import ckptconv  # noqa: E402
from ckptconv.catalog.restores import KindOfFile, kinds_of_file, recipe_for  # noqa: E402
from tests.restores import files, torch_calls  # noqa: E402
from tests.restores.outcome import STEPS, Held  # noqa: E402
from tests.restores.program_calls import BY_FIXTURE  # noqa: E402
from tests.restores.test_restores import FILES  # noqa: E402
from tests.support.command import invoke  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")
KINDS = {kind.name: kind for kind in kinds_of_file()}
CASES = [
    (kind.name, framework)
    for kind in kinds_of_file()
    if kind.name not in BY_FIXTURE
    for framework in kind.goes_on_in
]
QUICK = [("checkpoint-legacy", "keras3"), ("checkpoint-tf-keras", "keras3"), ("torch-adam", "keras3")]
RATE = 0.01

Made = Callable[[str], tuple[Path, Any]]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    @cache
    def make(kind: str) -> tuple[Path, Any]:
        return FILES[kind](tmp_path_factory.mktemp(kind))

    return make


def mends_of(path: Path) -> list[dict[str, Any]]:
    code, shown = invoke("doctor", path, "--json")
    assert code == 0
    mends: list[dict[str, Any]] = json.loads(shown)["mends"]
    return mends


class Program:
    """What somebody has who goes on in a framework: a fresh model and optimizer."""

    def __init__(self, framework: str, optimizer: str) -> None:
        self.framework = framework
        if framework == "torch":
            program = torch_calls.fresh(optimizer)
            self.model, self.optimizer = program.model, program.optimizer
            return
        self.model = files.fresh(framework, 1).model
        options = {"momentum": 0.9} if optimizer == "SGD" else {}
        self.optimizer = getattr(files.keras_of(framework).optimizers, optimizer)(RATE, **options)
        self.optimizer.build(self.model.trainable_variables)

    @classmethod
    def of(cls, framework: str, model: Any, optimizer: Any) -> Program:
        """That has these."""
        made = cls.__new__(cls)
        made.framework, made.model, made.optimizer = framework, model, optimizer
        return made

    def resume(self, path: str) -> Held:
        """What it holds after its framework loaded the file, kernels as Keras has them."""
        import tensorflow as tf
        import torch

        if self.framework == "torch":
            run = torch.load(path, weights_only=True)
            self.model.load_state_dict(run["model"])
            self.optimizer.load_state_dict(run["optimizer"])
            return of_torch(torch_calls.Program(self.model, self.optimizer).held())
        checkpoint = tf.train.Checkpoint(model=self.model, optimizer=self.optimizer)
        checkpoint.restore(path).assert_consumed()
        run = files.Run(self.model, self.optimizer)
        return Held(int(self.optimizer.iterations.numpy()), self.model.get_weights(), files.slots(run))


def of_torch(held: Held) -> Held:
    return Held(held.step, [array.T for array in held.weights], [array.T for array in held.state])


def canonical(kind: KindOfFile, saved: Any) -> Held:
    """What was saved, kernels as Keras has them."""
    if isinstance(saved, files.Run):
        return Held(STEPS, saved.weights, saved.slots)
    return saved if kind.format == "tensorflow" else of_torch(saved)


def run_lines(lines: Sequence[str], program: Program) -> None:
    """Python that the doctor spells out, for somebody's model and optimizer."""
    import tensorflow as tf
    import torch

    names = {"model": program.model, "optimizer": program.optimizer, "tf": tf, "torch": torch}
    exec("\n".join(lines), {**names, "ckptconv": ckptconv})


def keeps_state(kind: KindOfFile) -> bool:
    """Whether there is more of an optimizer than its counter."""
    return kind.optimizer and "counter" not in kind.variants


def step_there(kind: KindOfFile, framework: str, algorithm: str) -> int | None:
    """torch's optimizers keep a step beside their moments, and SGD none."""
    if framework == "torch":
        return None if algorithm == "SGD" else STEPS if keeps_state(kind) else 0
    return STEPS


@pytest.mark.parametrize(
    ("name", "framework"),
    [case if case in QUICK else pytest.param(*case, marks=pytest.mark.slow) for case in CASES],
)
def test_the_command_mends(
    name: str, framework: str, made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind, recipe = KINDS[name], recipe_for(framework)
    path, saved = made(name)
    (mend,) = [mend for mend in mends_of(path) if tuple(mend["code"][-len(recipe.code) :]) == recipe.code]
    monkeypatch.chdir(tmp_path)
    algorithm = "SGD" if "stateless" in name else "AdamW" if name == "hf-trainer" else "Adam"
    assert tuple(mend["code"]) == recipe.code
    assert recipe.code[0].startswith("model, optimizer = ...")
    run_lines(recipe.code[1:], Program(framework, algorithm))
    make_directory, _, command = mend["command"].partition(" && ")
    assert make_directory == f"mkdir -p {recipe.directory}"
    Path(recipe.directory).mkdir()
    command = command.replace("step=N", f"step={STEPS}").replace("=CLASS", f"={algorithm.lower()}")
    code, shown = invoke(*shlex.split(command)[1:])
    assert code == 0, shown
    found, wanted = Program(framework, algorithm).resume(recipe.target), canonical(kind, saved)
    assert found.step == step_there(kind, framework, algorithm)
    for mine, theirs in zip(found.weights, wanted.weights, strict=True):
        np.testing.assert_array_equal(mine, theirs)
    if not keeps_state(kind):
        assert not any(array.any() for array in found.state)
        return
    assert wanted.state
    # Keras folds the learning rate and the sign of the update into SGD's momentum
    factor = -RATE if algorithm == "SGD" and framework != "torch" else 1.0
    for mine, theirs in zip(found.state, wanted.state, strict=True):
        assert theirs.any()
        np.testing.assert_allclose(mine, factor * theirs, rtol=1e-6 if factor != 1.0 else 0)
