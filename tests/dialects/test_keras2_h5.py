"""`.h5` files of Keras 2.0 to 2.3, which cannot run here: laid out by hand as its source writes them.

`keras/engine/topology.py` and `engine/saving.py` (names, attributes), `keras/optimizers.py` (`self.weights`
of each class) of 2.0.9, 2.1.6, 2.2.4 and 2.3.1.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

h5py = pytest.importorskip("h5py")

import ckptconv  # noqa: E402
from ckptconv.document import Checkpoint, Unknown, value_of  # noqa: E402

Array = np.ndarray[Any, np.dtype[Any]]
SHAPES = {"dense_1": ((4, 3), (3,)), "dense_10": ((3, 3), (3,)), "dense_2": ((3, 2), (2,))}
"""In the model's order, which is not that of the names."""
PARAMS = [shape for shapes in SHAPES.values() for shape in shapes]
NAMES = [f"{layer}/{leaf}" for layer in SHAPES for leaf in ("kernel", "bias")]


def numbers(count: int, seed: int = 0) -> list[Array]:
    """`count` arrays of each parameter's shape."""
    random = np.random.default_rng(seed)
    return [random.random(shape).astype("f4") for _ in range(count) for shape in PARAMS]


def texts(values: list[str], length: str) -> Any:
    """Texts of fixed length, as h5py 2 made them, or of variable length as objects."""
    data = [value.encode() for value in values]
    return np.array(data) if length == "fixed" else np.array(data, dtype=h5py.string_dtype("ascii"))


def layer(name: str, units: int) -> dict[str, Any]:
    config = {"name": name, "trainable": True, "units": units, "activation": "linear", "use_bias": True}
    return {"class_name": "Dense", "config": config}


def write(
    path: Path,
    optimizer: tuple[str, dict[str, Any]],
    state: list[Array],
    *,
    version: str = "2.2.4",
    length: str = "fixed",
    split: bool = False,
    step: Array | None = None,
    names: list[str] | None = None,
) -> list[Array]:
    """A Sequential model; its parameters."""
    params = numbers(1, 9)
    layers = [layer(name, shapes[1][0]) for name, shapes in SHAPES.items()]
    # A Sequential's config is the list of its layers until 2.2.3.
    config: Any = layers if version < "2.2.3" else {"name": "sequential_1", "layers": layers}
    with h5py.File(path, "w") as file:
        file.attrs["keras_version"] = np.bytes_(version)
        file.attrs["backend"] = np.bytes_("tensorflow")
        file.attrs["model_config"] = np.bytes_(json.dumps({"class_name": "Sequential", "config": config}))
        training = {
            "optimizer_config": {"class_name": optimizer[0], "config": optimizer[1]},
            "loss": "mse",
            "metrics": [],
            "sample_weight_mode": None,
            "loss_weights": None,
        }
        file.attrs["training_config"] = np.bytes_(json.dumps(training))
        group = file.create_group("model_weights")
        if split:
            group.attrs["layer_names0"] = texts(list(SHAPES)[:2], length)
            group.attrs["layer_names1"] = texts(list(SHAPES)[2:], length)
        else:
            group.attrs["layer_names"] = texts(list(SHAPES), length)
        for number, name in enumerate(SHAPES):
            inner = group.create_group(name)
            inner.attrs["weight_names"] = texts([f"{name}/kernel:0", f"{name}/bias:0"], length)
            inner[f"{name}/kernel:0"], inner[f"{name}/bias:0"] = params[2 * number : 2 * number + 2]
        arrays = ([step] if step is not None else []) + state
        if names is None:
            first = [f"{optimizer[0]}/iterations:0"] if step is not None else []
            rest = [f"training/{optimizer[0]}/Variable{f'_{n}' if n else ''}:0" for n in range(len(state))]
            names = first + rest
        inner = file.create_group("optimizer_weights")
        inner.attrs["weight_names"] = texts(names, length)
        for name, array in zip(names, arrays, strict=True):
            inner[name] = array
    return params


def check(run: Checkpoint, params: list[Array], slots: dict[str, list[Array]]) -> None:
    assert list(run.params) == NAMES
    for param, array in zip(run.params.values(), params, strict=True):
        assert np.array_equal(param.read(), array)
        assert (param.layer, param.evidence, param.trainable) == ("dense", "declared", True)
    (own,) = run.optimizers
    assert own.slots.keys() == slots.keys()
    for slot, arrays in slots.items():
        for name, array in zip(NAMES, arrays, strict=True):
            assert np.array_equal(own.slots[slot][name].read(), array), (slot, name)


ADAM = {"lr": 0.002, "beta_1": 0.9, "beta_2": 0.999, "decay": 0.01, "epsilon": 1e-7}
STEP = np.array(17, "i8")


@pytest.mark.parametrize("version", ["2.0.9", "2.2.4", "2.3.1"])
@pytest.mark.parametrize("length", ["fixed", "variable"])
@pytest.mark.parametrize("split", [False, True])
def test_adam_of_every_version(version: str, length: str, split: bool, tmp_path: Path) -> None:
    """Until 2.1 without `amsgrad`; then with one element for each maximum that is not kept."""
    state, config = numbers(2), dict(ADAM)
    beside: list[Array] = []
    if version > "2.1":
        config["amsgrad"], beside = False, [np.zeros(1, "f4") for _ in PARAMS]
    if version > "2.3":
        config["learning_rate"] = config.pop("lr")
    path = tmp_path / "a.h5"
    params = write(
        path, ("Adam", config), state + beside, version=version, length=length, split=split, step=STEP
    )
    run = ckptconv.open(path)
    assert run.provenance.dialect == "tf-keras-legacy"
    assert run.provenance.producer == f"tf_keras {version}"
    check(run, params, {"first_moment": state[: len(PARAMS)], "second_moment": state[len(PARAMS) :]})
    assert value_of(run.progress.step) == 17
    facts = run.optimizers[0].groups[0].hyperparameters
    assert value_of(facts["learning_rate"]) == 0.002
    assert value_of(facts["learning_rate_decay"]) == 0.01
    assert len(run.extras) == len(beside)


def test_what_stands_there_comes_back(tmp_path: Path) -> None:
    write(tmp_path / "a.h5", ("Adam", ADAM), numbers(2), step=STEP, split=True)
    ckptconv.convert(tmp_path / "a.h5", tmp_path / "d", to="neutral")
    ckptconv.convert(tmp_path / "d", tmp_path / "b.h5")
    found = []
    for path in (tmp_path / "a.h5", tmp_path / "b.h5"):
        with h5py.File(path) as file:
            all_of: dict[str, Any] = {}

            def visit(name: str, node: Any, all_of: dict[str, Any] = all_of) -> None:
                all_of.update({f"{name}@{k}": (v.dtype, v.tolist()) for k, v in node.attrs.items()})
                if isinstance(node, h5py.Dataset):
                    all_of[name] = (node.dtype, node[()].tolist())

            visit("", file)
            file.visititems(visit)
            found.append(all_of)
    assert found[0] == found[1]
    ckptconv.convert(tmp_path / "a.h5", tmp_path / "c.h5", set_={"step": "40", "learning_rate": "0.5"})
    with h5py.File(tmp_path / "c.h5") as file:
        assert file["optimizer_weights/Adam/iterations:0"][()] == 40
        told = json.loads(file.attrs["training_config"])["optimizer_config"]["config"]
        assert told == {**ADAM, "lr": 0.5}


def test_a_counter_of_floats_before_2_0_5(tmp_path: Path) -> None:
    write(tmp_path / "a.h5", ("Adam", ADAM), numbers(2), step=np.array(17.0, "f4"), version="2.0.2")
    assert value_of(ckptconv.open(tmp_path / "a.h5").progress.step) == 17
    ckptconv.convert(tmp_path / "a.h5", tmp_path / "b.h5", set_={"step": "18"})
    with h5py.File(tmp_path / "b.h5") as file:
        stored = file["optimizer_weights/Adam/iterations:0"]
        assert (stored.dtype, stored[()]) == ("f4", 18.0)


def test_momentum_that_is_kept_and_not_used(tmp_path: Path) -> None:
    config = {"lr": 0.1, "momentum": 0.0, "decay": 0.0, "nesterov": False}
    params = write(tmp_path / "a.h5", ("SGD", config), (state := numbers(1)), step=STEP)
    check(ckptconv.open(tmp_path / "a.h5"), params, {"momentum": state})


@pytest.mark.parametrize(
    ("optimizer", "slots"),
    [
        (("RMSprop", {"lr": 0.1, "rho": 0.9, "decay": 0.0, "epsilon": 1e-7}), ["second_moment"]),
        (("Adagrad", {"lr": 0.1, "decay": 0.0, "epsilon": 1e-7}), ["accumulator"]),
        (
            ("Adadelta", {"lr": 1.0, "rho": 0.95, "decay": 0.0, "epsilon": 1e-7}),
            ["second_moment", "accumulated_update"],
        ),
    ],
)
@pytest.mark.parametrize("version", ["2.2.4", "2.3.1"])
def test_classes_without_a_counter_until_2_3(
    optimizer: tuple[str, dict[str, Any]], slots: list[str], version: str, tmp_path: Path
) -> None:
    state, counted = numbers(len(slots)), version > "2.3"
    params = write(tmp_path / "a.h5", optimizer, state, version=version, step=STEP if counted else None)
    run = ckptconv.open(tmp_path / "a.h5")
    size = len(PARAMS)
    check(run, params, {slot: state[n * size : (n + 1) * size] for n, slot in enumerate(slots)})
    if counted:
        assert value_of(run.progress.step) == 17
    else:
        assert isinstance(run.progress.step, Unknown)


def test_nadam_and_its_product(tmp_path: Path) -> None:
    config = {"lr": 0.002, "beta_1": 0.9, "beta_2": 0.999, "epsilon": 1e-7, "schedule_decay": 0.004}
    state, slots = numbers(2), ("first_moment", "second_moment")
    product = np.array(0.25, "f4")
    for version, beside in (("2.2.4", []), ("2.3.1", [product])):
        path = tmp_path / f"{version}.h5"
        params = write(path, ("Nadam", config), [*beside, *state], version=version, step=STEP)
        run = ckptconv.open(path)
        size = len(PARAMS)
        check(run, params, {slot: state[n * size : (n + 1) * size] for n, slot in enumerate(slots)})
        told = value_of(run.optimizers[0].scalars.get("momentum_product"))
        assert told == (0.25 if beside else None)
        assert bool(beside) is not any("momentum_product" in said for said in run.oddities)
