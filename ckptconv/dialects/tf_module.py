"""Any other object graph of `tf.train.Checkpoint`: tf.Module, plain variables; written without a template.

Lifted, a variable is called by its path (`layers/0/w`); layouts are not known. Written without a residue, a
document becomes the graph of a module: names are split at dots and slashes into attributes, tensors stay as
they are. The module hangs on the root as `model` and with its own attributes, so both
`tf.train.Checkpoint(model=module)` and `tf.train.Checkpoint(module)` restore it and `assert_consumed()`.
Only parameters are written then: an optimizer's state needs a template that has a place for it.

Refused: names that are one after splitting.
"""

from __future__ import annotations

import re
from collections import deque

import numpy as np

from ckptconv.dialects.base import Detection, register
from ckptconv.dialects.graph_detect import survey
from ckptconv.dialects.graph_dialect import GraphDialect
from ckptconv.dialects.graph_note import note_of
from ckptconv.dialects.keras_optimizers import Generation
from ckptconv.document import Checkpoint
from ckptconv.errors import MappingError
from ckptconv.formats.object_graph import (
    OBJECT_GRAPH_KEY,
    VARIABLE_VALUE,
    Attribute,
    Edge,
    Node,
    ObjectGraph,
    variable_key,
)
from ckptconv.formats.string_tensor import of_strings
from ckptconv.rawtree import DictNode, RawTree
from ckptconv.rawtree import Node as RawNode
from ckptconv.tensor import StoredTensor, TensorRef

_MODEL = "model"
_SAVE_COUNTER = "save_counter"
_OWN_EDGES = frozenset({_SAVE_COUNTER, "root"})


class TfModule(GraphDialect):
    """An object graph without Keras' marks."""

    name = "tf-module"
    framework: Generation | None = None
    layers: str | None = None
    needs_template = False
    summary = "tf.Module or any tf.train.Checkpoint; written without a template too (weights)"

    def detect(self, raw: RawTree) -> Detection | None:
        """Any object graph that no Keras dialect claims."""
        if survey(raw) is None:
            return None
        return Detection(score=20, evidence="an object graph without Keras' marks")

    def lower(self, checkpoint: Checkpoint) -> RawTree:
        """The residue filled, or a module made of the parameters' names.

        Raises: duplicate-key, and those of `graph_lower.lower`.
        """
        residue = checkpoint.residue
        if residue is not None and residue.format == self.format:
            return super().lower(checkpoint)
        return _module(checkpoint)

    def restore_code(self, checkpoint: Checkpoint, target: str) -> str:
        """`tf.train.Checkpoint(...).restore(...)`."""
        lines = super().restore_code(checkpoint, target)
        if lines:
            return lines
        return (
            "import tensorflow as tf\n\n"
            "checkpoint = tf.train.Checkpoint(model=module)  # a tf.Module with the attributes of the names\n"
            f"checkpoint.restore({target!r}).assert_consumed()"
        )


def split(name: str) -> tuple[str, ...]:
    """The attributes that a parameter's name stands for."""
    parts = tuple(re.split(r"[./]", name))
    return parts if all(parts) else (name,)


class _Tree:
    """Objects as they are made, by their edges."""

    def __init__(self) -> None:
        self.edges: list[dict[str, int]] = [{}]
        self.values: dict[int, TensorRef] = {}

    def make(self, parent: int, edge: str) -> int:
        """The child at an edge, made where it is not there."""
        if edge not in self.edges[parent]:
            self.edges[parent][edge] = len(self.edges)
            self.edges.append({})
        return self.edges[parent][edge]

    def put(self, path: tuple[str, ...], name: str, value: TensorRef) -> int:
        """A variable at a path below the root."""
        node = 0
        for edge in path:
            node = self.make(node, edge)
        if node in self.values:
            raise MappingError.of(
                "duplicate-key",
                f"'{name}' and another parameter both become the attribute {'.'.join(path)}",
                "Rename one of them.",
                loc=("params", name),
            )
        self.values[node] = value
        return node

    def tie(self, path: tuple[str, ...], node: int) -> None:
        """One more edge to a variable."""
        parent = 0
        for edge in path[:-1]:
            parent = self.make(parent, edge)
        self.edges[parent][path[-1]] = node


def _module(checkpoint: Checkpoint) -> RawTree:
    tree = _Tree()
    made: dict[str, int] = {}
    for name, param in checkpoint.params.items():
        if param.tied_to is None:
            made[name] = tree.put(split(name), name, param.tensor)
    for name, param in checkpoint.params.items():
        if param.tied_to is None:
            continue
        if param.tied_to not in made:
            raise MappingError.of(
                "reference-broken",
                f"'{name}' is tied to '{param.tied_to}', which the document does not have",
                "Tie it to a parameter of the document.",
                loc=("params", name),
            )
        tree.tie(split(name), made[param.tied_to])
    _root_edges(tree)
    paths = _paths(tree)
    nodes = []
    items: list[tuple[RawNode, RawNode]] = []
    for number, edges in enumerate(tree.edges):
        attributes: tuple[Attribute, ...] = ()
        if number in tree.values:
            key = variable_key(paths[number])
            items.append((key, tree.values[number]))
            full_name = "/".join(paths[number])
            attributes = (Attribute(name=VARIABLE_VALUE, full_name=full_name, checkpoint_key=key),)
        children = tuple(Edge(edge, child) for edge, child in edges.items())
        nodes.append(Node(children=children, attributes=attributes, has_checkpoint_values=bool(attributes)))
    items.append((OBJECT_GRAPH_KEY, of_strings([ObjectGraph(nodes=tuple(nodes)).serialize()])))
    return RawTree(format="tensorflow", root=DictNode(items=tuple(items)), note=note_of(checkpoint, None))


def _root_edges(tree: _Tree) -> None:
    """Let the root be the module and hold it as `model` too; add the counter that `restore` asks for."""
    module = dict(tree.edges[0])
    taken = _OWN_EDGES & module.keys()
    if taken:
        raise MappingError.of(
            "duplicate-key",
            f"a parameter is called '{sorted(taken)[0]}', which tf.train.Checkpoint keeps for itself",
            "Rename it.",
            loc=("params", sorted(taken)[0]),
        )
    if _MODEL not in module:
        tree.edges[0][_MODEL] = len(tree.edges)
        tree.edges.append(module)
    tree.edges[0]["root"] = 0
    counter = tree.make(0, _SAVE_COUNTER)
    # TensorFlow counts a file that it writes itself: the first one holds 1.
    tree.values[counter] = StoredTensor.of_array(np.array(1, np.int64))


def _paths(tree: _Tree) -> dict[int, tuple[str, ...]]:
    """The shortest path to each object: what its key is made of."""
    paths: dict[int, tuple[str, ...]] = {0: ()}
    queue = deque([0])
    while queue:
        node = queue.popleft()
        for edge, child in tree.edges[node].items():
            if child not in paths:
                paths[child] = (*paths[node], edge)
                queue.append(child)
    return paths


register(TfModule())
