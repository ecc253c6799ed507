"""Variables that stand for several of another library's, and the other way round: the table.

`data/compounds.json` says per family of frameworks how its variables come apart: `cuts` divide one along an
axis into pieces with names of their own (a piece alone is the variable under another name), `sums` are
variables that only ever act through their sum. A name's end is matched as a whole number of its parts.
`reparametrizations` are variables of which a layer makes one in each of its runs: torch's weight norm (g and
v) and spectral norm (the weight, and a left and a right singular vector).
`directions` are parts of names that tell whether a recurrent layer reads its input from the start or the end.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cache, lru_cache

from ckptconv.catalog.loading import Record, load


@dataclass(frozen=True, slots=True, kw_only=True)
class CutRow:
    """One variable that is several pieces along an axis."""

    family: str
    pattern: re.Pattern[str]
    pieces: tuple[str, ...]
    """Templates of the pieces' names, in the place of what the pattern matched."""
    axis: int
    beside: tuple[str, ...]
    """Names in the same place, one of which must be there too; none are needed where none is given."""
    kind: str | None
    """The pieces' kind of layer, whatever the variable's is."""
    layers: Mapping[str, str]
    """The variable's kind of layer -> the pieces'; where given, no other variable is meant."""
    roles: Mapping[str, str]
    """Last part of a piece's name -> its role; none where only the shapes tell."""
    parts: tuple[str, ...]
    """What each piece is of several alike, one template per piece; none where nothing is."""

    def names(self, name: str, layer: str, known: Collection[str]) -> tuple[str, ...]:
        """Names of the pieces of a variable; none where the row does not mean it."""
        found = self.pattern.fullmatch(name)
        if found is None or (self.layers and layer not in self.layers):
            return ()
        prefix = found["prefix"] or ""
        if self.beside and not any(prefix + other in known for other in self.beside):
            return ()
        return tuple(prefix + _filled(piece, found) for piece in self.pieces)

    def parts_of(self, name: str) -> tuple[str, ...]:
        """What each piece of a variable is of several alike; empty for one that is nothing of the kind."""
        found = self.pattern.fullmatch(name)
        filled = tuple(_filled(part, found) for part in self.parts) if found is not None else ()
        return filled or ("",) * len(self.pieces)

    def kind_of(self, layer: str) -> str | None:
        """The kind of layer of a variable's pieces; None where only the shapes tell."""
        return self.kind or self.layers.get(layer)


@dataclass(frozen=True, slots=True, kw_only=True)
class SumRow:
    """Two variables of a layer that act through their sum alone."""

    family: str
    layers: frozenset[str]
    terms: tuple[str, ...]
    """Last parts of their names."""
    whole: str
    """Last part of the sum's name."""
    role: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ReparametrizedRow:
    """Variables of which a layer makes one by a rule."""

    family: str
    pattern: re.Pattern[str]
    """Of the first one's name."""
    terms: tuple[str, ...]
    whole: str
    rule: str

    def names(self, name: str, known: Collection[str]) -> tuple[str, tuple[str, ...]] | None:
        """The name of what is made, and of those that it is made of; None where the row does not mean it."""
        found = self.pattern.fullmatch(name)
        if found is None:
            return None
        prefix = found["prefix"] or ""
        terms = tuple(prefix + _filled(term, found) for term in self.terms)
        whole = prefix + _filled(self.whole, found)
        return (whole, terms) if whole not in known and all(term in known for term in terms) else None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Table:
    families: Mapping[str, str]
    cuts: tuple[CutRow, ...]
    sums: tuple[SumRow, ...]
    reparametrized: tuple[ReparametrizedRow, ...]
    directions: tuple[tuple[str, re.Pattern[str], str], ...]
    """Family, pattern of a part of a name, direction."""


def family(framework: str) -> str:
    """The family of a framework; its own name where the table has none."""
    return _table().families.get(framework, framework)


@cache
def cut_rows(framework: str) -> tuple[CutRow, ...]:
    return tuple(row for row in _table().cuts if row.family == family(framework))


def sum_rows(framework: str) -> tuple[SumRow, ...]:
    return tuple(row for row in _table().sums if row.family == family(framework))


def reparametrized_rows(framework: str) -> tuple[ReparametrizedRow, ...]:
    return tuple(row for row in _table().reparametrized if row.family == family(framework))


def home(framework: str, name: str) -> str:
    """The name under which a variable stands beside its layer's: `rnn.l0.weight_ih` of `rnn.weight_ih_l0`."""
    for row in _moves(framework):
        if found := row.names(name, "unknown", ()):
            return found[0]
    return name


@lru_cache(maxsize=4096)
def direction(framework: str, name: tuple[str, ...]) -> str | None:
    """Whether a recurrent layer runs `forward` or `backward`; None where its name tells nothing."""
    own = [(pattern, told) for of, pattern, told in _table().directions if of == family(framework)]
    return next((told for part in reversed(name) for pattern, told in own if pattern.fullmatch(part)), None)


@cache
def _moves(framework: str) -> tuple[CutRow, ...]:
    """The rows that only give a variable another name."""
    return tuple(row for row in cut_rows(framework) if not row.roles)


def _filled(template: str, found: re.Match[str]) -> str:
    r"""The template with the pattern's groups for `\1`, `\2`, ..., nothing for those that are absent."""
    return re.sub(r"\\(\d)", lambda group: found.group(int(group[1]) + 1) or "", template)


@cache
def _table() -> _Table:
    record = load("compounds.json")
    record.text("source")
    inner = record.record("libraries")
    families = {framework: name for name in inner.keys for framework in inner.texts(name)}
    table = _Table(
        families=families,
        cuts=tuple(map(_cut, record.list_of_records("cuts"))),
        sums=tuple(map(_sum, record.list_of_records("sums"))),
        reparametrized=tuple(map(_reparametrized, record.list_of_records("reparametrizations"))),
        directions=tuple(map(_direction, record.list_of_records("directions"))),
    )
    record.close()
    return table


def _cut(record: Record) -> CutRow:
    row = CutRow(
        family=record.text("family"),
        pattern=_pattern(record),
        pieces=record.texts("pieces"),
        axis=record.optional_int("axis") or 0,
        beside=record.texts("beside"),
        kind=record.optional_text("kind"),
        layers=record.text_map("layers"),
        roles=record.text_map("roles"),
        parts=record.texts("parts"),
    )
    record.close()
    return row


def _sum(record: Record) -> SumRow:
    row = SumRow(
        family=record.text("family"),
        layers=frozenset(record.texts("layers")),
        terms=record.texts("of"),
        whole=record.text("sum"),
        role=record.text("role"),
    )
    record.close()
    return row


def _reparametrized(record: Record) -> ReparametrizedRow:
    row = ReparametrizedRow(
        family=record.text("family"),
        pattern=_pattern(record),
        terms=record.texts("terms"),
        whole=record.text("whole"),
        rule=record.text("rule"),
    )
    record.close()
    return row


def _pattern(record: Record) -> re.Pattern[str]:
    """Of a name's end: a whole number of its parts."""
    return re.compile(rf"(?P<prefix>.*[./])?(?:{record.text('pattern')})")


def _direction(record: Record) -> tuple[str, re.Pattern[str], str]:
    row = record.text("family"), re.compile(record.text("pattern")), record.text("direction")
    record.close()
    return row
