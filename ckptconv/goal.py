"""Where a conversion goes: format, dialect and template, from what the caller says and the names tell."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ckptconv.detect import PathLike, dialect_named, format_named, open, parse_target
from ckptconv.dialects.base import Dialect, fills, fresh_template
from ckptconv.dialects.table import dialects_of
from ckptconv.document import Checkpoint
from ckptconv.errors import CkptError, MappingError
from ckptconv.formats.base import Format
from ckptconv.formats.table import ROWS
from ckptconv.spec import BY_TEMPLATE_SPEC, apply_spec


@dataclass(frozen=True, slots=True, kw_only=True)
class Goal:
    """Where a conversion goes."""

    path: Path
    format: Format
    dialect: Dialect
    template: Checkpoint | None


def document_of(spec: PathLike | Checkpoint) -> Checkpoint:
    return spec if isinstance(spec, Checkpoint) else open(spec)


def goal_of(
    path: Path,
    to: str | None,
    template: PathLike | Checkpoint | None,
    source: Checkpoint,
    template_spec: PathLike | Checkpoint | None = None,
) -> Goal:
    """Format and dialect of the target, from `--to`, the template and the suffix, in that order.

    `template_spec` is a skeleton that supplies what the template does not record.

    Raises: usage, template-mismatch.
    """
    if str(path) == "-":
        raise CkptError.of(
            "usage",
            "a checkpoint cannot be written into a pipe: its index is known last",
            "Name a file.",
            loc=("DST",),
        )
    format_name, dialect_name = parse_target(to)
    document = None if template is None else document_of(template)
    if template_spec is not None:
        if document is None:
            raise CkptError.of(
                "usage",
                "a template spec completes a template, and there is none",
                "Pass --template as well, or --source-spec for what the source lacks.",
                loc=("--template-spec",),
            )
        document = apply_spec(document, document_of(template_spec), BY_TEMPLATE_SPEC)
    if document is not None:
        theirs = document.provenance
        if format_name not in (None, theirs.format) or dialect_name not in (None, theirs.dialect):
            raise MappingError.of(
                "template-mismatch",
                f"--to {to} asks for another target than the template is ({theirs.format}:{theirs.dialect})",
                "Leave --to out, or use a template of that format.",
                loc=("--template",),
            )
        named = _by_suffix(path)
        if to is None and named not in (None, theirs.format):
            raise MappingError.of(
                "template-mismatch",
                f"the name '{path.name}' asks for {named}, the template is {theirs.format}:{theirs.dialect}",
                "Choose another name, use a template of that format, or say it with --to.",
                loc=("--template",),
            )
        format_name, dialect_name = theirs.format, theirs.dialect
    if format_name is None:
        format_name = _by_suffix(path) or _untold(path)
    chosen = format_named(format_name)
    if dialect_name is not None:
        dialect = dialect_named(format_name, dialect_name)
    else:
        dialect = _default_dialect(format_name, source)
    if document is None and not fills(dialect, source.residue):
        document = fresh_template(dialect, source)
    return Goal(path=path, format=chosen, dialect=dialect, template=document)


def _by_suffix(path: Path) -> str | None:
    """The format whose suffix the name has: the longest, as `.weights.h5` ends in `.h5` too."""
    fitting = [
        (len(suffix), name)
        for name, row in ROWS.items()
        for suffix in row.suffixes
        if path.name.endswith(suffix)
    ]
    return max(fitting)[1] if fitting else None


def _untold(path: Path) -> str:
    raise CkptError.of(
        "usage",
        f"the name '{path.name or path}' does not tell the target's format",
        "Pass --to with one of: " + ", ".join(ROWS) + ".",
        loc=("--to",),
    )


def _default_dialect(format_name: str, source: Checkpoint) -> Dialect:
    """The source's own dialect where it lives in the format, else the format's one that needs no template."""
    there = dialects_of(format_name)
    for dialect in there:
        if fills(dialect, source.residue):
            return dialect
    free = [dialect for dialect in there if not dialect.needs_template]
    if len(there) == 1 or (len(free) == 1 and format_name not in ("pytorch", "tensorflow")):
        return (free or there)[0]
    raise MappingError.of(
        "template-required",
        f"a {format_name} target needs a checkpoint of the target's model to take names and structure from",
        "Build model and optimizer in the target's framework, save them once, and pass that as --template"
        + "".join(f"; or write the weights alone with --to {format_name}:{d.name}" for d in free)
        + ".",
        loc=("--template",),
    )
