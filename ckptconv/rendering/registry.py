"""Raw listings and the list of formats for people."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.text import Text

from ckptconv.rendering.text import Rows, View, clean, clip, count, fields, heading, shape_text


def raw_view(format_: str, dialect: str | None, rows: Iterable[Mapping[str, object]]) -> list[View]:
    """Every leaf under the file's own key: dtype and shape, or the value."""
    lines = Rows(styles=("cyan", ""))
    total = 0
    for row in rows:
        total += 1
        lines.add(clean(row["key"]), _raw_cell(row))
    known = f"dialect {clean(dialect)}" if dialect else "no known dialect"
    return [Text(f"{clean(format_)}, {known}, {count(total, 'leaf', 'leaves')}"), Text(), lines]


def _raw_cell(row: Mapping[str, object]) -> str:
    if "dtype" not in row:
        value = row["value"]
        return clip(repr(value) if isinstance(value, str) else value)
    shape = row["shape"]
    assert isinstance(shape, list)
    digest = f"  sha256 {row['sha256']}" if "sha256" in row else ""
    return f"{row['dtype']} {shape_text(shape)}{digest}"


def dialect_rows(
    entry: Mapping[str, Any], formats: Sequence[Mapping[str, Any]]
) -> list[tuple[str, str | Text]]:
    """Names and summaries of a format's dialects; those that another format has as well share a row."""
    elsewhere = {
        (dialect["name"], dialect["summary"]): other["name"]
        for other in formats
        if other["name"] > entry["name"]
        for dialect in other["dialects"]
    }
    rows: list[tuple[str, str | Text]] = []
    shared: dict[str, list[str]] = {}
    for dialect in entry["dialects"]:
        home = elsewhere.get((dialect["name"], dialect["summary"]))
        if home is None:
            rows.append((f"{entry['name']}:{dialect['name']}", str(dialect["summary"])))
        else:
            shared.setdefault(home, []).append(dialect["name"])
    for home, names in shared.items():
        rows.append((f"{entry['name']}:DIALECT", f"as {home}:DIALECT: {', '.join(names)}"))
    return rows


def formats_view(
    formats: Sequence[Mapping[str, object]], optimizers: Sequence[Mapping[str, object]]
) -> list[View]:
    """The registered containers with their dialects, then the optimizers with their classes."""
    views: list[View] = []
    for entry in formats:
        suffixes = entry["suffixes"]
        assert isinstance(suffixes, list)
        ends = f" ({', '.join(suffixes)})" if suffixes else ""
        views.append(Text.assemble((str(entry["name"]), "bold"), f": {entry['summary']}{ends}"))
        views.append(fields(dialect_rows(entry, formats)))
        views.append(Text())
    views.append(heading("Optimizers whose state converts"))
    rows: list[tuple[str, str | Text]] = []
    for entry in optimizers:
        classes = entry["classes"]
        assert isinstance(classes, dict)
        rows.append((str(entry["algorithm"]), ", ".join(str(name) for name in classes.values())))
    return [*views, fields(rows)]


def directions_view(directions: Iterable[Mapping[str, object]]) -> list[View]:
    """The verdict of each algorithm from one framework to another, its error, and what stays different."""
    titles = (
        *("algorithm", "direction", "verdict", "measured, float64 / float32"),
        "what remains; what the run must have been",
    )
    lines = Rows(styles=("bold", "cyan", "", "", "dim"), titles=titles)
    for each in directions:
        options, remains, needs = (each[key] for key in ("options", "remains", "needs"))
        assert isinstance(options, list)
        assert isinstance(remains, list)
        assert isinstance(needs, list)
        name = f"{each['algorithm']} ({', '.join(options)})" if options else str(each["algorithm"])
        notes = [*remains, *(f"needs {need}" for need in needs)]
        way = f"{each['source']} -> {each['target']}"
        errors = _errors(each["measured"], str(each["algorithm"]))
        lines.add(name, way, str(each["verdict"]), errors, "; ".join(notes))
    return [lines]


def _errors(runs: object, algorithm: str) -> str:
    """The error of each run, in each dtype: `3.9e-05 / 3.9e-05 (eps1e-7)`."""
    assert isinstance(runs, list)
    texts = []
    for run in runs:
        numbers = (f"{run[d]:.1e}" if run[d] is not None else "-" for d in ("float64", "float32"))
        name = str(run["run"]).removeprefix(algorithm).strip(" _")
        texts.append(" / ".join(numbers) + (f" ({name})" if len(runs) > 1 else ""))
    return ", ".join(texts)
