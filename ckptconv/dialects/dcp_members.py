"""What FSDP leaves in the folder of accelerate and of the Trainer, which saves by accelerate's functions.

| `state_dict_type` | model | optimizer |
|---|---|---|
| `SHARDED_STATE_DICT` | `pytorch_model_fsdp_<n>/`: entries of `model` | `optimizer_<n>/`: `optimizer` |
| `FULL_STATE_DICT` | `pytorch_model_fsdp[_<n>].bin` | `optimizer[_<n>].bin` |
| `LOCAL_STATE_DICT` | `pytorch_model_fsdp[_<n>]_rank<R>.bin` | `optimizer_<n>/` |
| any, `use_dcp=False` | `pytorch_model_fsdp_<n>_rank<R>.bin` | `optimizer_<n>_rank<R>.bin` |

An optimizer has the names of parameters where others have numbers, with FSDP 1 and 2 alike. For the dialects
a subfolder is the dictionary that is in it, its optimizer as a state_dict (`dcp_forms`). Files of one rank
are refused: no file tells which part of which parameter they hold. The Trainer writes neither arguments nor
configuration beside a sharded model, and beside a whole one also `model.safetensors`.
Source: accelerate 1.15 `utils/fsdp_utils.py` `save_fsdp_model`, `save_fsdp_optimizer`.
"""

from __future__ import annotations

import re
from dataclasses import replace

from ckptconv.dialects.dcp_forms import FORMS, folded, unfolded
from ckptconv.errors import FormatError, Problem
from ckptconv.rawtree import DictNode, Node, RawTree, dict_of

MODEL, OPTIMIZER = "pytorch_model_fsdp", "optimizer"
"""What the names of files and subfolders begin with."""

_KEYS = {MODEL: "model", OPTIMIZER: "optimizer"}
"""The only entry of a subfolder."""
_RANK = re.compile(rf"(?:{MODEL}|{OPTIMIZER})(?:_\d+)?_rank\d+\.bin")
_NUMBER = re.compile(r"_\d+$")


def opened(raw: RawTree) -> RawTree:
    """The folder with its subfolders as dictionaries; what that undid is in the attribute `FORMS`.

    Raises: unsupported-feature, unknown-dialect.
    """
    if not isinstance(raw.root, DictNode):
        return raw
    _refuse_ranks(raw.root)
    forms: list[str] = []
    items: list[tuple[Node, Node]] = []
    for name, node in raw.root.items:
        if isinstance(name, str) and raw.attributes.get(name) == "dcp":
            member, undone = unfolded(dict_of({name: _inner(name, node)}))
            node = member.get(name)
            forms += undone
        items.append((name, node))
    attributes = {**raw.attributes, **({FORMS: tuple(forms)} if forms else {})}
    return replace(raw, root=replace(raw.root, items=tuple(items)), attributes=attributes)


def closed(raw: RawTree) -> RawTree:
    """The folder with its subfolders as they are written."""
    assert isinstance(raw.root, DictNode)
    told = raw.attributes.get(FORMS, ())
    forms = told if isinstance(told, tuple) else ()
    items: list[tuple[Node, Node]] = []
    for name, node in raw.root.items:
        if isinstance(name, str) and raw.attributes.get(name) == "dcp":
            member = folded(dict_of({name: node}), forms, {})
            node = dict_of({_key(name): member.get(name)})
        items.append((name, node))
    return replace(raw, root=replace(raw.root, items=tuple(items)))


def _key(name: str) -> str:
    return _KEYS[_NUMBER.sub("", name)]


def _inner(name: str, node: Node) -> Node:
    key = _key(name)
    if isinstance(node, DictNode) and node.keys == (key,):
        return node.get(key)
    found = ", ".join(map(str, node.keys[:5])) if isinstance(node, DictNode) else "no dictionary"
    raise FormatError.of(
        "unknown-dialect",
        f"'{name}' should hold '{key}' alone, it holds {found}",
        f"Name the folder '{name}' itself, it is one of torch.distributed.checkpoint.",
        loc=(name,),
    )


def _refuse_ranks(root: DictNode) -> None:
    ranks = [name for name in root.keys if isinstance(name, str) and _RANK.fullmatch(name)]
    if not ranks:
        return
    raise FormatError(
        *(
            Problem(
                code="unsupported-feature",
                loc=(name,),
                message=f"'{name}' has one rank's shares, and not which parts of the parameters they are",
                hint="Save with state_dict_type SHARDED_STATE_DICT or FULL_STATE_DICT and use_dcp=True.",
            )
            for name in ranks[:20]
        )
    )
