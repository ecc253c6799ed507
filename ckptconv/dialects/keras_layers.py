"""What kind of layer an object of a TensorFlow object graph is, read off its edges and shapes.

The table is `catalog/layers`; here is only how evidence of one layer's variables adds up: a kind is possible
where every variable of the layer fits it. If all possible kinds mean the same axes, the axes are *named*.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

from ckptconv.catalog import layers
from ckptconv.document import Evidence, Layout


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """What a variable is taken for."""

    layer: str = "unknown"
    role: str = "unknown"
    axes: tuple[str, ...] | None = None
    evidence: Evidence = "unknown"
    candidates: tuple[Layout, ...] = ()
    """Every reading that fits, where there is more than one."""


def read_layer(framework: str, shapes: Mapping[str, tuple[int, ...]]) -> Mapping[str, Reading]:
    """The reading of each variable of one layer, by edge.

    `framework`: `keras3` or `tf_keras`. `shapes`: the variables that are children of the layer's node.
    """
    return _read_layer(framework, tuple(shapes.items()))


@lru_cache(maxsize=1024)
def _read_layer(framework: str, variables: tuple[tuple[str, tuple[int, ...]], ...]) -> Mapping[str, Reading]:
    """As above; a model repeats its layers, so that few are worked out."""
    shapes = dict(variables)
    found = {edge: layers.candidates(framework, edge, shape, shapes) for edge, shape in shapes.items()}
    kinds = [
        frozenset(candidate.kind for candidate in candidates) for candidates in found.values() if candidates
    ]
    common = frozenset.intersection(*kinds) if kinds else frozenset()
    return {edge: _reading(candidates, common) for edge, candidates in found.items()}


def _reading(candidates: tuple[layers.Candidate, ...], common: frozenset[str]) -> Reading:
    fitting = [candidate for candidate in candidates if candidate.kind in common] or list(candidates)
    kinds = {candidate.kind for candidate in fitting}
    roles = {candidate.role for candidate in fitting}
    axes = {candidate.axes for candidate in fitting}
    role = roles.pop() if len(roles) == 1 else "unknown"
    if len(kinds) == 1 and len(axes) == 1 and role != "unknown":
        return Reading(layer=kinds.pop(), role=role, axes=axes.pop(), evidence="named")
    open_to = tuple(Layout(layer=c.kind, role=c.role, axes=c.axes) for c in fitting)
    return Reading(role=role, candidates=open_to if len(open_to) > 1 else ())
