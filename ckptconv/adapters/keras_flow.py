"""What a run of a live Keras model tells: which layer takes the output of which, and what is flattened.

The model is traced, not run: the operations are those of the TensorFlow graph that `tf.function` makes of it.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Protocol

from ckptconv.adapters.flow import CONSTANT, INPUT, Origin, Run
from ckptconv.adapters.images import Images

_CONVOLUTIONS = frozenset(
    {"Conv2D", "Conv3D", "DepthwiseConv2dNative", "Conv2DBackpropInput", "Conv3DBackpropInputV2"}
)
_PRODUCTS = frozenset({"MatMul", "BatchMatMul", "BatchMatMulV2", "BatchMatMulV3", "Einsum"})


class _Shape(Protocol):
    rank: int | None

    def as_list(self) -> list[int]: ...
    def is_fully_defined(self) -> bool: ...


class _Tensor(Protocol):
    shape: _Shape

    def ref(self) -> Hashable: ...


class _Operation(Protocol):
    type: str
    inputs: Sequence[_Tensor]
    outputs: Sequence[_Tensor]

    def get_attr(self, name: str) -> object: ...


def run_of(model: Callable[..., object], inputs: object, owners: Mapping[int, str]) -> Run:
    """One trace of the model in evaluation mode.

    `owners`: id of a variable's handle -> its layer as the document names it. `inputs`: what the model is
    called with, arrays in the structure that it takes.
    """
    import tensorflow as tf

    specs = tf.nest.map_structure(lambda x: tf.TensorSpec(x.shape, tf.as_dtype(x.dtype)), inputs)
    graph = tf.function(lambda x: model(x, training=False)).get_concrete_function(specs).graph
    run = Run()
    origins: dict[Hashable, Origin] = {}
    for outside, inside in graph.captures:
        owner = owners.get(id(outside))
        origins[inside.ref()] = CONSTANT if owner is None else Origin(frozenset({owner}))
    for tensor in graph.inputs:
        origins.setdefault(tensor.ref(), INPUT)
    for operation in graph.get_operations():
        given = [tensor.ref() for tensor in operation.inputs]
        origin = run.through([origins.get(tensor, CONSTANT) for tensor in given], given)
        for tensor in operation.outputs:
            origins.setdefault(tensor.ref(), origin)
            _image(run.images, operation, tensor)
    return run


def _image(images: Images, operation: _Operation, made: _Tensor) -> None:
    import tensorflow as tf

    shape = _sizes(made)
    if shape is None:
        return
    if operation.type in _CONVOLUTIONS:
        last = str(operation.get_attr("data_format")).endswith("C'")
        images.convolved(made.ref(), len(shape), channels_last=last)
    elif operation.type == "Transpose":
        order = tf.get_static_value(operation.inputs[1])
        if order is not None:
            images.permuted(operation.inputs[0].ref(), made.ref(), [int(axis) for axis in order])
    elif operation.type == "Squeeze":
        dropped = operation.get_attr("squeeze_dims")
        images.squeezed(operation.inputs[0].ref(), made.ref(), list(dropped))  # type: ignore[call-overload]
    elif operation.type == "Reshape":
        before = _sizes(operation.inputs[0])
        if before is not None:
            images.reshaped(operation.inputs[0].ref(), made.ref(), before, shape)
    elif operation.type not in _PRODUCTS:
        sized = ((tensor.ref(), _sizes(tensor)) for tensor in operation.inputs)
        images.passed(((tensor, size) for tensor, size in sized if size is not None), made.ref(), shape)


def _sizes(tensor: _Tensor) -> tuple[int, ...] | None:
    return tuple(tensor.shape.as_list()) if tensor.shape.is_fully_defined() else None
