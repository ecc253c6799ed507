"""Master weights beside bfloat16 copies, and models of one precision against another."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("tensorflow")
keras = pytest.importorskip("keras")

from torch import nn  # noqa: E402

from tests.support.command import FIXTURES, convert_here, refused_here  # noqa: E402
from tests.support.twins import (  # noqa: E402
    KerasRun,
    assert_equal,
    both_ways,
    codes,
    keras_run,
    ledger,
    linear,
    torch_run,
)

MASTERS = FIXTURES / "plain" / "bf16-master" / "run.pt"
ROWS = linear("0", 0) + linear("1", 1)


def layer_of(dtype: str, seed: int, step: int = 9) -> KerasRun:
    """Keras' twin of the fixture's `Linear(4, 3)`."""
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3, dtype=dtype)])
    return keras_run("keras3", model, seed, step=step)


def kernel(run: KerasRun) -> Any:
    """The kernel in PyTorch's layout, as float32."""
    return np.asarray(run.model.layers[0].kernel.numpy(), "f4").T


class TestMasters:
    """float32 masters in the optimizer's state beside bfloat16 parameters."""

    @pytest.fixture
    def state(self) -> Any:
        return torch.load(MASTERS, weights_only=True)

    @pytest.mark.parametrize("policy", ["float32", "mixed_bfloat16"])
    def test_a_float32_variable_takes_the_master(self, policy: str, state: Any, tmp_path: Path) -> None:
        fresh = layer_of(policy, 1, step=0).save(tmp_path / "k" / "ckpt")
        report = tmp_path / "report"
        converted = convert_here(MASTERS, tmp_path / "out-1", "--template", fresh, "--report", report)
        resumed = layer_of(policy, 2).load(converted)
        entry = state["optimizer"]["state"][0]
        np.testing.assert_array_equal(kernel(resumed), entry["master_param"].numpy())
        assert not np.array_equal(kernel(resumed), state["module"]["weight"].float().numpy())
        for slot, array in resumed.slots(resumed.model.layers[0].kernel).items():
            np.testing.assert_array_equal(array.T, entry[slot].numpy())
        assert int(resumed.optimizer.iterations) == 6
        entries = ledger(report)
        for name in ("weight", "bias"):
            assert entries[f"param/{name}"]["fate"] in ("copied", "transformed")
            master = entries[f"slot/optimizer/master/{name}"]
            assert (master["fate"], master["allowed_by"]) == ("copied", "")

    def test_a_bfloat16_variable_takes_the_copy_and_the_loss_is_allowed(
        self, state: Any, tmp_path: Path
    ) -> None:
        fresh = layer_of("bfloat16", 1, step=0).save(tmp_path / "k" / "ckpt")
        problems = refused_here("convert", MASTERS, tmp_path / "out", "--template", fresh)
        assert {problem["code"] for problem in problems} == {"precision-loss"}
        params = [("params", "dense-0/kernel"), ("params", "dense-0/bias")]
        slots = [
            ("optimizers", "optimizer", slot, name)
            for slot in ("first_moment", "second_moment")
            for _, name in params
        ]
        assert {tuple(problem["loc"]) for problem in problems} == {*params, *slots}
        report = tmp_path / "report"
        arguments = ("--template", fresh, "--allow", "precision-loss", "--report", report)
        resumed = layer_of("bfloat16", 2).load(convert_here(MASTERS, tmp_path / "out-1", *arguments))
        np.testing.assert_array_equal(kernel(resumed), state["module"]["weight"].float().numpy())
        master = ledger(report)["slot/optimizer/master/weight"]
        assert (master["fate"], master["allowed_by"]) == ("left", "precision-loss")

    def test_a_template_with_masters_keeps_them(self, state: Any, tmp_path: Path) -> None:
        expected = {}
        for index, entry in state["optimizer"]["state"].items():
            expected[index] = torch.rand_like(entry["master_param"])
            entry["master_param"] = expected[index]
        torch.save(state, tmp_path / "run.pt")
        converted = convert_here(tmp_path / "run.pt", tmp_path / "out.pt", "--template", MASTERS)
        back = torch.load(converted, weights_only=True)
        for index, value in expected.items():
            assert torch.equal(back["optimizer"]["state"][index]["master_param"], value)
        assert torch.equal(back["module"]["weight"], state["module"]["weight"])

    def test_a_bfloat16_template_without_masters_is_a_loss(self, tmp_path: Path) -> None:
        model = nn.Linear(4, 3).to(torch.bfloat16)
        optimizer = torch.optim.Adam(model.parameters())
        fresh = {"module": model.state_dict(), "optimizer": optimizer.state_dict(), "iteration": 0}
        torch.save(fresh, tmp_path / "fresh.pt")
        arguments = ("--template", tmp_path / "fresh.pt")
        problems = refused_here("convert", MASTERS, tmp_path / "out.pt", *arguments)
        lost = [problem for problem in problems if problem["code"] == "precision-loss"]
        assert codes(lost) == [("precision-loss", "bias"), ("precision-loss", "weight")]


def torch_model(dtype: str) -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3)).to(getattr(torch, dtype))


def keras_model(dtype: str) -> Any:
    layers = [keras.layers.Dense(n, dtype=dtype) for n in (5, 3)]
    return keras.Sequential([keras.Input((4,)), *layers])


@pytest.mark.parametrize("dtype", ["float64", "float16", "bfloat16"])
def test_models_of_one_precision_cross_bit_for_bit(dtype: str, tmp_path: Path) -> None:
    both_ways(lambda: torch_model(dtype), lambda: keras_model(dtype), ROWS, tmp_path)


@pytest.mark.parametrize(
    ("narrow", "wide"), [("bfloat16", "float32"), ("float16", "float32"), ("float32", "float64")]
)
class TestOtherPrecision:
    """A template of another precision than the run."""

    def test_a_wider_one_holds_every_value(self, narrow: str, wide: str, tmp_path: Path) -> None:
        ours = torch_run(torch_model(narrow), 1)
        fresh = keras_run("keras3", keras_model(wide), 2, step=0).save(tmp_path / "k" / "ckpt")
        converted = convert_here(ours.save(tmp_path / "run.pt"), tmp_path / "out-1", "--template", fresh)
        assert_equal(ours, keras_run("keras3", keras_model(wide), 3).load(converted), ROWS)

        theirs = keras_run("keras3", keras_model(narrow), 4)
        template = torch_run(torch_model(wide), 5).save(tmp_path / "fresh.pt")
        source = theirs.save(tmp_path / "kr" / "ckpt")
        converted = convert_here(source, tmp_path / "out.pt", "--template", template)
        assert_equal(torch_run(torch_model(wide), 6).load(converted), theirs, ROWS)

    def test_a_narrower_one_stops_until_the_loss_is_allowed(
        self, narrow: str, wide: str, tmp_path: Path
    ) -> None:
        ours = torch_run(torch_model(wide), 1)
        run = ours.save(tmp_path / "run.pt")
        fresh = keras_run("keras3", keras_model(narrow), 2, step=0).save(tmp_path / "k" / "ckpt")
        problems = refused_here("convert", run, tmp_path / "out", "--template", fresh)
        assert {problem["code"] for problem in problems} == {"precision-loss"}
        assert len(problems) == 4 * 3  # each parameter and its two moments
        arguments = ("--template", fresh, "--allow", "precision-loss")
        converted = convert_here(run, tmp_path / "out-1", *arguments)
        resumed = keras_run("keras3", keras_model(narrow), 3).load(converted)
        nearest = ours.model.to(getattr(torch, narrow))[0].weight.detach().double().numpy()
        np.testing.assert_array_equal(np.asarray(resumed.model.layers[0].kernel.numpy(), "f8").T, nearest)

        source = keras_run("keras3", keras_model(wide), 4).save(tmp_path / "kr" / "ckpt")
        template = torch_run(torch_model(narrow), 5).save(tmp_path / "fresh.pt")
        problems = refused_here("convert", source, tmp_path / "out.pt", "--template", template)
        assert {problem["code"] for problem in problems} == {"precision-loss"}
