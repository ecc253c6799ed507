"""Keras 3 files, `.keras` and `.weights.h5`, against Keras itself: read, written, and crossed with torch."""

from __future__ import annotations

import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("h5py")
keras = pytest.importorskip("keras")

import h5py  # noqa: E402

import ckptconv  # noqa: E402
from ckptconv.document import Known, value_of  # noqa: E402
from ckptconv.errors import CkptError  # noqa: E402

Model = Any


def sequential() -> Model:
    layers = keras.layers
    return keras.Sequential(
        [
            keras.Input((4,)),
            layers.Dense(3, name="first"),
            layers.BatchNormalization(),
            layers.Dense(3, use_bias=False),
            layers.Dense(3, name="last"),
        ]
    )


def functional() -> Model:
    """A nested model, a frozen layer, twelve layers of one class: `dense_10` sorts before `dense_2`."""
    layers = keras.layers
    inner = keras.Sequential([keras.Input((3,)), layers.Dense(3), layers.LayerNormalization()], name="inner")
    value = start = keras.Input((4,))
    value = layers.Dense(3, trainable=False, name="frozen")(value)
    value = inner(value)
    for _ in range(12):
        value = layers.Dense(3)(value)
    return keras.Model(start, layers.Dropout(0.1)(value))


def convolution() -> Model:
    layers = keras.layers
    return keras.Sequential(
        [
            keras.Input((6, 6, 2)),
            layers.Conv2D(3, 3),
            layers.DepthwiseConv2D(2),
            layers.PReLU(shared_axes=[1, 2]),
            layers.GlobalAveragePooling2D(),
            layers.Reshape((3, 1)),
            layers.Bidirectional(layers.LSTM(2, return_sequences=True)),
            layers.GRU(3),
        ]
    )


def reduced() -> Model:
    """Parameters of bfloat16 between those of float32."""
    layers = keras.layers
    return keras.Sequential([keras.Input((4,)), layers.Dense(3, dtype="bfloat16"), layers.Dense(3)])


OPTIMIZERS: dict[str, Callable[[], Any]] = {
    "adam": lambda: keras.optimizers.Adam(0.01, beta_1=0.8),
    "adamw-amsgrad": lambda: keras.optimizers.AdamW(0.01, amsgrad=True, weight_decay=0.02),
    "sgd": lambda: keras.optimizers.SGD(0.01, momentum=0.9, nesterov=True),
    "rmsprop": lambda: keras.optimizers.RMSprop(0.01, momentum=0.5, centered=True),
    "nadam": lambda: keras.optimizers.Nadam(0.01),
    "accumulating": lambda: keras.optimizers.Adam(0.01, gradient_accumulation_steps=3, use_ema=True),
    "schedule": lambda: keras.optimizers.Adam(keras.optimizers.schedules.CosineDecay(0.1, 100)),
}
CASES = [
    (sequential, "adam"),
    (functional, "sgd"),
    (functional, "adamw-amsgrad"),
    (convolution, "rmsprop"),
    (sequential, "nadam"),
    (sequential, "accumulating"),
    (sequential, "schedule"),
    (reduced, "adam"),
]


def trained(make: Callable[[], Model], optimizer: str = "adam", updates: int = 3) -> Model:
    """A model whose every variable is another number, the optimizer's too."""
    keras.utils.set_random_seed(0)
    model = make()
    model.compile(OPTIMIZERS[optimizer](), "mse")
    model.optimizer.build(model.trainable_variables)
    random = np.random.default_rng(0)
    for variable in [*model.variables, *model.optimizer.variables[1:]]:
        if "seed" in variable.path or variable.path.endswith("learning_rate"):
            continue
        variable.assign(random.uniform(0.1, 1.0, variable.shape))
    model.optimizer._iterations.assign(updates)
    return model


def values(model: Model) -> list[Any]:
    """All but the states of generators, which Keras does not bring back either."""
    found = [*model.variables, *model.optimizer.variables]
    return [np.asarray(variable) for variable in found if "seed" not in variable.path]


def equal(one: Model, other: Model) -> bool:
    pairs = zip(values(one), values(other), strict=True)
    return all(a.dtype == b.dtype and np.array_equal(a, b) for a, b in pairs)


@pytest.mark.parametrize(("make", "optimizer"), CASES)
def test_every_parameter_and_slot_is_what_keras_has(
    make: Callable[[], Model], optimizer: str, tmp_path: Path
) -> None:
    model = trained(make, optimizer)
    model.save(tmp_path / "run.keras")
    run = ckptconv.open(tmp_path / "run.keras")
    own = run.optimizers[0]
    trainable = {id(variable) for variable in model.trainable_variables}
    ours = list(run.params.values())
    theirs = [v for v in model.variables if "seed" not in v.path]
    assert len(ours) == len(theirs)
    left = {v.path: v for v in theirs}
    for param in ours:
        (path,) = [p for p, v in left.items() if np.array_equal(np.asarray(v), param.read())]
        variable = left.pop(path)
        assert param.trainable is (id(variable) in trainable)
        for slot, by_param in own.slots.items():
            if param.name not in by_param:
                assert not param.trainable
                continue
            flat = path.replace("/", "_")
            (found,) = [
                v
                for v in model.optimizer.variables
                if np.array_equal(np.asarray(v), by_param[param.name].read())
            ]
            assert found.path.rpartition("/")[2].startswith(f"{flat}_"), (slot, found.path)
    assert own.slots
    assert sum(map(len, own.slots.values())) == len(own.slots) * len(model.trainable_variables)
    config = model.optimizer.get_config()
    facts = own.groups[0].hyperparameters
    for name in ("beta_1", "momentum", "epsilon", "amsgrad", "nesterov"):
        if name in facts and name in config:
            source = f"config/compile_config/optimizer/config/{name}"
            assert facts[name] == Known(value=config[name], source=source)
    step = model.optimizer._iterations
    assert value_of(run.progress.step) == int(step) // (3 if optimizer == "accumulating" else 1)


@pytest.mark.parametrize(("make", "optimizer"), CASES)
def test_the_way_back_and_through_neutral_is_exact(
    make: Callable[[], Model], optimizer: str, tmp_path: Path
) -> None:
    model = trained(make, optimizer)
    for suffix in (".keras", ".weights.h5"):
        source, archive, back = (
            tmp_path / f"a{suffix}",
            tmp_path / f"archive{suffix}.d",
            tmp_path / f"b{suffix}",
        )
        model.save(source) if suffix == ".keras" else model.save_weights(source)
        ckptconv.convert(source, archive, to="neutral")
        ckptconv.convert(archive, back, to="keras" if suffix == ".keras" else "weights-h5")
        if suffix == ".keras":
            assert zipfile.ZipFile(back).testzip() is None
            assert equal(keras.saving.load_model(back), model)
        else:
            other = make()
            other.compile(OPTIMIZERS[optimizer](), "mse")
            other.optimizer.build(other.trainable_variables)
            other.load_weights(back)
            assert equal(other, model)


def test_weights_alone_know_their_slots_by_the_order_of_the_groups(tmp_path: Path) -> None:
    model = trained(sequential)
    first, second = tmp_path / "a.weights.h5", tmp_path / "b.weights.h5"
    model.save_weights(first)
    ckptconv.convert(first, second)
    names = {}
    for path in (first, second):
        own = ckptconv.open(path).optimizers[0]
        assert own.algorithm == "adam"
        names[path] = {name: tensor.read().tobytes() for name, tensor in own.slots["first_moment"].items()}
        assert list(names[path])[:2] == ["first/kernel", "first/bias"]
    assert names[first] == names[second]


def test_attributes_of_a_class_do_not_tell_the_order_of_training(tmp_path: Path) -> None:
    """They are written by name: slots that cannot be given to variables stay as they are, and come back."""

    @keras.saving.register_keras_serializable("ckptconv-tests")
    class Net(keras.Model):
        def __init__(self, **arguments: Any) -> None:
            super().__init__(**arguments)
            self.zed = keras.layers.Dense(4)
            self.alpha = keras.layers.Dense(4)

        def call(self, inputs: Any) -> Any:
            return self.alpha(self.zed(inputs))

    def make() -> Model:
        model = Net()
        model(np.zeros((1, 4)))
        return model

    model = trained(make)
    model.save(tmp_path / "a.keras")
    run = ckptconv.open(tmp_path / "a.keras")
    assert run.optimizers[0].slots == {}
    assert value_of(run.progress.step) == 3
    assert len([key for key in run.extras if "optimizer" in key]) == 8
    ckptconv.convert(tmp_path / "a.keras", tmp_path / "b.keras")
    assert equal(keras.saving.load_model(tmp_path / "b.keras"), model)


def test_torch_to_keras_and_back_with_slots_and_step(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    net = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 2))
    optimizer = torch.optim.Adam(net.parameters(), lr=0.02, betas=(0.7, 0.95), eps=1e-7)
    for _ in range(5):
        optimizer.zero_grad()
        net(torch.rand(2, 4)).square().sum().backward()
        optimizer.step()
    torch.save({"model": net.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "run.pt")
    template = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3), keras.layers.Dense(2)])
    template.compile(keras.optimizers.Adam(), "mse")
    template.optimizer.build(template.trainable_variables)
    template.save(tmp_path / "template.keras")
    ckptconv.convert(tmp_path / "run.pt", tmp_path / "out.keras", template=tmp_path / "template.keras")
    model = keras.saving.load_model(tmp_path / "out.keras")
    assert int(model.optimizer.iterations) == 5
    assert (model.optimizer.beta_1, model.optimizer.beta_2) == (0.7, 0.95)
    assert float(model.optimizer.learning_rate) == pytest.approx(0.02)
    state = optimizer.state_dict()["state"]
    for i, (param, variable) in enumerate(zip(net.parameters(), model.trainable_variables, strict=True)):
        flip = np.transpose if param.ndim == 2 else np.asarray
        assert np.array_equal(flip(param.detach().numpy()), np.asarray(variable))
        assert np.array_equal(flip(state[i]["exp_avg"].numpy()), np.asarray(model.optimizer._momentums[i]))
    ckptconv.convert(tmp_path / "out.keras", tmp_path / "back.pt", template=tmp_path / "run.pt")
    back = torch.load(tmp_path / "back.pt")
    assert all(torch.equal(value, net.state_dict()[key]) for key, value in back["model"].items())
    assert all(int(entry["step"]) == 5 for entry in back["optimizer"]["state"].values())


def test_an_optimizer_without_variables_is_no_template(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    net = torch.nn.Sequential(torch.nn.Linear(4, 3))
    optimizer = torch.optim.Adam(net.parameters())
    net(torch.rand(2, 4)).sum().backward()
    optimizer.step()
    torch.save({"model": net.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "run.pt")
    template = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)])
    template.compile(keras.optimizers.Adam(), "mse")
    template.save(tmp_path / "template.keras")
    with pytest.raises(CkptError) as caught:
        ckptconv.convert(tmp_path / "run.pt", tmp_path / "out.keras", template=tmp_path / "template.keras")
    assert caught.value.problems[0].code == "template-unbuilt"


def test_a_set_step_is_what_load_model_gives(tmp_path: Path) -> None:
    trained(sequential).save(tmp_path / "a.keras")
    ckptconv.convert(tmp_path / "a.keras", tmp_path / "b.keras", set_={"step": "41"})
    assert int(keras.saving.load_model(tmp_path / "b.keras").optimizer.iterations) == 41


def repacked(source: Path, target: Path, change: Callable[[Path], None], compression: int) -> None:
    """The archive with its weights changed."""
    folder = target.with_suffix(".d")
    with zipfile.ZipFile(source) as archive:
        archive.extractall(folder)
    change(folder / "model.weights.h5")
    with zipfile.ZipFile(target, "w", compression) as archive:
        for name in ("metadata.json", "config.json", "model.weights.h5"):
            archive.write(folder / name, name)
    shutil.rmtree(folder)


def compressed(path: Path) -> None:
    """Every dataset of more than one number chunked and deflated."""
    with h5py.File(path, "r+") as file:
        names: list[str] = []
        file.visititems(lambda name, node: names.append(name) if isinstance(node, h5py.Dataset) else None)
        for name in names:
            data, attributes = file[name][()], dict(file[name].attrs)
            if data.ndim:
                del file[name]
                file.create_dataset(name, data=data, chunks=True, compression="gzip").attrs.update(attributes)


def test_deflated_archives_and_compressed_datasets_are_read(tmp_path: Path) -> None:
    model = trained(sequential)
    model.save(tmp_path / "a.keras")
    repacked(tmp_path / "a.keras", tmp_path / "b.keras", compressed, zipfile.ZIP_DEFLATED)
    ckptconv.convert(tmp_path / "b.keras", tmp_path / "c.keras")
    assert equal(keras.saving.load_model(tmp_path / "c.keras"), model)


def linked(path: Path) -> None:
    with h5py.File(path, "r+") as file:
        file["outside"] = h5py.ExternalLink("/etc/passwd", "/")


def test_links_out_of_the_file_are_refused(tmp_path: Path) -> None:
    trained(sequential).save(tmp_path / "a.keras")
    repacked(tmp_path / "a.keras", tmp_path / "b.keras", linked, zipfile.ZIP_STORED)
    with pytest.raises(CkptError) as caught:
        ckptconv.open(tmp_path / "b.keras")
    assert [problem.code for problem in caught.value.problems] == ["unsafe-path"]


def test_a_flipped_bit_of_the_weights_stops_the_conversion(tmp_path: Path) -> None:
    path = tmp_path / "a.keras"
    trained(sequential).save(path)
    (extent,) = ckptconv.open(path).params["first/kernel"].tensor.extents
    data = bytearray(path.read_bytes())
    data[extent.offset] ^= 1
    path.write_bytes(data)
    with pytest.raises(CkptError) as caught:
        ckptconv.convert(path, tmp_path / "b.keras")
    assert {problem.code for problem in caught.value.problems} == {"checksum-mismatch"}


def test_a_compiled_model_of_tf_keras_is_not_taken_for_keras_3(tmp_path: Path) -> None:
    """Its optimizer has no learning rate among its variables: as Keras 3 they would all be shifted by one."""
    tf_keras = pytest.importorskip("tf_keras")
    model = tf_keras.Sequential([tf_keras.layers.Input((3,)), tf_keras.layers.Dense(2)])
    model.compile(tf_keras.optimizers.Adam(0.01), "mse")
    model.fit(np.ones((4, 3)), np.ones((4, 2)), verbose=0)
    for name in ("net.weights.h5", "net.keras"):
        path = tmp_path / name
        model.save_weights(path) if name.endswith(".h5") else model.save(path)
        assert ckptconv.open(path).provenance.dialect == "tf-keras"
