"""A diagnosis for people, also for those who do not know what an object graph is."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from rich.text import Text

from ckptconv.catalog.restores import Restore
from ckptconv.doctor import Diagnosis, said
from ckptconv.mends import Mend
from ckptconv.rendering.text import Rows, View, clean, heading

_STEP: Mapping[str, str] = {
    "restored": "the step comes back",
    "zero": "the step stays 0",
    "absent": "there is no step to come back",
}
_WEIGHTS: Mapping[str, str] = {"restored": "the weights come back", "kept": "the weights do not come back"}
_STATE: Mapping[str, str] = {
    "restored": "the optimizer's state comes back",
    "zero": "the optimizer's state begins anew",
    "wrong": "the optimizer's state lands IN THE WRONG PLACE",
}
_SIGNAL: Mapping[str, str] = {
    "none": "You are told nothing.",
    "warning": "You are told in a warning.",
    "later": "You are told in the log alone, and late: when what the call returned is deleted.",
}
_STATE_IS = "The optimizer's state: what it keeps for each weight, such as the averages (moments) of Adam."


def doctor_view(diagnosis: Diagnosis) -> list[View]:
    """Whether the step is in the file, which calls bring it back, what else may go wrong, and what to do."""
    views: list[View] = [
        Text.assemble((clean(diagnosis.source), "bold"), f": {clean(diagnosis.what)}"),
        Text(),
        Text.assemble(("Is the step in this file? ", "bold"), clean(said(diagnosis.step))),
        *(
            Text.assemble("  Of ", (clean(name), "cyan"), f": {clean(said(step))}")
            for name, step in diagnosis.steps
        ),
    ]
    views += _calls(diagnosis)
    if diagnosis.findings:
        views += [Text(), heading("Worth knowing")]
        views.append(_list(("-", Text(clean(finding))) for finding in diagnosis.findings))
    if diagnosis.mends:
        views += [Text(), heading("What to do")]
        for mend in diagnosis.mends:
            views += _mend(mend)
    return views


def _calls(diagnosis: Diagnosis) -> list[View]:
    if diagnosis.unmeasured:
        return [Text(), heading("What brings all of it back"), Text(f"  {clean(diagnosis.unmeasured)}")]
    whole = [restore for restore in diagnosis.restores if diagnosis.has_optimizer and restore.whole]
    rest = [restore for restore in diagnosis.restores if restore not in whole]
    views: list[View] = []
    if whole:
        views += [Text(), heading("What brings all of it back"), _rows(whole, optimizer=True)]
    if rest and diagnosis.has_optimizer:
        views += [Text(), heading("What loses some of it"), _rows(rest, optimizer=True)]
        views.append(Text(f"  {_STATE_IS}", style="dim"))
    elif rest:
        views += [Text(), heading("What comes of loading it"), _rows(rest, optimizer=False)]
    return views


def _rows(restores: Iterable[Restore], *, optimizer: bool) -> Rows:
    """Where, the call, what comes of it, and why, each on a line."""
    return _list(row for restore in restores for row in _restore(restore, optimizer=optimizer))


def _restore(restore: Restore, *, optimizer: bool) -> list[tuple[str, Text]]:
    lines = clean(restore.call).split("; ")
    where = Text.assemble((clean(restore.framework), "cyan"), ":")
    if len(lines) == 1:
        rows = [("-", where.append(f"  {lines[0]}"))]
    else:
        rows = [("-", where), *(("", Text(f"    {line}")) for line in lines)]
    told = f"{_outcome(restore, optimizer=optimizer)} {clean(restore.why)}".strip()
    rows.append(("", Text(told, style=_style(restore))))
    if restore.source:
        rows.append(("", Text(f"(As its source says, not measured: {clean(restore.source)})", style="dim")))
    return rows


def _outcome(restore: Restore, *, optimizer: bool) -> str:
    if restore.signal == "error":
        touched = (
            " Before that, part of the optimizer's state is overwritten." if restore.state == "wrong" else ""
        )
        return f"It fails with an error.{touched}"
    if optimizer and restore.whole:
        return "" if restore.signal != "later" else "The log warns all the same."
    parts = [_STEP[restore.step], _WEIGHTS[restore.weights]]
    told = "; ".join([*parts, _STATE[restore.state]] if optimizer else parts)
    return f"{told[0].upper()}{told[1:]}. {_SIGNAL[restore.signal]}"


def _style(restore: Restore) -> str:
    if restore.whole:
        return ""
    return "yellow" if restore.signal == "error" else "red"


def _list(rows: Iterable[tuple[str, Text]]) -> Rows:
    return Rows(styles=("", ""), indent=2, whole=frozenset({0}), cells=list(rows))


def _mend(mend: Mend) -> list[View]:
    views: list[View] = [Text(f"  {clean(mend.text)}")]
    views += [Text(f"      {clean(line)}", style="" if mend.command else "bold") for line in mend.code]
    if mend.command:
        views.append(Text(f"      {clean(mend.command)}", style="bold"))
    return views
