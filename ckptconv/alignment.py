"""Which modules of two models belong together: by name, and by order where one assignment is possible."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import cache

from ckptconv.errors import Problem
from ckptconv.fitting import Fit, Module, fitting, may_be_left, parts

Fits = Callable[[int, int], Fit | None]
"""How the source module of an index makes the target module of another; None where it cannot."""


def fits_of(sources: Sequence[Module], targets: Sequence[Module]) -> Fits:
    @cache
    def fits(i: int, j: int) -> Fit | None:
        return fitting(sources[i], targets[j])

    return fits


def _normalized(modules: Sequence[Module]) -> list[tuple[str, ...]]:
    """Names without the parts that all modules of a side begin with."""
    names = [module.name for module in modules]
    common = 0
    if len(names) > 1:
        shortest = min(len(name) for name in names)
        while common < shortest and len({name[common] for name in names}) == 1:
            common += 1
    return [tuple(part.lower().lstrip("_") for part in name[common:]) for name in names]


def by_name(sources: Sequence[Module], targets: Sequence[Module], fits: Fits) -> dict[int, int]:
    """Target index -> source index of modules with the same name and shapes that fit.

    A number is a name only where all modules have partners of the same name: `2` of one side may be the
    second layer of a list, and of the other the third.
    """
    by_source: dict[tuple[str, ...], list[int]] = {}
    for i, name in enumerate(_normalized(sources)):
        by_source.setdefault(name, []).append(i)
    names = _normalized(targets)
    uses = Counter(names)
    chosen: dict[int, int] = {}
    for j, name in enumerate(names):
        partners = by_source.get(name, [])
        if len(partners) == 1 and uses[name] == 1 and fits(partners[0], j):
            chosen[j] = partners[0]
    taken = set(chosen.values())
    left_s = [module for i, module in enumerate(sources) if i not in taken]
    left_t = [module for j, module in enumerate(targets) if j not in chosen]
    if all(may_be_left(module) for module in (*left_s, *left_t)):
        return chosen
    return {j: i for j, i in chosen.items() if not any(part.isdecimal() for part in names[j])}


def by_shape(
    sources: Sequence[Module], targets: Sequence[Module], anchors: Mapping[int, int], made: Fits
) -> dict[int, int] | Problem:
    """Assign modules where a side has no order of declaration: each must fit one of the other side alone."""
    taken = set(anchors.values())
    rest = [i for i, module in enumerate(sources) if i not in taken and not module.is_alias]
    chosen = dict(anchors)
    for j, target in enumerate(targets):
        if j in anchors or target.is_alias:
            continue
        fitting = [i for i in rest if made(i, j) is not None]
        rivals = [k for k in range(len(targets)) if k not in anchors and k != j and not targets[k].is_alias]
        if len(fitting) == 1 and not any(made(fitting[0], k) is not None for k in rivals):
            chosen[j] = fitting[0]
        elif not may_be_left(target):
            return Problem(
                code="order-ambiguous" if fitting else "param-unmatched",
                loc=("params", target.params[0].name),
                message=f"{len(fitting)} modules of the source fit '{target.label}' {_shapes(target)} of the "
                "template, and variables of TensorFlow 1 have no order in their file",
                hint="Give both sides the same module names.",
            )
    return chosen


def is_counted(modules: Sequence[Module]) -> bool:
    """Whether the names tell the order: all of them are one name with a counter (`dense`, `dense_1`)."""
    stems = {(*module.name[:-1], re.sub(r"_\d+$", "", module.name[-1])) for module in modules if module.name}
    return len(stems) == 1


def by_order(
    sources: Sequence[Module], targets: Sequence[Module], anchors: Mapping[int, int], made: Fits
) -> dict[int, int] | Problem:
    """Assign all modules in their order, where exactly one assignment is possible.

    Modules that are matched by name (`anchors`) keep their partners. Modules that are aliases, or that only
    their framework has, may be left out; no other may.
    """
    owners = {i: j for j, i in anchors.items()}

    def fits(i: int, j: int) -> bool:
        if i in owners or j in anchors:
            return anchors.get(j) == i
        return made(i, j) is not None

    s_free = [i not in owners and may_be_left(module) for i, module in enumerate(sources)]
    t_free = [j not in anchors and may_be_left(module) for j, module in enumerate(targets)]
    n, m = len(sources), len(targets)
    # ways[a][b]: assignments of the modules from a and b on, counted up to 2. Only a narrow band can be
    # reached: the two orders part by no more than the modules that may be left out.
    band = max(sum(s_free), sum(t_free)) + abs(n - m)
    ways = [dict[int, int]() for _ in range(n + 1)]
    reachable: dict[tuple[int, int], bool] = {}
    for a in range(n, -1, -1):
        for b in range(min(m, a + band), max(-1, a - band - 1), -1):
            if (a, b) == (n, m):
                ways[a][b] = 1
                continue
            total = 0
            if a < n and b < m and ways[a + 1].get(b + 1):
                reachable[a, b] = fits(a, b)
                total += ways[a + 1][b + 1] if reachable[a, b] else 0
            if a < n and s_free[a]:
                total += ways[a + 1].get(b, 0)
            if b < m and t_free[b] and not (a < n and s_free[a]):
                total += ways[a].get(b + 1, 0)
            ways[a][b] = min(total, 2)
    if not ways[0].get(0):
        return _no_order(sources, targets, anchors, fits)
    if ways[0][0] > 1:
        rest = [j for j in range(m) if j not in anchors]
        labels = ", ".join(targets[j].label for j in rest[:5])
        return Problem(
            code="param-unmatched",
            loc=("params", targets[rest[0]].params[0].name),
            message=f"more than one assignment fits the modules {labels}",
            hint="Give both sides the same module names.",
        )
    chosen = {}
    a = b = 0
    while (a, b) != (n, m):
        if reachable.get((a, b)) and ways[a + 1][b + 1]:
            chosen[b] = a
            a, b = a + 1, b + 1
        elif a < n and s_free[a] and ways[a + 1].get(b):
            a += 1
        else:
            b += 1
    return chosen


def _no_order(
    sources: Sequence[Module],
    targets: Sequence[Module],
    anchors: Mapping[int, int],
    fits: Callable[[int, int], bool],
) -> Problem:
    """The first place where the two orders part, in words."""
    taken = set(anchors.values())
    rest_s = [i for i in range(len(sources)) if i not in taken]
    rest_t = [j for j in range(len(targets)) if j not in anchors]
    a = 0
    while a < min(len(rest_s), len(rest_t)) and fits(rest_s[a], rest_t[a]):
        a += 1
    if a < min(len(rest_s), len(rest_t)):
        left, right = sources[rest_s[a]], targets[rest_t[a]]
        return Problem(
            code="shape-mismatch",
            loc=("params", right.params[0].name),
            message=f"the template's module '{right.label}' {_shapes(right)} comes where the source has "
            f"'{left.label}' {_shapes(left)}: no layout makes one the other",
            hint="Use a template of the same architecture, its layers declared in the same order or named "
            "alike.",
        )
    if a == len(rest_s) == len(rest_t):
        right = targets[rest_t[0]]
        return Problem(
            code="param-unmatched",
            loc=("params", right.params[0].name),
            message="some modules have the same names on both sides, but stand in another order than the "
            "others",
            hint="Name all modules alike on both sides.",
        )
    extra, side = (sources[rest_s[a]], "source") if a < len(rest_s) else (targets[rest_t[a]], "template")
    other = "template" if side == "source" else "source"
    return Problem(
        code="param-unmatched",
        loc=("params", extra.params[0].name),
        message=f"'{extra.label}' {_shapes(extra)} of the {side} has no partner in the {other} "
        f"({len(sources)} modules in the source, {len(targets)} in the template)",
        hint="Use a template of the same model.",
    )


def _shapes(module: Module) -> str:
    members = (f"{parts(p.name)[-1]} {list(p.tensor.shape)}" for p in module.params)
    return "(" + ", ".join(members) + ")"
