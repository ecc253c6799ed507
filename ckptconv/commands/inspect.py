"""`ckptconv inspect`: what a checkpoint is."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import typer

from ckptconv.console import outcome, print_json, show
from ckptconv.errors import CkptError
from ckptconv.options import (
    AsJson,
    Digest,
    From,
    Raw,
    Readable,
    Select,
    Tensors,
    parse_container,
)


def inspect(
    path: Readable,
    as_json: AsJson = False,
    tensors: Tensors = False,
    raw: Raw = False,
    digest: Digest = False,
    from_: From = None,
    select: Select = None,
) -> None:
    """Show what a checkpoint is: progress, optimizers, schedules, parameters.

    With --json it is the neutral document. Nothing is written, nothing in the file is run.

    Example: ckptconv inspect run.pt
    """
    if digest and not raw:
        raise typer.BadParameter("it goes with --raw.", param_hint="--digest")
    with outcome(as_json=as_json):
        format_, dialect = parse_container("--from", from_)
        if raw:
            _inspect_raw(path, format_, dialect, select or (), as_json=as_json, digest=digest)
            return
        from ckptconv.detect import open

        checkpoint = open(path, format=format_, dialect=dialect, select=select or ())
        if as_json:
            from ckptconv import schema

            print_json(schema.to_json(checkpoint, values=True))
            return
        from ckptconv.rendering.checkpoint import inspect_view

        show(inspect_view(checkpoint, path=str(path), all_params=tensors))


def _inspect_raw(
    path: Path,
    format_: str | None,
    dialect: str | None,
    select: Sequence[str],
    *,
    as_json: bool,
    digest: bool,
) -> None:
    from ckptconv import listing
    from ckptconv.detect import choose, detect_dialect, read_raw
    from ckptconv.rendering.registry import raw_view

    choice = choose(path, select)
    if choice.names:
        raise CkptError.of(
            "usage",
            f"there is no checkpoint '{choice.names[0]}' in '{path.name}'",
            "--raw lists a whole file: name one, or pass --select with: "
            + ", ".join(choice.candidates)
            + ".",
            loc=("--select", choice.names[0]),
        )
    raw = read_raw(choice.path, format_)
    try:
        name = detect_dialect(raw, dialect)[0].name
    except CkptError as error:
        # The keys are listed also where nobody knows what they mean: that is what --raw is for.
        if any(problem.code != "unknown-dialect" for problem in error.problems):
            raise
        name = None
    if as_json:
        print_json(listing.to_json(raw, name, digests=digest))
    else:
        show(raw_view(raw.format, name, listing.rows(raw, digests=digest)))
