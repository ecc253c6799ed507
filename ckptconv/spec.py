"""What a file does not record and a skeleton tells: axes, parameter order, class, hyperparameters."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

from ckptconv.catalog import completion
from ckptconv.catalog.flatten import tells_image
from ckptconv.catalog.optimizer_rows import row
from ckptconv.document import Checkpoint, Fact, Group, Known, Optimizer, Param, Schedule
from ckptconv.errors import MappingError, Problem
from ckptconv.rawtree import Lifted, Node, Path, transform
from ckptconv.supply import supplied

BY_SPEC, BY_TEMPLATE_SPEC = "source-spec", "template-spec"


def apply_spec(checkpoint: Checkpoint, spec: Checkpoint, who: str = BY_SPEC) -> Checkpoint:
    """The document completed from a skeleton of its model: axes, parameter order, class, hyperparameters.

    What the document records wins; the spec only fills what is unknown, and `who` is said to supply it.
    Raises: template-mismatch where the spec is of another model.
    """
    problems = _differences(checkpoint, spec)
    if problems:
        raise MappingError(*problems)
    params = {name: _with_layout(param, spec.params.get(name)) for name, param in checkpoint.params.items()}
    completed = replace(
        checkpoint,
        params=params,
        flow=checkpoint.flow or spec.flow,
        layer_settings={**spec.layer_settings, **checkpoint.layer_settings},
    )
    for optimizer in checkpoint.optimizers:
        other = _counterpart(optimizer, checkpoint, spec)
        if other is None:
            continue
        if optimizer.param_order == "unknown":
            names = dict(zip(optimizer.params, other.params, strict=True))
            completed = rename_optimizer_params(completed, optimizer.name, names)
        completed = replace(
            completed,
            optimizers=tuple(
                _completed(o, other, who) if o.name == optimizer.name else o for o in completed.optimizers
            ),
        )
    schedules = tuple(_scheduled(schedule, spec, who) for schedule in completed.schedules)
    completed = replace(completed, schedules=schedules or _beside(completed, spec))
    return supplied(completed, "layout, order and hyperparameters not recorded", who)


def _scheduled(schedule: Schedule, spec: Checkpoint, who: str) -> Schedule:
    """The schedule with the family and parameters that the spec tells and its file does not."""
    theirs = [other for other in spec.schedules if other.name == schedule.name]
    if len(spec.schedules) == 1:
        theirs = list(spec.schedules)
    if len(theirs) != 1 or schedule.family not in ("unknown", theirs[0].family):
        return schedule
    supplied: dict[str, Fact] = {
        name: Known(value=fact.value, status="supplied", source=who)
        for name, fact in theirs[0].parameters.items()
        if isinstance(fact, Known)
    }
    return replace(schedule, family=theirs[0].family, parameters={**supplied, **schedule.parameters})


def _beside(checkpoint: Checkpoint, spec: Checkpoint) -> tuple[Schedule, ...]:
    """The plateau of a callback, which no file of its framework holds."""
    if len(checkpoint.optimizers) != 1:
        return ()
    plateaus = [schedule for schedule in spec.schedules if schedule.family == "plateau"]
    return tuple(replace(schedule, optimizer=checkpoint.optimizers[0].name) for schedule in plateaus)


def _differences(checkpoint: Checkpoint, spec: Checkpoint) -> list[Problem]:
    problems = []
    for name, param in checkpoint.params.items():
        other = spec.params.get(name)
        if other is not None and other.tensor.shape != param.tensor.shape:
            problems.append(
                Problem(
                    code="template-mismatch",
                    loc=("params", name),
                    message=f"'{name}' is {list(param.tensor.shape)} in the source "
                    f"and {list(other.tensor.shape)} in the source spec",
                    hint="Describe the model that wrote the checkpoint.",
                )
            )
    if checkpoint.params and not set(checkpoint.params) & set(spec.params):
        problems.append(
            Problem(
                code="template-mismatch",
                loc=("params",),
                message="the source spec names none of the source's parameters",
                hint="Describe the model that wrote the checkpoint.",
            )
        )
    for optimizer in checkpoint.optimizers:
        other_one = _counterpart(optimizer, checkpoint, spec)
        if (
            optimizer.param_order == "unknown"
            and other_one is not None
            and len(other_one.params) != len(optimizer.params)
        ):
            problems.append(
                Problem(
                    code="template-mismatch",
                    loc=("optimizers", optimizer.name),
                    message=f"the optimizer has {len(optimizer.params)} parameters in the source "
                    f"and {len(other_one.params)} in the source spec",
                    hint="Describe the model and optimizer that wrote the checkpoint.",
                )
            )
        elif optimizer.param_order == "unknown" and other_one is not None:
            problems += _misfits(optimizer, other_one, checkpoint)
    return problems


def _misfits(optimizer: Optimizer, other: Optimizer, checkpoint: Checkpoint) -> Iterator[Problem]:
    """Slots that would not have the shape of the parameter that the spec's order gives them."""
    table = row(optimizer.algorithm, optimizer.framework)
    for slot, by_param in optimizer.slots.items():
        if table is None or table.slot_shapes.get(slot, "param") != "param":
            continue
        for number, name in zip(optimizer.params, other.params, strict=True):
            tensor, param = by_param.get(number), checkpoint.params.get(name)
            if tensor is not None and param is not None and tensor.shape != param.tensor.shape:
                yield Problem(
                    code="slots-mismatch",
                    loc=("optimizers", optimizer.name, slot, name),
                    message=f"parameter {number} is '{name}' in the source spec: its {slot} is "
                    f"{list(tensor.shape)}, the parameter {list(param.tensor.shape)}",
                    hint="Describe the model and optimizer that wrote the checkpoint.",
                )


def _counterpart(optimizer: Optimizer, checkpoint: Checkpoint, spec: Checkpoint) -> Optimizer | None:
    if len(checkpoint.optimizers) == len(spec.optimizers) == 1:
        return spec.optimizers[0]
    return next((o for o in spec.optimizers if o.name == optimizer.name), None)


def _with_layout(param: Param, other: Param | None) -> Param:
    if other is None or (param.evidence == "declared" and not tells_image(other.axes or ())):
        return param
    if param.evidence == "named" and other.evidence != "declared":
        return param
    trainable = other.trainable if param.trainable is None else param.trainable
    if other.axes is None:
        return replace(param, trainable=trainable)
    return replace(
        param,
        role=other.role,
        layer=other.layer,
        axes=other.axes,
        evidence=other.evidence,
        trainable=trainable,
    )


def _completed(optimizer: Optimizer, other: Optimizer, who: str) -> Optimizer:
    if optimizer.algorithm == "unknown" or len(optimizer.algorithm_candidates) > 1:
        fits = not optimizer.algorithm_candidates or other.algorithm in optimizer.algorithm_candidates
        if fits and other.algorithm != "unknown":
            optimizer = completion.as_algorithm(optimizer, other.algorithm)
    groups = []
    for position, group in enumerate(optimizer.groups):
        theirs: Group | None = other.groups[position] if position < len(other.groups) else None
        facts = dict(group.hyperparameters)
        for name, fact in (theirs.hyperparameters if theirs else {}).items():
            if isinstance(fact, Known) and not isinstance(facts.get(name), Known):
                facts[name] = Known(value=fact.value, status="supplied", source=who)
        groups.append(replace(group, hyperparameters=facts))
    return completion.with_form(replace(optimizer, groups=tuple(groups)))


def rename_optimizer_params(
    checkpoint: Checkpoint, optimizer_name: str, names: Mapping[str, str]
) -> Checkpoint:
    """The document in which an optimizer's parameters are called by other names, in its residue too."""

    def renamed(name: str) -> str:
        return names.get(name, name)

    def one(optimizer: Optimizer) -> Optimizer:
        if optimizer.name != optimizer_name:
            return optimizer
        return replace(
            optimizer,
            param_order="skeleton",
            param_steps={renamed(n): s for n, s in optimizer.param_steps.items()},
            slots={
                slot: {renamed(n): t for n, t in by_param.items()}
                for slot, by_param in optimizer.slots.items()
            },
            groups=tuple(replace(g, params=tuple(map(renamed, g.params))) for g in optimizer.groups),
        )

    def address(path: Path, node: Node) -> Node:
        if isinstance(node, Lifted):
            match node.to:
                case ("slot", str(name), slot, str(param)) if name == optimizer_name:
                    return replace(node, to=("slot", name, slot, renamed(param)))
                case ("param_step", str(name), str(param)) if name == optimizer_name:
                    return replace(node, to=("param_step", name, renamed(param)))
        return node

    residue = checkpoint.residue
    if residue is not None:
        residue = replace(residue, root=transform(residue.root, address))
    return replace(checkpoint, optimizers=tuple(map(one, checkpoint.optimizers)), residue=residue)
