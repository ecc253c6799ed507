"""Tensors whose elements are to lie in another order than their indices: channels_last, transposed weights.

The strides of a tensor are no content, but optimizers read them: torch's fused Adam walks the memory of a
parameter and of its moments side by side, and is silently wrong where their strides differ (torch 2.13, CPU).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ckptconv.formats.torch_names import ResolveBits
from ckptconv.ops import Permute
from ckptconv.tensor import (
    Array,
    Bytes,
    DerivedTensor,
    Index,
    PlainOp,
    StoredTensor,
    TensorRef,
    TensorSpec,
    dense_strides,
)

Strides = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Laid(PlainOp):
    """The same tensor, to be stored with these strides where the target has strides."""

    strides: Strides

    def inverse(self) -> Laid:
        return self

    def spec(self, inputs: tuple[TensorSpec, ...]) -> TensorSpec:
        return inputs[0]

    def view(self, tensor: StoredTensor) -> None:
        return None

    def block(self, inputs: tuple[TensorRef, ...], start: Index, stop: Index) -> Array:
        return inputs[0].block(start, stop)

    def windows(
        self, inputs: tuple[TensorRef, ...], nbytes: int, panel_nbytes: int
    ) -> Iterator[Bytes] | None:
        return inputs[0].windows(nbytes, panel_nbytes)

    def to_json(self) -> dict[str, object]:
        return {"op": "lay", "strides": list(self.strides)}


def strides_of(tensor: TensorRef) -> Strides | None:
    """The strides of a stored tensor, where they are not those of C order."""
    if not isinstance(tensor, StoredTensor) or tensor.spec.encoded_nbytes is not None:
        return None
    return None if tensor.strides == dense_strides(tensor.shape) else tensor.strides


def laid(tensor: TensorRef, strides: Strides | None) -> TensorRef:
    """The tensor to be stored with these strides; in C order where there are none, or they leave gaps."""
    if isinstance(tensor, DerivedTensor) and isinstance(tensor.op, ResolveBits):
        return tensor  # a flagged view of stored bytes: kept as it is
    if strides_of(tensor) == strides:
        return tensor
    wanted = strides if strides is not None and _order(tensor.shape, strides) else None
    if wanted is None and not isinstance(tensor, StoredTensor):
        return tensor
    return tensor.apply(Laid(wanted or dense_strides(tensor.shape)))


def in_memory_order(tensor: TensorRef) -> tuple[TensorRef, Strides] | None:
    """A laid tensor as its storage has it, and its strides there; None for any other."""
    if not isinstance(tensor, DerivedTensor) or not isinstance(tensor.op, Laid):
        return None
    order = _order(tensor.shape, tensor.op.strides)
    assert order is not None
    below = tensor.parts[0]
    return (below.apply(Permute(order)) if order != tuple(range(len(order))) else below), tensor.op.strides


def _order(shape: tuple[int, ...], strides: Strides) -> tuple[int, ...] | None:
    """The axes from the outermost in memory to the innermost; None where they overlap or leave gaps."""
    if len(shape) != len(strides) or 0 in shape:
        return None
    order = tuple(sorted(range(len(shape)), key=lambda axis: -strides[axis] if shape[axis] > 1 else 0))
    step = 1
    for axis in reversed([axis for axis in order if shape[axis] > 1]):
        if strides[axis] != step:
            return None
        step *= shape[axis]
    return order
