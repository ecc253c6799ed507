"""Parameters without a partner, those of many layers as one, and what comes nearest on the other side."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from ckptconv.catalog import layers
from ckptconv.document import Param
from ckptconv.errors import Problem
from ckptconv.fitting import nearest
from ckptconv.mapping import Cover
from ckptconv.mapping_counters import Item, Names, Patterns, generalized
from ckptconv.mapping_file import Lonely
from ckptconv.mapping_rules import Ruled
from ckptconv.name_pattern import NamePattern, parse_pattern
from ckptconv.pieces import Cut, Sum
from ckptconv.telling import Side


@dataclass(frozen=True, slots=True)
class Origin:
    """What of its file a piece is."""

    names: Names
    cut: Cut | None = None
    position: int = 0
    is_sum: bool = False

    @property
    def is_plain(self) -> bool:
        return self.cut is None and not self.is_sum


def origin_of(side: Side, name: str) -> Origin:
    if name not in side.made:
        return Origin((name,))
    one, position = side.made[name]
    if isinstance(one, Sum):
        return Origin(tuple(side.file_name(term) for term in one.terms), is_sum=True)
    if len(one.pieces) == 1:
        return Origin((one.whole,)) if one.whole == name else origin_of(side, one.whole)
    return Origin((one.whole,), cut=one, position=position)


def is_readable(pattern: NamePattern) -> bool:
    return parse_pattern(str(pattern)) == pattern


def unmatched(
    sides: tuple[Side, Side], cover: Cover, rules: Ruled
) -> tuple[tuple[Lonely, ...], tuple[Lonely, ...]]:
    """The parameters of source and target without a partner, each with those that come nearest."""
    merged = {merge.source for merge in cover.merged}
    taken = ({pair.source for pair in cover.pairs} | merged, {pair.target for pair in cover.pairs})
    out = (rules.source_only.union(cover.source_only), rules.target_only.union(cover.target_only))
    ours, theirs = (
        _lonely(side, ruled.union(*(origin_of(side, piece).names for piece in (*used, *left_out))))
        for side, used, left_out, ruled in zip(
            sides, taken, out, (rules.source_names, rules.target_names), strict=True
        )
    )
    return _with_nearest(ours, theirs), _with_nearest(theirs, ours)


def _lonely(side: Side, gone: Collection[str]) -> dict[str, tuple[Lonely, Param]]:
    """Pattern of each parameter that is not gone, or of several that differ by numbers -> the first."""
    whole = side.whole.params
    names = [
        name
        for name, param in whole.items()
        if name not in gone and param.tied_to is None and not layers.is_framework_only(param.role)
    ]

    def is_exact(patterns: Patterns, members: Sequence[int]) -> bool:
        (pattern,) = patterns
        found = {name for name in whole if pattern.match(name) is not None}
        return found == {names[n] for n in members} and is_readable(pattern)

    result = {}
    for (pattern,), members in generalized([Item((n,), whole[n].tensor.shape) for n in names], is_exact):
        first = whole[names[members[0]]]
        result[str(pattern)] = (Lonely(name=pattern, shape=first.tensor.shape), first)
    return result


def _with_nearest(
    some: Mapping[str, tuple[Lonely, Param]], others: Mapping[str, tuple[Lonely, Param]]
) -> tuple[Lonely, ...]:
    candidates = {pattern: replace(param, name=pattern) for pattern, (_, param) in others.items()}
    return tuple(
        replace(one, nearest=nearest(replace(param, name=pattern), candidates))
        for pattern, (one, param) in some.items()
    )


def unmatched_problems(sides: tuple[Side, Side], cover: Cover, rules: Ruled) -> Iterator[Problem]:
    """A problem for each parameter, or for those of many layers, that has no partner."""
    words = ("source", "template")
    known = {problem.loc for problem in cover.problems}
    for n, lonely in enumerate(unmatched(sides, cover, rules)):
        params = sides[n].whole.params
        for one in lonely:
            names = [name for name in params if one.name.match(name) is not None]
            if len(names) == 1 and ("params", names[0]) in known:
                continue
            many = f", {len(names)} parameters" if len(names) > 1 else ""
            near = f"; nearest are {', '.join(map(repr, one.nearest))}" if one.nearest else ""
            yield Problem(
                code="param-unmatched",
                loc=("params", names[0]),
                message=f"'{one.name}' {list(one.shape)}{many} of the {words[n]} has no partner in the "
                f"{words[1 - n]}{near}",
                hint="Say in a mapping file which it is: 'ckptconv map' begins one.",
            )
