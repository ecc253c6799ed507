"""The model's part of an object graph: which variables are parameters, in which order, under which names.

What is found below the root without entering an optimizer is the model, except
- variables that a user put beside the model (`Checkpoint(model=m, step=tf.Variable(1))`) and `save_counter`,
- metrics, and states of random generators.
What only an optimizer refers to belongs to the model too: Keras 3 does not track layers in a plain list or
dictionary, and saves their trainable variables through the optimizer alone (`untracked-0/kernel`). Their
other variables, such as moving statistics, are in no such file.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from ckptconv.dialects.keras_layers import Reading, read_layer
from ckptconv.dialects.keras_optimizers import OptimizerNode
from ckptconv.dialects.object_paths import Graph, Reach, Steps, is_counted, names
from ckptconv.document import Layout

_METRIC = frozenset(
    {
        "total",
        "count",
        "true_positives",
        "true_negatives",
        "false_positives",
        "false_negatives",
        "accumulator",
        "total_confusion_matrix",
        "squared_sum",
        "residual",
        "num_samples",
    }
)
GENERATOR_EDGES = frozenset({"_state_var", "seed_generator_state", "_alg_var"})
"""What the states of random generators are called."""
_SAVE_COUNTER = "save_counter"
EDGE_OF = {
    "kernel": "_kernel",
    "embeddings": "_embeddings",
    "mean": "adapt_mean",
    "variance": "adapt_variance",
}
"""Name of a variable of Keras 3 -> its edge, where that is another, at least in some layers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelVariables:
    """The variables of a graph outside the optimizers, sorted by what they are."""

    params: tuple[int, ...]
    """In model order."""
    user: Mapping[str, int]
    """What stands directly at a `Checkpoint`'s root: edge -> variable."""
    metrics: tuple[int, ...]
    generators: tuple[int, ...]


def model_variables(graph: Graph, found: Reach) -> ModelVariables:
    """Sort the variables that the models reach."""
    params, metrics, generators = [], [], []
    user: dict[str, int] = {}
    for node in found.order:
        if node not in graph.variables or node not in found.parents:
            continue
        parent, edge = found.parents[node]
        if parent == 0 and (edge == _SAVE_COUNTER or not graph.root_is_model):
            user[edge] = node
        elif edge in GENERATOR_EDGES:
            generators.append(node)
        elif _is_metric(graph, found, parent, edge):
            metrics.append(node)
        else:
            params.append(node)
    return ModelVariables(
        params=tuple(params), user=user, metrics=tuple(metrics), generators=tuple(generators)
    )


def _is_metric(graph: Graph, found: Reach, parent: int, edge: str) -> bool:
    """Whether a variable belongs to a metric: by Keras' edge, or its object has nothing else."""
    if edge not in _METRIC:
        return False
    if "keras_api" in found.edges(parent):
        return True
    return all(name in _METRIC for name, child in graph.children[parent] if child in graph.variables)


def with_untracked(params: Sequence[int], optimizers: Iterable[OptimizerNode]) -> tuple[int, ...]:
    """The parameters and, where the optimizer's order puts them, those that only an optimizer refers to."""
    tracked = frozenset(params)
    known = set(params)
    first: list[int] = []
    after: dict[int, list[int]] = {}
    for optimizer in optimizers:
        following = first
        for variable in optimizer.variables:
            if variable in tracked:
                following = after.setdefault(variable, [])
            elif variable in known:
                continue
            else:
                known.add(variable)
                following.append(variable)
    return (*first, *(node for param in params for node in (param, *after.get(param, ()))))


def aliases(graph: Graph, found: Reach, params: Sequence[int]) -> dict[tuple[int, str], int]:
    """Second places of a parameter, in other objects than its first: (object, edge) -> variable.

    Lists of an object's own variables and the edges that Keras adds are no places of their own; nor is an
    object with the root's own edges, which is the module that `tf_module` writes as `model` too.
    """
    wanted = frozenset(params)
    result = {}
    root = frozenset(graph.children[0])
    for parent in found.order:
        if graph.is_list(parent) or (parent and root >= frozenset(graph.children[parent])):
            continue
        for edge, child in graph.children[parent]:
            if child not in wanted or child not in found.parents or is_counted(edge):
                continue
            if found.parents[child][0] != parent:
                result[parent, edge] = child
    return result


Place = int | tuple[int, str]
"""A variable, or one more place of a variable."""


def param_names(
    graph: Graph,
    found: Reach,
    params: Sequence[int],
    others: Mapping[tuple[int, str], int],
    optimizers: Iterable[OptimizerNode],
) -> dict[Place, str]:
    """The name of every parameter, and of each of its `others`' places."""
    paths: dict[Place, Steps] = {node: found.path(node) for node in params if node in found.parents}
    paths.update({(parent, edge): (*found.path(parent), (parent, edge)) for parent, edge in others})
    named = names(found, paths)
    layer, number = None, -1
    owners = _owners(graph, optimizers)
    seen: set[str] = set()
    for node in params:
        if node in found.parents:
            continue
        leaf = graph.variables[node].full_name.rpartition("/")[2] or "variable"
        owner = owners.get(node)
        if number < 0 or leaf in seen or owner != layer:
            number, layer, seen = number + 1, owner, set()
        seen.add(leaf)
        named[node] = f"untracked-{number}/{leaf}"
    return named


def _owners(graph: Graph, optimizers: Iterable[OptimizerNode]) -> dict[int, str]:
    """Variable -> its layer as its slots' names have it: `m_dense_1` of `adam/m_dense_1_kernel_momentum`."""
    result: dict[int, str] = {}
    for optimizer in optimizers:
        for pairs in optimizer.slots.values():
            for variable, slot in pairs:
                leaf = graph.variables[variable].full_name.rpartition("/")[2]
                name = graph.variables[slot].full_name.rpartition("/")[2]
                layer, found, _ = name.rpartition(f"_{leaf}_") if leaf else ("", "", "")
                if found:
                    result.setdefault(variable, layer)
    return result


def readings(
    graph: Graph,
    found: Reach,
    params: Sequence[int],
    named: Mapping[Place, str],
    shapes: Mapping[int, tuple[int, ...]],
    framework: str,
) -> dict[int, Reading]:
    """What each parameter is in its layer."""
    siblings: dict[object, dict[str, int]] = {}
    for node in params:
        if node in found.parents:
            parent, edge = found.parents[node]
            siblings.setdefault(parent, {})[edge] = node
        else:
            layer, _, leaf = named[node].rpartition("/")
            siblings.setdefault(layer, {})[leaf] = node
    result: dict[int, Reading] = {}
    for owner, nodes in siblings.items():
        read = _read(framework, nodes, shapes)
        if isinstance(owner, str):
            # Without edges `_kernel` and `kernel` cannot be told apart: both are tried.
            other = {EDGE_OF.get(leaf, leaf): node for leaf, node in nodes.items()}
            read = _agreeing(read, _read(framework, other, shapes))
        result.update(read)
    return result


def _read(
    framework: str, nodes: Mapping[str, int], shapes: Mapping[int, tuple[int, ...]]
) -> dict[int, Reading]:
    read = read_layer(framework, {edge: shapes[node] for edge, node in nodes.items()})
    return {nodes[edge]: reading for edge, reading in read.items()}


def _agreeing(first: Mapping[int, Reading], second: Mapping[int, Reading]) -> dict[int, Reading]:
    """What two attempts leave open: the one that knows anything, or all that either takes it for."""
    result = {}
    for node, one in first.items():
        told = [reading for reading in (one, second[node]) if reading.axes is not None or reading.candidates]
        open_to = dict.fromkeys(layout for reading in told for layout in _layouts(reading))
        if len(told) < 2 or len(open_to) == 1:
            result[node] = (told or [one])[0]
        else:
            roles = {layout.role for layout in open_to}
            result[node] = Reading(
                role=roles.pop() if len(roles) == 1 else "unknown", candidates=tuple(open_to)
            )
    return result


def _layouts(reading: Reading) -> tuple[Layout, ...]:
    if reading.axes is None:
        return reading.candidates
    return (Layout(layer=reading.layer, role=reading.role, axes=reading.axes),)
