"""A diagnosis for people, also for those who do not know what an object graph is."""

from __future__ import annotations

from collections.abc import Mapping

from rich.text import Text

from ckptconv.doctor import Diagnosis, Mend, said
from ckptconv.rendering.text import Rows, View, clean, heading

_STYLES: Mapping[str, str] = {
    "restored": "green",
    "zero": "bold red",
    "kept": "bold red",
    "wrong": "bold red",
    "refused": "yellow",
    "absent": "",
}
_STEP = {"restored": "restored", "zero": "stays 0", "refused": "refused", "absent": "none kept"}
_WEIGHTS = {"restored": "restored", "kept": "not restored"}
_STATE = {"restored": "restored", "zero": "starts anew", "wrong": "WRONG PLACE"}
_SIGNAL = {"none": "nothing", "warning": "a warning", "later": "a late log line", "error": "an error"}


def doctor_view(diagnosis: Diagnosis) -> list[View]:
    """The step, the calls that restore it or not, what else may go wrong, and what to do."""
    views: list[View] = [
        Text.assemble((clean(diagnosis.source), "bold"), f": {clean(diagnosis.what)}"),
        Text(),
        Text.assemble(("The step: ", "bold"), clean(said(diagnosis.step))),
        *(
            Text.assemble("  of ", (clean(name), "cyan"), f": {clean(said(s))}")
            for name, s in diagnosis.steps
        ),
    ]
    if diagnosis.restores:
        views += [Text(), heading("What restores it, and what does not"), _table(diagnosis)]
        views += [Text(), heading("Why")]
        views += [
            Text.assemble(f"  {number}  ", clean(restore.why))
            for number, restore in enumerate(diagnosis.restores, 1)
        ]
    if diagnosis.findings:
        views += [Text(), heading("Worth knowing")]
        views += [Text(f"  -  {clean(finding)}") for finding in diagnosis.findings]
    if diagnosis.mends:
        views += [Text(), heading("What to do")]
        for mend in diagnosis.mends:
            views += _mend(mend)
    return views


def _table(diagnosis: Diagnosis) -> Rows:
    titles = ("", "where", "call", "step", "weights", "optimizer state", "you are told")
    rows = Rows(styles=("", "cyan", "", "", "", "", ""), titles=titles, indent=2)
    for number, restore in enumerate(diagnosis.restores, 1):
        rows.add(
            str(number),
            restore.framework,
            restore.call,
            Text(_STEP[restore.step], style=_STYLES[restore.step]),
            Text(_WEIGHTS[restore.weights], style=_STYLES[restore.weights]),
            Text(_STATE[restore.state], style=_STYLES[restore.state]),
            _SIGNAL[restore.signal],
        )
    return rows


def _mend(mend: Mend) -> list[View]:
    views: list[View] = [Text(f"  {clean(mend.text)}")]
    views += [Text(f"      {line}", style="dim") for line in mend.code]
    if mend.command:
        views.append(Text(f"      {clean(mend.command)}", style="bold"))
    return views
