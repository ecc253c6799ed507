"""Parameters that are no plain arrays: quantized, sparse, nested, without data, or of a class of their own.

A state_dict has them beside its arrays. They are described: what they are is a call that nobody makes, their
parts (indices, values, scales) are extra arrays. They go back into their own kind as they were; no other file
can hold them, so to leave them behind is a loss.
Source: torch 2.13 `torch/_tensor.py` (`_reduce_ex_internal`), `torch/_utils.py`; the packed weights of
quantized modules: `torch/ao/nn/quantized/modules/linear.py`.
"""

from __future__ import annotations

from collections.abc import Iterable

from ckptconv.dialects.residue import Lifter
from ckptconv.dialects.torch_values import layout_of
from ckptconv.document import Block
from ckptconv.rawtree import ListNode, Node, Opaque, Path, walk
from ckptconv.tensor import TensorRef

_CALLS = {
    "torch._utils._rebuild_sparse_tensor": "sparse tensor",
    "torch._utils._rebuild_nested_tensor": "nested tensor",
    "torch._utils._rebuild_meta_tensor_no_storage": "tensor without data (meta)",
    "torch._utils._rebuild_wrapper_subclass": "tensor of a class of its own",
}


def kind_of(node: Node) -> str | None:
    """What such a parameter is, in a few words; None for anything else."""
    if not isinstance(node, Opaque):
        return None
    if node.kind == "call":
        return _CALLS.get(node.name)
    if node.kind == "torch.quantized":
        return "quantized tensor"
    if node.kind == "torch.subclass":
        return f"tensor of class {node.name}"
    return kind_of(node.args[0]) if node.kind in ("torch.parameter", "torch.tensor") and node.args else None


def packed_kind(node: Node) -> str | None:
    """As `kind_of`, for the tuples that hold a quantized module's weight and bias as well."""
    if isinstance(node, ListNode) and node.kind == "tuple":
        return next((f"packed {kind}" for kind in map(kind_of, node.items) if kind is not None), None)
    return kind_of(node)


def describe(
    entries: Iterable[tuple[str, Path, Node]], lifter: Lifter
) -> tuple[tuple[Block, ...], dict[str, TensorRef]]:
    """A block for each (name, path, node), and the parts of all by their names in it."""
    blocks: list[Block] = []
    parts: dict[str, TensorRef] = {}
    for name, path, node in entries:
        own = {
            "/".join(map(str, (name, *inside))): (inside, leaf)
            for inside, leaf in walk(node)
            if isinstance(leaf, TensorRef)
        }
        for key, (inside, leaf) in own.items():
            parts[key] = leaf
            lifter.take((*path, *inside), ("extra", key), **layout_of(leaf))
        blocks.append(Block(name=name, library=packed_kind(node) or "", tensors=tuple(own)))
    return tuple(blocks), parts
