"""Committed files of Keras against what their makers held and h5py read: no framework is needed for this."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("h5py")

import ckptconv
from ckptconv.conversion import read_raw
from ckptconv.document import value_of
from ckptconv.rawtree import RawTree, walk
from ckptconv.tensor import TensorRef

FIXTURES = Path(__file__).resolve().parents[2] / "fixtures"
CASES = [
    path.parent for name in ("h5", "keras-file") for path in sorted(FIXTURES.glob(f"{name}/*/expected.json"))
]
IDS = ["/".join(case.parts[-2:]) for case in CASES]


def truth_of(case: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((case / "expected.json").read_text(encoding="utf-8"))
    return found


def sha(tensor: TensorRef) -> str:
    return hashlib.sha256(tensor.read().tobytes()).hexdigest()


def datasets(raw: RawTree) -> dict[str, Any]:
    """Every dataset under the key that h5py has for it."""
    found = {}
    for path, leaf in walk(raw.root):
        if isinstance(leaf, TensorRef):
            key = "/".join(map(str, path[1:] if raw.format == "keras" else path))
            found[key] = {"dtype": leaf.dtype.name, "shape": list(leaf.shape), "sha256": sha(leaf)}
    return found


def test_there_are_fixtures() -> None:
    assert len(CASES) >= 9


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_every_key_is_what_h5py_reads(case: Path) -> None:
    truth = truth_of(case)
    assert datasets(read_raw(case / truth["checkpoint"])) == truth["datasets"]


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_the_document_is_what_the_model_held(case: Path) -> None:
    truth = truth_of(case)
    if truth["dialect"] is None:
        pytest.skip("no model wrote this file")
    run = ckptconv.open(case / truth["checkpoint"])
    assert run.provenance.dialect == truth["dialect"]
    assert value_of(run.progress.step) == truth["step"]
    own = run.optimizers[0] if run.optimizers else None
    rate = None if own is None else value_of(own.groups[0].hyperparameters["learning_rate"])
    assert rate == (None if truth["learning_rate"] is None else pytest.approx(truth["learning_rate"]))
    due = {one["sha256"]: one for one in truth["variables"]}
    held = {sha(param.tensor): param for param in run.params.values()}
    assert held.keys() == due.keys()
    for digest, param in held.items():
        assert list(param.tensor.shape) == due[digest]["shape"]
        if param.trainable is not None:
            assert param.trainable is due[digest]["trained"] or not any(
                one["trained"] for one in due.values()
            )
        slots = (
            {} if own is None else {s: sha(by[param.name]) for s, by in own.slots.items() if param.name in by}
        )
        assert slots == due[digest]["slots"], param.name
    assert not truth["said"] or any(truth["said"] in said for said in run.oddities)


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_through_neutral_and_back_every_key_is_the_same(case: Path, tmp_path: Path) -> None:
    truth = truth_of(case)
    if truth["dialect"] is None:
        pytest.skip("no model wrote this file")
    source = case / truth["checkpoint"]
    ckptconv.convert(source, tmp_path / "d", to="neutral")
    ckptconv.convert(tmp_path / "d", tmp_path / source.name)
    assert datasets(read_raw(tmp_path / source.name)) == truth["datasets"]
    one, other = (dict(walk(read_raw(p).root)) for p in (source, tmp_path / source.name))
    texts = {path: leaf for path, leaf in one.items() if not isinstance(leaf, TensorRef)}
    assert texts == {path: leaf for path, leaf in other.items() if not isinstance(leaf, TensorRef)}
