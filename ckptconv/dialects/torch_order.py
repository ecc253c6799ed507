"""Which parameter an index of a torch optimizer stands for, by evidence and never by guess.

- *named*: the groups hold `param_names`, or names in the place of indices;
- *declaration-order*: one group, whose indices fit the model's trainable parameters in order, with the shape
  of every slot, in exactly one way (frozen parameters may be left out between them);
- several groups, or parameters that are not in the model's order: by a trainer's rule (`torch_groups`);
- otherwise unknown: parameters are called `#<index>` until a skeleton tells their names.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from ckptconv.dialects import torch_keys
from ckptconv.dialects.torch_groups import GroupRule, in_groups
from ckptconv.dialects.torch_modules import bare_names, optimizable
from ckptconv.dialects.torch_values import dotted, tensor_of
from ckptconv.document import Param
from ckptconv.errors import FormatError
from ckptconv.rawtree import DictNode, ListNode, Path

_Index = str | int
_Shapes = Mapping[_Index, frozenset[tuple[int, ...]]]
_MAX_CELLS = 1 << 22
"""Alignments of more index-parameter pairs than this are not searched; full counts need no search."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """Names of an optimizer's parameters."""

    groups: tuple[tuple[str, ...], ...]
    names: Mapping[_Index, str]
    evidence: Literal["named", "declaration-order", "unknown"]
    reason: str = ""
    """Why nothing is known."""
    oddities: tuple[str, ...] = field(default=())


def order_of(
    groups: list[DictNode],
    states: Mapping[_Index, DictNode],
    models: tuple[Mapping[str, Param], ...],
    raw_names: Mapping[str, str],
    path: Path,
    rule: GroupRule | None = None,
) -> Order:
    """The names of an optimizer's parameters; `rule`: how its trainer fills the groups.

    Raises: corrupt-file where the groups contradict themselves.
    """
    indices = [_indices(group, position, path) for position, group in enumerate(groups)]
    flat = [index for group in indices for index in group]
    if len(set(flat)) < len(flat):
        raise _corrupt(
            path, f"the groups hold {len(flat)} parameters, only {len(set(flat))} of them different"
        )
    shapes = {index: _slot_shapes(states[index]) if index in states else frozenset() for index in flat}
    named = _named(groups, indices, raw_names, path)
    if named is not None:
        params = {n: p for model in models for n, p in model.items()}
        wrong = [(i, n) for i, n in named.items() if n in params and not _fits(shapes[i], params[n])]
        if not wrong and params.keys() >= set(named.values()):
            return _order(indices, named, "named")
        if not wrong:
            stated = _order(indices, named, "named")
            return replace(
                stated, evidence="unknown", reason="its names are not those of the model in the file"
            )
        index, name = wrong[0]
        had, has = sorted(shapes[index]), list(params[name].tensor.shape)
        odd = f"The state called '{name}' has shape {list(had[0])}, the parameter {has}: its names are wrong."
        return _unknown(indices, "names and shapes disagree", odd)
    if any(isinstance(index, str) for index in flat):
        return _unknown(indices, "two of its names are one in the model")
    if not flat:
        return _order(indices, {}, "declaration-order")
    if rule is not None and not (rule.is_ordered and len(groups) == 1):
        return _ruled(indices, shapes, models, rule)
    if len(groups) > 1:
        return _unknown(indices, f"{len(groups)} groups without param_names")
    return _declared(indices, flat, shapes, models)


def _ruled(
    indices: list[list[_Index]], shapes: _Shapes, models: tuple[Mapping[str, Param], ...], rule: GroupRule
) -> Order:
    found = [in_groups(indices, shapes, [m[name] for name in optimizable(m)], rule) for m in models]
    fits = [names for names in found if not isinstance(names, str)]
    if fits and all(names == fits[0] for names in fits):
        return _order(indices, fits[0], "declaration-order")
    reasons = [reason for reason in found if isinstance(reason, str)]
    return _unknown(indices, reasons[0] if reasons else f"they fit {len(fits)} models")


def _declared(
    indices: list[list[_Index]],
    flat: list[_Index],
    shapes: _Shapes,
    models: tuple[Mapping[str, Param], ...],
) -> Order:
    reasons, fits = [], []
    for params in models:
        candidates = [params[name] for name in optimizable(params)]
        trained = [param for param in candidates if param.trainable]
        if len(trained) == len(flat):
            candidates = trained
        fit = _alignment([shapes[index] for index in flat], candidates)
        if isinstance(fit, str):
            reasons.append(fit)
        else:
            fits.append(fit)
    if len(fits) == 1:
        return _order(indices, dict(zip(flat, fits[0], strict=True)), "declaration-order")
    if fits:
        return _unknown(indices, f"they fit {len(fits)} models")
    return _unknown(indices, reasons[0] if reasons else "the file holds no model")


def _alignment(shapes: list[frozenset[tuple[int, ...]]], candidates: list[Param]) -> list[str] | str:
    """The names that fit in order, where that is possible in exactly one way; else why not."""
    count, room = len(shapes), len(candidates)
    if count > room:
        return f"{count} parameters in the optimizer, {room} in the model"
    if count == room:
        for shape, param in zip(shapes, candidates, strict=True):
            if not _fits(shape, param):
                stated = list(min(shape))
                return f"state of shape {stated} where '{param.name}' has {list(param.tensor.shape)}"
        return [param.name for param in candidates]
    if count * room > _MAX_CELLS:
        return f"{count} parameters in the optimizer, {room} in the model"
    # ways[j]: in how many ways (at most 2 are told apart) the rest of the indices fits candidates[j:].
    table: list[list[int]] = [[1] * (room + 1)]
    for shape in reversed(shapes):
        ways = [0] * (room + 1)
        for j in range(room - 1, -1, -1):
            take = table[-1][j + 1] if _fits(shape, candidates[j]) else 0
            ways[j] = min(ways[j + 1] + take, 2)
        table.append(ways)
    if table[-1][0] != 1:
        many = "in more than one way" if table[-1][0] else "in no way"
        return f"the {count} parameters of the optimizer fit the {room} of the model {many}"
    names, j = [], 0
    for position, shape in enumerate(shapes):
        rest = table[count - position - 1]
        while not (_fits(shape, candidates[j]) and rest[j + 1]):
            j += 1
        names.append(candidates[j].name)
        j += 1
    return names


def _indices(group: DictNode, position: int, path: Path) -> list[_Index]:
    params = group.get("params")
    items = params.items if isinstance(params, ListNode) else ()
    result: list[_Index] = []
    for item in items:
        if not isinstance(item, (str, int)) or isinstance(item, bool):
            raise _corrupt(
                (*path, "param_groups", position), f"'params' holds {item!r}, no index and no name"
            )
        result.append(item)
    return result


def _named(
    groups: list[DictNode], indices: list[list[_Index]], raw_names: Mapping[str, str], path: Path
) -> dict[_Index, str] | None:
    """Names that the groups state themselves, or None."""
    names: dict[_Index, str] = {}
    for position, (group, numbers) in enumerate(zip(groups, indices, strict=True)):
        stated = group.get("param_names")
        if isinstance(stated, ListNode):
            if len(stated.items) != len(numbers) or not all(isinstance(n, str) for n in stated.items):
                raise _corrupt(
                    (*path, "param_groups", position),
                    f"{len(stated.items)} 'param_names' stand beside {len(numbers)} 'params'",
                )
            names.update({i: str(n) for i, n in zip(numbers, stated.items, strict=True)})
        elif all(isinstance(index, str) for index in numbers):
            names.update({index: str(index) for index in numbers})
        else:
            return None
    bare = dict(zip(names.values(), bare_names(list(names.values())), strict=True))
    named = {index: raw_names.get(name, bare[name]) for index, name in names.items()}
    if not named or len(set(named.values())) < len(named):
        return None
    return named


def _slot_shapes(state: DictNode) -> frozenset[tuple[int, ...]]:
    """Shapes of the state that has the parameter's shape in every optimizer."""
    found = (tensor_of(value) for key, value in state.items if key in torch_keys.SHAPED)
    return frozenset(tensor[0].shape for tensor in found if tensor is not None)


def _fits(shapes: frozenset[tuple[int, ...]], param: Param) -> bool:
    return all(shape == param.tensor.shape for shape in shapes)


def _order(
    indices: list[list[_Index]], names: Mapping[_Index, str], evidence: Literal["named", "declaration-order"]
) -> Order:
    groups = tuple(tuple(names[index] for index in group) for group in indices)
    return Order(groups=groups, names=names, evidence=evidence)


def _unknown(indices: list[list[_Index]], reason: str, *oddities: str) -> Order:
    names = {index: f"#{index}" for group in indices for index in group}
    groups = tuple(tuple(names[index] for index in group) for group in indices)
    return Order(groups=groups, names=names, evidence="unknown", reason=reason, oddities=oddities)


def _corrupt(path: Path, message: str) -> FormatError:
    error = FormatError.of(
        "corrupt-file", f"{message} at '{dotted(path)}'", "Save the optimizer's state_dict again.", loc=path
    )
    assert isinstance(error, FormatError)
    return error
