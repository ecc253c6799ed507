"""What PEFT puts into a model: names of adapters in a training file, and what their folder says of them.

In a model that trains, PEFT's parts stand beside the layers that they adapt, all behind `base_model.model.`:

    q.base_layer.weight  q.lora_A.default.weight  q.lora_B.default.weight    of the layer `q`
    norm.original_module.weight  norm.modules_to_save.default.weight         of one that is trained whole

`save_pretrained` writes the trained ones alone, without the adapter's name (`default`). Here they are called
as there in both, and the base model's as in the base model; where a file has several adapters their names are
kept. An adapter is not merged: its arrays are of use beside the base model's only.
Source: peft 0.21.2 `utils/save_and_load.py` (`get_peft_model_state_dict`), `tuners/*/model.py` (`prefix`),
`tuners/tuners_utils.py` (`mark_only_adapters_as_trainable`), `peft_model.py` (`save_pretrained`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from ckptconv.document import Checkpoint, Value
from ckptconv.rawtree import DictNode, Lifted, ListNode, Node, walk

PREFIX = "base_model.model."
CONFIG = "adapter_config.json"
EXTENSION = "peft/adapter"
"""Key of `Checkpoint.extensions` for what the config says."""

UNMERGED = (
    "An adapter is not merged into its base model here: call peft's merge_and_unload() before you save."
)

_TUNERS = (
    r"adamss|beft|boft|c3a|deft|delora|fourierft|frod|glora|gralora|hada|hira|hra|ia3|lily|ln_tuning|lokr|lora"
    r"|miss|oft|osf|peanut|poly|psoft|pvera_lambda|randlora|road|shadow|shira|supertuning|tinylora"
    r"|trainable_tokens|unilora|vblora|vera_lambda|waveft"
)
"""What the names of each tuner's own modules and parameters begin with, up to an underscore."""
_BASE, _SAVED = "base_layer", "modules_to_save"
_TUNED = re.compile(rf"(?:^|\.)(?:(?:{_TUNERS})_\w+|{_SAVED})\.([^.]+)")
_PLAIN = frozenset({"weight", "bias"})
"""Names of parameters, which no adapter is called by."""
_MARKS = (PREFIX, f".{_BASE}.", f".{_SAVED}.")
"""What names have that PEFT alone gives."""
_PART = re.compile(rf"(?:^|\.)((?:{_TUNERS})_\w+|{_SAVED})(?:\.|$)")
_LOW_RANK = re.compile(r"lora_(?:embedding_)?[AB]")
"""Parts that nobody calls so but for what they are, PEFT or not."""


def saved_names(names: Sequence[str]) -> Sequence[str]:
    """The names of a training model's state_dict, the prefix gone, as `save_pretrained` has them.

    They may be those of the adapter alone, which is what FSDP saves of a model that PEFT trains.
    """
    adapters = {found[1] for found in map(_TUNED.search, names) if found is not None} - _PLAIN
    if len(adapters) != 1:
        return names
    adapter = adapters.pop()
    dropped = {_BASE, _SAVED}

    def bare(name: str) -> str:
        if _TUNED.search(name) is None:
            return ".".join(part for part in name.split(".") if part != _BASE)
        return ".".join(part for part in name.split(".") if part not in dropped and part != adapter)

    return [bare(name) for name in names]


def trained(names: Sequence[str]) -> Mapping[str, bool]:
    """Which of a training model's names PEFT trains, and which it froze; biases are left open.

    Empty for names that have no part of PEFT's.
    """
    if not any(f".{_BASE}." in name or f".{_SAVED}." in name for name in names):
        return {}
    told = {name: _TUNED.search(name) is not None for name in names}
    return {name: tuned for name, tuned in told.items() if tuned or not name.endswith(".bias")}


def parts(checkpoint: Checkpoint) -> tuple[str, ...]:
    """What the parameters of adapters are called, `lora_A` and the like, where the file has any.

    By the names in the file, whatever its dialect: those of the document are without PEFT's prefix.
    """
    leaves = walk(checkpoint.residue.root) if checkpoint.residue else ()
    taken = (path for path, leaf in leaves if isinstance(leaf, Lifted) and leaf.to[0] == "param")
    names = [".".join(map(str, path)) for path in taken]
    marked = any(mark in name for name in names for mark in _MARKS)
    found = dict.fromkeys(match[1] for match in map(_PART.search, names) if match is not None)
    return tuple(part for part in found if marked or _LOW_RANK.fullmatch(part))


def is_in(checkpoint: Checkpoint) -> bool:
    """Whether there is an adapter in it, by its configuration or by the names in the file."""
    return EXTENSION in checkpoint.extensions or bool(parts(checkpoint))


def settings(root: Node) -> dict[str, object]:
    """What a folder's config says of its adapter: plain values and lists that are not empty."""
    config = root.get(CONFIG) if isinstance(root, DictNode) else None
    if not isinstance(config, DictNode):
        return {}
    plain = {key: _plain(value) for key, value in config.items if isinstance(key, str)}
    return {key: value for key, value in plain.items() if value not in (None, False, [])}


def _plain(node: Node) -> Value | list[Value]:
    if isinstance(node, ListNode):
        return [item for item in node.items if isinstance(item, (str, int, float))]
    return node if isinstance(node, (str, int, float)) else None


def said(told: Mapping[str, object]) -> tuple[str, ...]:
    """Sentences about an adapter, if there is one."""
    if not told:
        return ()
    kind = str(told.get("peft_type", "an adapter")).upper()
    numbers = [f"{key} {told[key]}" for key in ("r", "lora_alpha") if key in told]
    base = told.get("base_model_name_or_path") or "a base model that it does not name"
    return (
        f"These are weights of an adapter ({', '.join([kind, *numbers])}) for {base}, not of a whole model.",
        UNMERGED,
    )
