"""Names that differ by numbers, as patterns: as few as stand for them and for nothing else."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ckptconv.mapping_counters import Item, Patterns, generalized

Names = tuple[str, ...]


def patterns_of(items: Sequence[Names], others: Sequence[str] = ()) -> list[tuple[str, ...]]:
    """The patterns; `others` are names that none may stand for."""

    known = {name for names in items for name in names}

    def is_exact(patterns: Patterns, members: Sequence[int]) -> bool:
        theirs = {items[n] for n in members}
        for name in known | set(others):
            for indices in filter(None, (pattern.match(name) for pattern in patterns)):
                filled = tuple(pattern.fill(indices) for pattern in patterns)
                if name not in known or (filled not in theirs and set(filled) <= known):
                    return False
        return True

    found = generalized([Item(names, None) for names in items], is_exact)
    assert sorted(n for _, members in found for n in members) == list(range(len(items)))
    for patterns, members in found:
        for n in members:
            indices = patterns[0].match(items[n][0])
            assert indices is not None
            assert tuple(pattern.fill(indices) for pattern in patterns) == items[n]
    return [tuple(map(str, patterns)) for patterns, _ in found]


CASES: list[tuple[str, list[Names], list[tuple[str, ...]]]] = [
    ("one", [("a.0", "b/1")], [("a.0", "b/1")]),
    ("a shift", [(f"a.{i}", f"b{i + 1}") for i in range(12)], [("a.{i}", "b{i+1}")]),
    ("a shift on both sides", [(f"a.{i}", f"b{i}") for i in range(2, 5)], [("a.{i}", "b{i}")]),
    ("every third", [(f"a.{3 * i + 1}", f"b{i}") for i in range(4)], [("a.{3*i+1}", "b{i}")]),
    ("the other way round", [(f"a.{i}", f"b{2 * i}") for i in range(4)], [("a.{i}", "b{2*i}")]),
    ("Keras' counter", [("a.0", "d/k"), ("a.1", "d_1/k"), ("a.2", "d_2/k")], [("a.{i}", "d{_i}/k")]),
    ("Keras' counter from 1", [("a.0", "d_1/k"), ("a.1", "d_2/k")], [("a.{i}", "d_{i+1}/k")]),
    (
        "two counters",
        [(f"l{i}.{j}", f"g{i}/u{j}") for i in range(1, 4) for j in range(2)],
        [("l{i}.{j}", "g{i}/u{j}")],
    ),
    (
        "a counter that one side lacks",
        [(f"l{i}.{j}", f"g{2 * i + j}") for i in range(2) for j in range(2)],
        [("l0.{i}", "g{i}"), ("l1.{i}", "g{i+2}")],
    ),
    (
        "no common step",
        [("f.0", "c0"), ("f.2", "c1"), ("f.5", "c2")],
        [("f.0", "c0"), ("f.2", "c1"), ("f.5", "c2")],
    ),
    ("numbers that fall", [("a.0", "b1"), ("a.1", "b0")], [("a.0", "b1"), ("a.1", "b0")]),
    ("leading zeros are no numbers", [("a.00", "b0"), ("a.01", "b1")], [("a.00", "b0"), ("a.01", "b1")]),
    ("three names", [(f"q.{i}", f"a{i}/k", f"a{i}/v") for i in range(2)], [("q.{i}", "a{i}/k", "a{i}/v")]),
]


@pytest.mark.parametrize(("items", "expected"), [case[1:] for case in CASES], ids=[case[0] for case in CASES])
def test_patterns(items: list[Names], expected: list[tuple[str, ...]]) -> None:
    assert patterns_of(items) == expected


def test_what_another_name_forbids_is_not_generalised() -> None:
    items = [("a.0", "b0"), ("a.1", "b1")]
    assert patterns_of(items, others=["b2"]) == items


@settings(deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, 3), st.integers(0, 12), st.integers(0, 3), st.integers(0, 12)),
        unique_by=(lambda t: t[:2], lambda t: t[2:]),
        max_size=24,
    )
)
def test_every_item_has_one_pattern_that_stands_for_no_other(
    numbers: list[tuple[int, int, int, int]],
) -> None:
    patterns_of([(f"a{i}.{j}.w", f"b{k}/c{'_' + str(m) if m else ''}/k") for i, j, k, m in numbers])
