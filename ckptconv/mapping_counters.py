"""Many names in one: what differs between them by numbers that go together, as patterns with counters.

`layers.0.weight`, `block_1/kernel` and `layers.1.weight`, `block_2/kernel` are `layers.{i}.weight` and
`block_{i+1}/kernel`. Two numbers go together where each is a multiple of one counter and something; a pattern
is taken only where it stands for the names that it was made of and for no others.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain

from ckptconv.name_pattern import Counter, NamePattern

Names = tuple[str, ...]
Patterns = tuple[NamePattern, ...]

_PLAIN = re.compile(r"(?<![0-9])(0|[1-9][0-9]{0,8})(?![0-9])")
_VARIABLES = "ijklmnopq"


@dataclass(frozen=True, slots=True)
class _Number:
    """A number in a name."""

    value: int
    is_suffix: bool
    """Whether it is Keras' counter of equal names, 0 where there is none."""

    def __str__(self) -> str:
        if self.is_suffix:
            return f"_{self.value}" if self.value else ""
        return str(self.value)


_Token = str | _Number
_Place = tuple[int, int]
"""Which name of an item, and which of its tokens."""


@dataclass(frozen=True, slots=True)
class Item:
    """Names that belong together, and what must be the same for items that are one pattern."""

    names: Names
    kind: Hashable


IsExact = Callable[[Patterns, Sequence[int]], bool]
"""Whether patterns stand for the items at these positions and for nothing else."""


def generalized(items: Sequence[Item], is_exact: IsExact) -> list[tuple[Patterns, list[int]]]:
    """Patterns for the items, each with the positions of those that it stands for, in the items' order."""
    plain, counted = (_grouped(items, tokens, is_exact) for tokens in (_plain_tokens, _tokens_with_suffixes))
    return min(plain, counted, key=len)


def _plain_tokens(name: str) -> list[_Token]:
    """The name cut at its numbers."""
    pieces = _PLAIN.split(name)
    return [_Number(int(piece), False) if n % 2 else piece for n, piece in enumerate(pieces)]


def _tokens_with_suffixes(name: str) -> list[_Token]:
    """The name cut at its numbers, Keras' counter behind each part, 0 where there is none."""
    tokens: list[_Token] = []
    for part in re.split(r"([./])", name):
        stem, underscore, digits = part.rpartition("_")
        is_counted = bool(stem and underscore) and re.fullmatch("[1-9][0-9]{0,8}", digits) is not None
        tokens += _plain_tokens(stem if is_counted else part)
        if part not in (".", "/", ""):
            tokens += [_Number(int(digits) if is_counted else 0, True), ""]
    return tokens


def _grouped(
    items: Sequence[Item],
    tokens_of: Callable[[str], list[_Token]],
    is_exact: IsExact,
) -> list[tuple[Patterns, list[int]]]:
    tokens = [tuple(tuple(tokens_of(name)) for name in item.names) for item in items]
    groups: dict[Hashable, list[int]] = {}
    for n, (item, names) in enumerate(zip(items, tokens, strict=True)):
        shape = tuple(
            tuple(t if isinstance(t, str) else t.is_suffix for t in name_tokens) for name_tokens in names
        )
        groups.setdefault((item.kind, shape), []).append(n)
    solver = _Solver(items, tokens, is_exact)
    found = chain.from_iterable(solver.solved(group) for group in groups.values())
    return sorted(found, key=lambda one: one[1][0])


@dataclass(frozen=True, slots=True)
class _Solver:
    """Finds counters for items whose names differ by their numbers alone."""

    items: Sequence[Item]
    tokens: Sequence[tuple[tuple[_Token, ...], ...]]
    is_exact: IsExact

    def solved(self, members: list[int]) -> Iterator[tuple[Patterns, list[int]]]:
        """The patterns of a group; where one does not do, of the parts that have a number in common."""
        if len(members) == 1:
            yield tuple(NamePattern((name,)) for name in self.items[members[0]].names), members
            return
        columns = self._columns(members)
        steps = {at: _steps(values) for at, values in columns.items() if len(set(values)) > 1}
        everywhere = set(steps.values())
        for n in range(len(self.tokens[members[0]])):
            everywhere &= {its for at, its in steps.items() if at[0] == n}
        if everywhere == set(steps.values()) and 0 < len(everywhere) <= len(_VARIABLES):
            patterns = self._patterns(members[0], columns, steps)
            if self.is_exact(patterns, members):
                yield patterns, members
                return
        # A number that not all names have can be no counter: the others are, for each of its values.
        # Of those the one with the fewest values leaves the fewest rules.
        apart = [at for at, its in steps.items() if its not in everywhere] or list(steps)
        split = min(apart, key=lambda at: len(set(columns[at])))
        parts: dict[int, list[int]] = {}
        for n, value in zip(members, columns[split], strict=True):
            parts.setdefault(value, []).append(n)
        for part in parts.values():
            yield from self.solved(part)

    def _columns(self, members: Sequence[int]) -> dict[_Place, list[int]]:
        """The value of each number in each of the members."""
        return {
            (n, k): [_number(self.tokens[m][n][k]).value for m in members]
            for n, name in enumerate(self.tokens[members[0]])
            for k, token in enumerate(name)
            if isinstance(token, _Number)
        }

    def _patterns(
        self, first: int, columns: dict[_Place, list[int]], steps: dict[_Place, tuple[int, ...]]
    ) -> Patterns:
        """The names with one counter for all numbers that take the same steps."""
        counters: dict[_Place, Counter] = {}
        for variable, kind in zip(_VARIABLES, dict.fromkeys(steps.values()), strict=False):
            low = {at: min(columns[at]) for at, its in steps.items() if its == kind}
            factors = {at: (max(columns[at]) - low[at]) // max(kind) for at in low}
            # Counted from as far as no number needs to be taken off: `{i}` and not `{i+2}`, where all are so.
            begin = min(low[at] // factors[at] for at in low)
            for at in low:
                counters[at] = Counter(
                    variable=variable,
                    factor=factors[at],
                    offset=low[at] - factors[at] * begin,
                    is_suffix=_number(self.tokens[first][at[0]][at[1]]).is_suffix and 0 in columns[at],
                )
        names = []
        for n, name in enumerate(self.tokens[first]):
            parts: list[str | Counter] = []
            for k, token in enumerate(name):
                counter = counters.get((n, k))
                if counter is None:
                    parts.append(str(token))
                else:
                    parts += ["_" if _number(token).is_suffix and not counter.is_suffix else "", counter]
            names.append(_joined(parts))
        return tuple(names)


def _number(token: _Token) -> _Number:
    assert isinstance(token, _Number)
    return token


def _steps(values: Sequence[int]) -> tuple[int, ...]:
    """How many of its smallest steps each value is above the lowest."""
    low = min(values)
    step = math.gcd(*(value - low for value in values))
    return tuple((value - low) // step for value in values)


def _joined(parts: Sequence[str | Counter]) -> NamePattern:
    merged: list[str | Counter] = []
    for part in parts:
        if isinstance(part, str) and merged and isinstance(merged[-1], str):
            merged[-1] += part
        elif part != "":
            merged.append(part)
    return NamePattern(tuple(merged))
