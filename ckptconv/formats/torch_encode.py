"""From a tree's tensors and containers to the calls of a PyTorch pickle, and the storages that these need.

The inverse of `torch_decode`. Tensors on one extent share one storage, the whole extent, under their own
offsets and strides; every other tensor gets a dense storage of its own. A storage has a typed class where
all its tensors have that dtype, else it is untyped and each tensor names its dtype (`_rebuild_tensor_v3`).

Source: torch 2.13 `torch/_tensor.py` (`_reduce_ex_internal`), `torch/serialization.py` (`_save`).
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from dataclasses import dataclass, field

from ckptconv import dtypes
from ckptconv.dtypes import DType
from ckptconv.errors import FormatError, Problem
from ckptconv.formats import torch_names
from ckptconv.formats.numpy_pickle import encode_numpy
from ckptconv.formats.torch_layout import in_memory_order
from ckptconv.formats.torch_names import ResolveBits
from ckptconv.rawtree import DictNode, ListNode, Node, Opaque, Path, children
from ckptconv.tensor import (
    DerivedTensor,
    Extent,
    MissingTensor,
    StoredTensor,
    TensorRef,
    TensorSpec,
    dense_strides,
)

_UINT8 = dtypes.BY_NAME["uint8"]


@dataclass(slots=True, kw_only=True)
class Storage:
    """One storage of the target."""

    key: str
    class_: str
    """Global of its storage class."""
    numel: int
    """In elements of the class, bytes where it is untyped."""
    tensor: TensorRef
    """What its bytes are."""


@dataclass(slots=True)
class _Use:
    """Who uses an extent."""

    dtypes: set[DType] = field(default_factory=set)
    untyped: bool = False


def tensors_of(root: Node) -> Iterator[tuple[Path, Node, TensorRef]]:
    """Every tensor once, with a path to it and the node that it stands in."""
    seen: set[int] = set()
    todo: list[tuple[Path, Node, Node]] = [((), None, root)]
    while todo:
        path, parent, node = todo.pop()
        if isinstance(node, TensorRef):
            yield path, parent, node
        elif isinstance(node, (DictNode, ListNode, Opaque)) and id(node) not in seen:
            seen.add(id(node))
            todo.extend(((*path, step), node, part) for step, part in reversed(list(children(node))))


class Encoder:
    """Encodes the nodes of one tree; `storages` fills as tensors are met."""

    def __init__(self, root: Node) -> None:
        """Raises: unknown-dtype, reference-broken, unsupported-feature; all of them at once."""
        self.storages: list[Storage] = []
        self._by_id: dict[Hashable, Storage] = {}
        self._kept: list[TensorRef] = []
        self._uses: dict[Hashable, _Use] = {}
        problems = [p for path, parent, tensor in tensors_of(root) for p in self._enter(path, parent, tensor)]
        if problems:
            raise FormatError(*problems)

    def _enter(self, path: Path, parent: Node, tensor: TensorRef) -> Iterator[Problem]:
        """Note who uses which extent, and what cannot be written."""
        where = ".".join(map(str, path))
        kind = parent.kind if isinstance(parent, Opaque) else ""
        if isinstance(tensor, MissingTensor):
            yield Problem(
                code="reference-broken",
                loc=path,
                message=f"'{where}' has no values: the document is a skeleton",
                hint="Use the checkpoint itself as the source.",
            )
        quantized = tensor.dtype.kind == "quantized" and kind not in ("torch.quantized", "torch.storage")
        if kind.startswith("numpy."):
            return
        if tensor.dtype.torch is None or quantized:
            yield Problem(
                code="unknown-dtype",
                loc=path,
                message=f"'{where}' is {tensor.dtype.name}, which a plain PyTorch tensor cannot be",
                hint="Pass --dtype, or leave it out of the target with --exclude.",
            )
        stored = _stored(tensor)
        if stored is None:
            return
        use = self._uses.setdefault(stored.extent.id, _Use())
        if kind == "torch.storage" and isinstance(parent, Opaque) and parent.name.endswith("UntypedStorage"):
            use.untyped = True
            return
        use.dtypes.add(stored.dtype)
        if stored.extent.big_endian and len({row.swap for row in use.dtypes}) > 1:
            yield Problem(
                code="unsupported-feature",
                loc=path,
                message=f"'{where}' shares big-endian bytes with tensors of another element size",
                hint="Save the file again on a little-endian machine.",
            )

    def encode(self, node: Node) -> Node:
        """The node as calls, globals, lists and dicts; itself where it has no encoding."""
        if isinstance(node, TensorRef):
            return self._tensor(node, False, None, None)
        if isinstance(node, bytes):
            return _call("_codecs.encode", node.decode("latin1"), "latin1")
        if isinstance(node, complex):
            return _call("builtins.complex", node.real, node.imag)
        if isinstance(node, DictNode):
            return self._mapping(node)
        if isinstance(node, ListNode):
            return self._sequence(node)
        if isinstance(node, Opaque):
            return self._opaque(node)
        return node

    def _mapping(self, node: DictNode) -> Node:
        if node.kind == "dict":
            return node
        if node.kind == "collections.Counter":
            return Opaque(kind="call", name=node.kind, args=(DictNode(items=node.items),), state=node.state)
        return Opaque(kind="call", name=node.kind, args=node.args, pairs=node.items, state=node.state)

    def _sequence(self, node: ListNode) -> Node:
        if node.kind in ("set", "frozenset"):
            return _call(f"builtins.{node.kind}", ListNode(items=node.items))
        if node.kind == "torch.Size":
            return _call(node.kind, _tuple(*node.items))
        return Opaque(kind="object", name=node.kind, args=node.items)

    def _opaque(self, node: Opaque) -> Node:
        match node:
            case Opaque(kind="torch.tensor", args=(TensorRef() as tensor,), state=DictNode() as state):
                return self._tensor(
                    tensor,
                    state.get("requires_grad") is True,
                    state.get("backward_hooks"),
                    state.get("metadata"),
                )
            case Opaque(kind="torch.parameter", args=(tensor, bool(requires_grad))):
                args = (tensor, requires_grad, _no_hooks())
                if node.state is None:
                    return _call(torch_names.PARAMETER, *args)
                return _call(torch_names.PARAMETER_STATE, *args, node.state)
            case Opaque(kind="torch.storage", args=(TensorRef() as tensor,)):
                return self._persistent(self._storage(tensor))
            case Opaque(kind="torch.quantized", args=(TensorRef() as tensor, *rest)):
                offset, strides = _place(tensor)
                base = self._persistent(self._storage(tensor))
                return _call(
                    torch_names.QUANTIZED, base, offset, _tuple(*tensor.shape), _tuple(*strides), *rest
                )
            case Opaque(kind="torch.subclass", args=(inner,)):
                call = inner if isinstance(inner, Opaque) and inner.kind == "call" else self.encode(inner)
                if isinstance(call, Opaque) and call.kind == "call":
                    function = Opaque(kind="global", name=call.name)
                    class_ = Opaque(kind="global", name=node.name)
                    return _call(torch_names.FROM_TYPE, function, class_, _tuple(*call.args), node.state)
            case Opaque(kind="numpy.ndarray" | "numpy.scalar", args=(TensorRef() as tensor,)):
                return encode_numpy(node, tensor)
        return node

    def _tensor(self, tensor: TensorRef, requires_grad: bool, hooks: Node, metadata: Node) -> Opaque:
        storage = self._storage(tensor)
        offset, strides = _place(tensor)
        args: list[Node] = [self._persistent(storage), offset, _tuple(*tensor.shape), _tuple(*strides)]
        args += [requires_grad, _no_hooks() if hooks is None else hooks]
        if storage.class_ == torch_names.UNTYPED_STORAGE:
            name = torch_names.TENSOR_V3
            args.append(Opaque(kind="global", name=f"torch.{tensor.dtype.torch}"))
        else:
            name = torch_names.TENSOR_V2
        flags: list[tuple[Node, Node]] = list(metadata.items) if isinstance(metadata, DictNode) else []
        if isinstance(tensor, DerivedTensor) and isinstance(tensor.op, ResolveBits):
            flags += [(flag, True) for flag in ("conj", "neg") if getattr(tensor.op, flag)]
        if flags:
            args.append(DictNode(items=tuple(flags)))
        return _call(name, *args)

    def _persistent(self, storage: Storage) -> Opaque:
        class_ = Opaque(kind="global", name=storage.class_)
        return Opaque(kind="persistent", args=(_tuple("storage", class_, storage.key, "cpu", storage.numel),))

    def _storage(self, tensor: TensorRef) -> Storage:
        """The storage below a tensor, made when it is first met."""
        stored = _stored(tensor)
        identity: Hashable = id(tensor) if stored is None else stored.extent.id
        if identity not in self._by_id:
            key = str(len(self.storages))
            storage = self._own(key, tensor) if stored is None else self._shared(key, stored.extent)
            self._kept.append(tensor)
            self.storages.append(storage)
            self._by_id[identity] = storage
        return self._by_id[identity]

    def _own(self, key: str, tensor: TensorRef) -> Storage:
        class_, item = _class_of(tensor.dtype, tensor.spec.nbytes)
        placed = in_memory_order(tensor)
        content = tensor if placed is None else placed[0]
        return Storage(key=key, class_=class_, numel=tensor.spec.nbytes // item, tensor=content)

    def _shared(self, key: str, extent: Extent) -> Storage:
        use = self._uses[extent.id]
        one = next(iter(use.dtypes)) if len(use.dtypes) == 1 else _UINT8
        class_, item = _class_of(one, extent.nbytes)
        if use.untyped or len(use.dtypes) != 1:
            class_, item = torch_names.UNTYPED_STORAGE, 1
        # Bytes that are to be swapped are placed as elements, whatever the class.
        row = next(iter(use.dtypes), _UINT8) if extent.big_endian else one if item > 1 else _UINT8
        if extent.nbytes % row.itemsize:
            row = _UINT8
        spec = TensorSpec(dtype=row, shape=(extent.nbytes // row.itemsize,))
        return Storage(
            key=key, class_=class_, numel=extent.nbytes // item, tensor=StoredTensor.dense(spec, extent)
        )


def _stored(tensor: TensorRef) -> StoredTensor | None:
    """The view of stored bytes that a tensor is, flags aside; None where its bytes are made."""
    if isinstance(tensor, DerivedTensor) and isinstance(tensor.op, ResolveBits):
        tensor = tensor.parts[0]
    return tensor if isinstance(tensor, StoredTensor) else None


def _place(tensor: TensorRef) -> tuple[int, tuple[int, ...]]:
    stored, placed = _stored(tensor), in_memory_order(tensor)
    if stored is not None:
        return stored.offset, stored.strides
    return 0, dense_strides(tensor.shape) if placed is None else placed[1]


def _class_of(row: DType, nbytes: int) -> tuple[str, int]:
    """Storage class and bytes per element of a storage that holds one dtype."""
    if row.torch_storage is None or nbytes % row.itemsize:
        return torch_names.UNTYPED_STORAGE, 1
    return f"torch.{row.torch_storage}", row.itemsize


def _call(name: str, *args: Node) -> Opaque:
    return Opaque(kind="call", name=name, args=args)


def _tuple(*items: Node) -> ListNode:
    return ListNode(items=items, kind="tuple")


def _no_hooks() -> Opaque:
    return _call("collections.OrderedDict")
