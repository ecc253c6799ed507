"""What the parts of a DeepSpeed folder are gathered with: what was found so far, and how a place is read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from ckptconv.dialects.deepspeed_layout import Cut
from ckptconv.dialects.deepspeed_places import place
from ckptconv.dialects.torch_values import dotted, number_of, tensor_of
from ckptconv.errors import CkptError, Code, FormatError
from ckptconv.rawtree import DictNode, Node, Path, walk
from ckptconv.tensor import TensorRef

Shape = tuple[int, ...]
Shapes = Mapping[str, Shape]
Pairs = list[tuple[Node, Node]]
Located = tuple[Path, DictNode]
"""A dictionary and where it stands."""

_HINT = "The files are damaged or of different saves: copy the folder again."


@dataclass(slots=True)
class Found:
    """An optimizer, and what stands in the places of its parts."""

    moved: dict[Path, Node] = field(default_factory=dict)
    weights: dict[str, TensorRef] = field(default_factory=dict)
    """The float32 weights."""
    entries: dict[str, Pairs] = field(default_factory=dict)
    """Parameter -> its state, in the order of the vectors."""
    groups: list[tuple[Pairs, list[str]]] = field(default_factory=list)
    """Settings and parameters of each group."""
    cuts: list[Cut] = field(default_factory=list)
    ready: DictNode | None = None
    """The optimizer, where it is a `state_dict()` already."""

    @property
    def is_optimizer(self) -> bool:
        """Whether there is one."""
        return bool(self.entries) or self.ready is not None

    def once(self, nodes: Sequence[tuple[Path, Node]], to: Path) -> Node:
        """A value that stands in several places, and must be the same in all.

        Raises: progress-conflict.
        """
        for where, other in nodes[1:]:
            if not same(nodes[0][1], other):
                raise conflict(nodes[0], (where, other))
        self.moved.update({path: place("at", *to) for path, _ in nodes})
        return nodes[0][1]


def same(one: Node, other: Node) -> bool:
    """Whether two trees hold the same; tensors of more than one element never do."""
    ours, theirs = list(walk(one)), list(walk(other))
    return len(ours) == len(theirs) and all(map(_same_leaf, ours, theirs))


def _same_leaf(one: tuple[Path, Node], other: tuple[Path, Node]) -> bool:
    if isinstance(one[1], TensorRef) or isinstance(other[1], TensorRef):
        mine, theirs = number_of(one[1]), number_of(other[1])
        return one[0] == other[0] and mine is not None and repr(mine) == repr(theirs)
    return one[0] == other[0] and repr(one[1]) == repr(other[1])


def tensor_at(node: Node, path: Path) -> tuple[TensorRef, Path]:
    """The tensor of a leaf and where it stands itself.

    Raises: corrupt-file.
    """
    found = tensor_of(node)
    if found is None:
        raise damaged("corrupt-file", path, "no tensor is there")
    return found[0], (*path, *found[1])


def damaged(code: Code, where: Path, message: str) -> CkptError:
    """A file that is not what the others say it is."""
    return FormatError.of(code, f"'{dotted(where)}': {message}", _HINT, loc=where)


def conflict(one: tuple[Path, Node], other: tuple[Path, Node]) -> CkptError:
    """Two places that must hold the same, and do not."""
    return FormatError.of(
        "progress-conflict",
        f"'{dotted(one[0])}' is {_shown(one[1])}, '{dotted(other[0])}' is {_shown(other[1])}",
        "The files are of different moments: copy those of one save.",
        loc=other[0],
    )


def _shown(node: Node) -> str:
    number = number_of(node)
    return f"{number[0]}" if number is not None else f"{node!r:.80}"
