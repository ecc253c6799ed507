"""Parameters that share their memory: crossed, tied on one side only, one layer under two names."""

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

from tests.support.command import convert_here, refused_here  # noqa: E402
from tests.support.twins import (  # noqa: E402
    KINDS,
    Row,
    both_ways,
    codes,
    dense,
    framework,
    keras_run,
    ledger,
    torch_run,
)

X = np.random.default_rng(8).normal(size=(6, 4)).astype("f4")
TOKENS = np.array([[0, 3, 6], [1, 2, 5], [4, 4, 0]])


class Tied(nn.Module):
    """An embedding whose matrix is that of the output layer."""

    tie = True

    def __init__(self) -> None:
        super().__init__()
        self.emb, self.mid = nn.Embedding(7, 5), nn.Linear(5, 5, bias=False)
        self.head = nn.Linear(5, 7, bias=False)
        if self.tie:
            self.head.weight = self.emb.weight

    def forward(self, x: Any) -> Any:
        return self.head(self.mid(self.emb(x)))


class Untied(Tied):
    """The same with a matrix of its own."""

    tie = False


def tied_in_keras(kind: str) -> Callable[[], Any]:
    """Keras' way: one variable, used twice."""
    library = framework(kind)

    class Model(library.Model):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__(name="net")
            self.emb = library.layers.Embedding(7, 5)
            self.mid = library.layers.Dense(5, use_bias=False)

        def call(self, x: Any) -> Any:
            return tf.matmul(self.mid(self.emb(x)), self.emb.embeddings, transpose_b=True)

    def build() -> Any:
        model = Model()
        model(tf.constant(TOKENS))
        return model

    return build


def untied_in_keras() -> Any:
    kl = keras.layers
    layers = [kl.Embedding(7, 5), kl.Dense(5, use_bias=False), kl.Dense(7, use_bias=False)]
    return keras.Sequential([keras.Input((3,), dtype="int64"), *layers])


TIED = [
    Row("emb.weight", lambda model: model.emb.embeddings),
    Row("head.weight", lambda model: model.emb.embeddings),
    Row("mid.weight", lambda model: model.mid.kernel, dense),
]
ALLOW = ("--allow", "assumed-layout")


def shared(path: Path) -> bool:
    state = torch.load(path, weights_only=True)["model"]
    return bool(state["emb.weight"].data_ptr() == state["head.weight"].data_ptr())


class TestTied:
    """One matrix under two names in PyTorch, one variable used twice in Keras."""

    @pytest.mark.parametrize("kind", KINDS)
    def test_it_crosses_both_ways_and_goes_on(self, kind: str, tmp_path: Path) -> None:
        both_ways(
            Tied, tied_in_keras(kind), TIED, tmp_path, kind=kind, allow=["assumed-layout"], batch=TOKENS
        )
        assert shared(tmp_path / "out.pt")
        assert torch_run(Tied(), 9).load(tmp_path / "out.pt").optimizer.state_dict()["state"].keys() == {0, 1}

    def test_a_keras_variable_alone_makes_no_second_matrix(self, tmp_path: Path) -> None:
        source = keras_run("keras3", tied_in_keras("keras3")(), 1).save(tmp_path / "k" / "ckpt")
        fresh = torch_run(Untied(), 2).save(tmp_path / "fresh.pt")
        problems = refused_here("convert", source, tmp_path / "out.pt", "--template", fresh, *ALLOW)
        assert codes(problems) == [("param-unmatched", "head.weight")]
        problems = refused_here("convert", fresh, tmp_path / "out", "--template", source, *ALLOW)
        assert codes(problems) == [("param-unmatched", "head.weight")]

    def test_untying_needs_to_be_allowed_and_gives_both_everything(self, tmp_path: Path) -> None:
        ours = torch_run(Tied(), 1)
        run = ours.save(tmp_path / "run.pt")
        fresh = keras_run("keras3", untied_in_keras(), 2, step=0).save(tmp_path / "k" / "ckpt")
        problems = refused_here("convert", run, tmp_path / "out", "--template", fresh, *ALLOW)
        assert codes(problems) == [("tie-mismatch", "emb.weight")]
        arguments = ("--template", fresh, *ALLOW, "--allow", "tie-mismatch")
        converted = convert_here(run, tmp_path / "out-1", *arguments)
        resumed = keras_run("keras3", untied_in_keras(), 3).load(converted)
        first, last = (resumed.model.layers[n].variables[0] for n in (0, 2))
        matrix, moments = ours.arrays["emb.weight"], ours.slots("emb.weight")
        np.testing.assert_array_equal(first.numpy(), matrix)
        np.testing.assert_array_equal(last.numpy(), matrix.T)
        for slot, array in moments.items():
            np.testing.assert_array_equal(resumed.slots(first)[slot], array)
            np.testing.assert_array_equal(resumed.slots(last)[slot], array.T)

    def test_tying_different_matrices_needs_to_be_allowed_and_keeps_the_first(self, tmp_path: Path) -> None:
        ours = torch_run(Untied(), 1)
        run = ours.save(tmp_path / "run.pt")
        fresh = torch_run(Tied(), 2).save(tmp_path / "fresh.pt")
        problems = refused_here("convert", run, tmp_path / "out.pt", "--template", fresh)
        assert codes(problems) == [("tie-mismatch", "head.weight")]
        report = tmp_path / "report"
        arguments = ("--template", fresh, "--allow", "tie-mismatch", "--report", report)
        converted = convert_here(run, tmp_path / "out.pt", *arguments)
        assert shared(converted)
        resumed = torch_run(Tied(), 3).load(converted)
        np.testing.assert_array_equal(resumed.arrays["emb.weight"], ours.arrays["emb.weight"])
        for slot, array in ours.slots("emb.weight").items():
            np.testing.assert_array_equal(resumed.slots("emb.weight")[slot], array)
        places = ("param", "slot/optimizer/first_moment", "slot/optimizer/second_moment")
        left = {i for i, e in ledger(report).items() if e["allowed_by"] == "tie-mismatch"}
        assert left == {f"{place}/head.weight" for place in places}

    @pytest.mark.parametrize("differs", [None, "value", "slot", "step"])
    def test_tying_what_is_equal_loses_nothing(self, differs: str | None, tmp_path: Path) -> None:
        ours = torch_run(Untied(), 1)
        emb, head = ours.model.emb.weight, ours.model.head.weight
        with torch.no_grad():
            head.copy_(emb)
            for slot in ("exp_avg", "exp_avg_sq"):
                ours.optimizer.state[head][slot].copy_(ours.optimizer.state[emb][slot])
            if differs == "value":
                head[3, 3] += 1
            if differs == "slot":
                ours.optimizer.state[head]["exp_avg_sq"][6, 4] += 1
            if differs == "step":
                ours.optimizer.state[head]["step"] += 1
        run = ours.save(tmp_path / "run.pt")
        fresh = torch_run(Tied(), 2).save(tmp_path / "fresh.pt")
        if differs is not None:
            problems = refused_here("convert", run, tmp_path / "out.pt", "--template", fresh)
            assert codes(problems) == [("tie-mismatch", "head.weight")]
            return
        converted = convert_here(run, tmp_path / "out.pt", "--template", fresh)
        assert shared(converted)
        assert torch.equal(torch_run(Tied(), 3).load(converted).model.head.weight, emb)
