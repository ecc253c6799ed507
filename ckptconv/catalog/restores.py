"""What each framework's restoring calls do with each kind of file: measured, one row each.

`data/restores.json` says for a kind of file which calls bring back step, weights and optimizer state, which
leave them as they were or put them in the wrong place, and what the caller is told. Every row is measured
again by a test that runs the real framework.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

from ckptconv.catalog.loading import Record, load

_OUTCOMES: Mapping[str, tuple[str, ...]] = {
    "step": ("restored", "zero", "refused", "absent"),
    "weights": ("restored", "kept"),
    "state": ("restored", "zero", "wrong"),
    "signal": ("none", "warning", "later", "error"),
}
"""`kept`: as before the call; `absent`: the file has none; `later`: in a log, when it is too late."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Restore:
    """One call on one kind of file, and what comes of it."""

    name: str
    framework: str
    """Where it is called, for people."""
    call: str
    step: str
    weights: str
    state: str
    """Of the optimizer: moments and other slots."""
    signal: str
    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class KindOfFile:
    """Files that every call treats alike."""

    name: str
    what: str
    format: str
    dialects: tuple[str, ...]
    root: str | None
    """What the root of an object graph is: `checkpoint` or `model`; None where there is no graph."""
    optimizer: bool
    """Whether it holds an optimizer's state."""
    step: bool
    """Whether the optimizer's state has a step."""
    restores: tuple[Restore, ...]
    goes_on_in: tuple[str, ...]
    """Frameworks for which a conversion is what helps."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TemplateRecipe:
    """How somebody makes the template that a conversion to a framework needs."""

    framework: str
    label: str
    directory: str
    target: str
    template: str
    code: tuple[str, ...]


@cache
def _tables() -> tuple[tuple[KindOfFile, ...], Mapping[str, TemplateRecipe]]:
    record = load("restores.json")
    record.text("source")
    kinds = tuple(_kind(name, entry) for name, entry in record.records("files"))
    recipes = {name: _recipe(name, entry) for name, entry in record.records("templates")}
    record.close()
    return kinds, recipes


def _kind(name: str, entry: Record) -> KindOfFile:
    kind = KindOfFile(
        name=name,
        what=entry.text("what"),
        format=entry.text("format"),
        dialects=entry.texts("dialects"),
        root=entry.optional_text("root"),
        optimizer=entry.flag("optimizer", True),
        step=entry.flag("step", True),
        restores=tuple(_restore(call, row) for call, row in entry.records("calls")),
        goes_on_in=entry.texts("goes_on_in"),
    )
    entry.record("calls")
    entry.close()
    return kind


def _restore(name: str, row: Record) -> Restore:
    outcomes = {what: row.text(what) for what in _OUTCOMES}
    for what, outcome in outcomes.items():
        if outcome not in _OUTCOMES[what]:
            raise ValueError(f"{row.where}.{what}: '{outcome}' is none of {_OUTCOMES[what]}")
    restore = Restore(
        name=name, framework=row.text("in"), call=row.text("call"), why=row.text("why"), **outcomes
    )
    row.close()
    return restore


def _recipe(name: str, entry: Record) -> TemplateRecipe:
    recipe = TemplateRecipe(
        framework=name,
        label=entry.text("label"),
        directory=entry.text("directory"),
        target=entry.text("target"),
        template=entry.text("template"),
        code=entry.texts("code"),
    )
    entry.close()
    return recipe


def kinds_of_file() -> tuple[KindOfFile, ...]:
    return _tables()[0]


def recipe_for(framework: str) -> TemplateRecipe:
    return _tables()[1][framework]


def kind_of_file(
    format_: str, dialect: str, *, root: str | None, optimizer: bool, step: bool
) -> KindOfFile | None:
    """The row for a file; None where no call on such a file was measured."""
    for kind in kinds_of_file():
        if (
            kind.format == format_
            and dialect in kind.dialects
            and kind.root == root
            and (kind.optimizer, kind.step) == (optimizer, step)
        ):
            return kind
    return None
