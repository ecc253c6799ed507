"""Settings and steps of the optimizer that DeepSpeed runs, which are the same for all parameters of a group.

    {"state": {n: {"step": .., ..}}, "param_groups": [{"lr": .., .., "params": [n, ..], "step": ..?}]}

`n` numbers vectors (see `deepspeed_optimizer`), or the parameters of a universal checkpoint. DeepSpeed's own
FusedAdam and DeepSpeedCPUAdam follow the rules of torch's Adam and AdamW; their groups have `bias_correction`
and may have a `step`, and do not tell which of the two rules it is: the configuration does (`adam_w_mode`).
Source: deepspeed 0.19 `ops/adam/fused_adam.py`, `ops/adam/cpu_adam.py`, `runtime/engine.py`
`_configure_basic_optimizer`.
"""

from __future__ import annotations

from collections.abc import Sequence

from ckptconv.dialects.deepspeed_parts import Found, Located, Pairs, Shapes, conflict, damaged
from ckptconv.dialects.deepspeed_places import HYPER, STATE, place
from ckptconv.dialects.torch_values import count_of
from ckptconv.rawtree import DictNode, ListNode, Node, Path

Base = tuple[Path, Node]
"""The state of the optimizer that DeepSpeed runs, and where: a `state_dict()`, or a list of states."""

STEP = "step"
BASES = ("base_optimizer_state", "optimizer_state_dict")
_CORRECTED = "bias_correction"
"""In a group of Adam's: True means torch's rule."""


def is_decoupled(config: Node) -> bool | None:
    """Whether the Adam of DeepSpeed's configuration decays as AdamW does; None where there is none."""
    section = config.get("optimizer") if isinstance(config, DictNode) else None
    kind = section.get("type") if isinstance(section, DictNode) else None
    if (
        not isinstance(section, DictNode)
        or not isinstance(kind, str)
        or kind.lower() not in ("adam", "adamw")
    ):
        return None
    params = section.get("params")
    mode = params.get("adam_w_mode") if isinstance(params, DictNode) else None
    return kind.lower() == "adamw" or mode is not False


def join_settings(
    found: Found,
    bases: Sequence[Base],
    numbers: Sequence[Node],
    groups: Sequence[Shapes],
    decoupled: bool | None,
) -> None:
    """The groups' settings, as torch's class of the same rule has them; they must be the same in all bases.

    `decoupled`: whether DeepSpeed's Adam decays the weights as AdamW does, where that is known.
    Raises: corrupt-file, progress-conflict.
    """
    lists = [_groups_of(base) for base in bases]
    if any(listed is None for listed in lists):
        found.groups = [([], list(shapes)) for shapes in groups]
        return
    listed = [value for value in lists if value is not None]
    if len({len(items) for _, items in listed}) > 1:
        message = f"the ranks have {[len(items) for _, items in listed]} groups"
        raise damaged("corrupt-file", listed[0][0], message)
    members = dict(zip(map(repr, numbers), groups, strict=True))
    for position, group in enumerate(listed[0][1]):
        params = group.get("params")
        own = [members[repr(n)] for n in (params.items if isinstance(params, ListNode) else ())]
        names = [name for shapes in own for name in shapes]
        settings: Pairs = []
        for key in group.keys:
            if not isinstance(key, str) or key in ("params", "param_names"):
                continue
            nodes = [((*path, position, key), items[position].get(key)) for path, items in listed]
            if key == STEP:
                same_step(found, nodes, own)
            elif key != _CORRECTED or group.get(key) is not True:
                settings.append((key, found.once(nodes, (*HYPER, position, key))))
        if group.get(_CORRECTED) is True:
            settings += [("amsgrad", False)] if "amsgrad" not in group else []
            settings += [("decoupled_weight_decay", decoupled)] if decoupled is not None else []
        found.groups.append((settings, names))


def same_step(found: Found, nodes: Sequence[tuple[Path, Node]], members: Sequence[Shapes]) -> None:
    """A step that is kept of a whole group: what stands beside it, or what its parameters have none of."""
    filled = [shapes for shapes in members if shapes]
    if not filled:
        return
    for shapes in filled:
        for name in shapes:
            if all(key != STEP for key, _ in found.entries[name]):
                found.entries[name].insert(0, (STEP, nodes[0][1]))
    beside = next(value for key, value in found.entries[next(iter(filled[0]))] if key == STEP)
    counts = [count_of(node) for _, node in nodes] + [count_of(beside)]
    first = list(found.entries).index(next(iter(filled[0])))
    if None in counts or len({count[0] for count in counts if count is not None}) > 1:
        raise conflict(((*STATE, first, STEP), beside), nodes[0])
    found.moved.update({path: place("count", *STATE, first, STEP) for path, _ in nodes})


def base_of(share: Located) -> Base:
    """The state of the optimizer that DeepSpeed runs: a `state_dict()`, or a list of states."""
    path, node = share
    for key in BASES:
        if isinstance(node.get(key), (DictNode, ListNode)):
            return (*path, key), node.get(key)
    raise damaged("corrupt-file", path, "the state of the optimizer is not there")


def _groups_of(base: Base) -> tuple[Path, list[DictNode]] | None:
    path, node = base
    if not isinstance(node, DictNode):
        return None
    listed = node.get("param_groups")
    if not isinstance(listed, ListNode) or not all(isinstance(item, DictNode) for item in listed.items):
        raise damaged("corrupt-file", (*path, "param_groups"), "the groups of the optimizer are not there")
    return (*path, "param_groups"), [item for item in listed.items if isinstance(item, DictNode)]


def numbers_of(base: Base, count: int) -> list[Node]:
    """What the optimizer calls each vector."""
    listed = _groups_of(base)
    if listed is None:
        numbers: list[Node] = list(range(count))
    else:
        params = [group.get("params") for group in listed[1]]
        numbers = [n for p in params if isinstance(p, ListNode) for n in p.items]
    if len(numbers) != count or len(set(map(repr, numbers))) < count:
        message = f"the optimizer has {len(numbers)} vectors, 'param_shapes' tells of {count}"
        raise damaged("corrupt-file", base[0], message)
    return numbers


def entry_of(base: Base, number: Node) -> Located | None:
    path, node = base
    state: Node = None
    where: Path = path
    if isinstance(node, ListNode) and isinstance(number, int):
        state = node.items[number] if number < len(node.items) else None
        where = (*path, number)
    elif isinstance(node, DictNode) and isinstance(number, (str, int)):
        states = node.get("state")
        state = states.get(number) if isinstance(states, DictNode) else None
        where = (*path, "state", number)
    return (where, state) if isinstance(state, DictNode) else None
