"""In what two checkpoints differ: progress, optimizers, names, shapes, dtypes and values, across formats.

Where both have the same parameter names they are compared as they are. Where they have not, the first is
carried onto the second as a conversion would carry it, names, layouts and optimizer state, and what comes
out is compared with what is there. Values are streamed, a window of each side at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from ckptconv.detect import PathLike, dialect_named, format_named, open
from ckptconv.document import PROGRESS_FIELDS, Checkpoint, Fact, Known, Optimizer, Value
from ckptconv.errors import CkptError, MappingError
from ckptconv.facts import value_to_json
from ckptconv.goal import Goal
from ckptconv.plan import Wishes, allowed_codes, plan
from ckptconv.report import REPORT_VERSION
from ckptconv.strictjson import Json
from ckptconv.tensor import Array, TensorRef

WINDOW_ELEMENTS = 1 << 20
_NOT_CARRIED = frozenset({"kept-from-template", "created", "supplied"})
"""Fates of what stands in a carried document because the second checkpoint has it."""

Address = tuple[str | int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Tolerance:
    """How far values may be apart: |a - b| <= absolute + relative * |b|. Nothing: bits must be equal."""

    absolute: float = 0.0
    relative: float = 0.0

    @property
    def is_exact(self) -> bool:
        return self.absolute == self.relative == 0


@dataclass(frozen=True, slots=True, kw_only=True)
class FieldDifference:
    """A number or word that the two tell differently; None where one does not tell it."""

    field: str
    first: Value
    second: Value


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorDifference:
    """One array that is not the same on both sides."""

    address: Address
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """Everything in which two checkpoints differ."""

    first: str
    second: str
    carried: bool
    """Whether the first was carried onto the second's names and layouts."""
    fields: tuple[FieldDifference, ...]
    tensors: tuple[TensorDifference, ...]
    compared: int
    """Arrays that stand on both sides."""
    equal: int
    """Those of them whose bits are equal."""

    @property
    def same(self) -> bool:
        return not self.fields and all(tensor.kind == "within" for tensor in self.tensors)


def compare(
    first: PathLike | Checkpoint,
    second: PathLike | Checkpoint,
    *,
    tolerance: Tolerance | None = None,
    allow: Sequence[str] = (),
    progress: Callable[[int, int], None] | None = None,
) -> Difference:
    """Compare two checkpoints in any two formats.

    `allow` are losses of carrying the first onto the second, as in a conversion; `progress` gets the bytes
    compared and those to compare.
    I/O: streams every tensor of both.
    Raises: as `open`, and what stops the conversion of the first onto the second.
    """
    tolerance = tolerance or Tolerance()
    sides = (first, second)
    names = [side.provenance.source if isinstance(side, Checkpoint) else str(side) for side in sides]
    one, other = (side if isinstance(side, Checkpoint) else open(side) for side in sides)
    for checkpoint, name in zip((one, other), names, strict=True):
        _need_tensors(checkpoint, name)
    carried = not one.params.keys() & other.params.keys() or _framework(one) != _framework(other)
    left = frozenset[Address]()
    if carried:
        one, left = _carried(one, other, allow)
    ours, theirs = _arrays(one), _arrays(other, like=one)
    tensors: list[TensorDifference] = []
    compared = equal = done = 0
    total = sum(tensor.spec.nbytes for address, tensor in theirs.items() if address in ours)
    for address in {**theirs, **ours}:
        if address in left:
            continue
        mine, its = ours.get(address), theirs.get(address)
        if mine is None or its is None:
            there = mine or its
            assert there is not None
            text, kind = _described(there), "only-second" if mine is None else "only-first"
            tensors.append(TensorDifference(address=address, kind=kind, first=text, second=text))
            continue
        compared += 1
        done += its.spec.nbytes
        if progress is not None:
            progress(done, total)
        found = _tensor_difference(address, mine, its, tolerance)
        if found is None:
            equal += 1
        else:
            tensors.append(found)
    return Difference(
        first=names[0],
        second=names[1],
        carried=carried,
        fields=tuple(_field_differences(one, other)),
        tensors=tuple(tensors),
        compared=compared,
        equal=equal,
    )


def _need_tensors(checkpoint: Checkpoint, name: str) -> None:
    if checkpoint.is_skeleton:
        raise CkptError.of(
            "usage",
            f"'{name}' is a description without values",
            "Name the checkpoint itself.",
            loc=(name,),
        )


def _framework(checkpoint: Checkpoint) -> str | None:
    provenance = checkpoint.provenance
    return dialect_named(provenance.format, provenance.dialect).framework


def _carried(
    checkpoint: Checkpoint, onto: Checkpoint, allow: Sequence[str]
) -> tuple[Checkpoint, frozenset[Address]]:
    """The first under the second's names and in its layouts, and what is the second's own in it.

    Raises: every problem of such a conversion.
    """
    provenance = onto.provenance
    goal = Goal(
        path=Path(provenance.source or "second"),
        format=format_named(provenance.format),
        dialect=dialect_named(provenance.format, provenance.dialect),
        template=onto,
    )
    result = plan(checkpoint, goal, Wishes(allowed=allowed_codes(allow)))
    # A counter that could not be filled is no matter here: both sides' counters are compared as they stand.
    problems = [problem for problem in result.problems if problem.code != "progress-unknown"]
    if problems:
        raise MappingError(*problems)
    own = frozenset(entry.item for entry in result.ledger if entry.fate in _NOT_CARRIED)
    return result.checkpoint, own


def _arrays(checkpoint: Checkpoint, like: Checkpoint | None = None) -> dict[Address, TensorRef]:
    """Parameters and slots; a single optimizer goes by the other side's name of its single one."""
    arrays: dict[Address, TensorRef] = {("param", n): param.tensor for n, param in checkpoint.params.items()}
    for optimizer in checkpoint.optimizers:
        name = _called(optimizer, checkpoint, like)
        for slot, by_param in optimizer.slots.items():
            arrays.update({("slot", name, slot, param): tensor for param, tensor in by_param.items()})
    return arrays


def _called(optimizer: Optimizer, checkpoint: Checkpoint, like: Checkpoint | None) -> str:
    if like is not None and len(checkpoint.optimizers) == len(like.optimizers) == 1:
        return like.optimizers[0].name
    return optimizer.name


def _described(tensor: TensorRef) -> str:
    return f"{tensor.dtype.name} {list(tensor.shape)}"


def _field_differences(one: Checkpoint, other: Checkpoint) -> Iterator[FieldDifference]:
    ours, theirs = dict(_fields(one)), dict(_fields(other, like=one))
    for field in {**ours, **theirs}:
        mine, its = ours.get(field), theirs.get(field)
        if None in (mine, its) and field not in PROGRESS_FIELDS:
            continue  # what one side does not record, such as betas in a bundle, does not tell them apart
        if mine != its and not (_is_number(mine) and _is_number(its) and _as_float32(mine, its)):
            yield FieldDifference(field=field, first=mine, second=its)


def _is_number(value: Value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _as_float32(first: Value, second: Value) -> bool:
    """Whether two hyperparameters are one number that a framework keeps in single precision."""
    assert isinstance(first, (int, float))
    assert isinstance(second, (int, float))
    return math.isclose(first, second, rel_tol=6e-8, abs_tol=0) and isinstance(first, float)


def _fields(checkpoint: Checkpoint, like: Checkpoint | None = None) -> Iterator[tuple[str, Value]]:
    """What is known of progress, and what both sides would tell of an optimizer."""
    for name in PROGRESS_FIELDS:
        yield from _known(name, getattr(checkpoint.progress, name))
    for optimizer in checkpoint.optimizers:
        name = _called(optimizer, checkpoint, like)
        yield f"{name}.algorithm", optimizer.algorithm
        yield from _known(f"{name}.step", optimizer.step)
        for number, group in enumerate(optimizer.groups):
            for hyperparameter, fact in group.hyperparameters.items():
                yield from _known(f"{name}.group {number}.{hyperparameter}", fact)


def _known(name: str, fact: Fact) -> Iterator[tuple[str, Value]]:
    if isinstance(fact, Known):
        yield name, fact.value


def _tensor_difference(
    address: Address, first: TensorRef, second: TensorRef, tolerance: Tolerance
) -> TensorDifference | None:
    """What is different, None where the bits are equal. I/O: streams both."""

    def apart(kind: str) -> TensorDifference:
        return TensorDifference(
            address=address, kind=kind, first=_described(first), second=_described(second)
        )

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


def to_json(difference: Difference) -> dict[str, Json]:
    """The difference, valid against the definition `difference` of the report schema."""
    return {
        "schema": "ckptconv/difference",
        "schema_version": REPORT_VERSION,
        "first": difference.first,
        "second": difference.second,
        "same": difference.same,
        "carried": difference.carried,
        "compared": difference.compared,
        "equal": difference.equal,
        "fields": [
            {"field": f.field, "first": value_to_json(f.first), "second": value_to_json(f.second)}
            for f in difference.fields
        ],
        "tensors": [
            {
                "address": list(t.address),
                "kind": t.kind,
                "first": t.first,
                "second": t.second,
                "max_abs": value_to_json(t.max_abs),
                "max_rel": value_to_json(t.max_rel),
                "differing": t.differing,
                "at": None if t.at is None else list(t.at),
            }
            for t in difference.tensors
        ],
    }
