"""A mapping file to start from: what is matched by itself as rules, what is not as a list of work.

Every rule has its evidence in its note. A layout that nothing decides has its `choices` and no `axes`; a
parameter without a partner has the other side's that come nearest.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from ckptconv.catalog.axes import element_order
from ckptconv.fitting import modules, parts
from ckptconv.mapping_counters import Item, Names, Patterns, generalized
from ckptconv.mapping_file import MappingFile, Rule, axes_text, parse_axes
from ckptconv.mapping_rules import instances
from ckptconv.matching import Matching
from ckptconv.pieces import Cut
from ckptconv.ties import Pair
from ckptconv.told_layout import known_ways
from ckptconv.unmatched import is_readable, origin_of, unmatched


@dataclass(frozen=True, slots=True)
class _Draft:
    """A rule without counters."""

    left: Names
    right: Names
    axes: str
    choices: tuple[str, ...]
    cut: int | None
    is_sum: bool
    note: str

    @property
    def kind(self) -> tuple[object, ...]:
        """What rules have in common that may become one."""
        return len(self.left), len(self.right), self.axes, self.choices, self.cut, self.is_sum


def draft(found: Matching, begun: MappingFile | None = None) -> MappingFile:
    """The mapping file of a matching, the source on its left; `begun` is one whose rules it was made with.

    I/O: none.
    """
    drafts = list(_drafts(found))
    left, right = found.source.whole.params, found.target.whole.params
    named = (
        {name for one in drafts for name in one.left} | found.rules.source_names,
        {name for one in drafts for name in one.right} | found.rules.target_names,
    )

    def is_exact(patterns: Patterns, members: Sequence[int]) -> bool:
        count = len(drafts[members[0]].left)
        rule = Rule(left=patterns[:count], right=patterns[count:])
        wanted = {(drafts[n].left, drafts[n].right) for n in members}
        for ours, theirs in instances(rule, left, right):
            if (ours, theirs) in wanted:
                continue
            here = [({*ours} & left.keys(), named[0]), ({*theirs} & right.keys(), named[1])]
            if {*ours} <= left.keys() and {*theirs} <= right.keys():
                return False
            if any(names - known for names, known in here):
                return False
        return all(map(is_readable, patterns))

    rules = []
    for patterns, members in generalized([Item((*d.left, *d.right), d.kind) for d in drafts], is_exact):
        some = [drafts[n] for n in members]
        rules.append(_rule(some, patterns))
    lonely = unmatched((found.source, found.target), found.cover, found.rules)
    begun = begun or MappingFile(rules=())
    if found.rules.is_reversed:
        # The file's own left side is the template's.
        rules = [replace(r, left=r.right, right=r.left, axes=r.axes and r.axes[::-1]) for r in rules]
        rules = [replace(r, choices=tuple(map(_turned, r.choices))) for r in rules]
        lonely = lonely[::-1]
    sides = found.frameworks[::-1] if found.rules.is_reversed else found.frameworks
    return replace(
        begun,
        rules=(*begun.rules, *rules),
        left=begun.left or sides[0],
        right=begun.right or sides[1],
        left_unmatched=lonely[0],
        right_unmatched=lonely[1],
    )


def _turned(axes: str) -> str:
    ours, _, theirs = axes.partition(" -> ")
    return f"{theirs} -> {ours}"


def _rule(drafts: Sequence[_Draft], patterns: Patterns) -> Rule:
    one = drafts[0]
    axes = parse_axes(one.axes) if one.axes else None
    assert not isinstance(axes, str)
    return Rule(
        left=patterns[: len(one.left)],
        right=patterns[len(one.left) :],
        axes=axes,
        cut=one.cut,
        is_sum=one.is_sum,
        choices=one.choices,
        note="; ".join(dict.fromkeys(d.note for d in drafts)),
    )


def _drafts(found: Matching) -> Iterator[_Draft]:
    """A rule for each parameter that is matched by itself, in the target's order."""
    told = {one.target for one in found.rules.told}
    cuts: dict[tuple[bool, str], dict[int, tuple[str, Pair]]] = {}
    for pair in found.cover.pairs:
        if pair.matched_by == "alias" or pair.target in told:
            continue
        ours, theirs = origin_of(found.source, pair.source), origin_of(found.target, pair.target)
        one, other = (ours, theirs) if ours.cut is not None else (theirs, ours)
        if ours.is_plain and theirs.is_plain:
            yield _one(found, pair, ours.names, theirs.names)
        elif one.cut is not None and other.is_plain:
            pieces = cuts.setdefault((one is ours, one.cut.whole), {})
            pieces[one.position] = (other.names[0], pair)
            if len(pieces) == len(one.cut.pieces):
                several = tuple(pieces[n][0] for n in range(len(pieces)))
                names = (one.names, several) if one is ours else (several, one.names)
                yield from _cut(found, [pieces[n][1] for n in range(len(pieces))], *names, one.cut)
        elif (ours.is_sum and theirs.is_plain) or (theirs.is_sum and ours.is_plain):
            yield _one(found, pair, ours.names, theirs.names, is_sum=True)


def _one(found: Matching, pair: Pair, left: Names, right: Names, *, is_sum: bool = False) -> _Draft:
    axes, choices = _axes(found, pair)
    return _Draft(left, right, axes, choices, None, is_sum, _note(found, pair))


def _cut(found: Matching, pairs: Sequence[Pair], left: Names, right: Names, cut: Cut) -> Iterator[_Draft]:
    if len({pair.axes for pair in pairs}) == 1:  # else no one rule says it, and it is matched without
        axes, choices = _axes(found, pairs[0])
        yield _Draft(left, right, axes, choices, cut.axis, False, _note(found, pairs[0]))


def _note(found: Matching, pair: Pair) -> str:
    """Why the two belong together, and what else is to be known of them."""
    flat = ("flatten-layout", ("params", pair.target))
    doubts = [problem.message for problem in found.cover.problems if (problem.code, problem.loc) == flat]
    return "; ".join((f"matched by {pair.matched_by}, axes {pair.layout}", *doubts))


def _axes(found: Matching, pair: Pair) -> tuple[str, tuple[str, ...]]:
    """What a rule says of the axes, or what there is to choose from; nothing of a vector."""
    if pair.layout == "assumed":
        return "", tuple(_choices(found, pair))
    axes = pair.axes
    if axes is None or (axes[0] == axes[1] and len(axes[0]) < 2 and "(" not in "".join(axes[0])):
        return "", ()
    return axes_text(axes), ()


def _choices(found: Matching, pair: Pair) -> Iterator[str]:
    """The axes of every way in which the one may become the other."""
    sides = []
    for name, checkpoint, framework in (
        (pair.source, found.source_pieces, found.frameworks[0]),
        (pair.target, found.target_pieces, found.frameworks[1]),
    ):
        beside = {n: p for n, p in checkpoint.params.items() if parts(n)[:-1] == parts(name)[:-1]}
        sides.append((checkpoint.params[name], modules(beside, framework)[0]))
    seen = set()
    for way in known_ways(sides[0], sides[1]):
        order = element_order(way.ops, sides[0][0].tensor.shape)
        if way.axes is not None and order not in seen:
            seen.add(order)
            yield axes_text(way.axes)
