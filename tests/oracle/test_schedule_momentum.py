"""OneCycleLR with cycle_momentum=True, torch's default: beta_1 or momentum moves against the rate.

Runs are saved at `DONE` updates, converted and taken up by the other framework, through files. Keras goes on
with the report's own lines: the schedule with its momenta, and the helper. Distances are the largest
difference of a weight relative to the largest distance that one has travelled since the conversion.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import ckptconv
from tests.support.schedule_runs import (
    NEXT,
    PACKAGES,
    SCHEDULE,
    S,
    close,
    code_of,
    keras,
    loaded,
    saved,
    schedule_of,
    tf,
    torch,
    written,
)

EPSILON, LENGTH, DONE = 1e-7, 90, 25
EXACT, NOTICED = 1e-10, 1e-3
HELPER = "optimizer = ckptconv.keras.cycled_momentum(optimizer)"
LOWEST, HIGHEST = 0.8125, 0.9375
CASES = [
    ("adam", "keras"),
    ("sgd", "keras"),
    *(pytest.param(kind, p, marks=pytest.mark.slow) for kind in ("adamw", "nesterov") for p in PACKAGES),
    *(pytest.param(kind, "tf_keras", marks=pytest.mark.slow) for kind in ("adam", "sgd")),
]


@pytest.fixture(autouse=True)
def in_float64() -> Iterator[None]:
    """All weights, moments and rates."""
    was = keras.config.floatx(), keras.config.dtype_policy(), PACKAGES["tf_keras"].backend.floatx()
    keras.config.set_floatx("float64")
    keras.config.set_dtype_policy("float64")
    PACKAGES["tf_keras"].backend.set_floatx("float64")
    yield
    keras.config.set_floatx(was[0])
    keras.config.set_dtype_policy(was[1])
    PACKAGES["tf_keras"].backend.set_floatx(was[2])


def batches(first: int, count: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    for number in range(first, first + count):
        rng = np.random.default_rng(number)
        yield rng.normal(size=(8, 3)), rng.normal(size=(8, 2))


def torch_live(kind: str, *, cycles: bool = True, three_phase: bool = False) -> tuple[Any, Any, Any]:
    torch.manual_seed(1)
    model = torch.nn.Linear(3, 2).double()
    betas, parameters = (0.9, 1 - 2**-10), model.parameters()
    optimizer = {
        "adam": lambda: torch.optim.Adam(parameters, betas=betas, eps=EPSILON),
        "adamw": lambda: torch.optim.AdamW(parameters, betas=betas, eps=EPSILON, weight_decay=0.01),
        "sgd": lambda: torch.optim.SGD(parameters, 0.1, momentum=0.5),
        "nesterov": lambda: torch.optim.SGD(parameters, 0.1, momentum=0.5, nesterov=True),
    }[kind]()
    scheduler = S.OneCycleLR(
        optimizer,
        0.05,
        total_steps=LENGTH,
        cycle_momentum=cycles,
        base_momentum=LOWEST,
        max_momentum=HIGHEST,
        three_phase=three_phase,
    )
    return model, optimizer, scheduler


def momentum_of(group: dict[str, Any]) -> float:
    return float(group["betas"][0] if "betas" in group else group["momentum"])


def torch_steps(live: tuple[Any, Any, Any], first: int, count: int) -> tuple[list[float], list[float]]:
    """Rates and momenta of updates."""
    model, optimizer, scheduler = live
    rates, momenta = [], []
    for x, y in batches(first, count):
        optimizer.zero_grad()
        (model(torch.from_numpy(x)) - torch.from_numpy(y)).square().mean().backward()
        rates.append(float(optimizer.param_groups[0]["lr"]))
        momenta.append(momentum_of(optimizer.param_groups[0]))
        optimizer.step()
        scheduler.step()
    return rates, momenta


def torch_weights(model: Any) -> list[np.ndarray]:
    return [p.detach().numpy().T.copy() for p in model.parameters()]


def keras_live(kind: str, package: str, rate: Any, *, cycled: bool) -> tuple[Any, Any]:
    """A model and an optimizer with all of torch's rule but, where `cycled`, the moving momentum, too."""
    lib, ours = PACKAGES[package], ckptconv.keras
    model = lib.Sequential([lib.layers.Input((3,)), lib.layers.Dense(2)])
    beta_2 = 1 - 2**-10
    optimizer = {
        "adam": lambda: ours.corrected_epsilon(lib.optimizers.Adam(rate, beta_2=beta_2), EPSILON),
        "adamw": lambda: ours.corrected_epsilon(
            lib.optimizers.AdamW(rate, beta_2=beta_2, weight_decay=0.01), EPSILON
        ),
        "sgd": lambda: ours.gradient_momentum(lib.optimizers.SGD(rate, momentum=0.5)),
        "nesterov": lambda: ours.gradient_momentum(lib.optimizers.SGD(rate, momentum=0.5, nesterov=True)),
    }[kind]()
    optimizer = ours.cycled_momentum(optimizer) if cycled else optimizer
    optimizer.build(model.trainable_variables)
    return model, optimizer


def keras_steps(live: tuple[Any, Any], first: int, count: int) -> tuple[list[float], list[float]]:
    """Rates and momenta of updates, compiled."""
    model, optimizer = live
    variables = model.trainable_variables

    @tf.function
    def update(x: Any, y: Any) -> None:
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(tf.square(model(x) - y))
        optimizer.apply_gradients(list(zip(tape.gradient(loss, variables), variables, strict=True)))

    rates, momenta = [], []
    follows = optimizer._learning_rate
    for x, y in batches(first, count):
        rates.append(float(follows(optimizer.iterations)))
        momenta.append(float(follows.momentum_at(optimizer.iterations)))
        update(tf.constant(x), tf.constant(y))
    return rates, momenta


def other_schedule(package: str) -> Any:
    """Of the run's float type, which tf_keras keeps a variable of."""
    return ckptconv.keras.one_cycle(9, [(4.0, 0.5, 1.0), (8.0, 1.0, 0.25)], package=package)


def distance(ours: list[np.ndarray], theirs: list[np.ndarray], start: list[np.ndarray]) -> float:
    moved = max(float(np.abs(a - b).max()) for a, b in zip(theirs, start, strict=True))
    return max(float(np.abs(a - b).max()) for a, b in zip(ours, theirs, strict=True)) / moved


def run_of(tmp_path: Path, kind: str, **options: bool) -> tuple[tuple[Any, Any, Any], Path]:
    live = torch_live(kind, **options)
    torch_steps(live, 0, DONE)
    return live, written(tmp_path / "run.pt", *live)


@pytest.mark.parametrize(("kind", "package"), CASES)
@pytest.mark.parametrize("three_phase", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_from_torch_to_keras(kind: str, package: str, three_phase: bool, tmp_path: Path) -> None:
    live, source = run_of(tmp_path, kind, three_phase=three_phase)
    start, now = torch_weights(live[0]), momentum_of(live[1].param_groups[0])
    fresh = saved(tmp_path / "fresh", *keras_live(kind, package, other_schedule(package), cycled=False))
    report = ckptconv.convert(source, tmp_path / "ckpt", template=fresh, set_={"schedule_unit": "update"})
    assert HELPER in report.target_requires
    (made,) = [line for line in report.target_requires if line.startswith("learning_rate = ")]
    assert f"momentum=[{LOWEST}, {HIGHEST}]" in made
    constructor = report.target_requires[report.target_requires.index(HELPER) - 1]
    name = "momentum" if "SGD" in constructor else "beta_1"
    assert f"{name}={now!r}" in constructor
    torch_rates, torch_momenta = torch_steps(live, DONE, NEXT)
    found = {}
    for cycled in (True, False):
        model, optimizer = keras_live(kind, package, schedule_of(report), cycled=cycled)
        tf.train.Checkpoint(model=model, optimizer=optimizer).read(str(tmp_path / "ckpt")).assert_consumed()
        rates, momenta = keras_steps((model, optimizer), DONE, NEXT)
        close(rates, torch_rates)
        close(momenta, torch_momenta)
        found[cycled] = distance(model.get_weights(), torch_weights(live[0]), start)
    assert found[True] <= EXACT
    assert found[False] > NOTICED


@pytest.mark.parametrize(("kind", "package"), CASES)
def test_from_keras_to_torch(kind: str, package: str, tmp_path: Path) -> None:
    """What `describe` tells of the helper goes into torch's groups, with the momentum of the next update."""
    _, template = run_of(tmp_path, kind)
    phases = [(29.0, 0.002, 0.06), (89.0, 0.06, 1e-5)]
    schedule = ckptconv.keras.one_cycle(LENGTH, phases, momentum=(0.75, 0.875), package=package)
    live = keras_live(kind, package, schedule, cycled=True)
    keras_steps(live, 0, DONE)
    start, source = live[0].get_weights(), saved(tmp_path / "ckpt", *live)
    spec = ckptconv.keras.describe(*live)
    ckptconv.convert(source, tmp_path / "back.pt", template=template, source_spec=spec)
    model, optimizer, scheduler = torch_live(kind)
    state = loaded(tmp_path / "back.pt")
    for part, key in ((model, "model"), (optimizer, "optimizer"), (scheduler, "scheduler")):
        part.load_state_dict(state[key])
    group = optimizer.param_groups[0]
    assert (group["base_momentum"], group["max_momentum"]) == (0.75, 0.875)
    rates, momenta = torch_steps((model, optimizer, scheduler), DONE, NEXT)
    keras_rates, keras_momenta = keras_steps(live, DONE, NEXT)
    close(rates, keras_rates)
    close(momenta, keras_momenta)
    assert distance(torch_weights(model), live[0].get_weights(), start) <= EXACT


def test_the_note_of_a_converted_file_tells_it(tmp_path: Path) -> None:
    """Back without a spec: the groups and the scheduler are the source's, key by key."""
    _, source = run_of(tmp_path, "adam")
    fresh = saved(tmp_path / "fresh", *keras_live("adam", "keras", other_schedule("keras"), cycled=False))
    ckptconv.convert(source, tmp_path / "ckpt", template=fresh)
    template = written(tmp_path / "fresh.pt", *torch_live("adam"))
    ckptconv.convert(tmp_path / "ckpt", tmp_path / "back.pt", template=template)
    theirs, ours = loaded(source), loaded(tmp_path / "back.pt")
    group, own = theirs["optimizer"]["param_groups"][0], ours["optimizer"]["param_groups"][0]
    for name in ("lr", "initial_lr", "max_lr", "min_lr", "betas", "base_momentum", "max_momentum"):
        assert own[name] == pytest.approx(group[name], rel=1e-12)
    assert ours["scheduler"]["_schedule_phases"] == theirs["scheduler"]["_schedule_phases"]


@pytest.mark.parametrize(("cycled", "cycles"), [(True, False), (False, True)])
def test_another_cycle_than_the_template_is_refused(cycled: bool, cycles: bool, tmp_path: Path) -> None:
    """Whether the momentum moves is told by the helper, not by the schedule's numbers alone."""
    template = written(tmp_path / "fresh.pt", *torch_live("adam", cycles=cycles))
    phases = [(29.0, 0.002, 0.06), (89.0, 0.06, 1e-5)]
    live = keras_live(
        "adam", "keras", ckptconv.keras.one_cycle(LENGTH, phases, momentum=(0.8, 0.9)), cycled=cycled
    )
    source, spec = saved(tmp_path / "ckpt", *live), ckptconv.keras.describe(*live)
    found = code_of(source, tmp_path / "no.pt", template=template, source_spec=spec)
    assert found == ("schedule-unsupported", ("schedules", "optimizer.learning_rate"))


def test_a_legacy_optimizer_is_refused(tmp_path: Path) -> None:
    _, source = run_of(tmp_path, "adam")
    lib = PACKAGES["tf_keras"]
    model = lib.Sequential([lib.layers.Input((3,)), lib.layers.Dense(2)])
    optimizer = lib.optimizers.legacy.Adam(other_schedule("tf_keras"), epsilon=EPSILON)
    optimizer.apply_gradients([(tf.zeros_like(v), v) for v in model.trainable_variables])
    template = saved(tmp_path / "fresh", model, optimizer)
    assert code_of(source, tmp_path / "no", template=template) == ("schedule-unsupported", SCHEDULE)


@pytest.mark.parametrize(
    ("make", "loc"),
    [
        (lambda k, s: k.Adam(0.1), ("optimizer", "learning_rate")),
        (lambda k, s: k.Adam(ckptconv.keras.one_cycle(9, [(4.0, 0.1, 1.0)])), ("optimizer", "learning_rate")),
        (lambda k, s: k.SGD(s), ("optimizer", "momentum")),
        (lambda k, s: k.RMSprop(s), ("optimizer",)),
    ],
    ids=["a plain rate", "no momenta", "no buffers", "another class"],
)
def test_what_the_helper_refuses(make: Any, loc: tuple[str, ...]) -> None:
    schedule = ckptconv.keras.one_cycle(9, [(4.0, 0.1, 1.0), (8.0, 1.0, 0.01)], momentum=(0.8, 0.9))
    with pytest.raises(ckptconv.CkptError) as caught:
        ckptconv.keras.cycled_momentum(make(keras.optimizers, schedule))
    (problem,) = caught.value.problems
    assert (problem.code, problem.loc) == ("unsupported-feature", loc)


def test_a_keras_file_says_the_momenta(tmp_path: Path) -> None:
    """In its schedule's config, so that the way back needs no spec."""
    _, source = run_of(tmp_path, "adam")
    model, _ = keras_live("adam", "keras", other_schedule("keras"), cycled=False)
    plain = keras.optimizers.Adam(other_schedule("keras"), beta_2=1 - 2**-10, epsilon=EPSILON)
    model.compile(plain)
    plain.build(model.trainable_variables)
    model.save(tmp_path / "fresh.keras")
    ckptconv.convert(source, tmp_path / "out.keras", template=tmp_path / "fresh.keras")
    restored = keras.saving.load_model(tmp_path / "out.keras")
    assert list(restored.optimizer._learning_rate.momentum) == [LOWEST, HIGHEST]
    restored.save(tmp_path / "later.keras")
    template = written(tmp_path / "fresh.pt", *torch_live("adam"))
    ckptconv.convert(tmp_path / "later.keras", tmp_path / "back.pt", template=template)
    group, own = (loaded(p)["optimizer"]["param_groups"][0] for p in (source, tmp_path / "back.pt"))
    assert own["betas"] == pytest.approx(group["betas"], rel=1e-12)
    assert (own["base_momentum"], own["max_momentum"]) == (LOWEST, HIGHEST)


@pytest.mark.parametrize("name", ["Adam", "AdamW"])
def test_an_edited_step_takes_rate_and_momentum_along(name: str, tmp_path: Path) -> None:
    model = torch.nn.Linear(3, 2)
    optimizer = getattr(torch.optim, name)(model.parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=50)
    for update in range(20):
        if update == 10:
            parts = {"model": model, "optimizer": optimizer, "scheduler": schedule}
            torch.save({part: value.state_dict() for part, value in parts.items()}, tmp_path / "run.pt")
        model(torch.ones(4, 3)).sum().backward()
        optimizer.step()
        schedule.step()
    ckptconv.convert(tmp_path / "run.pt", tmp_path / "out.pt", set_={"step": "20"})
    group = torch.load(tmp_path / "out.pt")["optimizer"]["param_groups"][0]
    assert group["lr"] == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-12)
    assert group["betas"] == pytest.approx(optimizer.param_groups[0]["betas"], rel=1e-12)
