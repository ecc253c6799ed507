"""Source and template brought together: taken apart as far as they differ, and which piece makes which."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ckptconv import mapping
from ckptconv.compounds import compounds
from ckptconv.dialects.table import DIALECTS
from ckptconv.document import Checkpoint
from ckptconv.mapping import Cover
from ckptconv.mapping_rules import Ruled
from ckptconv.pieces import apart
from ckptconv.telling import Side
from ckptconv.unmatched import unmatched_problems


@dataclass(frozen=True, slots=True, kw_only=True)
class Matching:
    """Two documents, in pieces that match one to one."""

    source: Side
    target: Side
    source_pieces: Checkpoint
    target_pieces: Checkpoint
    cover: Cover
    rules: Ruled
    """What a mapping file says."""
    frameworks: tuple[str, str]


def matched(source: Checkpoint, template: Checkpoint, frameworks: tuple[str, str], rules: Ruled) -> Matching:
    """Find for every parameter of the template what makes it. I/O: reads what the template alone ties."""
    ours, theirs = compounds(source, template, frameworks, rules)
    mine, its = apart(source, ours), apart(template, theirs)
    sides = Side(whole=source, rewrites=ours), Side(whole=template, rewrites=theirs)
    cover = mapping.match(mine, its, frameworks=frameworks, ruled=rules)
    cover = replace(cover, problems=(*cover.problems, *unmatched_problems(sides, cover, rules)))
    return Matching(
        source=sides[0],
        target=sides[1],
        source_pieces=mine,
        target_pieces=its,
        cover=cover,
        rules=rules,
        frameworks=frameworks,
    )


def framework_of(checkpoint: Checkpoint) -> str:
    """The catalog column that explains the document's names and axes."""
    provenance = checkpoint.provenance
    dialect = DIALECTS.get((provenance.format, provenance.dialect))
    return (dialect.framework if dialect else None) or "torch"
