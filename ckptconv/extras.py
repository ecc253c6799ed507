"""Arrays that are neither matched parameters nor slots: where the source's go, whence the target's come.

Between two checkpoints of one dialect an array goes where it was. Otherwise the source's stay behind and the
target has what its template has: counters of files, states of generators, metrics. A template that is a
skeleton has values only of what is small.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

from ckptconv.catalog import layers
from ckptconv.catalog.wrappers import EXTRA
from ckptconv.document import Block, Checkpoint, Param
from ckptconv.errors import Problem
from ckptconv.report import Entry
from ckptconv.tensor import FilledTensor, MissingTensor, TensorRef

_ARRAYS_ALONE = frozenset({"tensorflow", "torch-cpu", "torch-cuda"})
"""Libraries whose generators have their whole state in one array; others have numbers beside it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Extras:
    """The target's extra arrays, and the account."""

    tensors: Mapping[str, TensorRef]
    ledger: tuple[Entry, ...]
    problems: tuple[Problem, ...]


def undescribable(source: Checkpoint) -> Iterator[Problem]:
    """A loss for every parameter of the source that is no plain array: another file cannot hold it."""
    for block in source.described:
        yield Problem(
            code="state-dropped",
            loc=("params", block.name),
            message=f"'{block.name}' is no plain array ({block.library}); the target holds only plain ones",
            hint="Save the model with plain arrays (dequantize(), to_dense()), or --allow state-dropped.",
        )


def left_described(source: Checkpoint) -> Iterator[Entry]:
    """The account of the parameters that are no plain arrays, where leaving them behind was allowed."""
    for block in source.described:
        yield Entry(item=("param", block.name), fate="left", detail=block.library, allowed_by="state-dropped")


def _unfilled(template: Checkpoint) -> list[Problem]:
    return [
        Problem(
            code="param-unmatched",
            loc=("template", "params", block.name),
            message=f"the template's '{block.name}' is no plain array ({block.library}): nothing fills it",
            hint="Use a template of plain arrays, or --allow param-unmatched to keep the template's value.",
        )
        for block in template.described
    ]


def place_extras(
    source: Checkpoint, template: Checkpoint, params: Mapping[str, Param], allow: Collection[str] = ()
) -> Extras:
    """The template's extras, with the source's values where both are of one dialect.

    `params`: the target's. The average of one that no optimizer trains is the parameter itself.
    """
    carried = {key: source.extras[key] for key in _in_place(source, template)}
    ledger = [Entry(item=("extra", key), fate="copied", target=key) for key in carried]
    ledger += _left(source, carried)
    problems = [] if "state-dropped" in allow else list(undescribable(source))
    problems += [] if "param-unmatched" in allow else _unfilled(template)
    averages = {}
    for key, tensor in template.extras.items():
        if key in carried:
            continue
        param = params.get(key.removeprefix(EXTRA)) if key.startswith(EXTRA) else None
        if param is not None and param.tensor.spec == tensor.spec:
            averages[key] = param.tensor
            detail = "no optimizer trains it: its average is the parameter"
            ledger.append(Entry(item=("template", key), fate="created", target=key, detail=detail))
            continue
        ledger.append(kept_from_template(key))
        if isinstance(tensor, MissingTensor):
            problems.append(_no_value(("template", key), key))
    return Extras(
        tensors={**template.extras, **averages, **carried}, ledger=tuple(ledger), problems=tuple(problems)
    )


def kept_from_template(name: str) -> Entry:
    """The account of what the source cannot have."""
    return Entry(
        item=("template", name),
        fate="kept-from-template",
        target=name,
        detail="only the target's framework has it",
    )


def own_param(name: str, role: str, tensor: TensorRef) -> tuple[TensorRef, Entry, tuple[Problem, ...]]:
    """The value of a parameter that no source parameter makes: the template's, else its role's first one."""
    if not isinstance(tensor, MissingTensor):
        return tensor, kept_from_template(name), ()
    init = layers.initial_value(role)
    if init is None:
        return tensor, kept_from_template(name), (_no_value(("params", name), name),)
    created = Entry(
        item=("template", name),
        fate="created",
        target=name,
        detail=f"only the target's framework has it, the template holds no value; a new model has {init:g}",
    )
    return FilledTensor(spec=tensor.spec, value=init), created, ()


def _no_value(loc: tuple[str, str], name: str) -> Problem:
    return Problem(
        code="template-mismatch",
        loc=loc,
        message=f"the template is a skeleton and holds no value of '{name}', which the source cannot have",
        hint="Use the template's checkpoint itself, or make the skeleton again with write_skeleton().",
    )


def _in_place(source: Checkpoint, template: Checkpoint) -> Iterator[str]:
    """Extras that the template has at the same place, of the same type and shape."""
    theirs, own = source.provenance, template.provenance
    if (theirs.format, theirs.dialect) != (own.format, own.dialect):
        return
    in_parts = {
        key
        for block in (*source.rng, *source.data, *source.described)
        if block.library not in _ARRAYS_ALONE
        for key in block.tensors
    }
    for key, tensor in source.extras.items():
        place = template.extras.get(key)
        if place is not None and place.spec == tensor.spec and key not in in_parts:
            yield key


def _left(source: Checkpoint, carried: Mapping[str, TensorRef]) -> Iterator[Entry]:
    blocks: tuple[Block, ...] = (*source.rng, *source.data)
    for block in blocks:
        if block.tensors and all(key in carried for key in block.tensors):
            continue
        yield Entry(
            item=("residue", block.name),
            fate="left",
            detail=f"{block.library} state cannot change framework; --keep holds it for the way back",
        )
    yield from left_described(source)
    in_blocks = {key for block in (*blocks, *source.described) for key in block.tensors}
    for key in source.extras:
        if key not in in_blocks and key not in carried:
            yield Entry(
                item=("extra", key),
                fate="left",
                detail="the source's framework alone knows it; --keep holds it for the way back",
            )
