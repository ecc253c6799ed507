"""Files of both generations of Keras against Keras itself: every variable, flag and slot of every model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("h5py")
keras = pytest.importorskip("keras")
tf_keras = pytest.importorskip("tf_keras")

import h5py  # noqa: E402

import ckptconv  # noqa: E402
from ckptconv.catalog.optimizer_rows import algorithms, row  # noqa: E402
from ckptconv.document import value_of  # noqa: E402
from ckptconv.errors import CkptError  # noqa: E402
from ckptconv.supply import set_fields  # noqa: E402
from tests.support.keras_zoo import ZOO, check, compiled, same, subclassed  # noqa: E402

KERAS = {"keras3": keras, "tf-keras": tf_keras}
H5 = {**KERAS, "tf-keras-legacy": tf_keras}
"""Generations that write `.h5`."""


def adam(k: Any, generation: str = "") -> Any:
    return optimizers(k, generation).Adam(0.01, beta_1=0.8)


def optimizers(k: Any, generation: str) -> Any:
    return k.optimizers.legacy if generation == "tf-keras-legacy" else k.optimizers


def saved(model: Any, path: Path) -> Path:
    model.save_weights(path) if path.name.endswith(".weights.h5") else model.save(path)
    return path


def loaded(k: Any, path: Path, make: Callable[[], Any]) -> Any:
    """The model of a file; weights alone are loaded into one that is made and built anew."""
    if ".weights." not in path.name:
        return k.models.load_model(path)
    model = make()
    model.load_weights(path)
    return model


def whole(k: Any, path: Path, generation: str) -> Any:
    """The model of an `.h5`; of a legacy optimizer tf_keras makes the new one of its name, unless told."""
    names = ("Adam", "SGD", "RMSprop", "Adagrad", "Adadelta", "Adamax", "Nadam", "Ftrl")
    legacy = generation == "tf-keras-legacy"
    custom = {name: getattr(k.optimizers.legacy, name) for name in names} if legacy else {}
    custom |= {"Lamb": k.optimizers.Lamb} if generation == "keras3" else {}  # it does not find it by itself
    model = k.models.load_model(path, custom_objects=custom)
    if generation == "keras3":
        assert len(model.optimizer.variables) < 4, "Keras restores the slots itself: take the lines out"
        scope = {"model": model}
        _, _, lines = ckptconv.convert(path, path.with_name("again.h5")).restore.partition("import h5py")
        exec("import h5py" + lines, scope)
    return model


def texts(path: Path) -> dict[str, Any]:
    """Every attribute of an HDF5 file."""
    found = {}
    with h5py.File(path) as file:

        def visit(name: str, node: Any) -> None:
            found.update({f"{name}@{key}": np.asarray(value).tolist() for key, value in node.attrs.items()})

        visit("", file)
        file.visititems(visit)
    return found


UNTOLD = {
    "keras3": {"cnn", "nested", "partly_frozen"},
    "tf-keras": {"cnn", "nested", "partly_frozen", "time_distributed"},
}
"""Models of which weights alone do not tell what is trained: frozen layers, layers without class and name."""


@pytest.mark.slow
@pytest.mark.parametrize("generation", KERAS)
@pytest.mark.parametrize("name", ZOO)
def test_every_variable_flag_and_slot(generation: str, name: str, tmp_path: Path) -> None:
    k = KERAS[generation]
    model = compiled(k, ZOO[name](k), adam(k))
    run = ckptconv.open(saved(model, tmp_path / "a.keras"))
    assert (run.provenance.dialect, value_of(run.progress.step)) == (generation, 3)
    assert run.optimizers[0].slots
    check(run, model)
    run = ckptconv.open(saved(model, tmp_path / "a.weights.h5"))
    assert (run.provenance.dialect, value_of(run.progress.step)) == (generation, 3)
    if run.optimizers[0].algorithm == "unknown":
        assert run.optimizers[0].slots.keys() <= {"0", "1"}
        run = set_fields(run, {"optimizer": "adam"}) if run.optimizers[0].algorithm_candidates else run
    assert bool(run.optimizers[0].slots) is (name not in UNTOLD[generation])
    if name not in UNTOLD[generation]:
        check(run, model, declared=False)


@pytest.mark.slow
@pytest.mark.parametrize("generation", KERAS)
@pytest.mark.parametrize("name", ZOO)
def test_the_way_back_through_neutral(generation: str, name: str, tmp_path: Path) -> None:
    k = KERAS[generation]
    model = compiled(k, ZOO[name](k), adam(k))
    for suffix in (".keras", ".weights.h5"):
        archive, back = tmp_path / f"{suffix}.d", tmp_path / f"b{suffix}"
        ckptconv.convert(saved(model, tmp_path / f"a{suffix}"), archive, to="neutral")
        ckptconv.convert(archive, back)
        assert same(loaded(k, back, lambda: compiled(k, ZOO[name](k), adam(k), step=0)), model)


@pytest.mark.slow
@pytest.mark.parametrize("generation", H5)
@pytest.mark.parametrize("name", ZOO)
def test_h5_every_variable_flag_and_slot_and_the_way_back(generation: str, name: str, tmp_path: Path) -> None:
    k = H5[generation]
    model = compiled(k, ZOO[name](k), adam(k, generation))
    source, archive, back = saved(model, tmp_path / "a.h5"), tmp_path / "a.d", tmp_path / "b.h5"
    run = ckptconv.open(source)
    assert (run.provenance.dialect, value_of(run.progress.step)) == (generation, 3)
    assert run.optimizers[0].slots
    assert not run.extras
    check(run, model)
    ckptconv.convert(source, archive, to="neutral")
    ckptconv.convert(archive, back)
    assert same(whole(k, back, generation), model)
    assert texts(back) == texts(source)


ARGUMENTS = {
    "adam": {"amsgrad": True},
    "sgd": {"momentum": 0.9},
    "rmsprop": {"momentum": 0.9, "centered": True},
}
CATALOG = [
    (generation, name)
    for generation in H5
    for name in algorithms()
    if row(name, generation.replace("-", "_")) is not None
]


@pytest.mark.slow
@pytest.mark.parametrize(("generation", "name"), CATALOG)
def test_every_optimizer_of_the_catalog(generation: str, name: str, tmp_path: Path) -> None:
    """Slots and numbers right from the file alone, and back again."""
    k, known = H5[generation], row(name, generation.replace("-", "_"))
    assert known is not None
    make = getattr(optimizers(k, generation), known.class_name.rpartition(".")[2])
    model = compiled(k, ZOO["mlp"](k), make(0.01, **ARGUMENTS.get(name, {})))
    suffixes = [".h5"] if generation == "tf-keras-legacy" else [".keras", ".weights.h5", ".h5"]
    if (generation, name) == ("keras3", "adafactor"):
        suffixes.remove(".h5")  # Keras itself fails: its placeholders have one name
    for suffix in suffixes:
        source, back = saved(model, tmp_path / f"a{suffix}"), tmp_path / f"b{suffix}"
        run = ckptconv.open(source)
        (own,) = run.optimizers
        assert value_of(run.progress.step) == 3
        if suffix == ".weights.h5" and own.algorithm == "unknown":
            assert own.algorithm_candidates == () or name in own.algorithm_candidates
        else:
            assert own.algorithm == name
            assert own.slots
            check(run, model, declared=suffix != ".weights.h5")
        ckptconv.convert(source, back)
        if suffix == ".h5":
            assert same(whole(k, back, generation), model)
        else:
            again = compiled(k, ZOO["mlp"](k), make(0.01, **ARGUMENTS.get(name, {})), step=0)
            assert same(loaded(k, back, lambda again=again: again), model)


@pytest.mark.slow
def test_weights_in_several_files(tmp_path: Path) -> None:
    """Keras' own files are read as one; those that are written Keras loads."""

    def make(step: int = 0) -> Any:
        return compiled(keras, ZOO["attention"](keras), adam(keras), step=step)

    model = make(3)
    model.save_weights(tmp_path / "whole.weights.h5")
    model.save_weights(tmp_path / "a.weights.json", max_shard_size=400 / 1024**3)
    assert len(list(tmp_path.glob("a_*.weights.h5"))) > 3
    check(ckptconv.open(tmp_path / "a.weights.json"), model, declared=False)
    for source, options in (("a.weights.json", {}), ("whole.weights.h5", {"shard_size": 400})):
        target = tmp_path / "sub" / f"{source[0]}.weights.json"
        target.parent.mkdir(exist_ok=True)
        ckptconv.convert(tmp_path / source, target, **options)
        assert same(loaded(keras, target, make), model)
    assert len(list(target.parent.glob("w_*.weights.h5"))) > 3
    ckptconv.convert(target, tmp_path / "again.weights.h5")
    assert same(loaded(keras, tmp_path / "again.weights.h5", make), model)


@pytest.mark.parametrize("generation", KERAS)
def test_weights_of_a_subclassed_model(generation: str, tmp_path: Path) -> None:
    """Every variable is there once, the order of training is not: that is said, and all comes back."""
    k = KERAS[generation]
    model, again = (compiled(k, subclassed(k), adam(k), step) for step in (3, 0))
    run = ckptconv.open(saved(model, tmp_path / "a.weights.h5"))
    assert (run.provenance.dialect, value_of(run.progress.step)) == (generation, 3)
    assert not run.optimizers[0].slots
    assert any("order" in said for said in run.oddities)
    check(replace(run, optimizers=()), model, declared=False)
    if generation == "keras3":
        kinds = {name: param.layer for name, param in run.params.items()}
        assert (kinds["embed/embeddings"], kinds["block/norm/gamma"]) == ("embedding", "layer_norm")
        assert (kinds["encoder/cell/recurrent_kernel"], kinds["heads/dense_1/kernel"]) == ("lstm", "dense")
        assert "unknown" not in kinds.values()
    ckptconv.convert(tmp_path / "a.weights.h5", tmp_path / "d", to="neutral")
    ckptconv.convert(tmp_path / "d", tmp_path / "b.weights.h5")
    again.load_weights(tmp_path / "b.weights.h5")
    assert same(again, model)


def test_a_larger_set_makes_way_for_a_smaller_one(tmp_path: Path) -> None:
    """Its files are in no index any more; what only has such a name stays."""
    model = compiled(keras, ZOO["mlp"](keras), adam(keras))
    model.save_weights(tmp_path / "whole.weights.h5")
    target, own = tmp_path / "a.weights.json", tmp_path / "a_00099.weights.h5"
    ckptconv.convert(tmp_path / "whole.weights.h5", target, shard_size=64)
    before = set(tmp_path.glob("a_*.weights.h5"))
    assert len(before) > 3
    model.save_weights(own)
    with pytest.raises(CkptError) as caught:
        ckptconv.convert(tmp_path / "whole.weights.h5", target, shard_size=500)
    assert [problem.code for problem in caught.value.problems] == ["target-exists"]
    assert set(tmp_path.glob("a_*.weights.h5")) == {*before, own}
    ckptconv.convert(tmp_path / "whole.weights.h5", target, shard_size=500, force=True)
    listed = json.loads(target.read_text())["weight_map"].values()
    held = {tmp_path / name for names in listed for name in names}
    assert len(held) < len(before)
    assert set(tmp_path.glob("a_*.weights.h5")) == {*held, own}
    again = compiled(keras, ZOO["mlp"](keras), adam(keras), step=0)
    again.load_weights(target)
    assert same(again, model)
    assert not list(tmp_path.glob(".*"))


def repeat_index(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    index = json.loads(path.read_text())
    change(index["weight_map"])
    path.write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("change", "code"),
    [
        (lambda index: index.update({"/vars": ["../a_00000.weights.h5"]}), "unsafe-path"),
        (lambda index: index.update({"/vars": ["b_00000.weights.h5"]}), "missing-file"),
        (lambda index: index.update({"/vars": 3}), "corrupt-file"),
        (lambda index: index.update({"/other/vars": ["a_00000.weights.h5"]}), "corrupt-file"),
        (lambda index: index.clear(), "corrupt-file"),
        (
            lambda index: index.update({"/optimizer/vars": ["a_00000.weights.h5", "twice.weights.h5"]}),
            "duplicate-key",
        ),
    ],
)
def test_an_index_that_does_not_fit_is_refused(
    change: Callable[[dict[str, Any]], None], code: str, tmp_path: Path
) -> None:
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)])
    model.compile(keras.optimizers.SGD(0.1), "mse")
    model.save_weights(tmp_path / "a.weights.json", max_shard_size=1)
    shutil.copy(tmp_path / "a_00000.weights.h5", tmp_path / "twice.weights.h5")
    repeat_index(tmp_path / "a.weights.json", change)
    with pytest.raises(CkptError) as caught:
        ckptconv.open(tmp_path / "a.weights.json")
    assert {problem.code for problem in caught.value.problems} == {code}
