"""What a dialect is: it knows who chose the keys of a container, and where each counter stands.

`lift` leaves a residue: the raw tree in which every leaf that became part of the document is replaced by a
`Lifted` address. `lower` fills such a residue from a document again, so `lower(lift(x))` equals `x`, an
edited document wins, and a *template* (a file of the target's framework) is nothing but a document whose
residue is filled with another run's values.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from ckptconv.document import Checkpoint, Residue
from ckptconv.errors import Problem
from ckptconv.rawtree import RawTree


@dataclass(frozen=True, slots=True, kw_only=True)
class Detection:
    """Why a raw tree is taken for a dialect."""

    score: int
    """Higher wins; 100 is proof, 50 typical keys, 10 a last resort."""
    evidence: str
    """For people: the keys that decided it."""


class Dialect(Protocol):
    """One convention for what is where in a container."""

    name: str
    """As on the command line, after the colon: `plain`, `state-dict`, `keras3`, ..."""
    format: str
    """Name of the format it lives in."""
    summary: str
    """One line for `ckptconv formats`."""
    needs_template: bool
    """Whether a tree can only be written where a residue (own or a template's) gives its structure."""
    save_counter: str | None
    """The extra array in which a file says which one it is of its run; None where there is none."""

    @property
    def framework(self) -> str | None:
        """Column of the optimizer and layer catalogs; None for containers without a framework."""

    def detect(self, raw: RawTree) -> Detection | None:
        """Whether this convention made the tree."""

    def lift(self, raw: RawTree) -> Checkpoint:
        """The document, with its residue. No tensor byte is read; counters are.

        Raises: order-ambiguous, progress-conflict, reference-broken, ...
        """

    def lower(self, checkpoint: Checkpoint) -> RawTree:
        """The tree to write: the residue (own or the template's) filled from the document.

        A dialect that can be written without a residue builds the tree from the document alone.

        Raises: template-required, template-unbuilt, progress-unknown, progress-range, residue-stale,
        reference-broken.
        """

    def template_problems(self, template: Checkpoint) -> tuple[Problem, ...]:
        """Why a checkpoint of this dialect cannot serve as a template.

        `template-unbuilt`, with the lines that build it.
        """

    def restore_code(self, checkpoint: Checkpoint, target: str) -> str:
        """Lines of Python that load the written file `target` in its framework; empty where there is none."""


REGISTERED: dict[tuple[str, str], Dialect] = {}
"""Those whose module is imported; `table.DIALECTS` has all."""
_TREES: dict[tuple[str, str], tuple[str, str]] = {}
_FRESH: dict[tuple[str, str], Callable[[Checkpoint], Checkpoint | None]] = {}


def register(
    dialect: Dialect,
    *,
    tree: tuple[str, str] | None = None,
    fresh: Callable[[Checkpoint], Checkpoint | None] | None = None,
) -> Dialect:
    """Make a dialect known under (format, name).

    `tree`: the one whose residue it fills, if not its own; `fresh`: the template for a run that tells all
    that one has, None for any other run.
    """
    key = dialect.format, dialect.name
    REGISTERED[key] = dialect
    _TREES[key] = tree or key
    if fresh is not None:
        _FRESH[key] = fresh
    return dialect


def fresh_template(dialect: Dialect, source: Checkpoint) -> Checkpoint | None:
    """The template that a run needs no file for; None where there is none."""
    make = _FRESH.get((dialect.format, dialect.name))
    return make(source) if make is not None else None


def fills(dialect: Dialect, residue: Residue | None) -> bool:
    """Whether a residue is of the kind that the dialect makes its tree from."""
    if residue is None:
        return False
    return _TREES[dialect.format, dialect.name] == (residue.format, residue.dialect)
