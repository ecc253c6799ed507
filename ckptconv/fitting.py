"""How one module of the source becomes one of the target: which parameter is which, and what its axes need.

A module is what stands under one name. Every reading that the layer catalog has for a parameter counts;
where two of them need different operations, the layout is ambiguous.
"""

from __future__ import annotations

import difflib
import itertools
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from ckptconv.catalog import flatten, layers
from ckptconv.catalog.axes import element_order
from ckptconv.catalog.compounds import direction, family
from ckptconv.document import Evidence, Param
from ckptconv.errors import Problem
from ckptconv.ops import Permute
from ckptconv.tensor import Op

ASSUMED_LAYOUT = "assumed-layout"
"""The loss code that lets a framework's convention decide a layout."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Module:
    """Parameters that stand under one name, by the last part of their names."""

    name: tuple[str, ...]
    params: tuple[Param, ...]
    framework: str
    beside: tuple[Param, ...] = ()
    """Those that a mapping file has matched: they still tell what kind of layer it is."""
    shared: tuple[Param, ...] = ()
    """Names of other modules for its parameters: an output layer's kernel may be an embedding, too."""

    @property
    def label(self) -> str:
        return ".".join(self.name) or "(root)"

    @property
    def is_alias(self) -> bool:
        """Whether all of it shares memory with other parameters."""
        return all(param.tied_to is not None for param in self.params)

    @property
    def direction(self) -> str | None:
        """Which way a recurrent module runs, as far as its name tells."""
        return direction(self.framework, self.name)


class Way(NamedTuple):
    """How the axes of one parameter become those of another."""

    ops: tuple[Op, ...]
    reading: layers.Candidate | None
    """What the target's is taken for."""
    text: str
    """The reading of the side that has more than one."""
    axes: tuple[tuple[str, ...], tuple[str, ...]] | None = None
    """Of the source and of the target, where the catalog has them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fit:
    """How one module becomes another: per target parameter its source, its operation and the evidence."""

    pairs: tuple[tuple[Param, Param, Way, Evidence], ...]
    ambiguous: tuple[Problem, ...]
    target_only: tuple[Param, ...]
    source_only: tuple[Param, ...]


def modules(
    params: Mapping[str, Param], framework: str, matched: Collection[str] = frozenset()
) -> list[Module]:
    """The modules that have parameters left to match beside those that are `matched`."""
    grouped: dict[tuple[str, ...], list[Param]] = {}
    shared: dict[str, list[Param]] = {}
    for name, param in params.items():
        if param.tied_to is not None:
            shared.setdefault(param.tied_to, []).append(param)
        grouped.setdefault(parts(name)[:-1], []).append(param)
    found = [
        Module(
            name=key,
            params=tuple(param for param in group if param.name not in matched),
            framework=framework,
            beside=tuple(param for param in group if param.name in matched),
            shared=tuple(other for param in group for other in shared.get(param.name, ())),
        )
        for key, group in grouped.items()
    ]
    return [module for module in found if module.params]


@lru_cache(maxsize=4096)
def parts(name: str) -> tuple[str, ...]:
    return tuple(part for part in re.split(r"[./]", name) if part)


def may_be_left(module: Module) -> bool:
    return module.is_alias or all(layers.is_framework_only(param.role) for param in module.params)


def fitting(source: Module, target: Module) -> Fit | None:
    """How the source module makes the target module, or None where it cannot."""
    if {source.direction, target.direction} == {"forward", "backward"}:
        return None
    readings_s = {p.name: readings(p, source) for p in source.params}
    readings_t = {p.name: readings(p, target) for p in target.params}
    pairs: list[tuple[Param, Param, Way, Evidence]] = []
    ambiguous: list[Problem] = []
    target_only: list[Param] = []
    used: set[str] = set()
    for made in target.params:
        options: list[tuple[Param, Way]] = []
        for candidate in source.params:
            if candidate.name in used:
                continue
            for way in ways(
                candidate,
                readings_s[candidate.name],
                made,
                readings_t[made.name],
                (source.framework, target.framework),
            ):
                options.append((candidate, way))
        names = list(dict.fromkeys(option[0].name for option in options))
        if not names:
            if layers.is_framework_only(made.role):
                target_only.append(made)
                continue
            return None
        if len(names) > 1:
            same = [option for option in options if leaf(option[0]) == leaf(made)]
            if len({option[0].name for option in same}) != 1:
                return None
            options = same
        made_from, way = options[0]
        if len({element_order(option[1].ops, made_from.tensor.shape) for option in options}) > 1:
            open_side = "source" if len(readings_s[made_from.name]) != 1 else "target"
            ambiguous.append(
                layout_ambiguous(made_from, made, open_side, [option[1].text for option in options])
            )
            evidence: Evidence = "assumed"
        else:
            evidence = weaker(made_from, made)
        pairs.append((made_from, made, way, evidence))
        used.add(made_from.name)
    left = [p for p in source.params if p.name not in used]
    if any(not layers.is_framework_only(p.role) and p.tied_to is None for p in left):
        return None
    return Fit(
        pairs=tuple(pairs),
        ambiguous=tuple(ambiguous),
        target_only=tuple(target_only),
        source_only=tuple(left),
    )


def readings(param: Param, module: Module) -> tuple[layers.Candidate, ...]:
    """What the parameter may be: what is declared, else every catalog row that fits its name and rank."""
    if param.evidence in ("declared", "named") and param.axes is not None:
        others = (one for one in module.shared if one.tied_to == param.name)
        told = {
            layers.Candidate(kind=one.layer, role=one.role, axes=one.axes): None
            for one in (param, *others)
            if one.axes is not None
        }
        return tuple(alike for reading in told for alike in layers.alike(module.framework, reading))
    if param.candidates:
        return tuple(layers.Candidate(c.layer, c.role, c.axes) for c in param.candidates)
    siblings = {parts(other.name)[-1]: other.tensor.shape for other in (*module.params, *module.beside)}
    return layers.candidates(module.framework, parts(param.name)[-1], param.tensor.shape, siblings)


def ways(
    source: Param,
    readings_s: Sequence[layers.Candidate],
    target: Param,
    readings_t: Sequence[layers.Candidate],
    frameworks: tuple[str, str],
) -> tuple[Way, ...]:
    """Each way in which the source's axes can be brought into the target's order, with its name."""
    told = (*readings_t, *readings_s)
    if told and _is_as_written(source, target) and family(frameworks[0]) == family(frameworks[1]):
        return (Way((), told[0], "as it is written", (told[0].axes, told[0].axes)),)
    alike = not readings_s and not readings_t and leaf(source) == leaf(target)
    shapes = source.tensor.shape, target.tensor.shape
    return _ways(tuple(readings_s), tuple(readings_t), *shapes, frameworks, alike)


@lru_cache(maxsize=4096)  # a model repeats its layers
def _ways(
    readings_s: tuple[layers.Candidate, ...],
    readings_t: tuple[layers.Candidate, ...],
    before: tuple[int, ...],
    after: tuple[int, ...],
    frameworks: tuple[str, str],
    alike: bool,
) -> tuple[Way, ...]:
    found: list[Way] = []
    same_framework = frameworks[0] == frameworks[1]
    for reading_t in readings_t:
        for reading_s in readings_s:
            if reading_s.role != reading_t.role or not layers.same_layer(reading_s.kind, reading_t.kind):
                continue
            if same_framework and len(readings_s) > 1 and reading_s.kind != reading_t.kind:
                continue  # one framework's file and another one's of the same model: the same class
            axes_s = layers.in_terms_of(reading_t.kind, reading_s).axes
            axes_t = layers.in_terms_of(reading_s.kind, reading_t).axes
            axes_s = flatten.alike(axes_s, frameworks[0], axes_t)
            axes_t = flatten.alike(axes_t, frameworks[1], axes_s)
            ops = layers.layout_ops(axes_s, before, axes_t, after)
            if ops is not None:
                told = reading_s if len(readings_s) > 1 else reading_t
                text = f"{told.kind} ({', '.join(told.axes)})"
                reading = reading_t._replace(axes=axes_t)
                found.append(Way(moving(ops, before, after), reading, text, (axes_s, axes_t)))
    if alike:
        ops = layers.layout_ops(numbered(before), before, numbered(after), after)
        if ops is None:
            return ()
        found.append(Way(ops, None, "the same axes", (numbered(before), numbered(after))))
        sizes = [size for size in before if size > 1]
        if not same_framework and len(set(sizes)) < len(sizes):
            found.append(Way((_UNKNOWN_ORDER,), None, "axes of equal size in another order"))
    return tuple(found)


def _is_as_written(source: Param, target: Param) -> bool:
    """Whether a variable has one name and shape on both sides, and a file alone tells one of its layers: what
    the file makes of its class is no reason to move its axes within a library."""
    alike = leaf(source) == leaf(target) and source.tensor.shape == target.tensor.shape
    return alike and (source.evidence == "declared") != (target.evidence == "declared")


def numbered(shape: tuple[int, ...]) -> tuple[str, ...]:
    """The axes of a parameter of which nothing is known; those with one element may be on one side alone."""
    numbers = itertools.count()
    return tuple("1" if size == 1 else f"axis{next(numbers)}" for size in shape)


_UNKNOWN_ORDER = Permute(())
"""Stands for an order of axes that cannot be told; never applied, since it makes a layout ambiguous."""


def leaf(param: Param) -> str:
    return leaf_of(param.name)


def leaf_of(name: str) -> str:
    """The last part of a name, private or not."""
    return parts(name)[-1].lstrip("_")


def moving(ops: tuple[Op, ...], before: tuple[int, ...], after: tuple[int, ...]) -> tuple[Op, ...]:
    """The ops, none where the bytes stay where they are: axes with one element are moved for nothing."""
    still = before == after and element_order(ops, before) == element_order((), before)
    return () if still else ops


_STRENGTH: tuple[Evidence, ...] = ("declared", "named")


def weaker(source: Param, target: Param) -> Evidence:
    """Both sides' own evidence; where one has none, the other's kind and the shape tell its axes."""
    if {source.evidence, target.evidence} <= {"declared", "named"}:
        return max(source.evidence, target.evidence, key=_STRENGTH.index)
    return "matched"


def layout_ambiguous(source: Param, target: Param, side: str, texts: Sequence[str]) -> Problem:
    """`side`: whose axes are not known, `source` or `target`."""
    param, option = (source, "--source-spec") if side == "source" else (target, "--template")
    return Problem(
        code="layout-ambiguous",
        loc=("params", param.name),
        message=f"'{param.name}' {list(param.tensor.shape)} of the {side} may be "
        f"{' or '.join(dict.fromkeys(texts))}, and the shape does not tell which",
        hint=f"Pass {option} with a skeleton of the {side} model (describe()), say its axes in a mapping "
        f"file (--mapping), or --allow {ASSUMED_LAYOUT} to take the first reading.",
    )


_NEAREST = 3
_COMPARED = 200
"""Of how many parameters the names are compared, at most."""


def nearest(param: Param, others: Mapping[str, Param]) -> tuple[str, ...]:
    """Names of the others that come nearest: of its sizes in any order, of its size, alike in name."""
    sizes, numel = sorted(param.tensor.shape), param.tensor.spec.numel

    def distance(name: str) -> tuple[bool, bool]:
        return sorted(others[name].tensor.shape) != sizes, others[name].tensor.spec.numel != numel

    some = sorted(others, key=distance)[:_COMPARED]
    alike = {name: difflib.SequenceMatcher(None, param.name, name).ratio() for name in some}
    return tuple(sorted(some, key=lambda name: (*distance(name), -alike[name]))[:_NEAREST])
