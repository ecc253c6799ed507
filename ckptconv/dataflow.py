"""Which modules belong together by what they take and give: names and the order of declaration do not matter.

Both skeletons say which parameters are applied to what others made (`Checkpoint.flow`), and so which module
takes the output of which. Modules start with a colour for what may make what, then take those of their
neighbours into their own until nothing changes (Weisfeiler and Leman's refinement, 1968). A colour that one
module of each side has is a match. Modules that remain alike, as two branches may, are left to others.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Iterable, Mapping, Sequence

from ckptconv.acyclic import Acyclic
from ckptconv.alignment import Fits
from ckptconv.document import Site
from ckptconv.fitting import Module, leaf

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
    before: dict[_Node, tuple[_Node, ...]] = {}
    part: dict[_Node, str] = {}
    for side, (members, flow) in enumerate(zip((sources, targets), flows, strict=True)):
        owners = {p.name: (side, i) for i, m in enumerate(members) for p in (*m.params, *m.beside)}
        before |= _before(owners, flow)
        part |= _parts(owners, flow)
    after: dict[_Node, list[_Node]] = {node: [] for node in before}
    for node, links in before.items():
        for link in links:
            after[link].append(node)
    for known in (part, {}) if part else ({},):  # one side alone may tell what is done with outputs
        found = _found(_first(before, (sources, targets), anchors, fits, known), before, after)
        if found:
            return found
    return {}


def _found(
    colours: dict[_Node, int], before: Mapping[_Node, Sequence[_Node]], after: Mapping[_Node, Sequence[_Node]]
) -> dict[int, int]:
    """The matches after the refinement; none where the flows differ."""
    count = 0
    while len(set(colours.values())) > count:
        count = len(set(colours.values()))
        colours = _numbered(
            (node, (colour, *(tuple(sorted(colours[n] for n in links[node])) for links in (before, after))))
            for node, colour in colours.items()
        )
    alike: dict[int, tuple[list[int], list[int]]] = defaultdict(lambda: ([], []))
    for (side, index), colour in colours.items():
        alike[colour][side].append(index)
    if any(len(ours) != len(theirs) for ours, theirs in alike.values()):
        return {}
    return {theirs[0]: ours[0] for ours, theirs in alike.values() if len(ours) == 1}


def _before(owners: Mapping[str, _Node], flow: Sequence[Site]) -> dict[_Node, tuple[_Node, ...]]:
    """The modules of a side that a run uses, and those before each."""
    order: Acyclic[_Node] = Acyclic()
    for site in flow:
        if site.param in owners:
            order.add(owners[site.param], (owners[name] for name in site.after if name in owners))
    return order.reduced()


def _parts(owners: Mapping[str, _Node], flow: Sequence[Site]) -> dict[_Node, str]:
    """What is done with the outputs of modules, where it is one thing."""
    told: dict[_Node, set[str]] = defaultdict(set)
    for site in flow:
        if site.part and site.param in owners:
            told[owners[site.param]].add(site.part)
    return {node: some.pop() for node, some in told.items() if len(some) == 1}


def _first(
    nodes: Iterable[_Node],
    sides: tuple[Sequence[Module], Sequence[Module]],
    anchors: Mapping[int, int],
    fits: Fits,
    part: Mapping[_Node, str],
) -> dict[_Node, int]:
    """One colour for the modules that one another's can make, and one for each two that are matched."""
    owners = {i: j for j, i in anchors.items()}
    groups: dict[tuple[int, Hashable], list[_Node]] = defaultdict(list)
    for node in nodes:
        side, index = node
        anchor = owners.get(index) if side == 0 else index if index in anchors else None
        key = (_signature(sides[side][index]), part.get(node)) if anchor is None else anchor
        groups[side, key].append(node)
    colour = {group: number for number, group in enumerate(groups)}
    for ours, some in groups.items():
        for theirs, others in groups.items():
            if (
                ours[0] == 0
                and theirs[0] == 1
                and colour[ours] != colour[theirs]
                and _meet(ours[1], theirs[1], some[0], others[0], fits, part)
            ):
                old, new = colour[theirs], colour[ours]
                colour.update((group, new) for group, its in colour.items() if its == old)
    return {node: colour[group] for group, members in groups.items() for node in members}


def _meet(
    ours: Hashable, theirs: Hashable, source: _Node, target: _Node, fits: Fits, part: Mapping[_Node, str]
) -> bool:
    """Whether two groups have one colour: matched modules with their partner, others as they fit."""
    if isinstance(ours, int) or isinstance(theirs, int):
        return ours == theirs
    return part.get(source) == part.get(target) and fits(source[1], target[1]) is not None


def _signature(module: Module) -> Hashable:
    """All of a module that its fit depends on."""
    return (
        module.direction,
        *(
            (leaf(p), p.tensor.spec, p.role, p.layer, p.axes, p.evidence, p.candidates, p.tied_to is None)
            for p in (*module.params, *module.shared)
        ),
        *((leaf(p), p.tensor.shape) for p in module.beside),
    )


def _numbered(keys: Iterable[tuple[_Node, Hashable]]) -> dict[_Node, int]:
    """Equal numbers for equal keys."""
    numbers: dict[Hashable, int] = {}
    return {node: numbers.setdefault(key, len(numbers)) for node, key in keys}
