"""The axes of inputs and outputs of two live models: which of torch's is which of Keras'.

An order of axes follows from what a layer is and how it is set (`data_format`, `axis`, `batch_first`), never
from sizes. Where a module leaves it open, every order that it allows is tried on the shapes; where more than
one fits, the output is not compared.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from ckptconv.catalog import layers
from ckptconv.errors import CkptError

if TYPE_CHECKING:
    import torch

Order = tuple[int, ...]
Shape = tuple[int, ...]
Axes = tuple[str, str]
"""The axes of an input in torch's order and in Keras', a letter each (`nchw`), or names between blanks."""

_IMAGES = frozenset(
    kind for kind in layers.kinds() if "conv" in kind and "lstm" not in kind and kind != "gpt2_conv1d"
) | {"batch_norm", "group_norm"}
"""Layers whose channels are torch's second axis."""
_FEATURES_LAST = frozenset({"dense", "gpt2_conv1d", "embedding", "einsum_dense", "rms_norm"})
"""Layers whose features are the last axis on both sides."""


def told_order(axes: Axes, rank: int, loc: tuple[str, ...]) -> Order:
    """The order that leads from torch's axes to Keras'. Raises: usage."""
    ours, theirs = (tuple(side.split()) if " " in side.strip() else tuple(side.strip()) for side in axes)
    if sorted(ours) != sorted(theirs) or len(set(ours)) != len(ours) or len(ours) != rank:
        raise CkptError.of(
            "usage",
            f"{axes[0]!r} and {axes[1]!r} do not name the {rank} axes of the input in two orders",
            "Name each axis once on each side, as in axes=('nchw', 'nhwc').",
            loc=loc,
        )
    return tuple(ours.index(axis) for axis in theirs)


def input_order(
    rank: int, taker: torch.nn.Module | None, model: torch.nn.Module, last: bool | None, loc: tuple[str, ...]
) -> Order:
    """The order in which Keras takes an input of torch's by the conventions of who takes it.

    `taker`: the first module that does; `last`: whether the Keras model has its channels last, None where no
    layer of it says.
    Raises: layout-ambiguous.
    """
    same = tuple(range(rank))
    kind = _kind(taker)
    if kind in _IMAGES and rank > 2:
        if last is not None:
            return channels_moved(rank) if last else same
    elif rank < 2:
        return same
    else:
        first = getattr(taker, "batch_first", None)
        if isinstance(first, bool):
            return same if first or rank != 3 else (1, 0, 2)
        if not is_sequence_first(model) and (rank == 2 or kind in (*_FEATURES_LAST, "layer_norm")):
            return same
    raise CkptError.of(
        "layout-ambiguous",
        f"which axis of the input {loc[-1]!r} of rank {rank} is which in the Keras model is not told by what "
        f"takes it ({type(taker).__name__ if taker is not None else 'a function'})",
        "Name the axes, torch's first: axes=('nchw', 'nhwc'), or ('n l e', 'n l e') where they are the same.",
        loc=loc,
    )


def telling(model: torch.nn.Module) -> Iterator[torch.nn.Module]:
    """The modules whose axes are known, by their kind or by what they say themselves."""
    for module in model.modules():
        if _kind(module) is not None or isinstance(getattr(module, "batch_first", None), bool):
            yield module


def channels_moved(rank: int) -> Order:
    """From channels second to channels last."""
    return (0, *range(2, rank), 1)


def is_sequence_first(model: torch.nn.Module) -> bool:
    """Whether some module takes time before the batch, so that others may, too."""
    return any(getattr(module, "batch_first", None) is False for module in model.modules())


def channels_last(layer: object) -> bool | None:
    """Where a Keras layer has its channels; None where it does not say."""
    told = getattr(layer, "data_format", None)
    return None if told is None else told == "channels_last"


def orders(module: torch.nn.Module, layer: object, rank: int, *, sequence_first: bool) -> Iterator[Order]:
    """The orders in which a module's output may be a layer's: one where both are known."""
    same = tuple(range(rank))
    kind = _kind(module)
    first = getattr(module, "batch_first", None)
    if kind in _IMAGES and rank > 2:
        last = channels_last(layer)
        if last is None:
            axis = getattr(layer, "axis", -1)
            axis = axis[0] if isinstance(axis, Sequence) else axis
            last = axis in (-1, rank - 1)
        yield channels_moved(rank) if last else same
        return
    yield same if first is not False or rank != 3 else (1, 0, 2)
    if first is not None or rank < 2:
        return
    if sequence_first:
        yield (1, 0, *range(2, rank))
    plain = kind == "layer_norm" and type(module).__module__.startswith("torch.")
    if kind not in _FEATURES_LAST and not plain and rank > 2:
        yield channels_moved(rank)


def model_orders(rank: int, *, sequence_first: bool) -> Iterator[Order]:
    """The orders in which a model's own output may be the other's."""
    yield tuple(range(rank))
    if sequence_first and rank > 1:
        yield (1, 0, *range(2, rank))
    if rank > 2:
        yield channels_moved(rank)


def fitting(may: Iterable[Order], before: Shape, after: Shape) -> tuple[Order, ...]:
    """Those of the orders that make one shape the other; of orders that move elements alike the first.

    Axes of one element count for nothing. The last axis may be several in the other shape, as heads are.
    """
    found: dict[Order, Order] = {}
    wanted = tuple(size for size in after if size != 1)
    for order in may:
        moved = tuple(axis for axis in order if before[axis] != 1)
        shape = tuple(before[axis] for axis in moved)
        inner = len(shape) - 1
        is_split = 0 < inner < len(wanted) - 1 and shape[:inner] == wanted[:inner]
        if shape == wanted or (is_split and shape[inner] == math.prod(wanted[inner:])):
            found.setdefault(moved, order)
    return tuple(found.values())


def _kind(module: torch.nn.Module | None) -> str | None:
    return None if module is None else layers.kind_of_class("torch", type(module), module)
