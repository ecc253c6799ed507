"""Which variables a Keras layer makes, and in which order: the numbers below `vars` in its files.

A file numbers an object's variables in the order in which it made them; the order is that of the layer's
`build`, and arguments of the layer say which exist. A layer of layers has paths to those inside it. Keras 3
and tf_keras make the same ones; they differ in the names of some (`_kernel`, `kernel`), and in those of the
layers inside MultiHeadAttention.

Source: keras 3.15.1 `keras/src/layers`, tf_keras 2.21 `tf_keras/src/layers`; measured 3.3.3 to 3.15.1.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import product
from types import MappingProxyType

from ckptconv.catalog.flatten import flattened
from ckptconv.catalog.layers import declared, kind_of_class_name, told_settings


@dataclass(frozen=True, slots=True)
class FileVariable:
    """One variable of a layer."""

    edge: str
    """Its key in the layer catalog, in the column of Keras 3."""
    flag: str | None = None
    """Argument of the layer without which it does not exist; after a `!` one with which it does not."""
    part: str = ""
    """Object inside the layer that owns it (`cell`)."""
    trained: bool = True

    def made_by(self, config: Mapping[str, object]) -> bool:
        """Whether a layer with these arguments has it."""
        if self.flag is None:
            return True
        name = self.flag.removeprefix("!")
        return bool(config.get(name)) is (name == self.flag)

    @property
    def leaf(self) -> str:
        """Its own name, which ends the names that files give it."""
        return self.edge.removeprefix("_").removeprefix("adapt_")


def _v(edge: str, flag: str | None = None, part: str = "", *, trained: bool = True) -> FileVariable:
    return FileVariable(edge, flag, part, trained)


_BIAS = _v("bias", "use_bias")
_AFFINE = (_v("gamma", "scale"), _v("beta", "center"))
_CELL = (_v("kernel", None, "cell"), _v("recurrent_kernel", None, "cell"), _v("bias", "use_bias", "cell"))
_ATTENTION = tuple(
    variable
    for part in ("query_dense", "key_dense", "value_dense", "output_dense")
    for variable in (_v("kernel", None, part), _v("bias", "use_bias", part))
)

_PLAIN = (_v("_kernel"), _BIAS)
_OTHER_WAY = (_v("kernel"), _BIAS)
_SEPARABLE = (_v("depthwise_kernel"), _v("pointwise_kernel"), _BIAS)
_LONE_CELL = (_v("kernel"), _v("recurrent_kernel"), _BIAS)

VARIABLES: Mapping[str, tuple[FileVariable, ...]] = {
    "Dense": _PLAIN,
    "Conv1D": _PLAIN,
    "Conv2D": _PLAIN,
    "Conv3D": _PLAIN,
    "EinsumDense": (_v("_kernel"), _v("bias", "bias_axes")),
    "Conv1DTranspose": _OTHER_WAY,
    "Conv2DTranspose": _OTHER_WAY,
    "Conv3DTranspose": _OTHER_WAY,
    "DepthwiseConv1D": _OTHER_WAY,
    "DepthwiseConv2D": _OTHER_WAY,
    "SeparableConv1D": _SEPARABLE,
    "SeparableConv2D": _SEPARABLE,
    "Embedding": (_v("_embeddings"),),
    "ReversibleEmbedding": (_v("_embeddings"), _v("reverse_embeddings", "!tie_weights")),
    "BatchNormalization": (
        *_AFFINE,
        _v("moving_mean", trained=False),
        _v("moving_variance", trained=False),
    ),
    "LayerNormalization": _AFFINE,
    "GroupNormalization": _AFFINE,
    "RMSNormalization": (_v("scale"),),
    "PReLU": (_v("alpha"),),
    "LSTM": _CELL,
    "GRU": _CELL,
    "SimpleRNN": _CELL,
    "ConvLSTM1D": _CELL,
    "ConvLSTM2D": _CELL,
    "ConvLSTM3D": _CELL,
    "LSTMCell": _LONE_CELL,
    "GRUCell": _LONE_CELL,
    "SimpleRNNCell": _LONE_CELL,
    "MultiHeadAttention": _ATTENTION,
    "Normalization": (
        _v("adapt_mean", trained=False),
        _v("adapt_variance", trained=False),
        _v("count", trained=False),
    ),
}
"""Class -> its variables. A flag that is absent in a layer's config or null counts as off."""

_OTHERS = {
    "DepthwiseConv1D": (_v("depthwise_kernel"), _BIAS),
    "DepthwiseConv2D": (_v("depthwise_kernel"), _BIAS),
    "MultiHeadAttention": tuple(replace(one, part=f"_{one.part}") for one in _ATTENTION),
}
"""Class -> its variables in tf_keras, where they are others than in Keras 3."""


@dataclass(frozen=True, slots=True)
class _Column:
    """One generation of Keras."""

    name: str
    """Column of the layer catalog."""
    package: str
    """What the names of its classes begin with there."""
    variables: Mapping[str, tuple[FileVariable, ...]]


_TF_KERAS = _Column(
    "tf_keras",
    "tf_keras",
    {
        name: tuple(replace(one, edge=one.leaf) for one in known)
        for name, known in {**VARIABLES, **_OTHERS}.items()
    },
)
_COLUMNS = {
    "keras3": _Column("keras3", "keras", VARIABLES),
    "tf_keras": _TF_KERAS,
    "tf_keras_legacy": _TF_KERAS,
}


def variables_of(
    class_name: str, config: Mapping[str, object], framework: str = "keras3"
) -> tuple[FileVariable, ...] | None:
    """The variables that a layer has with these arguments; None where the class is not known.

    `framework`: generation of Keras that made the layer.
    """
    known = _COLUMNS[framework].variables.get(class_name)
    if known is None:
        return None
    return tuple(variable for variable in known if variable.made_by(config))


def all_of(class_name: str, framework: str) -> tuple[FileVariable, ...]:
    """Every variable that a layer of the class may have; none where the class is not known."""
    return _COLUMNS[framework].variables.get(class_name, ())


def by_count(
    class_name: str, shapes: tuple[tuple[int, ...], ...], framework: str = "keras3"
) -> tuple[FileVariable, ...] | None:
    """The variables that a layer with these shapes must have; None where several arguments would do."""
    known = all_of(class_name, framework)
    flags = sorted({variable.flag.removeprefix("!") for variable in known if variable.flag is not None})
    found = set()
    for values in product((False, True), repeat=len(flags)):
        fit = variables_of(class_name, dict(zip(flags, values, strict=True)), framework) or ()
        ranks = len(fit) == len(shapes) and all(
            layout(class_name, variable, shape, framework) is not None or kind(class_name, framework) is None
            for variable, shape in zip(fit, shapes, strict=True)
        )
        if ranks:
            found.add(fit)
    return found.pop() if len(found) == 1 else None


def kind(
    class_name: str, framework: str = "keras3", config: Mapping[str, object] = MappingProxyType({})
) -> str | None:
    """The catalog's kind of a class of Keras, with these arguments where they matter."""
    column = _COLUMNS[framework]
    return kind_of_class_name(column.name, f"{column.package}.{class_name}", config)


def layout(
    class_name: str,
    variable: FileVariable,
    shape: tuple[int, ...],
    framework: str = "keras3",
    config: Mapping[str, object] = MappingProxyType({}),
    flat: str = "",
) -> tuple[str, str, tuple[str, ...]] | None:
    """Kind, role and axes of a variable; None where the catalog does not know them.

    `flat`: the axes that are merged in the layer's input, where it is a flattened image (`h=4*w=3*c`).
    """
    named = kind(class_name, framework, config)
    found = None if named is None else declared(framework, named, variable.edge, shape)
    if named is None or found is None:
        return None
    role, axes = found
    return named, role, flattened(axes, shape, flat) if flat else axes


def settings(class_name: str, framework: str, config: Mapping[str, object]) -> Mapping[str, float]:
    """What a layer with these arguments computes with beside its variables (`layer_settings`)."""
    named = kind(class_name, framework, config)
    return {} if named is None else told_settings(framework, named, config.get)


def snake_case(class_name: str) -> str:
    """The name of a class in a file: `conv2d_transpose` for `Conv2DTranspose`."""
    name = re.sub(r"\W+", "", class_name)
    name = re.sub("(.)([A-Z][a-z]+)", r"\1_\2", name)
    return re.sub("([a-z])([A-Z])", r"\1_\2", name).lower()
