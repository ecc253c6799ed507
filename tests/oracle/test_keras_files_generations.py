"""From the files of one generation of Keras to those of another: values, and training that goes on alike."""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("h5py")
keras = pytest.importorskip("keras")
tf_keras = pytest.importorskip("tf_keras")

import h5py  # noqa: E402

import ckptconv  # noqa: E402
from ckptconv.document import value_of  # noqa: E402
from ckptconv.errors import CkptError  # noqa: E402
from ckptconv.skeleton import write_skeleton  # noqa: E402
from tests.support.keras_zoo import ZOO, check, compiled, state, subclassed  # noqa: E402

Model = Any
LEGACY = tf_keras.optimizers.legacy


def trained(k: Any, optimizer: Any, updates: int = 5) -> Model:
    """An MLP after some real updates."""
    model = compiled(k, ZOO["mlp"](k), optimizer, step=0)
    for variable in model.optimizer.variables[1:] if k is keras else ():
        if "learning_rate" not in variable.path:
            variable.assign(np.zeros(variable.shape))
    go_on(model, updates)
    return model


def go_on(model: Model, updates: int) -> None:
    random = np.random.default_rng(1)
    x, y = random.normal(size=(6, 4)).astype("float32"), random.normal(size=(6, 2)).astype("float32")
    for _ in range(updates):
        model.train_on_batch(x, y)


def weights(model: Model) -> list[np.ndarray[Any, Any]]:
    return [np.asarray(variable) for variable in model.trainable_variables]


def template(k: Any, optimizer: Any, path: Path) -> Path:
    model = compiled(k, ZOO["mlp"](k), optimizer, step=0)
    model.save_weights(path) if ".weights." in path.name else model.save(path)
    return path


def resumed(path: Path, optimizer: Any) -> Model:
    """The Keras 3 model of a file."""
    if path.suffix == ".keras":
        return keras.models.load_model(path)
    model = compiled(keras, ZOO["mlp"](keras), optimizer, step=0)
    model.load_weights(path)
    return model


PAIRS: dict[str, tuple[Callable[[Any], Any], Callable[[], Any]]] = {
    "adam": (lambda o: o.Adam(0.01, beta_1=0.8, amsgrad=True), lambda: keras.optimizers.Adam(amsgrad=True)),
    "sgd": (
        lambda o: o.SGD(0.01, momentum=0.9, nesterov=True),
        lambda: keras.optimizers.SGD(0.1, momentum=0.5),
    ),
    "rmsprop": (lambda o: o.RMSprop(0.01), lambda: keras.optimizers.RMSprop()),
    "adagrad": (lambda o: o.Adagrad(0.01), lambda: keras.optimizers.Adagrad()),
}
KINDS = [
    (tf_keras.optimizers, ".keras"),
    (tf_keras.optimizers, ".h5"),
    (LEGACY, ".h5"),
]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "kind", "target"),
    [
        *((name, kind, ".keras") for name in PAIRS for kind in range(len(KINDS)) if name == "adam" or kind),
        *(("adam", 2, target) for target in (".weights.h5", ".h5")),
    ],
)
def test_keras_2_goes_on_in_keras_3(name: str, kind: int, target: str, tmp_path: Path) -> None:
    """The weights after more updates are those of the run that was never converted; not a cold start's."""
    (source, fresh), (module, suffix) = PAIRS[name], KINDS[kind]
    model = trained(tf_keras, source(module))
    model.save(tmp_path / f"run{suffix}")
    made = template(keras, fresh(), tmp_path / f"template{target}")
    out = tmp_path / f"out{target}"
    report = ckptconv.convert(tmp_path / f"run{suffix}", out, template=made)
    assert report.progress["step"] == 5
    if target == ".h5":
        scope: dict[str, Any] = {}
        exec(report.restore, scope)
        again = scope["model"]
    else:
        again = resumed(out, source(keras.optimizers))
    assert int(again.optimizer.iterations) == 5
    for one, other in zip(weights(model), weights(again), strict=True):
        assert np.array_equal(one, other)
    cold = keras.models.clone_model(again)
    cold.set_weights(again.get_weights())
    cold.compile(source(keras.optimizers), keras.losses.MeanSquaredError())
    for each in (model, again, cold):
        go_on(each, 5)
    error, control = (
        max(float(np.abs(a - b).max()) for a, b in zip(weights(model), weights(other), strict=True))
        for other in (again, cold)
    )
    assert error < 2e-6
    assert control > 20 * error


def test_a_product_that_tf_keras_does_not_save_is_not_made_up(tmp_path: Path) -> None:
    """Nadam's: no formula has it, a graph multiplies it once per variable and a loop once per update."""
    tf = pytest.importorskip("tensorflow")
    torch = pytest.importorskip("torch")
    model = trained(tf_keras, tf_keras.optimizers.Nadam(0.01, beta_1=0.8))
    made = template(keras, keras.optimizers.Nadam(beta_1=0.8), tmp_path / "template.keras")
    net = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 3, bias=False), torch.nn.Linear(3, 2))
    adam = torch.optim.NAdam(net.parameters(), momentum_decay=1.0)
    torch.save({"model": net.state_dict(), "optimizer": adam.state_dict()}, tmp_path / "fresh.pt")
    for suffix in (".keras", ".h5"):
        path = tmp_path / f"run{suffix}"
        model.save(path)
        assert any("momentum_product" in said for said in ckptconv.open(path).oddities)
        for target, onto in (("out.keras", made), ("out.pt", tmp_path / "fresh.pt")):
            with pytest.raises(CkptError) as caught:
                ckptconv.convert(path, tmp_path / target, template=onto)
            assert "slots-missing" in {problem.code for problem in caught.value.problems}
    saved = tf.train.Checkpoint(model=model, optimizer=model.optimizer).save(str(tmp_path / "run"))
    arguments = {"beta_1": "0.8", "beta_2": "0.999", "epsilon": "1e-7", "weight_decay": "0"}
    ckptconv.convert(saved, tmp_path / "out.keras", template=made, set_=arguments)
    again = keras.models.load_model(tmp_path / "out.keras")
    assert float(again.optimizer._u_product.numpy()) == float(model.optimizer._u_product.numpy())
    for each in (model, again):
        go_on(each, 5)
    for one, other in zip(weights(model), weights(again), strict=True):
        assert np.abs(one - other).max() < 2e-6


def test_weights_of_tf_keras_do_not_tell_the_optimizer_s_class(tmp_path: Path) -> None:
    """It is said, it is asked for, and the one who knows it supplies it: a word, or a skeleton."""
    tf_keras.backend.clear_session()

    def make(k: Any, optimizer: Any) -> Model:
        dense = k.layers.Dense
        return compiled(k, k.Sequential([k.layers.Input((4,)), dense(3), dense(2)]), optimizer, step=0)

    model = make(tf_keras, tf_keras.optimizers.Adam(0.01, beta_1=0.8))
    go_on(model, 5)
    path, made = tmp_path / "run.weights.h5", tmp_path / "template.keras"
    model.save_weights(path)
    model.save(tmp_path / "declared.keras")
    run = ckptconv.open(path)
    assert run.optimizers[0].algorithm == "unknown"
    assert {"adam", "nadam", "adamax"} <= set(run.optimizers[0].algorithm_candidates)
    assert value_of(run.progress.step) == 5
    assert any("--set optimizer=" in said for said in run.oddities)
    make(keras, keras.optimizers.Adam(0.01, beta_1=0.8)).save(made)
    with pytest.raises(CkptError) as caught:
        ckptconv.convert(path, tmp_path / "none.keras", template=made)
    (problem,) = caught.value.problems
    assert (problem.code, problem.loc[-1]) == ("optimizer-unknown", "algorithm")
    assert "--set optimizer=adam " in problem.hint
    ckptconv.convert(path, tmp_path / "word.keras", template=made, set_={"optimizer": "adam"})
    ckptconv.convert(path, tmp_path / "spec.keras", template=made, source_spec=tmp_path / "declared.keras")
    go_on(model, 5)
    for name in ("word", "spec"):
        again = keras.models.load_model(tmp_path / f"{name}.keras")
        assert int(again.optimizer.iterations) == 5
        go_on(again, 5)
        for one, other in zip(weights(model), weights(again), strict=True):
            assert np.abs(one - other).max() < 2e-6


@pytest.mark.slow
@pytest.mark.parametrize(("module", "suffix"), KINDS, ids=["new-keras", "new-h5", "legacy-h5"])
def test_keras_3_goes_on_in_keras_2(module: Any, suffix: str, tmp_path: Path) -> None:
    model = trained(keras, keras.optimizers.Adam(0.01, beta_1=0.8))
    model.save(tmp_path / "run.keras")
    made = template(tf_keras, module.Adam(), tmp_path / f"template{suffix}")
    ckptconv.convert(tmp_path / "run.keras", tmp_path / f"out{suffix}", template=made)
    custom = {"Adam": module.Adam} if suffix == ".h5" else {}
    again = tf_keras.models.load_model(tmp_path / f"out{suffix}", custom_objects=custom)
    assert int(again.optimizer.iterations) == 5
    assert float(again.optimizer.beta_1) == pytest.approx(0.8)
    assert float(again.optimizer.learning_rate) == pytest.approx(0.01)
    for each in (model, again):
        go_on(each, 5)
    for one, other in zip(weights(model), weights(again), strict=True):
        assert np.abs(one - other).max() < 2e-6


@pytest.mark.slow
@pytest.mark.parametrize(("module", "suffix"), KINDS, ids=["new-keras", "new-h5", "legacy-h5"])
def test_keras_2_to_a_bundle_of_keras_3_and_back(module: Any, suffix: str, tmp_path: Path) -> None:
    """On both sides the run goes on as if it had never been converted."""
    import tensorflow as tf

    run, back = tmp_path / f"run{suffix}", tmp_path / f"back{suffix}"
    model = trained(tf_keras, module.Adam(0.01))
    model.save(run)
    other = compiled(keras, ZOO["mlp"](keras), keras.optimizers.Adam(0.01), step=0)
    checkpoint = tf.train.Checkpoint(model=other, optimizer=other.optimizer)
    made = checkpoint.save(str(tmp_path / "template"))
    ckptconv.convert(run, tmp_path / "out", template=made)
    checkpoint.restore(str(tmp_path / "out")).assert_consumed()
    assert int(other.optimizer.iterations) == 5
    assert all(np.array_equal(a, b) for a, b in zip(weights(model), weights(other), strict=True))
    report = ckptconv.convert(tmp_path / "out", back, template=run)
    assert report.progress["step"] == 5
    custom = {"Adam": module.Adam} if suffix == ".h5" else {}
    again = tf_keras.models.load_model(back, custom_objects=custom)
    for one, same in zip(state(model.optimizer), state(again.optimizer), strict=True):
        assert np.array_equal(np.asarray(one), np.asarray(same))
    cold = keras.models.clone_model(other)
    cold.set_weights(other.get_weights())
    cold.compile(keras.optimizers.Adam(0.01), keras.losses.MeanSquaredError())
    for each in (model, other, again, cold):
        go_on(each, 5)
    far, *near = (
        max(float(np.abs(a - b).max()) for a, b in zip(weights(model), weights(each), strict=True))
        for each in (cold, other, again)
    )
    assert max(near) < 2e-6
    assert far > 20 * max(near)


def test_a_legacy_optimizer_in_keras_is_said_to_be_lost(tmp_path: Path) -> None:
    trained(tf_keras, LEGACY.Adam(0.01)).save(tmp_path / "run.keras")
    run = ckptconv.open(tmp_path / "run.keras")
    assert run.optimizers == ()
    assert value_of(run.progress.step) is None
    assert any("legacy" in said for said in run.oddities)
    made = template(keras, keras.optimizers.Adam(), tmp_path / "template.keras")
    with pytest.raises(CkptError) as caught:
        ckptconv.convert(tmp_path / "run.keras", tmp_path / "out.keras", template=made)
    assert "progress-unknown" in {problem.code for problem in caught.value.problems}


def test_weights_alone_have_names_and_kinds_and_no_step(tmp_path: Path) -> None:
    model = trained(tf_keras, tf_keras.optimizers.Adam(0.01))
    model.save_weights(tmp_path / "w.h5")
    run = ckptconv.open(tmp_path / "w.h5")
    assert (run.kind, run.provenance.dialect) == ("weights", "tf-keras")
    assert value_of(run.progress.step) is None
    kernel = run.params["first/kernel"]
    assert (kernel.layer, kernel.axes, kernel.evidence) == ("dense", ("in", "out"), "named")
    ckptconv.convert(tmp_path / "w.h5", tmp_path / "back.h5")
    other = compiled(tf_keras, ZOO["mlp"](tf_keras), tf_keras.optimizers.Adam(0.01))
    other.load_weights(tmp_path / "back.h5")
    assert all(np.array_equal(a, b) for a, b in zip(model.get_weights(), other.get_weights(), strict=True))


def test_weights_of_a_subclassed_model_have_the_names_of_its_layers(tmp_path: Path) -> None:
    """Attributes, a layer of its own, a tuple, a list: every variable once, and back into the model."""

    def make() -> Model:
        return compiled(tf_keras, subclassed(tf_keras), tf_keras.optimizers.Adam(0.01))

    model, other = make(), make()
    model.save_weights(tmp_path / "w.h5")
    run = ckptconv.open(tmp_path / "w.h5")
    assert (run.kind, run.provenance.dialect) == ("weights", "tf-keras")
    check(run, model, declared=False)
    kinds = {name.split("/")[0].rstrip("_0123456789"): param.layer for name, param in run.params.items()}
    assert (kinds["embedding"], kinds["lstm"], kinds["dense"]) == ("embedding", "lstm", "dense")
    ckptconv.convert(tmp_path / "w.h5", tmp_path / "d", to="neutral")
    ckptconv.convert(tmp_path / "d", tmp_path / "back.h5")
    for variable in other.variables:
        variable.assign(np.full(tuple(variable.shape), -1))
    other.load_weights(tmp_path / "back.h5")
    assert all(np.array_equal(a, b) for a, b in zip(model.get_weights(), other.get_weights(), strict=True))


@pytest.mark.parametrize("k", [keras, tf_keras], ids=["keras", "tf_keras"])
def test_names_that_fill_an_attribute_are_split(k: Any, tmp_path: Path) -> None:
    """HDF5 holds 64 kB in one: Keras parts longer lists into `layer_names0`, `layer_names1`."""
    layers = [k.layers.Dense(2, use_bias=False, name=f"{'long' * 1000}_{number}") for number in range(20)]
    model = k.Sequential([k.layers.Input((2,)), *layers])
    model.compile(k.optimizers.SGD(0.1, momentum=0.9), k.losses.MeanSquaredError())
    model.optimizer.build(model.trainable_variables)
    for number, variable in enumerate(model.variables):
        variable.assign(np.full((2, 2), number))
    model.save(tmp_path / "a.h5")
    with h5py.File(tmp_path / "a.h5") as file:
        assert {"layer_names0", "layer_names1"} <= file["model_weights"].attrs.keys()
        assert "layer_names" not in file["model_weights"].attrs
    run = ckptconv.open(tmp_path / "a.h5")
    assert [float(param.read()[0, 0]) for param in run.params.values()] == list(map(float, range(20)))
    assert len(run.optimizers[0].slots["momentum"]) == 20
    ckptconv.convert(tmp_path / "a.h5", tmp_path / "b.h5")
    again = k.models.load_model(tmp_path / "b.h5")
    assert all(np.array_equal(a, b) for a, b in zip(model.get_weights(), again.get_weights(), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["keras3", "tf_keras", "tf_keras_legacy"])
def test_a_loss_scale_optimizer_counts_inside(kind: str, tmp_path: Path) -> None:
    k = keras if kind == "keras3" else tf_keras
    inner = (LEGACY if kind == "tf_keras_legacy" else k.optimizers).Adam(0.01)
    wrapper = k.optimizers.LossScaleOptimizer if k is keras else k.mixed_precision.LossScaleOptimizer
    model = ZOO["mlp"](k)
    model.compile(wrapper(inner), k.losses.MeanSquaredError())
    go_on(model, 4)
    suffixes = [".keras", ".weights.h5", ".h5"] if kind != "tf_keras_legacy" else [".h5"]
    for suffix in suffixes:
        path = tmp_path / f"run{suffix}"
        model.save_weights(path) if ".weights." in suffix else model.save(path)
        run = ckptconv.open(path)
        assert value_of(run.progress.step) == 4
        moments = [np.asarray(v) for v in (inner._momentums if kind != "tf_keras_legacy" else ())]
        ours = [tensor.read() for tensor in next(iter(run.optimizers[0].slots.values())).values()]
        assert len(ours) == 5
        assert all(np.array_equal(a, b) for a, b in zip(moments, ours, strict=bool(moments)))
        ckptconv.convert(path, tmp_path / f"back{suffix}", set_={"step": "9"})
        assert value_of(ckptconv.open(tmp_path / f"back{suffix}").progress.step) == 9
    if kind == "tf_keras":
        again = tf_keras.models.load_model(tmp_path / "back.keras")
        assert int(again.optimizer.iterations) == 9


def test_what_a_config_declares_and_the_file_lacks_is_said(tmp_path: Path) -> None:
    """States of generators are in no file; the layers of one that was damaged are missed."""
    layers = keras.layers
    model = keras.Sequential(
        [
            keras.Input((3,)),
            layers.Dense(2, name="here"),
            layers.Dropout(0.5, name="random"),
            layers.Dropout(0.0),
        ]
    )
    for suffix in (".keras", ".h5"):
        model.save(tmp_path / f"a{suffix}")
        (said,) = ckptconv.open(tmp_path / f"a{suffix}").oddities
        assert said.endswith("those of random")
    with h5py.File(tmp_path / "a.h5", "r+") as file:
        file["model_weights/here"].attrs["weight_names"] = np.zeros(0)
    lost, _ = ckptconv.open(tmp_path / "a.h5").oddities
    assert lost.endswith("no variables: here")


@pytest.mark.parametrize("suffix", [".keras", ".h5"])
def test_a_skeleton_with_a_config_is_a_template(suffix: str, tmp_path: Path) -> None:
    trained(tf_keras, tf_keras.optimizers.Adam(0.01)).save(tmp_path / "run.keras")
    made = template(keras, keras.optimizers.Adam(0.5), tmp_path / f"template{suffix}")
    write_skeleton(ckptconv.open(made), tmp_path / "skeleton.json")
    made.unlink()
    ckptconv.convert(tmp_path / "run.keras", tmp_path / f"out{suffix}", template=tmp_path / "skeleton.json")
    again = keras.models.load_model(tmp_path / f"out{suffix}")
    assert int(again.optimizer.iterations) == 5
    assert float(again.optimizer.learning_rate) == pytest.approx(0.01)


def test_the_layout_of_keras_2_13(tmp_path: Path) -> None:
    """Layers in a dictionary in which those with weights stand twice: every second number is left out."""
    model = trained(tf_keras, tf_keras.optimizers.Adam(0.01))
    model.save(tmp_path / "new.keras")
    with zipfile.ZipFile(tmp_path / "new.keras") as archive:
        archive.extractall(tmp_path)
    with h5py.File(tmp_path / "model.weights.h5", "r+") as file:
        for number, name in enumerate(("dense", "dense_1", "dense_2")):
            to = f"dense_{2 * number}" if number else "dense"
            file.move(f"layers/{name}", f"_layer_checkpoint_dependencies/{to}")
        del file["layers"]
    with zipfile.ZipFile(tmp_path / "old.keras", "w") as archive:
        for name in ("metadata.json", "config.json", "model.weights.h5"):
            archive.write(tmp_path / name, name)
    new, old = ckptconv.open(tmp_path / "new.keras"), ckptconv.open(tmp_path / "old.keras")
    assert list(new.params) == list(old.params)
    for name, param in new.params.items():
        assert np.array_equal(param.read(), old.params[name].read())
    moments = [run.optimizers[0].slots["first_moment"] for run in (new, old)]
    assert all(np.array_equal(moments[0][name].read(), moments[1][name].read()) for name in new.params)
