"""Mapping files for people: what one covers, and what is left to do in one that was just written."""

from __future__ import annotations

from collections.abc import Sequence

from rich.text import Text

from ckptconv.correspondence import Coverage
from ckptconv.mapping_file import MappingFile
from ckptconv.name_pattern import NamePattern
from ckptconv.rendering.text import Rows, View, clean, count, heading, listed

SHOWN = 40
"""Parameters matched without a rule that are shown unless all are asked for."""


def coverage_view(coverage: Coverage, *, names: tuple[str, str], verbose: bool = False) -> list[View]:
    """Each rule with how often it applies and what it does to axes; then what needs no rule."""
    sides = names[::-1] if coverage.source_is_right else names
    head = f"left is {clean(sides[0])}, right is {clean(sides[1])}"
    rows = Rows(
        styles=("", "", "cyan", "cyan", ""), titles=("line", "applies", "left", "right", "axes"), indent=2
    )
    for n, one in enumerate(coverage.rules):
        where = str(one.rule.line or f"rule {n}")
        axes = "; ".join(map(clean, one.axes)) or "as they are"
        rows.add(where, str(one.count), _several(one.rule.left), _several(one.rule.right), axes)
    views: list[View] = [Text(head, style="bold"), Text(), heading("Rules"), rows]
    if coverage.by_itself:
        views += [Text(), heading(f"Matched without a rule: {count(len(coverage.by_itself), 'parameter')}")]
        alone = Rows(styles=("cyan", "cyan", ""), titles=("source", "template", "matched by"), indent=2)
        for source, template, why in coverage.by_itself[: None if verbose else SHOWN]:
            alone.add(clean(source), clean(template), why)
        views.append(alone)
        more = len(coverage.by_itself) - SHOWN
        if more > 0 and not verbose:
            views.append(Text(f"  and {more:,} more (--verbose shows them)"))
    for word, left in (("source", coverage.source_only), ("template", coverage.template_only)):
        if left:
            views += [Text(), Text(f"Only the {word} has {listed(left)}")]
    return views


def _several(names: Sequence[NamePattern]) -> str:
    return ", ".join(clean(name) for name in names)


def draft_view(mapping: MappingFile, path: str) -> list[View]:
    """What was written, and what is left to do."""
    open_ = sum(1 for rule in mapping.rules if rule.choices and rule.axes is None)
    views: list[View] = [Text(f"{clean(path)}: {count(len(mapping.rules), 'rule')}", style="bold")]
    if open_:
        views.append(Text(f"  {count(open_, 'rule')} with 'choices': put the one that is meant into 'axes'"))
    for side, lonely in (("left", mapping.left_unmatched), ("right", mapping.right_unmatched)):
        if lonely:
            names = listed([str(one.name) for one in lonely])
            views.append(Text(f"  without a partner on the {side}: {names}"))
    return views
