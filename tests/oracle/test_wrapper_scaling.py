"""Loss scaling: `torch.amp.GradScaler` and the `LossScaleOptimizer` of every Keras, both ways, resumed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("tensorflow")
pytest.importorskip("tf_keras")

import torch

import ckptconv
from ckptconv.document import value_of
from ckptconv.errors import CkptError
from tests.support.command import invoke
from tests.support.wrapped import GROWTH, Keras, Torch, apart

KINDS = ("keras3", "tf_keras", "tf_keras_legacy")
TIGHT = 1e-10
OVERFLOWS = (1, 3, 12, 17)
BEFORE, AFTER = range(10), range(10, 30)
SCALE = 2.0**12
DONE = 8  # updates of the batches before: two overflow


def scaled(kind: str, seed: int, scale: float = SCALE, **more: Any) -> Torch | Keras:
    if kind == "torch":
        return Torch(seed=seed, around={"scaler": {"init_scale": scale, "growth_interval": GROWTH, **more}})
    around = {"scaler": {"initial_scale": scale, "dynamic_growth_steps": GROWTH, **more}}
    return Keras(kind=kind, seed=seed, around=around)


def run(side: Torch | Keras, numbers: range) -> list[tuple[float, int]]:
    """Scale and counter after each batch."""
    seen = []
    for number in numbers:
        side.take(number, overflow=number in OVERFLOWS)
        seen.append(side.scaling())
    return seen


def steps(side: Torch | Keras) -> dict[str, str]:
    return {"step": str(DONE)} if isinstance(side, Torch) else {}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("source", "target"), [pair for kind in KINDS for pair in (("torch", kind), (kind, "torch"))]
)
def test_a_scaled_run_goes_on_with_its_scale_and_its_counter(
    source: str, target: str, tmp_path: Path
) -> None:
    origin = scaled(source, 1)
    run(origin, BEFORE)
    before, (scale, counter) = origin.weights(), origin.scaling()
    assert scale != SCALE
    assert counter not in (0, len(BEFORE))
    template = scaled(target, 2, scale=8.0).save(tmp_path / "fresh")
    converted = tmp_path / ("out.pt" if target == "torch" else "out-1")
    saved = origin.save(tmp_path / "run")
    report = ckptconv.convert(saved, converted, template=template, set_=steps(origin))
    resumed = scaled(target, 3, scale=2.0).load(converted)
    assert resumed.scaling() == (scale, counter)
    if isinstance(resumed, Keras):
        assert int(resumed.optimizer.iterations) == DONE
    wanted = run(origin, AFTER)
    assert len({number for number, _ in wanted}) > 2
    assert run(resumed, AFTER) == wanted
    assert apart(resumed.weights(), origin.weights(), before) < TIGHT
    fates = {entry.item[1]: entry.fate for entry in report.ledger if entry.item[0] == "loss_scaling"}
    assert fates["growth_tracker"] == "copied"
    interval = f"dynamic_growth_steps={GROWTH}"
    if target == "torch":
        assert fates["growth_interval"] == "supplied"  # by the template: no bundle holds it
    else:
        assert any(interval in line for line in report.target_requires)

    begun = scaled(target, 3, scale=2.0).load(converted)  # the control: a scaler that begins anew
    if isinstance(begun, Torch):
        begun.scaler = torch.amp.GradScaler("cpu", init_scale=SCALE, growth_interval=GROWTH)
        assert run(begun, AFTER) != wanted


@pytest.mark.parametrize("kind", KINDS)
def test_it_survives_the_way_there_and_back(kind: str, tmp_path: Path) -> None:
    origin = scaled("torch", 1)
    run(origin, BEFORE)
    fresh = scaled(kind, 2).save(tmp_path / "fresh")
    ckptconv.convert(origin.save(tmp_path / "run"), tmp_path / "out-1", template=fresh, set_=steps(origin))
    assert value_of(ckptconv.open(tmp_path / "out-1").loss_scaling["growth_interval"]) == GROWTH
    other = Torch(seed=4, around={"scaler": {"growth_interval": 99}}).save(tmp_path / "other")
    ckptconv.convert(tmp_path / "out-1", tmp_path / "back.pt", template=other)
    back, was = torch.load(tmp_path / "back.pt"), origin.state()
    assert back["scaler"] == was["scaler"]


@pytest.mark.parametrize("kind", KINDS)
def test_factors_that_keras_does_not_have_are_refused(kind: str, tmp_path: Path) -> None:
    origin = scaled("torch", 1, growth_factor=3.0, backoff_factor=0.25)
    run(origin, BEFORE)
    fresh, saved = scaled(kind, 2).save(tmp_path / "fresh"), origin.save(tmp_path / "run")
    with pytest.raises(CkptError) as caught:
        ckptconv.convert(saved, tmp_path / "out-1", template=fresh, set_=steps(origin))
    assert {(p.code, p.loc) for p in caught.value.problems} == {
        ("form-mismatch", ("loss_scaling", name)) for name in ("growth_factor", "backoff_factor")
    }
    arguments: dict[str, Any] = {"template": fresh, "set_": steps(origin), "allow": ["form-mismatch"]}
    report = ckptconv.convert(saved, tmp_path / "out-1", **arguments)
    assert report.verdicts[0].verdict == "lossy"
    assert scaled(kind, 3).load(tmp_path / "out-1").scaling() == origin.scaling()


@pytest.mark.parametrize("kind", ["tf_keras", "tf_keras_legacy"])
def test_a_scale_below_one_is_refused_by_tf_keras(kind: str, tmp_path: Path) -> None:
    origin = scaled("torch", 1, scale=0.5)
    run(origin, range(2))
    fresh, saved = scaled(kind, 2).save(tmp_path / "fresh"), origin.save(tmp_path / "run")
    with pytest.raises(CkptError) as caught:
        ckptconv.convert(saved, tmp_path / "out-1", template=fresh, set_={"step": "2"})
    assert [(p.code, p.loc) for p in caught.value.problems] == [
        ("form-mismatch", ("loss_scaling", "loss_scale"))
    ]


def test_a_target_that_does_not_scale_is_told_how_to(tmp_path: Path) -> None:
    origin = scaled("torch", 1)
    run(origin, BEFORE)
    fresh, saved = Keras(kind="keras3", seed=2).save(tmp_path / "fresh"), origin.save(tmp_path / "run")
    report = ckptconv.convert(saved, tmp_path / "out-1", template=fresh, set_=steps(origin))
    (line,) = [line for line in report.target_requires if "LossScaleOptimizer" in line]
    assert f"initial_scale={origin.scaling()[0]}" in line
    fates = {entry.item[1]: entry.fate for entry in report.ledger if entry.item[0] == "loss_scaling"}
    assert set(fates.values()) == {"noted"}
    theirs = scaled("keras3", 5)
    run(theirs, BEFORE)
    plain = Torch(seed=6).save(tmp_path / "plain")
    report = ckptconv.convert(theirs.save(tmp_path / "k"), tmp_path / "out.pt", template=plain)
    (line,) = [line for line in report.target_requires if "GradScaler" in line]
    line = line.replace("GradScaler(", "GradScaler('cpu', ")
    scaler = eval(line, {"torch": torch})  # a comment ends it
    assert scaler.state_dict()["scale"] == theirs.scaling()[0]


@pytest.mark.parametrize("kind", ["torch", *KINDS])
def test_a_target_that_scales_must_be_told_the_scale(kind: str, tmp_path: Path) -> None:
    origin = Torch(seed=1)
    for number in range(3):
        origin.take(number)
    fresh, saved = scaled(kind, 2).save(tmp_path / "fresh"), origin.save(tmp_path / "run")
    target = tmp_path / ("out.pt" if kind == "torch" else "out-1")
    with pytest.raises(CkptError) as caught:
        ckptconv.convert(saved, target, template=fresh, set_={"step": "3"})
    assert "progress-unknown" in {p.code for p in caught.value.problems}
    ckptconv.convert(saved, target, template=fresh, set_={"step": "3", "loss_scale": "1024"})
    assert scaled(kind, 3).load(target).scaling() == (1024.0, 0)


def test_inspect_shows_the_scaling(tmp_path: Path) -> None:
    code, shown = invoke("inspect", scaled("torch", 1).save(tmp_path))
    assert code == 0
    assert f"growth_interval {GROWTH}" in " ".join(shown.split())


def test_a_disabled_scaler_scales_nothing(tmp_path: Path) -> None:
    origin = Torch(seed=1, around={"scaler": {"enabled": False}})
    origin.take(0)
    assert ckptconv.open(origin.save(tmp_path)).loss_scaling == {}
