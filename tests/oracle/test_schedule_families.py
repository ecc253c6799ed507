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
from tests.support.schedule_families import FAMILIES, Case, of_ones_own, warm_up
from tests.support.schedule_runs import (
    BASE,
    DONE,
    NEXT,
    PACKAGES,
    SCHEDULE,
    K,
    Made,
    S,
    close,
    code_of,
    fresh_keras,
    keras,
    keras_model,
    keras_rates,
    keras_steps,
    loaded,
    resumed,
    same,
    saved,
    schedule_of,
    scheduler_of,
    tf,
    torch,
    torch_objects,
    torch_run,
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


@pytest.mark.parametrize(
    "name",
    ["cosine", *(pytest.param(n, marks=pytest.mark.slow) for n in ("step", "sequential", "one-cycle"))],
)
def test_a_keras_file_holds_the_schedule(name: str, tmp_path: Path) -> None:
    """`load_model` goes on with the source's schedule, not the template's; the way back needs no spec."""
    case = FAMILIES[name]
    assert case.torch is not None
    assert case.template is not None
    live = torch_objects(case.torch)
    torch_steps(*live, DONE)
    source = written(tmp_path / "run.pt", *live)
    model, optimizer = keras_model("keras", K.CosineDecay(1.0, 2))
    model.compile(optimizer)
    model.save(tmp_path / "fresh.keras")
    report = ckptconv.convert(source, tmp_path / "out.keras", template=tmp_path / "fresh.keras")
    schedule_of(report)  # registers the classes of ckptconv.keras
    loaded_model = keras.saving.load_model(tmp_path / "out.keras")
    count = NEXT // 2
    close(keras_steps(loaded_model, loaded_model.optimizer, count), torch_steps(*live, count))
    loaded_model.save(tmp_path / "later.keras")
    again = torch_template(tmp_path / "fresh.pt", case.template)
    ckptconv.convert(tmp_path / "later.keras", tmp_path / "back.pt", template=tmp_path / "fresh.pt")
    state = resumed(tmp_path / "back.pt", *again)
    consistent(state, DONE + count)
    close(torch_steps(*again, count), torch_steps(*live, count))


def made_of(parts: Any) -> Made:
    return lambda optimizer: S.ChainedScheduler(parts(optimizer))


NOT_BY_KERAS: dict[tuple[str, str], tuple[Made, int]] = {
    ("one-cycle", "cycle_momentum=True, another optimizer or a part of a schedule"): (
        lambda o: S.SequentialLR(o, [S.ConstantLR(o), S.OneCycleLR(o, 0.4, total_steps=60)], [3]),
        DONE,
    ),
    ("cosine", "beyond its minimum"): (lambda o: S.CosineAnnealingLR(o, 60, eta_min=0.003), 61),
    ("lambda", "no table"): (lambda o: S.LambdaLR(o, lambda t: 0.95**t), DONE),
    ("cyclic", "no table"): (lambda o: S.CyclicLR(o, 0.01, 0.2, 7, cycle_momentum=False), DONE),
    ("swa", "no table"): (lambda o: torch.optim.swa_utils.SWALR(o, 0.01, 9), DONE),
    ("chained", "a cosine with a minimum, restarts"): (
        made_of(lambda o: [S.StepLR(o, 2), S.CosineAnnealingLR(o, 9, 0.01)]),
        3,
    ),
    ("chained", "restarts"): (
        made_of(lambda o: [S.ConstantLR(o), S.CosineAnnealingWarmRestarts(o, 4)]),
        3,
    ),
}
"""(family, case) -> scheduler and updates, which no schedule of Keras goes on with."""


@pytest.mark.parametrize("case", NOT_BY_KERAS, ids=" ".join)
def test_what_keras_cannot_follow(case: tuple[str, str], tmp_path: Path) -> None:
    """Refused by its code; where that is allowed, a plain learning rate is that of the next update."""
    make, updates = NOT_BY_KERAS[case]
    optimizer, _ = torch_run(tmp_path / "run.pt", make, updates)
    for name, rate in (("schedule", K.CosineDecay(1.0, 2)), ("plain", 0.5)):
        template = fresh_keras(tmp_path / name, rate)
        assert code_of(tmp_path / "run.pt", tmp_path / "no", template=template) == (
            "schedule-unsupported",
            SCHEDULE,
        )
    allow = ["schedule-unsupported"]
    report = ckptconv.convert(tmp_path / "run.pt", tmp_path / "ckpt", template=template, allow=allow)
    model, restored = keras_model("keras", 0.5)
    tf.train.Checkpoint(model=model, optimizer=restored).read(str(tmp_path / "ckpt")).assert_consumed()
    assert float(restored.learning_rate) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-6)
    (entry,) = [e for e in report.ledger if e.item == ("position", "scheduler")]
    assert (entry.fate, entry.allowed_by) == ("noted", "schedule-unsupported")


NOT_BY_TORCH: dict[tuple[str, str], tuple[Any, int, Made]] = {
    ("cosine", "beyond its minimum"): (
        K.CosineDecay(BASE, 10),
        12,
        lambda o: S.CosineAnnealingLR(o, 60),
    ),
    ("cosine-restarts", "m_mul, or a t_mul that is not whole"): (
        K.CosineDecayRestarts(BASE, 9, m_mul=0.5),
        4,
        lambda o: S.CosineAnnealingWarmRestarts(o, 9),
    ),
    ("cosine-restarts", "t_mul"): (
        K.CosineDecayRestarts(BASE, 9, t_mul=1.5),
        4,
        lambda o: S.CosineAnnealingWarmRestarts(o, 9),
    ),
    ("cyclic", schedules.ALWAYS): (
        K.CosineDecay(BASE, 60),
        4,
        lambda o: S.CyclicLR(o, 0.01, 0.2, 7, cycle_momentum=False),
    ),
    ("swa", schedules.ALWAYS): (K.CosineDecay(BASE, 60), 4, lambda o: torch.optim.swa_utils.SWALR(o, 0.01)),
    ("sequential", "a line from 0"): (
        K.CosineDecay(0.0, 10, warmup_target=BASE, warmup_steps=5),
        0,
        warm_up,
    ),
    ("sequential", "other parts"): (
        ckptconv.keras.sequential([K.ExponentialDecay(BASE, 1, 0.9), K.CosineDecay(BASE, 9)], [20]),
        4,
        warm_up,
    ),
    ("sequential", "parts of two base rates"): (
        ckptconv.keras.sequential([K.CosineDecay(BASE, 9), K.CosineDecay(BASE / 2, 9)], [20]),
        4,
        lambda o: S.SequentialLR(o, [S.CosineAnnealingLR(o, 9), S.CosineAnnealingLR(o, 9)], [20]),
    ),
    ("polynomial", "an end"): (
        K.PolynomialDecay(BASE, 9, 0.01, power=2.0),
        4,
        lambda o: S.PolynomialLR(o, 9),
    ),
    ("piecewise", "no series"): (
        K.PiecewiseConstantDecay([3, 11], [BASE, 0.07, 0.06]),
        4,
        lambda o: S.MultiStepLR(o, [3]),
    ),
    ("one-cycle", "momentum"): (
        ckptconv.keras.one_cycle(60, [(17.0, 0.016, 0.4), (59.0, 0.4, 1.6e-6)]),
        4,
        lambda o: S.OneCycleLR(o, 0.4, total_steps=60),
    ),
    ("lambda", "of one's own"): (of_ones_own(K, "keras"), 4, lambda o: S.LambdaLR(o, lambda t: 0.9)),
    ("inverse-time", "another class"): (K.InverseTimeDecay(BASE, 9, 0.5), 4, lambda o: S.StepLR(o, 9)),
}
"""(family, case) -> schedule, updates, and the torch class that cannot go on with it."""


@pytest.mark.parametrize("case", NOT_BY_TORCH, ids=" ".join)
def test_what_torch_cannot_follow(case: tuple[str, str], tmp_path: Path) -> None:
    """Refused by its code; where that is allowed the optimizer's rate is that of the next update."""
    schedule, at, make = NOT_BY_TORCH[case]
    model, optimizer = keras_model("keras", schedule)
    optimizer.iterations.assign(at)
    source, spec = saved(tmp_path / "ckpt", model, optimizer), ckptconv.keras.describe(model, optimizer)
    torch_template(tmp_path / "fresh.pt", make)
    arguments: dict[str, Any] = {"template": tmp_path / "fresh.pt", "source_spec": spec}
    loc = ("schedules", "optimizer.learning_rate")
    assert code_of(source, tmp_path / "no.pt", **arguments) == ("schedule-unsupported", loc)
    if case[1] in ("parts of two base rates", "of one's own"):
        return  # its rate is not known either
    report = ckptconv.convert(source, tmp_path / "run.pt", **arguments, allow=["schedule-unsupported"])
    group = loaded(tmp_path / "run.pt")["optimizer"]["param_groups"][0]
    assert group["lr"] == pytest.approx(keras_rates(schedule, at, 1)[0], rel=1e-6)
    (entry,) = [e for e in report.ledger if e.item == ("position", "optimizer.learning_rate")]
    assert (entry.fate, entry.allowed_by) == ("noted", "schedule-unsupported")


ELSEWHERE = {("plateau", case) for case in (schedules.ALWAYS, "neither of these")}
"""Of `test_schedule_plateau`."""


def test_every_way_of_the_table_is_gone() -> None:
    """What the table calls exact is resumed by a case of the family, what it refuses is refused above."""
    for name in schedules.families():
        family = schedules.family(name)
        assert family is not None
        own = [case for case in FAMILIES.values() if case.family == name]
        for ways, there, refused in (
            (family.to_keras, any(case.torch for case in own), NOT_BY_KERAS),
            (family.to_torch, any(case.keras for case in own), NOT_BY_TORCH),
        ):
            for way in ways:
                tested = there if way.verdict == "exact" else (name, way.case) in refused
                assert tested or (name, way.case) in ELSEWHERE, (name, way)
