"""SavedModels and directories of several checkpoints, against what TensorFlow reads from the same files."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
tf = pytest.importorskip("tensorflow")

import ckptconv  # noqa: E402
from ckptconv.detect import read_raw  # noqa: E402
from ckptconv.document import Checkpoint, value_of  # noqa: E402
from ckptconv.errors import CkptError  # noqa: E402
from ckptconv.rawtree import DictNode  # noqa: E402
from ckptconv.tensor import TensorRef  # noqa: E402
from tests.support.keras_zoo import ZOO, check, compiled, stored, subclassed  # noqa: E402

RUN = Path(__file__).resolve().parents[2] / "fixtures/tf1/adam-global-step/artifact"


def held(document: Checkpoint, array: Any) -> bool:
    """Whether a parameter is bit-equal to a live variable."""
    wanted = np.asarray(array)
    return any(
        param.tensor.shape == wanted.shape and param.tensor.read().tobytes() == wanted.tobytes()
        for param in document.params.values()
    )


@pytest.mark.parametrize("legacy", [False, True])
def test_tf_keras_saves_weights_slots_and_step(tmp_path: Path, legacy: bool) -> None:
    tf_keras = pytest.importorskip("tf_keras")
    model = tf_keras.Sequential([tf_keras.layers.Dense(3, input_shape=(4,)), tf_keras.layers.Dense(2)])
    optimizers = tf_keras.optimizers.legacy if legacy else tf_keras.optimizers
    model.compile(optimizer=optimizers.Adam(0.01), loss="mse")
    rng = np.random.default_rng(1)
    x, y = rng.normal(size=(12, 4)).astype("float32"), rng.normal(size=(12, 2)).astype("float32")
    model.fit(x, y, batch_size=4, epochs=1, verbose=0)
    model.save(tmp_path / "saved", save_format="tf")
    document = ckptconv.open(tmp_path / "saved")
    assert document.provenance.dialect == ("tf-keras-legacy" if legacy else "tf-keras")
    assert value_of(document.progress.step) == 3
    assert all(held(document, weight) for weight in model.get_weights())
    (optimizer,) = document.optimizers
    assert {slot: len(by_param) for slot, by_param in optimizer.slots.items()} == {
        "first_moment": 4,
        "second_moment": 4,
    }
    assert read_raw(tmp_path / "saved").attributes["prefix"] == "variables"


SLOW = ("embedding_lstm", "attention", "bidirectional")
EXPORTED = (
    *("cnn", "convolutions", "normalization", "shared"),
    *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW),
)


def exported(k: Any, model: Any, folder: Path) -> Path:
    model.export(str(folder), **({"verbose": False} if k.__name__ == "keras" else {}))
    return folder


def every_key(path: Path) -> dict[object, bytes]:
    root = read_raw(path).root
    assert isinstance(root, DictNode)
    return {key: node.read().tobytes() for key, node in root.items if isinstance(node, TensorRef)}


@pytest.mark.parametrize("package", ["keras", "tf_keras"])
@pytest.mark.parametrize("name", EXPORTED)
def test_an_exported_model_has_its_names_and_kinds(package: str, name: str, tmp_path: Path) -> None:
    """Those of a checkpoint with the model's own objects, and more where names tell what edges do not."""
    k = pytest.importorskip(package)
    model = compiled(k, ZOO[name](k), k.optimizers.Adam(0.01))
    run = ckptconv.open(exported(k, model, tmp_path / "out"))
    assert (run.kind, run.provenance.dialect) == ("weights", {"keras": "keras3"}.get(package, "tf-keras"))
    assert value_of(run.progress.step) is None
    check(run, model)
    reader = tf.train.load_checkpoint(str(tmp_path / "out/variables/variables"))
    mine = every_key(tmp_path / "out")
    assert mine.keys() == reader.get_variable_to_dtype_map().keys()
    for key, dtype in reader.get_variable_to_dtype_map().items():
        assert dtype == tf.string or mine[key] == reader.get_tensor(key).tobytes()
    known = ckptconv.open(tf.train.Checkpoint(model=ZOO[name](k)).save(str(tmp_path / "objects")))
    assert [one.role for one in run.params.values()] == [one.role for one in known.params.values()]
    for (name_here, one), (there, other) in zip(run.params.items(), known.params.items(), strict=True):
        assert name_here.split("/")[0] == there.split("/")[0]
        assert (one.layer, one.axes) == (other.layer, other.axes) or other.candidates
    ckptconv.convert(tmp_path / "out", tmp_path / "archive", to="neutral")
    ckptconv.convert(tmp_path / "archive", tmp_path / "back", to="tensorflow")
    assert every_key(tmp_path / "back") == every_key(tmp_path / "out")


@pytest.mark.parametrize("package", ["keras", "tf_keras"])
def test_an_exported_model_serves_the_weights_that_are_written_into_it(package: str, tmp_path: Path) -> None:
    """Both copies that Keras 3 has of a variable; the seeds stay."""
    k = pytest.importorskip(package)
    layers = k.layers

    def make(seed: int) -> Any:
        k.utils.set_random_seed(seed)
        stack = [layers.Input((4,)), layers.Dense(3), layers.BatchNormalization(), layers.Dropout(0.5)]
        model = k.Sequential([*stack, layers.Dense(3), layers.Dense(2)])
        for variable in stored(model.variables):
            variable.assign(np.random.default_rng(seed).uniform(0.1, 1.0, variable.shape))
        return model

    old, new, x = make(1), make(2), np.ones((2, 4), "float32")
    folder = exported(k, old, tmp_path / "served")
    run = tf.train.Checkpoint(model=new).save(str(tmp_path / "run"))
    report = ckptconv.convert(run, tmp_path / "variables", template=folder)
    scope: dict[str, Any] = {"folder": str(folder)}
    exec(report.restore, scope)
    assert np.allclose(scope["model"].serve(x), new(x), atol=1e-6)
    for path in tmp_path.glob("variables.*"):
        shutil.move(path, folder / "variables" / path.name)
    served = tf.saved_model.load(str(folder))
    assert np.allclose(served.serve(x), new(x), atol=1e-6)
    assert not np.allclose(served.serve(x), old(x), atol=1e-2)
    for variable in served._all_variables:
        if "seed" not in variable.name:
            held = [np.asarray(w) for w in new.variables if tuple(w.shape) == tuple(variable.shape)]
            assert any(np.array_equal(variable, w) for w in held)


@pytest.mark.parametrize("package", ["keras", "tf_keras"])
def test_an_exported_model_computes_the_same_in_torch(package: str, tmp_path: Path) -> None:
    k, torch = pytest.importorskip(package), pytest.importorskip("torch")
    layers = [k.layers.Input((5,)), k.layers.Dense(3), k.layers.BatchNormalization(), k.layers.Dense(2)]
    folder = exported(k, compiled(k, k.Sequential(layers), k.optimizers.Adam(0.01)), tmp_path / "out")
    net = torch.nn.Sequential(torch.nn.Linear(5, 3), torch.nn.BatchNorm1d(3, eps=1e-3), torch.nn.Linear(3, 2))
    torch.save(net.state_dict(), tmp_path / "fresh.pt")
    ckptconv.convert(folder, tmp_path / "weights.pt", template=tmp_path / "fresh.pt")
    net.load_state_dict(torch.load(tmp_path / "weights.pt"))
    x = np.random.default_rng(0).normal(size=(3, 5)).astype("float32")
    served = tf.saved_model.load(str(folder))
    np.testing.assert_allclose(net.eval()(torch.tensor(x)).detach().numpy(), served.serve(x), atol=1e-5)


def test_a_subclassed_export_is_parted_into_layers(tmp_path: Path) -> None:
    """All of its kernels are `net/kernel`; its lists are there, which no checkpoint of its objects holds."""
    keras = pytest.importorskip("keras")
    model = compiled(keras, subclassed(keras), keras.optimizers.Adam(0.01))
    run = ckptconv.open(exported(keras, model, tmp_path / "out"))
    check(run, model)
    layers = [param.layer for param in run.params.values()]
    assert layers[:10] == ["embedding", *["lstm"] * 3, *["batch_norm"] * 4, "dense", "dense"]
    assert run.params["layer-0/embeddings"].axes == ("vocabulary", "features")
    owners = [name.rpartition("/")[0] for name in run.params]
    assert len(set(owners)) == 11
    assert not run.oddities
    ckptconv.convert(tmp_path / "out", tmp_path / "back", to="tensorflow")
    assert every_key(tmp_path / "back") == every_key(tmp_path / "out")


def test_copies_that_nothing_tells_apart_stay(tmp_path: Path) -> None:
    """Biases of one name that are all zero: whose copy is whose is not in the file, and that is said."""
    keras = pytest.importorskip("keras")
    model = subclassed(keras)
    run = ckptconv.open(exported(keras, model, tmp_path / "out"))
    assert len(run.params) == len(stored(model.variables))
    copies = [key for key in run.extras if key.startswith("_all_variables/")]
    assert copies
    assert any(said.startswith(f"{len(copies)} copies") for said in run.oddities)
    ckptconv.convert(tmp_path / "out", tmp_path / "back", to="tensorflow")
    assert every_key(tmp_path / "back") == every_key(tmp_path / "out")


def test_a_tf1_export_is_read_by_name(tmp_path: Path) -> None:
    tf1 = tf.compat.v1
    with tf.Graph().as_default(), tf1.Session() as session:
        x = tf1.placeholder(tf.float32, (None, 4))
        kernel = tf1.get_variable("dense/kernel", (4, 3), use_resource=False)
        y = tf.matmul(x, kernel)
        session.run(tf1.global_variables_initializer())
        tf1.saved_model.simple_save(session, str(tmp_path / "export"), {"x": x}, {"y": y})
        value = session.run(kernel)
    document = ckptconv.open(tmp_path / "export")
    assert document.provenance.dialect == "tf1"
    assert document.params["dense/kernel"].tensor.read().tobytes() == value.tobytes()


def copies(directory: Path, *names: str) -> None:
    directory.mkdir()
    for name in names:
        for path in RUN.glob("model.ckpt-7.*"):
            shutil.copy(path, directory / path.name.replace("model.ckpt-7", name))


def test_of_several_the_state_file_then_the_number(tmp_path: Path) -> None:
    run = tmp_path / "run"
    copies(run, "model.ckpt-9", "model.ckpt-10", "model.ckpt-100")
    assert read_raw(run).attributes["prefix"] == "model.ckpt-100"
    (run / "checkpoint").write_text('model_checkpoint_path: "/old/place/model.ckpt-9"\n')
    assert read_raw(run).attributes["prefix"] == "model.ckpt-9"
    (run / "checkpoint").write_text('model_checkpoint_path: "model.ckpt-200"\n')
    raw = read_raw(run)
    assert raw.attributes["prefix"] == "model.ckpt-100"
    assert "model.ckpt-200" in str(raw.attributes["chosen_by"])


def test_of_several_names_none_is_chosen(tmp_path: Path) -> None:
    copies(tmp_path / "run", "best-3", "last-9")
    with pytest.raises(CkptError) as caught:
        read_raw(tmp_path / "run")
    assert [(p.code, p.loc) for p in caught.value.problems] == [("usage", ("checkpoint",))]


def test_tf_keras_declares_the_classes_of_layers(tmp_path: Path) -> None:
    """A convolution and a transposed one of as many channels look alike by edges and shapes."""
    tf_keras = pytest.importorskip("tf_keras")
    layers = tf_keras.layers
    model = tf_keras.Sequential(
        [
            layers.Conv2D(2, 2, input_shape=(6, 6, 2)),
            layers.Conv2DTranspose(2, 2),
            layers.LayerNormalization(),
        ]
    )
    model.compile(tf_keras.optimizers.SGD(0.1), "mse")
    model.save(tmp_path / "saved", save_format="tf")
    kinds = [param.layer for param in ckptconv.open(tmp_path / "saved").params.values()]
    assert kinds == ["conv2d", "conv2d", "conv_transpose2d", "conv_transpose2d", "layer_norm", "layer_norm"]
    evidence = {param.evidence for param in ckptconv.open(tmp_path / "saved").params.values()}
    assert evidence == {"declared"}
    assert read_raw(tmp_path / "saved").attributes["layer_classes"]
    (tmp_path / "saved/keras_metadata.pb").unlink()
    bare = ckptconv.open(tmp_path / "saved")
    assert {param.layer for param in bare.params.values()} == {"unknown"}
    ckptconv.convert(tmp_path / "saved", tmp_path / "d", to="neutral")
    (tmp_path / "saved/keras_metadata.pb").write_bytes(b"\xff\xff")
    with pytest.raises(CkptError) as caught:
        ckptconv.open(tmp_path / "saved")
    assert [problem.code for problem in caught.value.problems] == ["corrupt-file"]
