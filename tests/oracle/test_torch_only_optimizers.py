"""Optimizers that only PyTorch has: lossless within PyTorch, and refused elsewhere with what can be done."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ckptconv.conversion import convert
from ckptconv.detect import open as open_checkpoint
from ckptconv.errors import CkptError

torch = pytest.importorskip("torch")

CLASSES: dict[str, tuple[str, dict[str, Any]]] = {
    "radam": ("RAdam", {"lr": 0.01, "decoupled_weight_decay": True, "weight_decay": 0.1}),
    "rprop": ("Rprop", {"lr": 0.01}),
    "asgd": ("ASGD", {"lr": 0.01, "t0": 1.0}),
    "sparse_adam": ("SparseAdam", {"lr": 0.01}),
    "lbfgs": ("LBFGS", {"lr": 0.1, "max_iter": 3}),
    "muon": ("Muon", {"lr": 0.01}),
    "adafactor": ("Adafactor", {"lr": 0.01}),
}


def trained(name: str, steps: int, seed: int) -> tuple[Any, Any]:
    torch.manual_seed(seed)
    model = torch.nn.Embedding(5, 4, sparse=name == "sparse_adam")
    cls, arguments = CLASSES[name]
    optimizer = getattr(torch.optim, cls)(model.parameters(), **arguments)
    for step in range(steps):

        def closure(step: int = step) -> Any:
            optimizer.zero_grad()
            loss = (model(torch.tensor([step % 5, 1, 2])) ** 2).sum()
            loss.backward()
            return loss

        optimizer.step(closure)
    return model, optimizer


def saved(name: str, path: Path, steps: int = 4, seed: int = 0) -> Path:
    model, optimizer = trained(name, steps, seed)
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, path)
    return path


def same(ours: Any, theirs: Any) -> None:
    assert type(ours) is type(theirs)
    if isinstance(ours, dict):
        assert list(ours) == list(theirs)
        for key in ours:
            same(ours[key], theirs[key])
    elif isinstance(ours, (list, tuple)):
        assert len(ours) == len(theirs)
        for one, other in zip(ours, theirs, strict=True):
            same(one, other)
    elif isinstance(ours, torch.Tensor):
        assert ours.dtype == theirs.dtype
        np.testing.assert_array_equal(ours.numpy(), theirs.numpy())
    else:
        assert ours == theirs


@pytest.mark.parametrize("name", CLASSES)
def test_known_and_written_back_as_it_was(name: str, tmp_path: Path) -> None:
    source = saved(name, tmp_path / "a.pt")
    optimizer = open_checkpoint(source).optimizers[0]
    assert optimizer.algorithm == name
    convert(source, tmp_path / "n", to="neutral")
    convert(tmp_path / "n", tmp_path / "b.pt")
    same(torch.load(tmp_path / "b.pt")["optimizer"], torch.load(source)["optimizer"])


@pytest.mark.parametrize("name", [name for name in CLASSES if name != "lbfgs"])
def test_onto_a_fresh_file_of_the_same_class(name: str, tmp_path: Path) -> None:
    source, template = saved(name, tmp_path / "a.pt"), saved(name, tmp_path / "t.pt", steps=0, seed=1)
    supplied = {"step": "4"} if name == "muon" else {}
    report = convert(source, tmp_path / "b.pt", template=template, set_=supplied)
    assert report.verdicts[0].verdict == "exact"
    ours, theirs = (torch.load(path)["optimizer"]["state"] for path in (tmp_path / "b.pt", source))
    assert set(ours) == set(theirs)
    for index, entry in theirs.items():
        assert set(ours[index]) == set(entry)
        for key, value in entry.items():
            np.testing.assert_array_equal(np.asarray(ours[index][key]), np.asarray(value))


def test_lbfgs_goes_to_no_other_file(tmp_path: Path) -> None:
    source, template = saved("lbfgs", tmp_path / "a.pt"), saved("lbfgs", tmp_path / "t.pt", steps=0, seed=1)
    with pytest.raises(CkptError) as caught:
        convert(source, tmp_path / "b.pt", template=template)
    found = {(problem.code, problem.loc) for problem in caught.value.problems}
    assert ("state-dropped", ("optimizers", "optimizer", "slots")) in found


@pytest.mark.parametrize("name", [name for name in CLASSES if name not in ("adafactor", "muon")])
def test_no_other_framework_has_it(name: str, tmp_path: Path) -> None:
    keras = pytest.importorskip("keras")
    tf = pytest.importorskip("tensorflow")
    model = keras.Sequential([keras.layers.Embedding(5, 4)])
    model.build((None, 3))
    optimizer = keras.optimizers.Adam()
    optimizer.build(model.trainable_variables)
    template = tf.train.Checkpoint(model=model, optimizer=optimizer).save(str(tmp_path / "k"))
    with pytest.raises(CkptError) as caught:
        convert(saved(name, tmp_path / "a.pt"), tmp_path / "out-1", template=template)
    found = {(problem.code, problem.loc) for problem in caught.value.problems}
    assert ("optimizer-mismatch", ("optimizers", "optimizer", "algorithm")) in found
