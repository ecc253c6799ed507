"""`Optimizer.state_dict()` of PyTorch as an optimizer of the document.

    {"state": {index: {"step": .., "exp_avg": .., ..}},
     "param_groups": [{"lr": .., .., "params": [index, ..], "param_names": [name, ..]?}]}

Indices run over the groups in their order; a parameter that never got a gradient has an index and no state.
FSDP and `torch.distributed.checkpoint` write names where others write indices; its `dcp_to_torch_save` makes
texts of the indices in `state` alone ("0" for 0). The class is not stored: the catalog tells it from the
keys. `step` is a float32 tensor per parameter (an int before torch 1.12 and in SparseAdam); SGD and Muon
store none. Source: torch 2.13 `torch/optim/optimizer.py`, `adam.py`, `sgd.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from ckptconv.catalog.optimizer_rows import Row, infer, row
from ckptconv.dialects import torch_keys
from ckptconv.dialects.residue import Lifter
from ckptconv.dialects.torch_groups import GroupRule
from ckptconv.dialects.torch_order import Order, order_of
from ckptconv.dialects.torch_values import count_of, dotted, layout_of, number_of, tensor_of, unwrapped
from ckptconv.document import Candidate, Fact, Group, Known, Optimizer, Param, Unknown, Value
from ckptconv.rawtree import DictNode, ListNode, Node, Path
from ckptconv.tensor import TensorRef

_MAX_UPDATES = 1 << 62


@dataclass(slots=True)
class _Found:
    """What the state entries hold, while they are walked."""

    slots: dict[str, dict[str, TensorRef]] = field(default_factory=dict)
    steps: dict[str, int] = field(default_factory=dict)
    step_source: str = ""
    oddities: list[str] = field(default_factory=list)


def is_optimizer(node: Node) -> bool:
    """Whether a node is an optimizer's state_dict."""
    if not isinstance(node, DictNode):
        return False
    groups = node.get("param_groups")
    return (
        isinstance(node.get("state"), DictNode)
        and isinstance(groups, ListNode)
        and all(isinstance(g, DictNode) and isinstance(g.get("params"), ListNode) for g in groups.items)
    )


def lift_optimizer(
    node: DictNode,
    path: Path,
    name: str,
    models: tuple[Mapping[str, Param], ...],
    raw_names: Mapping[str, str],
    lifter: Lifter,
    rule: GroupRule | None = None,
) -> tuple[Optimizer, tuple[str, ...]]:
    """The optimizer whose state_dict stands at `path`, and what is odd about it.

    `models`: sets of parameters that its indices may stand for; `raw_names`: names as the file has them ->
    names of the document; `rule`: how its trainer fills the groups.
    I/O: reads the steps. Raises: corrupt-file.
    """
    groups = _groups(node)
    states = _states(node)
    texts = _are_texts_for_numbers(states, groups)
    if texts:
        states = {int(key): state for key, state in states.items()}
    order = order_of(groups, states, models, raw_names, path, rule)
    keys = frozenset(k for state in states.values() for k in state.keys if isinstance(k, str))
    candidates = _algorithms(keys, groups)
    rows = [r for r in (row(algorithm, "torch") for algorithm in candidates) if r is not None]
    known = rows[0] if rows and len({r.family for r in rows}) == 1 else None
    params = {n: p for model in reversed(models) for n, p in model.items()}
    found = _Found(oddities=list(order.oddities))
    if texts:
        found.oddities.append(
            f"The numbers of the parameters are texts in {dotted((*path, 'state'))}, as torch's "
            "dcp_to_torch_save leaves them: they are read as the numbers that they were, but torch itself "
            "restores none of that state, and says nothing"
        )
    for index, state in states.items():
        if index in order.names:
            key = str(index) if texts else index
            _lift_state(state, key, order.names[index], name, path, known, params, found, lifter)
        else:
            found.oddities.append(f"{dotted(path)} has state for {index!r}, which is in none of its groups")
    if known is not None and known.step_in_group:
        _group_steps(groups, str(known.step_key), name, path, order, found, lifter)
    lifted_groups = tuple(
        Group(
            params=order.groups[position],
            hyperparameters=_hyperparameters(group, position, path, name, known, lifter),
        )
        for position, group in enumerate(groups)
    )
    algorithm = candidates[0] if len(candidates) == 1 else "unknown"
    optimizer = Optimizer(
        name=name,
        algorithm=algorithm,
        algorithm_candidates=candidates if len(candidates) > 1 else (),
        framework="torch",
        form=_form(rows, lifted_groups),
        step=_step(found, path, algorithm, known, bool(states)),
        param_steps={} if known is not None and known.step_in_group else found.steps,
        groups=lifted_groups,
        slots=found.slots,
        param_order=order.evidence,
    )
    return optimizer, (*found.oddities, *_step_oddities(found, name), *_order_oddities(order, name))


def _group_steps(
    groups: list[DictNode], key: str, name: str, path: Path, order: Order, found: _Found, lifter: Lifter
) -> None:
    """The counters of a class that counts per group."""
    for position, group in enumerate(groups):
        count = count_of(group.get(key))
        where: Path = (*path, "param_groups", position, key)
        if count is None or not 0 <= count[0] < _MAX_UPDATES:
            found.oddities.append(f"{dotted(where)} is no count of updates; it is kept as it stands")
            continue
        found.steps.update(dict.fromkeys(order.groups[position], count[0]))
        found.step_source = found.step_source or dotted(where)
        lifter.take(where, ("step", name), **count[1], was=count[0])


def _groups(node: DictNode) -> list[DictNode]:
    groups = node.get("param_groups")
    return [g for g in groups.items if isinstance(g, DictNode)] if isinstance(groups, ListNode) else []


def _states(node: DictNode) -> dict[str | int, DictNode]:
    state = node.get("state")
    return {
        key: value
        for key, value in (state.items if isinstance(state, DictNode) else ())
        if isinstance(key, (str, int)) and not isinstance(key, bool) and isinstance(value, DictNode)
    }


def _are_texts_for_numbers(states: Mapping[str | int, DictNode], groups: list[DictNode]) -> bool:
    """Whether a tool made texts of the numbers in the state, while the groups have kept theirs."""
    listed = [item for g in groups if isinstance(ps := g.get("params"), ListNode) for item in ps.items]
    if not all(isinstance(item, int) for item in listed):
        return False
    texts = {str(item) for item in listed}
    return bool(states) and all(key in texts for key in states)


def _algorithms(keys: frozenset[str], groups: list[DictNode]) -> tuple[str, ...]:
    """The algorithms that fit the state's keys and every group's."""
    slots = keys - {"step", *torch_keys.MASTER}
    fits: tuple[str, ...] | None = None
    for group in groups:
        plain = {
            k: _plain(v) for k, v in group.items if isinstance(k, str) and k not in ("params", "param_names")
        }
        these = infer("torch", slots, plain)
        fits = these if fits is None else tuple(name for name in fits if name in these)
    return fits or ()


def _plain(node: Node) -> Value:
    if node is None or isinstance(node, (bool, int, float, str)):
        return node
    if isinstance(node, ListNode):
        return tuple(_plain(item) for item in node.items)
    found = number_of(node)
    return found[0] if found is not None else str(type(node).__name__)


def _lift_state(
    state: DictNode,
    index: str | int,
    param: str,
    name: str,
    path: Path,
    known: Row | None,
    params: Mapping[str, Param],
    found: _Found,
    lifter: Lifter,
) -> None:
    for key, value in state.items:
        if not isinstance(key, str):
            continue
        where: Path = (*path, "state", index, key)
        if key == "step":
            count = count_of(value)
            if count is None or not 0 <= count[0] < _MAX_UPDATES:
                found.oddities.append(f"{dotted(where)} is no count of updates; it is kept as it stands")
                continue
            found.steps[param] = count[0]
            found.step_source = found.step_source or dotted(where)
            lifter.take(where, ("param_step", name, param), **count[1], was=count[0])
            continue
        tensor = tensor_of(value)
        if tensor is None:
            continue
        slot = "master" if key in torch_keys.MASTER else known.slot_of(key) if known is not None else None
        if slot is None and not _in_layout(tensor[0].shape, params.get(param)):
            continue  # an extra
        found.slots.setdefault(slot or key, {})[param] = tensor[0]
        address: Path = ("slot", name, slot or key, param)
        lifter.take((*where, *tensor[1]), address, **layout_of(tensor[0]))


def _in_layout(shape: tuple[int, ...], param: Param | None) -> bool:
    """Whether state that no catalog row names has the parameter's shape, as far as that is known."""
    return shape == param.tensor.shape if param is not None else len(shape) > 0


def _hyperparameters(
    group: DictNode, position: int, path: Path, name: str, known: Row | None, lifter: Lifter
) -> dict[str, Fact]:
    """A group's hyperparameters under canonical names, then those that the catalog does not name."""
    here = (*path, "param_groups", position)
    spots = {n: (key, index) for n, key, index in torch_keys.HYPERPARAMETERS}
    if known is not None:
        spots.update({n: (h.key, h.index) for n, h in known.hyperparameters.items() if h.key is not None})
    facts: dict[str, Fact] = {}
    used: set[str] = set(torch_keys.SWITCHES)
    if known is not None and known.step_in_group:
        used.add(str(known.step_key))
    for canonical, (key, index) in spots.items():
        if key not in group:
            continue
        node = group.get(key)
        spot: Path = (*here, key)
        if index is not None:
            if not isinstance(node, ListNode) or index >= len(node.items):
                continue
            node, spot = node.items[index], (*spot, index)
        used.add(key)
        _take_value(node, spot, canonical, position, name, facts, lifter)
    for native, node in group.items:
        if isinstance(native, str) and native not in used:
            _take_value(node, (*here, native), native, position, name, facts, lifter)
    return facts


def _take_value(
    node: Node, where: Path, canonical: str, position: int, name: str, facts: dict[str, Fact], lifter: Lifter
) -> None:
    address: Path = ("hyperparameter", name, position, canonical)
    leaf, inside = unwrapped(node)
    number = number_of(leaf)
    if number is not None:
        facts[canonical] = Known(value=number[0], source=dotted(where))
        lifter.take((*where, *inside), address, **number[1])
    elif isinstance(node, str):
        facts[canonical] = Known(value=node, source=dotted(where))
        lifter.take(where, address)
    # None and what is no plain value stays in the residue: nothing to say to another framework.


def _form(rows: list[Row], groups: tuple[Group, ...]) -> dict[str, str]:
    """What all readings of the class agree on."""
    values = (
        {n: f.value for n, f in groups[0].hyperparameters.items() if isinstance(f, Known)} if groups else {}
    )
    forms = [r.form(values) for r in rows]
    return {
        key: forms[0][key]
        for key in (forms[0] if forms else ())
        if all(f.get(key) == forms[0][key] for f in forms)
    }


def _step(found: _Found, path: Path, algorithm: str, known: Row | None, has_state: bool) -> Fact:
    if found.steps:
        source = found.step_source
        if len(set(found.steps.values())) > 1:
            source = dotted((*path, "state", "*", "step"))
        return Known(value=max(found.steps.values()), source=source)
    if known is not None and known.step_key is None:
        return Unknown(reason=f"torch {algorithm.upper()} stores no step")
    if not has_state:
        start = Candidate(
            value=0, source=dotted((*path, "state")), condition="the optimizer was never stepped"
        )
        return Unknown(
            reason="the optimizer's state is empty: it was never stepped, or saved without",
            candidates=(start,),
        )
    return Unknown(reason="the optimizer's state holds no step")


def _step_oddities(found: _Found, name: str) -> tuple[str, ...]:
    counts = found.steps.values()
    if len(set(counts)) <= 1:
        return ()
    return (
        f"The parameters of {name} have different steps, {min(counts)} to {max(counts)}: not all had "
        "a gradient in every update. The largest is taken for the run's; all are kept.",
    )


def _order_oddities(order: Order, name: str) -> tuple[str, ...]:
    if order.evidence != "unknown" or not order.names:
        return ()
    return (
        f"'{name}' stores its state by number and nothing tells which is which parameter ({order.reason}): a "
        "conversion needs --source-spec.",
    )
