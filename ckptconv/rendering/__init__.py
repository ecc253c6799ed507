"""Checkpoints, reports and problems for people: what the command line shows.

A view is a list of texts and aligned rows, without a frame. On a terminal rich colours, folds them; `plain`
gives the same text for a pipe: no colour, nothing wrapped, nothing cut off. What comes from a file is shown
with its control characters escaped, so that a name cannot write to the terminal.
"""

from ckptconv.rendering.checkpoint import inspect_view
from ckptconv.rendering.difference import difference_view
from ckptconv.rendering.doctor import doctor_view
from ckptconv.rendering.problems import problems_view
from ckptconv.rendering.registry import directions_view, formats_view, raw_view
from ckptconv.rendering.report import report_view
from ckptconv.rendering.text import View, plain

__all__ = [
    "View",
    "difference_view",
    "directions_view",
    "doctor_view",
    "formats_view",
    "inspect_view",
    "plain",
    "problems_view",
    "raw_view",
    "report_view",
]
