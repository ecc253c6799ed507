"""The object graph of a TensorFlow checkpoint: which tracked Python object holds which, and under which key.

A `TrackableObjectGraph` is stored as a scalar string under `_CHECKPOINTABLE_OBJECT_GRAPH`; node 0 is the
root. A bundle without it is a name-based (TensorFlow 1) one. Edges carry attribute names; an object that is
reached by several is one node. A variable's `checkpoint_key` is the path of the edges that led to it first,
`/.ATTRIBUTES/` and the attribute's name; in an edge's name `.` is written `..` and then `/` `.S`.

Producers: TensorFlow 2.0 to 2.21, Keras 2 and 3. Refused: fields that are not known here (they would be
lost), node numbers that are not there. What is parsed serializes to the same bytes again.

Source: tensorflow v2.21 `core/protobuf/trackable_object_graph.proto`,
`python/checkpoint/{graph_view,save_util}.py`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from ckptconv.errors import CkptError, FormatError, Loc
from ckptconv.formats import protos

OBJECT_GRAPH_KEY = "_CHECKPOINTABLE_OBJECT_GRAPH"
ATTRIBUTES = "/.ATTRIBUTES/"
VARIABLE_VALUE = "VARIABLE_VALUE"
MAX_DEPTH = 128
"""Longest path that is followed: without a limit a chain of nodes has paths of quadratic length."""


class Edge(NamedTuple):
    """A named reference to another object."""

    name: str
    node: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Attribute:
    """A value of the object that the bundle holds."""

    name: str
    """`VARIABLE_VALUE` for variables."""
    full_name: str = ""
    """The variable's own name; not unique in Keras 3."""
    checkpoint_key: str = ""
    """The bundle's key; of tables and iterators only its beginning."""
    optional_restore: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class SlotVariable:
    """An optimizer's statement that one node is a slot of another (legacy tf_keras optimizers)."""

    original: int
    name: str
    slot: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RegisteredSaver:
    """The registered class that saved the object."""

    name: str
    object_name: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """One tracked object."""

    children: tuple[Edge, ...] = ()
    attributes: tuple[Attribute, ...] = ()
    slot_variables: tuple[SlotVariable, ...] = ()
    registered_saver: RegisteredSaver | None = None
    has_checkpoint_values: bool | None = None

    def child(self, name: str) -> int | None:
        """Node at the end of an edge, the first one of that name."""
        for edge in self.children:
            if edge.name == name:
                return edge.node
        return None

    @property
    def variable_key(self) -> str | None:
        """Bundle key of the value, if the object is a variable."""
        for attribute in self.attributes:
            if attribute.name == VARIABLE_VALUE:
                return attribute.checkpoint_key
        return None


@dataclass(frozen=True, slots=True, kw_only=True)
class ObjectGraph:
    """All nodes, by number."""

    nodes: tuple[Node, ...]

    @classmethod
    def parse(cls, data: bytes, loc: Loc = (OBJECT_GRAPH_KEY,)) -> ObjectGraph:
        """The graph from its protocol buffer.

        Raises: corrupt-file, unsupported-feature, reference-broken.
        """
        message = protos.parse(protos.TrackableObjectGraph, data, loc)
        graph = cls(nodes=tuple(_node(node) for node in message.nodes))
        graph._check(loc)
        return graph

    def serialize(self) -> bytes:
        """The protocol buffer, as TensorFlow writes it."""
        message = protos.new(protos.TrackableObjectGraph)
        for node in self.nodes:
            _fill(message.nodes.add(), node)
        return message.SerializeToString(deterministic=True)

    def find(self, path: tuple[str, ...], start: int = 0) -> int | None:
        """Node at the end of a path of edge names."""
        node: int | None = start
        for name in path:
            if node is None:
                return None
            node = self.nodes[node].child(name)
        return node

    def paths(
        self, start: int = 0, enter: Callable[[int], bool] = lambda node: True
    ) -> dict[int, tuple[str, ...]]:
        """Shortest path of edge names to each node that `start` reaches, in breadth-first order.

        Nodes for which `enter` is false are named, but not passed through.

        Raises: limit-exceeded for a path that no program's attributes are nested as deep as.
        """
        found: dict[int, tuple[str, ...]] = {start: ()}
        waiting = deque((start,))
        while waiting:
            node = waiting.popleft()
            if not enter(node):
                continue
            if len(found[node]) > MAX_DEPTH:
                raise FormatError.of(
                    "limit-exceeded",
                    f"node {node} is over {MAX_DEPTH} edges away from node {start}",
                    "Save objects that are nested less deeply.",
                    loc=(OBJECT_GRAPH_KEY, node),
                )
            for edge in self.nodes[node].children:
                if edge.node not in found:
                    found[edge.node] = (*found[node], edge.name)
                    waiting.append(edge.node)
        return found

    def _check(self, loc: Loc) -> None:
        count = len(self.nodes)
        for number, node in enumerate(self.nodes):
            for edge in node.children:
                if not 0 <= edge.node < count:
                    raise _no_such_node((*loc, number, edge.name), edge.node, count)
            for slot in node.slot_variables:
                for target in (slot.original, slot.slot):
                    if not 0 <= target < count:
                        raise _no_such_node((*loc, number, slot.name), target, count)


def escape(name: str) -> str:
    """An edge's name as it stands in a key."""
    return name.replace(".", "..").replace("/", ".S")


def variable_key(path: tuple[str, ...]) -> str:
    """The bundle key of a variable at a path of edge names."""
    return "/".join(escape(name) for name in path) + ATTRIBUTES + VARIABLE_VALUE


SAVE_COUNTER_KEY = variable_key(("save_counter",))
"""Where `tf.train.Checkpoint` counts the files that it has saved."""


def _node(message: protos.TrackableObject) -> Node:
    saver = None
    if message.HasField("registered_saver"):
        stored = message.registered_saver
        saver = RegisteredSaver(name=stored.name, object_name=stored.object_name)
    values = message.has_checkpoint_values.value if message.HasField("has_checkpoint_values") else None
    return Node(
        children=tuple([Edge(edge.local_name, edge.node_id) for edge in message.children]),
        attributes=tuple(
            [
                Attribute(
                    name=attribute.name,
                    full_name=attribute.full_name,
                    checkpoint_key=attribute.checkpoint_key,
                    optional_restore=attribute.optional_restore,
                )
                for attribute in message.attributes
            ]
        ),
        slot_variables=tuple(
            [
                SlotVariable(
                    original=slot.original_variable_node_id,
                    name=slot.slot_name,
                    slot=slot.slot_variable_node_id,
                )
                for slot in message.slot_variables
            ]
        ),
        registered_saver=saver,
        has_checkpoint_values=values,
    )


def _fill(message: protos.TrackableObject, node: Node) -> None:
    for edge in node.children:
        reference = message.children.add()
        reference.node_id, reference.local_name = edge.node, edge.name
    for attribute in node.attributes:
        tensor = message.attributes.add()
        tensor.name, tensor.full_name = attribute.name, attribute.full_name
        tensor.checkpoint_key = attribute.checkpoint_key
        tensor.optional_restore = attribute.optional_restore
    for slot in node.slot_variables:
        variable = message.slot_variables.add()
        variable.original_variable_node_id, variable.slot_name = slot.original, slot.name
        variable.slot_variable_node_id = slot.slot
    if node.registered_saver is not None:
        message.registered_saver.SetInParent()
        message.registered_saver.name = node.registered_saver.name
        message.registered_saver.object_name = node.registered_saver.object_name
    if node.has_checkpoint_values is not None:
        message.has_checkpoint_values.SetInParent()
        message.has_checkpoint_values.value = node.has_checkpoint_values


def _no_such_node(loc: Loc, node: int, count: int) -> CkptError:
    return FormatError.of(
        "reference-broken",
        f"an edge leads to node {node}, the object graph has {count}",
        "Save the checkpoint again.",
        loc=loc,
    )
