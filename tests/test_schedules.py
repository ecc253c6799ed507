"""The schedule table, its closed forms, and the constructors that are written for them."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ckptconv import supply
from ckptconv.catalog import schedules
from ckptconv.catalog.schedule_config import from_keras_config
from ckptconv.catalog.schedule_forms import as_family, check_ends, held, lambda_code
from ckptconv.catalog.schedule_keras import keras_code
from ckptconv.catalog.schedule_plateau import plateau_code
from ckptconv.catalog.schedule_rates import TABLED, Curve, NotExpressibleError, curve_of, flat, rate, state_at
from ckptconv.catalog.schedule_source import with_rates
from ckptconv.document import Checkpoint, Group, Known, Optimizer, Progress, Schedule, Unknown, value_of
from ckptconv.errors import CkptError

STEP = Curve(family="step", parameters={"interval": 6, "factor": 0.5})
COSINE = Curve(family="cosine", parameters={"length": 60, "minimum": 0.003, "after": "rebound"})
LINE = Curve(family="linear", parameters={"start_factor": 0.1, "end_factor": 1.0, "length": 10})
WARM_UP = Curve(family="sequential", parameters={"milestones": (10,)}, parts=(LINE, COSINE))


def document(curve: Curve, position: int = 7, **more: object) -> Schedule:
    facts = {name: Known(value=value) for name, value in flat(curve).items()}
    schedule = Schedule(
        name="scheduler", family=curve.family, position=Known(value=position), parameters=facts
    )
    return replace(schedule, **more)  # type: ignore[arg-type]


def test_every_parameter_of_a_torch_class_has_a_meaning() -> None:
    for name in schedules.families():
        family = schedules.family(name)
        assert family is not None
        assert family.native.keys() <= family.parameters.keys()
        assert bool(family.classes) == bool(family.keys)
        assert family.definition
        for way in (*family.to_keras, *family.to_torch):
            assert bool(way.made) == (way.verdict == "exact")
            assert way.made or way.remark
        assert (family.to_torch[0].verdict == "refused") == (name in TABLED - {"lambda"})


def test_a_document_keeps_a_curve_with_its_parts() -> None:
    assert curve_of(document(WARM_UP)) == WARM_UP
    assert flat(WARM_UP)["1.length"] == 60


@pytest.mark.parametrize(
    ("curve", "index", "due"),
    [
        (STEP, 5, 1.0),
        (STEP, 6, 0.5),
        (COSINE, 0, 1.0),
        (COSINE, 60, 0.003),
        (COSINE, 120, 1.0),
        (held(COSINE), 120, 0.003),
        (WARM_UP, 0, 0.1),
        (WARM_UP, 9, 0.91),
        (WARM_UP, 10, 1.0),
        (Curve(family="multi-step", parameters={"milestones": (3, 3, 9), "factor": 0.5}), 2, 1.0),
        (Curve(family="multi-step", parameters={"milestones": (3, 3, 9), "factor": 0.5}), 3, 0.25),
        (Curve(family="piecewise", parameters={"boundaries": (2,), "factors": (1.0, 0.5)}), 2, 1.0),
        (Curve(family="piecewise", parameters={"boundaries": (2,), "factors": (1.0, 0.5)}), 3, 0.5),
        (Curve(family="cosine-restarts", parameters={"first": 5, "growth": 2, "minimum": 0.0}), 15, 1.0),
        (Curve(family="inverse-time", parameters={"interval": 10, "rate": 0.5}), 20, 0.5),
        (Curve(family="lambda", parameters={"factors": (0.5, 0.25), "start": 7}), 8, 0.25),
    ],
)
def test_closed_forms(curve: Curve, index: int, due: float) -> None:
    assert rate(curve, 1.0, index) == pytest.approx(due, rel=1e-12)
    assert rate(curve, 1.0, -1) is None


@pytest.mark.parametrize(
    "curve",
    [
        Curve(family="unknown"),
        Curve(family="plateau", parameters={"factor": 0.1}),
        Curve(family="step", parameters={"factor": 0.5}),
        Curve(family="step", parameters={"factor": 0.5, "interval": 0}),
        Curve(family="step", parameters={"factor": 1e300, "interval": 1}),
        Curve(family="step", parameters={"factor": "half", "interval": 1}),
        Curve(family="cosine-restarts", parameters={"first": 1, "growth": 1.0 + 1e-9, "minimum": 0.0}),
        Curve(family="lambda", parameters={"factors": (0.5,), "start": 0}),
        Curve(family="one-cycle", parameters={"length": 3}),
        Curve(family="sequential", parameters={"milestones": (1,)}),
        Curve(family="chained", parts=(COSINE,)),
    ],
)
def test_what_has_no_closed_form_has_none(curve: Curve) -> None:
    """Damaged and hostile parameters too: no exception, no endless loop."""
    assert rate(curve, 0.1, 1 << 40) is None
    with pytest.raises(NotExpressibleError):
        keras_code(curve, 0.1, 1 << 40)


@pytest.mark.parametrize(
    ("curve", "code"),
    [
        (
            STEP,
            "ExponentialDecay(initial_learning_rate=0.1, decay_steps=6, decay_rate=0.5, staircase=True)",
        ),
        (
            Curve(family="multi-step", parameters={"milestones": (3, 9, 9), "factor": 0.5}),
            "PiecewiseConstantDecay(boundaries=[2, 8], values=[0.1, 0.05, 0.0125])",
        ),
        (
            Curve(family="constant", parameters={"length": 4, "factor": 0.5}),
            "PiecewiseConstantDecay(boundaries=[3], values=[0.05, 0.1])",
        ),
        (
            Curve(family="polynomial", parameters={"length": 9, "power": 2.0}),
            "PolynomialDecay(initial_learning_rate=0.1, decay_steps=9, end_learning_rate=0.0, power=2.0)",
        ),
        (
            WARM_UP,
            "CosineDecay(initial_learning_rate=0.010000000000000002, decay_steps=60, alpha=0.03, "
            "warmup_target=0.1, warmup_steps=10)",
        ),
    ],
)
def test_constructors_of_keras(curve: Curve, code: str) -> None:
    assert keras_code(curve, 0.1, 7).call.text("tf_keras") == f"tf_keras.optimizers.schedules.{code}"


def test_a_cosine_beyond_its_minimum_has_no_constructor() -> None:
    assert "60" in keras_code(COSINE, 0.1, 60).remark
    assert keras_code(held(COSINE), 0.1, 61).remark == ""
    with pytest.raises(NotExpressibleError):
        keras_code(COSINE, 0.1, 61)
    assert check_ends(COSINE, 61) == ""
    with pytest.raises(NotExpressibleError):
        check_ends(held(COSINE), 61)


@pytest.mark.parametrize("config", [0.1, None, "CosineDecay", {}, {"class_name": "Mine", "config": {}}])
def test_a_configuration_of_no_known_schedule(config: object) -> None:
    assert from_keras_config(config) is None


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("CosineDecay", {"decay_steps": 5}),
        ("CosineDecay", {"initial_learning_rate": [], "decay_steps": 5}),
        ("PiecewiseConstantDecay", {"boundaries": "ab", "values": [1.0]}),
        ("PiecewiseConstantDecay", {"boundaries": [2], "values": [0.0, 1.0]}),
        ("PiecewiseConstantDecay", {"boundaries": [], "values": []}),
        (
            "CosineDecay",
            {"initial_learning_rate": 0, "decay_steps": 5, "warmup_target": 0, "warmup_steps": 3},
        ),
    ],
)
def test_a_damaged_configuration_is_none(name: str, values: dict[str, object]) -> None:
    assert from_keras_config({"class_name": name, "config": values}) is None


EXPONENTIAL = {
    "class_name": "ExponentialDecay",
    "config": {"initial_learning_rate": 0.1, "decay_steps": 5, "decay_rate": 0.5},
}


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("Sequential", {"parts": [], "milestones": []}),
        ("Sequential", {"parts": [EXPONENTIAL], "milestones": [3]}),
        ("Sequential", {"parts": [EXPONENTIAL, 0.1], "milestones": [3]}),
        ("Chained", {"parts": [EXPONENTIAL], "base": "high"}),
        ("Table", {"rates": [0.0, 0.0], "start": 3}),
        ("Table", {"rates": [0.1], "start": float("inf")}),
        ("OneCycle", {"length": 9, "phases": [[1.0]], "anneal": "cos"}),
        ("OneCycle", {"length": 9, "phases": [[3.0, float("nan"), 0.1]], "anneal": "cos"}),
        ("OneCycle", {"length": 9, "phases": [[3.0, 0.1, 0.4], [8.0, 0.3, 0.2]], "anneal": "cos"}),
        ("Epochs", {"schedule": EXPONENTIAL, "steps_per_epoch": 0}),
        ("Epochs", {"schedule": {"class_name": "Mine"}, "steps_per_epoch": 3}),
    ],
)
def test_a_damaged_configuration_of_ours_is_none(name: str, values: dict[str, object]) -> None:
    config = {"class_name": name, "config": values, "registered_name": f"ckptconv>{name}"}
    assert from_keras_config(config) is None
    assert from_keras_config({**config, "registered_name": None}) is None


@pytest.mark.parametrize(
    ("curve", "named"),
    [
        (STEP, {}),
        (held(COSINE), {}),
        (Curve(family="chained", parts=(STEP, LINE)), {}),
        (Curve(family="sequential", parameters={"milestones": (9,)}, parts=(LINE, STEP)), {}),
        (Curve(family="lambda", parameters={"factors": (1.0, 0.25), "start": 7}), {}),
        (replace(held(COSINE), parameters={**held(COSINE).parameters, "updates_per_tick": 3}), {}),
        (replace(STEP, parameters={**STEP.parameters, "updates_per_tick": 3}), {}),
        (
            Curve(
                family="one-cycle",
                parameters={
                    "length": 60,
                    "anneal": "cos",
                    "cycle_momentum": False,
                    "phase.0.end": 17.0,
                    "phase.0.from": "initial_lr",
                    "phase.0.to": "max_lr",
                    "phase.1.end": 59.0,
                    "phase.1.from": "max_lr",
                    "phase.1.to": "min_lr",
                },
            ),
            {"max_lr": 0.4, "min_lr": 1e-6},
        ),
    ],
)
def test_a_constructor_is_read_back_with_its_rates(curve: Curve, named: dict[str, float]) -> None:
    told = from_keras_config(keras_code(curve, 0.1, 7, named).call.config())
    assert told is not None
    for index in (7, 8):
        due = rate(curve, 0.1, index, named)
        assert due is not None
        assert rate(told.curve, told.base, index, told.named) == pytest.approx(due, rel=1e-12)


RATES = st.floats(1e-4, 1.0)


@settings(max_examples=40, deadline=None)
@given(base=RATES, end=RATES, length=st.integers(1, 50), index=st.integers(0, 80))
def test_a_polynomial_of_power_1_is_a_line(base: float, end: float, length: int, index: int) -> None:
    curve = Curve(family="polynomial", parameters={"length": length, "end": end, "power": 1.0})
    line, top = as_family(curve, base, "linear")
    assert rate(line, top, index) == pytest.approx(rate(curve, base, index), rel=1e-12)
    assert 0 < line.number("start_factor") <= 1


@settings(max_examples=40, deadline=None)
@given(
    ends=st.lists(st.integers(0, 50), min_size=1, max_size=4, unique=True),
    factor=st.floats(0.1, 0.9),
    index=st.integers(0, 60),
)
def test_boundaries_are_milestones_less_one(ends: list[int], factor: float, index: int) -> None:
    boundaries = tuple(sorted(ends))
    factors = tuple(factor**i for i in range(len(ends) + 1))
    curve = Curve(family="piecewise", parameters={"boundaries": boundaries, "factors": factors})
    steps, base = as_family(curve, 0.1, "multi-step")
    assert steps.parameters["milestones"] == tuple(end + 1 for end in boundaries)
    assert rate(steps, base, index) == pytest.approx(rate(curve, 0.1, index), rel=1e-9)


@settings(max_examples=30, deadline=None)
@given(interval=st.integers(1, 20), factor=st.floats(0.1, 0.99), index=st.integers(0, 60))
def test_an_exponential_by_the_tick(interval: int, factor: float, index: int) -> None:
    curve = Curve(family="exponential", parameters={"interval": interval, "factor": factor})
    single, base = as_family(curve, 0.1, "exponential")
    assert "interval" not in single.parameters
    assert rate(single, base, index) == pytest.approx(rate(curve, 0.1, index), rel=1e-9)


@pytest.mark.parametrize(
    ("curve", "family"),
    [
        (STEP, "cosine"),
        (
            Curve(family="piecewise", parameters={"boundaries": (1, 2), "factors": (1.0, 0.5, 0.4)}),
            "multi-step",
        ),
        (
            Curve(family="piecewise", parameters={"boundaries": (1, 2), "factors": (1.0, 0.5, 0.4)}),
            "constant",
        ),
        (Curve(family="polynomial", parameters={"length": 4, "end": 0.0, "power": 2.0}), "linear"),
        (Curve(family="polynomial", parameters={"length": 4, "end": 0.1, "power": 2.0}), "polynomial"),
        (Curve(family="step", parameters={"interval": 2.5, "factor": 0.5}), "step"),
        (Curve(family="step", parameters={"factor": 0.5}), "step"),
    ],
)
def test_a_family_that_cannot_have_the_rates(curve: Curve, family: str) -> None:
    with pytest.raises(NotExpressibleError):
        as_family(curve, 0.1, family)


def test_functions_for_a_lambda() -> None:
    curve = Curve(family="inverse-time", parameters={"interval": 10, "rate": 0.5, "staircase": True})
    function = eval(lambda_code(curve, 0.1))
    ours = [0.1 * function(t) for t in range(40)]
    assert ours == pytest.approx([rate(curve, 0.1, t) for t in range(40)], rel=1e-12)
    with pytest.raises(NotExpressibleError):
        lambda_code(COSINE, 0.1)


def test_a_plateau_needs_all_its_parameters() -> None:
    with pytest.raises(NotExpressibleError):
        plateau_code(Curve(family="plateau", parameters={"threshold_mode": "abs"}), 0.1, "keras")
    with pytest.raises(NotExpressibleError):
        plateau_code(Curve(family="plateau", parameters={"threshold_mode": "rel"}), 0.1, "keras")


def test_parts_of_a_sequence_stand_where_torch_has_them() -> None:
    state = {
        f"{part}.{name}": Known(value=0) for part in (0, 1) for name in ("position", "calls", "last_rate.0")
    }
    schedule = document(WARM_UP)
    schedule = replace(schedule, parameters={**schedule.parameters, **state})
    before = state_at(schedule, 3, [0.1], [{}])
    assert (before["0.position"], before["1.position"], before["0.calls"], before["1.calls"]) == (3, -1, 4, 1)
    after = state_at(schedule, 12, [0.1], [{}])
    assert (after["0.position"], after["1.position"], after["0.calls"], after["1.calls"]) == (9, 2, 10, 3)
    assert after["0.last_rate.0"] == pytest.approx(0.091)
    assert math.isclose(float(str(after["1.last_rate.0"])), rate(COSINE, 0.1, 2) or 0)


@pytest.mark.parametrize(
    "curve",
    [
        Curve(family="sequential", parts=(LINE, COSINE)),
        Curve(family="sequential", parameters={"milestones": (3,)}, parts=(LINE, WARM_UP)),
        Curve(family="chained", parts=(Curve(family="unknown"),)),
        Curve(family="cosine-restarts", parameters={"first": 0, "growth": 1}),
    ],
)
def test_a_state_that_cannot_follow_its_position(curve: Curve) -> None:
    with pytest.raises(NotExpressibleError):
        state_at(document(curve), 3, [0.1], [{}])


def run(schedule: Schedule, step: int | None) -> Checkpoint:
    known = Unknown(reason="none") if step is None else Known(value=step)
    group = Group(params=(), hyperparameters={"base_learning_rate": Known(value=0.1)})
    optimizer = Optimizer(name="optimizer", algorithm="sgd", framework="keras3", step=known, groups=(group,))
    return Checkpoint(progress=Progress(step=known), optimizers=(optimizer,), schedules=(schedule,))


def test_units_and_rates_of_a_source() -> None:
    told = with_rates(run(document(STEP), 7), Checkpoint(progress=Progress(step=Known(value=0))), {})
    assert told.schedules[0].unit == "update"
    assert value_of(told.optimizers[0].groups[0].hyperparameters["learning_rate"]) == 0.05
    open_ = with_rates(run(document(STEP), 9), told, {})
    assert open_.schedules[0].unit == "unknown"
    counted = with_rates(run(document(STEP), None), told, {"schedule_unit": "update"})
    assert value_of(counted.progress.step) == value_of(counted.optimizers[0].step) == 7


def test_the_setting_of_a_unit() -> None:
    assert supply.settings({"schedule_unit": "epoch"}) == {"schedule_unit": "epoch"}
    with pytest.raises(CkptError) as caught:
        supply.settings({"schedule_unit": "day"})
    assert [(p.code, p.loc) for p in caught.value.problems] == [("usage", ("--set", "schedule_unit"))]
    checkpoint = supply.set_fields(run(document(STEP), 9), {"schedule_unit": "epoch"})
    assert checkpoint.schedules[0].unit == "epoch"
    assert ("unit of schedules", "--set") in checkpoint.provenance.supplied
    again = supply.set_fields(checkpoint, {"schedule_unit": "update"})
    assert again.schedules[0].unit == "epoch"
