"""Each schedule family resumed half-way, in both directions, through files that the frameworks wrote.

A run of `DONE` updates is saved, converted and taken up again by the other framework; the rates of its next
`NEXT` updates are those that the first one goes on with. The lines that a report prints are run as they
stand. One table, `FAMILIES`, has all of the catalog.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import ckptconv
from ckptconv.catalog import schedules
from tests.support.schedule_families import FAMILIES, Case
from tests.support.schedule_runs import (
    DONE,
    NEXT,
    PACKAGES,
    close,
    fresh_keras,
    keras_model,
    keras_steps,
    resumed,
    same,
    saved,
    schedule_of,
    scheduler_of,
    tf,
    torch_objects,
    torch_steps,
    torch_template,
    written,
)

QUICK = {"step", "multi-step", "cosine", "warm-up", "sequential", "chained", "one-cycle", "lambda"}


def both(names: list[str]) -> list[Any]:
    """(family, package) of each; some of Keras 3 are in the quick suite."""
    marks = {True: [], False: [pytest.mark.slow]}
    return [
        pytest.param(n, p, marks=marks[n in QUICK and p == "keras"], id=f"{n}-{p}")
        for n in names
        for p in PACKAGES
    ]


@pytest.mark.parametrize(
    ("name", "package"), both([name for name, case in FAMILIES.items() if case.torch is not None])
)
def test_torch_to_keras(name: str, package: str, tmp_path: Path) -> None:
    case = FAMILIES[name]
    assert case.torch is not None
    live = torch_objects(case.torch)
    torch_steps(*live, DONE)
    source = written(tmp_path / "run.pt", *live)
    spec = ckptconv.pytorch.describe(*live, remaining=NEXT) if case.live else None
    lib = PACKAGES[package]
    other = lib.optimizers.schedules.ExponentialDecay(1.0, 5, 0.5)
    template = fresh_keras(tmp_path / "fresh", other, package)
    report = ckptconv.convert(source, tmp_path / "ckpt", template=template, source_spec=spec)
    model, optimizer = keras_model(package, schedule_of(report))
    tf.train.Checkpoint(model=model, optimizer=optimizer).read(str(tmp_path / "ckpt")).assert_consumed()
    assert int(optimizer.iterations) == DONE
    close(keras_steps(model, optimizer, NEXT), torch_steps(*live, NEXT))
    assert int(optimizer.iterations) == DONE + NEXT
    assert any("learning_rate=learning_rate" in line for line in report.target_requires)


@pytest.mark.parametrize(
    ("name", "package"), both([name for name, case in FAMILIES.items() if case.keras is not None])
)
@pytest.mark.parametrize("at", [DONE, pytest.param(25, marks=pytest.mark.slow)])
def test_keras_to_torch(name: str, package: str, at: int, tmp_path: Path) -> None:
    case = FAMILIES[name]
    assert case.keras is not None
    assert case.template is not None
    schedule = case.keras(PACKAGES[package].optimizers.schedules, package)
    model, optimizer = keras_model(package, schedule)
    keras_steps(model, optimizer, at)
    source = saved(tmp_path / "ckpt", model, optimizer)
    spec = ckptconv.keras.describe(model, optimizer, remaining=NEXT)
    live = torch_template(tmp_path / "fresh.pt", case.template)
    report = ckptconv.convert(source, tmp_path / "run.pt", template=tmp_path / "fresh.pt", source_spec=spec)
    if value_of_family(tmp_path / "fresh.pt") == "lambda":
        live = torch_objects(scheduler_of(report))
    state = resumed(tmp_path / "run.pt", *live)
    count = NEXT if case.climbs is None else min(NEXT, case.climbs + 1 - at)
    close(torch_steps(*live, count), keras_steps(model, optimizer, count))
    assert [line for line in report.target_requires if "climbs" in line] == (
        [
            f"# scheduler: the same up to tick {case.climbs}; "
            "then torch's rate climbs again, the source's stays"
        ]
        if case.climbs
        else []
    )
    consistent(state, at)
    if case.torch is not None and not case.live:
        like_torchs_own(state, case, at)


def value_of_family(path: Path) -> str:
    return ckptconv.open(path).schedules[0].family


def consistent(state: dict[str, Any], at: int) -> None:
    """What torch keeps of a schedule in two places is the same in both."""
    group, scheduler = state["optimizer"]["param_groups"][0], state["scheduler"]
    for one in (scheduler, *scheduler.get("_schedulers", [])):
        assert one.get("base_lrs", [group["initial_lr"]]) == [group["initial_lr"]]
        assert one.get("_get_lr_called_within_step", False) is False
        assert one.get("_is_initial", False) is False
    assert scheduler["_last_lr"] == [group["lr"]]
    assert scheduler.get("last_epoch", at) == at
    if "_step_count" in scheduler and "T_cur" not in scheduler:
        assert scheduler["_step_count"] == at + 1


def like_torchs_own(state: dict[str, Any], case: Case, at: int) -> None:
    """Every key of the scheduler and of its group has what torch's own class has there."""
    assert case.torch is not None
    model, optimizer, scheduler = torch_objects(case.torch)
    torch_steps(model, optimizer, scheduler, at)
    same(scheduler.state_dict(), state["scheduler"], 1e-6, 1e-8)
    rates = ("lr", "initial_lr", "max_lr", "min_lr")
    ours, theirs = state["optimizer"]["param_groups"][0], optimizer.param_groups[0]
    assert {name for name in rates if name in ours} == {name for name in rates if name in theirs}
    same([theirs[n] for n in rates if n in theirs], [ours[n] for n in rates if n in ours], 1e-6)


def test_every_family_is_resumed() -> None:
    told = {case.family for case in FAMILIES.values()} | {"plateau"}
    assert told == set(schedules.families())
