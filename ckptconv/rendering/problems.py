"""Problems for people."""

from __future__ import annotations

from collections.abc import Sequence

from rich.text import Text

from ckptconv.errors import Problem
from ckptconv.rendering.text import View, clean


def problems_view(problems: Sequence[Problem]) -> list[View]:
    """Each problem: code, message, location, next step."""
    views: list[View] = []
    for problem in problems:
        where = ".".join(clean(step) for step in problem.loc)
        head = Text.assemble((problem.code, "bold red"), ": ", clean(problem.message))
        views.append(head)
        if where:
            views.append(Text.assemble("  at ", (where, "cyan")))
        views.append(Text.assemble("  → ", clean(problem.hint)))
    return views
