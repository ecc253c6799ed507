"""What torch keeps of a schedule, carried and edited; resume parity under a cosine; refusals by code."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import ckptconv
from ckptconv.document import Known, value_of
from tests.support.schedule_families import TORCH, warm_up
from tests.support.schedule_runs import (
    BASE,
    DONE,
    NEXT,
    SCHEDULE,
    K,
    S,
    close,
    code_of,
    fresh_keras,
    keras_model,
    keras_rates,
    loaded,
    resumed,
    same,
    saved,
    schedule_of,
    tf,
    torch,
    torch_rates,
    torch_run,
    torch_template,
)

ALL = {
    **TORCH,
    "one-cycle-momentum": lambda o: S.OneCycleLR(o, 0.4, total_steps=60),
    "cyclic": lambda o: S.CyclicLR(o, 0.01, 0.2, 7, cycle_momentum=False),
    "lambda": lambda o: S.LambdaLR(o, lambda t: 0.95**t),
    "swa": lambda o: torch.optim.swa_utils.SWALR(o, 0.01, 9),
}


@pytest.mark.parametrize("family", ALL)
def test_through_neutral_a_scheduler_comes_back_as_it_was(family: str, tmp_path: Path) -> None:
    torch_run(tmp_path / "run.pt", ALL[family])
    ckptconv.convert(tmp_path / "run.pt", tmp_path / "neutral", to="neutral")
    ckptconv.convert(tmp_path / "neutral", tmp_path / "back.pt", to="pytorch:plain")
    same(loaded(tmp_path / "run.pt")["scheduler"], loaded(tmp_path / "back.pt")["scheduler"])


@pytest.mark.parametrize("family", [name for name in ALL if name not in ("cyclic", "swa")])
def test_a_template_of_the_same_class_goes_on(family: str, tmp_path: Path) -> None:
    optimizer, scheduler = torch_run(tmp_path / "run.pt", ALL[family])
    torch_run(tmp_path / "other.pt", ALL[family], updates=2)
    ckptconv.convert(tmp_path / "run.pt", tmp_path / "back.pt", template=tmp_path / "other.pt")
    model, fresh, again = torch_template(tmp_path / "fresh.pt", ALL[family])
    state = resumed(tmp_path / "back.pt", model, fresh, again)
    same(scheduler.state_dict() | {"lr_lambdas": 0}, state["scheduler"] | {"lr_lambdas": 0}, 1e-12)
    assert torch_rates(fresh, again) == torch_rates(optimizer, scheduler)


EDITED = 23


@pytest.mark.parametrize("family", [name for name in TORCH if "polynomial" not in name])
def test_an_edited_step_moves_all_that_torch_keeps(family: str, tmp_path: Path) -> None:
    torch_run(tmp_path / "run.pt", TORCH[family])
    optimizer, scheduler = torch_run(tmp_path / "later.pt", TORCH[family], updates=EDITED)
    checkpoint = ckptconv.open(tmp_path / "run.pt")
    edited = replace(checkpoint, progress=replace(checkpoint.progress, step=Known(value=EDITED)))
    ckptconv.save(edited, tmp_path / "edited.pt", to="pytorch:plain")
    written = loaded(tmp_path / "edited.pt")
    same(scheduler.state_dict(), written["scheduler"], 1e-9)
    due = optimizer.param_groups[0]["lr"]
    assert written["optimizer"]["param_groups"][0]["lr"] == pytest.approx(due, rel=1e-9)


def test_a_rate_that_is_not_the_schedules_does_not_follow_an_edited_step(tmp_path: Path) -> None:
    torch_run(tmp_path / "run.pt", warm_up)
    run = loaded(tmp_path / "run.pt")
    run["optimizer"]["param_groups"][0]["lr"] *= 1.5
    torch.save(run, tmp_path / "run.pt")
    checkpoint = ckptconv.open(tmp_path / "run.pt")
    edited = replace(checkpoint, progress=replace(checkpoint.progress, step=Known(value=EDITED)))
    loc = ("optimizers", "optimizer", "groups", 0, "hyperparameters", "learning_rate")
    with pytest.raises(ckptconv.CkptError) as caught:
        ckptconv.save(edited, tmp_path / "edited.pt", to="pytorch:plain")
    assert [(p.code, p.loc) for p in caught.value.problems] == [("residue-stale", loc)]


def test_a_damaged_sequence_does_not_follow_an_edit(tmp_path: Path) -> None:
    torch_run(tmp_path / "run.pt", warm_up)
    state = loaded(tmp_path / "run.pt")
    state["scheduler"]["_milestones"] = [2.5]
    torch.save(state, tmp_path / "run.pt")
    checkpoint = ckptconv.open(tmp_path / "run.pt")
    ckptconv.save(checkpoint, tmp_path / "same.pt", to="pytorch:plain")
    same(state["scheduler"], loaded(tmp_path / "same.pt")["scheduler"])
    moved = replace(checkpoint.schedules[0], position=Known(value=9, status="supplied", source="edit"))
    with pytest.raises(ckptconv.CkptError) as caught:
        ckptconv.save(replace(checkpoint, schedules=(moved,)), tmp_path / "edited.pt", to="pytorch:plain")
    assert [(p.code, p.loc) for p in caught.value.problems] == [("residue-stale", (*SCHEDULE, "position"))]


@pytest.mark.parametrize(
    ("name", "family"),
    [
        ("cosine", "cosine"),
        ("warm-up", "sequential"),
        ("multi-step", "multi-step"),
        ("linear", "linear"),
        ("one-cycle", "one-cycle"),
        ("sequential", "sequential"),
        ("chained", "chained"),
    ],
)
def test_there_and_back_by_the_note(name: str, family: str, tmp_path: Path) -> None:
    """The bundle counts, its note tells the family: no source spec is needed on the way back."""
    optimizer, scheduler = torch_run(tmp_path / "run.pt", TORCH[name])
    template = saved(tmp_path / "fresh", *keras_model("keras", K.ExponentialDecay(1.0, 5, 0.5)))
    ckptconv.convert(tmp_path / "run.pt", tmp_path / "ckpt", template=template)
    (schedule,) = ckptconv.open(tmp_path / "ckpt").schedules
    assert (schedule.family, value_of(schedule.position), schedule.unit) == (family, DONE, "update")
    model, fresh, again = torch_template(tmp_path / "fresh.pt", TORCH[name])
    ckptconv.convert(tmp_path / "ckpt", tmp_path / "back.pt", template=tmp_path / "fresh.pt")
    state = resumed(tmp_path / "back.pt", model, fresh, again)
    same(scheduler.state_dict(), state["scheduler"], 1e-12)
    close(torch_rates(fresh, again), torch_rates(optimizer, scheduler))


def test_the_templates_form_decides(tmp_path: Path) -> None:
    optimizer, _ = torch_run(tmp_path / "run.pt", TORCH["cosine"])
    template = fresh_keras(tmp_path / "fresh", 0.5)
    arguments = (tmp_path / "run.pt", tmp_path / "ckpt")
    assert code_of(*arguments, template=template) == ("schedule-unsupported", SCHEDULE)
    report = ckptconv.convert(*arguments, template=template, allow=["schedule-unsupported"])
    model, restored = keras_model("keras", 0.5)
    tf.train.Checkpoint(model=model, optimizer=restored).read(str(tmp_path / "ckpt")).assert_consumed()
    assert float(restored.learning_rate) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-6)
    assert [e.fate for e in report.ledger if e.item == ("position", "scheduler")] == ["noted"]
    plain = torch_plain(tmp_path / "plain.pt")
    assert code_of(
        plain, tmp_path / "other", template=fresh_keras(tmp_path / "k", K.CosineDecay(1.0, 2))
    ) == (
        "schedule-unsupported",
        ("schedules", "optimizer.learning_rate"),
    )


def torch_plain(path: Path) -> Path:
    """A run without a scheduler."""
    torch_run(path, TORCH["step"])
    state = loaded(path)
    del state["scheduler"]
    torch.save(state, path)
    return path


@pytest.mark.parametrize("name", ["lambda", "cyclic"])
def test_a_live_function_goes_on_by_its_table(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.Adam(model.parameters(), lr=BASE, eps=1e-7)
    scheduler = ALL[name](optimizer)
    for _ in range(DONE):
        optimizer.zero_grad()
        model(torch.randn(4, 3)).square().sum().backward()
        optimizer.step()
        scheduler.step()
    before = copy.deepcopy((scheduler.state_dict(), optimizer.param_groups[0]["lr"]))
    captured = ckptconv.pytorch.capture(model, optimizer, scheduler, remaining=NEXT)
    assert before == (scheduler.state_dict(), optimizer.param_groups[0]["lr"])
    template = fresh_keras(tmp_path / "fresh", K.CosineDecay(1.0, 2))
    report = ckptconv.convert(captured, tmp_path / "ckpt", template=template)
    close(keras_rates(schedule_of(report), DONE), torch_rates(optimizer, scheduler))
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    torch.save({**state, "scheduler": before[0]}, tmp_path / "run.pt")
    spec = ckptconv.pytorch.describe(model, optimizer, scheduler, remaining=NEXT)
    with pytest.raises(ckptconv.CkptError) as caught:
        ckptconv.pytorch.describe(model, optimizer, scheduler, remaining=0)
    assert [(p.code, p.loc) for p in caught.value.problems] == [("usage", ("remaining",))]
    assert value_of(spec.schedules[0].parameters["start"]) == DONE + NEXT


def test_a_legacy_decay_is_an_inverse_time_schedule(tmp_path: Path) -> None:
    tf_keras = pytest.importorskip("tf_keras")
    model = tf_keras.Sequential([tf_keras.layers.Input((3,)), tf_keras.layers.Dense(2)])
    legacy = tf_keras.optimizers.legacy.Adam(BASE, decay=0.05, epsilon=1e-7)
    legacy._create_all_weights(model.trainable_variables)
    legacy.iterations.assign(DONE)
    source = saved(tmp_path / "legacy", model, legacy)
    template = fresh_keras(tmp_path / "fresh", K.CosineDecay(1.0, 2))
    report = ckptconv.convert(source, tmp_path / "ckpt", template=template)
    theirs = [BASE / (1 + 0.05 * (DONE + i)) for i in range(NEXT)]
    close(keras_rates(schedule_of(report), DONE), theirs)
    torch_template(tmp_path / "fresh.pt", ALL["lambda"])
    report = ckptconv.convert(source, tmp_path / "run.pt", template=tmp_path / "fresh.pt")
    (line,) = [line for line in report.target_requires if "LambdaLR" in line]
    live = torch_template(tmp_path / "again.pt", lambda o: eval(line, {"torch": torch, "optimizer": o}))
    resumed(tmp_path / "run.pt", *live)
    close(torch_rates(*live[1:]), theirs)


def test_a_template_supplies_what_keras_does_not_tell(tmp_path: Path) -> None:
    """Without a source spec the torch template's own schedule is taken, at the counter's position."""
    schedule = K.ExponentialDecay(0.5, 6, 0.5, staircase=True)
    model, optimizer = keras_model("keras", schedule)
    optimizer.iterations.assign(DONE)
    source = saved(tmp_path / "ckpt", model, optimizer)
    live = torch_template(tmp_path / "fresh.pt", TORCH["step"])
    report = ckptconv.convert(source, tmp_path / "run.pt", template=tmp_path / "fresh.pt")
    resumed(tmp_path / "run.pt", *live)
    close(torch_rates(*live[1:]), keras_rates(schedule, DONE))
    (entry,) = [e for e in report.ledger if e.item == ("position", "optimizer.learning_rate")]
    assert "supplied" in entry.detail
    torch_template(tmp_path / "lambda.pt", ALL["lambda"])  # whose function is in no file
    assert code_of(source, tmp_path / "no.pt", template=tmp_path / "lambda.pt") == (
        "schedule-unsupported",
        ("schedules", "optimizer.learning_rate"),
    )


def test_a_plain_rate_and_a_templates_schedule(tmp_path: Path) -> None:
    model, optimizer = keras_model("keras", 0.25)
    optimizer.iterations.assign(DONE)
    source = saved(tmp_path / "ckpt", model, optimizer)
    live = torch_template(tmp_path / "fresh.pt", TORCH["step"])  # 0.5, halved after 6
    arguments: dict[str, Any] = {"template": tmp_path / "fresh.pt"}
    assert code_of(source, tmp_path / "run.pt", **arguments) == ("schedule-unsupported", SCHEDULE)
    arguments["set_"] = {"schedule_unit": "update"}
    ckptconv.convert(source, tmp_path / "run.pt", **arguments)
    state = resumed(tmp_path / "run.pt", *live)
    assert (state["scheduler"]["last_epoch"], state["scheduler"]["_last_lr"]) == (DONE, [0.25])
    optimizer.learning_rate.assign(0.2)
    source = saved(tmp_path / "moved", model, optimizer)
    assert code_of(source, tmp_path / "no.pt", **arguments) == ("schedule-unsupported", SCHEDULE)


def test_live_objects_take_schedules_both_ways(tmp_path: Path) -> None:
    """What the live Keras optimizer's own schedule says is not asked of the caller again."""
    optimizer, scheduler = torch_run(tmp_path / "run.pt", TORCH["cosine"])
    fitting = keras_model("keras", K.CosineDecay(BASE, 60, alpha=0.03))
    other = keras_model("keras", K.CosineDecay(BASE, 50, alpha=0.03))
    told = [
        [
            line
            for line in ckptconv.keras.restore(tmp_path / "run.pt", *live).target_requires
            if "= keras" in line
        ]
        for live in (fitting, other)
    ]
    assert (len(told[0]), len(told[1])) == (0, 1)
    assert int(fitting[1].iterations) == DONE
    model, fresh, again = torch_template(tmp_path / "fresh.pt", lambda o: S.CosineAnnealingLR(o, 3))
    live = ckptconv.keras.capture(*fitting)
    ckptconv.pytorch.restore(live, model, fresh, again)
    assert again.last_epoch == DONE
    close(torch_rates(fresh, again), torch_rates(optimizer, scheduler))


def test_groups_of_one_rate_follow_one_schedule(tmp_path: Path) -> None:
    schedule = K.ExponentialDecay(BASE, 6, 0.5, staircase=True)
    model, optimizer = keras_model("keras", schedule)
    optimizer.iterations.assign(DONE)
    source, spec = saved(tmp_path / "ckpt", model, optimizer), ckptconv.keras.describe(model, optimizer)
    twin = torch.nn.Linear(3, 2)
    groups = [{"params": [twin.weight]}, {"params": [twin.bias], "lr": 0.3}]
    fresh = torch.optim.Adam(groups, lr=0.5, eps=1e-7)
    scheduler = S.StepLR(fresh, 2)
    ckptconv.pytorch.restore(source, twin, fresh, scheduler, source_spec=spec)
    assert [group["lr"] for group in fresh.param_groups] == scheduler.get_last_lr() == [BASE / 2] * 2
    assert [group["initial_lr"] for group in fresh.param_groups] == scheduler.base_lrs == [BASE] * 2


def test_a_legacy_optimizer_under_a_schedule(tmp_path: Path) -> None:
    tf_keras = pytest.importorskip("tf_keras")
    schedules = tf_keras.optimizers.schedules
    optimizer, scheduler = torch_run(tmp_path / "run.pt", TORCH["cosine"])
    model = tf_keras.Sequential([tf_keras.layers.Input((3,)), tf_keras.layers.Dense(2)])
    legacy = tf_keras.optimizers.legacy.Adam(schedules.ExponentialDecay(1.0, 5, 0.5), epsilon=1e-7)
    legacy._create_all_weights(model.trainable_variables)
    template = saved(tmp_path / "fresh", model, legacy)
    report = ckptconv.convert(tmp_path / "run.pt", tmp_path / "ckpt", template=template)
    schedule = schedule_of(report)
    close(keras_rates(schedule, DONE), torch_rates(optimizer, scheduler))
    legacy = tf_keras.optimizers.legacy.Adam(schedule, epsilon=1e-7)
    legacy._create_all_weights(model.trainable_variables)
    tf.train.Checkpoint(model=model, optimizer=legacy).read(str(tmp_path / "ckpt")).assert_consumed()
    assert int(legacy.iterations) == DONE
