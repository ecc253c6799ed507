"""JSON values as trees, and trees as JSON texts that are byte for byte what was read, where Python wrote it.

A text is told by the options of `json.dumps` that give it again; one that none gives keeps its values and is
written with the first options. `NaN` and `Infinity`, which Python writes, are read where the caller says so.
"""

from __future__ import annotations

import json
from itertools import product

from ckptconv.errors import FormatError
from ckptconv.rawtree import DictNode, ListNode, Node
from ckptconv.strictjson import Json, parse

_STYLES: tuple[str, ...] = tuple(
    f"{indent} {charset} {end}"
    for indent, charset, end in product(("2", "none", "4", "1"), ("ascii", "unicode"), ("newline", "bare"))
)
"""Indent, charset and end of a text, as an attribute of its file."""


def read_text(data: bytes, name: str) -> tuple[Node, str]:
    """The tree of a JSON text and its style.

    Raises: corrupt-file, duplicate-key, limit-exceeded.
    """
    value = parse(data, name, constants=True)
    style = next((style for style in _STYLES if _dump(value, style) == data), _STYLES[0])
    return node_of(value), style


def text_of(node: Node, style: object, name: str) -> bytes:
    """The JSON text of a tree.

    Raises: unsupported-feature for what is not JSON.
    """
    return _dump(value_of(node, name), style if isinstance(style, str) and style in _STYLES else _STYLES[0])


def _dump(value: Json, style: str) -> bytes:
    indent, charset, end = style.split()
    text = json.dumps(
        value, indent=int(indent) if indent.isdigit() else None, ensure_ascii=charset == "ascii"
    )
    return (text + ("\n" if end == "newline" else "")).encode("utf-8", "surrogatepass")


def node_of(value: Json) -> Node:
    """A JSON value as a tree; the parser has bounded its nesting."""
    if isinstance(value, dict):
        return DictNode(items=tuple((key, node_of(part)) for key, part in value.items()))
    if isinstance(value, list):
        return ListNode(items=tuple(node_of(part) for part in value))
    leaf: bool | int | float | str | None = value
    return leaf


def value_of(node: Node, name: str) -> Json:
    """The JSON value of a tree; `name` is the file's.

    Raises: unsupported-feature for what is not JSON.
    """
    if isinstance(node, DictNode) and all(isinstance(key, str) for key in node.keys):
        return {str(key): value_of(part, name) for key, part in node.items}
    if isinstance(node, ListNode):
        return [value_of(part, name) for part in node.items]
    if node is None or isinstance(node, (bool, int, float, str)):
        return node
    raise FormatError.of(
        "unsupported-feature",
        f"a {type(node).__name__} is not JSON [{name}]",
        "Leave it out; this is a fault of ckptconv, please report it.",
        loc=(name,),
    )
