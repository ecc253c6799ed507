"""The table of a plan: `dense.kernel  (8, 16)  float32  <- transpose(fc1.weight)  out in -> in out  named`.

What is done to a source is written as it would be in code: `weight[0:64]` is a part, `sum(a, b)`, `concat(a,
b)`, `transpose(x)`, `reorder(x)` (entries of an axis), `reshape(x)`, `cast(x)`. Rows stand in one line where
all fit into `WIDTH` columns, else in two.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby

from rich.text import Text

from ckptconv.rendering.text import Rows, View, clean, count, heading
from ckptconv.report import Plan, Producer, Row, place

WIDTH = 100
TABLE_ROWS = 400
"""Rows, and items left over, that are shown unless all are asked for."""

_LEFT_ROWS = 40
_STYLES = ("cyan", "", "", "", "dim", "dim")
_ENTRIES = re.compile(r"\([\w,]+\)")
_LAYOUT = frozenset({"permute", "reshape", "reorder"})

Op = Mapping[str, object]


def plan_views(plan: Plan, *, verbose: bool = False) -> list[View]:
    """The rows, slots only where they do not go as their parameter does or if `verbose`; the rest."""
    made = {row.target[1]: row for row in plan.rows if row.target[0] == "param"}
    alone = [row for row in plan.rows if row.producers and (verbose or not _follows(row, made))]
    shown = alone if verbose else alone[:TABLE_ROWS]
    views: list[View] = [Text(), heading("Plan"), *_table([_cells(row) for row in shown])]
    if len(alone) > len(shown):
        views.append(Text(f"  and {count(len(alone) - len(shown), 'row')} more (--verbose shows them)"))
    if following := Counter(str(row.target[2]) for row in plan.rows if not verbose and _follows(row, made)):
        told = ", ".join(f"{clean(slot)} ({number:,})" for slot, number in following.items())
        views.append(Text(f"  Slots that go as their parameters do: {told}"))
    fates = {row.target: row.fate.replace("-", " ") for row in plan.rows}
    ours = [place(address) for address in plan.left_in_source]
    theirs = [f"{place(a)}  {fates.get(a, 'without a producer')}" for a in plan.left_in_target]
    views += _left("Arrays of the source that are left over", ours, verbose)
    views += _left("Arrays that only the target has", theirs, verbose)
    return views


def _follows(row: Row, made: Mapping[str | int, Row]) -> bool:
    """Whether a slot is made of its parameter's slots as the parameter is made of parameters."""
    param = made.get(row.target[-1]) if row.target[0] == "slot" else None
    if param is None or not row.producers:
        return False
    return _way(row) == _way(param)


def _way(row: Row) -> list[tuple[object, list[Op]]]:
    return [(p.item[-1], [op for op in p.ops if op["op"] != "cast"]) for p in row.producers]


def _cells(row: Row) -> tuple[str, ...]:
    shape = f"({', '.join(map(str, row.shape))}{',' if len(row.shape) == 1 else ''})"
    source = f"<- {expression(row.producers)}"
    return tuple(map(clean, (place(row.target), shape, row.dtype, source, _turned(row), row.evidence)))


def _turned(row: Row) -> str:
    """The order of the axes before and after, where it changes; the entries of an axis only where they do."""
    if row.axes is None or row.axes[0] == row.axes[1]:
        return ""
    before, after = (" ".join(side) for side in row.axes)
    if set(_ENTRIES.findall(before)) == set(_ENTRIES.findall(after)):
        before, after = _ENTRIES.sub("", before), _ENTRIES.sub("", after)
    return f"{before} -> {after}"


def _table(rows: Sequence[tuple[str, ...]]) -> Iterator[View]:
    if not rows:
        return
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    if 2 + sum(widths) + 2 * len(widths) <= WIDTH:
        yield Rows(styles=_STYLES, indent=2, cells=list(rows))
        return
    for target, shape, dtype, source, axes, evidence in rows:
        yield Text.assemble("  ", (target, "cyan"), f"  {shape}  {dtype}")
        yield Text("      " + "  ".join(filter(None, (source, axes, evidence))))


def _left(title: str, items: Sequence[str], verbose: bool) -> Iterator[View]:
    if not items:
        return
    shown = items if verbose else items[:_LEFT_ROWS]
    yield Text()
    yield heading(title)
    yield from (Text(f"  {clean(item)}") for item in shown)
    if len(items) > len(shown):
        yield Text(f"  and {len(items) - len(shown):,} more (--verbose shows them)")


def expression(producers: Sequence[Producer]) -> str:
    """What makes an array, as code would say it."""
    parts: dict[int, list[tuple[str, list[Op]]]] = defaultdict(list)
    for producer in producers:
        part = next((op["part"] for op in producer.ops if "part" in op), 0)
        assert isinstance(part, int)
        parts[part].append((place(producer.item), [op for op in producer.ops if "part" not in op]))
    texts = [_sum(terms) for _, terms in sorted(parts.items())]
    return texts[0] if len(texts) == 1 else f"concat({', '.join(texts)})"


def _sum(terms: Sequence[tuple[str, list[Op]]]) -> str:
    names = [op["op"] for op in terms[0][1]]
    if "add" not in names:
        return ", ".join(_applied(name, ops) for name, ops in terms)
    at = names.index("add")
    inner = ", ".join(_applied(name, ops[:at]) for name, ops in terms)
    return _applied(f"sum({inner})", terms[0][1][at + 1 :])


def _applied(text: str, ops: Sequence[Op]) -> str:
    for is_layout, run in groupby(ops, key=lambda op: op["op"] in _LAYOUT):
        some = list(run)
        text = _moved(text, some) if is_layout else _one_by_one(text, some)
    return text


def _moved(text: str, ops: Sequence[Op]) -> str:
    """Ops on axes: a reshape before and after another one only splits and merges what that needs."""
    names = {str(op["op"]) for op in ops}
    if "reorder" in names:
        text = f"reorder({text})"
    if "permute" in names:
        return f"transpose({text})"
    return text if "reorder" in names else f"reshape({text})"


def _one_by_one(text: str, ops: Sequence[Op]) -> str:
    for op in ops:
        match op["op"]:
            case "slice":
                axis = op["axis"]
                before = ":, " * axis if isinstance(axis, int) else ""
                text = f"{text}[{before}{op['start']}:{op['stop']}]"
            case "scale":
                text = f"{op['factor']} * {text}"
            case "shift":
                text = f"({text} + {op['offset']})"
            case name:
                text = f"{name}({text})"
    return text
