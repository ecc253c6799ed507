"""The kinds of layers as a SavedModel's `keras_metadata.pb` declares them: they win over what edges tell."""

from __future__ import annotations

from collections.abc import Mapping

from ckptconv.catalog import layers
from ckptconv.dialects.keras_layers import Reading
from ckptconv.dialects.object_paths import Graph, Reach
from ckptconv.rawtree import RawTree

ATTRIBUTE = "layer_classes"
"""Attribute of the tree: `<path of edges> <class>` of each layer."""
_ROOT = "root"


def with_classes(
    raw: RawTree,
    graph: Graph,
    found: Reach,
    shapes: Mapping[int, tuple[int, ...]],
    read: Mapping[int, Reading],
    framework: str,
) -> dict[int, Reading]:
    """The readings, declared where the variable's layer is of a class that the catalog knows."""
    told = raw.attributes.get(ATTRIBUTE)
    kinds: dict[int, str] = {}
    for line in told if isinstance(told, tuple) else ():
        path, _, name = line.rpartition(" ")
        first, *edges = path.split(".")
        node = graph.graph.find(tuple(edges)) if first == _ROOT else None
        kind = layers.kind_of_class_name(framework, f"{framework}.{name}")
        if node is not None and kind is not None:
            kinds[node] = kind
    result = dict(read)
    for variable in read:
        parent, edge = found.parents.get(variable, (-1, ""))
        kind = kinds.get(parent)
        layout = layers.declared(framework, kind, edge, shapes[variable]) if kind is not None else None
        if kind is not None and layout is not None:
            result[variable] = Reading(layer=kind, role=layout[0], axes=layout[1], evidence="declared")
    return result
