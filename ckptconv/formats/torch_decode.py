"""From a pickle's inert calls to tensors: what `torch.load` would have built, as nodes.

`Decoder.decode` is asked by the pickle reader for each `Opaque`; what it does not know stays as it is.
The kinds that it makes are listed in `ckptconv.formats.pytorch`. Storages are checked against their
records, tensors against their storages; nothing is read.

Source: torch 2.13 `torch/serialization.py` (`_load`), `torch/_utils.py`, `torch/_tensor.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache, partial
from typing import NamedTuple

from ckptconv import dtypes
from ckptconv.dtypes import BY_TORCH, BY_TORCH_STORAGE, DType
from ckptconv.formats import numpy_pickle, torch_names
from ckptconv.formats.numpy_pickle import NumpyDecoder
from ckptconv.formats.pickle_checks import INT64, Checks, short
from ckptconv.formats.pickle_machine import AtOnce
from ckptconv.formats.torch_names import ResolveBits
from ckptconv.rawtree import DictNode, ListNode, Node, Opaque, dict_of
from ckptconv.tensor import (
    DerivedTensor,
    Extent,
    StoredTensor,
    TensorRef,
    TensorSpec,
)

_EXPANDED_FLOOR = 256 << 20
_EXPANDED_RATIO = 64
"""A tensor that repeats its storage (stride 0, overlaps) may span this many times the file, or the floor."""

FindStorage = Callable[[str], Extent | None]
"""The extent of a storage's record, by its key."""


_REBUILT: Mapping[str, int] = {
    "torch._utils._rebuild_tensor": 4,
    torch_names.TENSOR_V2: 6,
    torch_names.TENSOR_V3: 7,
}
"""What makes a tensor -> its arguments without the flags."""


@lru_cache(maxsize=256)
def dtype_of_storage(class_: str) -> DType | None:
    """The dtype of a storage class by its global; bytes for an untyped one, None for one that is no class."""
    module, _, name = class_.rpartition(".")
    if module.partition(".")[0] != "torch":
        return None
    return dtypes.BY_NAME["uint8"] if name == "UntypedStorage" else BY_TORCH_STORAGE.get(name)


class Storage(NamedTuple):
    """A storage that tensors stand on."""

    class_: str
    dtype: DType
    numel: int
    extent: Extent

    @property
    def flat(self) -> StoredTensor:
        """The whole of it as a 1-D tensor."""
        return StoredTensor.dense(TensorSpec(dtype=self.dtype, shape=(self.numel,)), self.extent)


class Decoder:
    """Decodes the calls of one file."""

    def __init__(
        self, find_storage: FindStorage, *, name: str, file_nbytes: int, member: str = "data.pkl"
    ) -> None:
        self._find_storage = find_storage
        self.checks = Checks(name, member)
        numpy = NumpyDecoder(self.checks)
        self._file_nbytes = file_nbytes
        self.storages: dict[str, Storage] = {}
        """Those that are in use, by key."""
        self.locations: dict[str, None] = {}
        """Devices that the storages were saved from, in order of appearance."""
        rebuilt = {name: partial(self._tensor, name, count) for name, count in _REBUILT.items()}
        self.at_once = AtOnce(persistent=self.persistent, calls=rebuilt)
        """For a file whose storages are known before its pickle is read."""
        self._calls: Mapping[str, Callable[[Opaque], Node]] = {
            **{name: partial(_called_with_args, make) for name, make in rebuilt.items()},
            torch_names.PARAMETER: self._parameter,
            torch_names.PARAMETER_STATE: self._parameter,
            torch_names.QUANTIZED: self._quantized,
            torch_names.FROM_TYPE: self._subclass,
            "torch.Size": self._sequence,
            "builtins.set": self._sequence,
            "builtins.frozenset": self._sequence,
            "builtins.complex": _complex,
            "builtins.bytes": _bytes,
            "_codecs.encode": _encoded,
            numpy_pickle.SCALAR: numpy.scalar,
            "numpy.core.multiarray.scalar": numpy.scalar,
            "numpy._core.numeric._frombuffer": numpy.buffer,
            "numpy.core.numeric._frombuffer": numpy.buffer,
        }
        self._built: Mapping[str, Callable[[Opaque], Node]] = {
            "collections.OrderedDict": _mapping,
            "collections.Counter": _mapping,
            "collections.defaultdict": _mapping,
            numpy_pickle.RECONSTRUCT: numpy.array,
            "numpy.core.multiarray._reconstruct": numpy.array,
        }

    def decode(self, node: Opaque) -> Node:
        """What stands in the tree for an inert call.

        Raises: malformed-pickle, corrupt-file, truncated-tensor, unknown-dtype, limit-exceeded.
        """
        if node.kind == "persistent":
            return self.persistent(node.args[0])
        if node.kind != "call":
            return node
        if node.name in self._built:
            return self._built[node.name](node)
        if node.name in self._calls and node.state is None and not node.items and not node.pairs:
            return self._calls[node.name](node)
        return node

    def persistent(self, identifier: Node) -> Node:
        """What a persistent id stands for: a storage."""
        parts = identifier.items if isinstance(identifier, ListNode) and identifier.kind == "tuple" else ()
        if len(parts) != 5 or parts[0] != "storage":
            raise self.checks.error(
                "malformed-pickle",
                f"a persistent id should be a tuple ('storage', ...) of 5, it is {short(identifier)}",
            )
        return self.storage(*parts[1:])

    def storage(self, class_: Node, key: Node, location: Node, numel: Node) -> Opaque:
        """The storage under a key."""
        if not isinstance(class_, Opaque) or class_.kind != "global" or not isinstance(key, str):
            raise self.checks.error(
                "malformed-pickle", f"a storage of class {short(class_)} under key {short(key)}"
            )
        count = self.checks.count(numel, f"the length of storage '{key}'")
        self.locations.setdefault(str(location))
        flat = self.claim(class_.name, key, count).flat
        return Opaque(kind="torch.storage", name=class_.name, args=(flat,))

    def claim(self, class_: str, key: str, numel: int) -> Storage:
        """The storage under a key, checked to be the same one wherever the key stands."""
        known = self.storages.get(key)
        if known is None:
            known = self.storages[key] = self._new(class_, key, numel)
        elif known.class_ != class_ or known.numel != numel:
            raise self.checks.error(
                "corrupt-file",
                f"storage '{key}' is {known.class_} of {known.numel} and {class_} of {numel}",
            )
        return known

    def _new(self, class_: str, key: str, numel: int) -> Storage:
        """A storage, checked against its record."""
        dtype = dtype_of_storage(class_)
        if dtype is None:
            raise self.checks.error("unknown-dtype", f"storage '{key}' is of the unknown class {class_}")
        extent = self._find_storage(key)
        if extent is None:
            raise self.checks.error("corrupt-file", f"storage '{key}' is not in the file")
        needed = numel * dtype.itemsize
        if extent.nbytes < needed:
            raise self.checks.error(
                "truncated-tensor", f"storage '{key}' needs {needed} bytes, its record has {extent.nbytes}"
            )
        return Storage(class_, dtype, numel, extent)

    def base(self, node: Node) -> StoredTensor:
        """The whole of the storage that a node is. Raises: malformed-pickle where it is none."""
        if (
            isinstance(node, Opaque)
            and node.kind == "torch.storage"
            and isinstance(node.args[0], StoredTensor)
        ):
            return node.args[0]
        raise self.checks.error(
            "malformed-pickle", f"a tensor should stand on a storage, it stands on {short(node)}"
        )

    def strided(
        self, base: StoredTensor, offset: Node, size: Node, stride: Node, dtype: DType | None = None
    ) -> StoredTensor:
        """The tensor, checked to lie inside its storage, of which `base` is the whole."""
        row = dtype or base.dtype
        first = self.checks.count(offset, "the offset of a tensor")
        shape, strides = (
            self.checks.counts(size, "the size of a tensor"),
            self.checks.counts(stride, "the stride of a tensor"),
        )
        if len(shape) != len(strides):
            raise self.checks.error("corrupt-file", f"a tensor of size {shape} has the strides {strides}")
        item = max(row.itemsize, 1)
        possible = item * math.prod([n or 1 for n in shape])
        if possible >= INT64 or item * max(strides, default=0) >= INT64:
            raise self.checks.error(
                "limit-exceeded", f"a tensor of size {shape} and strides {strides} spans 2**63 bytes"
            )
        tensor = StoredTensor(
            spec=TensorSpec(dtype=row, shape=shape), extent=base.extent, offset=first, strides=strides
        )
        if 0 in shape:
            return tensor
        span = 1 + sum([(n - 1) * step for n, step in zip(shape, strides, strict=True)])
        if (first + span) * item > base.spec.nbytes:
            raise self.checks.error(
                "corrupt-file",
                f"a tensor of size {shape}, strides {strides}, offset {first} needs {(first + span) * item} "
                f"bytes of a storage of {base.spec.nbytes}",
            )
        if possible > span * item and possible > max(_EXPANDED_FLOOR, _EXPANDED_RATIO * self._file_nbytes):
            raise self.checks.error(
                "limit-exceeded",
                f"a tensor repeats {span * item} bytes to {possible}, in a file of {self._file_nbytes}",
            )
        return tensor

    def _tensor(self, name: str, fixed: int, args: Sequence[Node]) -> Node:
        """(storage, offset, size, stride); v2 adds (requires_grad, hooks), v3 also dtype.

        The flags (`conj`, `neg`) come last, where there are any.
        """
        if not fixed <= len(args) <= fixed + (fixed > 4):
            raise self.checks.error(
                "malformed-pickle", f"{name} with {len(args)} arguments, {fixed} are needed"
            )
        dtype = self._dtype(args[6]) if fixed == 7 else None
        stored = self.strided(self.base(args[0]), args[1], args[2], args[3], dtype)
        tensor: TensorRef = stored
        requires_grad, hooks = args[4:6] if fixed > 4 else (False, None)
        flags = args[fixed] if len(args) > fixed else None
        extra: list[tuple[Node, Node]] = []
        if flags is not None:
            if not isinstance(flags, DictNode):
                raise self.checks.error(
                    "malformed-pickle", f"a tensor's flags should be a dict, they are {short(flags)}"
                )
            op = ResolveBits(conj=flags.get("conj") is True, neg=flags.get("neg") is True)
            extra = [pair for pair in flags.items if pair not in (("conj", True), ("neg", True))]
            if op.conj or op.neg:
                tensor = DerivedTensor(op=op, parts=(stored,), spec=stored.spec)
        state: dict[str, Node] = {"requires_grad": True} if requires_grad is True else {}
        if isinstance(hooks, DictNode) and (hooks.items or hooks.state):
            state["backward_hooks"] = hooks
        if extra:
            state["metadata"] = dict_of(extra)
        return Opaque(kind="torch.tensor", args=(tensor,), state=dict_of(state)) if state else tensor

    def _dtype(self, node: Node) -> DType:
        if isinstance(node, Opaque) and node.kind == "global":
            row = BY_TORCH.get(node.name.removeprefix("torch."))
            if row is not None:
                return row
            raise self.checks.error("unknown-dtype", f"a tensor has the unknown dtype {node.name}")
        raise self.checks.error("malformed-pickle", f"a tensor's dtype is {short(node)}, no global")

    def _parameter(self, node: Opaque) -> Node:
        """`_rebuild_parameter(_with_state)`: (tensor, requires_grad, hooks[, state])."""
        with_state = node.name == torch_names.PARAMETER_STATE
        if len(node.args) != 3 + with_state:
            raise self.checks.error("malformed-pickle", f"{node.name} with {len(node.args)} arguments")
        tensor, requires_grad, hooks = node.args[:3]
        if not isinstance(requires_grad, bool) or (
            isinstance(hooks, DictNode) and (hooks.items or hooks.state)
        ):
            return node
        return Opaque(
            kind="torch.parameter", args=(tensor, requires_grad), state=node.args[3] if with_state else None
        )

    def _quantized(self, node: Opaque) -> Node:
        """`_rebuild_qtensor`: (storage, offset, size, stride, quantizer, requires_grad, hooks)."""
        if len(node.args) != 7:
            raise self.checks.error(
                "malformed-pickle", f"{node.name} with {len(node.args)} arguments, 7 are needed"
            )
        storage, first, size, stride, *rest = node.args
        base = self.base(storage)
        if base.dtype.kind == "packed":
            return node
        tensor = self.strided(base, first, size, stride)
        return Opaque(kind="torch.quantized", args=(tensor, *rest))

    def _subclass(self, node: Opaque) -> Node:
        """`_rebuild_from_type_v2`: (function, class, arguments, state)."""
        if len(node.args) != 4:
            raise self.checks.error(
                "malformed-pickle", f"{node.name} with {len(node.args)} arguments, 4 are needed"
            )
        function, class_, args, state = node.args
        if (
            not isinstance(function, Opaque)
            or not isinstance(class_, Opaque)
            or not isinstance(args, ListNode)
            or (function.kind, class_.kind, args.kind) != ("global", "global", "tuple")
        ):
            return node
        inner = self.decode(Opaque(kind="call", name=function.name, args=args.items))
        return Opaque(kind="torch.subclass", name=class_.name, args=(inner,), state=state)

    def _sequence(self, node: Opaque) -> Node:
        """`set`, `frozenset`, `torch.Size` of one sequence, or of nothing."""
        if len(node.args) > 1 or (node.args and not isinstance(node.args[0], ListNode)):
            raise self.checks.error("malformed-pickle", f"{node.name} of {short(node.args)}")
        parts = node.args[0].items if node.args and isinstance(node.args[0], ListNode) else ()
        return ListNode(items=parts, kind=node.name.removeprefix("builtins."))


def _called_with_args(make: Callable[[Sequence[Node]], Node], node: Opaque) -> Node:
    return make(node.args)


def _complex(node: Opaque) -> Node:
    match node.args:
        case (float() | int() as real, float() | int() as imag):
            return complex(real, imag)
    return node


def _bytes(node: Opaque) -> Node:
    return node if node.args else b""


def _encoded(node: Opaque) -> Node:
    """Bytes as protocol 2 has them: text of the code points 0 to 255."""
    match node.args:
        case (str(text), "latin1" | "latin-1") if not text or max(text) <= "\xff":
            return text.encode("latin1")
    return node


def _mapping(node: Opaque) -> Node:
    """`OrderedDict()`, `Counter(dict)`, `defaultdict(factory)`, each with the pairs that were set."""
    given = node.args[0] if node.args else None
    if node.items:
        return node
    if node.name == "collections.defaultdict":
        return DictNode(items=node.pairs, kind=node.name, args=node.args, state=node.state)
    if given is None and len(node.args) <= 1:
        return DictNode(items=node.pairs, kind=node.name, state=node.state)
    if isinstance(given, DictNode) and len(node.args) == 1 and given.state is None:
        return DictNode(items=(*given.items, *node.pairs), kind=node.name, state=node.state)
    if isinstance(given, ListNode) and len(node.args) == 1:
        pairs = [item.items for item in given.items if isinstance(item, ListNode) and len(item.items) == 2]
        if len(pairs) == len(given.items):
            return DictNode(
                items=(*((k, v) for k, v in pairs), *node.pairs), kind=node.name, state=node.state
            )
    return node
