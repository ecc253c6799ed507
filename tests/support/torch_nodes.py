"""Live PyTorch objects as the nodes that the torch format yields, for tests of dialects without files."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import numpy as np
import torch

from ckptconv.dtypes import BY_TORCH
from ckptconv.rawtree import DictNode, ListNode, Node, Opaque, RawTree
from ckptconv.tensor import BufferSource, Extent, StoredTensor, TensorRef, TensorSpec


class _Storages:
    """One extent per storage, so that shared memory stays shared."""

    def __init__(self) -> None:
        self._extents: dict[int, Extent] = {}
        self._kept: list[Any] = []

    def extent(self, tensor: torch.Tensor) -> Extent:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._extents:
            self._kept.append(storage)
            flat = torch.empty(0, dtype=torch.uint8).set_(storage)
            data = np.array(flat.numpy())
            self._extents[key] = Extent(source=BufferSource(memoryview(data)), offset=0, nbytes=data.nbytes)
        return self._extents[key]


def tree(value: Any) -> RawTree:
    """What `ckptconv.formats.pytorch` yields for a file of this object."""
    return RawTree(format="pytorch", root=_node(value, _Storages()), location="run.pt")


def _node(value: Any, storages: _Storages) -> Node:
    if isinstance(value, torch.nn.Parameter):
        return Opaque(
            kind="torch.parameter",
            name="torch._utils._rebuild_parameter",
            args=(_tensor(value, storages), value.requires_grad),
        )
    if isinstance(value, torch.Tensor):
        return _tensor(value, storages)
    if isinstance(value, dict):
        items = tuple((k, _node(v, storages)) for k, v in value.items())
        if isinstance(value, OrderedDict):
            metadata = getattr(value, "_metadata", None)
            state = None if metadata is None else DictNode(items=(("_metadata", _node(metadata, storages)),))
            return DictNode(items=items, kind="collections.OrderedDict", state=state)
        return DictNode(items=items)
    if isinstance(value, (list, tuple)):
        return ListNode(items=tuple(_node(v, storages) for v in value), kind=type(value).__name__)
    return value


def _tensor(value: torch.Tensor, storages: _Storages) -> StoredTensor:
    return StoredTensor(
        spec=TensorSpec(dtype=BY_TORCH[str(value.dtype).removeprefix("torch.")], shape=tuple(value.shape)),
        extent=storages.extent(value.detach()),
        offset=value.storage_offset(),
        strides=tuple(value.stride()),
    )


def comparable(node: Node) -> object:
    """A node as plain values: tensors by their bytes and by which of them share memory."""
    storages: dict[object, int] = {}

    def plain(part: Node) -> object:
        if isinstance(part, TensorRef):
            storage = storages.setdefault(part.storage_id, len(storages))
            return "tensor", part.dtype.name, part.shape, part.read().tobytes(), storage
        if isinstance(part, DictNode):
            items = [(k, plain(v)) for k, v in part.items]
            return part.kind, items, plain(part.state), [plain(a) for a in part.args]
        if isinstance(part, ListNode):
            return part.kind, [plain(item) for item in part.items]
        if isinstance(part, Opaque):
            return part.kind, part.name, [plain(a) for a in part.args], plain(part.state)
        return type(part).__name__, part

    return plain(node)
