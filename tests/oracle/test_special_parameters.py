"""Parameters with a history of their own: frozen, never updated, scalar, empty, strided.

Every value, slot and statistic is random and compared through a table that knows nothing of ckptconv.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
tf = pytest.importorskip("tensorflow")
keras = pytest.importorskip("keras")
pytest.importorskip("tf_keras")

from torch import nn  # noqa: E402

from ckptconv.adapters.pytorch import describe  # noqa: E402
from ckptconv.skeleton import write_skeleton  # noqa: E402
from tests.support.command import convert_here, refused_here  # noqa: E402
from tests.support.twins import (  # noqa: E402
    KINDS,
    STEP,
    Row,
    TorchRun,
    assert_equal,
    both_ways,
    codes,
    dense,
    framework,
    keras_run,
    layer,
    ledger,
    linear,
    steps,
    torch_run,
)

X = np.random.default_rng(8).normal(size=(6, 4)).astype("f4")
ALLOW = ("--allow", "assumed-layout")


def dense_model(kind: str, frozen: tuple[int, ...] = ()) -> Callable[[], Any]:
    library = framework(kind)

    def build() -> Any:
        layers = [library.layers.Dense(n) for n in (5, 3, 2)]
        model = library.Sequential([library.Input((4,)), *layers])
        for number in frozen:
            model.layers[number].trainable = False
        return model

    return build


def linear_model(frozen: tuple[int, ...] = ()) -> nn.Sequential:
    model = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3), nn.Linear(3, 2))
    for number in frozen:
        model[number].requires_grad_(False)
    return model


DENSE = linear("0", 0) + linear("1", 1) + linear("2", 2)


class Twice(nn.Module):
    """One layer under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 4)
        self.b, self.c = self.a, nn.Linear(4, 2)

    def forward(self, x: Any) -> Any:
        return self.c(self.b(torch.tanh(self.a(x))))


class KerasTwice(keras.Model):  # type: ignore[misc, name-defined]
    """The same in Keras."""

    def __init__(self) -> None:
        super().__init__(name="net")
        self.a = keras.layers.Dense(4)
        self.b, self.c = self.a, keras.layers.Dense(2)

    def call(self, x: Any) -> Any:
        return self.c(self.b(tf.tanh(self.a(x))))


def test_a_layer_under_two_names(tmp_path: Path) -> None:
    def build() -> Any:
        model = KerasTwice()
        model(X)
        return model

    rows = [
        Row(f"{name}.{ours}", lambda m, n=name, v=theirs: getattr(getattr(m, n), v), way)
        for name in "abc"
        for ours, theirs, way in (("weight", "kernel", dense), ("bias", "bias", lambda x: x))
    ]
    both_ways(Twice, build, rows, tmp_path, allow=["assumed-layout"], batch=X)


class TestFrozen:
    """`requires_grad` False and not in the optimizer; `trainable = False`."""

    @pytest.mark.parametrize("kind", KINDS)
    def test_it_crosses_both_ways_and_goes_on(self, kind: str, tmp_path: Path) -> None:
        ours = lambda: linear_model(frozen=(1,))  # noqa: E731
        both_ways(ours, dense_model(kind, frozen=(1,)), DENSE, tmp_path, kind=kind, batch=X)

    def test_state_of_what_the_target_freezes_has_no_place(self, tmp_path: Path) -> None:
        ours = torch_run(linear_model(), 1)
        run = ours.save(tmp_path / "run.pt")
        build = dense_model("keras3", frozen=(1,))
        fresh = keras_run("keras3", build(), 2, step=0).save(tmp_path / "k" / "ckpt")
        problems = refused_here("convert", run, tmp_path / "out", "--template", fresh)
        assert {p["code"] for p in problems} == {"state-dropped"}
        places = {tuple(p["loc"][-2:]) for p in problems}
        slots = ("first_moment", "second_moment")
        assert places == {(slot, name) for slot in slots for name in ("1.weight", "1.bias")}
        report = tmp_path / "report"
        arguments = ("--template", fresh, "--allow", "state-dropped", "--report", report)
        converted = convert_here(run, tmp_path / "out-1", *arguments)
        resumed = keras_run("keras3", build(), 3).load(converted)
        np.testing.assert_array_equal(resumed.model.layers[1].kernel.numpy(), ours.arrays["1.weight"].T)
        dropped = {i for i, e in ledger(report).items() if e["allowed_by"] == "state-dropped"}
        assert dropped == {f"slot/optimizer/{slot}/{name}" for slot, name in places}

    def test_what_was_frozen_in_keras_has_no_state_yet_in_torch(self, tmp_path: Path) -> None:
        theirs = keras_run("keras3", dense_model("keras3", frozen=(1,))(), 1)
        source = theirs.save(tmp_path / "k" / "ckpt")
        model = linear_model()
        optimizer = torch.optim.Adam(model.parameters())
        fresh = TorchRun(model=model, optimizer=optimizer).save(tmp_path / "fresh.pt")
        converted = convert_here(source, tmp_path / "out.pt", "--template", fresh)
        resumed = torch_run(linear_model(), 2).load(converted)
        assert not resumed.slots("1.weight")
        assert not resumed.slots("1.bias")
        assert_equal(resumed, theirs, DENSE)

    def test_a_gap_between_equal_shapes_needs_a_spec(self, tmp_path: Path) -> None:
        """Four states, six parameters of two shapes: which ones were trained cannot be told."""
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
        model[1].requires_grad_(False)
        ours = torch_run(model, 1)
        run, spec = ours.save(tmp_path / "run.pt"), tmp_path / "described.json"

        def build() -> Any:
            layers = [keras.layers.Dense(4, trainable=n != 1) for n in range(3)]
            return keras.Sequential([keras.Input((4,)), *layers])

        fresh = keras_run("keras3", build(), 2, step=0).save(tmp_path / "k" / "ckpt")
        problems = refused_here("convert", run, tmp_path / "out", "--template", fresh, *ALLOW)
        assert codes(problems) == [("order-ambiguous", "optimizer")]
        write_skeleton(describe(ours.model, ours.optimizer), spec)
        converted = convert_here(run, tmp_path / "out-1", "--template", fresh, "--source-spec", spec)
        assert_equal(ours, keras_run("keras3", build(), 3).load(converted), DENSE)


class TestNeverUpdated:
    """Parameters in the optimizer that never got a gradient have no state in PyTorch."""

    UNUSED = ("1.weight", "1.bias")

    @pytest.mark.parametrize("kind", KINDS)
    def test_their_slots_are_created_and_listed(self, kind: str, tmp_path: Path) -> None:
        ours = torch_run(linear_model(), 1, without=self.UNUSED)
        assert not ours.slots("1.weight")
        run = ours.save(tmp_path / "run.pt")
        build = dense_model(kind)
        fresh = keras_run(kind, build(), 2, step=0).save(tmp_path / "k" / "ckpt")
        report = tmp_path / "report"
        converted = convert_here(run, tmp_path / "out-1", "--template", fresh, "--report", report)
        assert_equal(ours, keras_run(kind, build(), 3).load(converted), DENSE, fresh_slots=self.UNUSED)
        entries = ledger(report).items()
        created = {i for i, e in entries if e["fate"] == "created" and i.startswith("slot/")}
        slots = ("first_moment", "second_moment")
        assert created == {f"slot/optimizer/{slot}/{name}" for slot in slots for name in self.UNUSED}

    def test_steps_that_differ_need_to_be_allowed(self, tmp_path: Path) -> None:
        ours = torch_run(linear_model(), 1)
        ours.optimizer.state[ours.model[2].bias]["step"].fill_(4)
        run = ours.save(tmp_path / "run.pt")
        build = dense_model("keras3")
        fresh = keras_run("keras3", build(), 2, step=0).save(tmp_path / "k" / "ckpt")
        problems = refused_here("convert", run, tmp_path / "out", "--template", fresh)
        assert codes(problems) == [("unequal-steps", "param_steps")]
        arguments = ("--template", fresh, "--allow", "unequal-steps")
        converted = convert_here(run, tmp_path / "out-1", *arguments)
        assert_equal(ours, keras_run("keras3", build(), 3).load(converted), DENSE)  # the step is 9

    def test_steps_that_differ_stay_so_in_torch(self, tmp_path: Path) -> None:
        ours = torch_run(linear_model(), 1)
        ours.optimizer.state[ours.model[2].bias]["step"].fill_(4)
        fresh = torch_run(linear_model(), 2).save(tmp_path / "fresh.pt")
        target = convert_here(ours.save(tmp_path / "run.pt"), tmp_path / "out.pt", "--template", fresh)
        resumed = torch_run(linear_model(), 3).load(target)
        assert steps(resumed) == {4, STEP}
        assert int(resumed.optimizer.state[resumed.model[2].bias]["step"]) == 4


class Special(nn.Module):
    """A scalar and an empty parameter, a scalar buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.empty(()))
        self.nothing = nn.Parameter(torch.empty(0, 3))
        self.register_buffer("limit", torch.empty(()))


class KerasSpecial(keras.layers.Layer):  # type: ignore[misc, name-defined]
    """The same in Keras."""

    def build(self, _shape: Any) -> None:
        self.gain = self.add_weight(shape=(), name="gain")
        self.nothing = self.add_weight(shape=(0, 3), name="nothing")
        self.limit = self.add_weight(shape=(), name="limit", trainable=False)

    def call(self, x: Any) -> Any:
        return x * self.gain


def test_scalars_and_empty_tensors(tmp_path: Path) -> None:
    both_ways(
        lambda: nn.Sequential(nn.Linear(4, 5), Special()),
        lambda: keras.Sequential([keras.Input((4,)), keras.layers.Dense(5), KerasSpecial()]),
        linear("0", 0) + [Row(f"1.{name}", layer(1, name)) for name in ("gain", "nothing", "limit")],
        tmp_path,
    )


def strided() -> nn.Sequential:
    """A transposed weight, a slice of a larger storage, and two halves of one storage."""
    model = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3), nn.Linear(3, 2), nn.Linear(2, 2))
    model[0].weight = nn.Parameter(torch.zeros(4, 5).t())
    model[1].weight = nn.Parameter(torch.zeros(9, 20)[2:8:2, 1:20:4])
    both = torch.zeros(4)
    model[2].bias, model[3].bias = nn.Parameter(both[:2]), nn.Parameter(both[2:])
    return model


def test_views_of_larger_storages(tmp_path: Path) -> None:
    assert not strided()[0].weight.is_contiguous()
    both_ways(
        strided,
        lambda: keras.Sequential([keras.Input((4,)), *(keras.layers.Dense(n) for n in (5, 3, 2, 2))]),
        DENSE + linear("3", 3),
        tmp_path,
        allow=["assumed-layout"],
        batch=X,
    )
    state = torch.load(tmp_path / "run.pt", weights_only=True)["model"]
    assert state["0.weight"].stride() == (1, 5)
    assert state["1.weight"].stride() == (40, 4)
    assert state["2.bias"].untyped_storage().data_ptr() == state["3.bias"].untyped_storage().data_ptr()
