"""Accumulated gradients: Keras 3 counts batches and holds their sum, a torch loop holds it in `.grad`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("tensorflow")
pytest.importorskip("tf_keras")

import ckptconv
from ckptconv.errors import CkptError
from tests.support.wrapped import Keras, Torch, apart

EACH, TIGHT = 3, 1e-10
AT_END, OPEN = 12, 13
"""Batches before the switch: four updates, or four and a batch of the fifth."""


def accumulating(kind: str, seed: int, each: int = EACH) -> Torch | Keras:
    around = {"accumulate": each} if each > 1 else {}
    return Torch(seed=seed, around=around) if kind == "torch" else Keras(kind=kind, seed=seed, around=around)


def run(side: Torch | Keras, first: int, count: int) -> Torch | Keras:
    for number in range(first, first + count):
        side.take(number)
    return side


def refused(*arguments: Any, **more: Any) -> list[tuple[str, Any]]:
    with pytest.raises(CkptError) as caught:
        ckptconv.convert(*arguments, **more)
    return [(problem.code, problem.loc) for problem in caught.value.problems]


@pytest.mark.parametrize(("batches", "done"), [(AT_END, 0), (OPEN, 1)])
def test_an_open_window_crosses_from_keras_to_keras(batches: int, done: int, tmp_path: Path) -> None:
    origin = run(accumulating("keras3", 1), 0, batches)
    before = origin.weights()
    fresh = accumulating("keras3", 2).save(tmp_path / "fresh")
    saved, out = origin.save(tmp_path / "run"), tmp_path / "out-1"
    report = ckptconv.convert(saved, out, template=fresh, set_={"accumulation": str(EACH)})
    assert (report.progress["step"], report.progress["micro_steps"]) == (batches // EACH, batches)
    resumed = accumulating("keras3", 3).load(out)
    assert int(resumed.optimizer._iterations) == batches
    for name, value in origin.sums().items():
        np.testing.assert_array_equal(resumed.sums()[name], value)
        assert bool(np.any(value)) == bool(done)
    run(origin, batches, 8), run(resumed, batches, 8)
    assert apart(resumed.weights(), origin.weights(), before) < TIGHT


def test_an_open_window_without_its_sum_is_another_run(tmp_path: Path) -> None:
    """The control of the test above."""
    origin = run(accumulating("keras3", 1), 0, OPEN)
    before, saved = origin.weights(), origin.save(tmp_path / "run")
    lost = accumulating("keras3", 2).load(saved)
    for array in lost.inner._accumulated_gradients:
        array.assign(np.zeros(array.shape))
    run(origin, OPEN, 8), run(lost, OPEN, 8)
    assert apart(lost.weights(), origin.weights(), before) > 1e-3


def test_at_the_end_of_an_update_keras_goes_on_in_torch(tmp_path: Path) -> None:
    origin = run(accumulating("keras3", 1), 0, AT_END)
    before, saved = origin.weights(), origin.save(tmp_path / "run")
    fresh = accumulating("torch", 2).save(tmp_path / "fresh")
    told = {"accumulation": str(EACH)}
    report = ckptconv.convert(saved, tmp_path / "out.pt", template=fresh, set_=told)
    assert any(f"{EACH} batches" in line for line in report.target_requires)
    resumed = accumulating("torch", 3).load(tmp_path / "out.pt")
    run(origin, AT_END, 9), run(resumed, AT_END, 9)
    assert apart(resumed.weights(), origin.weights(), before) < TIGHT


def test_torch_goes_on_in_keras(tmp_path: Path) -> None:
    origin = run(accumulating("torch", 1), 0, AT_END)
    before, saved = origin.weights(), origin.save(tmp_path / "run")
    fresh = accumulating("keras3", 2).save(tmp_path / "fresh")
    step, out = {"step": str(AT_END // EACH)}, tmp_path / "out-1"
    assert refused(saved, out, template=fresh, set_=step) == [
        ("progress-unknown", ("progress", "accumulation"))
    ]
    report = ckptconv.convert(saved, out, template=fresh, set_={**step, "accumulation": str(EACH)})
    assert report.progress["micro_steps"] == AT_END
    resumed = accumulating("keras3", 3).load(out)
    assert int(resumed.optimizer.iterations) == AT_END // EACH
    run(origin, AT_END, 9), run(resumed, AT_END, 9)
    assert apart(resumed.weights(), origin.weights(), before) < TIGHT
    plain = accumulating("keras3", 3).load(out)  # the control: the counter of another rhythm
    plain.optimizer._iterations.assign(AT_END + 1)
    run(plain, AT_END, 9)
    assert apart(plain.weights(), origin.weights(), before) > 1e-3


@pytest.mark.parametrize("target", ["torch", "keras3", "tf_keras"])
def test_an_open_window_is_a_loss_where_no_sum_is_held(target: str, tmp_path: Path) -> None:
    origin = run(accumulating("keras3", 1), 0, OPEN)
    saved, out = origin.save(tmp_path / "run"), tmp_path / ("out.pt" if target == "torch" else "out-1")
    fresh = accumulating(target, 2, each=1).save(tmp_path / "fresh")
    told = {"accumulation": str(EACH)}
    lost = [("state-dropped", ("optimizers", "optimizer", "accumulated_gradient"))]
    assert refused(saved, out, template=fresh, set_=told) == lost
    report = ckptconv.convert(saved, out, template=fresh, set_=told, allow=["state-dropped"])
    assert report.verdicts[0].verdict == "lossy"
    assert (report.progress["step"], report.progress["micro_steps"]) == (OPEN // EACH, AT_END)
    resumed = accumulating(target, 3, each=1).load(out)
    if isinstance(resumed, Keras):
        assert int(resumed.optimizer.iterations) == OPEN // EACH


def test_the_gradients_of_an_open_window_of_torch_are_in_no_file(tmp_path: Path) -> None:
    origin = run(accumulating("torch", 1), 0, OPEN)
    fresh = accumulating("keras3", 2).save(tmp_path / "fresh")
    told = {"step": str(OPEN // EACH), "accumulation": str(EACH), "micro_steps": str(OPEN)}
    saved, out = origin.save(tmp_path / "run"), tmp_path / "out-1"
    lost = [("state-dropped", ("optimizers", "optimizer", "accumulated_gradient"))]
    assert refused(saved, out, template=fresh, set_=told) == lost
    ckptconv.convert(saved, out, template=fresh, set_=told, allow=["state-dropped"])
    assert int(accumulating("keras3", 3).load(out).optimizer._iterations) == AT_END


def test_batches_per_update_that_nothing_tells(tmp_path: Path) -> None:
    origin = run(accumulating("keras3", 1), 0, AT_END)
    saved, fresh = origin.save(tmp_path / "run"), accumulating("torch", 2).save(tmp_path / "fresh")
    plain = Keras(kind="keras3", seed=2).save(tmp_path / "plain")
    unknown = ("progress-unknown", ("progress", "accumulation"))
    assert unknown in refused(saved, tmp_path / "out.pt", template=fresh)
    assert unknown in refused(saved, tmp_path / "out-1", template=plain)
    # four updates of twelve batches are of three each
    report = ckptconv.convert(saved, tmp_path / "out-1", template=plain, set_={"step": "4"})
    assert report.progress["accumulation"] == EACH
    # one update of twelve batches may be of seven to twelve
    assert unknown in refused(saved, tmp_path / "out-2", template=plain, set_={"step": "1"})
