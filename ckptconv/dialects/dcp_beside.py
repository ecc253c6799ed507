"""Dictionaries of which a part stands beside the folder's entries, in `meta.pt`: Lightning's and Fabric's.

Lightning puts the model and the optimizers into the entries and the rest of its checkpoint into `meta.pt`:

| in a file | in a folder |
|---|---|
| `state_dict` | entries under `state_dict`, or `model` (FSDPStrategy) |
| `optimizer_states`, a list | entries under `optimizer_0`, `optimizer_1`, .. |
| everything else | `meta.pt` |

`Fabric.save` does so with whatever dictionary it is given, and renames nothing.
Source: lightning 2.6 `pytorch/strategies/{model_parallel,fsdp}.py`, `fabric/strategies/model_parallel.py`.
"""

from __future__ import annotations

from collections.abc import Collection
from itertools import count, takewhile

from ckptconv.dialects.lightning_loops import VERSION
from ckptconv.formats.dcp_write import BESIDE
from ckptconv.rawtree import DictNode, ListNode, Node, dict_of

STATE = "state_dict"
_OPTIMIZERS = "optimizer_states"
_MODELS = (STATE, "model")

Pairs = list[tuple[Node, Node]]


def gathered(root: DictNode) -> tuple[DictNode, tuple[str, ...], str]:
    """The whole dictionary, its keys that stand beside the entries, and the key of Lightning's model."""
    meta = root.get(BESIDE)
    entries: Pairs = [(key, value) for key, value in root.items if key != BESIDE]
    keys = tuple(key for key in meta.keys if isinstance(key, str)) if isinstance(meta, DictNode) else ()
    if not isinstance(meta, DictNode) or any(key in meta for key, _ in entries):
        return root, (), ""
    model = next((key for key in _MODELS if key in root), STATE)
    if VERSION in meta:
        names = list(takewhile(root.__contains__, map("optimizer_{}".format, count())))
        states = ListNode(items=tuple(root.get(name) for name in names))
        entries = [(STATE if key == model else key, value) for key, value in entries if key not in names]
        entries += [(_OPTIMIZERS, states)] if names else []
    return dict_of([*meta.items, *entries]), keys, model


def scattered(root: DictNode, beside: Collection[str] | None, model: str) -> DictNode:
    """The dictionary as a folder has it; `beside` as it was gathered, None for what Lightning does."""
    entries: Pairs = []
    meta: Pairs = []
    lightning = VERSION in root
    for key, value in root.items:
        if key == _OPTIMIZERS and lightning and isinstance(value, ListNode):
            entries += [(f"optimizer_{number}", state) for number, state in enumerate(value.items)]
        elif key == STATE and lightning:
            entries.append((model, value))
        elif key in beside if beside is not None else not str(key).startswith("ckptconv."):
            meta.append((key, value))
        else:
            entries.append((key, value))
    return dict_of([*entries, (BESIDE, dict_of(meta))])
