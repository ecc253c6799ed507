"""Live Keras objects, Keras 3 and tf_keras, against TensorFlow itself and against live PyTorch."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("KERAS_BACKEND", "tensorflow")

tf = pytest.importorskip("tensorflow")
keras3 = pytest.importorskip("keras")
tf_keras = pytest.importorskip("tf_keras")
torch = pytest.importorskip("torch")

import ckptconv  # noqa: E402
from ckptconv.adapters import keras as adapter  # noqa: E402
from ckptconv.errors import CkptError  # noqa: E402
from ckptconv.schema import to_json, validate_manifest  # noqa: E402
from tests.support.command import run  # noqa: E402

KINDS = ("keras3", "tf_keras", "tf_keras_legacy")
FORMS = ("sequential", "functional", "subclassed")
WIDTH, OUT = 6, 4

Model = Any
RNG = np.random.default_rng(5)
X, Y = RNG.normal(size=(8, WIDTH)).astype("f4"), RNG.normal(size=(8, OUT)).astype("f4")


def library(kind: str) -> Any:
    return keras3 if kind == "keras3" else tf_keras


def unbuilt_model(kind: str, form: str) -> Model:
    """A square dense layer, a normalization, and a dense layer."""
    k = library(kind)
    parts = [k.layers.Dense(WIDTH, "tanh"), k.layers.BatchNormalization(), k.layers.Dense(OUT)]
    if form == "sequential":
        return k.Sequential(parts)
    if form == "functional":
        x = inputs = k.Input((WIDTH,))
        for part in parts:
            x = part(x)
        return k.Model(inputs, x)

    class Net(k.Model):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.first, self.norm, self.last = parts

        def call(self, x: Any, training: bool = False) -> Any:
            return self.last(self.norm(self.first(x), training=training))

    return Net()


def unbuilt_optimizer(kind: str, rate: float = 0.01) -> Any:
    k = library(kind)
    module = k.optimizers.legacy if kind == "tf_keras_legacy" else k.optimizers
    return module.Adam(rate, epsilon=1e-7)


def made(kind: str, seed: int, form: str = "sequential", rate: float = 0.01) -> tuple[Model, Any]:
    library(kind).utils.set_random_seed(seed)
    model, optimizer = unbuilt_model(kind, form), unbuilt_optimizer(kind, rate)
    model(X)
    rng = np.random.default_rng(seed)
    for variable in model.variables:
        variable.assign(rng.uniform(0.1, 1.0, variable.shape))
    if kind == "tf_keras_legacy":
        optimizer.iterations  # noqa: B018  makes the counter
        optimizer._create_all_weights(model.trainable_variables)
    else:
        optimizer.build(model.trainable_variables)
    return model, optimizer


def train(model: Model, optimizer: Any, steps: int) -> None:
    for _ in range(steps):
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean((model(X, training=True) - Y) ** 2)
        gradients = tape.gradient(loss, model.trainable_variables)
        optimizer.apply_gradients(zip(gradients, model.trainable_variables, strict=True))


def values(model: Model, optimizer: Any) -> list[Any]:
    state = optimizer.variables() if callable(optimizer.variables) else optimizer.variables
    return [variable.numpy() for variable in (*model.variables, *state)]


def assert_equal(a: list[Any], b: list[Any]) -> None:
    assert len(a) == len(b) > 0
    for left, right in zip(a, b, strict=True):
        assert left.dtype == right.dtype
        np.testing.assert_array_equal(left, right)


def codes(call: Callable[[], object]) -> list[tuple[str, tuple[object, ...]]]:
    with pytest.raises(CkptError) as caught:
        call()
    assert all(problem.message and problem.hint for problem in caught.value.problems)
    return [(problem.code, problem.loc) for problem in caught.value.problems]


class Torch(torch.nn.Module):
    """The same model."""

    def __init__(self) -> None:
        super().__init__()
        self.first = torch.nn.Linear(WIDTH, WIDTH)
        self.norm = torch.nn.BatchNorm1d(WIDTH, eps=1e-3, momentum=0.01)
        self.last = torch.nn.Linear(WIDTH, OUT)

    def forward(self, x: Any) -> Any:
        return self.last(self.norm(torch.tanh(self.first(x))))


def torch_made(seed: int, rate: float = 0.01) -> tuple[Model, Any]:
    torch.manual_seed(seed)
    model = Torch()
    with torch.no_grad():
        for tensor in (*model.parameters(), model.norm.running_mean, model.norm.running_var):
            tensor.uniform_(0.1, 1.0)
    return model, torch.optim.Adam(model.parameters(), lr=rate, eps=1e-7)


def torch_train(model: Model, optimizer: Any, steps: int) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        (model(torch.from_numpy(X)) - torch.from_numpy(Y)).pow(2).mean().backward()
        optimizer.step()


# -- one framework -------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_captured_run_goes_on_where_it_is_restored(kind: str, form: str) -> None:
    model, optimizer = made(kind, 1, form)
    train(model, optimizer, 3)
    captured = ckptconv.keras.capture(model, optimizer, progress={"epochs": 2})
    assert (captured.progress.step.value, captured.progress.step.status) == (3, "recorded")
    assert (captured.progress.epochs.value, captured.progress.epochs.source) == (2, "capture")
    train(model, optimizer, 1)  # the document is of the moment
    fresh, fresh_optimizer = made(kind, 2, form, rate=0.5)
    ckptconv.keras.restore(captured, fresh, fresh_optimizer)
    assert int(fresh_optimizer.iterations) == 3
    train(fresh, fresh_optimizer, 1)
    for _ in range(2):
        assert_equal(values(fresh, fresh_optimizer), values(model, optimizer))
        train(model, optimizer, 2)
        train(fresh, fresh_optimizer, 2)


@pytest.mark.parametrize("kind", KINDS)
def test_a_description_declares_what_live_objects_say(kind: str, tmp_path: Path) -> None:
    model, optimizer = made(kind, 1)
    train(model, optimizer, 2)
    spec = ckptconv.keras.describe(model, optimizer)
    assert spec.is_skeleton
    assert isinstance(spec.progress.step, ckptconv.Unknown)
    assert {p.evidence for p in spec.params.values()} == {"declared"}
    kernels = [p for p in spec.params.values() if p.role == "kernel"]
    assert [(p.layer, p.axes) for p in kernels] == [("dense", ("in", "out"))] * 2
    trained = [p.trainable for p in spec.params.values()]
    assert sorted(map(str, trained)) == ["False"] * 2 + ["True"] * 6
    (found,) = spec.optimizers
    assert found.algorithm == "adam"
    facts = found.groups[0].hyperparameters
    assert [facts[name].value for name in ("beta_1", "beta_2", "epsilon")] == pytest.approx(
        [0.9, 0.999, 1e-7],
        rel=1e-6,  # a legacy optimizer stores them, in float32
    )
    manifest = to_json(spec, values=True)
    assert validate_manifest(manifest) == []
    ckptconv.write_skeleton(spec, tmp_path / "spec.json")
    assert to_json(ckptconv.read_skeleton(tmp_path / "spec.json"), values=True) == manifest


@pytest.mark.parametrize("kind", ["keras3", "tf_keras"])
def test_a_frozen_layer_is_told(kind: str) -> None:
    k = library(kind)
    model = k.Sequential([k.layers.Dense(3, trainable=False), k.layers.Dense(3)])
    model(np.zeros((1, 3), "f4"))
    optimizer = unbuilt_optimizer(kind)
    optimizer.build(model.trainable_variables)
    spec = ckptconv.keras.describe(model, optimizer)
    assert [p.trainable for p in spec.params.values()] == [False, False, True, True]
    assert len(spec.optimizers[0].params) == 2


@pytest.mark.parametrize("kind", KINDS)
def test_a_compiled_model_has_one_optimizer(kind: str) -> None:
    def compiled(seed: int) -> tuple[Model, Any]:
        model, optimizer = made(kind, seed)
        model.compile(optimizer, "mse")
        return model, model.optimizer

    model, optimizer = compiled(1)
    model.fit(X, Y, epochs=3, batch_size=len(X), shuffle=False, verbose=0)
    captured = ckptconv.keras.capture(model)
    assert len(captured.optimizers) == 1
    assert captured.progress.step.value == 3
    for passed in (False, True):
        fresh, fresh_optimizer = compiled(2)
        ckptconv.keras.restore(captured, fresh, *([fresh_optimizer] if passed else []))
        assert_equal(values(fresh, fresh_optimizer), values(model, optimizer))
    other = unbuilt_optimizer(kind)
    assert codes(lambda: ckptconv.keras.describe(model, other)) == [("usage", ("optimizer",))]


@pytest.mark.parametrize(("source", "target"), [("tf_keras", "keras3"), ("tf_keras_legacy", "keras3")])
def test_another_generation_takes_the_run_over(source: str, target: str) -> None:
    model, optimizer = made(source, 1)
    train(model, optimizer, 3)
    captured = ckptconv.keras.capture(model, optimizer)
    fresh, fresh_optimizer = made(target, 2)
    ckptconv.keras.restore(captured, fresh, fresh_optimizer)
    assert int(fresh_optimizer.iterations) == 3
    assert_equal([v.numpy() for v in fresh.variables], [v.numpy() for v in model.variables])
    slots = {o.name: o.slots for o in ckptconv.keras.capture(fresh, fresh_optimizer).optimizers}
    own = {o.name: o.slots for o in captured.optimizers}
    for slot in ("first_moment", "second_moment"):
        left, right = list(slots["optimizer"][slot].values()), list(own["optimizer"][slot].values())
        assert_equal([t.read() for t in left], [t.read() for t in right])


# -- between the frameworks ----------------------------------------------------------------------------


def same_run(torch_live: tuple[Model, Any], keras_live: tuple[Model, Any]) -> None:
    """Weights, statistics, moments and steps, compared by a table of this file."""
    model, optimizer = torch_live
    other, other_optimizer = keras_live
    first, norm, last = other.layers
    rows = [
        (model.first.weight, first.kernel),
        (model.first.bias, first.bias),
        (model.norm.weight, norm.gamma),
        (model.norm.bias, norm.beta),
        (model.norm.running_mean, norm.moving_mean),
        (model.norm.running_var, norm.moving_variance),
        (model.last.weight, last.kernel),
        (model.last.bias, last.bias),
    ]
    for tensor, variable in rows:
        np.testing.assert_array_equal(tensor.detach().numpy().T, variable.numpy())
    moments = ckptconv.keras.capture(other, other_optimizer).optimizers[0].slots
    keys = {"first_moment": "exp_avg", "second_moment": "exp_avg_sq"}
    for slot, key in keys.items():
        mine = [optimizer.state[p][key].numpy().T for p in model.parameters()]
        assert_equal(mine, [tensor.read() for tensor in moments[slot].values()])
    steps = {int(state["step"]) for state in optimizer.state.values()}
    assert steps == {int(other_optimizer.iterations)}


@pytest.mark.parametrize("form", ["sequential", "subclassed"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_live_torch_run_into_live_keras_and_back(kind: str, form: str) -> None:
    run_, other = torch_made(1), made(kind, 2, form, rate=0.5)
    torch_train(*run_, 3)
    ckptconv.keras.restore(ckptconv.pytorch.capture(*run_), *other)
    same_run(run_, other)
    train(*other, 2)
    back = torch_made(3)
    ckptconv.pytorch.restore(ckptconv.keras.capture(*other), *back)
    same_run(back, other)
    assert back[0].norm.num_batches_tracked == 0


def test_live_objects_end_where_the_files_do(tmp_path: Path) -> None:
    """Both routes, then the same training: equal to the last bit, in both frameworks."""
    run_ = torch_made(1)
    torch_train(*run_, 3)
    source = tmp_path / "run.pt"
    torch.save({"model": run_[0].state_dict(), "optimizer": run_[1].state_dict()}, source)
    spec = ckptconv.pytorch.describe(*run_)

    live, filed = made("keras3", 2), made("keras3", 3)
    ckptconv.keras.restore(source, *live, source_spec=spec)
    template = tf.train.Checkpoint(model=filed[0], optimizer=filed[1]).save(str(tmp_path / "fresh"))
    ckptconv.convert(source, tmp_path / "ckpt", template=template, source_spec=spec)
    root = tf.train.Checkpoint(model=filed[0], optimizer=filed[1])
    root.restore(str(tmp_path / "ckpt")).assert_consumed()
    for _ in range(2):
        assert_equal(values(*live), values(*filed))
        train(*live, 2)
        train(*filed, 2)

    prefix = tf.train.Checkpoint(model=live[0], optimizer=live[1]).save(str(tmp_path / "on"))
    torch_live, torch_filed = torch_made(4), torch_made(5)
    keras_spec = ckptconv.keras.describe(*live)
    ckptconv.pytorch.restore(prefix, *torch_live, source_spec=keras_spec)
    fresh = tmp_path / "fresh.pt"
    torch.save({"model": torch_filed[0].state_dict(), "optimizer": torch_filed[1].state_dict()}, fresh)
    allow = ["assumed-layout"]  # a file does not tell that its square `weight` is a Linear's
    ckptconv.convert(prefix, tmp_path / "back.pt", template=fresh, source_spec=keras_spec, allow=allow)
    state = torch.load(tmp_path / "back.pt", weights_only=True)
    torch_filed[0].load_state_dict(state["model"])
    torch_filed[1].load_state_dict(state["optimizer"])
    for _ in range(2):
        for a, b in zip(torch_live[0].parameters(), torch_filed[0].parameters(), strict=True):
            assert torch.equal(a, b)
            for key, value in torch_live[1].state[a].items():
                assert torch.equal(value, torch_filed[1].state[b][key])
        torch_train(*torch_live, 2)
        torch_train(*torch_filed, 2)


def test_a_description_settles_a_square_layout(tmp_path: Path) -> None:
    run_, other = torch_made(1), made("keras3", 2)
    torch_train(*run_, 1)
    source = tmp_path / "run.pt"
    torch.save({"model": run_[0].state_dict(), "optimizer": run_[1].state_dict()}, source)
    before = values(*other)
    found = codes(lambda: ckptconv.keras.restore(source, *other))
    assert ("layout-ambiguous", ("params", "first.weight")) in found
    assert_equal(values(*other), before)
    ckptconv.write_skeleton(ckptconv.pytorch.describe(*run_), tmp_path / "spec.json")
    ckptconv.keras.restore(source, *other, source_spec=tmp_path / "spec.json")
    same_run(run_, other)


@pytest.mark.parametrize("kind", KINDS)
def test_a_description_is_a_template_of_the_command_line(kind: str, tmp_path: Path) -> None:
    run_, other = torch_made(1), made(kind, 2)
    torch_train(*run_, 3)
    source = tmp_path / "run.pt"
    torch.save({"model": run_[0].state_dict(), "optimizer": run_[1].state_dict()}, source)
    ckptconv.write_skeleton(ckptconv.keras.describe(*other), tmp_path / "keras.json")
    ckptconv.write_skeleton(ckptconv.pytorch.describe(*run_), tmp_path / "torch.json")
    specs = ("--template", tmp_path / "keras.json", "--source-spec", tmp_path / "torch.json")
    done = run("convert", source, tmp_path / "ckpt", *specs)
    assert done.returncode == 0, done.stderr
    root = tf.train.Checkpoint(model=other[0], optimizer=other[1])
    root.restore(str(tmp_path / "ckpt")).assert_consumed()
    same_run(run_, other)

    back = torch_made(4)
    specs = ("--template", tmp_path / "torch.json", "--source-spec", tmp_path / "keras.json")
    done = run("convert", tmp_path / "ckpt", tmp_path / "back.pt", *specs)
    assert done.returncode == 0, done.stderr
    state = torch.load(tmp_path / "back.pt", weights_only=True)
    back[0].load_state_dict(state["model"])
    back[1].load_state_dict(state["optimizer"])
    same_run(back, other)


def test_frozen_on_both_sides(tmp_path: Path) -> None:
    run_ = torch_made(1)
    run_[0].first.requires_grad_(False)
    optimizer = torch.optim.Adam([p for p in run_[0].parameters() if p.requires_grad], eps=1e-7)
    torch_train(run_[0], optimizer, 2)
    model = unbuilt_model("keras3", "sequential")
    model.layers[0].trainable = False
    model(X)
    other = unbuilt_optimizer("keras3")
    other.build(model.trainable_variables)
    ckptconv.keras.restore(ckptconv.pytorch.capture(run_[0], optimizer), model, other)
    assert int(other.iterations) == 2
    kernel = run_[0].first.weight.detach().numpy().T
    np.testing.assert_array_equal(kernel, model.layers[0].kernel.numpy())
    moments = ckptconv.keras.capture(model, other).optimizers[0].slots["first_moment"]
    trained = [p for p in run_[0].parameters() if p.requires_grad]
    assert_equal(
        [optimizer.state[p]["exp_avg"].numpy().T for p in trained], [t.read() for t in moments.values()]
    )


def test_what_the_live_objects_say_already_is_not_required_of_their_code() -> None:
    run_ = torch_made(1)
    torch_train(*run_, 1)
    captured = ckptconv.pytorch.capture(*run_)
    other = made("keras3", 2, rate=0.5)
    assert ckptconv.keras.restore(captured, *other).target_requires == ()
    assert ckptconv.pytorch.restore(ckptconv.keras.capture(*other), *torch_made(3)).target_requires == ()
    model = made("keras3", 2)[0]
    optimizer = keras3.optimizers.Adam(beta_1=0.5)
    optimizer.build(model.trainable_variables)
    (line,) = ckptconv.keras.restore(captured, model, optimizer).target_requires
    assert "beta_1=0.9" in line


def test_objects_that_tensorflow_cannot_save_are_said() -> None:
    class Stranger:
        name, built, optimizer, trainable_variables = "stranger", True, None, ()

    assert codes(lambda: ckptconv.keras.describe(Stranger())) == [("unsupported-feature", ("model",))]


# -- nothing is changed where something is wrong -------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_not_built_says_how(kind: str) -> None:
    for form in ("sequential", "subclassed"):
        model, optimizer = unbuilt_model(kind, form), unbuilt_optimizer(kind)
        for call in (ckptconv.keras.describe, ckptconv.keras.capture):
            assert codes(lambda call=call, m=model, o=optimizer: call(m, o)) == [
                ("template-unbuilt", ("model",))
            ]
    model, optimizer = made(kind, 1)[0], unbuilt_optimizer(kind)
    source = ckptconv.pytorch.capture(*torch_made(1))
    found = codes(lambda: ckptconv.keras.restore(source, model, optimizer))
    assert found == [("template-unbuilt", ("template", "optimizer"))]


def test_another_architecture_changes_nothing() -> None:
    other = made("keras3", 2)
    before = values(*other)
    model = torch.nn.Sequential(torch.nn.Linear(WIDTH, 5), torch.nn.Linear(5, OUT))
    source = ckptconv.pytorch.capture(model, torch.optim.Adam(model.parameters()))
    assert codes(lambda: ckptconv.keras.restore(source, *other))
    assert codes(lambda: ckptconv.keras.restore("nowhere/ckpt-1", *other)) == [("missing-file", ("ckpt-1",))]
    assert_equal(values(*other), before)


def test_a_failure_half_way_is_taken_back(monkeypatch: pytest.MonkeyPatch) -> None:
    model, optimizer = made("keras3", 1)
    train(model, optimizer, 3)
    captured = ckptconv.keras.capture(model, optimizer)
    fresh = made("keras3", 2)
    before = values(*fresh)
    whole = adapter._root

    class Failing:
        def __init__(self, root: Any) -> None:
            self.root, self.write = root, root.write

        def read(self, path: str) -> Any:
            status = self.root.read(path)
            if path.endswith("restored"):
                assert any(not np.array_equal(a, b) for a, b in zip(values(*fresh), before, strict=True))
                raise RuntimeError("out of memory")
            return status

    root = whole(*fresh)
    monkeypatch.setattr(adapter, "_root", lambda *live: Failing(root))
    monkeypatch.setattr(adapter._Live, "_walk", lambda self, root: iter(()))
    with pytest.raises(RuntimeError):
        ckptconv.keras.restore(captured, *fresh)
    assert_equal(values(*fresh), before)
