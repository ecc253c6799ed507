"""What a run of a live Keras model tells: which variables are applied to what others made.

The model is traced, not run: the operations are those of the TensorFlow graph that `tf.function` makes of it.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Protocol

from ckptconv.adapters.attention import Factor
from ckptconv.adapters.flow import CONSTANT, INPUT, Origin, Run

_CONVOLUTIONS = frozenset(
    {"Conv2D", "Conv3D", "DepthwiseConv2dNative", "Conv2DBackpropInput", "Conv3DBackpropInputV2"}
)
_SPLITS = {"Split": (1, 0), "SplitV": (0, 2)}
"""Operation -> which of its inputs are the tensor and the axis."""
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


def run_of(model: Callable[..., object], inputs: object, names: Mapping[int, str]) -> Run:
    """One trace of the model in evaluation mode.

    `names`: id of a variable's handle -> its name in the document. `inputs`: what the model is
    called with, arrays in the structure that it takes.
    """
    import tensorflow as tf

    specs = tf.nest.map_structure(lambda x: tf.TensorSpec(x.shape, tf.as_dtype(x.dtype)), inputs)
    graph = tf.function(lambda x: model(x, training=False)).get_concrete_function(specs).graph
    run = Run()
    origins: dict[Hashable, Origin] = {}
    for outside, inside in graph.captures:
        name = names.get(id(outside))
        origins[inside.ref()] = CONSTANT if name is None else Origin(frozenset({name}))
    for tensor in graph.inputs:
        origins.setdefault(tensor.ref(), INPUT)
    for operation in graph.get_operations():
        given = [tensor.ref() for tensor in operation.inputs]
        known = [origins.get(tensor, CONSTANT) for tensor in given]
        origin = run.through(known, given)
        for tensor in operation.outputs:
            origins.setdefault(tensor.ref(), origin)
            _attention(run, operation, known, tensor)
            _axes(run, operation, tensor)
        if operation.type in _SPLITS:
            _split(run, operation)
    return run


def _split(run: Run, operation: _Operation) -> None:
    """Equal parts of a last axis."""
    import tensorflow as tf

    tensor, axis = (operation.inputs[i] for i in _SPLITS[operation.type])
    told, sizes = tf.get_static_value(axis), [part.shape.as_list() for part in operation.outputs]
    rank = tensor.shape.rank
    if told is not None and rank and int(told) % rank == rank - 1 and all(s == sizes[0] for s in sizes):
        run.attention.split(tensor.ref(), [part.ref() for part in operation.outputs])


def _attention(run: Run, operation: _Operation, known: Sequence[Origin], made: _Tensor) -> None:
    """What an operation does to the scores of an attention."""
    if operation.type == "Softmax":
        run.attention.normalized(operation.inputs[0].ref(), made.ref(), -1)
    elif operation.type in _PRODUCTS and len(known) == 2 and made.shape.rank is not None:
        factors = [
            Factor(t.ref(), o.given)
            for t, o in zip(operation.inputs, known, strict=True)
            if o.given is not None
        ]
        if len(factors) != 2:
            return
        axes: Sequence[int | None] = [*(None for _ in range(made.shape.rank - 2)), 0, 1]
        if operation.type == "Einsum":
            axes = _factors(operation.get_attr("equation"))
        run.attention.multiplied((factors[0], factors[1]), made.ref(), axes)


def _factors(equation: object) -> list[int | None]:
    """Of each axis of an Einstein sum the one factor that has it: `BTNH,BSNH->BNTS` is none, none, 0, 1."""
    text = equation.decode() if isinstance(equation, bytes) else str(equation)
    given, _, made = text.partition("->")
    first, _, second = given.partition(",")
    return [None if (axis in first) == (axis in second) else int(axis in second) for axis in made]


def _axes(run: Run, operation: _Operation, made: _Tensor) -> None:
    """What an operation does to the axes of images and of scores."""
    import tensorflow as tf

    shape = _sizes(made)
    if shape is None:
        return
    if operation.type in _CONVOLUTIONS:
        last = str(operation.get_attr("data_format")).endswith("C'")
        run.images.convolved(made.ref(), len(shape), channels_last=last)
        return
    order = tf.get_static_value(operation.inputs[1]) if operation.type == "Transpose" else None
    sized = [(tensor.ref(), size) for tensor in operation.inputs if (size := _sizes(tensor)) is not None]
    for follower in run.followers:
        if operation.type == "Transpose":
            if order is not None:
                follower.permuted(operation.inputs[0].ref(), made.ref(), [int(axis) for axis in order])
        elif operation.type == "Squeeze":
            dropped = operation.get_attr("squeeze_dims")
            follower.squeezed(operation.inputs[0].ref(), made.ref(), list(dropped))  # type: ignore[call-overload]
        elif operation.type in ("Reshape", "ExpandDims"):
            before = _sizes(operation.inputs[0])
            if before is not None:
                follower.reshaped(operation.inputs[0].ref(), made.ref(), before, shape)
        elif operation.type not in _PRODUCTS:
            follower.passed(sized, made.ref(), shape)


def _sizes(tensor: _Tensor) -> tuple[int, ...] | None:
    return tuple(tensor.shape.as_list()) if tensor.shape.is_fully_defined() else None
