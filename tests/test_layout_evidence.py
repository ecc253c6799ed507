"""No order of axes is ever decided by sizes: every layer of the catalog, in every pair of frameworks.

The expected array follows from named indices alone: each element is numbered by its position along every
named axis, in an order that neither framework has. What a match makes of the source's array must be the
target's, or the match must stop.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ckptconv import mapping
from ckptconv.catalog import layers
from ckptconv.catalog.axes import atoms, entries, expand
from ckptconv.compounds import lacking
from ckptconv.dialects.keras_layers import read_layer
from ckptconv.dialects.torch_modules import _layer as told_of_torch
from ckptconv.document import Checkpoint, Param, Progress, Unknown
from ckptconv.ops import Permute, Reorder
from ckptconv.tensor import StoredTensor, TensorRef

Axes = tuple[str, ...]
Sizes = Mapping[str, int]
PAIRS = (
    ("torch", "keras3"),
    ("torch", "tf_keras"),
    ("keras3", "torch"),
    ("tf_keras", "torch"),
    ("keras3", "tf_keras"),
    ("tf_keras", "keras3"),
)
NAMES = (
    "in",
    "out",
    "units",
    "multiplier",
    "h",
    "w",
    "features",
    "vocabulary",
    "heads",
    "width",
    "features_0",
)
DECLARED = tuple(itertools.product((True, False), repeat=2))


def sizes_of(variables: Mapping[str, Axes], sizes: Sizes, default: int) -> dict[str, int]:
    """The size of every atom: given, that of its entries, or the default."""
    found = {}
    for axes in variables.values():
        for axis in axes:
            for atom in atoms(axis):
                name, listed = entries(atom)
                found[name] = len(listed) or sizes.get(name.rstrip("'"), default)
    return found


def arranged(axes: Axes, sizes: Sizes) -> np.ndarray:
    """An array in these axes whose elements are numbered by their named indices."""
    parts = [entries(atom) for axis in axes for atom in atoms(axis)]
    canonical = sorted(name for name, _ in parts)
    array = np.arange(np.prod([sizes[name] for name in canonical], dtype=np.int64), dtype=np.float32)
    array = array.reshape([sizes[name] for name in canonical])
    array = array.transpose([canonical.index(name) for name, _ in parts])
    for place, (_, listed) in enumerate(parts):
        if listed:
            array = array.take([sorted(listed).index(entry) for entry in listed], place)
    merged = [np.prod([sizes[entries(a)[0]] for a in atoms(axis)], dtype=np.int64) for axis in axes]
    return array.reshape([int(size) for size in merged])


KERAS = frozenset({"keras3", "tf_keras"})


def truths(framework: str, other: str) -> Iterator[tuple[str, str]]:
    """Kinds of both sides that compute the same, with a column in each.

    One is written as its namesake in the other library, which needs to have a counterpart there.
    """
    table = layers._table().kinds
    for mine, its in itertools.product(table.values(), repeat=2):
        if framework not in mine.variables or other not in its.variables:
            continue
        namesakes = not {framework, other} <= KERAS and (
            mine.counterpart == its.name or its.counterpart == mine.name
        )
        if mine.name == its.name or namesakes:
            yield mine.name, its.name


def variables_of(
    framework: str, kind: str, other: str, counterpart: str, rank: int
) -> dict[str, tuple[str, Axes]]:
    """Key -> role and axes, of the roles that both sides have, in the terms of the counterpart."""
    table = layers._table().kinds
    shared = {v.role for v in table[counterpart].variables[other].values()}
    found = {}
    for key, variable in table[kind].variables[framework].items():
        if variable.role not in shared:
            continue
        full = variable.axes
        if any(axis.endswith("...") for axis in full):
            full = expand(full, rank)
        assert full is not None
        found[key] = (variable.role, full)
    return found


def document(
    framework: str,
    kind: str,
    variables: Mapping[str, tuple[str, Axes]],
    arrays: Mapping[str, np.ndarray],
    declared: bool,
) -> Checkpoint:
    """One layer, as `describe` or as a file tells it."""
    shapes = {key: arrays[key].shape for key in variables}
    dot = "." if framework == "torch" else "/"
    params = {}
    told: Mapping[str, Any]
    told = told_of_torch(tuple(shapes.items())) if framework == "torch" else read_layer(framework, shapes)
    for key, (role, axes) in variables.items():
        name = f"layer{dot}{key.lstrip('_')}"
        tensor = StoredTensor.of_array(arrays[key])
        read = told[key]
        params[name] = (
            Param(name=name, tensor=tensor, layer=kind, role=role, axes=axes, evidence="declared")
            if declared
            else Param(
                name=name,
                tensor=tensor,
                layer=read.layer,
                role=read.role,
                axes=read.axes,
                evidence=read.evidence,
                candidates=getattr(read, "candidates", ()),
            )
        )
    return Checkpoint(progress=Progress(step=Unknown(reason="none")), params=params)


def outcome(
    frameworks: tuple[str, str],
    kinds: tuple[str, str],
    sizes: Sizes,
    default: int,
    declared: tuple[bool, bool],
    rank: int = 1,
) -> tuple[str, dict[str, Any]]:
    """What becomes of one layer: `resolved`, or the code that stops it; and the moves of each parameter.

    Fails where an array is made that is not the named one.
    """
    sides = []
    for place in (0, 1):
        other = 1 - place
        sides.append(variables_of(frameworks[place], kinds[place], frameworks[other], kinds[other], rank))
    in_one = [
        {
            key: layers.in_terms_of(kinds[1 - place], layers.Candidate(kinds[place], role, axes)).axes
            for key, (role, axes) in sides[place].items()
        }
        for place in (0, 1)
    ]
    every = {**in_one[0], **{f"other {key}": axes for key, axes in in_one[1].items()}}
    due = {name: int(size) for name, size in layers._table().kinds[kinds[0]].sizes.items()}
    due |= {"shared": 1, "shared_0": 1, "shared_1": 1}  # axes that torch's layers do not have
    known = sizes_of(every, {**sizes, **due}, default)
    arrays = [{key: arranged(axes, known) for key, axes in side.items()} for side in in_one]
    documents = [
        document(frameworks[place], kinds[place], sides[place], arrays[place], declared[place])
        for place in (0, 1)
    ]
    source, template = documents
    stops = [*lacking(source, frameworks[1]), *lacking(template, frameworks[0])]
    cover = mapping.match(source, template, frameworks=frameworks)
    stops += [problem for problem in cover.problems if problem.code != "flatten-layout"]
    if stops:
        return stops[0].code, {}
    wanted = dict(zip(template.params, arrays[1].values(), strict=True))
    moves = {}
    assert {pair.target for pair in cover.pairs} == wanted.keys()
    for pair in cover.pairs:
        assert pair.layout != "assumed"
        tensor: TensorRef = source.params[pair.source].tensor
        for op in pair.ops:
            tensor = tensor.apply(op)
        np.testing.assert_array_equal(
            tensor.read(), wanted[pair.target], err_msg=f"{frameworks} {kinds} {pair}"
        )
        moves[pair.target] = [op for op in pair.ops if isinstance(op, (Permute, Reorder))]
    return "resolved", moves


CASES = [(frameworks, kinds) for frameworks in PAIRS for kinds in truths(*frameworks)]
EQUAL: tuple[dict[str, int], ...] = ({}, {"in": 16}, {"out": 16}, {"units": 16}, {"multiplier": 1}, {"in": 1})
"""All axes of 4 elements but one, which is as large as two of them merged, or has one element."""
MATRICES = frozenset({"dense", "gpt2_conv1d"})


def told(kinds: tuple[str, str], declared: tuple[bool, bool]) -> tuple[bool, bool]:
    """Projections of attention heads are found by the names around them alone, which tell their axes."""
    first, second = (
        flag or layers._table().kinds[kind].only_declared for kind, flag in zip(kinds, declared, strict=True)
    )
    return first, second


@pytest.mark.parametrize(("frameworks", "kinds"), CASES, ids=lambda value: "-".join(value))
def test_equal_sizes_are_told_or_stopped(frameworks: tuple[str, str], kinds: tuple[str, str]) -> None:
    """A square matrix of torch may be of either layout; all else that is made is what the names say."""
    for declared, sizes, rank in itertools.product(DECLARED, EQUAL, (1, 2)):
        found, _ = outcome(frameworks, kinds, sizes, 4, told(kinds, declared), rank)
        if all(told(kinds, declared)):
            assert found == "resolved"
        else:
            assert found in ("resolved", "layout-ambiguous")
        if not sizes and not {"attention", "einsum"} & {kind.partition("_")[0] for kind in kinds}:
            torch_told = told(kinds, declared)[frameworks.index("torch")] if "torch" in frameworks else True
            stops = not torch_told and bool(MATRICES & set(kinds))
            assert found == ("layout-ambiguous" if stops else "resolved"), declared


@settings(max_examples=300, deadline=None)
@given(
    st.sampled_from(CASES),
    st.sampled_from(DECLARED),
    st.lists(st.dictionaries(st.sampled_from(NAMES), st.integers(1, 5)), min_size=2, max_size=2),
    st.integers(1, 3),
)
def test_sizes_decide_nothing(
    case: tuple[tuple[str, str], tuple[str, str]],
    declared: tuple[bool, bool],
    drawn: list[dict[str, int]],
    rank: int,
) -> None:
    """One model with other sizes, equal ones among them: what is moved is moved alike, or the match stops."""
    frameworks, kinds = case
    moves = []
    for sizes in drawn:
        found, moved = outcome(frameworks, kinds, sizes, 2, told(kinds, declared), rank)
        assert found in ("resolved", "layout-ambiguous")
        if found == "resolved" and 1 not in sizes.values():  # axes of one element move without moving any
            moves.append(moved)
    assert all(one == moves[0] for one in moves)


@st.composite
def layouts(draw: st.DrawFn) -> tuple[Axes, Axes, Sizes, Sizes]:
    """The same named axes in two orders, some merged, with sizes twice."""
    names = draw(st.lists(st.sampled_from("abcdef"), min_size=1, max_size=5, unique=True))

    def side() -> Axes:
        order = draw(st.permutations(names))
        cuts = draw(st.lists(st.booleans(), min_size=len(order) - 1, max_size=len(order) - 1))
        axes = [order[0]]
        for name, merged in zip(order[1:], cuts, strict=True):
            axes = [*axes[:-1], f"{axes[-1]}*{name}"] if merged else [*axes, name]
        return tuple(axes)

    sizes = [{name: draw(st.integers(2, 4)) for name in names} for _ in range(2)]
    return side(), side(), sizes[0], sizes[1]


@settings(max_examples=300, deadline=None)
@given(layouts())
def test_random_layouts_go_by_names_alone(drawn: tuple[Axes, Axes, Sizes, Sizes]) -> None:
    before, after, *both = drawn
    orders = []
    for sizes in both:
        array, wanted = arranged(before, sizes), arranged(after, sizes)
        ops = layers.layout_ops(before, array.shape, after, wanted.shape)
        back = layers.layout_ops(after, wanted.shape, before, array.shape)
        if ops is None or back is None:  # merged in other ways on both sides, and no size of an atom is known
            assert any("*" in axis for axis in (*before, *after))
            continue
        tensor: TensorRef = StoredTensor.of_array(array)
        for op in ops:
            tensor = tensor.apply(op)
        np.testing.assert_array_equal(tensor.read(), wanted)
        for op in back:
            tensor = tensor.apply(op)
        np.testing.assert_array_equal(tensor.read(), array)
        orders.append([op.order for op in ops if isinstance(op, Permute)])
    assert all(order == orders[0] for order in orders)
