"""Every command that `doctor` spells out for a fixture runs as it is printed.

The templates are real: a fresh model and optimizer of the fixture's architecture, saved or described by the
very lines that stand above the command. What is written loads with the framework's strictest check.
"""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest

for needed in ("torch", "tensorflow", "tf_keras", "h5py"):
    pytest.importorskip(needed)

import ckptconv  # noqa: E402
from ckptconv.document import Checkpoint  # noqa: E402
from tests.restores import twins_of_files as twins  # noqa: E402
from tests.restores.test_doctor import checkpoints  # noqa: E402
from tests.restores.test_mends import Program, mends_of, run_lines  # noqa: E402
from tests.support.command import FIXTURES, invoke  # noqa: E402

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.slow]
CHECKPOINTS = {"/".join(path.relative_to(FIXTURES).parts): path for path in checkpoints()}
NO_TWIN = {
    # arrays of no layer, a buffer of the model's own, attention, tied layers, an optimizer that Keras lacks
    "dcp/grid-4-ranks/run": "keras",
    "dcp/hf-2-ranks/run/both": "keras",
    "deepspeed/universal-zero1/run": "keras",
    "deepspeed/universal-zero3/run": "keras",
    "deepspeed/zero1-fp16/run": "keras",
    "deepspeed/zero2-fp32/run": "keras",
    "deepspeed/zero3-bf16/run": "keras",
    "hf-trainer/sharded/checkpoint": "keras",
    "keras-file/dtypes/artifact/dtypes.weights.h5": "keras torch",
    "megatron/gpt-2-ranks": "keras",
    "megatron/gpt-distributed-optimizer/flat": "keras",
    "plain/schedule-free/run.pt": "keras",
    "plain/tied/run.pt": "keras",
    "tensorflow/bundle/bundle.index": "keras torch",
    "tensorflow/v1/v1-?????-of-00002": "keras torch",
}
"""Fixtures whose architecture is not written here -> the frameworks."""
ADAPTERS = {"peft/lora/run.pt", "hf-trainer/fsdp-adapter-sharded/checkpoint"}
"""Fixtures for which no command is spelled out before they are merged."""


def settings(command: str, text: str, checkpoint: Checkpoint) -> str:
    """The command with what a person fills in."""
    step = "0" if "perhaps 0 " in text else "8"
    filled = {"step=N": f"step={step}", "accumulation=B": "accumulation=3", "=RATE": "=0.01"}
    if "=CLASS" in command:
        filled["=CLASS"] = f"={twins.algorithm_of(checkpoint)}"
    for word, value in filled.items():
        command = command.replace(word, value)
    return command


def program(checkpoint: Checkpoint, framework: str) -> Program:
    if framework == "torch":
        return Program.of(framework, *twins.torch_twin(checkpoint))
    return Program.of(framework, *twins.keras_twin(checkpoint, framework))


def lines_and_command(mend: dict[str, Any], checkpoint: Checkpoint, framework: str) -> str:
    """Run the lines that stand above a command; what is left of the command without `mkdir`."""
    mine = mend["code"].index("model, optimizer = ...  # yours")
    if mine:  # the program that wrote the checkpoint
        run_lines(mend["code"][:mine], Program.of("torch", *twins.torch_twin(checkpoint, layers=True)))
    run_lines(mend["code"][mine + 1 :], program(checkpoint, framework))
    make_directory, _, command = mend["command"].partition(" && ")
    assert make_directory == "mkdir -p out"
    Path("out").mkdir()
    return settings(command, mend["text"], checkpoint)


def assert_it_loads(target: Path, checkpoint: Checkpoint, framework: str, step: int | None) -> None:
    import tensorflow as tf
    import torch

    again = program(checkpoint, framework)
    if framework == "torch":
        run = torch.load(target, weights_only=True)
        again.model.load_state_dict(run["model"])
        again.optimizer.load_state_dict(run["optimizer"])
        steps = {float(s["step"]) for s in again.optimizer.state.values() if "step" in s}
        assert not steps or step is None or max(steps) == step
        return
    again.optimizer.build(again.model.trainable_variables)
    objects = {"model": again.model, "optimizer": again.optimizer}
    tf.train.Checkpoint(**objects).restore(str(target)).assert_consumed()
    assert step is None or int(again.optimizer.iterations.numpy()) == step


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_its_commands_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = CHECKPOINTS[name]
    checkpoint = ckptconv.open(path)
    shown = invoke("doctor", path, "--json")[1]
    step = json.loads(shown)["step"].get("value")
    ran = 0
    for number, mend in enumerate(mends_of(path)):
        if not mend["command"]:
            continue
        here = tmp_path / str(number)
        if "--template" not in mend["command"]:
            here.mkdir()
            monkeypatch.chdir(here)
            code, said = invoke(*shlex.split(settings(mend["command"], mend["text"], checkpoint))[1:])
            assert code == 0, said
            ran += 1
            continue
        labels = {"keras3": "in Keras 3", "tf_keras": "in tf_keras", "torch": "in PyTorch"}
        for framework in (framework for framework, label in labels.items() if label in mend["text"]):
            family = "torch" if framework == "torch" else "keras"
            if family in NO_TWIN.get(name, ""):
                with pytest.raises(twins.NoTwin):
                    program(checkpoint, framework)
                continue
            folder = here.with_name(f"{number}-{framework}")
            folder.mkdir()
            monkeypatch.chdir(folder)
            command = lines_and_command(mend, checkpoint, framework)
            code, said = invoke(*shlex.split(command)[1:])
            assert code == 0, f"{command}\n{said}"
            target = Path(shlex.split(command)[3])
            assert_it_loads(target, checkpoint, framework, step if checkpoint.optimizers else None)
            ran += 1
    assert ran or name in NO_TWIN or not any(mend["command"] for mend in mends_of(path))
    assert not (ran and name in ADAPTERS)


def test_every_dialect_of_the_fixtures_has_a_command_that_was_run() -> None:
    told = {name.partition("/")[0] for name in CHECKPOINTS if name not in {*NO_TWIN, *ADAPTERS}}
    assert told == {name.partition("/")[0] for name in CHECKPOINTS} - {"tensorflow", "peft"}
