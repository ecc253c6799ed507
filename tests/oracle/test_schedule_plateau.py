"""ReduceLROnPlateau of PyTorch and of Keras: one rule, whose state PyTorch's file has and no file of Keras.

From PyTorch the report's lines make the callback. From Keras the live callback tells, or the caller; without
either the conversion is refused, and where that is allowed the rate is all that crosses.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import ckptconv
from ckptconv.errors import CkptError
from tests.support.schedule_runs import (
    BASE,
    PACKAGES,
    SCHEDULE,
    S,
    close,
    code_of,
    fresh_keras,
    keras,
    keras_model,
    loaded,
    made_by,
    resumed,
    saved,
    tf,
    torch,
    torch_objects,
    torch_template,
    written,
)

METRICS = [1.0, 0.9, 0.89, 0.95, 0.95, 0.9, 0.91, 0.7, 0.71, 0.72, 0.73, 0.74, 0.71] + [0.8] * 50
OPTIONS: dict[str, Any] = {"patience": 2, "factor": 0.5, "threshold": 0.01, "min_lr": 1e-7}


def metric(mode: str, epoch: int) -> float:
    return METRICS[epoch] if mode == "min" else 2 - METRICS[epoch]


def plateau(**options: Any) -> Any:
    return lambda optimizer: S.ReduceLROnPlateau(optimizer, **{**OPTIONS, **options})


def torch_epochs(live: Any, mode: str, first: int, last: int) -> list[float]:
    """Epochs of one update each; the rate after each."""
    model, optimizer, scheduler = live
    rates = []
    for epoch in range(first, last):
        optimizer.zero_grad()
        model(torch.randn(4, 3)).square().sum().backward()
        optimizer.step()
        scheduler.step(metric(mode, epoch))
        rates.append(float(optimizer.param_groups[0]["lr"]))
    return rates


def keras_epochs(optimizer: Any, callback: Any, mode: str, first: int, last: int) -> list[float]:
    variables = callback.model.trainable_variables
    rates = []
    for epoch in range(first, last):
        optimizer.apply_gradients([(tf.random.normal(v.shape), v) for v in variables])
        callback.on_epoch_end(epoch, {"val_loss": metric(mode, epoch)})
        rates.append(float(optimizer.learning_rate))
    return rates


@pytest.mark.parametrize(
    ("at", "cooldown", "mode", "threshold_mode", "package"),
    [
        (4, 3, "min", "rel", "keras"),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                (9, 0, "min", "abs", "keras"),
                (12, 1, "max", "rel", "keras"),
                (9, 3, "max", "abs", "keras"),
                (12, 3, "min", "abs", "tf_keras"),
                (9, 1, "min", "rel", "tf_keras"),
                (4, 0, "max", "rel", "tf_keras"),
            )
        ),
    ],
)
def test_to_keras(
    at: int, cooldown: int, mode: str, threshold_mode: str, package: str, tmp_path: Path
) -> None:
    make = plateau(mode=mode, cooldown=cooldown, threshold_mode=threshold_mode)
    live = torch_objects(make)
    torch_epochs(live, mode, 0, at)
    source = written(tmp_path / "run.pt", *live)
    template = fresh_keras(tmp_path / "fresh", 0.5, package)
    report = ckptconv.convert(source, tmp_path / "ckpt", template=template)
    model, optimizer = keras_model(package, 0.5)
    tf.train.Checkpoint(model=model, optimizer=optimizer).read(str(tmp_path / "ckpt")).assert_consumed()
    model.compile(optimizer)
    callback = made_by(report, "callback")
    callback.set_model(model)
    callback.on_train_begin()
    ours = keras_epochs(optimizer, callback, mode, at, at + 50)
    close(ours, torch_epochs(live, mode, at, at + 50))
    assert len(set(ours)) > 3
    # And back, from the live callback.
    back = saved(tmp_path / "later", model, optimizer)
    spec = ckptconv.keras.describe(model, optimizer, callback=callback)
    torch_template(tmp_path / "fresh.pt", plateau(mode=mode))
    ckptconv.convert(
        back,
        tmp_path / "back.pt",
        template=tmp_path / "fresh.pt",
        source_spec=spec,
        set_={"epochs": str(at + 50)},
    )
    again, mine = loaded(tmp_path / "back.pt")["scheduler"], live[2].state_dict()
    kept = ("best", "num_bad_epochs", "cooldown_counter", "patience", "threshold", "threshold_mode", "mode")
    assert {name: again[name] for name in kept} == pytest.approx({name: mine[name] for name in kept})
    assert again["last_epoch"] == mine["last_epoch"]


def followed(package: str, mode: str, at: int, **options: Any) -> tuple[Any, Any, Any]:
    """A Keras run of `at` epochs: model, optimizer, callback."""
    model, optimizer = keras_model(package, BASE)
    model.compile(optimizer)
    arguments = {**OPTIONS, "min_delta": OPTIONS["threshold"], "mode": mode, **options}
    del arguments["threshold"]
    callback = PACKAGES[package].callbacks.ReduceLROnPlateau(**arguments)
    callback.set_model(model)
    callback.on_train_begin()
    keras_epochs(optimizer, callback, mode, 0, at)
    return model, optimizer, callback


@pytest.mark.parametrize(
    ("at", "mode", "patience", "cooldown", "package"),
    [
        (9, "min", 3, 0, "keras"),
        (12, "max", 0, 1, "tf_keras"),
        pytest.param(4, "min", 1, 4, "keras", marks=pytest.mark.slow),
        pytest.param(12, "min", 1, 4, "tf_keras", marks=pytest.mark.slow),
        pytest.param(9, "max", 0, 1, "keras", marks=pytest.mark.slow),
    ],
)
def test_from_a_live_callback(
    at: int, mode: str, patience: int, cooldown: int, package: str, tmp_path: Path
) -> None:
    model, optimizer, callback = followed(
        package, mode, at, patience=patience, cooldown=cooldown, factor=0.8, min_lr=2e-3
    )
    source = saved(tmp_path / "ckpt", model, optimizer)
    spec = ckptconv.keras.describe(model, optimizer, callback=callback)
    live = torch_template(tmp_path / "fresh.pt", plateau(threshold=0.5))
    arguments = {"template": tmp_path / "fresh.pt", "source_spec": spec}
    assert code_of(source, tmp_path / "no.pt", **arguments) == ("progress-unknown", ("progress", "epochs"))
    ckptconv.convert(source, tmp_path / "run.pt", **arguments, set_={"epochs": str(at)})
    state = resumed(tmp_path / "run.pt", *live)
    group, scheduler = state["optimizer"]["param_groups"][0], state["scheduler"]
    assert (scheduler["last_epoch"], scheduler["_last_lr"]) == (at, [group["lr"]])
    assert list(scheduler) == list(live[2].state_dict())
    theirs = keras_epochs(optimizer, callback, mode, at, at + 50)
    close(torch_epochs(live, mode, at, at + 50), theirs)
    assert len(set(theirs)) > 1


def test_without_its_state_it_is_refused(tmp_path: Path) -> None:
    model, optimizer, callback = followed("keras", "min", 9, patience=3)
    source = saved(tmp_path / "ckpt", model, optimizer)
    live = torch_template(tmp_path / "fresh.pt", plateau(threshold_mode="abs"))
    arguments: dict[str, Any] = {"template": tmp_path / "fresh.pt"}
    assert code_of(source, tmp_path / "no.pt", **arguments) == ("schedule-unsupported", SCHEDULE)
    report = ckptconv.convert(source, tmp_path / "frozen.pt", **arguments, allow=["schedule-unsupported"])
    state = loaded(tmp_path / "frozen.pt")
    rate = float(optimizer.learning_rate)
    assert state["optimizer"]["param_groups"][0]["lr"] == state["scheduler"]["_last_lr"][0] == rate
    assert state["scheduler"]["best"] == float("inf")
    (entry,) = [e for e in report.ledger if e.item == ("template", "scheduler")]
    assert (entry.fate, entry.allowed_by) == ("supplied", "schedule-unsupported")
    told = {"plateau_best": str(callback.best), "plateau_bad": str(callback.wait), "epochs": "9"}
    ckptconv.convert(source, tmp_path / "run.pt", **arguments, set_=told)
    resumed(tmp_path / "run.pt", *live)
    close(torch_epochs(live, "min", 9, 59), keras_epochs(optimizer, callback, "min", 9, 59))


class Mine(keras.callbacks.ReduceLROnPlateau):  # type: ignore[misc, name-defined]
    """A callback of a user's own, whose rule nobody else knows."""


def test_what_a_callback_does_not_tell(tmp_path: Path) -> None:
    model, optimizer = keras_model("keras", BASE)
    other = keras.callbacks.ReduceLROnPlateau(mode="min")
    other.monitor_op = lambda value, best: value < best
    for callback in (Mine(mode="min"), keras.callbacks.ReduceLROnPlateau("accuracy"), other):
        with pytest.raises(CkptError) as caught:
            ckptconv.keras.describe(model, optimizer, callback=callback)
        assert [(p.code, p.loc) for p in caught.value.problems] == [("unsupported-feature", ("callback",))]
    with pytest.raises(CkptError) as caught:
        ckptconv.keras.better_by_fraction(0.1, "auto")
    assert [(p.code, p.loc) for p in caught.value.problems] == [("usage", ("mode",))]


def test_a_file_of_torch_says_where_torch_stops_falling(tmp_path: Path) -> None:
    """A rate of 1e-6 ends near 1e-8, the smallest fall of torch's default."""
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-6)
    live = (model, optimizer, S.ReduceLROnPlateau(optimizer))
    torch_epochs(live, "min", 0, 2)
    source = written(tmp_path / "run.pt", *live)
    report = ckptconv.convert(source, tmp_path / "ckpt", template=fresh_keras(tmp_path / "fresh", 0.5))
    assert [line for line in report.target_requires if "smaller than 1e-08" in line]


def test_a_schedule_of_keras_does_not_follow_a_metric(tmp_path: Path) -> None:
    live = torch_objects(plateau())
    torch_epochs(live, "min", 0, 2)
    source = written(tmp_path / "run.pt", *live)
    template = fresh_keras(tmp_path / "fresh", keras.optimizers.schedules.CosineDecay(1.0, 2))
    assert code_of(source, tmp_path / "ckpt", template=template) == ("schedule-unsupported", SCHEDULE)
