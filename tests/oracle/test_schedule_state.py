"""What torch keeps of a schedule, carried and edited; resume parity under a cosine; refusals by code."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import ckptconv
from ckptconv.document import Known, value_of

torch = pytest.importorskip("torch")
tf = pytest.importorskip("tensorflow")
keras = pytest.importorskip("keras")
pytest.importorskip("tf_keras")

from tests.oracle.test_schedule_families import (  # noqa: E402
    BASE,
    DONE,
    NEXT,
    TORCH,
    K,
    S,
    close,
    code_of,
    fresh_keras,
    keras_model,
    keras_rates,
    resumed,
    same,
    saved,
    schedule_of,
    torch_rates,
    torch_run,
    torch_template,
    warm_up,
)

SCHEDULE = ("schedules", "scheduler")
ALL = {
    **TORCH,
    "one-cycle-momentum": lambda o: S.OneCycleLR(o, 0.4, total_steps=60),
    "cyclic": lambda o: S.CyclicLR(o, 0.01, 0.2, 7, cycle_momentum=False),
    "lambda": lambda o: S.LambdaLR(o, lambda t: 0.95**t),
    "swa": lambda o: torch.optim.swa_utils.SWALR(o, 0.01, 9),
}


def loaded(path: Path) -> dict[str, Any]:
    state: dict[str, Any] = torch.load(path, weights_only=True)
    return state


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
    (own,) = checkpoint.optimizers
    due = Known(value=optimizer.param_groups[0]["lr"], status="supplied", source="edit")
    group = replace(own.groups[0], hyperparameters={**own.groups[0].hyperparameters, "learning_rate": due})
    edited = replace(
        checkpoint,
        progress=replace(checkpoint.progress, step=Known(value=EDITED)),
        optimizers=(replace(own, groups=(group,)),),
    )
    ckptconv.save(edited, tmp_path / "edited.pt", to="pytorch:plain")
    same(scheduler.state_dict(), loaded(tmp_path / "edited.pt")["scheduler"], 1e-9)


def test_a_rate_that_an_edited_step_leaves_behind_is_refused(tmp_path: Path) -> None:
    torch_run(tmp_path / "run.pt", warm_up)
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
    [("cosine", "cosine"), ("warm-up", "sequential"), ("multi-step", "multi-step"), ("linear", "linear")],
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


BATCHES = [torch.linspace(-1, 1, 12).reshape(4, 3) * (1 + i % 5) / 3 for i in range(40)]


def torch_steps(model: Any, optimizer: Any, scheduler: Any, first: int, count: int) -> None:
    for i in range(first, first + count):
        optimizer.zero_grad()
        model(BATCHES[i]).square().sum().backward()
        optimizer.step()
        scheduler.step()


def keras_steps(model: Any, optimizer: Any, first: int, count: int) -> None:
    for i in range(first, first + count):
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(tf.square(model(tf.constant(BATCHES[i].numpy()))))
        optimizer.apply(tape.gradient(loss, model.trainable_variables))


def distance(model: Any, other: Any, moved: float) -> float:
    kernel = torch.tensor(other.layers[0].kernel.numpy().T)
    return float((model.weight.detach() - kernel).abs().max()) / moved


def test_adam_under_a_cosine_goes_on_there_and_back(tmp_path: Path) -> None:
    make = lambda o: S.CosineAnnealingLR(o, 40, eta_min=0.002)  # noqa: E731
    model, optimizer, scheduler = torch_template(tmp_path / "start.pt", make)
    begin = model.weight.detach().clone()
    torch_steps(model, optimizer, scheduler, 0, 10)
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    torch.save({**state, "scheduler": scheduler.state_dict()}, tmp_path / "run.pt")
    template = saved(tmp_path / "fresh", *keras_model("keras", K.CosineDecay(1.0, 2)))
    report = ckptconv.convert(tmp_path / "run.pt", tmp_path / "ckpt", template=template)
    twin, twin_optimizer = keras_model("keras", schedule_of(report))
    tf.train.Checkpoint(model=twin, optimizer=twin_optimizer).read(str(tmp_path / "ckpt")).assert_consumed()
    cold, cold_optimizer = keras_model("keras", schedule_of(report))
    cold.set_weights(twin.get_weights())
    torch_steps(model, optimizer, scheduler, 10, 12)
    keras_steps(twin, twin_optimizer, 10, 12)
    keras_steps(cold, cold_optimizer, 10, 12)
    moved = float((model.weight.detach() - begin).abs().max())
    assert distance(model, twin, moved) < 5e-5
    assert distance(model, cold, moved) > 1e-2
    source = saved(tmp_path / "later", twin, twin_optimizer)
    spec = ckptconv.keras.describe(twin, twin_optimizer)
    again = torch_template(tmp_path / "fresh.pt", lambda o: S.CosineAnnealingLR(o, 3))
    ckptconv.convert(source, tmp_path / "back.pt", template=tmp_path / "fresh.pt", source_spec=spec)
    resumed(tmp_path / "back.pt", *again)
    torch_steps(model, optimizer, scheduler, 22, 12)
    torch_steps(*again, 22, 12)
    assert float((again[0].weight - model.weight).abs().max()) / moved < 5e-5
    assert again[2].last_epoch == scheduler.last_epoch == 34


FAR = 61


@pytest.mark.parametrize(
    ("make", "updates"),
    [
        (ALL["lambda"], DONE),
        (ALL["one-cycle-momentum"], DONE),
        (ALL["cyclic"], DONE),
        (TORCH["cosine"], FAR),
        (lambda o: S.ChainedScheduler([S.StepLR(o, 2), S.CosineAnnealingLR(o, 9, 0.01)]), 3),
    ],
)
def test_what_keras_cannot_follow_is_refused(make: Any, updates: int, tmp_path: Path) -> None:
    torch_run(tmp_path / "run.pt", make, updates=updates)
    template = fresh_keras(tmp_path / "fresh", K.CosineDecay(1.0, 2))
    assert code_of(tmp_path / "run.pt", tmp_path / "ckpt", template=template) == (
        "schedule-unsupported",
        SCHEDULE,
    )


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


def with_position(path: Path, position: int, **extra: object) -> Path:
    state = loaded(path)
    state["scheduler"] |= {"last_epoch": position, "_step_count": position + 1}
    torch.save({**state, **extra}, path)
    return path


def test_what_a_position_counts(tmp_path: Path) -> None:
    torch_run(tmp_path / "run.pt", TORCH["exponential"])
    template = fresh_keras(tmp_path / "fresh", K.CosineDecay(1.0, 2))
    with_position(tmp_path / "run.pt", 2, epoch=1)
    assert ckptconv.open(tmp_path / "run.pt").schedules[0].unit == "epoch"
    arguments = (tmp_path / "run.pt", tmp_path / "ckpt")
    assert code_of(*arguments, template=template) == ("progress-unknown", (*SCHEDULE, "steps_per_epoch"))
    with_position(tmp_path / "run.pt", 5, epoch=1)
    assert ckptconv.open(tmp_path / "run.pt").schedules[0].unit == "unknown"
    with pytest.raises(ckptconv.CkptError) as caught:
        ckptconv.convert(*arguments, template=template)
    assert ("progress-unknown", (*SCHEDULE, "unit")) in [(p.code, p.loc) for p in caught.value.problems]
    set_ = {"schedule_unit": "update"}
    assert code_of(*arguments, template=template, set_=set_) == ("schedule-unsupported", SCHEDULE)
    assert code_of(*arguments, template=template, set_={"schedule_unit": "weeks"}) == (
        "usage",
        ("--set", "schedule_unit"),
    )


def test_a_schedule_counts_for_an_optimizer_that_does_not(tmp_path: Path) -> None:
    """SGD stores no step; a schedule that counts updates has it."""
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=BASE)
    scheduler = S.StepLR(optimizer, 6, 0.5)
    for _ in range(DONE):
        optimizer.step()
        scheduler.step()
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    torch.save({**state, "scheduler": scheduler.state_dict()}, tmp_path / "run.pt")
    twin = keras.Sequential([keras.layers.Input((3,)), keras.layers.Dense(2)])
    fresh = keras.optimizers.SGD(K.CosineDecay(1.0, 2))
    fresh.build(twin.trainable_variables)
    template = saved(tmp_path / "fresh", twin, fresh)
    with pytest.raises(ckptconv.CkptError) as caught:
        ckptconv.convert(tmp_path / "run.pt", tmp_path / "ckpt", template=template)
    assert "progress-unknown" in {p.code for p in caught.value.problems}
    set_ = {"schedule_unit": "update"}
    report = ckptconv.convert(tmp_path / "run.pt", tmp_path / "ckpt", template=template, set_=set_)
    assert report.progress["step"] == DONE
    close(keras_rates(schedule_of(report), DONE), torch_rates(optimizer, scheduler))


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


def test_a_source_spec_tells_the_table_of_a_file(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.Adam(model.parameters(), lr=BASE, eps=1e-7)
    scheduler = ALL["lambda"](optimizer)
    for _ in range(DONE):
        model(torch.randn(4, 3)).square().sum().backward()
        optimizer.step()
        scheduler.step()
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    torch.save({**state, "scheduler": scheduler.state_dict()}, tmp_path / "run.pt")
    template = fresh_keras(tmp_path / "fresh", K.CosineDecay(1.0, 2))
    arguments = (tmp_path / "run.pt", tmp_path / "ckpt")
    assert code_of(*arguments, template=template) == ("schedule-unsupported", SCHEDULE)
    spec = ckptconv.pytorch.describe(model, optimizer, scheduler, remaining=NEXT)
    report = ckptconv.convert(*arguments, template=template, source_spec=spec)
    close(keras_rates(schedule_of(report), DONE), torch_rates(optimizer, scheduler))


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


@pytest.mark.parametrize(
    "schedule",
    [
        K.InverseTimeDecay(BASE, 10, 0.7),
        K.InverseTimeDecay(BASE, 10, 0.7, staircase=True),
        K.PiecewiseConstantDecay([3, 11, 30], [BASE, 0.07, 0.06, 0.01]),
        K.PolynomialDecay(BASE, 30, 0.02, power=2.0),
    ],
)
def test_a_lambda_template_takes_what_has_no_class(schedule: Any, tmp_path: Path) -> None:
    model, optimizer = keras_model("keras", schedule)
    optimizer.iterations.assign(DONE)
    source, spec = saved(tmp_path / "ckpt", model, optimizer), ckptconv.keras.describe(model, optimizer)
    torch_template(tmp_path / "fresh.pt", ALL["lambda"])
    report = ckptconv.convert(source, tmp_path / "run.pt", template=tmp_path / "fresh.pt", source_spec=spec)
    (line,) = [line for line in report.target_requires if "LambdaLR" in line]
    space = {"torch": torch}

    def made(o: Any) -> Any:
        exec("import bisect", space)
        return eval(line, {**space, "optimizer": o})

    live = torch_template(tmp_path / "again.pt", made)
    resumed(tmp_path / "run.pt", *live)
    close(torch_rates(*live[1:]), keras_rates(schedule, DONE))
    torch_template(tmp_path / "step.pt", TORCH["step"])
    assert code_of(source, tmp_path / "no.pt", template=tmp_path / "step.pt", source_spec=spec) == (
        "schedule-unsupported",
        ("schedules", "optimizer.learning_rate"),
    )


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


@pytest.mark.parametrize(
    ("schedule", "at", "make"),
    [
        (K.CosineDecay(BASE, 10), 12, TORCH["cosine"]),
        (K.CosineDecay(0.0, 10, warmup_target=BASE, warmup_steps=5), 0, warm_up),
        (K.CosineDecayRestarts(BASE, 9, m_mul=0.5), 4, TORCH["cosine-restarts"]),
        (K.PolynomialDecay(BASE, 9, 0.01, power=2.0), 4, TORCH["polynomial"]),
    ],
)
def test_what_torch_cannot_follow_is_refused(schedule: Any, at: int, make: Any, tmp_path: Path) -> None:
    model, optimizer = keras_model("keras", schedule)
    optimizer.iterations.assign(at)
    source, spec = saved(tmp_path / "ckpt", model, optimizer), ckptconv.keras.describe(model, optimizer)
    torch_template(tmp_path / "fresh.pt", make)
    assert code_of(source, tmp_path / "no.pt", template=tmp_path / "fresh.pt", source_spec=spec) == (
        "schedule-unsupported",
        ("schedules", "optimizer.learning_rate"),
    )


@pytest.mark.parametrize("family", ["step", "cosine", "warm-up", "one-cycle"])
def test_a_schedule_of_epochs_goes_on_as_a_callback(family: str, tmp_path: Path) -> None:
    """21 updates, 3 in an epoch: the variable has the next epoch's rate, the callback all later ones."""
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.Adam(model.parameters(), lr=BASE, eps=1e-7)
    scheduler = TORCH[family](optimizer)
    for update in range(3 * DONE):
        optimizer.zero_grad()
        model(torch.randn(4, 3)).square().sum().backward()
        optimizer.step()
        if update % 3 == 2:
            scheduler.step()
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "epoch": DONE - 1}
    torch.save({**state, "scheduler": scheduler.state_dict()}, tmp_path / "run.pt")
    template = fresh_keras(tmp_path / "fresh", 0.5)
    report = ckptconv.convert(tmp_path / "run.pt", tmp_path / "ckpt", template=template)
    twin, restored = keras_model("keras", 0.5)
    tf.train.Checkpoint(model=twin, optimizer=restored).read(str(tmp_path / "ckpt")).assert_consumed()
    theirs = torch_rates(optimizer, scheduler)
    assert float(restored.learning_rate) == pytest.approx(theirs[0], rel=1e-6)
    twin.compile(restored)
    space: dict[str, Any] = {"keras": keras, "ckptconv": ckptconv}
    exec("\n".join(line for line in report.target_requires if " = " in line or "import" in line), space)
    callback = space["callback"]
    callback.set_model(twin)
    ours = []
    for epoch in range(DONE, DONE + NEXT):
        callback.on_epoch_begin(epoch)
        ours.append(float(restored.learning_rate))
    close(ours, theirs)


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
