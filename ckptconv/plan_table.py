"""A plan as a table: every array of the target with what makes it, and what is left over on both sides.

The rows are read off the ledger, which names for each item of the source its place in the target; dtypes,
shapes and axes are those of the documents.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence

from ckptconv.catalog.axes import atoms, entries
from ckptconv.document import Checkpoint
from ckptconv.rawtree import Path
from ckptconv.report import Entry, Plan, Producer, Row, place
from ckptconv.tensor import TensorRef

_ARRAYS = frozenset({"param", "slot", "extra"})
_MADE = frozenset({"copied", "transformed", "supplied", "aliased"})
"""Fates of items whose values stand in the target."""

Axes = tuple[str, ...]


def table(ledger: Sequence[Entry], source: Checkpoint, target: Checkpoint, *, stopped: bool) -> Plan:
    """The table of a transfer.

    `target`: the document that is written; where problems stop it, the template, of which the ledger may have
    parts alone.
    """
    by_place: dict[str, list[Entry]] = defaultdict(list)
    for entry in ledger:
        if entry.target and entry.item[0] in (*_ARRAYS, "template"):
            by_place[entry.target].append(entry)
    rows = []
    without = []
    for address, tensor in target.tensors():
        row = _row(address, tensor, by_place.get(place(address), ()), source, target)
        rows += [row] if row is not None else []
        without += [address] if (stopped if row is None else not row.producers) else []
    used = {e.item for e in ledger if e.fate in _MADE and (e.target or e.fate == "aliased")}
    left = (address for address, _ in source.tensors() if address not in used and address[:3] not in used)
    return Plan(rows=tuple(rows), left_in_source=tuple(left), left_in_target=tuple(without))


def _row(
    address: Path, tensor: TensorRef, entries: Sequence[Entry], source: Checkpoint, target: Checkpoint
) -> Row | None:
    """What makes one array; None where the ledger has nothing of it."""
    if not entries:
        return None
    makers = [entry for entry in entries if entry.fate in _MADE and entry.item[0] != "template"]
    # The term of a sum that shares its gradient with another one is in the ledger, and adds nothing.
    makers = [entry for entry in makers if entry.fate != "aliased" or entry.evidence] or makers
    first = (makers or entries)[0]
    fate = first.fate if len(makers) < 2 else "transformed"
    producers = tuple(_producers(address, makers))
    return Row(
        target=address,
        dtype=tensor.dtype.name,
        shape=tensor.shape,
        axes=_axes(producers, source, target, address),
        producers=producers,
        fate=fate,
        evidence=next((entry.evidence for entry in makers if entry.evidence), ""),
    )


def _producers(address: Path, makers: Sequence[Entry]) -> Iterator[Producer]:
    """A parameter may be made from the master that an optimizer holds of it, instead of the model's copy."""
    masters = [entry.item for entry in makers if entry.item[0] == "slot"] if address[0] == "param" else []
    for entry in makers:
        master = next((item for item in masters if item[-1] == entry.item[-1]), None)
        if master is None:
            yield Producer(item=entry.item, ops=entry.ops)
        elif entry.item != master:
            yield Producer(item=master, ops=entry.ops)


def _axes(
    producers: Sequence[Producer], source: Checkpoint, target: Checkpoint, address: Path
) -> tuple[Axes, Axes] | None:
    """The axes of a parameter before and after, if both sides call them the same.

    Where one side is not known, a permutation tells it.
    """
    if address[0] != "param" or len(producers) != 1:
        return None
    (producer,) = producers
    made_from = source.params.get(str(producer.item[-1]))
    before = made_from.axes if made_from is not None else None
    after = target.params[str(address[1])].axes
    orders = [_order(op) for op in producer.ops if op.get("op") == "permute"]
    if len(orders) == 1 and all(op.get("op") in ("permute", "cast") for op in producer.ops):
        (order,) = orders
        if before is None and after is not None:
            before = tuple(after[order.index(axis)] for axis in range(len(after)))
        elif after is None and before is not None:
            after = tuple(before[axis] for axis in order)
    if before is None or after is None or _atoms(before) != _atoms(after):
        return None
    return before, after


def _atoms(axes: Axes) -> set[str]:
    """The names of axes, those that are merged apart."""
    return {entries(atom)[0] for axis in axes for atom in atoms(axis)}


def _order(op: Mapping[str, object]) -> list[int]:
    order = op["order"]
    assert isinstance(order, list)
    return order
