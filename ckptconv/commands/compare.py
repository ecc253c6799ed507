"""`ckptconv diff`: in what two checkpoints differ."""

from __future__ import annotations

import typer

from ckptconv.console import PROBLEMS, USAGE, outcome, print_json, progress_bar, show
from ckptconv.options import (
    Absolute,
    Allow,
    AsJson,
    DiffMapping,
    DiffTemplate,
    First,
    Relative,
    Second,
    SelectBoth,
    SelectFirst,
    SelectSecond,
    Verbose,
)


def diff(
    first: First,
    second: Second,
    template: DiffTemplate = None,
    mapping: DiffMapping = None,
    select: SelectBoth = None,
    select_a: SelectFirst = None,
    select_b: SelectSecond = None,
    absolute: Absolute = 0.0,
    relative: Relative = 0.0,
    allow: Allow = None,
    verbose: Verbose = False,
    as_json: AsJson = False,
) -> None:
    """Say in what two checkpoints differ: progress, optimizers, names, shapes, dtypes and values.

    They may be in different formats and of different frameworks: then A is carried onto B's names, layouts
    and optimizer, as convert would do it, and the result is compared. With --template both are carried onto
    it. Exit codes: 0 the same, 1 different, 2 trouble.

    Example: ckptconv diff run.pt out/ckpt-1 --rtol 1e-6

    Example, the weights against their average: ckptconv diff run.pt run.pt --select-b ema
    """
    with outcome(as_json=as_json, code=USAGE):
        from ckptconv import difference
        from ckptconv.differing_values import Tolerance

        with progress_bar("comparing") as progress:
            found = difference.compare(
                first,
                second,
                template=template,
                mapping=mapping,
                selects=([*(select or ()), *(select_a or ())], [*(select or ()), *(select_b or ())]),
                tolerance=Tolerance(absolute=absolute, relative=relative),
                allow=allow or (),
                progress=progress,
            )
        if as_json:
            print_json(difference.to_json(found))
        else:
            from ckptconv.rendering.difference import difference_view

            show(difference_view(found, verbose=verbose))
        if not found.same:
            raise typer.Exit(PROBLEMS)
