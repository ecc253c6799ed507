"""What an object graph shows of the framework that made it: optimizers' generations, layers' edges."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from ckptconv.dialects.graph_bundle import graph_of
from ckptconv.dialects.graph_export import has_copies, lists_of_export
from ckptconv.dialects.keras_optimizers import Generation, generation_of, optimizer_nodes
from ckptconv.dialects.object_paths import Graph
from ckptconv.rawtree import RawTree

_KERAS3 = frozenset({"_functional", "_operations", "_kernel", "_embeddings"})
_TF_KERAS = re.compile(r"layer_with_weights-\d+|keras_api")


@dataclass(frozen=True, slots=True, kw_only=True)
class Survey:
    """Marks of a framework."""

    generations: Mapping[Generation, str]
    """Generation of each optimizer -> its path."""
    keras3_edge: str | None
    tf_keras_edge: str | None
    export: Generation | None
    """Whose `model.export()` it is."""


def survey(raw: RawTree) -> Survey | None:
    """The marks of a bundle; None where there is no object graph.

    Raises: corrupt-file and others for an object graph that cannot be read.
    """
    return raw.once(_survey)


def _survey(raw: RawTree) -> Survey | None:
    graph = graph_of(raw)
    if graph is None:
        return None
    generations: dict[Generation, str] = {}
    for node, path in optimizer_nodes(graph).items():
        generations.setdefault(generation_of(graph, node), "/".join(path))
    edges = {edge for children in graph.children for edge, _ in children}
    return Survey(
        generations=generations,
        keras3_edge=next(iter(sorted(edges & _KERAS3)), None),
        tf_keras_edge=next((edge for edge in sorted(edges) if _TF_KERAS.fullmatch(edge)), None),
        export=_export(graph),
    )


def _export(graph: Graph) -> Generation | None:
    if not lists_of_export(graph):
        return None
    return "keras3" if has_copies(graph) else "tf_keras"
