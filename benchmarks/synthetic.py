"""Checkpoints of any size, written without a framework: the same run as PyTorch's file and as Keras' bundle.

The model is a row of blocks, each with two dense layers that are not square; the optimizer is AdamW. The
PyTorch side is `{"model": ..., "optimizer": ..., "epoch": 3}` after nine steps, the Keras side what
`tf.train.Checkpoint(model=model, optimizer=optimizer)` saves right after `optimizer.build`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ckptconv import dtypes, engine
from ckptconv.formats import pytorch, tensor_bundle
from ckptconv.formats.base import Format
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
from ckptconv.rawtree import DictNode, ListNode, RawTree, dict_of
from ckptconv.tensor import Array, FilledTensor, Index, StoredTensor, TensorRef, TensorSpec

PYTORCH: Format = pytorch.PyTorchFormat()
FLOAT32 = dtypes.BY_NAME["float32"]
STEPS = 9


@dataclass(frozen=True, slots=True, kw_only=True)
class RandomTensor(TensorRef):
    """Values that take no memory until they are written, each tensor others; none is negative."""

    spec: TensorSpec
    seed: int

    def block(self, start: Index, stop: Index) -> Array:
        shape = tuple(high - low for low, high in zip(start, stop, strict=True))
        generator = np.random.default_rng((self.seed, *start))
        return generator.random(shape, np.float32)


@dataclass(frozen=True, slots=True)
class Dense:
    """A dense layer and where it stands."""

    block: int
    name: str
    outputs: int
    inputs: int


def dense_layers(count: int, outputs: int, inputs: int) -> tuple[Dense, ...]:
    """That many layers, two in a block, from `inputs` to `outputs` and back."""
    sizes = ((outputs, inputs), (inputs, outputs))
    return tuple(Dense(i // 2, f"fc{i % 2 + 1}", *sizes[i % 2]) for i in range(count))


def _random(shape: tuple[int, ...], seed: int) -> RandomTensor:
    return RandomTensor(spec=TensorSpec(dtype=FLOAT32, shape=shape), seed=seed)


def torch_run(layers: tuple[Dense, ...], optimizer: bool = True) -> RawTree:
    """A training dictionary; a bare state_dict without the optimizer."""
    shapes: dict[str, tuple[int, ...]] = {}
    for layer in layers:
        shapes[f"blocks.{layer.block}.{layer.name}.weight"] = (layer.outputs, layer.inputs)
        shapes[f"blocks.{layer.block}.{layer.name}.bias"] = (layer.outputs,)
    model = dict_of(
        [(name, _random(shape, seed)) for seed, (name, shape) in enumerate(shapes.items())],
        kind="collections.OrderedDict",
    )
    if not optimizer:
        return RawTree(format="pytorch", root=model)
    state = [
        (
            index,
            dict_of(
                {
                    "step": StoredTensor.of_array(np.array(STEPS, np.float32)),
                    "exp_avg": _random(shape, index + 1_000_000),
                    "exp_avg_sq": _random(shape, index + 2_000_000),
                }
            ),
        )
        for index, shape in enumerate(shapes.values())
    ]
    group = dict_of(
        {
            "lr": 1e-3,
            "betas": ListNode(items=(0.9, 0.999), kind="tuple"),
            "eps": 1e-7,
            "weight_decay": 1e-2,
            "amsgrad": False,
            "maximize": False,
            "foreach": None,
            "capturable": False,
            "differentiable": False,
            "fused": None,
            "decoupled_weight_decay": True,
            "params": ListNode(items=tuple(range(len(shapes)))),
        }
    )
    states = dict_of({"state": dict_of(list(state)), "param_groups": ListNode(items=(group,))})
    return RawTree(format="pytorch", root=dict_of({"model": model, "optimizer": states, "epoch": 3}))


class _Graph:
    """An object graph under construction, and the tensors of its variables."""

    def __init__(self) -> None:
        self._edges: list[list[Edge]] = [[]]
        self._attributes: list[tuple[Attribute, ...]] = [()]
        self.tensors: dict[str, TensorRef] = {}

    def node(self) -> int:
        self._edges.append([])
        self._attributes.append(())
        return len(self._edges) - 1

    def edge(self, parent: int, name: str, child: int | None = None) -> int:
        """The child, which is a new object unless it is given."""
        child = self.node() if child is None else child
        self._edges[parent].append(Edge(name, child))
        return child

    def variable(self, path: tuple[str, ...], full_name: str, tensor: TensorRef, node: int) -> int:
        key = variable_key(path)
        self.tensors[key] = tensor
        self._attributes[node] = (Attribute(name=VARIABLE_VALUE, full_name=full_name, checkpoint_key=key),)
        return node

    def graph(self) -> ObjectGraph:
        pairs = zip(self._edges, self._attributes, strict=True)
        return ObjectGraph(
            nodes=tuple(
                Node(children=tuple(edges), attributes=attributes, has_checkpoint_values=True)
                for edges, attributes in pairs
            )
        )


def keras_template(layers: tuple[Dense, ...]) -> RawTree:
    """Model and optimizer of the same run, built and not trained."""
    graph = _Graph()
    model, optimizer = graph.edge(0, "model"), graph.edge(0, "optimizer")
    zero = StoredTensor.of_array(np.array(0, np.int64))
    rate = StoredTensor.of_array(np.array(1e-3, np.float32))
    graph.variable(("save_counter",), "save_counter", zero, graph.edge(0, "save_counter"))
    own, trained = graph.edge(optimizer, "_variables"), graph.edge(optimizer, "_trainable_variables")
    graph.edge(optimizer, "_trainable_variables_indices")
    step, learning_rate = graph.edge(optimizer, "_iterations"), graph.edge(optimizer, "_learning_rate")
    graph.variable(("optimizer", "_iterations"), "adamw/iteration", zero, step)
    graph.variable(("optimizer", "_learning_rate"), "adamw/learning_rate", rate, learning_rate)
    graph.edge(own, "0", step)
    graph.edge(own, "1", learning_rate)
    lists = {name: graph.edge(optimizer, f"_{name}") for name in ("momentums", "velocities")}
    listed = graph.edge(model, "blocks")
    blocks: dict[int, int] = {}
    number = 0
    for layer in layers:
        if layer.block not in blocks:
            blocks[layer.block] = graph.edge(listed, str(layer.block))
        node = graph.edge(blocks[layer.block], layer.name)
        for edge, shape in (("_kernel", (layer.inputs, layer.outputs)), ("bias", (layer.outputs,))):
            zeros = FilledTensor(spec=TensorSpec(dtype=FLOAT32, shape=shape))
            variable = graph.edge(node, edge)
            name = f"{layer.name}/{edge.removeprefix('_')}"
            graph.variable(("optimizer", "_trainable_variables", str(number)), name, zeros, variable)
            graph.edge(trained, str(number), variable)
            for offset, (slot, slots) in enumerate(lists.items()):
                place = str(2 + 2 * number + offset)
                held = graph.edge(own, place)
                full_name = f"adamw/{name.replace('/', '_')}_{slot[:-1]}"
                graph.variable(("optimizer", "_variables", place), full_name, zeros, held)
                graph.edge(slots, str(number), held)
            number += 1
    items: list[tuple[str, TensorRef]] = [
        (OBJECT_GRAPH_KEY, of_strings([graph.graph().serialize()])),
        *sorted(graph.tensors.items()),
    ]
    return RawTree(format="tensorflow", root=DictNode(items=tuple(items)))


def write(raw: RawTree, path: Path) -> Path:
    """Write a tree with ckptconv's own writer."""
    format = {"pytorch": PYTORCH, "tensorflow": tensor_bundle.FORMAT}[raw.format]
    engine.write(format.layout(raw, path), path, force=True)
    return path
