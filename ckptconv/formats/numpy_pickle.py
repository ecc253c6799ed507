"""numpy arrays and scalars inside a pickle: inert calls to tensors over the pickled bytes, and back.

In a pickle: `_reconstruct(ndarray, (0,), b"b")` with the state `(1, shape, dtype, is_fortran, bytes)`;
`_frombuffer(bytes, dtype, shape, order)` in protocol 5; `scalar(dtype, bytes)`. A dtype is
`dtype("f4", False, True)` with the state `(3, byte order, ...)`. numpy 1 says `numpy.core`, numpy 2
`numpy._core`. Structured, object and text arrays and subclasses stay inert calls.

Source: numpy 2.4 `numpy/_core/src/multiarray/methods.c` (`array_reduce`), `numpy/_core/numeric.py`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

import numpy as np

from ckptconv import dtypes
from ckptconv.dtypes import DType
from ckptconv.formats.pickle_checks import INT64, Checks
from ckptconv.rawtree import ListNode, Node, Opaque
from ckptconv.source import BufferSource
from ckptconv.tensor import Extent, StoredTensor, TensorRef, TensorSpec, as_bytes, dense_strides

RECONSTRUCT: Final = "numpy._core.multiarray._reconstruct"
SCALAR: Final = "numpy._core.multiarray.scalar"

_DTYPES: dict[str, DType] = {
    row.numpy.str[1:]: row
    for row in reversed(dtypes.ROWS)
    if row.numpy.isbuiltin == 1 and row.kind not in ("quantized", "packed", "bytes")
}


@dataclass(frozen=True, slots=True)
class NumpyDecoder:
    """Decodes numpy's calls in one pickle; what it does not know it answers with the call itself."""

    checks: Checks

    def array(self, node: Opaque) -> Node:
        """`_reconstruct` and its state."""
        state = node.state
        of_class = node.args[0] if node.args else None
        plain = isinstance(of_class, Opaque) and of_class.name == "numpy.ndarray"
        if not plain or node.items or node.pairs or not isinstance(state, ListNode) or len(state.items) != 5:
            return node
        _, shape, dtype, fortran, data = state.items
        tensor = self._tensor(dtype, shape, fortran is True, data)
        return node if tensor is None else Opaque(kind="numpy.ndarray", name=node.name, args=(tensor,))

    def buffer(self, node: Opaque) -> Node:
        """`_frombuffer`."""
        if len(node.args) != 4:
            return node
        data, dtype, shape, order = node.args
        tensor = self._tensor(dtype, shape, order == "F", data)
        return node if tensor is None else Opaque(kind="numpy.ndarray", name=RECONSTRUCT, args=(tensor,))

    def scalar(self, node: Opaque) -> Node:
        """`scalar`."""
        if len(node.args) != 2:
            return node
        tensor = self._tensor(node.args[0], ListNode(kind="tuple"), False, node.args[1])
        return node if tensor is None else Opaque(kind="numpy.scalar", name=node.name, args=(tensor,))

    def _tensor(self, dtype: Node, shape: Node, fortran: bool, data: Node) -> StoredTensor | None:
        """The array as a tensor over the pickled bytes; None where it is of another element type."""
        found = _dtype(dtype)
        if isinstance(data, Opaque) and data.name == "builtins.bytearray" and len(data.args) == 1:
            data = data.args[0]
        if found is None or not isinstance(data, bytes):
            return None
        row, big_endian = found
        sizes = self.checks.counts(shape, "the shape of a numpy array")
        possible = row.itemsize * math.prod(max(n, 1) for n in sizes)
        if math.prod(sizes) * row.itemsize != len(data) or possible >= INT64:
            raise self.checks.error(
                "corrupt-file", f"a numpy array of shape {sizes} and dtype {row.name} has {len(data)} bytes"
            )
        strides = dense_strides(sizes[::-1])[::-1] if fortran else dense_strides(sizes)
        source = BufferSource(data, f"{self.checks.name}!data.pkl")
        extent = Extent(source=source, offset=0, nbytes=len(data), big_endian=big_endian)
        return StoredTensor(spec=TensorSpec(dtype=row, shape=sizes), extent=extent, strides=strides)


def _dtype(node: Node) -> tuple[DType, bool] | None:
    """The row of a pickled dtype and whether it is big-endian; None for structured and other types."""
    if not isinstance(node, Opaque) or node.name != "numpy.dtype" or not node.args:
        return None
    code, state = node.args[0], node.state
    row = _DTYPES.get(code) if isinstance(code, str) else None
    order = state.items[1] if isinstance(state, ListNode) and len(state.items) > 1 else "|"
    if row is None or order not in ("<", ">", "|"):
        return None
    return row, order == ">"


def encode_numpy(node: Opaque, tensor: TensorRef) -> Opaque:
    """An array or scalar as numpy's own reduce gives it, in the byte and axis order that it had."""
    stored = tensor if isinstance(tensor, StoredTensor) else None
    big_endian = stored is not None and stored.extent.big_endian and tensor.dtype.itemsize > 1
    array = tensor.read()
    data = array.astype(array.dtype.newbyteorder(">")) if big_endian else array
    order = "|" if array.dtype.itemsize == 1 else ">" if big_endian else "<"
    dtype = Opaque(
        kind="call",
        name="numpy.dtype",
        args=(array.dtype.str[1:], False, True),
        state=_tuple(3, order, None, None, None, -1, -1, 0),
    )
    if node.kind == "numpy.scalar":
        return Opaque(kind="call", name=node.name or SCALAR, args=(dtype, as_bytes(data).tobytes()))
    turned = stored is not None and stored.strides == dense_strides(array.shape[::-1])[::-1]
    fortran = turned and stored is not None and not stored.is_dense
    flat = as_bytes(np.ascontiguousarray(data.T) if fortran else data).tobytes()
    return Opaque(
        kind="call",
        name=node.name or RECONSTRUCT,
        args=(Opaque(kind="global", name="numpy.ndarray"), _tuple(0), b"b"),
        state=_tuple(1, _tuple(*array.shape), dtype, fortran, flat),
    )


def _tuple(*items: Node) -> ListNode:
    return ListNode(items=items, kind="tuple")
