"""How the parameters of a document come apart for another library: the table applied."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from ckptconv.catalog import layers
from ckptconv.catalog.compounds import CutRow, cut_rows, family, home, sum_rows
from ckptconv.document import Checkpoint, Param
from ckptconv.errors import Problem
from ckptconv.fitting import parts
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
    ours = _without(_rewrites(source, frameworks[0]), ruled.source_names | ruled.source_only)
    theirs = _without(_rewrites(template, frameworks[1]), ruled.target_names | ruled.target_only)
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
                hint="Train a model with another layer.",
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


def _rewrites(checkpoint: Checkpoint, framework: str) -> Iterator[Rewrite]:
    rows = cut_rows(framework)
    homes = {name: home(framework, name) for name in checkpoint.params}
    shapes: dict[tuple[str, ...], dict[str, tuple[int, ...]]] = {}
    for name, at in homes.items():
        *owner, key = parts(at)
        shapes.setdefault(tuple(owner), {})[key] = checkpoint.params[name].tensor.shape

    def layer(param: Param) -> str:
        """The kind of a parameter's layer, told or the only one that fits."""
        if param.layer != "unknown":
            return param.layer
        *owner, key = parts(homes[param.name])
        found = layers.candidates(framework, key, param.tensor.shape, shapes[tuple(owner)])
        kinds = {candidate.kind for candidate in found}
        return kinds.pop() if len(kinds) == 1 else "unknown"

    known = dict.fromkeys(checkpoint.params)
    current = dict.fromkeys(checkpoint.params, "unknown")
    for name, param in checkpoint.params.items():
        kind = current[name] = layer(param)
        cut = next(
            (cut for row in rows if (cut := _cut(row, param, kind, framework, known)) is not None), None
        )
        if cut is None:
            continue
        known.update(dict.fromkeys(piece.name for piece in cut.pieces))
        current.update(dict.fromkeys((piece.name for piece in cut.pieces), current.pop(name)))
        yield cut
    yield from _sums(current, framework)


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
    for name in names:
        role = row.roles.get(parts(name)[-1], "unknown")
        axes = layers.axes_of(framework, kind, role, len(shape)) if kind is not None else None
        size = shape[row.axis] // len(names) if len(names) > 1 else 0
        if axes is None or kind is None:
            pieces.append(Piece(name=name, size=size))
        else:
            pieces.append(Piece(name=name, size=size, layer=kind, role=role, axes=axes, evidence="named"))
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
