"""`ckptconv formats`: what is read and written."""

from __future__ import annotations

from ckptconv.console import outcome, print_json, show
from ckptconv.options import (
    AsJson,
    Directions,
)


def formats(
    directions: Directions = False,
    as_json: AsJson = False,
) -> None:
    """List the containers that are read and written, their dialects, and the optimizers that convert.

    Example: ckptconv formats --optimizers
    """
    with outcome(as_json=as_json):
        from ckptconv import listing

        if directions:
            listed = listing.optimizer_directions()
            if as_json:
                print_json({"optimizers": listed})
                return
            from ckptconv.rendering.registry import directions_view

            show(directions_view(listed))
            return

        containers, optimizers = listing.formats(), listing.optimizers()
        if as_json:
            print_json({"formats": containers, "optimizers": optimizers})
            return
        from ckptconv.rendering.registry import formats_view

        show(formats_view(containers, optimizers))
