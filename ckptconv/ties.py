"""Parameters that share their memory on one side only: what wins, and what is refused."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from ckptconv.catalog import layers
from ckptconv.document import Checkpoint, Evidence
from ckptconv.errors import Problem
from ckptconv.tensor import MissingTensor, Op, TensorRef

NameEvidence = Literal["mapping", "name", "flow", "structure", "alias"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """One target parameter and the source parameter that makes it."""

    source: str
    target: str
    ops: tuple[Op, ...]
    matched_by: NameEvidence
    layout: Evidence
    """Why the axes are known: the weaker one of both sides' evidence."""
    reading: layers.Candidate | None = None
    """What the target's parameter is taken for, where the catalog has it."""
    axes: tuple[tuple[str, ...], tuple[str, ...]] | None = None
    """Of the source and of the target, where they are known."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Merge:
    """A parameter of the source that the template ties to another one: one array stands for both."""

    source: str
    kept: str
    """The parameter of the source whose values stand for both."""
    equal: bool
    """Whether both, and what optimizers hold for them, are equal bit for bit: nothing is lost then."""


def untied(source: Checkpoint, template: Checkpoint, pairs: Sequence[Pair]) -> Iterator[Problem]:
    """Parameters that share their memory in the source alone."""
    partners: dict[str, list[Pair]] = {}
    for pair in pairs:
        partners.setdefault(source.params[pair.source].tied_to or pair.source, []).append(pair)
    for name, made in partners.items():
        groups = {template.params[pair.target].tied_to or pair.target for pair in made}
        if len(groups) > 1:
            yield Problem(
                code="tie-mismatch",
                loc=("params", name),
                message=f"'{name}' is one parameter in the source and {len(groups)} in the template "
                f"({', '.join(sorted(groups))}): they would be trained apart",
                hint="Tie them in the template, or --allow tie-mismatch to give each of them its values.",
            )


def tied(
    source: Checkpoint, template: Checkpoint, pairs: Sequence[Pair]
) -> tuple[list[Pair], tuple[Merge, ...]]:
    """The pairs where what the template ties has one producer, and the parameters that have lost their place.

    I/O: reads parameters that the template alone ties, and their slots.
    """
    by_target = {pair.target: pair for pair in pairs}
    made: list[Pair] = []
    merged: list[Merge] = []
    for pair in pairs:
        first = by_target.get(template.params[pair.target].tied_to or pair.target, pair)
        ours, kept = (source.params[p.source].tied_to or p.source for p in (pair, first))
        if ours == kept:
            made.append(pair)
            continue
        made.append(replace(first, target=pair.target, matched_by="alias"))
        merged.append(Merge(source=pair.source, kept=first.source, equal=_are_equal(source, ours, kept)))
    return made, tuple(merged)


def _are_equal(source: Checkpoint, name: str, other: str) -> bool:
    """Whether two parameters and all that optimizers hold for them are equal, bit for bit."""
    pairs = [(source.params[name].tensor, source.params[other].tensor)]
    for optimizer in source.optimizers:
        if optimizer.param_steps.get(name) != optimizer.param_steps.get(other):
            return False
        for by_param in optimizer.slots.values():
            if (name in by_param) != (other in by_param):
                return False
            if name in by_param:
                pairs.append((by_param[name], by_param[other]))
    if any(isinstance(tensor, MissingTensor) for pair in pairs for tensor in pair):
        return False
    return all(a.spec == b.spec and _digest(a) == _digest(b) for a, b in pairs)


def _digest(tensor: TensorRef) -> bytes:
    digest = hashlib.sha256()
    for window in tensor.windows():
        digest.update(window.data)
    return digest.digest()


def tie_problem(merge: Merge) -> Problem:
    return Problem(
        code="tie-mismatch",
        loc=("params", merge.source),
        message=f"'{merge.source}' and '{merge.kept}' are one parameter in the template and two in the "
        "source, with different values or optimizer state",
        hint=f"Use a template that does not tie them, or --allow tie-mismatch to keep '{merge.kept}' alone.",
    )
