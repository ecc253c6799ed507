"""Leaves of a PyTorch pickle as dialects meet them: tensors in their wrappings, and numbers in theirs."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping
from types import MappingProxyType

from ckptconv.dialects.residue import Lifter
from ckptconv.document import Checkpoint
from ckptconv.formats.torch_layout import laid, strides_of
from ckptconv.rawtree import (
    CONTAINERS,
    Container,
    DictNode,
    Lifted,
    ListNode,
    Node,
    Opaque,
    Path,
    transform,
    walk,
)
from ckptconv.tensor import MissingTensor, StoredTensor, TensorRef

Encoding = dict[str, str | int | float | bool | tuple[int, ...] | None]
Number = bool | int | float
_NONE: Mapping[str, TensorRef] = MappingProxyType({})

_WITH_ATTRIBUTES = "torch.subclass", "torch.Tensor"
"""A plain tensor on which a program set attributes of its own."""


def dotted(path: Path) -> str:
    """A path as a key that people recognise: `optimizer.state.0.step`."""
    return ".".join(str(step) for step in path)


def tensor_of(node: Node) -> tuple[TensorRef, Path, bool | None] | None:
    """The tensor of a leaf, the path from the leaf to it, and whether it is trained, where the leaf says so.

    A plain tensor of a state_dict tells nothing: `state_dict()` detaches parameters and buffers alike.
    """
    if isinstance(node, TensorRef):
        return node, (), None
    if isinstance(node, Opaque) and (node.kind, node.name) == _WITH_ATTRIBUTES and node.args:
        inner = tensor_of(node.args[0])
        return None if inner is None else (inner[0], ("@args0", *inner[1]), inner[2])
    if isinstance(node, Opaque) and node.args and isinstance(node.args[0], TensorRef):
        if node.kind == "torch.parameter":
            flag = node.args[1] if len(node.args) > 1 else None
            return node.args[0], ("@args0",), flag if isinstance(flag, bool) else None
        if node.kind == "torch.tensor":
            flag = node.state.get("requires_grad") if isinstance(node.state, DictNode) else None
            return node.args[0], ("@args0",), flag if isinstance(flag, bool) else None
        if node.kind == "torch.subclass" and node.name == "torch.Tensor":  # attributes were set on it
            return node.args[0], ("@args0",), None
    return None


def unwrapped(node: Node) -> tuple[Node, Path]:
    """A number's leaf and the path from the node to it: a numpy scalar holds its bytes as a tensor."""
    if isinstance(node, Opaque) and node.kind == "numpy.scalar" and node.args:
        return node.args[0], ("@args0",)
    return node, ()


def number_of(node: Node) -> tuple[Number, Encoding] | None:
    """A number that stands as itself or as a tensor of one element, and how it is written there.

    I/O: reads a tensor of at most 16 bytes.
    """
    if isinstance(node, (bool, int, float)):
        return node, {}
    if isinstance(node, TensorRef) and not isinstance(node, MissingTensor):
        spec = node.spec
        if spec.numel != 1 or spec.dtype.kind not in ("float", "int", "uint", "bool"):
            return None
        value = node.read().reshape(-1)[0].item()
        how: Encoding = {"as": "tensor", "dtype": spec.dtype.name}
        if spec.shape:
            how["shape"] = spec.shape
        return (value, how) if isinstance(value, (bool, int, float)) else None
    return None


def count_of(node: Node) -> tuple[int, Encoding] | None:
    """A whole number, as `number_of` finds it; a float of integral value is one."""
    found = number_of(node)
    if found is None or isinstance(found[0], bool):
        return None
    value, how = found
    if isinstance(value, float):
        if not value.is_integer():
            return None
        return int(value), how or {"as": "float"}
    return value, how


def view_id(tensor: TensorRef) -> Hashable | None:
    """Equal for two names of the same memory in the same view; None where nothing is shared."""
    if not isinstance(tensor, StoredTensor):
        return id(tensor)
    if tensor.spec.numel == 0:
        return None
    return tensor.storage_id, tensor.offset, tensor.strides, tensor.shape, tensor.dtype.name


def keyed(node: Node, path: Path = (), depth: int = 2) -> Iterator[tuple[Path, Container]]:
    """The containers in nested dictionaries and lists down to `depth` levels, with their paths."""
    if depth == 0 or not isinstance(node, (DictNode, ListNode)):
        return
    for step, value in node.items if isinstance(node, DictNode) else enumerate(node.items):
        if isinstance(value, CONTAINERS) and (type(step) is str or type(step) is int):
            yield (*path, step), value
            yield from keyed(value, (*path, step), depth - 1)


def lift_rest(root: Node, lifter: Lifter, own: Mapping[str, TensorRef] = _NONE) -> dict[str, TensorRef]:
    """The extras of the document: what has its name already, and every tensor that no one else has lifted."""
    extras = dict(own)
    for path, leaf in walk(root):
        if not isinstance(leaf, TensorRef) or lifter.has(path):
            continue
        key = name = "/".join(str(step) for step in path)
        repeat = 1
        while name in extras:
            repeat += 1
            name = f"{key}~{repeat}"
        extras[name] = leaf
        lifter.take(path, ("extra", name), **layout_of(leaf))
    return extras


def layout_of(tensor: TensorRef) -> Encoding:
    """What a place remembers of a tensor beside its values: strides that are not those of C order."""
    strides = strides_of(tensor)
    return {} if strides is None else {"strides": strides}


def with_layouts(filled: Node, root: Node) -> Node:
    """The filled residue with every tensor laid out as the one was that stood there; tied ones stay tied."""
    wanted = {path: lifted.encoding.get("strides") for path, lifted in places(root)}
    made: dict[Hashable, TensorRef] = {}

    def lay(path: Path, node: Node) -> Node:
        if not isinstance(node, TensorRef) or path not in wanted:
            return node
        strides = wanted[path]
        key = (view_id(node) or id(node), strides)
        if key not in made:
            made[key] = laid(node, strides if isinstance(strides, tuple) else None)
        return made[key]

    return transform(filled, lay)


def places(root: Node) -> Iterator[tuple[Path, Lifted]]:
    """Every address of a residue with the path where it stands."""
    for path, leaf in walk(root):
        if isinstance(leaf, Lifted):
            yield path, leaf


def own_residue(checkpoint: Checkpoint, dialect: str) -> Node | None:
    """The root of the residue, where it is one of this PyTorch dialect."""
    residue = checkpoint.residue
    if residue is None or (residue.format, residue.dialect) != ("pytorch", dialect):
        return None
    return residue.root
