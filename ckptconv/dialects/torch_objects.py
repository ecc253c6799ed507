"""What a pickle says beside its values: keys that stand twice, and the names of code that it would call."""

from __future__ import annotations

from collections import Counter

from ckptconv.errors import FormatError, Problem
from ckptconv.formats.torch_names import HARMLESS, WEIGHTS_ONLY
from ckptconv.rawtree import DictNode, Node, Opaque, Path, containers, transform

_SHOWN = 20


def refuse_repeated_keys(root: Node) -> None:
    """Python keeps the last value of a repeated key, a path finds the first: nobody means such a file.

    Raises: duplicate-key with every key that stands twice.
    """
    if not any(isinstance(node, DictNode) and _repeated(node) for node in containers(root)):
        return
    problems: list[Problem] = []

    def look(path: Path, node: Node) -> Node:
        if isinstance(node, DictNode):
            for key in _repeated(node):
                problems.append(_problem((*path, key if isinstance(key, (str, int)) else repr(key))))
        return node

    transform(root, look)
    raise FormatError(*problems[:_SHOWN])


def _repeated(node: DictNode) -> list[Node]:
    """The keys that stand more than once in a dictionary."""
    plain = [key for key, _ in node.items if isinstance(key, (str, int, float, bytes))]
    if len(set(plain)) == len(plain):
        return []
    return [key for key, times in Counter(plain).items() if times > 1]


def _problem(path: Path) -> Problem:
    return Problem(
        code="duplicate-key",
        loc=path,
        message=f"'{'.'.join(map(str, path))}' stands twice in the file",
        hint="Save the checkpoint again: no dictionary has a key twice. See the file with inspect --raw.",
    )


NAMES_CODE = "The pickle names"
"""How the sentence begins that `named_code` says."""


def named_code(root: Node) -> tuple[str, ...]:
    """A sentence about the globals in a pickle that `torch.load(weights_only=True)` refuses, if any."""
    names = {node.name if isinstance(node, Opaque) else node.kind for node in containers(root)}
    foreign = sorted(name for name in names - WEIGHTS_ONLY - HARMLESS if "." in name)
    if not foreign:
        return ()
    more = f" and {len(foreign) - _SHOWN} more" if len(foreign) > _SHOWN else ""
    return (
        f"{NAMES_CODE} {', '.join(foreign[:_SHOWN])}{more}, which Python's unpickler would call. "
        "Here it is data, and nothing runs.",
    )
