"""TensorFlow 1 against compat.v1: keys, steps, `Saver.restore`, and runs that go on elsewhere."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
tf = pytest.importorskip("tensorflow")

import ckptconv  # noqa: E402
from ckptconv.document import Known, Unknown, value_of  # noqa: E402
from ckptconv.errors import CkptError  # noqa: E402

FIXTURES = Path(__file__).resolve().parents[2] / "fixtures/tf1"
CASES = sorted(path.parent.name for path in FIXTURES.glob("*/expected.json"))
tf1 = tf.compat.v1


def case(name: str) -> tuple[Path, dict[str, Any]]:
    expected: dict[str, Any] = json.loads((FIXTURES / name / "expected.json").read_text())
    return FIXTURES / name / expected["checkpoint"], expected


def restored(prefix: Path) -> dict[str, Any]:
    """Every variable as `Saver.restore` fills it."""
    reader = tf.train.load_checkpoint(str(prefix))
    with tf.Graph().as_default():
        variables = {
            key: tf1.get_variable(key, shape, reader.get_variable_to_dtype_map()[key], use_resource=False)
            for key, shape in reader.get_variable_to_shape_map().items()
            if not key.startswith("ckptconv")
        }
        with tf1.Session() as session:
            tf1.train.Saver(variables).restore(session, str(prefix))
            values: dict[str, Any] = session.run(variables)
    return values


@pytest.mark.parametrize("name", CASES)
def test_every_key_and_the_step(name: str) -> None:
    path, expected = case(name)
    document = ckptconv.open(path)
    assert document.provenance.dialect == "tf1"
    held = {
        **{name: param.tensor for name, param in document.params.items()},
        **dict(document.extras),
    }
    digests = {key: entry["sha256"] for key, entry in expected["tensors"].items()}
    for key, tensor in held.items():
        assert hashlib.sha256(tensor.read().tobytes()).hexdigest() == digests[key], key
    (optimizer,) = document.optimizers
    assert optimizer.algorithm == expected["algorithm"]
    suffixes = {"first_moment": "", "second_moment": "_1", "momentum": ""}
    scopes = {"adam-renamed": "Trainer", "momentum-ema": "Momentum"}
    for slot, by_param in optimizer.slots.items():
        assert set(by_param) == set(document.params)
        for owner, tensor in by_param.items():
            key = f"{owner}/{scopes.get(name, 'Adam')}{suffixes[slot]}"
            assert hashlib.sha256(tensor.read().tobytes()).hexdigest() == digests[key], key
    step = document.progress.step
    assert value_of(step) == expected["step"]
    assert getattr(step, "status", "unknown") == expected["status"]
    if isinstance(step, Unknown):
        assert [candidate.value for candidate in step.candidates] == expected["candidates"]
    if isinstance(step, Known) and step.status == "derived":
        assert step.formula
    if "betas" in expected:
        facts = optimizer.groups[0].hyperparameters
        assert [value_of(facts["beta_1"]), value_of(facts["beta_2"])] == expected["betas"]
    averages = [key for key in document.extras if "ExponentialMovingAverage" in key]
    assert len(averages) == expected.get("averages", 0)


@pytest.mark.parametrize("name", CASES)
def test_the_way_back_is_restored_by_the_saver(name: str, tmp_path: Path) -> None:
    path, _ = case(name)
    ckptconv.save(ckptconv.open(path), tmp_path / "again", to="tensorflow")
    ours, theirs = restored(tmp_path / "again"), restored(path)
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        assert value.tobytes() == ours[key].tobytes(), key


def test_through_the_neutral_directory(tmp_path: Path) -> None:
    path, _ = case("partitioned-adam")
    ckptconv.convert(path, tmp_path / "run", to="neutral")
    ckptconv.convert(tmp_path / "run", tmp_path / "back", to="tensorflow:tf1")
    for key, value in restored(path).items():
        assert value.tobytes() == restored(tmp_path / "back")[key].tobytes(), key


class Graph:
    """The model of the fixtures, with Adam, in a graph of its own."""

    def __init__(self, optimizer: Any = None) -> None:
        self.graph = tf.Graph()
        with self.graph.as_default():
            self.x = tf1.placeholder(tf.float32, (None, 4))
            self.y = tf1.placeholder(tf.float32, (None, 2))
            hidden = self.x
            for scope, rows, columns in (("dense", 4, 3), ("dense_1", 3, 2)):
                with tf1.variable_scope(scope):
                    kernel = tf1.get_variable("kernel", (rows, columns), use_resource=False)
                    bias = tf1.get_variable("bias", (columns,), use_resource=False)
                hidden = tf.matmul(hidden, kernel) + bias
                hidden = tf.tanh(hidden) if scope == "dense" else hidden
            step = tf1.train.get_or_create_global_step()
            loss = tf.reduce_mean(tf.square(hidden - self.y))
            made = optimizer() if optimizer else tf1.train.AdamOptimizer(0.01)
            self.update = made.minimize(loss, global_step=step)
            self.saver = tf1.train.Saver()

    def go_on(self, prefix: Path, data: list[tuple[Any, Any]]) -> dict[str, Any]:
        """All variables after more updates."""
        with self.graph.as_default(), tf1.Session() as session:
            self.saver.restore(session, str(prefix))
            for x, y in data:
                session.run(self.update, {self.x: x, self.y: y})
            values: dict[str, Any] = session.run({v.op.name: v for v in tf1.global_variables()})
        return values

    def save(self, prefix: Path) -> Path:
        """Save what initialization gives."""
        with self.graph.as_default(), tf1.Session() as session:
            session.run(tf1.global_variables_initializer())
            return Path(self.saver.save(session, str(prefix), write_meta_graph=False))


def batches(count: int = 4) -> list[tuple[Any, Any]]:
    rng = np.random.default_rng(9)
    return [
        (rng.normal(size=(8, 4)).astype("float32"), rng.normal(size=(8, 2)).astype("float32"))
        for _ in range(count)
    ]


def torch_model(torch: Any) -> Any:
    return torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Tanh(), torch.nn.Linear(3, 2))


def torch_updates(torch: Any, model: Any, optimizer: Any, data: list[tuple[Any, Any]]) -> None:
    for x, y in data:
        optimizer.zero_grad()
        torch.mean((model(torch.from_numpy(x)) - torch.from_numpy(y)) ** 2).backward()
        optimizer.step()


def assert_like_torch(values: dict[str, Any], model: Any) -> None:
    for scope, layer in (("dense", model[0]), ("dense_1", model[2])):
        kernel = layer.weight.detach().numpy().T
        np.testing.assert_allclose(values[f"{scope}/kernel"], kernel, rtol=2e-5, atol=2e-6)
        np.testing.assert_allclose(values[f"{scope}/bias"], layer.bias.detach().numpy(), rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("name", ["adam-global-step", "adam-derived"])
def test_adam_goes_on_in_torch(name: str, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    path, _ = case(name)
    model = torch_model(torch)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    template = tmp_path / "fresh.pt"
    torch_updates(torch, model, optimizer, batches(1))
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": 1}, template)
    target = tmp_path / "run.pt"
    ckptconv.convert(path, target, template=template)
    state = torch.load(target, weights_only=True)
    assert state["step"] == 7
    assert {float(entry["step"]) for entry in state["optimizer"]["state"].values()} == {7.0}
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    torch_updates(torch, model, optimizer, batches())
    assert_like_torch(Graph().go_on(case("adam-global-step")[0], batches()), model)


def test_adam_goes_on_in_keras(tmp_path: Path) -> None:
    keras = pytest.importorskip("keras")
    path, _ = case("adam-global-step")
    layers = [keras.layers.Input((4,)), keras.layers.Dense(3, activation="tanh"), keras.layers.Dense(2)]
    model = keras.Sequential(layers)
    optimizer = keras.optimizers.Adam(0.01, epsilon=1e-8)
    optimizer.build(model.trainable_variables)
    template = tf.train.Checkpoint(model=model, optimizer=optimizer).save(str(tmp_path / "fresh"))
    ckptconv.convert(path, tmp_path / "run", template=template)
    checkpoint = tf.train.Checkpoint(model=model, optimizer=optimizer)
    checkpoint.restore(str(tmp_path / "run")).assert_consumed()
    assert int(optimizer.iterations) == 7
    for x, y in batches():
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(tf.square(model(x) - y))
        variables = model.trainable_variables
        optimizer.apply_gradients(zip(tape.gradient(loss, variables), variables, strict=True))
    values = Graph().go_on(path, batches())
    for scope, layer in (("dense", model.layers[0]), ("dense_1", model.layers[1])):
        np.testing.assert_allclose(values[f"{scope}/kernel"], layer.kernel, rtol=2e-5, atol=2e-6)
        np.testing.assert_allclose(values[f"{scope}/bias"], layer.bias, rtol=2e-5, atol=2e-6)


def test_torch_goes_on_in_a_graph(tmp_path: Path) -> None:
    """Weights, slots, the step and both powers: bit-equal to what TensorFlow's own updates leave in them."""
    torch = pytest.importorskip("torch")
    torch.manual_seed(1)
    model = torch_model(torch)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    torch_updates(torch, model, optimizer, batches(7))
    source = tmp_path / "run.pt"
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": 7}, source)
    template = Graph().save(tmp_path / "fresh")
    ckptconv.convert(source, tmp_path / "run", template=template, to="tensorflow:tf1")
    values = restored(tmp_path / "run")
    assert values["global_step"] == 7
    trained = restored(case("adam-global-step")[0])
    for power in ("beta1_power", "beta2_power"):
        assert values[power].tobytes() == trained[power].tobytes()
    np.testing.assert_array_equal(
        values["dense/kernel/Adam_1"], optimizer.state[model[0].weight]["exp_avg_sq"].numpy().T
    )
    torch_updates(torch, model, optimizer, batches())
    assert_like_torch(Graph().go_on(tmp_path / "run", batches()), model)


def test_momentum_goes_on_both_ways(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    path, _ = case("momentum-ema")
    model = torch_model(torch)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    torch_updates(torch, model, optimizer, batches(1))
    template = tmp_path / "fresh.pt"
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, template)
    ckptconv.convert(path, tmp_path / "run.pt", template=template, allow=["state-dropped"])
    state = torch.load(tmp_path / "run.pt", weights_only=True)
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    torch_updates(torch, model, optimizer, batches())
    graph = Graph(lambda: tf1.train.MomentumOptimizer(0.05, 0.9))
    assert_like_torch(graph.go_on(path, batches()), model)
    saved = graph.save(tmp_path / "graph")
    ckptconv.convert(tmp_path / "run.pt", tmp_path / "back", template=saved, set_={"step": "6"})
    assert_like_torch(graph.go_on(tmp_path / "back", batches()), model)


def test_an_edited_step_moves_the_powers(tmp_path: Path) -> None:
    path, _ = case("adam-global-step")
    ckptconv.convert(path, tmp_path / "moved", to="tensorflow:tf1", set_={"step": "1500"})
    values = restored(tmp_path / "moved")
    assert values["global_step"] == 1500
    underflowed = restored(case("adam-underflowed")[0])
    for power in ("beta1_power", "beta2_power"):
        assert values[power].tobytes() == underflowed[power].tobytes()


def test_an_unknown_step_is_not_carried(tmp_path: Path) -> None:
    path, _ = case("adam-underflowed")
    with pytest.raises(CkptError) as caught:
        ckptconv.convert(path, tmp_path / "out", template=case("adam-fresh")[0])
    assert "progress-unknown" in {problem.code for problem in caught.value.problems}
    assert not list(tmp_path.iterdir())


def test_a_moved_directory_is_read_by_its_state_file(tmp_path: Path) -> None:
    """The state file of a Saver names paths that are gone as soon as the directory has moved."""
    shutil.copytree(case("adam-global-step")[0].parent, tmp_path / "run")
    (tmp_path / "run/checkpoint").write_text('model_checkpoint_path: "/gone/run/model.ckpt-7"\n')
    assert value_of(ckptconv.open(tmp_path / "run").progress.step) == 7


ESTIMATOR = FIXTURES / "estimator/artifact"


def test_an_estimators_directory() -> None:
    """The newest of its checkpoints, which is said; another by --select; the rest is let alone."""
    opened = ckptconv.open(ESTIMATOR)
    assert (opened.provenance.source, opened.provenance.dialect) == ("model.ckpt-10", "tf1")
    assert opened.progress.step == Known(value=10, source="global_step")
    assert any("'model.ckpt-10' was taken" in said and "model.ckpt-8" in said for said in opened.oddities)
    older = ckptconv.open(ESTIMATOR, select=["model.ckpt-8"])
    assert (older.provenance.source, value_of(older.progress.step)) == ("model.ckpt-8", 8)


def test_an_estimators_newest_checkpoint_without_its_state_file(tmp_path: Path) -> None:
    shutil.copytree(ESTIMATOR, tmp_path / "run", ignore=shutil.ignore_patterns("checkpoint"))
    opened = ckptconv.open(tmp_path / "run")
    assert value_of(opened.progress.step) == 10
    assert any("the highest number" in said for said in opened.oddities)
    (tmp_path / "run/checkpoint").write_text('model_checkpoint_path: "/gone/model.ckpt-12"\n')
    opened = ckptconv.open(tmp_path / "run")
    assert value_of(opened.progress.step) == 10
    assert any("/gone/model.ckpt-12" in said for said in opened.oddities)


def test_an_estimators_exported_model_beside_its_checkpoints(tmp_path: Path) -> None:
    """A numbered SavedModel in the directory of the run is not taken for the newest of it."""
    run = shutil.copytree(ESTIMATOR, tmp_path / "run")
    shutil.move(run / "export/best/1700000000", run / "1700000000")
    assert value_of(ckptconv.open(run).progress.step) == 10
    assert ckptconv.open(run / "1700000000").provenance.source == "variables"
    assert ckptconv.open(run, select=["1700000000"]).provenance.source == "variables"


def test_an_estimators_run_goes_on(tmp_path: Path) -> None:
    ckptconv.convert(ESTIMATOR, tmp_path / "neutral", to="neutral")
    (tmp_path / "again").mkdir()
    ckptconv.convert(tmp_path / "neutral", tmp_path / "again/model.ckpt-10", to="tensorflow:tf1")
    ours = Graph().go_on(tmp_path / "again/model.ckpt-10", batches())
    theirs = Graph().go_on(ESTIMATOR / "model.ckpt-10", batches())
    assert ours["global_step"] == 14
    for key, value in theirs.items():
        assert value.tobytes() == ours[key].tobytes(), key
    assert tf.train.latest_checkpoint(str(tmp_path / "again")) == str(tmp_path / "again/model.ckpt-10")


@pytest.mark.parametrize("name", ["v1-adam", "v1-sharded"])
def test_the_first_format_goes_on_as_a_bundle(name: str, tmp_path: Path) -> None:
    path, expected = case(name)
    ckptconv.convert(path, tmp_path / "run", to="tensorflow:tf1")
    if name == "v1-sharded":  # its graph is partitioned, `Graph` is not; both read the same names
        assert len(list(tmp_path.glob("run.data-*"))) == 3
    ours, theirs = Graph().go_on(tmp_path / "run", batches()), Graph().go_on(path, batches())
    assert ours["global_step"] == expected["step"] + len(batches())
    for key, value in theirs.items():
        assert value.tobytes() == ours[key].tobytes(), key
