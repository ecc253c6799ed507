"""Which modules belong together by what they take and give: names and the order of declaration do not matter.

Both skeletons say which module takes the output of which (`Checkpoint.flow`). Modules start with a colour for
what may make what, then take those of their neighbours into their own until nothing changes (Weisfeiler and
Leman's refinement, 1968). A colour that one module of each side has is a match. Modules that remain alike, as
the query and the key of one attention, are left to others.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Iterable, Mapping, Sequence

from ckptconv.alignment import Fits
from ckptconv.catalog.compounds import home
from ckptconv.document import Site
from ckptconv.fitting import Module, leaf, parts

_Node = tuple[int, int]
"""Side (0 the source, 1 the target) and index of a module."""


def by_flow(
    sources: Sequence[Module],
    targets: Sequence[Module],
    anchors: Mapping[int, int],
    fits: Fits,
    flows: tuple[Sequence[Site], Sequence[Site]],
) -> dict[int, int]:
    """Target index -> source index of modules that only one of the other side can be.

    `anchors`: those that are matched already. Nothing is found where the two flows differ.
    """
    before = {**_before(0, sources, flows[0]), **_before(1, targets, flows[1])}
    after: dict[_Node, list[_Node]] = {node: [] for node in before}
    for node, links in before.items():
        for link in links:
            after[link].append(node)
    colours = _first(before, (sources, targets), anchors, fits)
    count = 0
    while len(set(colours.values())) > count:
        count = len(set(colours.values()))
        colours = _numbered(
            (node, (colour, *(tuple(sorted(colours[n] for n in links[node])) for links in (before, after))))
            for node, colour in colours.items()
        )
    members: dict[int, tuple[list[int], list[int]]] = defaultdict(lambda: ([], []))
    for (side, index), colour in colours.items():
        members[colour][side].append(index)
    if any(len(ours) != len(theirs) for ours, theirs in members.values()):
        return {}
    return {theirs[0]: ours[0] for ours, theirs in members.values() if len(ours) == 1}


def _before(side: int, modules: Sequence[Module], flow: Sequence[Site]) -> dict[_Node, list[_Node]]:
    """The modules of a side that a run uses, and those before each."""
    index = {parts(home(m.framework, p.name))[:-1]: i for i, m in enumerate(modules) for p in m.params}
    before: dict[_Node, list[_Node]] = {}
    for site in flow:
        if (own := index.get(parts(site.module))) is not None:
            links = (index.get(parts(name)) for name in site.after)
            # A module of several layers is one where it is not taken apart.
            before.setdefault((side, own), []).extend((side, i) for i in links if i not in (None, own))
    return before


def _first(
    nodes: Iterable[_Node],
    sides: tuple[Sequence[Module], Sequence[Module]],
    anchors: Mapping[int, int],
    fits: Fits,
) -> dict[_Node, int]:
    """One colour for the modules that one another's can make, and one for each two that are matched."""
    owners = {i: j for j, i in anchors.items()}
    groups: dict[tuple[int, Hashable], list[_Node]] = defaultdict(list)
    for side, index in nodes:
        anchor = owners.get(index) if side == 0 else index if index in anchors else None
        groups[side, _signature(sides[side][index]) if anchor is None else anchor].append((side, index))
    colour = {group: number for number, group in enumerate(groups)}
    for ours, some in groups.items():
        for theirs, others in groups.items():
            if (
                ours[0] == 0
                and theirs[0] == 1
                and colour[ours] != colour[theirs]
                and _meet(ours[1], theirs[1], some[0][1], others[0][1], fits)
            ):
                old, new = colour[theirs], colour[ours]
                colour.update((group, new) for group, its in colour.items() if its == old)
    return {node: colour[group] for group, members in groups.items() for node in members}


def _meet(ours: Hashable, theirs: Hashable, source: int, target: int, fits: Fits) -> bool:
    """Whether two groups have one colour: matched modules with their partner, others as they fit."""
    if isinstance(ours, int) or isinstance(theirs, int):
        return ours == theirs
    return fits(source, target) is not None


def _signature(module: Module) -> Hashable:
    """All of a module that its fit depends on."""
    return (
        module.direction,
        *(
            (leaf(p), p.tensor.spec, p.role, p.layer, p.axes, p.evidence, p.candidates, p.tied_to is None)
            for p in module.params
        ),
        *((leaf(p), p.tensor.shape) for p in module.beside),
    )


def _numbered(keys: Iterable[tuple[_Node, Hashable]]) -> dict[_Node, int]:
    """Equal numbers for equal keys."""
    numbers: dict[Hashable, int] = {}
    return {node: numbers.setdefault(key, len(numbers)) for node, key in keys}
