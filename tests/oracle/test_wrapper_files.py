"""Scaling, averages, accumulation and clipping in `.keras` and `.weights.h5`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("tensorflow")
pytest.importorskip("tf_keras")
pytest.importorskip("h5py")

import h5py
import torch

import ckptconv
from ckptconv.document import Unknown, value_of
from ckptconv.errors import CkptError
from tests.support.wrapped import DECAY, GROWTH, Array, Keras, Torch, apart, keras_file

SCALER = {"initial_scale": 2.0**10, "dynamic_growth_steps": GROWTH}
STEPS = 6


def run(side: Any, numbers: range) -> Any:
    for number in numbers:
        side.take(number)
    return side


def same(ours: dict[str, Array], theirs: dict[str, Array]) -> None:
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        np.testing.assert_array_equal(ours[name], value, err_msg=name)


@pytest.mark.parametrize("suffix", ["keras", "weights.h5"])
def test_a_scaled_run_to_a_keras_file_and_back(suffix: str, tmp_path: Path) -> None:
    around = {"scaler": {"init_scale": 2.0**12, "growth_interval": GROWTH + 1}}
    origin = run(Torch(seed=1, around=around), range(STEPS + 1))
    before = origin.weights()
    template = Keras(kind="keras3", seed=2, around={"scaler": SCALER})
    fresh = keras_file(template, tmp_path / f"fresh.{suffix}")
    saved, out = origin.save(tmp_path / "run"), tmp_path / f"out.{suffix}"
    report = ckptconv.convert(saved, out, template=fresh, set_={"step": str(STEPS + 1)})
    resumed = Keras(kind="keras3", seed=3, around={"scaler": {**SCALER, "dynamic_growth_steps": GROWTH + 1}})
    keras_file(resumed, out, load=True)
    assert resumed.scaling() == origin.scaling() == (2.0**13, 2)
    assert int(resumed.optimizer.iterations) == STEPS + 1
    same(resumed.weights(), before)
    if suffix == "keras":
        assert resumed.optimizer.dynamic_growth_steps == GROWTH + 1
    told = any(f"dynamic_growth_steps={GROWTH + 1}" in line for line in report.target_requires)
    assert told == (suffix != "keras")
    run(origin, range(20, 30)), run(resumed, range(20, 30))
    assert resumed.scaling() == origin.scaling()
    assert apart(resumed.weights(), origin.weights(), before) < 1e-10

    written = keras_file(resumed, tmp_path / f"theirs.{suffix}")
    other = Torch(seed=4, around={"scaler": {"growth_interval": 99}}).save(tmp_path / "other")
    ckptconv.convert(written, tmp_path / "back.pt", template=other)
    back = torch.load(tmp_path / "back.pt")["scaler"]
    assert (back["scale"], back["_growth_tracker"]) == resumed.scaling()
    assert back["growth_interval"] == (GROWTH + 1 if suffix == "keras" else 99)


@pytest.mark.parametrize("kind", ["keras3", "tf_keras"])
def test_averages_in_a_keras_file_both_ways(kind: str, tmp_path: Path) -> None:
    origin = run(Torch(seed=1, around={"average": True}), range(STEPS))
    template = Keras(kind=kind, seed=2, around={"average": True})
    fresh = keras_file(template, tmp_path / "fresh.keras")
    saved, out = origin.save(tmp_path / "run"), tmp_path / "out.keras"
    report = ckptconv.convert(saved, out, template=fresh, set_={"step": str(STEPS)})
    assert not any("DECAY" in line for line in report.target_requires)  # the config says it
    resumed = Keras(kind=kind, seed=3, around={"average": True})
    keras_file(resumed, out, load=True)
    same(resumed.averages(), origin.averages())
    other = Torch(seed=4, around={"average": True}).save(tmp_path / "other")
    report = ckptconv.convert(out, tmp_path / "back.pt", template=other)
    assert any(f"get_ema_multi_avg_fn({DECAY})" in line for line in report.target_requires)
    back, was = torch.load(tmp_path / "back.pt")["ema"], origin.state()["ema"]
    assert all(torch.equal(back[f"module.{name}"], was[f"module.{name}"]) for name in origin.averages())


@pytest.mark.parametrize("batches", [12, 13])
def test_an_open_window_in_a_keras_file(batches: int, tmp_path: Path) -> None:
    origin = run(Keras(kind="keras3", seed=1, around={"accumulate": 3}), range(batches))
    template = Keras(kind="keras3", seed=2, around={"accumulate": 3})
    fresh, out = keras_file(template, tmp_path / "fresh.keras"), tmp_path / "out.keras"
    written, sums = keras_file(origin, tmp_path / "run.keras"), origin.sums()
    document = ckptconv.open(written)
    progress = [
        value_of(getattr(document.progress, name)) for name in ("step", "accumulation", "micro_steps")
    ]
    assert progress == [batches // 3, 3, batches]
    ckptconv.convert(written, out, template=fresh)
    resumed = Keras(kind="keras3", seed=3, around={"accumulate": 3})
    keras_file(resumed, out, load=True)
    same(resumed.sums(), sums)
    assert int(resumed.optimizer._iterations) == batches


def test_updates_of_another_number_of_batches(tmp_path: Path) -> None:
    """The template's config tells how many its updates are of."""
    torch_run = run(Torch(seed=1), range(STEPS))
    template = Keras(kind="keras3", seed=2, around={"accumulate": 4})
    fresh, out = keras_file(template, tmp_path / "fresh.keras"), tmp_path / "out.keras"
    saved = torch_run.save(tmp_path / "run")
    report = ckptconv.convert(saved, out, template=fresh, set_={"step": str(STEPS)})
    assert (report.progress["micro_steps"], report.progress["accumulation"]) == (STEPS * 4, 4)
    for batches, refused in ((12, False), (13, True)):
        origin = run(Keras(kind="keras3", seed=1, around={"accumulate": 3}), range(batches))
        written = keras_file(origin, tmp_path / f"run{batches}.keras")
        if refused:
            with pytest.raises(CkptError) as caught:
                ckptconv.convert(written, out, template=fresh, force=True)
            assert [p.code for p in caught.value.problems] == ["state-dropped"]
        else:
            ckptconv.convert(written, out, template=fresh, force=True)
            resumed = Keras(kind="keras3", seed=3, around={"accumulate": 4})
            keras_file(resumed, out, load=True)
            assert int(resumed.optimizer._iterations) == 16


def test_lists_without_a_config(tmp_path: Path) -> None:
    """A `.weights.h5` tells two lists by their number; one alone may be either."""
    for around in ({"average": True}, {"accumulate": 3}):
        side = run(Keras(kind="keras3", seed=1, around=around), range(STEPS))
        written = keras_file(side, tmp_path / "one.weights.h5")
        document = ckptconv.open(written)
        assert isinstance(document.progress.step, Unknown)
        assert value_of(document.progress.micro_steps) == STEPS
        back = tmp_path / "back.weights.h5"
        ckptconv.convert(written, back, force=True)
        again = Keras(kind="keras3", seed=2, around=around)
        keras_file(again, back, load=True)
        assert int(again.optimizer._iterations) == STEPS
        same(again.weights(), side.weights())
        with h5py.File(written, "r+") as file:
            del file["optimizer/vars"].attrs["name"]  # before Keras 3.6 nothing tells the class either
        document = ckptconv.open(written)
        assert document.optimizers[0].algorithm == "unknown"
        assert isinstance(document.progress.step, Unknown)
        assert value_of(document.progress.micro_steps) == STEPS
    side = run(Keras(kind="keras3", seed=1, around={"average": True, "accumulate": 3}), range(STEPS + 1))
    document = ckptconv.open(keras_file(side, tmp_path / "two.weights.h5"))
    assert {"moving_average", "accumulated_gradient", "momentum"} == set(document.optimizers[0].slots)
    assert value_of(document.progress.micro_steps) == STEPS + 1


CLIPPING = [
    ("clipnorm", "clip_norm", "clip_grad_norm_(p, 0.5)"),
    ("clipvalue", "clip_value", "clip_grad_value_(model.parameters(), 0.5)"),
    ("global_clipnorm", "clip_global_norm", "clip_grad_norm_(model.parameters(), 0.5)"),
]


@pytest.mark.parametrize(("argument", "name", "code"), CLIPPING)
def test_clipping_is_recorded_where_a_config_is_and_code_where_none_is(
    argument: str, name: str, code: str, tmp_path: Path
) -> None:
    origin = run(Keras(kind="keras3", seed=1, around={"more": {argument: 0.5}}), range(2))
    before = origin.weights()
    written = keras_file(origin, tmp_path / "run.keras")
    facts = ckptconv.open(written).optimizers[0].groups[0].hyperparameters
    others = {other for _, other, _ in CLIPPING} - {name}
    assert value_of(facts[name]) == 0.5
    assert all(value_of(facts[other]) is None for other in others)

    plain = Torch(seed=2).save(tmp_path / "plain")
    report = ckptconv.convert(written, tmp_path / "out.pt", template=plain)
    (line,) = [line for line in report.target_requires if "clip" in line]
    assert code in line
    resumed = Torch(seed=3).load(tmp_path / "out.pt")
    step = resumed.optimizer.step

    def clipped() -> None:
        exec(line, {"torch": torch, "model": resumed.model})
        step()

    unclipped = run(Torch(seed=3).load(tmp_path / "out.pt"), range(2, 8))
    resumed.optimizer.step = clipped
    run(origin, range(2, 8)), run(resumed, range(2, 8))
    assert apart(resumed.weights(), origin.weights(), before) < 1e-5  # torch divides by the norm + 1e-6
    assert apart(unclipped.weights(), origin.weights(), before) > 1e-3

    bundle = Keras(kind="keras3", seed=4).save(tmp_path / "bundle")
    report = ckptconv.convert(written, tmp_path / "out-1", template=bundle)
    assert any(f"{argument}=0.5" in line for line in report.target_requires)
    unclipping = keras_file(Keras(kind="keras3", seed=5), tmp_path / "fresh.keras")
    ckptconv.convert(written, tmp_path / "out.keras", template=unclipping)
    loaded = Keras(kind="keras3", seed=6)
    keras_file(loaded, tmp_path / "out.keras", load=True)
    assert getattr(loaded.optimizer, argument) == 0.5
    # a run that does not clip onto a template that does: what the source records wins
    ckptconv.convert(unclipping, tmp_path / "none.keras", template=written)
    keras_file(loaded, tmp_path / "none.keras", load=True)
    assert getattr(loaded.optimizer, argument) is None
