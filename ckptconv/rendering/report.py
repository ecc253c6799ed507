"""A conversion's report for people: a summary, and the ledger on demand."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from rich.text import Text

from ckptconv.rendering.plan import plan_views
from ckptconv.rendering.text import Rows, View, clean, count, fields, heading, listed, size, value_text
from ckptconv.report import Entry, Report

_FATES: Mapping[str, str] = {
    "copied": "copied bit for bit",
    "transformed": "transformed",
    "supplied": "supplied by you or a skeleton",
    "created": "created, the source has none",
    "kept-from-template": "kept from the template",
    "noted": "kept in the embedded note",
    "aliased": "share memory with another item",
    "left": "left behind",
}

_NAMED_FATES = ("supplied", "created", "kept-from-template", "noted", "left")
"""Fates of which a summary names the items."""


def report_view(report: Report, *, verbose: bool = False) -> list[View]:
    """What a conversion did or would do; the ledger line by line only if `verbose`."""
    arrow = Text.assemble(
        (clean(report.source), "bold"), _dialect(report.source_dialect),
        " -> ",
        (clean(report.target), "bold"), _dialect(report.target_dialect),
    )  # fmt: skip
    views: list[View] = [arrow, fields(_outcome(report))]
    if report.plan is not None:
        views += plan_views(report.plan, verbose=verbose)
    if verbose and report.ledger:
        views += [Text(), heading("Ledger"), _ledger(report.ledger)]
    if report.target_requires:
        views += [Text(), heading("The target's file cannot hold this, so your code must say it:")]
        views += [Text(clean(line)) for line in report.target_requires]
    if report.restore:
        views += [Text(), heading("To go on from it:")]
        views += [Text(clean(line)) for line in report.restore.rstrip("\n").split("\n")]
    return views


def _dialect(name: str) -> str:
    return f" ({clean(name)})" if name else ""


def _outcome(report: Report) -> list[tuple[str, str | Text]]:
    rows: list[tuple[str, str | Text]] = []
    if report.chosen:
        rows.append(("chosen", clean(report.chosen)))
    if report.dry_run:
        rows.append(("nothing written", "this is the plan"))
    else:
        checked = "read back and equal" if report.verified else "not read back (--no-verify)"
        for name, nbytes in report.files:
            rows.append(("wrote", f"{clean(name or report.target)}  {size(nbytes)}"))
        rows.append(("verified" if report.verified else "not verified", f"{checked}; {report.seconds:.1f} s"))
    progress = ", ".join(f"{name} {value_text(value)}" for name, value in report.progress.items())
    rows.append(("progress", progress or "none known"))
    for verdict in report.verdicts:
        style = {"exact": "green", "refused": "red"}.get(verdict.verdict, "yellow")
        name = "" if verdict.optimizer == "optimizer" else f"{clean(verdict.optimizer)}: "
        line = f"{name}{clean(verdict.source)} -> {clean(verdict.target)}, "
        rows.append(("optimizer", Text.assemble(line, (verdict.verdict, style))))
        rows += [("", clean(residual)) for residual in verdict.residuals]
    by_fate: dict[str, list[Entry]] = {}
    for entry in report.ledger:
        by_fate.setdefault(entry.fate, []).append(entry)
    for fate, gloss in _FATES.items():
        if entries := by_fate.get(fate):
            rows.append((count(len(entries), "item"), gloss + _named(fate, entries)))
    if report.allowed:
        rows.append(("allowed", ", ".join(report.allowed)))
    return rows


def _named(fate: str, entries: Sequence[Entry]) -> str:
    if fate not in _NAMED_FATES:
        return ""
    technical = [entry for entry in entries if entry.item[:1] == ("residue",) and len(entry.item) > 2]
    named = [entry for entry in entries if entry not in technical]
    names = list(dict.fromkeys(entry.target or _address(entry) for entry in named))
    own = (
        f"{count(len(technical), 'setting')} of the source's own (--verbose lists them)" if technical else ""
    )
    return ": " + "; ".join(filter(None, (listed(names), own)))


def _address(entry: Entry) -> str:
    return ".".join(str(step) for step in entry.item)


def _ledger(entries: Iterable[Entry]) -> Rows:
    rows = Rows(styles=("", "", "", ""), titles=("source item", "fate", "target", "how and why"))
    for entry in entries:
        how = [*(_op(op) for op in entry.ops), *filter(None, (entry.evidence, entry.detail))]
        if entry.allowed_by:
            how.append(f"allowed by {entry.allowed_by}")
        cells = (_address(entry), entry.fate, entry.target, "; ".join(how))
        rows.add(*(clean(cell) for cell in cells))
    return rows


def _op(op: Mapping[str, object]) -> str:
    arguments = " ".join(f"{key}={value}" for key, value in op.items() if key != "op")
    return f"{op.get('op', '?')} {arguments}".strip()
