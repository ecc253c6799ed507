"""Names with counters in them: `encoder.layers.{i}.weight` stands for that weight of every layer.

    {i}         an integer, 0 or without leading zeros
    {i+1}       the integer that is one more; {i-1}, {2*i}, {3*i+1} likewise
    {_i}        Keras' counter of equal names: nothing for 0, `_1` for 1, and so on; {_2*i+1} likewise

A counter has a letter and may have more letters and digits (`{block}`, `{i2}`). It never stands for anything
but one integer, so that it does not reach across a dot or a slash. Everything else is meant as it is written.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

Indices = Mapping[str, int]
"""What each counter stands for."""

_TOKEN = re.compile(r"\{(_?)(?:([1-9][0-9]{0,8})\*)?([a-z][a-z0-9]*)([+-][0-9]{1,9})?\}")
_NUMBER = "(0|[1-9][0-9]{0,8})"
_SUFFIX = "(?:_([1-9][0-9]{0,8}))?"


@dataclass(frozen=True, slots=True, kw_only=True)
class Counter:
    """One place of a name where a number stands: `factor * variable + offset`."""

    variable: str
    factor: int = 1
    offset: int = 0
    is_suffix: bool = False
    """Whether 0 is written as nothing and other numbers behind an underscore."""

    def value_of(self, digits: str | None) -> int | None:
        """What the variable is where the number is written so; None where it is no such number."""
        number = int(digits or 0) - self.offset
        return number // self.factor if number >= 0 and number % self.factor == 0 else None

    def text(self, value: int) -> str | None:
        """How the number is written; None where it is negative."""
        number = self.factor * value + self.offset
        if number < 0:
            return None
        return (f"_{number}" if number else "") if self.is_suffix else str(number)

    def __str__(self) -> str:
        factor = f"{self.factor}*" if self.factor != 1 else ""
        offset = f"{self.offset:+d}" if self.offset else ""
        return "{" + "_" * self.is_suffix + factor + self.variable + offset + "}"


@dataclass(frozen=True, slots=True)
class NamePattern:
    """A name with counters; without any it is one name."""

    parts: tuple[str | Counter, ...]
    _expression: re.Pattern[str] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        written = (
            re.escape(part) if isinstance(part, str) else _SUFFIX if part.is_suffix else _NUMBER
            for part in self.parts
        )
        object.__setattr__(self, "_expression", re.compile("".join(written), re.DOTALL))

    @property
    def variables(self) -> frozenset[str]:
        return frozenset(part.variable for part in self.parts if isinstance(part, Counter))

    def match(self, name: str) -> dict[str, int] | None:
        """What the counters stand for where the name is one of the pattern's."""
        found = self._expression.fullmatch(name)
        if found is None:
            return None
        indices: dict[str, int] = {}
        counters = (part for part in self.parts if isinstance(part, Counter))
        for counter, digits in zip(counters, found.groups(), strict=True):
            value = counter.value_of(digits)
            if value is None or indices.setdefault(counter.variable, value) != value:
                return None
        return indices

    def fill(self, indices: Indices) -> str | None:
        """The name for these numbers; None where one of them would be negative."""
        texts = [part if isinstance(part, str) else part.text(indices[part.variable]) for part in self.parts]
        return None if None in texts else "".join(text for text in texts if text is not None)

    def __str__(self) -> str:
        return "".join(map(str, self.parts))


def parse_pattern(text: str) -> NamePattern | str:
    """The pattern that a text means, or what is wrong with it."""
    parts: list[str | Counter] = []
    at = 0
    for token in _TOKEN.finditer(text):
        if token.start() > at:
            parts.append(text[at : token.start()])
        suffix, factor, variable, offset = token.groups()
        counter = Counter(
            variable=variable, factor=int(factor or 1), offset=int(offset or 0), is_suffix=bool(suffix)
        )
        # Two numbers with nothing but digits between them could be told apart in several ways.
        before = parts[-1] if parts else "."
        if len(parts) > 1 and isinstance(before, str) and before.isdecimal():
            before = parts[-2]
        if isinstance(before, Counter):
            return f"between {before} and {counter} something must stand that is no number"
        parts.append(counter)
        at = token.end()
    if at < len(text):
        parts.append(text[at:])
    literal = next((part for part in parts if isinstance(part, str) and set(part) & {"{", "}"}), None)
    if literal is not None:
        return f"'{literal}' has a brace and no counter such as {{i}}, {{i+1}}, {{2*i}} or {{_i}}"
    if not parts:
        return "a name is needed"
    return NamePattern(tuple(parts))
