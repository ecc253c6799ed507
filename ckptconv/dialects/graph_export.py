"""SavedModels of `model.export()`: variables in lists, without the model that they are of.

    variables              every variable, in the model's order
    trainable_variables,   the same objects, parted
    non_trainable_variables
    _all_variables         Keras 3: the same values once more, as objects of their own and in any order; no
                           function of the SavedModel reads these
No edge says what a variable is: its full name does. In Keras 3 that is its path for Sequential and Functional
models (`net/dense_1/kernel`); of a subclassed model it is the model's name and the variable's own, whatever
the layer (`net/kernel`). The variables of such a model are parted in their order into the longest rows that a
kind of layer has (`layer-0/kernel`). Where shapes leave a kind open, a name that Keras gives tells it.

An export holds no optimizer, and so no step. Source: keras 3.15.1 `keras/src/export/saved_model.py`, tf_keras
2.21 `tf_keras/src/export/export_lib.py`; keras 3.3.3, 3.6.0 and 3.10.0 by experiment.
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from ckptconv.catalog import keras_variables
from ckptconv.dialects.graph_model import EDGE_OF, GENERATOR_EDGES, ModelVariables
from ckptconv.dialects.keras_layers import Reading, read_layer
from ckptconv.dialects.object_paths import Graph, renumbered
from ckptconv.tensor import TensorRef

_LISTS = ("variables", "trainable_variables", "non_trainable_variables")
_COPIES = "_all_variables"
_LARGEST_LAYER = 8
"""More variables than any kind of layer has."""
_CLASS_OF = {keras_variables.snake_case(name): name for name in keras_variables.VARIABLES}
Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Export:
    """The variables of an exported model."""

    model: ModelVariables
    trained: frozenset[int]
    names: Mapping[int, str]
    copies: Mapping[int, int]
    """Copy of a variable -> the variable."""
    said: tuple[str, ...] = ()


def lists_of_export(graph: Graph) -> frozenset[int]:
    """The list nodes that an export's variables hang on; empty where the graph is no export."""
    edges = graph.edges(0)
    if not edges.keys() >= {*_LISTS, _COPIES}:
        return frozenset()
    lists = frozenset(edges[edge] for edge in (*_LISTS, _COPIES))
    plain = all(graph.is_list(node) or not graph.children[node] for node in lists)
    return lists if plain and graph.elements(edges[_LISTS[0]]) else frozenset()


def has_copies(graph: Graph) -> bool:
    """Whether an export's variables are saved twice, as Keras 3 does and tf_keras does not."""
    edges = graph.edges(0)
    return bool(set(graph.elements(edges[_COPIES])) - set(graph.elements(edges[_LISTS[0]])))


def export_of(graph: Graph, tensors: Mapping[int, TensorRef], framework: str) -> Export | None:
    """What an export's lists and names tell; None where the graph is no export.

    `framework`: column of the layer catalog.
    """
    if not lists_of_export(graph):
        return None
    edges = graph.edges(0)
    every = graph.elements(edges[_LISTS[0]])
    generators = tuple(node for node in every if _leaf(graph, node) in GENERATOR_EDGES)
    params = tuple(node for node in every if node not in generators)
    others = [node for node in graph.elements(edges[_COPIES]) if node not in every]
    copies = _matched(graph, every, others, tensors)
    left = len(others) - len(copies)
    said = f"{left} copies below '{_COPIES}' are of one name and content with others: they stay as they are"
    return Export(
        model=ModelVariables(params=params, user={}, metrics=(), generators=generators),
        trained=frozenset(graph.elements(edges[_LISTS[1]])),
        names=_names(graph, params, {node: tensors[node].shape for node in params}, framework),
        copies=copies,
        said=(said,) if left else (),
    )


def with_names(read: Mapping[int, Reading], named: Mapping[int, str], framework: str) -> dict[int, Reading]:
    """The readings, of several the one that the name of an unnamed layer says: `conv1d-0`."""
    result = dict(read)
    for node, reading in read.items():
        layer = re.sub(r"-\d+$", "", "/".join(named[node].split("/")[-2:-1]))
        kind = keras_variables.kind(_CLASS_OF.get(layer, ""), framework)
        fits = [one for one in reading.candidates if one.layer == kind]
        if len(fits) == 1:
            (one,) = fits
            result[node] = Reading(layer=one.layer, role=one.role, axes=one.axes, evidence="named")
    return result


def _leaf(graph: Graph, node: int) -> str:
    return graph.variables[node].full_name.rpartition("/")[2]


def _matched(
    graph: Graph, every: Sequence[int], others: Iterable[int], tensors: Mapping[int, TensorRef]
) -> dict[int, int]:
    """Copy -> variable, of one name, dtype, shape and checksum where no second one has these."""

    def parted(nodes: Iterable[int]) -> dict[Hashable, list[int]]:
        found: dict[Hashable, list[int]] = {}
        for node in nodes:
            tensor = tensors[node]
            sums = tuple(extent.checksum for extent in tensor.extents)
            mark = (graph.variables[node].full_name, tensor.dtype.name, tensor.shape, sums)
            found.setdefault(mark, []).append(node)
        return found

    originals = parted(every)
    pairs = ((copies, originals.get(mark, [])) for mark, copies in parted(others).items())
    return {copies[0]: found[0] for copies, found in pairs if len(copies) == len(found) == 1}


def _names(
    graph: Graph, params: Sequence[int], shapes: Mapping[int, Shape], framework: str
) -> dict[int, str]:
    """Name of every parameter: its layer's path without the model's name, numbered within the model."""
    paths = {node: tuple(graph.variables[node].full_name.split("/")) for node in params}
    under_one = len({path[0] for path in paths.values()}) == 1 and min(map(len, paths.values())) > 1
    if framework == "keras3" and under_one:
        paths = {node: path[1:] for node, path in paths.items()}
    called = _called(paths.values())
    owners: dict[tuple[str, ...], list[dict[str, int]]] = {}
    for node, path in paths.items():
        owners.setdefault(path[:-1], []).append({path[-1]: node})
    named: dict[int, str] = {}
    for owner, variables in owners.items():
        leaves = {leaf for one in variables for leaf in one}
        whole = bool(owner) and len(leaves) == len(variables)
        groups = [_joined(variables)] if whole else _layers(variables, shapes, framework)
        for number, group in enumerate(groups):
            inner = () if whole else (f"layer-{number}",)
            named.update({node: "/".join((*called[owner], *inner, leaf)) for leaf, node in group.items()})
    return {node: named[node] for node in params}


def _joined(variables: Iterable[Mapping[str, int]]) -> dict[str, int]:
    return {leaf: node for one in variables for leaf, node in one.items()}


def _layers(
    variables: Sequence[Mapping[str, int]], shapes: Mapping[int, Shape], framework: str
) -> list[dict[str, int]]:
    """Variables of several layers, in their order, parted layer by layer."""
    groups: list[dict[str, int]] = []
    at = 0
    while at < len(variables):
        count = _LARGEST_LAYER
        group = _joined(variables[at : at + count])
        while count > 1 and (len(group) < count or not _is_layer(group, shapes, framework)):
            count -= 1
            group = _joined(variables[at : at + count])
        groups.append(group)
        at += count
    return groups


def _is_layer(group: Mapping[str, int], shapes: Mapping[int, Shape], framework: str) -> bool:
    """Whether a kind of layer has all of these variables."""
    variables = {leaf: shapes[node] for leaf, node in group.items()}
    inner = {EDGE_OF.get(name, name): shape for name, shape in variables.items()}
    return any(
        all(reading.layer != "unknown" or reading.candidates for reading in read.values())
        for read in (read_layer(framework, variables), read_layer(framework, inner))
    )


def _called(paths: Iterable[tuple[str, ...]]) -> dict[tuple[str, ...], tuple[str, ...]]:
    """Path of a layer -> the same with the numbers that Keras counts through the process counted anew."""
    inside: dict[tuple[str, ...], dict[str, None]] = {}
    for path in paths:
        for depth in range(len(path) - 1):
            inside.setdefault(path[:depth], {})[path[depth]] = None
    result: dict[tuple[str, ...], tuple[str, ...]] = {(): ()}
    for parent in sorted(inside, key=len):
        new = renumbered(inside[parent])
        result.update({(*parent, name): (*result[parent], new[name]) for name in inside[parent]})
    return result
