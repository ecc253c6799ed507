"""The rules of a mapping file on two documents: which names each of them means, and what they compile to.

A rule with counters stands for many: one for each number that completes all its names. What is several on one
side becomes pieces (`pieces.Cut`, `pieces.Sum`), so that in the end each rule is pairs of two, whose axes
`told_layout` compares. Slots follow as they do for every other piece.

Which side the source is, left or right, is found from the names; the frameworks that the file names decide
where both would do.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from ckptconv.catalog.axes import Axes
from ckptconv.document import Checkpoint, Param
from ckptconv.errors import Loc, Problem
from ckptconv.mapping_cuts import cut_at, cut_within, piece_axes
from ckptconv.mapping_file import MappingFile, Rule
from ckptconv.name_pattern import NamePattern
from ckptconv.pieces import Piece, Rewrite, Sum
from ckptconv.report import Entry

BY_MAPPING = "--mapping"
"""In the ledger: what a mapping file says to leave out."""

Names = tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Told:
    """Two parameters, or pieces of some, that a rule says to be one another."""

    source: str
    target: str
    axes: tuple[Axes, Axes] | None
    """Of the source's and the target's; None where the rule leaves them to the catalog."""
    overrides: bool
    rule: str
    """The rule in words."""
    position: int
    """Which of the file's rules it is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ruled:
    """What a mapping file says of two documents."""

    told: tuple[Told, ...] = ()
    source_rewrites: tuple[Rewrite, ...] = ()
    target_rewrites: tuple[Rewrite, ...] = ()
    source_names: frozenset[str] = frozenset()
    """Parameters of the file that rules name, those too of which a rule is wrong."""
    target_names: frozenset[str] = frozenset()
    source_only: frozenset[str] = frozenset()
    """Parameters that stay behind."""
    target_only: frozenset[str] = frozenset()
    """Parameters that stay as the template has them."""
    uses: tuple[tuple[tuple[Names, Names], ...], ...] = ()
    """For each rule what it names: of the left side and of the right side, once for each number."""
    is_reversed: bool = False
    """Whether the source is the right side."""
    problems: tuple[Problem, ...] = ()

    @property
    def sources(self) -> frozenset[str]:
        """Pieces of the source that are not matched by themselves."""
        return self.source_names | self.source_only | {one.source for one in self.told}

    @property
    def targets(self) -> frozenset[str]:
        """Pieces of the template that are not matched by themselves."""
        return self.target_names | self.target_only | {one.target for one in self.told}

    def accounted(self, entries: Sequence[Entry]) -> Iterator[Entry]:
        """The ledger, which says of what the file leaves out that it does."""
        for entry in entries:
            names = {str(entry.item[-1]), str(entry.item[-1]).rpartition("/")[0]}
            side = self.target_only if entry.item[0] == "template" else self.source_only
            if entry.allowed_by == "param-unmatched" and names & side:
                entry = replace(entry, allowed_by=BY_MAPPING)
            yield entry


def ruled(
    mapping: MappingFile, source: Checkpoint, template: Checkpoint, frameworks: tuple[str, str]
) -> Ruled:
    """What the mapping says of the two.

    Problems: mapping-invalid for a rule that names nothing, two rules that name one parameter and sides that
    cannot be told; param-unmatched for a parameter whose rule names nothing on the other side;
    shape-mismatch for pieces that do not make up their whole.
    """
    forward = _Reading(mapping, source.params, template.params, is_reversed=False)
    backward = _Reading(mapping, source.params, template.params, is_reversed=True)
    chosen = _direction(mapping, forward, backward, frameworks)
    if isinstance(chosen, Problem):
        return Ruled(problems=(chosen,))
    return _Compiler(chosen).result()


def _direction(
    mapping: MappingFile, forward: _Reading, backward: _Reading, frameworks: tuple[str, str]
) -> _Reading | Problem:
    if mapping.left != mapping.right:
        if (mapping.left, mapping.right) == frameworks:
            return forward
        if (mapping.right, mapping.left) == frameworks:
            return backward
    ways = (forward.used, backward.used)
    if ways[0] != ways[1]:
        return forward if ways[0] > ways[1] else backward
    if ways[0] == 0 or forward.says == backward.says:
        return forward
    return Problem(
        code="mapping-invalid",
        loc=("mapping",),
        message="the source may be the left and the right side: the names of the rules are those of either",
        hint="Say in the file which framework each side is: 'left' and 'right', as in 'torch' and 'keras3'.",
    )


class _Reading:
    """The rules on two documents, the source taken for one of the sides."""

    def __init__(
        self,
        mapping: MappingFile,
        source: Mapping[str, Param],
        target: Mapping[str, Param],
        *,
        is_reversed: bool,
    ) -> None:
        self.mapping = mapping
        self.source, self.target, self.is_reversed = source, target, is_reversed
        left, right = (target, source) if is_reversed else (source, target)
        self.whole: list[tuple[tuple[Names, Names], ...]] = []
        """For each rule what it names, left and right, where all its names are there."""
        self.partial: list[tuple[tuple[Names, Names], ...]] = []
        """For each rule what of it is there, and what is not."""
        for rule in mapping.rules:
            found = instances(rule, left, right)
            complete = [
                (ours, theirs)
                for ours, theirs in found
                if {*ours} <= left.keys() and {*theirs} <= right.keys()
            ]
            self.whole.append(tuple(complete))
            self.partial.append(tuple(one for one in found if one not in complete))
        self.only = tuple(
            [[name for name in side if pattern.match(name) is not None] for pattern in patterns]
            for side, patterns in ((left, mapping.left_only), (right, mapping.right_only))
        )

    @property
    def used(self) -> int:
        """How many rules name something."""
        return sum(map(bool, self.whole))

    @property
    def says(self) -> object:
        """All that the rules say of the two documents, to be compared."""
        swap = -1 if self.is_reversed else 1
        return {
            (pair[::swap], rule.axes and rule.axes[::swap])
            for rule, pairs in zip(self.mapping.rules, self.whole, strict=True)
            for pair in pairs
        }


def instances(rule: Rule, left: Mapping[str, Param], right: Mapping[str, Param]) -> list[tuple[Names, Names]]:
    """What the rule's names are for each number with which one of them is there, in their order."""
    variables = sorted(rule.left[0].variables)
    numbers: set[tuple[int, ...]] = set()
    for patterns, names in ((rule.left, left), (rule.right, right)):
        for pattern in patterns:
            numbers.update(tuple(found[v] for v in variables) for found in _matches(pattern, names))
    result = []
    for indices in sorted(numbers):
        filled = [
            tuple(pattern.fill(dict(zip(variables, indices, strict=True))) for pattern in side)
            for side in (rule.left, rule.right)
        ]
        ours, theirs = (tuple(name for name in side if name is not None) for side in filled)
        if len(ours) == len(rule.left) and len(theirs) == len(rule.right):
            result.append((ours, theirs))
    return result


def _matches(pattern: NamePattern, names: Mapping[str, Param]) -> Iterator[dict[str, int]]:
    if not pattern.variables:
        if str(pattern) in names:
            yield {}
        return
    for name in names:
        found = pattern.match(name)
        if found is not None:
            yield found


@dataclass(slots=True)
class _Compiler:
    """Makes pairs and rewrites of rules that are read; collects what is wrong with them."""

    reading: _Reading
    told: list[Told] = field(default_factory=list)
    rewrites: tuple[list[Rewrite], list[Rewrite]] = field(default_factory=lambda: ([], []))
    """Of the left side and of the right side."""
    problems: list[Problem] = field(default_factory=list)

    def result(self) -> Ruled:
        reading = self.reading
        owners: tuple[dict[str, str], dict[str, str]] = ({}, {})
        for k, rule in enumerate(reading.mapping.rules):
            for instance in reading.whole[k]:
                taken = False
                for side, names in zip(owners, instance, strict=True):
                    for name in names:
                        taken |= name in side
                        if name in side:
                            self._wrong(("rules", k), f"two rules name '{name}': {side[name]}, and {rule}")
                        side[name] = str(rule)
                if not taken:
                    self._compile(rule, k, *instance)
            if not reading.whole[k]:
                self._unused(rule, k)
        for k, rule in enumerate(reading.mapping.rules):
            if reading.whole[k]:
                self._halves(rule, k, owners)
        only = tuple(self._left_out(side, owners[n], n) for n, side in enumerate(("left_only", "right_only")))
        ours, theirs = (1, 0) if reading.is_reversed else (0, 1)
        return Ruled(
            told=tuple(self.told),
            source_rewrites=tuple(self.rewrites[ours]),
            target_rewrites=tuple(self.rewrites[theirs]),
            source_names=frozenset(owners[ours]),
            target_names=frozenset(owners[theirs]),
            source_only=only[ours],
            target_only=only[theirs],
            uses=tuple(reading.whole),
            is_reversed=reading.is_reversed,
            problems=tuple(self.problems),
        )

    @property
    def _sides(self) -> tuple[Mapping[str, Param], Mapping[str, Param]]:
        """Parameters of the left side and of the right side."""
        ours, theirs = self.reading.source, self.reading.target
        return (theirs, ours) if self.reading.is_reversed else (ours, theirs)

    @property
    def _words(self) -> tuple[str, str]:
        return ("template", "source") if self.reading.is_reversed else ("source", "template")

    def _wrong(self, loc: Loc, message: str, hint: str = "Correct or delete the rule.") -> None:
        self.problems.append(Problem(code="mapping-invalid", loc=loc, message=message, hint=hint))

    def _unused(self, rule: Rule, k: int) -> None:
        """A rule that names nothing: which of its names are not there."""
        counts = []
        for patterns, params, word in zip((rule.left, rule.right), self._sides, self._words, strict=True):
            for pattern in patterns:
                count = sum(1 for _ in _matches(pattern, params))
                close = "" if count else _did_you_mean(str(pattern), params)
                counts.append(f"'{pattern}' is {count} parameters of the {word}{close}")
        self._wrong(
            ("rules", k), f"the rule {rule} names nothing that is on both sides: " + ", ".join(counts)
        )

    def _halves(self, rule: Rule, k: int, owners: tuple[dict[str, str], dict[str, str]]) -> None:
        """Parameters that the rule names and that have nothing on the other side."""
        for instance in self.reading.partial[k]:
            for n, (names, params) in enumerate(zip(instance, self._sides, strict=True)):
                open_ = [name for name in names if name in params and name not in owners[n]]
                if not open_:
                    continue
                others, word = self._sides[1 - n], self._words[1 - n]
                if lacking := [name for name in instance[1 - n] if name not in others]:
                    place = f"the {word}" + _did_you_mean(lacking[0], others)
                else:
                    lacking = [name for name in names if name not in params]
                    place = f"the {self._words[n]}" + _did_you_mean(lacking[0], params)
                for name in open_:
                    owners[n][name] = str(rule)
                    self.problems.append(
                        Problem(
                            code="param-unmatched",
                            loc=("params", name),
                            message=f"'{name}' has no partner by the rule {rule}: there is no "
                            f"'{lacking[0]}' in {place}",
                            hint=f"Correct rule {k}, write another one for it, or list it in "
                            f"{'right_only' if n else 'left_only'}.",
                        )
                    )

    def _left_out(self, side: str, owners: Collection[str], n: int) -> frozenset[str]:
        found: set[str] = set()
        for k, names in enumerate(self.reading.only[n]):
            pattern = (self.reading.mapping.left_only, self.reading.mapping.right_only)[n][k]
            if not names:
                close = _did_you_mean(str(pattern), self._sides[n])
                self._wrong((side, k), f"'{pattern}' is no parameter of the {self._words[n]}{close}")
            for name in names:
                if name in owners:
                    self._wrong((side, k), f"'{name}' is to be left out, and a rule names it")
            found.update(names)
        return frozenset(found)

    def _compile(self, rule: Rule, k: int, left: Names, right: Names) -> None:
        """The pairs of one instance of a rule."""
        if len(left) == len(right) == 1:
            self._pair(rule, k, left[0], right[0])
            return
        one, several = (0, right) if len(left) == 1 else (1, left)
        whole = (left, right)[one][0]
        if rule.is_sum:
            terms = several
            shapes = {name: self._sides[1 - one][name].tensor.shape for name in terms}
            if len(set(shapes.values())) > 1:
                told = ", ".join(f"'{name}' {list(shape)}" for name, shape in shapes.items())
                self._misfit(terms[0], f"only parameters of one shape have a sum, not {told}", k)
                return
            first = self._sides[1 - one][terms[0]]
            total = Piece(
                name=f"{terms[0]}[sum]",
                size=0,
                layer=first.layer,
                role=first.role,
                axes=first.axes,
                evidence=first.evidence,
            )
            self.rewrites[1 - one].append(Sum(whole=total, terms=terms))
            pieces = [(total.name, whole)]
        else:
            shape = self._sides[one][whole].tensor.shape
            parts = {name: self._sides[1 - one][name].tensor.shape for name in several}
            if isinstance(rule.cut, str):
                axes = self._axes(rule, one)
                cut = cut_within(whole, shape, rule.cut, axes, parts)
                own = piece_axes(axes[0], rule.cut)
                rule = replace(rule, axes=(own, axes[1]) if one == 0 else (axes[1], own))
            else:
                cut = cut_at(whole, shape, rule.cut or 0, parts)
            if isinstance(cut, str):
                self._misfit(whole, cut, k)
                return
            self.rewrites[one].append(cut)
            pieces = [(name, piece.name) for name, piece in zip(several, cut.pieces, strict=True)]
        for theirs, ours in pieces:
            self._pair(rule, k, *((ours, theirs) if one == 0 else (theirs, ours)))

    def _axes(self, rule: Rule, one: int) -> tuple[Axes, Axes]:
        """The axes of the one and of the several."""
        assert rule.axes is not None  # the file is refused otherwise
        return rule.axes if one == 0 else (rule.axes[1], rule.axes[0])

    def _misfit(self, name: str, message: str, k: int) -> None:
        rule = self.reading.mapping.rules[k]
        self.problems.append(
            Problem(
                code="shape-mismatch",
                loc=("params", name),
                message=f"{message}, as the rule {rule} says",
                hint=f"Correct rule {k}, or use a template of the same model.",
            )
        )

    def _pair(self, rule: Rule, k: int, left: str, right: str) -> None:
        backward = self.reading.is_reversed
        axes = rule.axes
        self.told.append(
            Told(
                source=right if backward else left,
                target=left if backward else right,
                axes=(axes[1], axes[0]) if axes is not None and backward else axes,
                overrides=rule.overrides,
                rule=str(rule),
                position=k,
            )
        )


def _did_you_mean(name: str, names: Collection[str]) -> str:
    close = difflib.get_close_matches(name, list(names), n=1)
    return f" (did you mean '{close[0]}'?)" if close else ""
