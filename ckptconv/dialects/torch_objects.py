"""What a pickle says beside its values: keys that stand twice, and the names of code that it would call."""

from __future__ import annotations

from ckptconv.errors import FormatError, Problem
from ckptconv.formats.torch_names import HARMLESS, WEIGHTS_ONLY
from ckptconv.rawtree import DictNode, ListNode, Node, Opaque, Path, transform

_BUILT_IN = frozenset({"dict", "list", "tuple", "set", "frozenset"})
_SHOWN = 20


def refuse_repeated_keys(root: Node) -> None:
    """Python keeps the last value of a repeated key, a path finds the first: nobody means such a file.

    Raises: duplicate-key with every key that stands twice.
    """
    problems: list[Problem] = []

    def look(path: Path, node: Node) -> Node:
        if isinstance(node, DictNode):
            seen: set[object] = set()
            for key, _ in node.items:
                if not isinstance(key, (str, int, float, bytes)):
                    continue
                if key in seen:
                    problems.append(_repeated((*path, key if isinstance(key, (str, int)) else repr(key))))
                seen.add(key)
        return node

    transform(root, look)
    if problems:
        raise FormatError(*problems[:_SHOWN])


def _repeated(path: Path) -> Problem:
    return Problem(
        code="duplicate-key",
        loc=path,
        message=f"'{'.'.join(map(str, path))}' stands twice in the file",
        hint="Save the checkpoint again: no dictionary has a key twice. See the file with inspect --raw.",
    )


def named_code(root: Node) -> tuple[str, ...]:
    """A sentence about the globals in a pickle that `torch.load(weights_only=True)` refuses, if any."""
    names: set[str] = set()

    def look(path: Path, node: Node) -> Node:
        if isinstance(node, Opaque) and "." in node.name:
            names.add(node.name)
        elif isinstance(node, (DictNode, ListNode)) and node.kind not in _BUILT_IN:
            names.add(node.kind)
        return node

    transform(root, look)
    foreign = sorted(names - WEIGHTS_ONLY - HARMLESS)
    if not foreign:
        return ()
    more = f" and {len(foreign) - _SHOWN} more" if len(foreign) > _SHOWN else ""
    return (
        f"The pickle names {', '.join(foreign[:_SHOWN])}{more}, which Python's unpickler would call. "
        "Here it is data, and nothing runs.",
    )
