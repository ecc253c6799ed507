"""In what two checkpoints differ: progress, optimizers, names, shapes, dtypes and values, across formats.

Where both have the same parameter names they are compared as they are. Where they have not, or a mapping file
pairs their names, the first is carried onto the second as a conversion would carry it, names, layouts and
optimizer state, and what comes out is compared with what is there. With a template both are carried onto it.
Values are streamed, a window of each side at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ckptconv.candidates import choose
from ckptconv.detect import PathLike, dialect_named, format_named, open_chosen
from ckptconv.differing_fields import FieldDifference, called, field_differences
from ckptconv.differing_values import TensorDifference, Tolerance, described, tensor_difference
from ckptconv.document import Checkpoint
from ckptconv.errors import CkptError, MappingError
from ckptconv.facts import value_to_json
from ckptconv.goal import Goal, document_of
from ckptconv.mapping_file import MappingLike, mapping_of
from ckptconv.plan import Wishes, allowed_codes, plan
from ckptconv.rawtree import Path as Address
from ckptconv.remote import place as reached
from ckptconv.report import REPORT_VERSION, Entry, place
from ckptconv.selection import selected
from ckptconv.strictjson import Json
from ckptconv.supply import set_fields
from ckptconv.tensor import TensorRef

_ARRAYS = frozenset({"param", "slot"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """Everything in which two checkpoints differ."""

    first: str
    second: str
    carried: bool
    """Whether the first was carried onto the second's names and layouts, or both onto a template's."""
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
    template: PathLike | Checkpoint | None = None,
    mapping: MappingLike | None = None,
    selects: tuple[Sequence[str], Sequence[str]] = ((), ()),
    tolerance: Tolerance | None = None,
    allow: Sequence[str] = (),
    progress: Callable[[int, int], None] | None = None,
) -> Difference:
    """Compare two checkpoints in any two formats.

    `template`: a checkpoint or skeleton in whose names and layouts both are compared. `mapping`: a mapping
    file that pairs the first's names with the second's. `selects`: what to take of each, as `convert` does.
    `allow` are losses of carrying the first onto the second, as in a conversion; `progress` gets the bytes
    compared and those to compare.
    I/O: streams every tensor of both.
    Raises: as `open`, and what stops the conversion of the first onto the second; usage for a mapping beside
    a template.
    """
    tolerance = tolerance or Tolerance()
    (one, first_name), (other, second_name) = map(_opened, (first, second), selects)
    wishes = Wishes(allowed=allowed_codes(allow), mapping=None if mapping is None else mapping_of(mapping))
    ours, theirs = _As(one), _As(other)
    if template is not None:
        if mapping is not None:
            raise CkptError.of(
                "usage",
                "a mapping file pairs the names of the two, and with a template both go by its names",
                "Leave out --mapping or --template.",
                loc=("--mapping",),
            )
        onto = document_of(template)
        ours, theirs = _carried(one, onto, wishes), _carried(other, onto, wishes)
    elif mapping is not None or _are_foreign(one, other):
        ours = _carried(one, other, wishes)
    carried = ours.checkpoint is not one
    tensors, compared, equal = [*ours.lost("only-first"), *theirs.lost("only-second")], 0, 0
    for found in _compared(ours, theirs, tolerance, progress):
        if isinstance(found, TensorDifference):
            tensors.append(found)
        if found is None or found.kind not in ("only-first", "only-second"):
            compared += 1
            equal += found is None
    return Difference(
        first=first_name,
        second=second_name,
        carried=carried,
        fields=tuple(field_differences(ours.checkpoint, theirs.checkpoint)),
        tensors=tuple(tensors),
        compared=compared,
        equal=equal,
    )


def _opened(side: PathLike | Checkpoint, select: Sequence[str]) -> tuple[Checkpoint, str]:
    """The document of a side, with its name. Raises: usage for one without values."""
    if isinstance(side, Checkpoint):
        checkpoint, name = selected(side, select), side.provenance.source
    else:
        checkpoint, name = open_chosen(choose(reached(side), select)), str(side)
    if checkpoint.is_skeleton:
        raise CkptError.of(
            "usage",
            f"'{name}' is a description without values",
            "Name the checkpoint itself.",
            loc=(name,),
        )
    return checkpoint, name


def _are_foreign(one: Checkpoint, other: Checkpoint) -> bool:
    """Whether two documents have no names in common, or layouts of two frameworks."""
    frameworks = {dialect_named(c.provenance.format, c.provenance.dialect).framework for c in (one, other)}
    return len(frameworks) > 1 or not one.params.keys() & other.params.keys()


@dataclass(frozen=True, slots=True)
class _As:
    """A document as it is compared."""

    checkpoint: Checkpoint
    ledger: tuple[Entry, ...] = ()
    """How it was carried onto the other's names; empty where it was not."""
    source: Checkpoint | None = None
    """Before that."""

    def lost(self, kind: str) -> Iterator[TensorDifference]:
        """What found no place because the caller allowed it."""
        for entry in self.ledger:
            is_array = entry.item[0] in _ARRAYS and len(entry.item) in (2, 4)
            if entry.fate == "left" and entry.allowed_by and is_array and self.source is not None:
                tensor = self.source.lookup(entry.item)
                assert isinstance(tensor, TensorRef)
                yield _alone(entry.item, tensor, kind)

    def own(self) -> dict[str, str]:
        """Places of arrays that stand there because the other document has them, and what allowed it."""
        kept = (entry for entry in self.ledger if entry.fate == "kept-from-template")
        return {entry.target: entry.allowed_by for entry in kept}

    def arrays(self, like: Checkpoint | None = None) -> dict[Address, TensorRef]:
        """Parameters and slots; a single optimizer goes by the other side's name of its single one."""
        names = {
            optimizer.name: called(optimizer, self.checkpoint, like)
            for optimizer in self.checkpoint.optimizers
        }
        return {
            address if address[0] == "param" else ("slot", names[str(address[1])], *address[2:]): tensor
            for address, tensor in self.checkpoint.tensors()
            if address[0] in _ARRAYS
        }


def _alone(address: Address, tensor: TensorRef, kind: str) -> TensorDifference:
    text = described(tensor)
    return TensorDifference(address=address, kind=kind, first=text, second=text)


def _carried(checkpoint: Checkpoint, onto: Checkpoint, wishes: Wishes) -> _As:
    """The document under another one's names and in its layouts.

    Optimizers that do not convert into one another are left as they are: they differ.
    Raises: every other problem of such a conversion.
    """
    provenance = onto.provenance
    goal = Goal(
        path=Path(provenance.source or "second"),
        format=format_named(provenance.format),
        dialect=dialect_named(provenance.format, provenance.dialect),
        # What is of no parameter is not compared, and bare counters of the file are not written.
        template=replace(onto, extras={}, residue=None),
    )
    source = replace(checkpoint, extras={})
    result = plan(source, goal, wishes)
    if any(problem.code == "progress-unknown" for problem in result.problems):
        # A counter that cannot be filled is no matter: both sides' are compared as they stand.
        result = plan(set_fields(source, {"step": 0}), goal, wishes)
        result = replace(result, checkpoint=_as_counted(result.checkpoint, checkpoint))
    if result.problems and all(problem.loc[:1] == ("optimizers",) for problem in result.problems):
        bare = _carried(replace(source, optimizers=()), replace(onto, optimizers=()), wishes)
        return replace(bare, checkpoint=replace(bare.checkpoint, optimizers=checkpoint.optimizers))
    if result.problems:
        raise MappingError(*result.problems)
    return _As(result.checkpoint, result.ledger, checkpoint)


def _as_counted(carried: Checkpoint, source: Checkpoint) -> Checkpoint:
    """The carried document with the source's own counters."""
    steps = {optimizer.name: optimizer.step for optimizer in source.optimizers}
    if len(carried.optimizers) == len(source.optimizers) == 1:
        steps[carried.optimizers[0].name] = source.optimizers[0].step
    optimizers = (replace(one, step=steps.get(one.name, one.step)) for one in carried.optimizers)
    return replace(carried, progress=source.progress, optimizers=tuple(optimizers))


def _compared(
    ours: _As, theirs: _As, tolerance: Tolerance, progress: Callable[[int, int], None] | None
) -> Iterator[TensorDifference | None]:
    """Of every array what is different, None where its bits are equal. I/O: streams all that both have."""
    mine, its = ours.arrays(), theirs.arrays(like=ours.checkpoint)
    kept = (ours.own(), theirs.own())
    done, total = 0, sum(tensor.spec.nbytes for address, tensor in its.items() if address in mine)
    for address in {**its, **mine}:
        name = place(address)
        reasons = [own.get(name) for own in kept]
        if "" in reasons:
            continue  # only the other's framework has it
        first = mine.get(address) if reasons[0] is None else None
        second = its.get(address) if reasons[1] is None else None
        if first is None or second is None:
            there = first if first is not None else second
            if there is not None:
                yield _alone(address, there, "only-second" if first is None else "only-first")
            continue
        done += second.spec.nbytes
        if progress is not None:
            progress(done, total)
        yield tensor_difference(address, first, second, tolerance)


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
