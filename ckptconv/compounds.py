"""How the parameters of a document come apart for another library: the table applied.

A parameter that no layer of the catalog has, as a class token, is taken for a module of its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from ckptconv.catalog import layers
from ckptconv.catalog.compounds import CutRow, cut_rows, family, home, sum_rows
from ckptconv.document import Checkpoint, Param, module_of
from ckptconv.errors import Problem
from ckptconv.fitting import leaf_of, parts
from ckptconv.mapping_rules import Ruled
from ckptconv.pieces import Cut, Piece, Rewrite, Sum

_NO_RULES = Ruled()


def compounds(
    source: Checkpoint, template: Checkpoint, frameworks: tuple[str, str], ruled: Ruled = _NO_RULES
) -> tuple[tuple[Rewrite, ...], tuple[Rewrite, ...]]:
    """The rewrites of both sides: those of a mapping file, and the table's for what it does not name.

    The table has none between two checkpoints of one library.
    """
    if family(frameworks[0]) == family(frameworks[1]):
        return ruled.source_rewrites, ruled.target_rewrites
    sides = [_Apart(source, frameworks[0]), _Apart(template, frameworks[1])]
    common = frozenset.intersection(*(frozenset(map(leaf_of, side.alone)) for side in sides))
    ours, theirs = (
        (*side.rewrites, *_alone(side.alone, common), *(side.fused() if other.tells_projections else ()))
        for side, other in (sides, sides[::-1])
    )
    ours = tuple(_without(ours, ruled.source_names | ruled.source_only))
    theirs = tuple(_without(theirs, ruled.target_names | ruled.target_only))
    return (*ours, *ruled.source_rewrites), (*theirs, *ruled.target_rewrites)


def _without(rewrites: Iterable[Rewrite], names: frozenset[str]) -> Iterator[Rewrite]:
    """The rewrites that need none of the parameters."""
    gone = set(names)
    for one in rewrites:
        if isinstance(one, Cut) and one.whole in gone:
            gone.update(piece.name for piece in one.pieces)
        elif isinstance(one, Cut) or not gone.intersection(one.terms):
            yield one


def lacking(checkpoint: Checkpoint, framework: str) -> Iterator[Problem]:
    """Layers of which the other side's library has none that computes the same.

    Problems: form-mismatch; layout-ambiguous where one may be meant that it has.
    """
    other = family(framework)
    for name, param in checkpoint.params.items():
        told = layers.lacking(param.layer, other)
        if told is not None:
            yield Problem(
                code="form-mismatch",
                loc=("params", name),
                message=f"'{name}' is of a layer of kind {param.layer} that {other} does not have: {told}",
                hint="Train a model with another layer, or leave this one out: --exclude.",
            )
            continue
        for reading in param.candidates:
            told = layers.lacking(reading.layer, other)
            if told is not None:
                kinds = " or ".join(dict.fromkeys(each.layer for each in param.candidates))
                yield Problem(
                    code="layout-ambiguous",
                    loc=("params", name),
                    message=f"'{name}' is of a layer of kind {kinds}, and {other} has no {reading.layer}",
                    hint="Pass a skeleton of its model (describe()), or --allow assumed-layout.",
                )
                break


class _Apart:
    """One side: what its parameters come apart into, and which of them no layer has."""

    def __init__(self, checkpoint: Checkpoint, framework: str) -> None:
        self.rewrites: list[Rewrite] = []
        self.alone: list[str] = []
        """Parameters that no layer of the catalog has."""
        self._checkpoint = checkpoint
        self._framework = framework
        self._homes = {name: home(framework, name) for name in checkpoint.params}
        self._shapes: dict[tuple[str, ...], dict[str, tuple[int, ...]]] = {}
        for name, at in self._homes.items():
            *owner, key = parts(at)
            self._shapes.setdefault(tuple(owner), {})[key] = checkpoint.params[name].tensor.shape
        rows = cut_rows(framework)
        known = dict.fromkeys(checkpoint.params)
        current = dict.fromkeys(checkpoint.params, "unknown")
        for name, param in checkpoint.params.items():
            kinds = self._kinds(param)
            kind = current[name] = kinds.pop() if len(kinds) == 1 else "unknown"
            cut = next(
                (cut for row in rows if (cut := _cut(row, param, kind, framework, known)) is not None), None
            )
            if cut is None:
                if not kinds and kind == "unknown" and param.role == "unknown":
                    self.alone.append(name)
                continue
            known.update(dict.fromkeys(piece.name for piece in cut.pieces))
            current.update(dict.fromkeys((piece.name for piece in cut.pieces), current.pop(name)))
            self.rewrites.append(cut)
        self.rewrites += _sums(current, framework)

    @property
    def tells_projections(self) -> bool:
        """Whether query, key and value of some attention are parameters of their own, or have become so."""
        pieces = (piece for one in self.rewrites if isinstance(one, Cut) for piece in one.pieces)
        alone = {site.part for site in self._checkpoint.flow}.union(piece.part for piece in pieces)
        return any(part and "," not in part for part in alone)

    def fused(self) -> Iterator[Cut]:
        """Parameters of which a run tells that they make several projections, a piece for each."""
        told = {
            module_of(site.param): site.part.split(",") for site in self._checkpoint.flow if "," in site.part
        }
        gone = {one.whole for one in self.rewrites if isinstance(one, Cut)}
        for name, param in self._checkpoint.params.items():
            module = module_of(name)
            axes, count = param.axes or (), len(told.get(module, ()))
            axis = axes.index("out") if "out" in axes else None
            if name in gone or not count or axis is None or param.tensor.shape[axis] % count:
                continue
            size = param.tensor.shape[axis] // count
            pieces = (
                Piece(
                    name=f"{module}.{part}.{leaf_of(name)}",
                    size=size,
                    layer=param.layer,
                    role=param.role,
                    axes=axes,
                    evidence=param.evidence,
                    part=part,
                )
                for part in told[module]
            )
            yield Cut(whole=name, axis=axis, pieces=tuple(pieces))

    def _kinds(self, param: Param) -> set[str]:
        """The kinds of layers that a parameter may be of: the one that is told, or all that fit."""
        if param.layer != "unknown":
            return {param.layer}
        *owner, key = parts(self._homes[param.name])
        shape, siblings = param.tensor.shape, self._shapes[tuple(owner)]
        return {found.kind for found in layers.candidates(self._framework, key, shape, siblings)}


def _alone(names: Iterable[str], common: frozenset[str]) -> Iterator[Cut]:
    """Each parameter as a module of its own; by the last part of its name only where both sides have it."""
    for name in names:
        key = leaf_of(name) if leaf_of(name) in common else "value"
        yield Cut(whole=name, axis=0, pieces=(Piece(name=f"{name}/{key}", size=0),))


def _cut(row: CutRow, param: Param, layer: str, framework: str, known: Mapping[str, None]) -> Cut | None:
    """The parameter's pieces by a row of the table; None where the row does not mean it."""
    names = row.names(param.name, layer, known)
    shape = param.tensor.shape
    if not names or (len(names) > 1 and (row.axis >= len(shape) or shape[row.axis] % len(names))):
        return None
    if any(name in known and name != param.name for name in names):
        return None
    kind = row.kind_of(layer)
    pieces = []
    for name, part in zip(names, row.parts_of(param.name), strict=True):
        role = row.roles.get(parts(name)[-1], "unknown")
        axes = layers.axes_of(framework, kind, role, len(shape)) if kind is not None else None
        size = shape[row.axis] // len(names) if len(names) > 1 else 0
        if axes is None or kind is None:
            pieces.append(Piece(name=name, size=size, part=part))
        else:
            piece = Piece(name=name, size=size, layer=kind, role=role, axes=axes, evidence="named", part=part)
            pieces.append(piece)
    return Cut(whole=param.name, axis=row.axis, pieces=tuple(pieces))


def _sums(kinds: Mapping[str, str], framework: str) -> Iterator[Sum]:
    """`kinds`: name of each parameter, after the cuts, with its layer's kind."""
    for row in sum_rows(framework):
        for name, kind in kinds.items():
            if kind not in row.layers or not name.endswith(row.terms[0]):
                continue
            stem = name.removesuffix(row.terms[0])
            terms, whole = tuple(stem + term for term in row.terms), stem + row.whole
            if whole not in kinds and all(term in kinds for term in terms):
                axes = layers.axes_of(framework, kind, row.role, 1)
                piece = Piece(name=whole, size=0, layer=kind, role=row.role, axes=axes, evidence="named")
                yield Sum(whole=piece, terms=terms)
