"""Slots that some parameters have and others have not (Muon, Adafactor): each with its own parameter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

tf = pytest.importorskip("tensorflow")
keras3 = pytest.importorskip("keras")
tf_keras = pytest.importorskip("tf_keras")
pytest.importorskip("h5py")

import ckptconv  # noqa: E402
from ckptconv.catalog.optimizers import row, shape_of_slot  # noqa: E402
from ckptconv.conversion import convert  # noqa: E402

CASES = [("keras3", "muon"), ("keras3", "adafactor"), ("tf_keras", "adafactor")]


def trained(framework: str, algorithm: str, steps: int = 3) -> tuple[Any, Any]:
    keras: Any = keras3 if framework == "keras3" else tf_keras
    known = row(algorithm, framework)
    assert known is not None
    keras3.utils.set_random_seed(7)
    layers = keras.layers
    model = keras.Sequential(
        [
            keras.Input((4,), dtype="int64"),
            layers.Embedding(9, 6),
            layers.Conv1D(6, 2, padding="same"),
            layers.GlobalAveragePooling1D(),
            layers.Dense(6),
            layers.Dense(3),
        ]
    )
    optimizer = getattr(keras.optimizers, known.class_name.rpartition(".")[2])(0.01)
    model.compile(optimizer, "mse")
    optimizer.build(model.trainable_variables)
    rng = np.random.default_rng(5)
    for _ in range(steps):
        pairs = [(tf.constant(rng.normal(size=v.shape).astype("f4")), v) for v in model.trainable_variables]
        optimizer.apply_gradients(pairs)
    return model, optimizer


def saved(kind: str, model: Any, optimizer: Any, place: Path) -> Path:
    if kind == "checkpoint":
        return Path(tf.train.Checkpoint(model=model, optimizer=optimizer).save(str(place / "run")))
    path = place / ("run.keras" if kind == "file" else "run.weights.h5")
    model.save(path) if kind == "file" else model.save_weights(path)
    return path


@pytest.mark.parametrize("kind", ["checkpoint", "file"])
@pytest.mark.parametrize(("framework", "algorithm"), CASES)
def test_each_slot_is_that_of_its_parameter(
    framework: str, algorithm: str, kind: str, tmp_path: Path
) -> None:
    model, live = trained(framework, algorithm)
    document = ckptconv.open(saved(kind, model, live, tmp_path))
    (optimizer,) = document.optimizers
    known = row(algorithm, framework)
    assert known is not None
    assert (optimizer.algorithm, optimizer.framework) == (algorithm, framework)
    assert set(optimizer.slots) == set(known.slots)
    by_value = {v.numpy().tobytes(): number for number, v in enumerate(model.trainable_variables)}
    places = {
        name: by_value[param.tensor.read().tobytes()]
        for name, param in document.params.items()
        if param.tensor.read().tobytes() in by_value
    }
    count = 0
    for slot, edge in known.slots.items():
        lists = getattr(live, edge)
        for name, place in places.items():
            shape = tuple(model.trainable_variables[place].shape)
            due = shape_of_slot(known.slot_shapes.get(slot, "param"), shape)
            has = lists[place] is not None and due is not None
            assert (name in optimizer.slots[slot]) == has
            if has:
                np.testing.assert_array_equal(optimizer.slots[slot][name].read(), lists[place].numpy())
                count += 1
    assert count >= len(places)


@pytest.mark.parametrize(("framework", "algorithm"), CASES)
def test_onto_a_fresh_template(framework: str, algorithm: str, tmp_path: Path) -> None:
    for name in ("a", "t"):
        (tmp_path / name).mkdir()
    source = trained(framework, algorithm)
    path = saved("checkpoint", *source, tmp_path / "a")
    fresh = trained(framework, algorithm, steps=0)
    template = saved("checkpoint", *fresh, tmp_path / "t")
    report = convert(path, tmp_path / "out-1", template=template)
    assert report.verdicts[0].verdict == "exact"
    state = tf.train.Checkpoint(model=fresh[0], optimizer=fresh[1])
    state.restore(str(tmp_path / "out-1")).expect_partial()
    known = row(algorithm, framework)
    assert known is not None
    assert int(fresh[1].iterations) == 3
    for edge in known.slots.values():
        for ours, theirs in zip(getattr(fresh[1], edge), getattr(source[1], edge), strict=True):
            if theirs is not None and (edge != "_v" or len(theirs.shape) < 2):
                np.testing.assert_array_equal(ours.numpy(), theirs.numpy())
