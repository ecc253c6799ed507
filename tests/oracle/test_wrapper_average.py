"""Averages of the weights: torch's `AveragedModel` and the `use_ema` of Keras, both ways, resumed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("tensorflow")
pytest.importorskip("tf_keras")

import torch

import ckptconv
from ckptconv.errors import CkptError
from tests.support.wrapped import DECAY, Keras, Torch, apart

KINDS = ("keras3", "tf_keras")
PAIRS = [pair for kind in KINDS for pair in (("torch", kind), (kind, "torch"))] + [
    ("keras3", "tf_keras"),
    ("tf_keras", "keras3"),
]
TIGHT = 1e-7  # the decay is a float32 in Keras' rule
BEFORE, AFTER = 7, 12


def averaging(kind: str, seed: int, **more: Any) -> Torch | Keras:
    arguments: dict[str, Any] = {"seed": seed, "around": {"average": True}, **more}
    return Torch(**arguments) if kind == "torch" else Keras(kind=kind, **arguments)


def run(side: Torch | Keras, first: int, count: int) -> Torch | Keras:
    for number in range(first, first + count):
        side.take(number)
    return side


def target_of(folder: Path, kind: str) -> Path:
    return folder / ("out.pt" if kind == "torch" else "out-1")


def steps(side: Torch | Keras, count: int = BEFORE) -> dict[str, str]:
    return {"step": str(count)} if isinstance(side, Torch) else {}


def same(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        np.testing.assert_array_equal(ours[name], value, err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize(("source", "target"), PAIRS)
def test_an_average_goes_on_as_if_nothing_had_happened(source: str, target: str, tmp_path: Path) -> None:
    origin = run(averaging(source, 1), 0, BEFORE)
    before = origin.averages()
    assert apart(before, origin.weights(), averaging(source, 1).weights()) > 0.1
    template = averaging(target, 2).save(tmp_path / "fresh")
    converted = target_of(tmp_path, target)
    report = ckptconv.convert(origin.save(tmp_path / "run"), converted, template=template, set_=steps(origin))
    assert report.verdicts[0].verdict in ("exact", "exact-at-constant-learning-rate")
    resumed = averaging(target, 3).load(converted)
    same(resumed.averages(), before)
    same(resumed.weights(), origin.weights())
    if isinstance(resumed, Torch):
        assert int(resumed.average.n_averaged) == BEFORE
    run(origin, BEFORE, AFTER), run(resumed, BEFORE, AFTER)
    assert apart(resumed.averages(), origin.averages(), before) < TIGHT
    assert any("DECAY" in line or f"{DECAY}" in line for line in report.target_requires)

    lost = averaging(target, 3).load(converted)  # the control: an average that begins at the weights
    if isinstance(lost, Torch):
        lost.average.n_averaged.zero_()
    else:
        for average, variable in zip(lost.inner._model_variables_moving_average, lost.trained, strict=True):
            average.assign(variable)
    run(lost, BEFORE, AFTER)
    assert apart(lost.averages(), origin.averages(), before) > 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_it_survives_the_way_there_and_back(kind: str, tmp_path: Path) -> None:
    """Buffers and frozen parameters too: their averages are what the model has."""
    origin = run(averaging("torch", 1, frozen=True), 0, BEFORE)
    keras = Keras(kind=kind, seed=2, around={"average": True}, frozen=True)
    ckptconv.convert(
        origin.save(tmp_path / "run"),
        tmp_path / "out-1",
        template=keras.save(tmp_path / "fresh"),
        set_=steps(origin),
    )
    other = averaging("torch", 4, frozen=True).save(tmp_path / "other")
    ckptconv.convert(tmp_path / "out-1", tmp_path / "back.pt", template=other)
    back, was = torch.load(tmp_path / "back.pt")["ema"], origin.state()
    statistics = {"module.1.running_mean", "module.1.running_var", "module.1.num_batches_tracked"}
    assert back.keys() == was["ema"].keys()
    for name in back.keys() - statistics:
        assert torch.equal(back[name], was["ema"][name]), name
    assert int(back["n_averaged"]) == BEFORE
    for name in ("1.running_mean", "1.running_var"):
        assert torch.equal(back[f"module.{name}"], was["model"][name])


@pytest.mark.parametrize("key", ["state_dict_ema", "model_ema", "ema_state_dict", "swa_model"])
def test_a_plain_copy_under_a_telling_key_is_an_average(key: str, tmp_path: Path) -> None:
    origin = run(averaging("torch", 1), 0, BEFORE)
    state = origin.state()
    averaged = {name.removeprefix("module."): value for name, value in state.pop("ema").items()}
    averaged.pop("n_averaged")
    torch.save({**state, key: averaged}, tmp_path / "run.pt")
    fresh = averaging("keras3", 2).save(tmp_path / "fresh")
    ckptconv.convert(tmp_path / "run.pt", tmp_path / "out-1", template=fresh, set_=steps(origin))
    same(averaging("keras3", 3).load(tmp_path / "out-1").averages(), origin.averages())
    other = Torch(seed=5).state()
    torch.save({**other, key: {n: torch.zeros_like(v) for n, v in averaged.items()}}, tmp_path / "other.pt")
    ckptconv.convert(tmp_path / "out-1", tmp_path / "back.pt", template=tmp_path / "other.pt")
    back = torch.load(tmp_path / "back.pt")[key]
    for name in origin.averages():
        assert torch.equal(back[name], averaged[name])


@pytest.mark.parametrize(("source", "target"), [("torch", "keras3"), ("keras3", "torch")])
def test_an_average_without_a_place_is_a_loss(source: str, target: str, tmp_path: Path) -> None:
    origin = run(averaging(source, 1), 0, BEFORE)
    plain = Torch(seed=2) if target == "torch" else Keras(kind=target, seed=2)
    arguments: dict[str, Any] = {"template": plain.save(tmp_path / "fresh"), "set_": steps(origin)}
    saved, out = origin.save(tmp_path / "run"), target_of(tmp_path, target)
    with pytest.raises(CkptError) as caught:
        ckptconv.convert(saved, out, **arguments)
    (problem,) = caught.value.problems
    assert (problem.code, problem.loc) == ("state-dropped", ("optimizers", "optimizer", "moving_average"))
    report = ckptconv.convert(saved, out, **arguments, allow=["state-dropped"])
    assert report.verdicts[0].verdict == "lossy"


@pytest.mark.parametrize(("source", "target"), [("torch", "keras3"), ("tf_keras", "torch")])
def test_a_target_that_averages_needs_an_average(source: str, target: str, tmp_path: Path) -> None:
    origin = run(Torch(seed=1) if source == "torch" else Keras(kind=source, seed=1), 0, BEFORE)
    fresh = averaging(target, 2).save(tmp_path / "fresh")
    saved, out = origin.save(tmp_path / "run"), target_of(tmp_path, target)
    with pytest.raises(CkptError) as caught:
        ckptconv.convert(saved, out, template=fresh, set_=steps(origin))
    (problem,) = caught.value.problems
    assert (problem.code, problem.loc) == ("slots-missing", ("optimizers", "optimizer", "moving_average"))
    ckptconv.convert(saved, out, template=fresh, set_=steps(origin), allow=["slots-missing"])
    resumed = averaging(target, 3).load(out)
    same(resumed.averages(), origin.weights())
    if isinstance(resumed, Torch):
        assert int(resumed.average.n_averaged) == 0


@pytest.mark.parametrize("target", KINDS)
def test_an_average_that_has_not_begun_is_no_average(target: str, tmp_path: Path) -> None:
    """`AveragedModel` without an update takes the weights at its first; Keras would blend them in."""
    origin = averaging("torch", 1)
    origin.average.update_parameters = lambda model: None  # the loop has not come to it yet
    run(origin, 0, BEFORE)
    fresh = averaging(target, 2).save(tmp_path / "fresh")
    with pytest.raises(CkptError) as caught:
        ckptconv.convert(
            origin.save(tmp_path / "run"), tmp_path / "out-1", template=fresh, set_=steps(origin)
        )
    (problem,) = caught.value.problems
    assert (problem.code, problem.loc[-1]) == ("form-mismatch", "averaged")


def test_the_count_of_averages_stays_in_torch(tmp_path: Path) -> None:
    origin = run(averaging("torch", 1), 0, BEFORE)
    origin.average.n_averaged.fill_(3)  # it began later than the run
    fresh = averaging("torch", 2).save(tmp_path / "fresh")
    ckptconv.convert(origin.save(tmp_path / "run"), tmp_path / "out.pt", template=fresh)
    back, was = torch.load(tmp_path / "out.pt")["ema"], origin.state()["ema"]
    assert back.keys() == was.keys()
    assert all(torch.equal(back[name], was[name]) for name in was)
