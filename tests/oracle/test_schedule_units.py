"""What a schedule's position counts: updates, epochs by the counter of updates, epochs by a callback."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import ckptconv
from tests.support.schedule_families import TORCH
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
    keras,
    keras_model,
    keras_rates,
    keras_steps,
    loaded,
    resumed,
    saved,
    schedule_of,
    tf,
    torch,
    torch_objects,
    torch_rates,
    torch_run,
    torch_template,
    written,
)

EACH = 3
"""Updates in an epoch of the runs below."""


def epochs(model: Any, optimizer: Any, scheduler: Any, first: int, count: int) -> list[float]:
    """`count` updates from the `first` on, the scheduler stepped at the end of each epoch; their rates."""
    rates = []
    for update in range(first, first + count):
        optimizer.zero_grad()
        model(torch.randn(4, 3)).square().sum().backward()
        rates.append(float(optimizer.param_groups[0]["lr"]))
        optimizer.step()
        if update % EACH == EACH - 1:
            scheduler.step()
    return rates


BY_EPOCH = ("step", "multi-step-twice", "constant", "cosine", "sequential", "chained", "one-cycle")


@pytest.mark.parametrize(
    ("family", "ahead"),
    [
        ("step", 0),
        ("cosine", 1),
        *(pytest.param(name, ahead, marks=pytest.mark.slow) for name in BY_EPOCH for ahead in (0, 2)),
    ],
)
def test_epochs_follow_the_counter_of_updates(family: str, ahead: int, tmp_path: Path) -> None:
    """`ahead`: updates of the epoch that the run stands in."""
    live = torch_objects(TORCH[family])
    done = EACH * DONE + ahead
    epochs(*live, 0, done)
    source = written(tmp_path / "run.pt", *live, epoch=DONE - 1)
    arguments: dict[str, Any] = {"template": fresh_keras(tmp_path / "fresh", K.CosineDecay(1.0, 2))}
    assert code_of(source, tmp_path / "ckpt", **arguments) == (
        "progress-unknown",
        (*SCHEDULE, "steps_per_epoch"),
    )
    wrong = {"steps_per_epoch": str(EACH + 1)}
    assert code_of(source, tmp_path / "ckpt", **arguments, set_=wrong) == ("schedule-unsupported", SCHEDULE)
    report = ckptconv.convert(
        source, tmp_path / "ckpt", **arguments, set_={"steps_per_epoch": str(EACH), "schedule_unit": "epoch"}
    )
    model, optimizer = keras_model("keras", schedule_of(report))
    tf.train.Checkpoint(model=model, optimizer=optimizer).read(str(tmp_path / "ckpt")).assert_consumed()
    close(keras_steps(model, optimizer, NEXT), epochs(*live, done, NEXT))
    source = saved(tmp_path / "later", model, optimizer)
    spec = ckptconv.keras.describe(model, optimizer)
    again = torch_template(tmp_path / "fresh.pt", TORCH[family])
    ckptconv.convert(tmp_path / "ckpt", tmp_path / "noted.pt", template=tmp_path / "fresh.pt")
    noted = loaded(tmp_path / "noted.pt")
    assert noted["scheduler"].get("last_epoch", DONE) == DONE
    assert noted["scheduler"]["_last_lr"] == [noted["optimizer"]["param_groups"][0]["lr"]]
    if family in ("cosine", "sequential", "one-cycle"):
        ckptconv.convert(source, tmp_path / "back.pt", template=tmp_path / "fresh.pt", source_spec=spec)
        state = resumed(tmp_path / "back.pt", *again)
        assert state["scheduler"]["last_epoch"] == live[2].last_epoch
        close(epochs(*again, done + NEXT, NEXT), epochs(*live, done + NEXT, NEXT))


@pytest.mark.parametrize("steps", ["0", "2.5", "many"])
def test_the_updates_of_an_epoch_are_a_number(steps: str, tmp_path: Path) -> None:
    torch_run(tmp_path / "run.pt", TORCH["step"])
    assert code_of(tmp_path / "run.pt", tmp_path / "ckpt", to="neutral", set_={"steps_per_epoch": steps}) == (
        "usage",
        ("--set", "steps_per_epoch"),
    )
    with pytest.raises(ckptconv.CkptError):
        ckptconv.keras.epochs(K.CosineDecay(1.0, 2), 0)


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
