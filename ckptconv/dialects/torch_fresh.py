"""The training dictionary of a plain loop for a run of another PyTorch program, which so needs no template.

    {"model": ..., "optimizer": {"state": {}, "param_groups": [...]}, "scheduler": ..., "epoch": 3, "step": 9}

Whatever a Trainer, Lightning or DeepSpeed has around a run, its model and optimizer are torch's: under the
parameters' names, and with the groups and hyperparameters that the catalog knows by torch's keys, the run
goes on in a loop of one's own. Several optimizers and schedulers keep their names as keys; `epoch` and `step`
count what is completed. Nothing is made for an optimizer outside of the catalog, or one whose parameters are
not known by name: such runs need a template.
"""

from __future__ import annotations

from collections.abc import Iterator

from ckptconv.catalog.optimizer_rows import Row, row
from ckptconv.dialects import torch_keys
from ckptconv.dialects.residue import fill
from ckptconv.dialects.torch_modules import state_dict_of
from ckptconv.dialects.torch_scheduler import is_scheduler
from ckptconv.dialects.torch_values import places
from ckptconv.document import Checkpoint, Group, Optimizer, value_of
from ckptconv.rawtree import DictNode, ListNode, Node, RawTree, at, dict_of

_FORMAT = "pytorch"


def plain_dictionary(source: Checkpoint) -> RawTree | None:
    """What a plain loop would have saved before its first update; None where the document does not tell."""
    if not source.optimizers or source.described:
        return None
    items: list[tuple[Node, Node]] = [("model", state_dict_of(source.params))]
    for optimizer in source.optimizers:
        known = row(optimizer.algorithm, optimizer.framework) if optimizer.framework == "torch" else None
        if known is None or known.step_in_group or not set(optimizer.params) <= source.params.keys():
            return None
        items.append((optimizer.name, _state_dict(optimizer, known)))
    items += _schedulers(source)
    for key, fact in (("epoch", source.progress.epochs), ("step", source.progress.step)):
        value = value_of(fact)
        if isinstance(value, (int, float)) and float(value).is_integer():
            items.append((key, int(value)))
    return RawTree(format=_FORMAT, root=dict_of(items))


def _schedulers(source: Checkpoint) -> Iterator[tuple[Node, Node]]:
    """The schedulers' state_dicts as they stand in the file that was read."""
    root = source.residue.root if source.residue is not None else None
    done: set[str] = set()
    for path, lifted in places(root):
        match lifted.to:
            case ("position", str(name)) if name not in done:
                within = (path[:end] for end in range(len(path)))
                found = next((node for here in within if is_scheduler(node := at(root, here))), None)
                if found is not None:
                    done.add(name)
                    yield name, fill(found, source)


def _state_dict(optimizer: Optimizer, known: Row) -> DictNode:
    groups: list[Node] = []
    first = 0
    for group in optimizer.groups:
        count = len(group.params)
        numbers = ListNode(items=tuple(range(first, first + count)))
        names = ListNode(items=tuple(group.params))
        settings = dict_of({**_settings(group, known), "params": numbers, "param_names": names})
        groups.append(settings)
        first += count
    return dict_of({"state": DictNode(), "param_groups": ListNode(items=tuple(groups))})


def _settings(group: Group, known: Row) -> dict[str, Node]:
    """A group's hyperparameters under torch's keys, and what tells its class."""
    spots = {name: (key, index) for name, key, index in torch_keys.HYPERPARAMETERS}
    spots.update({n: (h.key, h.index) for n, h in known.hyperparameters.items() if h.key is not None})
    settings: dict[str, Node] = {}
    tuples: dict[str, dict[int, Node]] = {}
    for name, fact in group.hyperparameters.items():
        value = value_of(fact)
        if value is None or isinstance(value, tuple):
            continue
        key, index = spots.get(name, (name, None))
        if index is None:
            settings[key] = value
        else:
            tuples.setdefault(key, {})[index] = value
    for key, parts in tuples.items():
        settings[key] = ListNode(items=tuple(parts[i] for i in sorted(parts)), kind="tuple")
    return {**settings, **{key: v for key, v in known.telling_values.items() if not isinstance(v, tuple)}}
