"""Two arrays compared element by element: how far apart, where first, and whether their bits are equal."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from ckptconv.rawtree import Path
from ckptconv.tensor import Array, TensorRef

WINDOW_ELEMENTS = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Tolerance:
    """How far values may be apart: |a - b| <= absolute + relative * |b|. Nothing: bits must be equal."""

    absolute: float = 0.0
    relative: float = 0.0

    @property
    def is_exact(self) -> bool:
        return self.absolute == self.relative == 0


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorDifference:
    """One array that is not the same on both sides."""

    address: Path
    kind: str
    """`only-first`, `only-second`, `shape`, `dtype`, `values`, or `within` the tolerance."""
    first: str = ""
    second: str = ""
    max_abs: float = 0.0
    max_rel: float = 0.0
    differing: int = 0
    """Elements beyond the tolerance; without one, elements whose bits differ."""
    at: tuple[int, ...] | None = None
    """Index of the first of them."""


def described(tensor: TensorRef) -> str:
    """Dtype and shape, as a difference shows them."""
    return f"{tensor.dtype.name} {list(tensor.shape)}"


def tensor_difference(
    address: Path, first: TensorRef, second: TensorRef, tolerance: Tolerance
) -> TensorDifference | None:
    """What is different, None where the bits are equal. I/O: streams both."""

    def apart(kind: str) -> TensorDifference:
        return TensorDifference(address=address, kind=kind, first=described(first), second=described(second))

    if first.shape != second.shape:
        return apart("shape")
    if first.dtype != second.dtype and (tolerance.is_exact or None in (_width(first), _width(second))):
        return apart("dtype")
    if _width(first) is None:
        texts = [b"".join(bytes(window) for window in side.windows()) for side in (first, second)]
        return None if texts[0] == texts[1] else apart("values")
    found = _Values(tolerance)
    for mine, its in zip(_pieces(first), _pieces(second), strict=True):
        found.add(mine, its)
    if found.bits_equal:
        return None
    return replace(
        apart("values" if found.differing else "within"),
        max_abs=found.max_abs,
        max_rel=found.max_rel,
        differing=found.differing,
        at=None if found.at is None else tuple(int(i) for i in np.unravel_index(found.at, first.shape)),
    )


def _width(tensor: TensorRef) -> int | None:
    """Bytes of an element; None where elements differ in length (strings)."""
    return None if tensor.spec.encoded_nbytes is not None else tensor.dtype.itemsize


def _pieces(tensor: TensorRef) -> Iterator[Array]:
    """The elements in order, in pieces of one size whatever the dtype and the layout."""
    dtype = tensor.dtype.numpy
    held = b""
    wanted = WINDOW_ELEMENTS * tensor.dtype.itemsize
    for window in tensor.windows(wanted):
        held += bytes(window)
        while len(held) >= wanted:
            yield np.frombuffer(held[:wanted], dtype)
            held = held[wanted:]
    if held:
        yield np.frombuffer(held, dtype)


class _Values:
    """What is found while two arrays stream by."""

    __slots__ = ("_seen", "_tolerance", "at", "bits_equal", "differing", "max_abs", "max_rel")

    def __init__(self, tolerance: Tolerance) -> None:
        self._tolerance = tolerance
        self._seen = self.differing = 0
        self.max_abs = self.max_rel = 0.0
        self.at: int | None = None
        self.bits_equal = True

    def add(self, first: Array, second: Array) -> None:
        """The next piece of both."""
        if first.dtype == second.dtype and first.tobytes() == second.tobytes():
            self._seen += first.size
            return
        self.bits_equal = False
        wide = np.complex128 if "c" in (first.dtype.kind, second.dtype.kind) else np.float64
        mine, its = first.astype(wide), second.astype(wide)
        with np.errstate(all="ignore"):
            apart = np.abs(mine - its)
            both = (mine == its) | (np.isnan(mine) & np.isnan(its))
            apart = np.where(both, 0.0, np.where(np.isnan(apart), np.inf, apart))
            relative = np.where(apart == 0, 0.0, apart / np.abs(its))
            if self._tolerance.is_exact:
                beyond = _bits(first) != _bits(second)
            else:
                allowed = self._tolerance.absolute + self._tolerance.relative * np.abs(its)
                beyond = (apart != 0) & ~(apart <= allowed)
        self.max_abs = max(self.max_abs, float(apart.max()))
        self.max_rel = max(self.max_rel, float(relative.max()))
        if beyond.any() and self.at is None:
            self.at = self._seen + int(np.argmax(beyond))
        self.differing += int(np.count_nonzero(beyond))
        self._seen += first.size


def _bits(array: Array) -> Array:
    """The elements as rows of bytes that compare bit by bit."""
    rows = array.view(np.uint8).reshape(array.size, -1)
    return rows.view(f"V{rows.shape[1]}").reshape(-1)
