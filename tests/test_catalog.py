"""The optimizer tables and the conversion between forms: codes, ops, verdicts, and the arithmetic itself."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from ckptconv.catalog import loading, optimizers, schedules
from ckptconv.document import Candidate, Fact, Group, Known, Optimizer, Unknown, Value, value_of
from ckptconv.ops import Scale, Shift
from ckptconv.tensor import StoredTensor

SHAPE = (2, 3)
DATA = Path(loading.__file__).parent / "data"


def tensor(value: float = 1.0) -> StoredTensor:
    return StoredTensor.of_array(np.full(SHAPE, value, np.float32))


def optimizer(
    algorithm: str,
    framework: str,
    hypers: Mapping[str, Value] | list[Mapping[str, Value]],
    *slots: str,
    step: int | None = 9,
    names: tuple[tuple[str, ...], ...] = (("w",),),
    candidates: tuple[str, ...] = (),
) -> Optimizer:
    groups = hypers if isinstance(hypers, list) else [hypers]
    params = [name for group in names for name in group]
    per_param = framework == "torch" and algorithm != "sgd" and step is not None
    return Optimizer(
        name="optimizer",
        algorithm=algorithm,
        algorithm_candidates=candidates,
        framework=framework,
        step=Unknown(reason="none") if step is None else Known(value=step),
        param_steps=dict.fromkeys(params, step) if per_param and step is not None else {},
        groups=tuple(
            Group(params=own, hyperparameters={k: Known(value=v) for k, v in group.items()})
            for own, group in zip(names, groups, strict=True)
        ),
        slots={slot: {name: tensor() for name in params} for slot in slots},
    )


TORCH_SGD: dict[str, Value] = {
    "learning_rate": 0.1,
    "momentum": 0.9,
    "dampening": 0,
    "nesterov": False,
    "weight_decay": 0,
    "maximize": False,
}
TORCH_ADAM: dict[str, Value] = {
    "learning_rate": 1e-3,
    "beta_1": 0.9,
    "beta_2": 0.999,
    "epsilon": 1e-7,
    "weight_decay": 0,
    "amsgrad": False,
    "maximize": False,
}
MOMENTS = ("first_moment", "second_moment")


def torch_sgd(**changes: Value) -> Optimizer:
    return optimizer("sgd", "torch", {**TORCH_SGD, **changes}, "momentum")


def torch_adam(algorithm: str = "adam", **changes: Value) -> Optimizer:
    return optimizer(algorithm, "torch", {**TORCH_ADAM, **changes}, *MOMENTS)


def keras(algorithm: str = "adam", framework: str = "keras3", *slots: str, **known: Value) -> Optimizer:
    held = slots or (("momentum",) if algorithm == "sgd" else MOMENTS)
    return optimizer(algorithm, framework, {"learning_rate": 0.5, **known}, *held, step=0)


def codes(conversion: optimizers.Conversion) -> list[tuple[str, tuple[str | int, ...]]]:
    return [(problem.code, problem.loc) for problem in conversion.problems]


def group_loc(name: str, index: int = 0) -> tuple[str | int, ...]:
    return ("optimizers", "optimizer", "groups", index, "hyperparameters", name)


# --- the tables


@pytest.mark.parametrize("path", sorted(DATA.rglob("*.json")), ids=lambda p: p.stem)
def test_every_row_names_its_source(path: Path) -> None:
    data = json.loads(path.read_text("utf-8"))
    assert data["source"]
    for section in ("frameworks", "kinds", "families"):
        for name, row in data.get(section, {}).items():
            assert row["source"], name


def test_unknown_keys_are_refused() -> None:
    record = loading.Record({"a": 1, "b": 2}, "x.json")
    record.number("a")
    with pytest.raises(ValueError, match="b"):
        record.close()


@pytest.mark.parametrize("bad", [True, "text", None, [1]])
def test_numbers_are_numbers(bad: loading.Json) -> None:
    with pytest.raises(ValueError, match="number"):
        loading.Record({"a": bad}, "x.json").number("a")


def test_every_algorithm_has_a_row() -> None:
    assert {"sgd", "adam", "adamw", "nadam", "rmsprop"} <= set(optimizers.algorithms())
    for name in optimizers.algorithms():
        assert any(optimizers.row(name, framework) for framework in optimizers.FRAMEWORKS)
    assert optimizers.row("adamw", "tf_keras_legacy") is None
    assert optimizers.row("nonsense", "torch") is None


def test_slots_that_exist() -> None:
    adam, sgd = optimizers.row("adam", "torch"), optimizers.row("sgd", "keras3")
    new = optimizers.row("sgd", "tf_keras")
    assert adam is not None
    assert sgd is not None
    assert new is not None
    assert adam.slots_present({}) == MOMENTS
    assert adam.slots_present({"amsgrad": True}) == (*MOMENTS, "max_second_moment")
    assert sgd.slots_present({"momentum": 0.0}) == ()
    assert sgd.slots_present({"momentum": 0.9}) == ("momentum",)
    assert new.slots_present({"momentum": 0.0}) == ("momentum",)


# --- recognition

ADAM_KEYS: dict[str, Value] = dict.fromkeys(("lr", "betas", "eps", "weight_decay", "amsgrad"), 0)
SGD_KEYS: dict[str, Value] = dict.fromkeys(("lr", "momentum", "dampening", "weight_decay", "nesterov"), 0)


@pytest.mark.parametrize(
    ("framework", "slots", "keys", "scope", "expected"),
    [
        ("torch", {"exp_avg", "exp_avg_sq"}, ADAM_KEYS, None, {"adam", "adamw"}),
        ("torch", {"exp_avg", "exp_avg_sq"}, {**ADAM_KEYS, "decoupled_weight_decay": True}, None, {"adamw"}),
        ("torch", {"exp_avg", "exp_avg_sq"}, {**ADAM_KEYS, "decoupled_weight_decay": False}, None, {"adam"}),
        ("torch", {"exp_avg"}, ADAM_KEYS, None, set()),
        ("torch", {"exp_avg", "exp_avg_sq"}, {**ADAM_KEYS, "bias_correction": True}, None, set()),
        ("torch", {"momentum_buffer"}, SGD_KEYS, None, {"sgd"}),
        ("torch", set(), SGD_KEYS, None, {"sgd"}),
        (
            "torch",
            {"momentum_buffer"},
            {"lr": 0, "momentum": 0, "weight_decay": 0, "nesterov": 0},
            None,
            set(),
        ),
        ("keras3", {"_momentums", "_velocities"}, {}, "adam_3", {"adam"}),
        ("keras3", {"_momentums", "_velocities"}, {}, "adam_w", {"adamw"}),
        ("keras3", {"_momentums", "_velocities"}, {}, "lamb", {"lamb"}),
        (
            "keras3",
            {"_momentums", "_velocities"},
            {},
            "mine",
            {"adam", "adamw", "lamb", "schedule_free_adamw"},
        ),
        ("keras3", {"momentums"}, {}, "sgd", {"sgd"}),
        ("keras3", {"_momentums", "_velocities", "_u_product"}, {}, "mine", {"nadam"}),
        ("keras3", {"_momentums"}, {}, None, {"lion"}),
        ("torch", {"exp_avg", "exp_avg_sq", "mu_product"}, {}, None, {"nadam"}),
        ("torch", {"square_avg", "acc_delta"}, {}, None, {"adadelta"}),
        ("torch", {"exp_avg", "exp_inf"}, {}, None, {"adamax"}),
        ("keras3", set(), {}, None, {"sgd"}),
        ("tf_keras_legacy", {"m", "v"}, {"beta_1": 0, "beta_2": 0}, "Adam", {"adam"}),
        ("tf_keras_legacy", {"m", "v"}, {"beta_1": 0, "beta_2": 0}, "Adamax", {"adamax"}),
        ("tf_keras_legacy", {"momentum"}, {"momentum": 0, "decay": 0}, "SGD", {"sgd"}),
        ("tf_keras_legacy", {"momentum", "rms"}, {"momentum": 0, "rho": 0}, "RMSprop", {"rmsprop"}),
    ],
)
def test_infer(
    framework: str, slots: set[str], keys: dict[str, Value], scope: str | None, expected: set[str]
) -> None:
    assert set(optimizers.infer(framework, frozenset(slots), keys, scope)) == expected


def test_schedule_families() -> None:
    assert schedules.infer({"T_max", "eta_min", "last_epoch"}) == "cosine"
    assert schedules.infer({"last_epoch", "base_lrs"}) == "unknown"
    assert schedules.family("lambda") is not None
    assert schedules.family("nonsense") is None
    assert len(schedules.families()) == 17


# --- SGD


def test_sgd_to_keras_folds_the_rate() -> None:
    done = optimizers.convert(torch_sgd(), keras("sgd"))
    assert done.ops("momentum", 0) == (Scale(-0.1),)
    assert done.verdict.verdict == "exact-at-constant-learning-rate"
    assert done.problems == ()
    assert done.target_requires == ("keras.optimizers.SGD(learning_rate=0.1, momentum=0.9)",)


def test_sgd_dampening_goes_into_the_rate() -> None:
    done = optimizers.convert(torch_sgd(dampening=0.25), keras("sgd"))
    assert done.ops("momentum", 0) == (Scale(-0.1),)
    rate = done.hyperparameters[0]["learning_rate"]
    assert value_of(rate) == pytest.approx(0.075)
    assert isinstance(rate, Known)
    assert rate.status == "derived"


def test_sgd_from_keras() -> None:
    source = keras("sgd", momentum=0.9, nesterov=True)
    template = optimizer("sgd", "torch", {**TORCH_SGD, "dampening": 0.5, "weight_decay": 0.01})
    done = optimizers.convert(source, template, allow=frozenset())
    assert ("form-mismatch", group_loc("weight_decay")) in codes(done)
    done = optimizers.convert(
        source, optimizer("sgd", "torch", {**TORCH_SGD, "dampening": 0.5}), allow=frozenset()
    )
    assert done.problems == ()
    assert done.ops("momentum", 0) == (Scale(-2.0),)
    values = {name: value_of(fact) for name, fact in done.hyperparameters[0].items()}
    assert values["dampening"] == 0.0
    assert values["learning_rate"] == 0.5
    assert values["nesterov"] is True


@pytest.mark.parametrize("nesterov", [False, True])
def test_sgd_arithmetic(nesterov: bool) -> None:
    """Both rules, written out, give the same parameters after the conversion."""
    rng = np.random.default_rng(3)
    damp, rate, mu = (0.0 if nesterov else 0.3), 0.1, 0.9
    source = torch_sgd(dampening=damp, nesterov=nesterov)
    done = optimizers.convert(source, keras("sgd"))
    m = rng.normal(size=4)
    (op,) = done.ops("momentum", 0)
    assert isinstance(op, Scale)
    v, p, q = op.factor * m, np.zeros(4), np.zeros(4)
    other = value_of(done.hyperparameters[0]["learning_rate"])
    assert isinstance(other, float)
    for _ in range(5):
        g = rng.normal(size=4)
        m = mu * m + (1 - damp) * g
        p -= rate * (g + mu * m if nesterov else m)
        v = mu * v - other * g
        q += mu * v - other * g if nesterov else v
    np.testing.assert_allclose(p, q, rtol=1e-12)


def test_sgd_rate_of_zero() -> None:
    done = optimizers.convert(torch_sgd(learning_rate=0.0), keras("sgd"))
    assert codes(done) == [("form-mismatch", group_loc("learning_rate"))]
    done = optimizers.convert(torch_sgd(learning_rate=0.0), keras("sgd"), allow=frozenset({"form-mismatch"}))
    assert done.slots[0].created
    assert done.verdict.verdict == "lossy"


def test_sgd_full_dampening() -> None:
    done = optimizers.convert(torch_sgd(dampening=1), keras("sgd"))
    assert codes(done) == [("form-mismatch", group_loc("dampening"))]


def test_sgd_without_a_recorded_rate() -> None:
    source = replace(keras("sgd", momentum=0.9), groups=(Group(params=("w",)),))
    done = optimizers.convert(source, optimizer("sgd", "torch", TORCH_SGD))
    assert ("hyperparameter-missing", group_loc("learning_rate")) in codes(done)


def test_sgd_idle_slot_of_tf_keras() -> None:
    plain = optimizer("sgd", "torch", {**TORCH_SGD, "momentum": 0})
    done = optimizers.convert(keras("sgd", "tf_keras"), plain)
    assert done.problems == ()
    assert done.left == ("momentum",)
    done = optimizers.convert(keras("sgd", "keras3"), plain)
    assert codes(done) == [("state-dropped", ("optimizers", "optimizer", "slots", "momentum"))]


def test_sgd_template_without_momentum() -> None:
    template = replace(keras("sgd"), slots={})
    done = optimizers.convert(torch_sgd(), template)
    assert codes(done) == [("state-dropped", ("optimizers", "optimizer", "slots", "momentum"))]


def test_sgd_template_with_momentum_the_source_has_not() -> None:
    source = replace(torch_sgd(momentum=0), slots={})
    done = optimizers.convert(source, keras("sgd"))
    assert codes(done) == [("template-mismatch", ("optimizers", "optimizer", "slots", "momentum"))]
    done = optimizers.convert(source, keras("sgd", "tf_keras"))
    assert done.problems == ()
    assert done.slots[0].created


def test_sgd_coupled_decay() -> None:
    source = torch_sgd(weight_decay=0.02)
    assert codes(optimizers.convert(source, keras("sgd"))) == [("form-mismatch", group_loc("weight_decay"))]
    done = optimizers.convert(source, keras("sgd"), allow=frozenset({"form-mismatch"}))
    assert done.verdict.verdict == "lossy"
    assert any("L2(0.01)" in line for line in done.target_requires)
    assert optimizers.convert(source, torch_sgd()).verdict.verdict == "exact"


def test_maximize() -> None:
    source = torch_sgd(maximize=True)
    assert codes(optimizers.convert(source, keras("sgd"))) == [
        ("hyperparameter-unsupported", group_loc("maximize"))
    ]
    assert optimizers.convert(source, torch_sgd()).problems == ()


# --- Adam


def test_adam_to_keras() -> None:
    done = optimizers.convert(torch_adam(), keras())
    assert [slot.slot for slot in done.slots] == list(MOMENTS)
    assert done.ops("first_moment", 0) == ()
    assert done.verdict.verdict == "approximate"
    assert done.residual is not None
    assert done.residual.formula == "bias-corrected: corrected -> raw"
    assert done.residual.values["step"] == 9
    assert done.target_requires[0] == (
        "keras.optimizers.Adam(learning_rate=0.001, beta_1=0.9, beta_2=0.999, epsilon=1e-07)"
    )
    assert value_of(done.step) == 9


def test_adam_from_keras_counts_per_parameter() -> None:
    source = optimizer("unknown", "keras3", {"learning_rate": 0.5}, *MOMENTS, candidates=("adam", "adamw"))
    done = optimizers.convert(source, torch_adam())
    assert done.algorithm == "adam"
    assert done.param_steps == {"w": 9}
    assert value_of(done.hyperparameters[0]["learning_rate"]) == 0.5
    beta = done.hyperparameters[0]["beta_1"]
    assert isinstance(beta, Known)
    assert (beta.status, beta.source) == ("supplied", "template")


@pytest.mark.parametrize("algorithm", ["adam", "adamw"])
def test_tf_keras_can_place_epsilon(algorithm: str) -> None:
    source = torch_adam(algorithm, weight_decay=0.1 if algorithm == "adamw" else 0)
    done = optimizers.convert(source, keras(algorithm, "tf_keras"))
    assert done.verdict.verdict == "exact"
    assert done.residual is None
    assert "tf_keras.optimizers.Adam(" in done.target_requires[0]
    assert "adaptive_epsilon=True" in done.target_requires[0]
    assert ("weight_decay=0.1" in done.target_requires[0]) == (algorithm == "adamw")


def test_no_epsilon_no_difference() -> None:
    assert optimizers.convert(torch_adam(epsilon=0.0), keras()).verdict.verdict == "exact"


def test_equal_forms_are_exact() -> None:
    assert optimizers.convert(keras("adam", "tf_keras_legacy"), keras()).verdict.verdict == "exact"


def test_adam_decay() -> None:
    coupled = torch_adam(weight_decay=0.1)
    assert codes(optimizers.convert(coupled, keras("adamw"))) == [
        ("form-mismatch", group_loc("weight_decay"))
    ]
    decoupled = torch_adam("adamw", weight_decay=0.1)
    assert optimizers.convert(decoupled, keras("adamw")).problems == ()
    done = optimizers.convert(decoupled, keras())
    assert done.problems == ()
    assert "weight_decay=0.1" in done.target_requires[0]
    legacy = keras("adam", "tf_keras_legacy", beta_1=0.9, beta_2=0.999)
    assert codes(optimizers.convert(decoupled, legacy)) == [("form-mismatch", group_loc("weight_decay"))]
    assert optimizers.convert(torch_adam("adamw"), legacy).problems == ()
    assert codes(optimizers.convert(decoupled, torch_adam())) == [
        ("form-mismatch", group_loc("weight_decay"))
    ]


def test_decay_exclusions() -> None:
    groups: list[Mapping[str, Value]] = [{**TORCH_ADAM, "weight_decay": 0.1}, TORCH_ADAM]
    source = optimizer("adamw", "torch", groups, *MOMENTS, names=(("w",), ("b", "g")))
    target = optimizer("adamw", "keras3", {"learning_rate": 0.5}, *MOMENTS, names=(("w", "b", "g"),))
    done = optimizers.convert(source, target)
    assert done.problems == ()
    assert any("exclude_from_weight_decay" in line and "'b', 'g'" in line for line in done.target_requires)
    groups[1] = {**TORCH_ADAM, "weight_decay": 0.2}
    source = optimizer("adamw", "torch", groups, *MOMENTS, names=(("w",), ("b", "g")))
    assert codes(optimizers.convert(source, target)) == [("groups-differ", group_loc("weight_decay"))]


def test_groups_with_different_rates() -> None:
    groups: list[Mapping[str, Value]] = [TORCH_ADAM, {**TORCH_ADAM, "learning_rate": 0.3}]
    source = optimizer("adam", "torch", groups, *MOMENTS, names=(("w",), ("b",)))
    target = optimizer("adam", "keras3", {"learning_rate": 0.5}, *MOMENTS, names=(("w", "b"),))
    assert codes(optimizers.convert(source, target)) == [("groups-differ", group_loc("learning_rate"))]
    done = optimizers.convert(source, target, allow=frozenset({"groups-differ"}))
    assert done.verdict.verdict == "lossy"
    assert value_of(done.hyperparameters[0]["learning_rate"]) == 1e-3
    assert optimizers.convert(source, source).verdict.verdict == "exact"


def test_amsgrad() -> None:
    source = optimizer("adam", "torch", {**TORCH_ADAM, "amsgrad": True}, *MOMENTS, "max_second_moment")
    loc = ("optimizers", "optimizer", "slots", "max_second_moment")
    assert codes(optimizers.convert(source, keras())) == [("state-dropped", loc)]
    template = keras("adam", "keras3", *MOMENTS, "max_second_moment")
    done = optimizers.convert(source, template)
    assert done.problems == ()
    assert "amsgrad=True" in done.target_requires[0]
    assert codes(optimizers.convert(torch_adam(), template)) == [("template-mismatch", loc)]
    back = optimizers.convert(template, torch_adam())
    assert value_of(back.hyperparameters[0]["amsgrad"]) is True
    assert [slot.slot for slot in back.slots] == [*MOMENTS, "max_second_moment"]


def test_unequal_steps() -> None:
    source = optimizer("adam", "torch", TORCH_ADAM, *MOMENTS, names=(("w", "b"),))
    source = replace(source, param_steps={"w": 9, "b": 4}, step=Unknown(reason="they differ"))
    target = optimizer("adam", "keras3", {"learning_rate": 0.5}, *MOMENTS, names=(("w", "b"),))
    assert codes(optimizers.convert(source, target)) == [
        ("unequal-steps", ("optimizers", "optimizer", "param_steps"))
    ]
    done = optimizers.convert(source, target, allow=frozenset({"unequal-steps"}))
    assert value_of(done.step) == 9
    assert optimizers.convert(source, source).param_steps == {"w": 9, "b": 4}


def test_a_step_without_slots() -> None:
    source = replace(torch_adam(), slots={})
    assert {code for code, _ in codes(optimizers.convert(source, keras()))} == {"slots-missing"}
    done = optimizers.convert(source, keras(), allow=frozenset({"slots-missing"}))
    assert all(slot.created for slot in done.slots)


def test_float32_counter() -> None:
    source = replace(keras(), step=Known(value=1 << 24))
    assert codes(optimizers.convert(source, torch_adam())) == [
        ("progress-range", ("optimizers", "optimizer", "step"))
    ]


def test_unknown_step_stays_unknown() -> None:
    unknown = Unknown(reason="none", candidates=(Candidate(value=3, source="epoch", condition="count"),))
    done = optimizers.convert(replace(torch_sgd(), step=unknown), keras("sgd"))
    assert done.step is unknown


def test_hyperparameters_that_nobody_tells() -> None:
    bare = optimizer("adam", "torch", {"learning_rate": 0.1})
    done = optimizers.convert(keras(), bare)
    assert codes(done) == [("hyperparameter-missing", group_loc("beta_1"))]
    done = optimizers.convert(keras(), keras())
    assert done.problems == ()
    assert any("beta_1, beta_2, epsilon, weight_decay" in line for line in done.target_requires)


def test_legacy_decay_of_the_rate() -> None:
    source = optimizer(
        "adam",
        "tf_keras_legacy",
        {"learning_rate": 0.1, "learning_rate_decay": 0.5, "beta_1": 0.9, "beta_2": 0.99},
        *MOMENTS,
        step=2,
    )
    assert codes(optimizers.convert(source, keras())) == [
        ("schedule-unsupported", group_loc("learning_rate_decay"))
    ]
    done = optimizers.convert(source, keras(), allow=frozenset({"schedule-unsupported"}))
    assert value_of(done.hyperparameters[0]["learning_rate"]) == pytest.approx(0.05)


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan, 10**400])
@pytest.mark.parametrize("name", ["learning_rate", "beta_2", "epsilon", "weight_decay"])
def test_absurd_numbers(name: str, bad: float) -> None:
    done = optimizers.convert(torch_adam("adamw", **{name: bad}), keras("adamw"))
    assert codes(done)[0] == ("hyperparameter-unsupported", group_loc(name))
    assert done.residual is None or name not in ("beta_2", "epsilon")


@pytest.mark.parametrize("rate", [5e-324, 1e300])
def test_extreme_rates(rate: float) -> None:
    done = optimizers.convert(torch_sgd(learning_rate=rate), keras("sgd"))
    assert {code for code, _ in codes(done)} <= {"form-mismatch"}
    assert done.target_requires


@pytest.mark.parametrize("beta", [-1.0, 0.0, 1.0, 2.0])
def test_extreme_decay_rates(beta: float) -> None:
    done = optimizers.convert(torch_adam(beta_2=beta), keras())
    assert (done.residual is not None) == (0 <= beta < 1)


# --- which optimizers meet


def test_other_algorithms_do_not_meet() -> None:
    done = optimizers.convert(torch_sgd(), keras())
    assert codes(done) == [("optimizer-mismatch", ("optimizers", "optimizer", "algorithm"))]
    assert done.verdict.verdict == "refused"


def test_unknown_optimizers() -> None:
    source = optimizer("unknown", "torch", {"learning_rate": 0.1}, "square_avg")
    assert codes(optimizers.convert(source, keras())) == [
        ("optimizer-unknown", ("optimizers", "optimizer", "algorithm"))
    ]
    done = optimizers.convert(source, replace(source, slots={}))
    assert done.problems == ()
    assert done.ops("square_avg", 0) == ()
    assert done.verdict.verdict == "exact"


def test_as_algorithm() -> None:
    source = optimizer("unknown", "torch", TORCH_ADAM, "exp_avg", "exp_avg_sq", candidates=("adam", "adamw"))
    known = optimizers.as_algorithm(source, "adamw")
    assert (known.algorithm, known.algorithm_candidates) == ("adamw", ())
    assert set(known.slots) == set(MOMENTS)
    assert known.form == {"epsilon": "corrected", "weight_decay": "decoupled"}


# --- the size of a difference


ADAM_AT_19 = {"beta_2": 0.999, "epsilon": 1e-5, "step": 19.0}


@pytest.mark.parametrize("direction", ["corrected -> raw", "raw -> corrected"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_measure(direction: str, dtype: type) -> None:
    rng = np.random.default_rng(0)
    v = np.exp(rng.normal(-20, 6, size=(7, 401))).astype(dtype)
    m = rng.normal(size=v.shape)
    v[0, :5] = 0
    beta, epsilon = ADAM_AT_19["beta_2"], ADAM_AT_19["epsilon"]
    c = math.sqrt(1 - beta**20)
    root = np.sqrt(beta * v.astype(np.float64))  # the least that the next update can have
    corrected, raw = m / (root / c + epsilon) / c, m / (root + epsilon)
    old, new = (corrected, raw) if direction == "corrected -> raw" else (raw, corrected)
    error = np.abs(new / old - 1)[v > 0]
    slots = {"second_moment": {"a": StoredTensor.of_array(v[:3]), "b": StoredTensor.of_array(v[3:])}}
    what = optimizers.Residual(
        formula=f"bias-corrected: {direction}", slot="second_moment", values=ADAM_AT_19
    )
    largest, median = optimizers.measure(slots, what)
    assert largest == pytest.approx(error.max(), rel=1e-6)
    assert median == pytest.approx(np.median(error), rel=1e-2)


def test_measure_of_nothing() -> None:
    what = optimizers.Residual(
        formula="bias-corrected: raw -> corrected", slot="second_moment", values=ADAM_AT_19
    )
    assert optimizers.measure({"second_moment": {"w": tensor(0.0)}}, what) == (0.0, 0.0)


def test_a_fitted_epsilon_takes_the_same_step_at_the_median() -> None:
    v = np.full(SHAPE, 0.25, np.float32)
    source = optimizer(
        "rmsprop",
        "keras3",
        {"learning_rate": 0.5, "rho": 0.9, "epsilon": 0.01, "momentum": 0.0, "centered": False},
        "second_moment",
    )
    source = replace(source, slots={"second_moment": {"w": StoredTensor.of_array(v)}})
    hypers = {"learning_rate": 0.1, "rho": 0.5, "epsilon": 1e-8, "momentum": 0.0, "centered": False}
    target = optimizer("rmsprop", "torch", {**hypers, "weight_decay": 0, "maximize": False}, step=None)
    done = optimizers.convert(source, target)
    assert done.problems == ()
    epsilon = value_of(done.hyperparameters[0]["epsilon"])
    assert isinstance(epsilon, float)
    assert math.sqrt(0.25) + epsilon == pytest.approx(math.sqrt(0.26), rel=1e-4)
    assert done.verdict.verdict == "approximate"
    assert done.residual is not None
    largest, median = optimizers.measure(source.slots, done.residual)
    assert 0 < median <= largest < 3e-3


def test_adagrads_epsilon_moves_into_the_accumulator() -> None:
    hypers: dict[str, Value] = {"learning_rate": 0.5, "epsilon": 0.25}
    source = optimizer("adagrad", "keras3", hypers, "accumulator")
    target = optimizer(
        "adagrad",
        "torch",
        {**hypers, "epsilon": 1e-10, "weight_decay": 0, "learning_rate_decay": 0, "initial_accumulator": 0},
        step=None,
    )
    done = optimizers.convert(source, target)
    assert done.problems == ()
    assert done.verdict.verdict == "exact"
    assert done.ops("accumulator", 0) == (Shift(0.25),)
    assert value_of(done.hyperparameters[0]["epsilon"]) == 0.0
    legacy = optimizers.convert(source, optimizer("adagrad", "tf_keras_legacy", hypers, "accumulator"))
    assert value_of(legacy.hyperparameters[0]["epsilon"]) == 1e-37


def test_a_legacy_class_takes_no_zero() -> None:
    hypers: dict[str, Value] = {"learning_rate": 0.5, "epsilon": 0.0}
    source = optimizer("adagrad", "torch", {**hypers, "weight_decay": 0}, "accumulator")
    done = optimizers.convert(source, optimizer("adagrad", "tf_keras_legacy", {}, "accumulator"))
    assert value_of(done.hyperparameters[0]["epsilon"]) == 1e-37


def test_an_epsilon_that_becomes_another_must_be_told() -> None:
    hypers: dict[str, Value] = {"learning_rate": 0.5, "rho": 0.9, "momentum": 0.0, "centered": False}
    source = optimizer("rmsprop", "keras3", hypers, "second_moment")
    target = optimizer("rmsprop", "tf_keras_legacy", hypers, "second_moment")
    assert codes(optimizers.convert(source, target)) == [("hyperparameter-missing", group_loc("epsilon"))]


def test_a_template_without_a_place_for_a_number() -> None:
    shared: dict[str, Value] = {
        "learning_rate": 0.5,
        "beta_2_decay": -0.8,
        "epsilon_2": 1e-3,
        "clip_threshold": 1.0,
    }
    slots = ("row_variance", "column_variance", "variance")
    source = optimizer("adafactor", "keras3", {**shared, "epsilon_1": 1e-30}, *slots)
    target = optimizer("adafactor", "torch", {**shared, "weight_decay": 0}, step=None)
    assert codes(optimizers.convert(source, target)) == [("template-mismatch", group_loc("epsilon_1"))]
    target = optimizer("adafactor", "torch", {**shared, "weight_decay": 0, "epsilon_1": 1e-8}, step=None)
    done = optimizers.convert(source, target)
    assert done.problems == ()
    assert value_of(done.hyperparameters[0]["epsilon_1"]) == pytest.approx(1e-15)


def test_momentum_products() -> None:
    hypers: dict[str, Value] = {"learning_rate": 0.5, "beta_1": 0.9, "beta_2": 0.99, "epsilon": 1e-7}
    torch_hypers = {**hypers, "momentum_decay": 0.004, "weight_decay": 0, "maximize": False}
    source = optimizer("nadam", "torch", torch_hypers, *MOMENTS)
    number = StoredTensor.of_array(np.float32(0.125))
    source = replace(source, slots={**source.slots, "momentum_product": {"w": number}})
    target = replace(
        optimizer("nadam", "keras3", hypers, *MOMENTS, step=0), scalars={"momentum_product": Known(value=1.0)}
    )
    stopped = optimizers.convert(source, target)
    assert codes(stopped) == [("hyperparameter-unsupported", group_loc("momentum_decay"))]
    done = optimizers.convert(source, target, allow=frozenset({"hyperparameter-unsupported"}))
    assert done.verdict.verdict == "lossy"
    assert value_of(done.scalars["momentum_product"]) == 0.125
    back = replace(target, step=Known(value=9), scalars={"momentum_product": Known(value=0.125)})
    template = replace(source, slots={}, param_steps={})
    done = optimizers.convert(back, template)
    assert done.problems == ()
    assert value_of(done.hyperparameters[0]["momentum_decay"]) == 1.0
    made = next(slot for slot in done.slots if slot.slot == "momentum_product")
    assert (made.created, made.init, made.shape) == (True, 0.125, "scalar")


MUON: dict[str, Value] = {
    "learning_rate": 0.01,
    "momentum": 0.5,
    "nesterov": True,
    "epsilon": 1e-7,
    "ns_steps": 5,
}


def muon(framework: str, **more: Value) -> Optimizer:
    facts: dict[str, Fact] = {name: Known(value=value) for name, value in {**MUON, **more}.items()}
    return Optimizer(
        name="optimizer",
        algorithm="muon",
        framework=framework,
        step=Known(value=3),
        groups=(Group(params=("w",), hyperparameters=facts),),
        slots={"momentum": {"w": tensor()}},
    )


def test_muons_size_has_two_names() -> None:
    """torch's `match_rms_adamw` is Keras' 0.2; what has no counterpart is refused, and a rule in bfloat16."""
    coefficients = {"ns_a": 3.0, "ns_b": -4.0, "ns_c": 2.0, "weight_decay": 0.1}
    named = muon("torch", scaling="match_rms_adamw", **coefficients)
    plain = muon("torch", **coefficients)
    sized = muon("keras3", rms_rate=0.2, **coefficients)
    assert ("form-mismatch", ("optimizers", "optimizer", "form", "orthogonalization")) in codes(
        optimizers.convert(named, sized)
    )
    allow = frozenset({"form-mismatch"})
    there = optimizers.convert(named, muon("keras3"), allow=allow)
    assert there.problems == ()
    assert value_of(there.hyperparameters[0]["rms_rate"]) == 0.2
    assert there.ops("momentum", 0) == (Scale(2.0),)
    back = optimizers.convert(sized, named, allow=allow)
    assert back.problems == ()
    assert back.ops("momentum", 0) == (Scale(0.5),)
    assert codes(optimizers.convert(plain, muon("keras3"), allow=allow)) == [
        ("hyperparameter-unsupported", group_loc("scaling"))
    ]
    assert codes(optimizers.convert(sized, plain, allow=allow)) == [
        ("template-mismatch", group_loc("scaling"))
    ]
    assert codes(optimizers.convert(named, plain)) == [("template-mismatch", group_loc("scaling"))]
    assert optimizers.convert(plain, plain).verdict.verdict == "exact"
