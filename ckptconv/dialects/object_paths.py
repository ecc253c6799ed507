"""Walking the object graph of a TensorFlow checkpoint: what is reached how, and what a person calls it.

TensorFlow names a bundle key by the breadth-first shortest path from the root, whoever it leads through; a
Keras 3 kernel therefore stands under `optimizer/_trainable_variables/0`. The key says nothing about the
model. The edges do, and TensorFlow itself restores by nothing else.

**Names of variables.** A variable is called by its shortest path from the root that enters no optimizer,
where several are equally short by the one whose edges a user wrote. Along that path
- the root edge (`model`, `net`, whatever the keyword was) is left out where every parameter lies below it,
- `_functional` and `_operations` are Keras' own and left out,
- one leading underscore is left out (`_kernel`), unless the object has an edge without it too,
- a layer that the graph only numbers (`_operations/3`, `layer_with_weights-2`) is called by its own name,
  taken from the full name of its variables (`head/kernel`). Keras numbers layers that were given no name
  through the whole process (`dense_4`), so such a name is another one in the next process: these layers are
  numbered within their model instead, from 0 (`dense-0`, `dense-1`). A layer whose own name cannot be told is
  `layer-3`.
The same model gives the same names in every process, built or trained, whatever the checkpoint's keywords.

Source: tensorflow v2.21 `tensorflow/python/checkpoint/graph_view.py`, `trackable_view.py`, `util.py`;
keras 3.15 and tf_keras 2.21 by experiment.
"""

from __future__ import annotations

import re
from collections import Counter, deque
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import TypeVar

from ckptconv.formats.object_graph import VARIABLE_VALUE, ObjectGraph, escape

Edge = tuple[str, int]
"""Name of a child and its node."""
Steps = tuple[tuple[int, str], ...]
"""A path: (node, name of the edge that is followed from it)."""

_STRUCTURAL = frozenset({"_functional", "_operations"})
_OWN = re.compile(r"_operations|_functional|layer_with_weights-\d+")
_COUNTED = re.compile(
    r"layer-\d+|_layers|_self_tracked_trackables|keras_api|root|signatures|_tracked|_losses.*"
    r"|regularization_losses|_?(non_)?trainable_(variables|weights)|variables"
)
_NUMBERED_LAYER = re.compile(r"layer(?:_with_weights)?-(\d+)")
_SUFFIX = re.compile(r"_\d+$")

AUTOMATIC = frozenset(
    {
        "activation",
        "add",
        "attention",
        "average",
        "average_pooling1d",
        "average_pooling2d",
        "batch_normalization",
        "bidirectional",
        "concatenate",
        "conv1d",
        "conv1d_transpose",
        "conv2d",
        "conv2d_transpose",
        "conv3d",
        "conv3d_transpose",
        "conv_lstm1d",
        "conv_lstm2d",
        "dense",
        "depthwise_conv1d",
        "depthwise_conv2d",
        "dropout",
        "einsum_dense",
        "embedding",
        "flatten",
        "functional",
        "global_average_pooling1d",
        "global_average_pooling2d",
        "group_normalization",
        "group_query_attention",
        "gru",
        "input_layer",
        "layer_normalization",
        "leaky_re_lu",
        "lstm",
        "max_pooling1d",
        "max_pooling2d",
        "model",
        "multi_head_attention",
        "normalization",
        "p_re_lu",
        "permute",
        "re_lu",
        "reshape",
        "reversible_embedding",
        "rms_normalization",
        "rnn",
        "separable_conv1d",
        "separable_conv2d",
        "sequential",
        "simple_rnn",
        "softmax",
        "spectral_normalization",
        "time_distributed",
        "unit_normalization",
    }
)
"""What Keras calls a layer of its own that was given no name."""


def renumbered(layers: Iterable[str]) -> dict[str, str]:
    """Name of each layer of a model -> the same, numbered within the model where Keras numbers it."""
    bases = {name: _SUFFIX.sub("", name) for name in layers}
    automatic = {base for name, base in bases.items() if _is_automatic(base) or name != base}
    counts: Counter[str] = Counter()
    called = {}
    for name, base in bases.items():
        called[name] = f"{base}-{counts[base]}" if base in automatic else name
        counts[base] += 1
    return called


def _is_automatic(base: str) -> bool:
    """Whether Keras calls a layer without a name so; the halves of a Bidirectional have its layer's name."""
    return base.removeprefix("forward_").removeprefix("backward_") in AUTOMATIC


def is_counted(edge: str) -> bool:
    """Whether Keras adds the edge beside those that name the same objects."""
    return bool(_COUNTED.fullmatch(edge) or _OWN.fullmatch(edge))


def numbered(edges: Iterable[str]) -> bool:
    """Whether the edges are those of a list."""
    return all(edge.isdecimal() for edge in edges)


@dataclass(frozen=True, slots=True, kw_only=True)
class Variable:
    """A node that holds a value."""

    node: int
    key: str
    """Its key in the bundle."""
    full_name: str
    """What the framework calls it; not unique, and empty in hand-written graphs."""


@dataclass(frozen=True, eq=False)
class Graph:
    """An object graph as its edges are used here: lists in the order of their numbers."""

    graph: ObjectGraph
    children: tuple[tuple[Edge, ...], ...] = field(init=False)
    variables: Mapping[int, Variable] = field(init=False)

    def __post_init__(self) -> None:
        children: list[tuple[Edge, ...]] = []
        variables: dict[int, Variable] = {}
        for number, node in enumerate(self.graph.nodes):
            edges: tuple[Edge, ...] = node.children
            if len(edges) > 1 and numbered(name for name, _ in edges):
                edges = tuple(sorted(edges, key=lambda edge: (len(edge[0]), edge[0])))
            children.append(edges)
            for attribute in node.attributes:
                if attribute.name == VARIABLE_VALUE:
                    variables[number] = Variable(
                        node=number, key=attribute.checkpoint_key, full_name=attribute.full_name
                    )
        object.__setattr__(self, "children", tuple(children))
        object.__setattr__(self, "variables", variables)

    def __len__(self) -> int:
        return len(self.children)

    def edges(self, node: int) -> Mapping[str, int]:
        """Children of a node by name."""
        return self._by_name[node]

    @cached_property
    def _by_name(self) -> tuple[Mapping[str, int], ...]:
        return tuple(dict(edges) for edges in self.children)

    def child(self, node: int, *edges: str) -> int | None:
        """The node that is reached by these edges, None where there is none."""
        for edge in edges:
            following = self._by_name[node].get(edge)
            if following is None:
                return None
            node = following
        return node

    def elements(self, node: int | None) -> tuple[int, ...]:
        """The nodes of a list node in order; none where there is no list."""
        return () if node is None else tuple(child for edge, child in self.children[node] if edge.isdecimal())

    def is_list(self, node: int) -> bool:
        """Whether the node is a list: numbered edges and nothing else."""
        edges = self.children[node]
        return bool(edges) and node not in self.variables and numbered(edge for edge, _ in edges)

    @cached_property
    def root_is_model(self) -> bool:
        """Whether the root is the model itself (`Checkpoint(model)`), not a `Checkpoint(model=model)`."""
        edges = self.edges(0)
        return edges.get("root") == 0 or any(_OWN.fullmatch(edge) for edge in edges)


@dataclass(frozen=True)
class Reach:
    """What is reached from a root, by the shortest paths, without entering some nodes."""

    graph: Graph
    parents: Mapping[int, tuple[int, str]]
    """Node -> the node and edge it was first reached by, breadth first; the root is not in it."""
    order: tuple[int, ...]
    """The nodes depth first: the order in which the model's code defines them."""

    def path(self, node: int) -> Steps:
        """The (node, edge) steps from the root."""
        steps = []
        while node in self.parents:
            parent, edge = self.parents[node]
            steps.append((parent, edge))
            node = parent
        return tuple(reversed(steps))

    def edges(self, node: int) -> tuple[str, ...]:
        """The names of the edges from the root."""
        return tuple(edge for _, edge in self.path(node))

    def key(self, node: int) -> str:
        """The path as TensorFlow writes it."""
        return "/".join(escape(edge) for edge in self.edges(node))

    @cached_property
    def below(self) -> Mapping[int, tuple[int, ...]]:
        """Node -> the nodes first reached from it."""
        result: dict[int, list[int]] = {}
        for node, (parent, _) in self.parents.items():
            result.setdefault(parent, []).append(node)
        return {node: tuple(nodes) for node, nodes in result.items()}

    def variables_below(self, node: int) -> Iterator[int]:
        """The variables in the part of the tree that hangs on a node."""
        stack = [node]
        while stack:
            at = stack.pop()
            if at in self.graph.variables:
                yield at
            stack.extend(self.below.get(at, ()))


def reach(graph: Graph, avoid: frozenset[int] = frozenset()) -> Reach:
    """Everything below the root that is reached without entering a node of `avoid`."""
    parents: dict[int, tuple[int, str]] = {}
    queue, seen = deque([0]), {0}
    while queue:
        node = queue.popleft()
        for edge, child in _preferred(graph.children[node]):
            if child not in seen and child not in avoid:
                seen.add(child)
                parents[child] = (node, edge)
                queue.append(child)
    order: list[int] = []
    stack, entered = [0], set[int]()
    while stack:
        node = stack.pop()
        if node in entered or node in avoid:
            continue
        entered.add(node)
        order.append(node)
        stack.extend(child for _, child in reversed(_preferred(graph.children[node])))
    return Reach(graph, parents, tuple(order))


def _preferred(edges: tuple[Edge, ...]) -> Sequence[Edge]:
    """Edges that a user wrote before those that Keras adds, each in the file's order."""
    if len(edges) < 2:
        return edges
    return sorted(edges, key=lambda edge: 0 if edge[0].isdecimal() else _rank(edge[0]))


@lru_cache(maxsize=4096)
def _rank(edge: str) -> int:
    return 2 if _COUNTED.fullmatch(edge) else 1 if _OWN.fullmatch(edge) else 0


Item = TypeVar("Item", bound=Hashable)


def names(found: Reach, paths: Mapping[Item, Steps]) -> dict[Item, str]:
    """What the variables at the ends of these paths are called (see the module's text); unique."""
    layers = _Layers(found)
    parts = {item: layers.segments(path) for item, path in paths.items()}
    firsts = {part[0] for part in parts.values()}
    if len(firsts) == 1 and not found.graph.root_is_model and all(len(part) > 1 for part in parts.values()):
        parts = {item: part[1:] for item, part in parts.items()}
    named = {item: "/".join(part) for item, part in parts.items()}
    uses = Counter(named.values())
    return {
        item: name if uses[name] == 1 else "/".join(escape(edge) for _, edge in paths[item])
        for item, name in named.items()
    }


class _Layers:
    """The names of layers that the graph only numbers, worked out once per model."""

    def __init__(self, found: Reach) -> None:
        self._found = found
        self._models: dict[int, dict[str, str]] = {}

    def segments(self, path: Steps) -> tuple[str, ...]:
        """The parts of the name of what stands at the end of a path."""
        graph = self._found.graph
        parts: list[str] = []
        previous = ""
        for parent, edge in path:
            if previous == "_operations" or (edge.startswith("layer") and _NUMBERED_LAYER.fullmatch(edge)):
                parts.append(self._names_in(parent)[edge])
            elif edge not in _STRUCTURAL:
                bare = edge[1:] if edge.startswith("_") and len(edge) > 1 else edge
                parts.append(edge if bare in graph.edges(parent) else bare)
            previous = edge
        return tuple(parts)

    def _names_in(self, model: int) -> dict[str, str]:
        if model not in self._models:
            self._models[model] = self._work_out(model)
        return self._models[model]

    def _work_out(self, model: int) -> dict[str, str]:
        numbers: dict[int, str] = {}
        places: dict[str, int] = {}
        for edge, child in self._found.graph.children[model]:
            numbered_layer = _NUMBERED_LAYER.fullmatch(edge)
            if edge.isdecimal() or numbered_layer:
                places[edge] = child
                numbers.setdefault(child, numbered_layer[1] if numbered_layer else edge)
        own = {child: self._own_name(child) for child in numbers}
        uses = Counter(own.values())
        known = {child: name for child, name in own.items() if name is not None and uses[name] == 1}
        new = renumbered(known.values())
        called = {
            child: new[known[child]] if child in known else f"layer-{number}"
            for child, number in numbers.items()
        }
        return {edge: called[child] for edge, child in places.items()}

    def _own_name(self, layer: int) -> str | None:
        """The layer's name, as all full names below it agree on it."""
        found = set()
        for variable in self._found.variables_below(layer):
            parts = self._found.graph.variables[variable].full_name.split("/")
            depth = self._depth(variable, layer)
            found.add(parts[-depth - 1] if depth < len(parts) else "")
        return found.pop() if len(found) == 1 and "" not in found else None

    def _depth(self, node: int, ancestor: int) -> int:
        """Parts that the full name has below the ancestor's."""
        depth = 0
        while node != ancestor:
            parent, edge = self._found.parents[node]
            if edge not in _STRUCTURAL and not self._found.graph.is_list(node):
                depth += 1
            node = parent
        return depth
