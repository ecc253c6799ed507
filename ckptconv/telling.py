"""The account of a transfer of pieces in the words of the files: which slice of what, and where it went.

Ledger, problems and verdicts of a transfer speak of pieces; here they name the files' parameters again.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from ckptconv.catalog.findings import worst
from ckptconv.catalog.optimizer_rows import row
from ckptconv.document import Checkpoint, Optimizer
from ckptconv.errors import Problem
from ckptconv.ops import Add, Concat
from ckptconv.pieces import Cut, Rewrite, Sum, of_values, trained
from ckptconv.rawtree import Path
from ckptconv.report import Entry, OptimizerVerdict

Steps = tuple[Mapping[str, object], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Side:
    """One document, and how it was taken apart."""

    whole: Checkpoint
    rewrites: tuple[Rewrite, ...]
    made: Mapping[str, tuple[Rewrite, int]] = field(init=False)
    """Name of a piece -> the rewrite that made it, and which of its pieces it is."""

    def __post_init__(self) -> None:
        made: dict[str, tuple[Rewrite, int]] = {}
        for one in self.rewrites:
            if isinstance(one, Sum):
                made[one.whole.name] = (one, 0)
            else:
                made.update((piece.name, (one, i)) for i, piece in enumerate(one.pieces))
        object.__setattr__(self, "made", made)

    @property
    def cuts(self) -> tuple[Cut, ...]:
        """The parameters that are several on the other side."""
        return tuple(one for one in self.rewrites if isinstance(one, Cut) and len(one.pieces) > 1)

    @property
    def sums(self) -> tuple[Sum, ...]:
        return tuple(one for one in self.rewrites if isinstance(one, Sum))

    def file_name(self, name: str) -> str:
        """The parameter of the file that a piece belongs to: of a sum its first term's."""
        while name in self.made:
            one, _ = self.made[name]
            origin = one.terms[0] if isinstance(one, Sum) else one.whole
            if origin == name:
                break
            name = origin
        return name

    def trained(self, one: Sum, optimizer: Optimizer) -> tuple[str, ...]:
        """The terms of a sum, under its names for them, that an optimizer of the file trains."""
        named = {self.file_name(term): term for term in one.terms}
        own = trained(replace(one, terms=tuple(named)), optimizer, self.whole.params)
        return tuple(named[name] for name in own)


def told(problem: Problem, sides: Sequence[Side]) -> Problem:
    """The problem in the names of the files."""
    message, loc = problem.message, list(problem.loc)
    for side in sides:
        for i, step in enumerate(loc):
            if isinstance(step, str) and step in side.made:
                name = side.file_name(step)
                message = message.replace(f"'{step}'", f"'{name}'")
                loc[i] = name
    return replace(problem, loc=tuple(loc), message=message)


def entries(ledger: Sequence[Entry], source: Side, target: Side) -> Iterator[Entry]:
    """The ledger in the names of the files, and what of the target's sums no item of the source makes."""
    for entry in ledger:
        place, after = _place(entry, target)
        for item, before in _origins(entry.item, source):
            if before is None:
                detail = "its gradient is that of the bias beside it, whose state stands for both"
                yield replace(entry, item=item, target=place, ops=(), fate="aliased", detail=detail)
                continue
            ops = (*before, *entry.ops, *after)
            fate = "transformed" if ops and entry.fate == "copied" else entry.fate
            yield replace(entry, item=item, target=place, ops=ops, fate=fate)
    for one in target.sums:
        first, *others = (target.file_name(term) for term in one.terms)
        for name in others:
            detail = f"0: '{first}' holds the sum"
            yield Entry(item=("template", name), fate="created", target=name, detail=detail)


def _origins(item: Path, source: Side) -> Iterator[tuple[Path, Steps | None]]:
    """The file's items that an item of pieces is, with what makes it of each; None: nothing of it."""
    made = source.made.get(str(item[-1])) if item[0] in ("param", "slot", "param_step") else None
    if made is None:
        yield item, ()
        return
    one, position = made
    if isinstance(one, Cut):
        opened = one.opened(source.whole.params[one.whole].tensor.shape)
        steps = (*(op.to_json() for op in opened), one.slices[position].to_json())
        yield (*item[:-1], one.whole), steps if len(one.pieces) > 1 else ()
        return
    gradient = item[0] == "slot" and not of_values(source.whole.optimizer(str(item[1])), str(item[2]))
    for i, term in enumerate(one.terms):
        for inner, before in _origins((*item[:-1], term), source):
            if not gradient:
                yield inner, (*(before or ()), Add().to_json())
            else:
                yield inner, before if i == 0 else None


def _place(entry: Entry, target: Side) -> tuple[str, Steps]:
    """The entry's target in the file, and what puts a piece in its place there."""
    name, slot = entry.target, ""
    if name not in target.made:
        name, _, slot = entry.target.rpartition("/")
    made = target.made.get(name)
    if made is None:
        return entry.target, ()
    one, position = made
    whole = target.file_name(name)
    ops: Steps = ()
    if isinstance(one, Cut) and len(one.pieces) > 1:
        closed = (op.inverse().to_json() for op in one.opened(target.whole.params[one.whole].tensor.shape))
        ops = ({**Concat(one.axis).to_json(), "part": position, "of": len(one.pieces)}, *closed)
    return f"{whole}/{slot}" if slot else whole, ops


def judged(verdict: OptimizerVerdict, source: Side, target: Side, allowed: Sequence[str]) -> OptimizerVerdict:
    """The verdict with what taking apart and joining changes of the update rule."""
    residuals = list(allowed)
    result = worst(verdict.verdict, "lossy") if residuals else verdict.verdict
    for side in (source, target):
        for optimizer in side.whole.optimizers:
            alone = side is target or len(side.whole.optimizers) == 1
            if not alone and optimizer.name != verdict.optimizer:
                continue
            for text in (*_twice(side, optimizer), *_whole_tensors(side, optimizer)):
                residuals.append(text)
                result = worst(result, "approximate")
    return replace(verdict, verdict=result, residuals=(*verdict.residuals, *dict.fromkeys(residuals)))


def _twice(side: Side, optimizer: Optimizer) -> Iterator[str]:
    """Sums of which more than one term is trained: they move as many times as fast."""
    many = [one for one in side.sums if len(side.trained(one, optimizer)) > 1]
    if many:
        names = " and ".join(f"'{side.file_name(term)}'" for term in many[0].terms)
        more = f" and those of {len(many) - 1} cells more" if len(many) > 1 else ""
        yield (
            f"torch trains both {names}{more}: their sum moves twice as fast as the one bias of Keras; "
            "ckptconv.pytorch.freeze_recurrent_bias(model), called before the optimizer is made, trains one"
        )


def _whole_tensors(side: Side, optimizer: Optimizer) -> Iterator[str]:
    """Rules whose update of an element depends on its whole tensor, which is another on the other side."""
    known = row(optimizer.algorithm, optimizer.framework)
    members = frozenset(optimizer.params)
    divided = [cut for cut in side.cuts if cut.whole in members]
    if known is not None and known.whole_tensor and divided:
        cut = divided[0]
        yield f"'{cut.whole}' is {len(cut.pieces)} tensors on the other side: {known.whole_tensor}"
