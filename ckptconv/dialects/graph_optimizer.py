"""An optimizer of an object graph as the document has it: algorithm, slots, hyperparameters, step."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from ckptconv.catalog.optimizers import Row, algorithms, infer, row, shape_of_slot
from ckptconv.dialects.graph_bundle import Bundle
from ckptconv.dialects.graph_model import Place
from ckptconv.dialects.keras_layers import Reading
from ckptconv.dialects.keras_optimizers import OptimizerNode
from ckptconv.document import Fact, Group, Known, Optimizer, Schedule, Unknown, Value, value_of

STATISTICS = frozenset(
    {"moving_mean", "moving_variance", "batch_count", "data_mean", "data_variance", "data_count"}
)
"""Roles that no optimizer trains."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LiftedOptimizer:
    """An optimizer with what it brings along."""

    optimizer: Optimizer
    schedule: Schedule | None = None
    oddities: tuple[str, ...] = ()


def lift_optimizer(
    bundle: Bundle,
    node: OptimizerNode,
    nodes: Sequence[OptimizerNode],
    named: Mapping[Place, str],
    params: Sequence[int],
    read: Mapping[int, Reading],
) -> LiftedOptimizer:
    """One optimizer of the `nodes`, its slots by the names of their parameters."""
    name = "optimizer" if len(nodes) == 1 else "/".join(node.path)
    candidates = _candidates(bundle, node)
    rows = [
        found for found in (row(candidate, node.generation) for candidate in candidates) if found is not None
    ]
    slots = {}
    named_slots = [(_canonical(rows, one, by_variable=node.named_slots), one) for one in node.slots]
    held = {**{slot: node.slots[native] for slot, native in named_slots}, **node.around}
    for slot, pairs in held.items():
        kind = rows[0].slot_shapes.get(slot, "param") if len(rows) == 1 else "param"
        # Adafactor keeps for a matrix, too, what it reads of vectors alone.
        pairs = tuple(p for p in pairs if shape_of_slot(kind, bundle.tensor(p[0]).shape) is not None)
        slots[slot] = {named[variable]: bundle.tensor(state) for variable, state in pairs}
        for variable, state in pairs:
            bundle.take(state, ("slot", name, slot, named[variable]))
    variables = node.variables or tuple(v for v in params if read[v].role not in STATISTICS)
    scalars = _scalars(bundle, node, name, rows)
    hyperparameters, schedule = _hyperparameters(bundle, node, name, rows)
    step, accumulating = _step(bundle, node, name, alone=len(nodes) == 1)
    algorithm = candidates[0] if len(candidates) == 1 else "unknown"
    form: dict[str, str] = {}
    if len(candidates) == 1 and rows:
        values = {key: value_of(fact) for key, fact in hyperparameters.items()}
        form = rows[0].form({key: value for key, value in values.items() if value is not None})
    oddities = []
    if accumulating:
        oddities.append(
            f"'{name}' accumulates gradients: its counter counts batches, not updates, and the "
            "number of batches per update is not in the file"
        )
    if node.order == "declaration-order":
        oddities.append(f"variables of one name share '{name}': their slots are matched by order")
    return LiftedOptimizer(
        optimizer=Optimizer(
            name=name,
            algorithm=algorithm,
            algorithm_candidates=candidates if len(candidates) > 1 else (),
            framework=node.generation,
            form=form,
            step=step,
            groups=(Group(params=tuple(named[v] for v in variables), hyperparameters=hyperparameters),),
            slots=slots,
            scalars=scalars,
            param_order=node.order if node.variables else "unknown",
        ),
        schedule=schedule,
        oddities=tuple(oddities),
    )


def _candidates(bundle: Bundle, node: OptimizerNode) -> tuple[str, ...]:
    """The catalog's algorithms that could have made this state."""
    table = {name: found for name in algorithms() if (found := row(name, node.generation)) is not None}
    if not node.built:
        return tuple(name for name, found in table.items() if found.is_called(node.scope or ""))
    hyperparameters: dict[str, Value] = {edge: bundle.number(child) for edge, child in node.scalars.items()}
    if node.generation == "tf_keras_legacy" and node.learning_rate is not None:
        hyperparameters["learning_rate"] = bundle.number(node.learning_rate)
    if not node.named_slots:
        known = {key for found in table.values() for key in found.slots.values()}
        lists = frozenset(
            (
                *(edge for edge in node.lists if edge in known or edge in node.slots),
                *_scalar_places(node, table.values()),
            )
        )
        fits = infer(node.generation, lists, hyperparameters, node.scope)
        named = tuple(
            name for name in fits if name in table and node.slot_names <= _variable_names(table[name])
        )
        return named if node.slot_names and named else fits
    result: dict[str, None] = {}
    for found in table.values():
        keys = {
            found.slots[slot] for slot, variable in found.slot_variables.items() if variable in node.slots
        }
        if len(keys) == len(node.slots):
            keys |= set(_scalar_places(node, table.values()))
            fits = infer(node.generation, frozenset(keys), hyperparameters, node.scope)
            result.update(dict.fromkeys(name for name in fits if name in table))
    return tuple(result)


def _scalar_places(node: OptimizerNode, rows: Iterable[Row]) -> dict[str, int]:
    """Edge -> variable of the numbers that an optimizer keeps once and that are no hyperparameters."""
    known = {key for found in rows for key in found.scalars.values()}
    legacy = {edge: variable for edge, variable in node.scalars.items() if edge in known}
    return {**legacy, **node.scalar_state}


def _scalars(bundle: Bundle, node: OptimizerNode, name: str, rows: Sequence[Row]) -> dict[str, Fact]:
    """Numbers beside the step that the rule reads (Nadam's product of momenta)."""
    places = _scalar_places(node, rows)
    facts: dict[str, Fact] = {}
    for scalar, key in {s: k for found in rows for s, k in found.scalars.items()}.items():
        if key in places:
            facts[scalar] = Known(value=bundle.number(places[key]), source=bundle.source(places[key]))
            bundle.take_number(places[key], ("scalar", name, scalar))
    return facts


def _variable_names(found: Row) -> frozenset[str]:
    return frozenset(found.slot_variables.values())


def _canonical(rows: Sequence[Row], native: str, *, by_variable: bool) -> str:
    """The catalog's name of a slot; its own where no row knows it."""
    for found in rows:
        names = found.slot_variables if by_variable else found.slots
        for slot, key in names.items():
            if key == native:
                return slot
    return native


def _hyperparameters(
    bundle: Bundle, node: OptimizerNode, name: str, rows: Sequence[Row]
) -> tuple[dict[str, Fact], Schedule | None]:
    scalars = _scalar_places(node, rows)
    places = {edge: variable for edge, variable in node.scalars.items() if edge not in scalars}
    if node.learning_rate is not None:
        edge = "learning_rate" if node.generation == "tf_keras_legacy" else "_learning_rate"
        places[edge] = node.learning_rate
    canonical = {"learning_rate": "learning_rate", "_learning_rate": "learning_rate"}
    for found in rows:
        canonical.update(
            {hyper.key: key for key, hyper in found.hyperparameters.items() if hyper.key is not None}
        )
    facts: dict[str, Fact] = {}
    for edge, variable in places.items():
        key = canonical.get(edge, edge)
        facts[key] = Known(value=bundle.number(variable), source=bundle.source(variable))
        bundle.take_number(variable, ("hyperparameter", name, 0, key))
    if "learning_rate" in facts or not node.built:
        return facts, None
    facts["learning_rate"] = Unknown(
        reason="the optimizer follows a schedule, which the checkpoint does not hold"
    )
    position: Fact = Unknown(reason="the optimizer has no counter")
    if node.step is not None:
        position = Known(value=bundle.number(node.step), source=bundle.source(node.step))
    schedule = Schedule(
        name=f"{name}.learning_rate",
        family="unknown",
        position=position,
        unit="micro-step" if node.accumulates else "update",
        optimizer=name,
    )
    return facts, schedule


def _step(bundle: Bundle, node: OptimizerNode, name: str, *, alone: bool) -> tuple[Fact, bool]:
    """The optimizer's own counter, and whether it counts batches of an accumulation instead of updates."""
    if node.step is None:
        return Unknown(reason="the optimizer has made no variables yet: it has not done an update"), False
    value = bundle.number(node.step)
    if node.accumulates:
        if alone:
            bundle.take_number(node.step, ("progress", "micro_steps"))
        return Unknown(
            reason=f"'{bundle.source(node.step)}' is {value} batches; batches per update are not stored"
        ), True
    bundle.take_number(node.step, ("step", name), was=value)
    return Known(value=value, source=bundle.source(node.step)), False
