"""Text of a file made safe, numbers with units, aligned lists."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence

from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from ckptconv.document import Value

LISTED = 8
"""Groups of an optimizer, and items of one fate, that are shown by name."""

_VALUE_LENGTH = 300
"""Longer strings of a file are cut, and it is said how long they are."""

_PLAIN_WIDTH = 1 << 16


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


def plain(views: Iterable[RenderableType]) -> str:
    """The views as text for a pipe."""
    out = io.StringIO()
    console = Console(
        file=out, width=_PLAIN_WIDTH, color_system=None, force_terminal=False, highlight=False, emoji=False
    )
    for view in views:
        console.print(view, markup=False, soft_wrap=False)
    return "".join(f"{line.rstrip()}\n" for line in out.getvalue().splitlines())


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
    return clip(value)


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


def grid(*columns: str) -> Table:
    """An indented list without a frame; `columns` are styles, the last column wraps, the others do not."""
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(width=0, no_wrap=True)
    for style in columns[:-1]:
        table.add_column(no_wrap=True, style=style)
    table.add_column(overflow="fold", style=columns[-1])
    return table


def table(*titles: str, whole: Sequence[str] = ()) -> Table:
    """A table without a frame; cells fold where a terminal is narrow, except in the columns `whole`."""
    result = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold", show_edge=False)
    for title in titles:
        result.add_column(title, overflow="fold", no_wrap=title in whole)
    return result


def fields(rows: Iterable[tuple[str, str | Text]]) -> Table:
    """Labels with their contents."""
    result = grid("cyan", "")
    for label, content in rows:
        result.add_row("", label, content if isinstance(content, Text) else Text(content))
    return result


def heading(text: str) -> Text:
    return Text(text, style="bold")
