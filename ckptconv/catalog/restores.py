"""What each framework's restoring calls do with each kind of file: measured, one row each.

`data/restores/` says for a kind of file which calls bring back step, weights and optimizer state, which
leave them as they were or put them in the wrong place, and what the caller is told. Every row is measured
again by a test that runs the real framework, but for those that name the source they were read in.
`data/unmeasured.json` says of the dialects without a row why they have none, `data/templates.json` has the
lines that make the template of a conversion.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache

from ckptconv.catalog.loading import Record, load, names

_OUTCOMES: Mapping[str, tuple[str, ...]] = {
    "step": ("restored", "zero", "refused", "absent"),
    "weights": ("restored", "kept"),
    "state": ("restored", "zero", "wrong"),
    "signal": ("none", "warning", "later", "error"),
}
"""`kept`: as before the call; `absent`: file or program has none; `later`: in a log, when it is too late."""


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
    source: str = ""
    """Where it was read what the call does; empty where that was measured."""
    variant: str | None = None
    """The variant of its kind of file that it is said of; None for all of them."""

    @property
    def whole(self) -> bool:
        """Whether everything that there is comes back."""
        return self.step in ("restored", "absent") and self.weights == self.state == "restored"


@dataclass(frozen=True, slots=True, kw_only=True)
class KindOfFile:
    """Files that every call treats alike."""

    name: str
    what: str
    format: str
    dialects: tuple[str, ...]
    variants: tuple[str, ...]
    """What tells files of one dialect apart, as `doctor` finds it: of a TensorFlow checkpoint what it begins
    with (`checkpoint`, `model`, or the folder of a `saved-model`), or that its optimizer has a `counter`
    under its old name alone, or `unlisted` slots; of a plain `dcp` folder whether optimizer state goes
    `by-name` or `by-number`, of a PyTorch file whether a tool made `texts` of such numbers, of weights
    whether they are in `shards`. Some kinds have several."""
    optimizer: bool
    """Whether it holds an optimizer's state."""
    step: bool | None
    """Whether a step is recorded for an optimizer; None where the calls do not care."""
    restores: tuple[Restore, ...]
    goes_on_in: tuple[str, ...]
    """Frameworks for which a conversion is what helps."""

    def of_variant(self, variant: str | None) -> KindOfFile:
        """The kind with the calls that are said of this variant."""
        return replace(self, restores=tuple(one for one in self.restores if one.variant in (None, variant)))


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
def kinds_of_file() -> tuple[KindOfFile, ...]:
    """Every kind that was measured."""
    kinds: list[KindOfFile] = []
    for name in names("restores"):
        record = load(f"restores/{name}.json")
        record.text("source")
        kinds += (_kind(kind, entry) for kind, entry in record.records("files"))
        record.close()
    return tuple(kinds)


@cache
def unmeasured() -> Mapping[tuple[str, str], str]:
    """(format, dialect) -> why no call on its files was measured."""
    record = load("unmeasured.json")
    record.text("source")
    reasons: dict[tuple[str, str], str] = {}
    for _, entry in record.records("reasons"):
        format_, why = entry.text("format"), entry.text("why")
        reasons |= {(format_, dialect): why for dialect in entry.texts("dialects")}
        entry.close()
    record.close()
    return reasons


@cache
def _recipes() -> Mapping[str, TemplateRecipe]:
    record = load("templates.json")
    record.text("source")
    recipes = {name: _recipe(name, entry) for name, entry in record.records("templates")}
    record.close()
    return recipes


def _kind(name: str, entry: Record) -> KindOfFile:
    kind = KindOfFile(
        name=name,
        what=entry.text("what"),
        format=entry.text("format"),
        dialects=entry.texts("dialects"),
        variants=entry.texts("variants"),
        optimizer=entry.flag("optimizer", True),
        step=entry.flag("step", True) if entry.has("step") else None,
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
        name=name,
        framework=row.text("in"),
        call=row.text("call"),
        why=row.text("why"),
        variant=row.optional_text("variant"),
        source=row.optional_text("source") or "",
        **outcomes,
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


def frameworks() -> tuple[str, ...]:
    """Those that somebody goes on in after a conversion."""
    return tuple(_recipes())


def recipe_for(framework: str) -> TemplateRecipe:
    """How its template is made."""
    return _recipes()[framework]


def kind_of_file(
    format_: str, dialect: str, *, variant: str | None, optimizer: bool, step: bool
) -> KindOfFile | None:
    """The row for a file; None where no call on such a file was measured."""
    for kind in kinds_of_file():
        if (
            kind.format == format_
            and dialect in kind.dialects
            and (variant in kind.variants or (variant is None and not kind.variants))
            and kind.optimizer == optimizer
            and kind.step in (step, None)
        ):
            return kind.of_variant(variant)
    return None
