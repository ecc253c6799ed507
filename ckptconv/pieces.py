"""A document taken apart: parameters in pieces that match one to one, and all that optimizers hold for them.

A parameter of one library can be several of another. Both sides are taken apart until a piece of one is a
piece of the other, the pieces are transferred as parameters are, and the target's are put together again
(`joining`).
Slots follow by the algebra that holds for them:

- A `Cut` moves elements, so that every slot of the parameter's shape is cut alike, and what is one number per
  parameter holds for each piece. A slot of another shape (Adafactor's factors) is none of the pieces'.
- A `Sum` has one gradient for all its terms. A slot made of gradients is the same for each of them and is the
  sum's too; one made of values (`master`, averages) is summed as the values are.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from ckptconv.catalog.optimizer_rows import row
from ckptconv.catalog.wrappers import AVERAGE
from ckptconv.document import Checkpoint, Evidence, Optimizer, Param, Site, module_of
from ckptconv.ops import Add, Reshape, Slice
from ckptconv.tensor import MissingTensor, Op, TensorRef, TensorSpec

T = TypeVar("T")

MASTER = "master"
"""The slot that holds a parameter in higher precision than the model does."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """One part of a parameter, with what it is."""

    name: str
    size: int
    """Along the axis of the cut."""
    layer: str = "unknown"
    role: str = "unknown"
    axes: tuple[str, ...] | None = None
    evidence: Evidence = "unknown"
    part: str = ""
    """What its module is of several alike, as `Site.part`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cut:
    """A parameter as pieces along one axis; one piece is all of it under another name."""

    whole: str
    axis: int
    pieces: tuple[Piece, ...]
    within: tuple[int, ...] | None = None
    """The parameter's shape with the axis on its own, where it is part of another one."""

    def opened(self, shape: tuple[int, ...]) -> tuple[Reshape, ...]:
        """What gives a tensor of the parameter's shape the axis that is cut, where it has it not as it is."""
        return () if self.within is None or self.within == shape else (Reshape(shape, self.within),)

    @property
    def slices(self) -> tuple[Slice, ...]:
        """What makes each piece; nothing makes the only one."""
        ends = [sum(piece.size for piece in self.pieces[: i + 1]) for i in range(len(self.pieces))]
        return tuple(
            Slice(self.axis, end - piece.size, end) for piece, end in zip(self.pieces, ends, strict=True)
        )

    def of(self, tensor: TensorRef) -> tuple[TensorRef, ...]:
        """The pieces of a tensor of the parameter's shape."""
        if len(self.pieces) == 1:
            return (tensor,)
        for opening in self.opened(tensor.shape):
            tensor = _through(tensor, opening)
        return tuple(_through(tensor, op) for op in self.slices)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sum:
    """Parameters of one shape that act through their sum alone."""

    whole: Piece
    terms: tuple[str, ...]


Rewrite = Cut | Sum


def apart(checkpoint: Checkpoint, rewrites: Sequence[Rewrite]) -> Checkpoint:
    """The document with its parameters taken apart, one rewrite after the other. I/O: none."""
    cuts = [one for one in rewrites if isinstance(one, Cut)]
    sums = [one for one in rewrites if isinstance(one, Sum)]
    return _summed(_cut(checkpoint, cuts), sums)


def _through(tensor: TensorRef, op: Op) -> TensorRef:
    """The tensor after the op; one without values has none then either."""
    if isinstance(tensor, MissingTensor):
        return replace(tensor, spec=op.spec((tensor.spec,)))
    return tensor.apply(op)


def _cut(checkpoint: Checkpoint, cuts: Sequence[Cut]) -> Checkpoint:
    if not cuts:
        return checkpoint
    by_whole = {cut.whole: cut for cut in cuts}
    params: dict[str, Param] = {}
    for name, param in checkpoint.params.items():
        cut = by_whole.get(name)
        if cut is None:
            params[name] = replace(param, tied_to=_tied(param, by_whole, 0))
            continue
        for i, (piece, tensor) in enumerate(zip(cut.pieces, cut.of(param.tensor), strict=True)):
            known = piece.axes is not None
            params[piece.name] = replace(
                param,
                name=piece.name,
                tensor=tensor,
                layer=piece.layer if known else param.layer,
                role=piece.role if known else param.role,
                axes=piece.axes if known else param.axes if len(cut.pieces) == 1 else None,
                evidence=piece.evidence if known else param.evidence if len(cut.pieces) == 1 else "unknown",
                candidates=() if known or len(cut.pieces) > 1 else param.candidates,
                tied_to=_tied(param, by_whole, i),
            )
    optimizers = tuple(_optimizer_cut(one, by_whole, checkpoint.params) for one in checkpoint.optimizers)
    return replace(
        checkpoint, params=params, optimizers=optimizers, flow=tuple(_flow_cut(checkpoint.flow, by_whole))
    )


def _flow_cut(flow: Sequence[Site], cuts: Mapping[str, Cut]) -> Iterator[Site]:
    """The flow of the pieces: each stands where its parameter does, behind its own module's alone where the
    parameter stands behind another that is cut alike, as a bias does behind its kernel."""

    def pieces(name: str) -> tuple[Piece, ...]:
        return cuts[name].pieces if name in cuts else (Piece(name=name, size=0),)

    def before(piece: Piece, name: str) -> Iterator[str]:
        names = [other.name for other in pieces(name)]
        own = [other for other in names if module_of(other) == module_of(piece.name)]
        yield from own or names

    for site in flow:
        for piece in pieces(site.param):
            after = tuple(one for name in site.after for one in before(piece, name))
            yield replace(site, param=piece.name, after=after, part=piece.part or site.part)


def _tied(param: Param, by_whole: Mapping[str, Cut], position: int) -> str | None:
    """The name to which a piece is tied, where its parameter is tied to one that is cut."""
    cut = by_whole.get(param.tied_to or "")
    if cut is None:
        return param.tied_to
    return cut.pieces[min(position, len(cut.pieces) - 1)].name


def _optimizer_cut(optimizer: Optimizer, cuts: Mapping[str, Cut], params: Mapping[str, Param]) -> Optimizer:
    def pieces(name: str) -> tuple[str, ...]:
        return tuple(piece.name for piece in cuts[name].pieces) if name in cuts else (name,)

    def slot(by_param: Mapping[str, TensorRef]) -> Iterator[tuple[str, TensorRef]]:
        for name, tensor in by_param.items():
            cut = cuts.get(name)
            if cut is None:
                yield name, tensor
            elif tensor.shape == params[name].tensor.shape:
                yield from zip(pieces(name), cut.of(tensor), strict=True)
            elif tensor.spec.numel == 1 or len(cut.pieces) == 1:
                yield from ((piece, tensor) for piece in pieces(name))

    return replace(
        optimizer,
        groups=tuple(
            replace(group, params=tuple(piece for name in group.params for piece in pieces(name)))
            for group in optimizer.groups
        ),
        slots={name: dict(slot(by_param)) for name, by_param in optimizer.slots.items()},
        param_steps={piece: step for name, step in optimizer.param_steps.items() for piece in pieces(name)},
    )


def _summed(checkpoint: Checkpoint, sums: Sequence[Sum]) -> Checkpoint:
    if not sums:
        return checkpoint
    first = {one.terms[0]: one for one in sums}
    gone = {term for one in sums for term in one.terms}
    params: dict[str, Param] = {}
    for name, param in checkpoint.params.items():
        if name in first:
            one = first[name]
            flags = [checkpoint.params[term].trainable for term in one.terms]
            params[one.whole.name] = replace(
                param,
                name=one.whole.name,
                tensor=added([checkpoint.params[term].tensor for term in one.terms]),
                layer=one.whole.layer,
                role=one.whole.role,
                axes=one.whole.axes,
                evidence=one.whole.evidence,
                candidates=(),
                trainable=True if True in flags else None if None in flags else False,
            )
        elif name not in gone:
            params[name] = param
    optimizers = tuple(_optimizer_summed(one, sums, checkpoint) for one in checkpoint.optimizers)
    flow = tuple(_flow_summed(checkpoint.flow, {term: one.whole.name for one in sums for term in one.terms}))
    return replace(checkpoint, params=params, optimizers=optimizers, flow=flow)


def _flow_summed(flow: Sequence[Site], wholes: Mapping[str, str]) -> Iterator[Site]:
    """The flow with each sum in the place of its terms."""
    made: dict[str, Site] = {}
    for site in flow:
        name = wholes.get(site.param, site.param)
        known = made.get(name, replace(site, param=name, after=()))
        after = dict.fromkeys((*known.after, *(wholes.get(one, one) for one in site.after)))
        made[name] = replace(known, after=tuple(one for one in after if one != name))
    yield from made.values()


def added(tensors: Sequence[TensorRef]) -> TensorRef:
    """The sum, which is without values where one of them is."""
    first, *others = tensors
    missing = next((tensor for tensor in tensors if isinstance(tensor, MissingTensor)), None)
    return missing if missing is not None else first.apply(Add(), *others)


def trained(one: Sum, optimizer: Optimizer, params: Mapping[str, Param]) -> tuple[str, ...]:
    """The terms that an optimizer trains: of its groups, and not said to be frozen."""
    members = frozenset(optimizer.params)
    return tuple(term for term in one.terms if term in members and params[term].trainable is not False)


def of_values(optimizer: Optimizer, slot: str) -> bool:
    """Whether a slot is made of the parameter's values, and not of its gradients."""
    known = row(optimizer.algorithm, optimizer.framework)
    begins = known.slot_inits.get(slot) if known is not None else None
    return slot in (MASTER, AVERAGE) or begins == "param"


def _optimizer_summed(optimizer: Optimizer, sums: Sequence[Sum], checkpoint: Checkpoint) -> Optimizer:
    stands: dict[str, str] = {}
    gone: set[str] = set()
    for one in sums:
        having = trained(one, optimizer, checkpoint.params) or one.terms
        stands[having[0]] = one.whole.name
        gone.update(one.terms)

    def renamed(names: Iterable[str]) -> tuple[str, ...]:
        return tuple(stands.get(name, name) for name in names if name in stands or name not in gone)

    def by_name(values: Mapping[str, T]) -> dict[str, T]:
        return {stands.get(name, name): v for name, v in values.items() if name in stands or name not in gone}

    slots = {}
    for slot, by_param in optimizer.slots.items():
        slots[slot] = by_name(by_param)
        if of_values(optimizer, slot):
            for one in sums:
                parts = [by_param.get(term, checkpoint.params[term].tensor) for term in one.terms]
                if any(term in by_param for term in one.terms):
                    slots[slot].pop(one.whole.name, None)
                    if _alike(parts):
                        slots[slot][one.whole.name] = added(parts)
    return replace(
        optimizer,
        groups=tuple(replace(group, params=renamed(group.params)) for group in optimizer.groups),
        slots=slots,
        param_steps=by_name(optimizer.param_steps),
    )


def _alike(tensors: Sequence[TensorRef]) -> bool:
    specs: set[TensorSpec] = {tensor.spec for tensor in tensors}
    return len(specs) == 1
