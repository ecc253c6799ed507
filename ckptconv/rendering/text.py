"""Text of a file made safe, numbers with units, aligned lists."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from rich.cells import cell_len
from rich.table import Table
from rich.text import Text

from ckptconv.document import Value

LISTED = 8
"""Groups of an optimizer, and items of one fate, that are shown by name."""

_VALUE_LENGTH = 300
"""Longer strings of a file are cut, and it is said how long they are."""

_GAP = 2
"""Blanks between columns."""


def clean(value: object) -> str:
    """Text of a file made safe to show: control characters escaped."""
    text = str(value)
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def clip(value: object) -> str:
    """A value made safe to show, and cut where it is very long."""
    text = str(value)
    if len(text) <= _VALUE_LENGTH:
        return clean(text)
    return f"{clean(text[:_VALUE_LENGTH])} [{len(text):,} characters in all]"


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """Aligned cells without a frame. A terminal folds them where it is narrow, a pipe gets them whole."""

    styles: tuple[str, ...]
    """Per column."""
    titles: tuple[str, ...] = ()
    indent: int = 0
    whole: frozenset[int] = frozenset()
    """Columns that are never folded."""
    cells: list[tuple[str | Text, ...]] = field(default_factory=list)

    def add(self, *cells: str | Text) -> None:
        """One row more; as many cells as columns."""
        self.cells.append(cells)

    def __rich__(self) -> Table:
        table = Table(box=None, pad_edge=False, padding=(0, _GAP, 0, 0), show_header=bool(self.titles))
        if self.indent:
            table.add_column(width=max(self.indent - _GAP, 0), no_wrap=True)
        for column, style in enumerate(self.styles):
            title = self.titles[column] if self.titles else ""
            table.add_column(
                title, style=style, header_style="bold", overflow="fold", no_wrap=column in self.whole
            )
        for cells in self.cells:
            texts = [cell if isinstance(cell, Text) else Text(cell) for cell in cells]
            table.add_row(*([""] if self.indent else []), *texts)
        return table

    def lines(self) -> Iterator[str]:
        """The rows as plain text, nothing folded."""
        rows = [tuple(str(cell) for cell in cells) for cells in (self.titles, *self.cells) if cells]
        widths = [max(cell_len(row[column]) for row in rows) for column in range(len(self.styles))]
        for row in rows:
            padded = (cell + " " * (width - cell_len(cell)) for cell, width in zip(row, widths, strict=True))
            yield (" " * self.indent + (" " * _GAP).join(padded)).rstrip()


View = Text | Rows


def plain(views: Iterable[View]) -> str:
    """The views as text for a pipe."""
    lines: list[str] = []
    for view in views:
        lines += view.lines() if isinstance(view, Rows) else [view.plain.rstrip()]
    return "".join(f"{line}\n" for line in lines)


def size(nbytes: int) -> str:
    """Bytes with a decimal unit."""
    if nbytes < 1000:
        return f"{nbytes} B"
    amount = float(nbytes)
    for unit in ("kB", "MB", "GB", "TB"):
        amount /= 1000
        if amount < 999.5 or unit == "TB":
            return f"{amount:.1f} {unit}"
    raise AssertionError("the loop returns")


def count(number: int, noun: str, plural: str | None = None) -> str:
    """A number with its noun."""
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"


def value_text(value: Value) -> str:
    """A fact's value as people write it."""
    if isinstance(value, tuple):
        return "(" + ", ".join(value_text(part) for part in value) + ")"
    if isinstance(value, bool) or value is None:
        return str(value).lower() if isinstance(value, bool) else "none"
    return clip(_shortest(value) if isinstance(value, float) else value)


def _shortest(value: float) -> str:
    """A number that came through float32 in its shortest form: 0.01 for 0.0099999998."""
    text = repr(value)
    if abs(value) > _FLOAT32_MAX:
        return text
    (single,) = struct.unpack("<f", struct.pack("<f", value))
    if single != value:
        return text
    return next(
        (short for digits in range(1, 9) if _as_float32(short := f"{value:.{digits}g}") == value), text
    )


def _as_float32(text: str) -> float:
    (single,) = struct.unpack("<f", struct.pack("<f", float(text)))
    return float(single)


_FLOAT32_MAX = 3.4028234663852886e38


def shape_text(shape: Sequence[int], axes: Sequence[str] | None = None) -> str:
    """A shape with the names of its axes where they are known: `out 64 x in 32`."""
    if not shape:
        return "scalar"
    if axes is None or len(axes) != len(shape):
        return " x ".join(str(n) for n in shape)
    return " x ".join(f"{clean(axis)} {n}" for axis, n in zip(axes, shape, strict=True))


def listed(names: Sequence[str]) -> str:
    """The first few names, and how many more there are."""
    more = f" and {len(names) - LISTED:,} more" if len(names) > LISTED else ""
    return ", ".join(clean(name) for name in names[:LISTED]) + more


def fields(rows: Iterable[tuple[str, str | Text]]) -> Rows:
    """Labels with their contents."""
    return Rows(styles=("cyan", ""), indent=_GAP, whole=frozenset({0}), cells=list(rows))


def heading(text: str) -> Text:
    return Text(text, style="bold")
