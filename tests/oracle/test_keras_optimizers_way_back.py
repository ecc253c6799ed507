"""Every Keras optimizer of the catalog: known in its checkpoint, and written back from neutral as it was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ckptconv.catalog.optimizers import FRAMEWORKS, algorithms, row
from ckptconv.conversion import convert
from ckptconv.detect import open as open_checkpoint

tf = pytest.importorskip("tensorflow")
keras3 = pytest.importorskip("keras")
tf_keras = pytest.importorskip("tf_keras")

ON = {"momentum": 0.9, "centered": True, "amsgrad": True}
CASES = [(f, a) for f in FRAMEWORKS if f != "torch" for a in algorithms() if row(a, f) is not None]


def saved(framework: str, algorithm: str, path: Path) -> str:
    known = row(algorithm, framework)
    assert known is not None
    keras: Any = keras3 if framework == "keras3" else tf_keras
    cls: Any = keras
    for part in known.class_name.split(".")[1:]:
        cls = getattr(cls, part)
    keras3.utils.set_random_seed(7)
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(5), keras.layers.Dense(2)])
    optimizer = cls(**{name: value for name, value in ON.items() if name in known.slot_conditions.values()})
    rng = np.random.default_rng(5)
    for _ in range(3):
        pairs = [(tf.constant(rng.normal(size=v.shape).astype("f4")), v) for v in model.trainable_variables]
        optimizer.apply_gradients(pairs)
    return str(tf.train.Checkpoint(model=model, optimizer=optimizer).save(str(path / "run")))


@pytest.mark.parametrize(("framework", "algorithm"), CASES)
def test_known_and_written_back_as_it_was(framework: str, algorithm: str, tmp_path: Path) -> None:
    source = saved(framework, algorithm, tmp_path)
    optimizer = open_checkpoint(source).optimizers[0]
    known = row(algorithm, framework)
    assert known is not None
    assert (optimizer.algorithm, optimizer.framework) == (algorithm, framework)
    assert set(optimizer.slots) == set(known.slots)
    assert set(optimizer.scalars) == set(known.scalars)
    convert(source, tmp_path / "neutral", to="neutral")
    convert(tmp_path / "neutral", tmp_path / "back-1", to="tensorflow")
    ours, theirs = (tf.train.load_checkpoint(str(path)) for path in (tmp_path / "back-1", source))
    shapes = theirs.get_variable_to_shape_map()
    assert ours.get_variable_to_shape_map() == shapes
    for key in shapes:
        np.testing.assert_array_equal(ours.get_tensor(key), theirs.get_tensor(key), err_msg=key)
