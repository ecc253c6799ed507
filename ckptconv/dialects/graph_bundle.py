"""A bundle with an object graph while it is lifted: its tensors by node, and what was taken from it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

from ckptconv.dialects.object_paths import Graph
from ckptconv.dialects.residue import Lifter
from ckptconv.errors import FormatError
from ckptconv.formats.object_graph import ATTRIBUTES, OBJECT_GRAPH_KEY, ObjectGraph
from ckptconv.formats.string_tensor import read_strings
from ckptconv.rawtree import DictNode, RawTree
from ckptconv.tensor import TensorRef


def graph_bytes(raw: RawTree) -> bytes | None:
    """The serialized object graph of a bundle; None in a name-based one."""
    return raw.once(_graph_bytes)


def _graph_bytes(raw: RawTree) -> bytes | None:
    if not isinstance(raw.root, DictNode):
        return None
    node = raw.root.get(OBJECT_GRAPH_KEY)
    if not isinstance(node, TensorRef) or node.dtype.name != "string" or node.spec.numel != 1:
        return None
    return read_strings(node, (OBJECT_GRAPH_KEY,))[0]


@lru_cache(maxsize=2)
def graph_of_bytes(data: bytes) -> Graph:
    """The object graph that these bytes are."""
    return Graph(ObjectGraph.parse(data))


def graph_of(raw: RawTree) -> Graph | None:
    """The object graph of a bundle; None in a name-based one."""
    return raw.once(_graph_of)


def _graph_of(raw: RawTree) -> Graph | None:
    data = graph_bytes(raw)
    return None if data is None else graph_of_bytes(data)


@dataclass(slots=True)
class Bundle:
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


def open_bundle(raw: RawTree) -> tuple[Bundle, bytes]:
    """The bundle of a tree, and the bytes of its object graph.

    Raises: unknown-dialect without an object graph, reference-broken, corrupt-file.
    """
    data = graph_bytes(raw)
    if data is None or not isinstance(raw.root, DictNode):
        raise FormatError.of(
            "unknown-dialect",
            f"there is no object graph in '{raw.location}' (no scalar string '{OBJECT_GRAPH_KEY}')",
            "This is no checkpoint of tf.train.Checkpoint; see it with 'ckptconv inspect --raw'.",
            loc=(OBJECT_GRAPH_KEY,),
        )
    graph = graph_of(raw)
    assert graph is not None
    tensors = {
        key: node for key, node in raw.root.items if isinstance(key, str) and isinstance(node, TensorRef)
    }
    for node, variable in graph.variables.items():
        if variable.key not in tensors:
            raise FormatError.of(
                "reference-broken",
                f"object {node} has its value under '{variable.key}', the bundle has no such key",
                "Copy the checkpoint again, with all of its shards.",
                loc=(variable.key,),
            )
    return Bundle(
        raw=raw, graph=graph, tensors=tensors, lifter=Lifter(raw.root), taken={OBJECT_GRAPH_KEY}
    ), data
