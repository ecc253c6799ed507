"""A converted state restored into a helper-built optimizer goes on exactly; in a stock one it does not."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("tensorflow")
pytest.importorskip("tf_keras")

import keras
import tensorflow as tf
import tf_keras
import torch

import ckptconv
from ckptconv.document import Value
from ckptconv.errors import CkptError
from tests.parity.matrix import difference
from tests.parity.sides import KerasSide, Side, TorchSide, rounded, side

STEPS, EXACT = 20, 1e-10
KERAS = ("keras3", "tf_keras")
Hypers = Mapping[str, Value]
Wrap = Callable[[Any], Any]
Rates = Callable[[int], float]


def wrapped(one: Side, wrap: Wrap) -> Side:
    """The side with its optimizer made anew by a helper."""
    if isinstance(one, TorchSide):
        one.optimizer = wrap(one.optimizer)
        return one
    assert isinstance(one, KerasSide)
    one.optimizer = wrap(type(one.optimizer).from_config(one.optimizer.get_config()))
    one.optimizer.build(one.model.trainable_variables)
    return one


def set_rate(one: Side, rate: float) -> None:
    if isinstance(one, TorchSide):
        for group in one.optimizer.param_groups:
            group["lr"] = rate
    elif float(one.optimizer.learning_rate) != rate:  # type: ignore[attr-defined]
        one.optimizer.learning_rate = rate  # type: ignore[attr-defined]


def train(one: Side, first: int, rates: Rates | None) -> None:
    """`STEPS` updates; with rates, the one of the next update is set after each, as a scheduler does."""
    if rates is None:
        one.train(first, STEPS)
        return
    for number in range(first, first + STEPS):
        set_rate(one, rates(number))
        one.train(number, 1)
    set_rate(one, rates(first + STEPS))


def resumed(
    place: Path,
    source: str,
    target: str,
    algorithm: str,
    hypers: Hypers,
    wrap: Wrap | None,
    *,
    model: str = "mlp",
    source_wrap: Wrap | None = None,
    target_hypers: Hypers | None = None,
    rates: Rates | None = None,
    allow: tuple[str, ...] = (),
) -> tuple[float, ckptconv.Report]:
    """Difference at the end of a run that crossed, and what the report said."""
    run = side(source, model, algorithm, hypers, seed=1, dtype="float64")
    run = wrapped(run, source_wrap) if source_wrap else run
    train(run, 0, rates)
    switch = run.weights()
    (place / "a").mkdir(parents=True, exist_ok=True)
    saved = run.save(place / "a")
    train(run, STEPS, rates)
    theirs = hypers if target_hypers is None else target_hypers
    template = side(target, model, algorithm, theirs, seed=2, dtype="float64").save(place)
    out = place / ("out.pt" if target == "torch" else "out-1")
    told = (
        {} if source == "torch" else {n: str(rounded(v)) for n, v in hypers.items() if n != "learning_rate"}
    )
    told = {name: value.lower() if value in ("True", "False") else value for name, value in told.items()}
    if algorithm == "sgd" and source == "torch":
        told["step"] = str(STEPS)
    report = ckptconv.convert(saved, out, template=template, set_=told, allow=allow, force=True)
    other = side(target, model, algorithm, theirs, seed=3, dtype="float64")
    other = wrapped(other, wrap) if wrap else other
    other.restore(out)
    train(other, STEPS, rates)
    return difference(other.weights(), run.weights(), switch), report


ADAM = {"learning_rate": 0.01, "beta_1": 0.9, "beta_2": 0.999, "epsilon": 1e-3}
RMSPROP = {"learning_rate": 0.005, "rho": 0.9, "epsilon": 1e-2, "momentum": 0.0, "centered": False}
ADAMAX = {"learning_rate": 0.01, "beta_1": 0.9, "beta_2": 0.999, "epsilon": 1e-2}
SGD = {"learning_rate": 0.02, "momentum": 0.9, "nesterov": False}
OF_DECAY: Mapping[str, Hypers] = {
    "adam": ADAM,
    "rmsprop": RMSPROP,
    "sgd": SGD,
    "adadelta": {"learning_rate": 0.5, "rho": 0.9, "epsilon": 1e-6},
    "adagrad": {"learning_rate": 0.05, "epsilon": 1e-3},
}
EPSILON = float(np.float32(1e-3))
WIDE = float(np.float32(1e-2))


def named(report: ckptconv.Report) -> Wrap:
    """The helpers that the report names, each around the one before."""
    (verdict,) = report.verdicts
    calls = re.findall(r"ckptconv\.\w+\.\w+\(optimizer[^)]*\)", " ".join(verdict.residuals))
    assert calls

    def wrap(optimizer: Any) -> Any:
        for call in calls:
            optimizer = eval(call, {"ckptconv": ckptconv, "optimizer": optimizer})  # the report's own text
        return optimizer

    return wrap


def both(place: Path, *args: Any, **more: Any) -> None:
    """The stock class goes clearly another way; with what the report then names, none."""
    stock, report = resumed(place / "stock", *args, None, **more)
    exact, _ = resumed(place / "exact", *args, named(report), **more)
    assert exact < EXACT
    assert stock > 1e-3


def test_adam_in_keras_with_the_corrected_epsilon(tmp_path: Path) -> None:
    both(tmp_path, "torch", "keras3", "adam", ADAM)


@pytest.mark.parametrize(("source", "algorithm"), [("keras3", "adam"), ("tf_keras", "adamw")])
def test_adam_in_torch_with_the_raw_epsilon(tmp_path: Path, source: str, algorithm: str) -> None:
    decay = {"weight_decay": 0.05} if algorithm == "adamw" else {}
    both(tmp_path, source, "torch", algorithm, {**ADAM, **decay})


@pytest.mark.parametrize("target", KERAS)
def test_adamax_in_keras_with_epsilon_in_the_norm(tmp_path: Path, target: str) -> None:
    both(tmp_path, "torch", target, "adamax", ADAMAX)


@pytest.mark.parametrize("source", KERAS)
def test_adamax_in_torch_with_epsilon_after_the_norm(tmp_path: Path, source: str) -> None:
    both(tmp_path, source, "torch", "adamax", ADAMAX)


@pytest.mark.parametrize("target", KERAS)
def test_adagrad_in_keras_with_epsilon_outside(tmp_path: Path, target: str) -> None:
    both(tmp_path, "torch", target, "adagrad", {"learning_rate": 0.05, "epsilon": 1e-2})


@pytest.mark.parametrize("target", KERAS)
def test_an_embedding_and_a_convolution(tmp_path: Path, target: str) -> None:
    exact, _ = resumed(
        tmp_path, "torch", target, "adam", ADAM,
        lambda o: ckptconv.keras.corrected_epsilon(o, EPSILON), model="cnn",
    )  # fmt: skip
    assert exact < EXACT


@pytest.mark.parametrize("centered", [False, True])
@pytest.mark.parametrize("momentum", [0.0, 0.5])
def test_rmsprop_in_keras_with_epsilon_outside(tmp_path: Path, momentum: float, centered: bool) -> None:
    target = "tf_keras" if centered else "keras3"
    both(tmp_path, "torch", target, "rmsprop", {**RMSPROP, "momentum": momentum, "centered": centered})


@pytest.mark.parametrize("centered", [False, True])
@pytest.mark.parametrize("momentum", [0.0, 0.5])
def test_rmsprop_in_torch_with_epsilon_inside(tmp_path: Path, momentum: float, centered: bool) -> None:
    hypers = {**RMSPROP, "momentum": momentum, "centered": centered, "epsilon": 1e-4}
    both(tmp_path, "tf_keras" if centered else "keras3", "torch", "rmsprop", hypers)


@pytest.fixture(params=["float32", "float64"])
def product(request: pytest.FixtureRequest) -> Iterator[None]:
    """torch's default dtype, in which NAdam begins its product of momenta, whatever its parameters are."""
    torch.set_default_dtype(getattr(torch, request.param))
    yield
    torch.set_default_dtype(torch.float32)


NADAM = {**ADAM, "epsilon": 1e-7, "momentum_decay": 0.004}


@pytest.mark.usefixtures("product")
@pytest.mark.parametrize("target", KERAS)
def test_nadam_in_keras_with_a_momentum_decay(tmp_path: Path, target: str) -> None:
    both(tmp_path, "torch", target, "nadam", NADAM, allow=("hyperparameter-unsupported",))


@pytest.mark.usefixtures("product")
@pytest.mark.parametrize("source", KERAS)
def test_nadam_with_a_momentum_decay_back_in_torch(tmp_path: Path, source: str) -> None:
    """torch needs no helper: its product is of the dtype of its parameters once it was loaded."""
    decay = float(np.float32(0.004))
    exact, report = resumed(
        tmp_path, source, "torch", "nadam", NADAM, None,
        source_wrap=lambda o: ckptconv.keras.momentum_decay(o, decay),
    )  # fmt: skip
    assert exact < EXACT
    assert report.verdicts[0].verdict == "exact"


def falling(number: int) -> float:
    return float(np.float32(0.02 * 0.95**number))


@pytest.mark.parametrize("target", KERAS)
@pytest.mark.parametrize("nesterov", [False, True])
def test_momentum_sgd_in_keras_follows_the_rate(tmp_path: Path, target: str, nesterov: bool) -> None:
    both(tmp_path, "torch", target, "sgd", {**SGD, "nesterov": nesterov}, rates=falling)


@pytest.mark.parametrize("source", KERAS)
def test_momentum_sgd_in_torch_follows_the_velocity(tmp_path: Path, source: str) -> None:
    both(tmp_path, source, "torch", "sgd", SGD, rates=falling)


def test_what_a_helper_writes_goes_back(tmp_path: Path) -> None:
    """Its buffer is that of the next rate, which is what a converter takes it for."""
    exact, _ = resumed(
        tmp_path,
        "keras3",
        "torch",
        "sgd",
        SGD,
        None,
        source_wrap=ckptconv.keras.gradient_momentum,
        rates=falling,
    )
    assert exact < EXACT
    exact, _ = resumed(
        tmp_path / "2", "torch", "keras3", "sgd", SGD, None,
        source_wrap=ckptconv.pytorch.velocity_momentum, rates=falling,
    )  # fmt: skip
    assert exact < EXACT


@pytest.mark.parametrize(
    ("target", "algorithm"),
    [("keras3", "adam"), ("tf_keras", "rmsprop"), ("keras3", "sgd"), ("tf_keras", "adadelta")],
)
def test_a_coupled_decay_in_keras(tmp_path: Path, target: str, algorithm: str) -> None:
    theirs = OF_DECAY[algorithm]
    both(
        tmp_path, "torch", target, algorithm, {**theirs, "weight_decay": 0.05},
        target_hypers=theirs, allow=("form-mismatch",),
    )  # fmt: skip


def test_a_decay_reaches_the_moments_in_any_order(tmp_path: Path) -> None:
    decay = float(np.float32(0.05))
    exact, _ = resumed(
        tmp_path, "torch", "keras3", "rmsprop", {**RMSPROP, "weight_decay": 0.05},
        lambda o: ckptconv.keras.outside_epsilon(ckptconv.keras.coupled_decay(o, decay), WIDE),
        target_hypers=RMSPROP, allow=("form-mismatch",),
    )  # fmt: skip
    assert exact < EXACT


@pytest.mark.parametrize("algorithm", ["sgd", "rmsprop", "adadelta", "adagrad"])
def test_a_decoupled_decay_in_torch(tmp_path: Path, algorithm: str) -> None:
    theirs = OF_DECAY[algorithm]
    both(
        tmp_path, "keras3", "torch", algorithm, {**theirs, "weight_decay": 0.05},
        target_hypers=theirs, allow=("form-mismatch",),
    )  # fmt: skip


@pytest.mark.parametrize("package", [keras, tf_keras], ids=KERAS)
def test_a_schedule_moves_the_buffer_in_keras(package: Any) -> None:
    """In a compiled function, against PyTorch's recursion written out."""
    schedule = package.optimizers.schedules.PiecewiseConstantDecay([1, 3], [0.5, 0.25, 0.125])
    weight = tf.Variable(1.0, dtype="float64")
    variable = (keras if package is keras else tf).Variable(1.0, dtype="float64")
    optimizer = ckptconv.keras.gradient_momentum(package.optimizers.SGD(schedule, momentum=0.5))
    optimizer.build([variable])
    update = tf.function(lambda g: optimizer.apply_gradients([(g, variable)]))
    buffer = 0.0
    expected = float(weight)
    for number in range(6):
        gradient = 0.1 * (number + 1)
        buffer = 0.5 * buffer + gradient
        expected -= float(schedule(number)) * buffer
        update(tf.constant(gradient, "float64"))
        assert float(optimizer.momentums[0]) == pytest.approx(
            -float(schedule(number + 1)) * buffer, rel=1e-12
        )
    assert float(variable) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("compiled", [False, True])
def test_repeated_tokens_are_summed_before_they_are_squared(compiled: bool) -> None:
    def second_moment(wrap: Wrap) -> float:
        embedding = keras.layers.Embedding(3, 1)
        embedding.build()
        (table,) = embedding.trainable_variables
        optimizer = wrap(keras.optimizers.Adam(0.1, beta_2=0.5))
        optimizer.build([table])

        def update() -> None:
            with tf.GradientTape() as tape:
                loss = tf.reduce_sum(embedding(tf.constant([1, 1])))
            optimizer.apply(tape.gradient(loss, [table]), [table])

        (tf.function(update) if compiled else update)()
        return float(optimizer._velocities[0][1, 0])

    assert second_moment(ckptconv.keras.densified) == pytest.approx(0.5 * 2.0**2)
    assert second_moment(lambda o: o) == pytest.approx(0.5 * (1 + 1)), "Keras has mended it: drop the helper"


def test_helpers_refuse_what_they_do_not_fit() -> None:
    parameter = torch.nn.Parameter(torch.zeros(2))
    built = keras.optimizers.Adam()
    built.build([keras.Variable(1.0)])
    sgd = torch.optim.SGD([parameter], lr=0.1)
    for call in (
        lambda: ckptconv.keras.corrected_epsilon(keras.optimizers.SGD(), 1e-8),
        lambda: ckptconv.keras.corrected_epsilon(built, 1e-8),
        lambda: ckptconv.keras.densified(object()),
        lambda: ckptconv.keras.densified(tf_keras.optimizers.legacy.Adam()),
        lambda: ckptconv.keras.in_max_epsilon(keras.optimizers.Adam(), 1e-8),
        lambda: ckptconv.pytorch.after_max_epsilon(sgd, 1e-8),
        lambda: ckptconv.keras.coupled_decay(keras.optimizers.AdamW(weight_decay=0.1), 0.1),
        lambda: ckptconv.pytorch.raw_epsilon(sgd, 1e-8),
        lambda: ckptconv.pytorch.inside_epsilon(sgd, 1e-8),
        lambda: ckptconv.pytorch.full_orthogonalization(sgd),
    ):
        with pytest.raises(CkptError) as caught:
            call()
        assert caught.value.problems[0].code == "unsupported-feature"
        assert caught.value.problems[0].loc[0] == "optimizer"
    for call in (
        lambda: ckptconv.keras.outside_epsilon(keras.optimizers.RMSprop(), -1.0),
        lambda: ckptconv.pytorch.decoupled_decay(sgd, float("nan")),
        lambda: ckptconv.pytorch.lion([parameter], lr=-1.0),
    ):
        with pytest.raises(CkptError) as caught:
            call()
        assert caught.value.problems[0].code == "usage"


def test_a_rate_that_a_callback_sets_moves_the_buffer() -> None:
    """tf_keras' callbacks assign the rate's variable itself."""
    variable = tf.Variable(1.0)
    optimizer = tf_keras.optimizers.SGD(0.5, momentum=0.5)
    optimizer.exclude_from_weight_decay(var_names=["bias"])
    optimizer = ckptconv.keras.gradient_momentum(optimizer)
    optimizer = ckptconv.keras.coupled_decay(optimizer, 0.0)
    assert not optimizer._use_weight_decay(tf.Variable(1.0, name="bias"))  # told before, and still known
    optimizer.build([variable])
    optimizer.apply_gradients([(tf.constant(1.0), variable)])
    tf_keras.backend.set_value(optimizer.lr, 0.125)
    assert float(optimizer.momentums[0]) == pytest.approx(-0.125)
    optimizer.learning_rate = 0.25
    assert float(optimizer.momentums[0]) == pytest.approx(-0.25)


def test_a_rate_of_0_loses_the_buffer_and_is_an_error() -> None:
    variable = keras.Variable(1.0)
    optimizer = ckptconv.keras.gradient_momentum(keras.optimizers.SGD(0.1, momentum=0.9))
    optimizer.build([variable])
    with pytest.raises(CkptError) as caught:
        optimizer.learning_rate = 0.0
    assert caught.value.problems[0].loc == ("optimizer", "learning_rate")
    parameter = torch.nn.Parameter(torch.zeros(2))
    sgd = ckptconv.pytorch.velocity_momentum(torch.optim.SGD([parameter], lr=0.1, momentum=0.9))
    sgd.param_groups[0]["lr"] = 0.0
    with pytest.raises(CkptError) as caught:
        sgd.step()
    assert caught.value.problems[0].loc == ("optimizer", "param_groups", 0, "lr")


def test_a_scheduler_holds_the_step_of_before() -> None:
    stock = torch.optim.RMSprop([torch.nn.Parameter(torch.zeros(2))])
    torch.optim.lr_scheduler.StepLR(stock, 1)
    with pytest.raises(CkptError) as caught:
        ckptconv.pytorch.inside_epsilon(stock, 1e-7)
    assert caught.value.problems[0].loc == ("optimizer", "step")


def test_unequal_steps_have_no_one_epsilon() -> None:
    one, other = torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(2))
    adam = ckptconv.pytorch.raw_epsilon(torch.optim.Adam([one, other], eps=1e-3), 1e-3)
    one.grad = torch.ones(2)
    adam.step()
    assert adam.param_groups[0]["eps"] == 1e-3
    other.grad = torch.ones(2)
    with pytest.raises(CkptError) as caught:
        adam.step()
    assert caught.value.problems[0].code == "unequal-steps"


def test_a_run_with_a_helper_goes_on_by_its_own_rule(tmp_path: Path) -> None:
    """Torch to Keras with a helper, on in Keras, and back: `--set` or a description tells of the rule."""
    run = side("torch", "mlp", "adam", ADAM, seed=1, dtype="float64")
    run.train(0, STEPS)
    saved = run.save(tmp_path)
    there = side("keras3", "mlp", "adam", ADAM, seed=2, dtype="float64")
    assert isinstance(there, KerasSide)
    template = there.save(tmp_path)
    there = wrapped(there, lambda o: ckptconv.keras.corrected_epsilon(o, EPSILON))
    described = ckptconv.keras.describe(there.model, there.optimizer)
    for name, skeleton in (("plain", template), ("described", described)):
        report = ckptconv.convert(saved, tmp_path / f"{name}-1", template=skeleton)
        assert report.verdicts[0].verdict == ("exact" if name == "described" else "approximate")
    assert any("corrected_epsilon(optimizer, 0.001" in line for line in report.target_requires)
    there.restore(tmp_path / "plain-1")
    there.train(STEPS, STEPS)
    (tmp_path / "on").mkdir()
    on = there.save(tmp_path / "on")
    run.train(STEPS, STEPS)
    switch = run.weights()
    run.train(2 * STEPS, STEPS)
    told = {"beta_1": str(rounded(0.9)), "beta_2": str(rounded(0.999)), "epsilon": "0.5"}
    spec = ckptconv.keras.describe(there.model, there.optimizer)
    for how in ({"set_": {**told, "corrected_epsilon": str(EPSILON)}}, {"source_spec": spec}):
        back = tmp_path / "back.pt"
        report = ckptconv.convert(on, back, template=saved, force=True, **how)
        assert report.verdicts[0].verdict == "exact"
        again = side("torch", "mlp", "adam", ADAM, seed=3, dtype="float64")
        again.restore(back)
        again.train(2 * STEPS, STEPS)
        assert difference(again.weights(), run.weights(), switch) < EXACT
    model = torch.nn.Linear(2, 1)
    wide = ckptconv.pytorch.raw_epsilon(torch.optim.Adam(model.parameters()), 0.25)
    (captured,) = ckptconv.pytorch.describe(model, wide).optimizers
    assert captured.form["epsilon"] == "raw"
    facts = captured.groups[0].hyperparameters
    assert getattr(facts["raw_epsilon"], "value", None) == 0.25
