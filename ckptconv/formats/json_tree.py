"""JSON values as trees, and trees as JSON texts that are byte for byte what was read, where Python wrote it.

A style is the options of `json.dumps` as one text, `2 ascii newline`: indent, charset, end. It is told by the
text's first line break, its bytes and its end; a text that Python did not write keeps its values and gets the
style that comes nearest. `NaN` and `Infinity`, which Python writes, are read too.
"""

from __future__ import annotations

import json
import re

from ckptconv.errors import FormatError
from ckptconv.rawtree import DictNode, ListNode, Node
from ckptconv.strictjson import Json, parse

_STYLE = re.compile(r"(\d|none) (ascii|unicode) (newline|bare)")
_DEFAULT = "2 ascii newline"


def read_text(data: bytes, name: str) -> tuple[Node, str]:
    """The tree of a JSON text and its style.

    Raises: corrupt-file, duplicate-key, limit-exceeded.
    """
    return node_of(parse(data, name, constants=True)), _style_of(data)


def _style_of(data: bytes) -> str:
    first = re.match(rb"[\[{]\n( {1,9})\S", data)
    indent = str(len(first[1])) if first is not None else "none"
    end = "newline" if data.endswith(b"\n") else "bare"
    return f"{indent} {'ascii' if data.isascii() else 'unicode'} {end}"


def text_of(node: Node, style: object, name: str) -> bytes:
    """The JSON text of a tree.

    Raises: unsupported-feature for what is not JSON.
    """
    told = _STYLE.fullmatch(style if isinstance(style, str) else "") or _STYLE.fullmatch(_DEFAULT)
    assert told is not None
    indent = None if told[1] == "none" else int(told[1])
    text = json.dumps(value_of(node, name), indent=indent, ensure_ascii=told[2] == "ascii")
    return (text + ("\n" if told[3] == "newline" else "")).encode("utf-8", "surrogatepass")


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
