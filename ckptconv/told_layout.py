"""What a rule of a mapping file does to the axes of a parameter, beside what the layer catalog knows of them.

A rule's axes are evidence like a declaration: they decide what is ambiguous. They may also be finer than the
catalog's, as those of a flattened image are. Where they move elements otherwise than kinds of layers that
leave no doubt would have it, that is an error, unless the rule says that it overrides them. A rule without
axes says that two parameters are one another, and the catalog says the rest.
"""

from __future__ import annotations

from ckptconv.catalog import layers
from ckptconv.catalog.axes import Axes, Shape, atoms, element_order, entries, layout_ops
from ckptconv.document import Evidence, Param
from ckptconv.errors import Problem
from ckptconv.fitting import Module, Way, layout_ambiguous, moving, numbered, readings, ways, weaker
from ckptconv.mapping_file import axes_text
from ckptconv.mapping_rules import Told
from ckptconv.tensor import Op
from ckptconv.ties import Pair


def told_pair(
    told: Told, source: tuple[Param, Module], target: tuple[Param, Module]
) -> tuple[Pair | None, Problem | None]:
    """The pair that a rule means, each parameter with the module that it stands in; what is wrong with it.

    Problems: shape-mismatch, layout-ambiguous (with the pair that the convention would give), mapping-invalid
    for axes that contradict known ones.
    """
    (made_from, _), (made, _) = source, target
    before, after = made_from.tensor.shape, made.tensor.shape
    known = known_ways(source, target)
    orders = {element_order(way.ops, before) for way in known}
    if told.axes is None:
        if known:
            pair = _pair(told, known[0], weaker(made_from, made) if len(orders) == 1 else "assumed")
            open_side = "source" if len(readings(*source)) != 1 else "target"
            texts = [way.text for way in known]
            return pair, None if len(orders) == 1 else layout_ambiguous(made_from, made, open_side, texts)
        axes = (numbered(before), numbered(after))
        ops = layout_ops(axes[0], before, axes[1], after)
        if ops is None:
            return None, _misfit(told, before, after, "its axes are not known", "Say the rule's 'axes'.")
        same = Way(ops, None, "the same axes", axes)
        if len([size for size in before if size > 1]) < 2 and not _listed(source, target):
            return _pair(told, same, "declared"), None
        return _pair(told, same, "assumed"), _without_axes(told, before)
    ops = layout_ops(told.axes[0], before, told.axes[1], after)
    if ops is None:
        text = f"no layout makes one the other with the axes '{axes_text(told.axes)}'"
        return None, _misfit(told, before, after, text, "Correct the rule's 'axes'.")
    ops = moving(ops, before, after)
    read = [way for way in known if way.reading is not None]
    if read and len(orders) == 1 and not told.overrides:
        due = element_order(read[0].ops, before)
        coarse = _coarse_ops(told.axes, before, after)
        if due not in (element_order(ops, before), element_order(coarse, before)):
            return None, _contradiction(told, read[0])
    reading = layers.Candidate(kind=made.layer, role=made.role, axes=told.axes[1])
    if read and read[0].reading is not None:
        reading = read[0].reading._replace(axes=told.axes[1])
    return _pair(told, Way(ops, reading, "", told.axes), "declared"), None


def known_ways(source: tuple[Param, Module], target: tuple[Param, Module]) -> list[Way]:
    """Each way that the catalog has for the two."""
    frameworks = (source[1].framework, target[1].framework)
    sides = (readings(*source), readings(*target))
    return list(ways(source[0], sides[0], target[0], sides[1], frameworks))


def _listed(*sides: tuple[Param, Module]) -> bool:
    """Whether the entries of an axis have an order of their own, as a recurrent cell's gates do."""
    return any(
        entries(atom)[1]
        for param, module in sides
        for reading in readings(param, module)
        for axis in reading.axes
        for atom in atoms(axis)
    )


def _pair(told: Told, way: Way, layout: Evidence) -> Pair:
    return Pair(
        source=told.source,
        target=told.target,
        ops=way.ops,
        matched_by="mapping",
        layout=layout,
        reading=way.reading,
        axes=way.axes,
    )


def _coarse_ops(axes: tuple[Axes, Axes], before: Shape, after: Shape) -> tuple[Op, ...]:
    """The ops without what is finer: an axis that is made of the same ones on both sides is itself one."""
    ours, theirs = axes
    same = {frozenset(atoms(axis)) for axis in ours} & {frozenset(atoms(axis)) for axis in theirs}

    def merged(axis: str) -> str:
        return "&".join(sorted(atoms(axis))) if len(atoms(axis)) > 1 and {*atoms(axis)} in same else axis

    return layout_ops(tuple(map(merged, ours)), before, tuple(map(merged, theirs)), after) or ()


def _misfit(told: Told, before: Shape, after: Shape, why: str, hint: str) -> Problem:
    return Problem(
        code="shape-mismatch",
        loc=("params", told.target),
        message=f"'{told.target}' {list(after)} is to be made of '{told.source}' {list(before)} by the rule "
        f"{told.rule}: {why}",
        hint=hint,
    )


def _without_axes(told: Told, shape: Shape) -> Problem:
    return Problem(
        code="layout-ambiguous",
        loc=("params", told.target),
        message=f"'{told.target}' {list(shape)} is to be made of '{told.source}' by the rule {told.rule}, "
        "and nothing tells the order of its axes",
        hint="Say the rule's 'axes', or --allow assumed-layout to take them as they are.",
    )


def _contradiction(told: Told, known: Way) -> Problem:
    assert told.axes is not None
    assert known.axes is not None
    kind = known.reading.kind if known.reading is not None else "unknown"
    return Problem(
        code="mapping-invalid",
        loc=("rules", told.position),
        message=f"the rule {told.rule} says '{axes_text(told.axes)}' of '{told.source}' and '{told.target}', "
        f"which are of a layer of kind {kind}: '{axes_text(known.axes)}'",
        hint="Correct 'axes' or leave it out; with 'overrides': true the rule's stand.",
    )
