"""From the bundle of a TensorFlow object graph to the document: shared by its four dialects.

Nothing is named by its key; everything by where the graph's edges put it. What no rule knows stays as an
extra array under its key. The graph itself stays in the residue, as the bytes that were read.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from ckptconv.catalog.optimizers import Row, algorithms, infer, row
from ckptconv.dialects.graph_model import (
    ModelVariables,
    Place,
    aliases,
    model_variables,
    param_names,
    readings,
    with_untracked,
)
from ckptconv.dialects.graph_progress import progress_of, user_counters
from ckptconv.dialects.keras_layers import Reading
from ckptconv.dialects.keras_optimizers import OptimizerNode, optimizer_nodes, optimizers
from ckptconv.dialects.object_paths import Graph, Reach, reach
from ckptconv.dialects.residue import Lifter
from ckptconv.document import (
    Block,
    Checkpoint,
    Fact,
    Group,
    Known,
    Optimizer,
    Param,
    Provenance,
    Residue,
    Schedule,
    Unknown,
    Value,
    value_of,
)
from ckptconv.errors import FormatError
from ckptconv.formats.object_graph import ATTRIBUTES, OBJECT_GRAPH_KEY, ObjectGraph
from ckptconv.formats.string_tensor import read_strings
from ckptconv.rawtree import DictNode, RawTree
from ckptconv.tensor import TensorRef

STATISTICS = frozenset({"moving_mean", "moving_variance", "batch_count"})
"""Roles that no optimizer trains."""

_LAYERS_OF = {"keras3": "keras3", "tf_keras": "tf_keras", "tf_keras_legacy": "tf_keras"}


def graph_bytes(raw: RawTree) -> bytes | None:
    """The serialized object graph of a bundle; None in a name-based one."""
    if not isinstance(raw.root, DictNode):
        return None
    node = raw.root.get(OBJECT_GRAPH_KEY)
    if not isinstance(node, TensorRef) or node.dtype.name != "string" or node.spec.numel != 1:
        return None
    return read_strings(node, (OBJECT_GRAPH_KEY,))[0]


@lru_cache(maxsize=2)
def graph_of_bytes(data: bytes) -> Graph:
    """The object graph that these bytes are; each dialect that is asked sees the same one."""
    return Graph(ObjectGraph.parse(data))


def graph_of(raw: RawTree) -> Graph | None:
    """The object graph of a bundle; None in a name-based one."""
    data = graph_bytes(raw)
    return None if data is None else graph_of_bytes(data)


@dataclass(slots=True)
class _Bundle:
    """A bundle while it is lifted."""

    raw: RawTree
    graph: Graph
    tensors: Mapping[str, TensorRef]
    lifter: Lifter
    taken: set[str]

    def tensor(self, node: int) -> TensorRef:
        return self.tensors[self.graph.variables[node].key]

    def key(self, node: int) -> str:
        return self.graph.variables[node].key

    def source(self, node: int) -> str:
        """The key as it is cited: without the suffix that all have."""
        return self.key(node).partition(ATTRIBUTES)[0]

    def take(
        self, node: int, to: tuple[str | int, ...], **encoding: str | int | float | tuple[int, ...]
    ) -> None:
        key = self.key(node)
        self.taken.add(key)
        self.lifter.take((key,), to, **encoding)

    def take_number(self, node: int, to: tuple[str | int, ...], **more: int | float) -> None:
        """Lift a counter or a hyperparameter that stands in a variable."""
        tensor = self.tensor(node)
        self.take(node, to, **{"as": "tensor", "dtype": tensor.dtype.name, "shape": tensor.shape, **more})

    def number(self, node: int) -> int | float:
        """The value of a variable that holds one number.

        Raises: corrupt-file where it holds something else.
        """
        tensor = self.tensor(node)
        if tensor.spec.numel != 1 or tensor.dtype.kind not in ("int", "uint", "float"):
            raise FormatError.of(
                "corrupt-file",
                f"'{self.key(node)}' is {tensor.dtype.name} {list(tensor.shape)}, expected one number",
                "Save the checkpoint again.",
                loc=(self.key(node),),
            )
        value = tensor.read().reshape(-1)[0]
        return float(value) if tensor.dtype.kind == "float" else int(value)


def lift(raw: RawTree, dialect: str, evidence: str, layers: str | None = None) -> Checkpoint:
    """The document of a bundle with an object graph.

    `layers`: column of the layer catalog; None: that of the optimizer's generation, or no layers at all.
    I/O: reads the object graph and the counters.
    Raises: unknown-dialect without an object graph; reference-broken, corrupt-file, order-ambiguous.
    """
    bundle, data = _open(raw)
    graph = bundle.graph
    shapes = {node: bundle.tensor(node).shape for node in graph.variables}
    found = reach(graph, frozenset(optimizer_nodes(graph)))
    sorted_out = model_variables(graph, found)
    nodes = optimizers(graph, sorted_out.params, shapes)
    trained = {variable for node in nodes for variable in node.variables}
    sorted_out = _claimed(sorted_out, trained)
    params = with_untracked(sorted_out.params, nodes)
    others = aliases(graph, found, params)
    named = param_names(graph, found, params, others, nodes)
    column = layers or (_LAYERS_OF[nodes[0].generation] if nodes else None)
    read = dict.fromkeys(params, Reading())
    if column is not None:
        read = readings(graph, found, params, named, shapes, column)
    documents = _params(bundle, params, others, named, read, trained, nodes)
    lifted = [_optimizer(bundle, node, nodes, named, params, read) for node in nodes]
    progress = progress_of(bundle, nodes, [one.optimizer for one in lifted])
    user = user_counters(bundle, [one.optimizer for one in lifted], sorted_out.user)
    extras = _extras(bundle)
    blocks = tuple(
        Block(name=bundle.source(node), library="tensorflow", tensors=(bundle.key(node),))
        for node in sorted_out.generators
    )
    root = bundle.lifter.residue()
    assert isinstance(root, DictNode)
    items = tuple((key, data if key == OBJECT_GRAPH_KEY else node) for key, node in root.items)
    checkpoint = Checkpoint(
        progress=user.apply(progress),
        params=documents,
        optimizers=tuple(one.optimizer for one in lifted),
        schedules=tuple(one.schedule for one in lifted if one.schedule is not None),
        rng=blocks,
        extras=extras,
        residue=Residue(
            format=raw.format,
            dialect=dialect,
            root=replace(root, items=items),
            attributes=raw.attributes,
        ),
        provenance=Provenance(
            format=raw.format,
            dialect=dialect,
            evidence=evidence,
            source=raw.location.replace("\\", "/").rpartition("/")[2],
        ),
        oddities=(*(said for one in lifted for said in one.oddities), *user.oddities,
                  *_oddities(bundle, found, params, named, read)),
    )  # fmt: skip
    return checkpoint


def _open(raw: RawTree) -> tuple[_Bundle, bytes]:
    data = graph_bytes(raw)
    if data is None or not isinstance(raw.root, DictNode):
        raise FormatError.of(
            "unknown-dialect",
            f"there is no object graph in '{raw.location}' (no scalar string '{OBJECT_GRAPH_KEY}')",
            "This is no checkpoint of tf.train.Checkpoint; see it with 'ckptconv inspect --raw'.",
            loc=(OBJECT_GRAPH_KEY,),
        )
    graph = graph_of_bytes(data)
    tensors = {
        key: node for key, node in raw.root.items if isinstance(key, str) and isinstance(node, TensorRef)
    }
    for node, variable in graph.variables.items():
        if variable.key not in tensors:
            raise FormatError.of(
                "reference-broken",
                f"object {node} of the graph has its value under '{variable.key}', the bundle has no such key",
                "Copy the checkpoint again, with all of its shards.",
                loc=(variable.key,),
            )
    return _Bundle(
        raw=raw, graph=graph, tensors=tensors, lifter=Lifter(raw.root), taken={OBJECT_GRAPH_KEY}
    ), data


def _claimed(sorted_out: ModelVariables, trained: set[int]) -> ModelVariables:
    """A variable beside the model that an optimizer trains is a parameter."""
    mine = tuple(node for node in sorted_out.user.values() if node in trained)
    user = {edge: node for edge, node in sorted_out.user.items() if node not in trained}
    return replace(sorted_out, params=(*sorted_out.params, *mine), user=user)


def _params(
    bundle: _Bundle,
    params: Sequence[int],
    others: Mapping[tuple[int, str], int],
    named: Mapping[Place, str],
    read: Mapping[int, Reading],
    trained: set[int],
    nodes: Sequence[OptimizerNode],
) -> dict[str, Param]:
    complete = any(node.variables for node in nodes)
    more: dict[int, list[str]] = {}
    for place, node in others.items():
        more.setdefault(node, []).append(named[place])
    result: dict[str, Param] = {}
    for node in params:
        reading, tensor, name = read[node], bundle.tensor(node), named[node]
        trainable: bool | None = None
        if node in trained:
            trainable = True
        elif complete or reading.role in STATISTICS:
            trainable = False
        param = Param(
            name=name,
            tensor=tensor,
            role=reading.role,
            layer=reading.layer,
            axes=reading.axes,
            evidence=reading.evidence,
            trainable=trainable,
        )
        result[name] = param
        bundle.take(node, ("param", name))
        for other in more.get(node, ()):
            result[other] = replace(param, name=other, tied_to=name)
    return result


@dataclass(frozen=True, slots=True, kw_only=True)
class _LiftedOptimizer:
    optimizer: Optimizer
    schedule: Schedule | None = None
    oddities: tuple[str, ...] = ()


def _optimizer(
    bundle: _Bundle,
    node: OptimizerNode,
    nodes: Sequence[OptimizerNode],
    named: Mapping[Place, str],
    params: Sequence[int],
    read: Mapping[int, Reading],
) -> _LiftedOptimizer:
    name = "optimizer" if len(nodes) == 1 else "/".join(node.path)
    candidates = _candidates(bundle, node)
    rows = [
        found for found in (row(candidate, node.generation) for candidate in candidates) if found is not None
    ]
    slots = {}
    for native, pairs in node.slots.items():
        slot = _canonical(rows, native, by_variable=node.named_slots)
        slots[slot] = {named[variable]: bundle.tensor(state) for variable, state in pairs}
        for variable, state in pairs:
            bundle.take(state, ("slot", name, slot, named[variable]))
    variables = node.variables or tuple(v for v in params if read[v].role not in STATISTICS)
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
            f"'{name}' accumulates gradients: its counter counts batches, not updates, and the number of batches "
            "per update is not in the file"
        )
    if node.averages:
        oddities.append(f"'{name}' keeps moving averages of the parameters; they stay as extra arrays")
    if node.order == "declaration-order":
        oddities.append(f"variables of one name share '{name}': their slots are matched by order")
    return _LiftedOptimizer(
        optimizer=Optimizer(
            name=name,
            algorithm=algorithm,
            algorithm_candidates=candidates if len(candidates) > 1 else (),
            framework=node.generation,
            form=form,
            step=step,
            groups=(Group(params=tuple(named[v] for v in variables), hyperparameters=hyperparameters),),
            slots=slots,
            param_order=node.order if node.variables else "unknown",
        ),
        schedule=schedule,
        oddities=tuple(oddities),
    )


def _candidates(bundle: _Bundle, node: OptimizerNode) -> tuple[str, ...]:
    """The catalog's algorithms that could have made this state."""
    table = {name: found for name in algorithms() if (found := row(name, node.generation)) is not None}
    if not node.built:
        scope = re.sub(r"_\d+$", "", node.scope or "")
        return tuple(name for name, found in table.items() if scope and found.scope == scope)
    hyperparameters: dict[str, Value] = {edge: bundle.number(child) for edge, child in node.scalars.items()}
    if node.generation == "tf_keras_legacy" and node.learning_rate is not None:
        hyperparameters["learning_rate"] = bundle.number(node.learning_rate)
    if not node.named_slots:
        known = {key for found in table.values() for key in found.slots.values()}
        lists = (
            frozenset(edge for edge in node.lists if edge in known or edge in node.slots) | node.scalar_state
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
            fits = infer(node.generation, frozenset(keys), hyperparameters, node.scope)
            result.update(dict.fromkeys(name for name in fits if name in table))
    return tuple(result)


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
    bundle: _Bundle, node: OptimizerNode, name: str, rows: Sequence[Row]
) -> tuple[dict[str, Fact], Schedule | None]:
    places = dict(node.scalars)
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
        unit="micro-step" if node.accumulators else "update",
        optimizer=name,
    )
    return facts, schedule


def _step(bundle: _Bundle, node: OptimizerNode, name: str, *, alone: bool) -> tuple[Fact, bool]:
    """The optimizer's own counter, and whether it counts batches of an accumulation instead of updates."""
    if node.step is None:
        return Unknown(reason="the optimizer has made no variables yet: it has not done an update"), False
    value = bundle.number(node.step)
    if node.accumulators:
        if alone:
            bundle.take_number(node.step, ("progress", "micro_steps"))
        return Unknown(
            reason=f"'{bundle.source(node.step)}' is {value} batches; batches per update are not stored"
        ), True
    bundle.take_number(node.step, ("step", name), was=value)
    return Known(value=value, source=bundle.source(node.step)), False


def _extras(bundle: _Bundle) -> dict[str, TensorRef]:
    """Every array that nothing else took."""
    extras = {}
    for key, tensor in bundle.tensors.items():
        if key not in bundle.taken:
            extras[key] = tensor
            bundle.lifter.take((key,), ("extra", key))
    return extras


def _oddities(
    bundle: _Bundle,
    found: Reach,
    params: Sequence[int],
    named: Mapping[Place, str],
    read: Mapping[int, Reading],
) -> list[str]:
    """What the file shows to be missing from it."""
    untracked = [node for node in params if node not in found.parents]
    if not untracked:
        return []
    said = [
        f"{len(untracked)} trainable variables are saved through the optimizer alone: Keras 3 does not track layers "
        "in a plain list or dictionary, and restores them only together with the optimizer"
    ]
    normalized = [named[node] for node in untracked if read[node].role == "gamma"]
    if normalized:
        said.append(
            "if there are batch normalizations among them, their moving statistics are not in this file: "
            + ", ".join(normalized)
        )
    return said
