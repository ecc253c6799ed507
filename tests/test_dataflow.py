"""Modules matched by what they take and give, on models drawn at random."""

from __future__ import annotations

import random

import pytest

from ckptconv import dtypes
from ckptconv.alignment import fits_of
from ckptconv.dataflow import by_flow
from ckptconv.document import Param, Site
from ckptconv.fitting import Module, modules
from ckptconv.tensor import MissingTensor, TensorSpec

Links = dict[str, list[str]]


def side(names: list[str], widths: dict[str, int] | None = None) -> list[Module]:
    """Dense layers, square ones of one size unless said otherwise."""
    params = {}
    for name in names:
        size = (widths or {}).get(name, 4)
        spec = TensorSpec(dtype=dtypes.BY_NAME["float32"], shape=(size, size))
        params[f"{name}.weight"] = Param(
            name=f"{name}.weight",
            tensor=MissingTensor(spec=spec, name=name),
            role="kernel",
            layer="dense",
            axes=("out", "in"),
            evidence="declared",
        )
    return modules(params, "torch")


def flow(links: Links, parts: dict[str, str] | None = None) -> list[Site]:
    return [
        Site(
            param=f"{name}.weight",
            after=tuple(f"{one}.weight" for one in before),
            part=(parts or {}).get(name, ""),
        )
        for name, before in links.items()
    ]


def renamed(links: Links, names: dict[str, str]) -> Links:
    return {names[name]: [names[one] for one in before] for name, before in links.items()}


def found(
    ours: Links, theirs: Links, order: list[str], anchors: dict[int, int] | None = None
) -> dict[str, str]:
    sources, targets = side(list(ours)), side(order)
    matched = by_flow(sources, targets, anchors or {}, fits_of(sources, targets), (flow(ours), flow(theirs)))
    return {targets[j].label: sources[i].label for j, i in matched.items()}


@pytest.mark.parametrize("seed", range(20))
def test_equal_layers_are_told_apart_by_their_place(seed: int) -> None:
    """A chain with shortcuts, under other names and declared in another order."""
    rng = random.Random(seed)
    count = rng.randrange(3, 12)
    shortcuts = [[f"a{rng.randrange(i)}"] if i and rng.random() < 0.5 else [] for i in range(count)]
    ours = {f"a{i}": sorted({f"a{i - 1}", *shortcuts[i]}) if i else [] for i in range(count)}
    names = dict(zip(ours, (f"b{n}" for n in rng.sample(range(100), count)), strict=True))
    theirs = renamed(ours, names)
    order = rng.sample(list(theirs), count)
    assert found(ours, theirs, order) == {there: here for here, there in names.items()}


BRANCHES: Links = {"stem": [], "left": ["stem"], "right": ["stem"], "head": ["left", "right"]}
THEIRS = dict(zip(BRANCHES, ("w", "x", "y", "z"), strict=True))


def test_what_stays_alike_is_left_to_others() -> None:
    assert found(BRANCHES, renamed(BRANCHES, THEIRS), ["z", "x", "y", "w"]) == {"w": "stem", "z": "head"}


@pytest.mark.parametrize("told", [("left",), ("left", "right")])
def test_what_is_done_with_the_output_tells_them_apart(told: tuple[str, ...]) -> None:
    part = {name: name for name in told}
    theirs = {THEIRS[name]: name for name in BRANCHES}
    sources, targets = side(list(BRANCHES)), side(["z", "x", "y", "w"])
    flows = (flow(BRANCHES, part), flow(renamed(BRANCHES, THEIRS), {THEIRS[n]: n for n in part}))
    matched = by_flow(sources, targets, {}, fits_of(sources, targets), flows)
    assert {targets[j].label: sources[i].label for j, i in matched.items()} == theirs


def test_one_side_that_does_not_tell_is_no_hindrance() -> None:
    sources, targets = side(list(BRANCHES)), side(list(THEIRS.values()))
    flows = (flow(BRANCHES, {"left": "query", "right": "key"}), flow(renamed(BRANCHES, THEIRS)))
    matched = by_flow(sources, targets, {}, fits_of(sources, targets), flows)
    assert matched == {0: 0, 3: 3}


def test_what_is_matched_already_tells_the_rest_apart() -> None:
    order = ["z", "x", "y", "w"]
    by_hand = {order.index("y"): list(BRANCHES).index("left")}
    expected = {"w": "stem", "z": "head", "x": "right", "y": "left"}
    assert found(BRANCHES, renamed(BRANCHES, THEIRS), order, by_hand) == expected


def test_other_flows_tell_nothing() -> None:
    other = {**BRANCHES, "head": ["left"]}
    assert found(BRANCHES, renamed(other, THEIRS), list(THEIRS.values())) == {}


def test_other_shapes_tell_nothing() -> None:
    sources = side(list(BRANCHES))
    targets = side(list(THEIRS.values()), {"z": 5})
    flows = (flow(BRANCHES), flow(renamed(BRANCHES, THEIRS)))
    assert by_flow(sources, targets, {}, fits_of(sources, targets), flows) == {}


def test_modules_that_no_run_uses_are_no_hindrance() -> None:
    sources, targets = side([*BRANCHES, "unused"]), side(list(THEIRS.values()))
    flows = (flow(BRANCHES), flow(renamed(BRANCHES, THEIRS)))
    matched = by_flow(sources, targets, {}, fits_of(sources, targets), flows)
    assert matched == {0: 0, 3: 3}
