"""Weights that a layer makes of others in each of its runs, for a library that has no such layer.

torch's weight norm trains a direction and a length, its spectral norm divides by a singular value. The weight
that they make now computes the same; what is trained on from it is another rule, and what the optimizer holds
for the parts has no place in it. So they are folded only where the caller allows `form-mismatch`, and into a
target with an optimizer where `slots-missing` is allowed too.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from ckptconv.catalog import layers
from ckptconv.catalog.compounds import family, reparametrized_rows
from ckptconv.catalog.findings import worst
from ckptconv.document import Checkpoint, Optimizer, Param, Site, module_of
from ckptconv.errors import MappingError, Problem
from ckptconv.ops import SpectralNorm, WeightNorm
from ckptconv.report import Entry, OptimizerVerdict
from ckptconv.tensor import MissingTensor, Op, TensorRef, TensorSpec

FOLDED = "form-mismatch"
"""The loss code that lets a reparametrized weight be folded."""

_WHAT = {"weight_norm": "weight normalization", "spectral_norm": "spectral normalization"}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Fold:
    whole: str
    terms: tuple[str, ...]
    rule: str
    op: Op
    open: bool
    """Whether another op of the rule would do, and nothing tells which it is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Folded:
    """A document with its weights as its layers compute with them."""

    checkpoint: Checkpoint
    folds: tuple[_Fold, ...] = ()
    problems: tuple[Problem, ...] = ()

    def accounted(self, ledger: Sequence[Entry], file: Checkpoint) -> Iterator[Entry]:
        """The ledger in the names of the file, with what its optimizers held for the parts."""
        made = {fold.whole: fold for fold in self.folds}
        for entry in ledger:
            fold = made.get(str(entry.item[-1])) if entry.item[0] == "param" else None
            if fold is None:
                yield entry
                continue
            step = fold.op.to_json()
            for term in fold.terms:
                yield replace(entry, item=("param", term), ops=(step, *entry.ops), fate="transformed")
        for optimizer in file.optimizers:
            for slot, by_param in optimizer.slots.items():
                for fold in self.folds:
                    detail = f"{_WHAT[fold.rule]} makes '{fold.whole}' of it, which its slots cannot follow"
                    for term in (term for term in fold.terms if term in by_param):
                        item = ("slot", optimizer.name, slot, term)
                        yield Entry(item=item, fate="left", detail=detail, allowed_by=FOLDED)

    def judged(self, verdict: OptimizerVerdict, file: Checkpoint) -> OptimizerVerdict:
        """The verdict with what begins anew."""
        begun = [name for one in file.optimizers for name, _ in _held(self.folds, one)]
        if not begun:
            return verdict
        more = f" and {len(begun) - 1} more" if len(begun) > 1 else ""
        text = (
            f"'{begun[0]}'{more} trains on as a plain weight, without what the optimizer held for its parts"
        )
        return replace(verdict, verdict=worst(verdict.verdict, "lossy"), residuals=(*verdict.residuals, text))


def _held(folds: Sequence[_Fold], optimizer: Optimizer) -> Iterator[tuple[str, str]]:
    """Each folded weight for whose parts the optimizer holds something, and the first such part."""
    held = {name for by_param in optimizer.slots.values() for name in by_param}
    for fold in folds:
        term = next((term for term in fold.terms if term in held), None)
        if term is not None:
            yield fold.whole, term


def folded(checkpoint: Checkpoint, template: Checkpoint, framework: str, other: str) -> Folded:
    """The document, folded where the other framework's library has no such layers. I/O: none.

    Problems: form-mismatch, for each weight; slots-missing where the target's optimizer trains it on;
    layout-ambiguous where a matrix of a kernel may be either way.
    """
    if family(framework) == family(other):
        return Folded(checkpoint=checkpoint)
    folds = tuple(_folds(checkpoint.params, framework))
    problems = [
        Problem(
            code="form-mismatch",
            loc=("params", fold.terms[0]),
            message=f"'{fold.whole}' is made of {len(fold.terms)} arrays by {_WHAT[fold.rule]}, which "
            f"{family(other)} does not have in this form",
            hint=f"--allow {FOLDED} folds them into one kernel: outputs are equal, it trains on without, and "
            "its optimizer's state stays behind.",
        )
        for fold in folds
    ]
    problems += (
        Problem(
            code="slots-missing",
            loc=("optimizers", optimizer.name, term),
            message=f"what '{optimizer.name}' holds for '{term}' is of none that '{whole}' has",
            hint="Use a template without an optimizer, or --allow slots-missing.",
        )
        for optimizer in checkpoint.optimizers
        for whole, term in _held(folds, optimizer)
        if any(one.slots for one in template.optimizers)
    )
    problems += (
        Problem(
            code="layout-ambiguous",
            loc=("params", fold.terms[0]),
            message=f"'{fold.terms[0]}' may be of a convolution or of a transposed one, whose outputs stand "
            "along another axis, and the shape does not tell which",
            hint="Pass --source-spec with a skeleton of the source model (describe()), or "
            "--allow assumed-layout to take the first.",
        )
        for fold in folds
        if fold.open
    )
    return Folded(checkpoint=_plain(checkpoint, folds, framework), folds=folds, problems=tuple(problems))


def unfoldable(template: Checkpoint, framework: str, other: str) -> Iterator[Problem]:
    """Weights of the target that would have to be taken apart.

    Problems: template-mismatch.
    """
    if family(framework) == family(other):
        return
    for fold in _folds(template.params, framework):
        yield Problem(
            code="template-mismatch",
            loc=("params", fold.terms[0]),
            message=f"'{fold.whole}' of the template is made of {len(fold.terms)} arrays by "
            f"{_WHAT[fold.rule]}, which {family(other)} does not have in this form",
            hint="Convert onto the model without it, load that, and apply the normalization to it then: it "
            "begins with the same weight.",
        )


def _folds(params: Mapping[str, Param], framework: str) -> Iterator[_Fold]:
    rows = reparametrized_rows(framework)
    for name in params:
        for row in rows:
            found = row.names(name, params)
            ops = _ops(row.rule, *found, params) if found is not None else ()
            if found is not None and ops:
                yield _Fold(whole=found[0], terms=found[1], rule=row.rule, op=ops[0], open=len(ops) > 1)
                break


def _ops(rule: str, whole: str, terms: Sequence[str], params: Mapping[str, Param]) -> tuple[Op, ...]:
    """The ops of the rule that fit; none where these are arrays of other meaning."""
    specs = tuple(params[term].tensor.spec for term in terms)
    # torch takes the axis of the outputs for the rows, which transposed convolutions have second.
    kinds = {params[name].layer for name in params if module_of(name) == module_of(whole)} - {"unknown"}
    axes = [1] if any("transpose" in kind for kind in kinds) else [0] if kinds else [0, 1]
    ops: dict[str, list[Op]] = {
        "weight_norm": [WeightNorm()],
        "spectral_norm": [SpectralNorm(axis) for axis in axes[: max(len(specs[0].shape) - 1, 1)]],
    }
    return tuple(op for op in ops[rule] if _fits(op, specs))


def _fits(op: Op, specs: tuple[TensorSpec, ...]) -> bool:
    try:
        op.spec(specs)
    except MappingError:
        return False
    return True


def _plain(checkpoint: Checkpoint, folds: Sequence[_Fold], framework: str) -> Checkpoint:
    if not folds:
        return checkpoint
    first = {fold.terms[0]: fold for fold in folds}
    whole = {term: fold.whole for fold in folds for term in fold.terms}
    params: dict[str, Param] = {}
    for name, param in checkpoint.params.items():
        if name in first:
            params[first[name].whole] = _made(first[name], checkpoint.params, framework)
        elif name not in whole:
            params[name] = param

    def renamed(names: Iterable[str]) -> tuple[str, ...]:
        return tuple(dict.fromkeys(whole.get(name, name) for name in names))

    def optimizer(one: Optimizer) -> Optimizer:
        return replace(
            one,
            groups=tuple(replace(group, params=renamed(group.params)) for group in one.groups),
            slots={s: {n: t for n, t in by.items() if n not in whole} for s, by in one.slots.items()},
            param_steps={whole.get(name, name): step for name, step in one.param_steps.items()},
        )

    flow: dict[str, Site] = {}
    for site in checkpoint.flow:
        name = whole.get(site.param, site.param)
        after = tuple(one for one in renamed(site.after) if one != name)
        flow.setdefault(name, replace(site, param=name, after=after))
    return replace(
        checkpoint,
        params=params,
        optimizers=tuple(map(optimizer, checkpoint.optimizers)),
        flow=tuple(flow.values()),
    )


def _made(fold: _Fold, params: Mapping[str, Param], framework: str) -> Param:
    """The weight, of the kind of layer that its module's other parameters are of."""
    terms = [params[term].tensor for term in fold.terms]
    spec = fold.op.spec(tuple(tensor.spec for tensor in terms))
    missing = any(isinstance(tensor, MissingTensor) for tensor in terms)
    tensor: TensorRef = MissingTensor(spec=spec, name=fold.whole)
    if not missing:
        tensor = terms[0].apply(fold.op, *terms[1:])
    made = Param(name=fold.whole, tensor=tensor, trainable=params[fold.terms[0]].trainable)
    for name, param in params.items():
        if module_of(name) == module_of(fold.whole) and param.evidence in ("declared", "named"):
            key = fold.whole.removeprefix(module_of(fold.whole)).lstrip(".")
            layout = layers.declared(framework, param.layer, key, spec.shape)
            if layout is not None:
                role, axes = layout
                return replace(made, layer=param.layer, role=role, axes=axes, evidence=param.evidence)
    return made
