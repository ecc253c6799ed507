"""Which module is which: names that mislead, orders that differ, modules without a partner.

All layers have equal shapes where nothing else is said, so that only names and order can tell them apart;
their kernels are square, whose layout is settled by allowing PyTorch's convention.
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

from tests.support.command import convert_here, refused_here  # noqa: E402
from tests.support.twins import (  # noqa: E402
    STEP,
    Row,
    both_ways,
    codes,
    dense,
    framework,
    keras_run,
    ledger,
    linear,
    torch_run,
)

ALLOW = ["assumed-layout"]


class Net(nn.Module):
    """A module with submodules of these names, in this order."""

    def __init__(self, **layers: nn.Module) -> None:
        super().__init__()
        for name, module in layers.items():
            setattr(self, name, module)


def squares(*names: str) -> Callable[[], Any]:
    return lambda: Net(**{name: nn.Linear(4, 4) for name in names})


def keras_net(**widths: int) -> Callable[[], Any]:
    """A subclassed Keras model with dense layers of these names and widths, in this order."""

    class Model(keras.Model):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__(name="net")
            for name, width in widths.items():
                setattr(self, name, keras.layers.Dense(width))

        def call(self, x: Any) -> Any:
            for name in widths:
                x = getattr(self, name)(x)
            return x

    def build() -> Any:
        model = Model()
        model(tf.zeros((1, 4)))
        return model

    return build


def sequential(*widths: int) -> Callable[[], Any]:
    return lambda: keras.Sequential([keras.Input((4,)), *(keras.layers.Dense(n) for n in widths)])


def attribute(name: str, variable: str) -> Callable[[Any], Any]:
    return lambda model: getattr(getattr(model, name), variable)


def pairs(**partners: str) -> list[Row]:
    """PyTorch's module name -> Keras' attribute."""
    return [
        row
        for ours, theirs in partners.items()
        for row in (
            Row(f"{ours}.weight", attribute(theirs, "kernel"), dense),
            Row(f"{ours}.bias", attribute(theirs, "bias")),
        )
    ]


class TestEqualShapes:
    """Only names and order tell layers apart."""

    def test_numbers_count_modules_and_are_no_names(self, tmp_path: Path) -> None:
        """`Sequential` numbers activations too: 0, 2, 4 are Keras' layers 0, 1, 2, never 2 <-> 2."""

        def ours() -> nn.Module:
            modules = [nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)]
            return nn.Sequential(*modules)

        rows = linear("0", 0) + linear("2", 1) + linear("4", 2)
        both_ways(ours, sequential(4, 4, 4), rows, tmp_path, allow=ALLOW)

    @pytest.mark.parametrize("kind", ["keras3", "tf_keras"])
    def test_nor_are_they_where_both_sides_number(self, kind: str, tmp_path: Path) -> None:
        """`blocks.2` is the second layer of the `Sequential` and the third of Keras' list."""
        library = framework(kind)

        class Listed(library.Model):  # type: ignore[misc, name-defined]
            def __init__(self) -> None:
                super().__init__(name="net")
                self.blocks = [library.layers.Dense(4) for _ in range(3)]

            def call(self, x: Any) -> Any:
                for block in self.blocks:
                    x = block(x)
                return x

        def theirs() -> Any:
            model = Listed()
            model(tf.zeros((1, 4)))
            return model

        def ours() -> nn.Module:
            modules = [nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)]
            return Net(blocks=nn.Sequential(*modules))

        rows = [
            row
            for n in range(3)
            for row in (
                Row(f"blocks.{2 * n}.weight", lambda model, n=n: model.blocks[n].kernel, dense),
                Row(f"blocks.{2 * n}.bias", lambda model, n=n: model.blocks[n].bias),
            )
        ]
        both_ways(ours, theirs, rows, tmp_path, kind=kind, allow=ALLOW)

    def test_equal_names_win_over_the_order(self, tmp_path: Path) -> None:
        theirs = keras_net(a=4, b=4, c=4)
        both_ways(squares("c", "a", "b"), theirs, pairs(a="a", b="b", c="c"), tmp_path, allow=ALLOW)

    def test_partly_equal_names_are_anchors_of_the_order(self, tmp_path: Path) -> None:
        theirs = keras_net(first=4, mid=4, last=4)
        rows = pairs(enc="first", mid="mid", dec="last")
        both_ways(squares("enc", "mid", "dec"), theirs, rows, tmp_path, allow=ALLOW)

    def test_anchors_that_cross_the_order_stop(self, tmp_path: Path) -> None:
        """`dec` is first here and last there: for the others no order is left to trust."""
        run = torch_run(squares("dec", "enc", "mid")(), 1).save(tmp_path / "run.pt")
        fresh = keras_run("keras3", keras_net(first=4, second=4, dec=4)(), 2).save(tmp_path / "k" / "ckpt")
        arguments = ("--template", fresh, "--allow", "assumed-layout")
        problems = refused_here("convert", run, tmp_path / "out", *arguments)
        assert ("param-unmatched", "first/kernel") in codes(problems)
        problems = refused_here("convert", fresh, tmp_path / "out.pt", "--template", run, *arguments[2:])
        assert ("param-unmatched", "enc.weight") in codes(problems)

    def test_without_common_names_the_order_decides_and_the_report_says_so(self, tmp_path: Path) -> None:
        """Models that declare equal layers in different orders cannot be told from models that agree."""
        theirs = keras_net(one=4, two=4)
        both_ways(squares("x", "y"), theirs, pairs(x="one", y="two"), tmp_path, allow=ALLOW)
        run, fresh = tmp_path / "run.pt", tmp_path / "fresh" / "ckpt-1"
        named = torch_run(squares("one", "two")(), 1).save(tmp_path / "named.pt")
        for source, matched in ((run, "structure"), (named, "name")):
            report = tmp_path / f"{matched}.json"
            arguments = ("--template", fresh, "--allow", "assumed-layout", "--report", report)
            convert_here(source, tmp_path / f"out-{matched}", *arguments)
            params = {i: entry for i, entry in ledger(report).items() if i.startswith("param/")}
            assert len(params) == 4
            assert all(e["evidence"].endswith(f", by {matched}") for e in params.values())


def three() -> nn.Module:
    return Net(a=nn.Linear(4, 5), b=nn.Linear(5, 3), c=nn.Linear(3, 2))


EVERYTHING = {f"{i}.{name}" for i in range(3) for name in ("weight", "bias")} - {"2.weight"} | {
    f"dense-{i}/{name}" for i in range(2) for name in ("kernel", "bias")
}
"""Of three layers against two: each is listed, those of one size as one where their numbers tell which."""


class TestModulesWithoutPartner:
    """One side has a layer more."""

    def test_a_named_one_stops_in_both_directions(self, tmp_path: Path) -> None:
        run = torch_run(three(), 1).save(tmp_path / "run.pt")
        theirs = keras_run("keras3", keras_net(a=5, b=3)(), 2).save(tmp_path / "k" / "ckpt")
        problems = refused_here("convert", run, tmp_path / "out", "--template", theirs)
        assert codes(problems) == [("param-unmatched", "c.bias"), ("param-unmatched", "c.weight")]
        problems = refused_here("convert", theirs, tmp_path / "out.pt", "--template", run)
        assert codes(problems) == [("param-unmatched", "c.bias"), ("param-unmatched", "c.weight")]

    def test_allowed_it_is_left_behind_with_its_slots(self, tmp_path: Path) -> None:
        ours = torch_run(three(), 1)
        theirs = keras_net(a=5, b=3)
        fresh = keras_run("keras3", theirs(), 2, step=0).save(tmp_path / "k" / "ckpt")
        report = tmp_path / "report"
        arguments = ("--template", fresh, "--allow", "param-unmatched", "--report", report)
        resumed = keras_run("keras3", theirs(), 3).load(
            convert_here(ours.save(tmp_path / "run.pt"), tmp_path / "out-1", *arguments)
        )
        for row in pairs(a="a", b="b"):
            variable = row.keras(resumed.model)
            np.testing.assert_array_equal(variable.numpy(), row.to_keras(ours.arrays[row.torch]))
            for slot, array in ours.slots(row.torch).items():
                np.testing.assert_array_equal(resumed.slots(variable)[slot], row.to_keras(array))
        assert int(resumed.optimizer.iterations) == STEP
        left = {i for i, e in ledger(report).items() if e["allowed_by"] == "param-unmatched"}
        places = ("param", "slot/optimizer/first_moment", "slot/optimizer/second_moment")
        assert left == {f"{place}/c.{name}" for place in places for name in ("weight", "bias")}

    def test_allowed_the_template_keeps_its_own(self, tmp_path: Path) -> None:
        theirs = keras_run("keras3", keras_net(a=5, b=3)(), 1)
        source = theirs.save(tmp_path / "k" / "ckpt")
        own = torch_run(three(), 2)
        report = tmp_path / "report"
        arguments = ("--template", own.save(tmp_path / "own.pt"), "--allow", "param-unmatched")
        target = convert_here(source, tmp_path / "out.pt", *arguments, "--report", report)
        resumed = torch_run(three(), 3).load(target)
        for name in ("c.weight", "c.bias"):
            np.testing.assert_array_equal(resumed.arrays[name], own.arrays[name])
            assert ledger(report)[f"template/{name}"]["fate"] == "kept-from-template"
            for slot, array in own.slots(name).items():
                np.testing.assert_array_equal(resumed.slots(name)[slot], array)
        np.testing.assert_array_equal(resumed.arrays["a.weight"], theirs.model.a.kernel.numpy().T)

    @pytest.mark.parametrize("allow", [(), ("--allow", "param-unmatched")])
    def test_without_names_nothing_tells_which_one_it_is(
        self, allow: tuple[str, ...], tmp_path: Path
    ) -> None:
        ours = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3), nn.Linear(3, 2))
        run = torch_run(ours, 1).save(tmp_path / "run.pt")
        theirs = keras_run("keras3", sequential(5, 3)(), 2).save(tmp_path / "k" / "ckpt")
        problems = refused_here("convert", run, tmp_path / "out", "--template", theirs, *allow)
        assert codes(problems[:1]) == [("template-mismatch", "2.weight")]
        listed = codes(problems[1:])
        assert {code for code, _ in listed} == (set() if allow else {"param-unmatched"})
        assert allow or {name for _, name in listed} == EVERYTHING
        problems = refused_here("convert", theirs, tmp_path / "out.pt", "--template", run, *allow)
        assert codes(problems[:1]) == [("template-mismatch", "2.weight")]
        assert codes(problems[1:]) == listed


@pytest.mark.parametrize(
    ("ours", "theirs", "place"),
    [
        (lambda: nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3)), sequential(6, 3), "dense-0/kernel"),
        (lambda: nn.Sequential(nn.Linear(4, 5), nn.Conv1d(5, 3, 2)), sequential(5, 3), "dense-1/kernel"),
        (
            lambda: nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3, bias=False)),
            sequential(5, 3),
            "dense-1/kernel",
        ),
        (lambda: Net(a=nn.Linear(4, 5), b=nn.Linear(5, 3)), keras_net(a=6, b=3), "a/kernel"),
    ],
    ids=["width", "kind", "bias", "width-of-a-name"],
)
def test_a_template_of_another_architecture_names_the_first_difference(
    ours: Callable[[], Any], theirs: Callable[[], Any], place: str, tmp_path: Path
) -> None:
    run = torch_run(ours(), 1).save(tmp_path / "run.pt")
    fresh = keras_run("keras3", theirs(), 2).save(tmp_path / "k" / "ckpt")
    problem, *listed = refused_here("convert", run, tmp_path / "out", "--template", fresh)
    assert (problem["code"], problem["loc"]) == ("shape-mismatch", ["params", place])
    assert {one["code"] for one in listed} == {"param-unmatched"}
    problem, *listed = refused_here("convert", fresh, tmp_path / "out.pt", "--template", run)
    assert problem["code"] == "shape-mismatch"
    assert {one["code"] for one in listed} == {"param-unmatched"}
    assert not list(tmp_path.glob("out*"))
