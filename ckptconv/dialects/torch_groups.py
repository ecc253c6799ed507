"""Which parameter an index of a torch optimizer stands for, where the rule of its trainer tells.

A trainer that sorts parameters into groups by a rule keeps the model's order within each. Where the file has
the model's order the indices are counted off; where it has not (safetensors sorts by name) only shapes tell.
Either way every index must have exactly one parameter that it can be, or nothing is known.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from ckptconv.document import Param

Index = str | int
Shapes = Mapping[Index, frozenset[tuple[int, ...]]]

_MAX_STATES = 1 << 20
"""Readings that are followed at most; more leave the order unknown."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupRule:
    """What is known of how a trainer fills its groups."""

    is_ordered: bool
    """Whether the parameters are given in the model's order."""
    may_be_in: Callable[[Param, int], bool]
    """Whether the trainer may have put a parameter into the group of that number."""


def anywhere(param: Param, group: int) -> bool:
    """The rule of a loop of one's own: it may have put a parameter into any group."""
    return True


def in_groups(
    groups: Sequence[Sequence[Index]], shapes: Shapes, candidates: Sequence[Param], rule: GroupRule
) -> dict[Index, str] | str:
    """The name of every index, where that is possible in exactly one way; else why not."""
    count = sum(map(len, groups))
    if count > len(candidates):
        return f"{count} parameters in the optimizer, {len(candidates)} in the model"
    if rule.is_ordered and count == len(candidates):
        return _counted_off(groups, shapes, candidates, rule)
    return _by_shape(groups, shapes, candidates, rule)


def _fits(index: Index, shapes: Shapes, param: Param) -> bool:
    return all(shape == param.tensor.shape for shape in shapes[index])


def _counted_off(
    groups: Sequence[Sequence[Index]], shapes: Shapes, candidates: Sequence[Param], rule: GroupRule
) -> dict[Index, str] | str:
    """By dealing the parameters out to the groups in order; how many of each group are dealt is a state."""
    start = (0,) * len(groups)
    ways: list[dict[tuple[int, ...], int]] = [{start: 1}]
    before: list[dict[tuple[int, ...], int]] = []
    followed = 0
    for param in candidates:
        reached: dict[tuple[int, ...], int] = defaultdict(int)
        by: dict[tuple[int, ...], int] = {}
        for state, number in ways[-1].items():
            for place, group in enumerate(groups):
                done = state[place]
                if done == len(group) or not rule.may_be_in(param, place):
                    continue
                if _fits(group[done], shapes, param):
                    after = (*state[:place], done + 1, *state[place + 1 :])
                    reached[after] = min(reached[after] + number, 2)
                    by[after] = place
        followed += len(reached)
        if followed > _MAX_STATES:
            return "too many readings to follow"
        ways.append(reached)
        before.append(by)
    state = tuple(map(len, groups))
    found = ways[-1].get(state, 0)
    if found != 1:
        return f"the groups fit the model's order in {'more than one' if found else 'no'} way"
    names: dict[Index, str] = {}
    for param, by in zip(reversed(candidates), reversed(before), strict=True):
        place = by[state]
        state = (*state[:place], state[place] - 1, *state[place + 1 :])
        names[groups[place][state[place]]] = param.name
    return names


def _by_shape(
    groups: Sequence[Sequence[Index]], shapes: Shapes, candidates: Sequence[Param], rule: GroupRule
) -> dict[Index, str] | str:
    """By shapes alone: of the parameters that can be in its group each index must fit exactly one."""
    names: dict[Index, str] = {}
    for place, group in enumerate(groups):
        for index in group:
            fitting = [p.name for p in candidates if rule.may_be_in(p, place) and _fits(index, shapes, p)]
            if len(fitting) != 1:
                which = f"index {index} of group {place}"
                return f"{which} may be any of {len(fitting)} parameters" if fitting else f"{which} fits none"
            names[index] = fitting[0]
    if len(set(names.values())) < len(names):
        return "two indices fit one parameter only"
    return names
