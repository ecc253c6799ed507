"""The three cases of the complaint that started the project, on the command line and in the frameworks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
tf = pytest.importorskip("tensorflow")
keras = pytest.importorskip("keras")

from ckptconv.schema import schema_problems  # noqa: E402
from tests.support.command import FIXTURES, convert, inspect, refused, run  # noqa: E402

ADAM = FIXTURES / "plain" / "linear-adam-9-steps" / "run.pt"
SGD = FIXTURES / "plain" / "linear-sgd-9-steps" / "run.pt"
EPOCHS = FIXTURES / "plain" / "epochs-adam" / "run.pt"


def keras_run(optimizer_class: type, seed: int) -> tuple[Any, Any, Any]:
    """A fresh Keras model like `Linear(1, 1)`, its optimizer with variables, and their checkpoint."""
    keras.utils.set_random_seed(seed)
    model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1)])
    for number, variable in enumerate(model.trainable_variables):
        variable.assign(tf.fill(variable.shape, 50.0 + seed + number))
    optimizer = optimizer_class(0.01)
    optimizer.build(model.trainable_variables)
    return model, optimizer, tf.train.Checkpoint(model=model, optimizer=optimizer)


def template(optimizer_class: type, folder: Path) -> str:
    return keras_run(optimizer_class, seed=7)[2].save(str(folder / "fresh" / "ckpt"))


def resumed(converted: Path, optimizer_class: type) -> tuple[Any, Any, Any]:
    """A Keras run that goes on from a converted checkpoint, every variable of which was restored."""
    model, optimizer, checkpoint = keras_run(optimizer_class, seed=8)
    checkpoint.restore(str(converted)).assert_consumed()
    return model, optimizer, checkpoint


def assert_weights(model: Any, source: Path) -> None:
    state = torch.load(source, weights_only=True)["model_state_dict"]
    np.testing.assert_array_equal(model.layers[0].kernel.numpy(), state["weight"].numpy().T)
    np.testing.assert_array_equal(model.layers[0].bias.numpy(), state["bias"].numpy())


def assert_moments(optimizer: Any, source: Path) -> None:
    state = torch.load(source, weights_only=True)["optimizer_state_dict"]["state"]
    for position in (0, 1):
        for key, variables in (("exp_avg", optimizer._momentums), ("exp_avg_sq", optimizer._velocities)):
            want = state[position][key].numpy()
            assert np.any(want)
            np.testing.assert_array_equal(variables[position].numpy(), want.T, err_msg=f"{key} {position}")


def train_keras(model: Any, optimizer: Any, steps: int) -> None:
    for number in range(steps):
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(tf.square(model(tf.constant([[1.0 + number], [0.5]]))))
        optimizer.apply_gradients(
            zip(tape.gradient(loss, model.trainable_variables), model.trainable_variables, strict=True)
        )


class TestManagerOfKeras:
    """(a) A Keras model and Adam, a CheckpointManager saving every third of 10 steps."""

    def test_the_newest_says_step_9_recorded_with_its_key(self, tmp_path: Path) -> None:
        model, optimizer, _ = keras_run(keras.optimizers.Adam, seed=1)
        checkpoint = tf.train.Checkpoint(optimizer=optimizer, model=model)
        manager = tf.train.CheckpointManager(checkpoint, str(tmp_path / "run"), max_to_keep=3)
        for number in range(1, 11):
            train_keras(model, optimizer, 1)
            if number % 3 == 0:
                manager.save()
        recorded = {"status": "recorded", "value": 9, "source": "optimizer/_iterations"}
        # the key is one that TensorFlow itself lists, and holds 9 there
        reader = tf.train.load_checkpoint(manager.latest_checkpoint)
        key = f"{recorded['source']}/.ATTRIBUTES/VARIABLE_VALUE"
        assert reader.get_tensor(key) == 9
        for path in (tmp_path / "run", manager.latest_checkpoint):
            document = inspect(path)
            assert document["progress"]["step"] == recorded
            assert document["optimizers"][0]["algorithm"] == "adam"
            assert not schema_problems(document, "checkpoint")
        steps = [inspect(path)["progress"]["step"]["value"] for path in manager.checkpoints]
        assert steps == [3, 6, 9]

    def test_a_person_reads_it_first(self) -> None:
        done = run("inspect", FIXTURES / "keras3" / "manager-adam-step-9" / "artifact")
        assert done.returncode == 0
        (line,) = [line for line in done.stdout.splitlines() if line.split()[:1] == ["step"]][:1]
        assert line.split()[1] == "9"
        assert "optimizer/_iterations" in line


class TestLinearOfTorch:
    """(b) `Linear(1, 1)`, `model_state_dict` and `optimizer_state_dict` only, saved after 9 steps."""

    def test_adam_says_step_9_from_the_optimizer(self) -> None:
        document = inspect(ADAM)
        source = "optimizer_state_dict.state.0.step"
        assert document["progress"]["step"] == {"status": "recorded", "value": 9, "source": source}

    def test_sgd_says_that_nothing_tells(self) -> None:
        step = inspect(SGD)["progress"]["step"]
        assert step["status"] == "unknown"
        assert step["reason"]
        assert step.get("candidates", []) == []

    def test_a_keras_target_of_sgd_needs_a_supplied_step(self, tmp_path: Path) -> None:
        fresh = template(keras.optimizers.SGD, tmp_path)
        (problem,) = refused("convert", SGD, tmp_path / "out-1", "--template", fresh)
        assert (problem["code"], problem["loc"][-1]) == ("progress-unknown", "step")
        assert "--set step=N" in problem["hint"]
        assert not list(tmp_path.glob("out-1*"))
        converted = convert(SGD, tmp_path / "out-1", "--template", fresh, "--set", "step=9")
        document = inspect(converted)
        assert document["progress"]["step"]["value"] == 9

        model, optimizer, checkpoint = resumed(converted, keras.optimizers.SGD)
        assert int(optimizer.iterations) == 9
        assert_weights(model, SGD)

        train_keras(model, optimizer, 2)
        saved = checkpoint.save(str(tmp_path / "further" / "ckpt"))
        back = convert(saved, tmp_path / "back.pt", "--template", SGD)
        state = torch.load(back, weights_only=True)
        linear = torch.nn.Linear(1, 1)
        linear.load_state_dict(state["model_state_dict"])
        torch.optim.SGD(linear.parameters(), lr=0.5).load_state_dict(state["optimizer_state_dict"])
        assert_weights(model, back)
        # torch has no place for the step of SGD: the note keeps it
        assert inspect(back)["progress"]["step"]["value"] == 11

    def test_the_supplied_step_is_labelled(self, tmp_path: Path) -> None:
        step = inspect(convert(SGD, tmp_path / "kept", "--to", "neutral", "--set", "step=9"))["progress"][
            "step"
        ]
        assert step == {"status": "supplied", "value": 9, "source": "--set"}

    def test_archiving_sgd_needs_no_step(self, tmp_path: Path) -> None:
        archive = convert(SGD, tmp_path / "archive", "--to", "neutral")
        assert inspect(archive)["progress"]["step"]["status"] == "unknown"
        back = torch.load(convert(archive, tmp_path / "back.pt"), weights_only=True)
        assert torch.equal(back["model_state_dict"]["weight"], torch.load(SGD)["model_state_dict"]["weight"])


class TestEpochsOfTorch:
    """(c) Three epochs of 10 batches, `epoch` (0-based, last finished) saved every second epoch."""

    def test_both_readings_are_offered_and_none_assumed(self) -> None:
        progress = inspect(EPOCHS)["progress"]
        assert progress["epochs"]["status"] == "unknown"
        assert [(c["value"], c["source"]) for c in progress["epochs"]["candidates"]] == [
            (1, "epoch"),
            (2, "epoch"),
        ]
        assert all(candidate["if"] for candidate in progress["epochs"]["candidates"])
        source = "optimizer_state_dict.state.0.step"
        assert progress["step"] == {"status": "recorded", "value": 20, "source": source}

    def test_set_epochs_settles_it(self, tmp_path: Path) -> None:
        progress = inspect(convert(EPOCHS, tmp_path / "n", "--to", "neutral", "--set", "epochs=2"))[
            "progress"
        ]
        assert progress["epochs"] == {"status": "supplied", "value": 2, "source": "--set"}
        assert progress["step"]["value"] == 20

    @pytest.mark.parametrize(("convention", "epochs"), [("count", 1), ("last", 2)])
    def test_so_does_the_convention(self, convention: str, epochs: int, tmp_path: Path) -> None:
        setting = f"epoch_convention={convention}"
        target = convert(EPOCHS, tmp_path / "n", "--to", "neutral", "--set", setting)
        assert inspect(target)["progress"]["epochs"]["value"] == epochs

    def test_settled_epochs_go_with_the_converted_run(self, tmp_path: Path) -> None:
        fresh = template(keras.optimizers.Adam, tmp_path)
        converted = convert(EPOCHS, tmp_path / "out-1", "--template", fresh, "--set", "epochs=2")
        assert inspect(converted)["progress"]["epochs"]["value"] == 2


@pytest.mark.parametrize(("source", "step"), [(ADAM, 9), (EPOCHS, 20)], ids=["b", "c"])
def test_a_keras_run_resumes_and_comes_back(source: Path, step: int, tmp_path: Path) -> None:
    fresh = template(keras.optimizers.Adam, tmp_path)
    assert (
        int(tf.train.load_checkpoint(fresh).get_tensor("optimizer/_iterations/.ATTRIBUTES/VARIABLE_VALUE"))
        == 0
    )
    converted = convert(source, tmp_path / "out-1", "--template", fresh)

    model, optimizer, checkpoint = resumed(converted, keras.optimizers.Adam)
    assert int(optimizer.iterations) == step
    assert_weights(model, source)
    assert_moments(optimizer, source)

    train_keras(model, optimizer, 2)
    assert int(optimizer.iterations) == step + 2
    saved = checkpoint.save(str(tmp_path / "further" / "ckpt"))
    settled = ("--set", "epoch_convention=last", "--set", "epochs=3") if source == EPOCHS else ()
    back = convert(saved, tmp_path / "back.pt", "--template", source, *settled)

    state = torch.load(back, weights_only=True)
    linear = torch.nn.Linear(1, 1)
    linear.load_state_dict(state["model_state_dict"])
    adam = torch.optim.Adam(linear.parameters(), lr=0.5)
    adam.load_state_dict(state["optimizer_state_dict"])
    assert [float(adam.state[p]["step"]) for p in linear.parameters()] == [step + 2.0] * 2
    assert_weights(model, back)
    assert_moments(optimizer, back)
    assert adam.param_groups[0]["lr"] == pytest.approx(0.01)
    if source == EPOCHS:
        assert state["epoch"] == 2
