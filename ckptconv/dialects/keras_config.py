"""The layers that the config of a Keras model declares, in the model's order.

    {"class_name": "Functional", "config": {"layers": [{"class_name": "Dense", "config": {...}}, ...]}}

is the form of every Keras since 2.0; a Sequential of Keras before 2.2.3 has the list alone for a config.
Keras 3 and the `.keras` files of tf_keras name the module of each class, older files of HDF5 do not. Layers
of layers are descended into: models, TimeDistributed, Bidirectional, RNN with its cells.

Source: keras 3.15.1 `keras/src/models/functional.py`, tf_keras 2.21 `tf_keras/src/engine/functional.py`,
keras 2.0.9 to 2.3.1 `keras/engine`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

from ckptconv.dialects.keras_flatten import flat_inputs
from ckptconv.rawtree import DictNode, ListNode, Node

MODELS = frozenset({"Sequential", "Functional", "Model"})
LAYERS, CELLS = "layers", "cells"
_PACKAGES = frozenset({"keras", "tf_keras", ""})
_CONTAINERS = {**dict.fromkeys(MODELS, LAYERS), "StackedRNNCells": CELLS}
"""Class -> the list in its config that holds its layers."""
WRAPPERS = {
    "TimeDistributed": {"layer": "layer"},
    "Bidirectional": {"forward_layer": "layer", "backward_layer": "backward_layer"},
    "RNN": {"cell": "cell"},
}
"""Class -> attribute of the layer inside it -> where that stands in its config."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """A layer as a config declares it."""

    name: str
    class_name: str
    of_keras: bool = True
    """Whether the class is one of Keras' own, as far as the config says."""
    arguments: Mapping[str, Node] = field(default_factory=dict)
    flat: str = ""
    """The axes that are merged in its input, of a layer behind a flattened image: `h=4*w=3*c`."""
    frozen: bool = False
    """Whether it, or a layer around it, is not trained."""
    container: str = ""
    """Attribute that is the list of `inside`, where it is a list."""
    inside: tuple[tuple[str, Layer], ...] = ()
    """Attribute and layer, of a layer of layers; elements of a list have no attribute."""

    @property
    def is_leaf(self) -> bool:
        """Whether its variables are its own."""
        return not self.inside and not self.container


def model_layer(config: Node) -> Layer | None:
    """A Sequential or Functional model; None for a class of a user's own, whose config tells nothing."""
    if not isinstance(config, DictNode) or text(config.get("class_name")) not in MODELS:
        return None
    found = _layer(config, frozen=False)
    return found if found is not None and found.of_keras else None


def leaves(layer: Layer, around: tuple[str, ...] = ()) -> Iterator[tuple[str, Layer]]:
    """Every layer with variables of its own, below or at one, under a name with those around it."""
    here = (*around, layer.name) if layer.name else around
    if layer.is_leaf:
        yield "/".join(here), layer
    for attribute, inner in layer.inside:
        yield from leaves(inner, (*here, label(attribute)) if label(attribute) else here)


def label(attribute: str) -> str:
    """What an attribute adds to the names of the variables below it: the cell of a layer adds nothing."""
    return "" if attribute.lstrip("_") == "cell" else attribute


def is_of_keras(config: DictNode) -> bool:
    """Whether a class is one of Keras' own, as far as the config says."""
    return text(config.get("module")).split(".")[0] in _PACKAGES


def plain_class(config: DictNode) -> str:
    """The name of a class, without what Keras puts before those that it has registered."""
    return text(config.get("class_name")).rpartition(">")[2]


def text(node: Node) -> str:
    return node if isinstance(node, str) else ""


def flags(config: Node) -> Mapping[str, Node]:
    """The entries of a config by name."""
    return {str(key): value for key, value in config.items} if isinstance(config, DictNode) else {}


def _layer(node: Node, *, frozen: bool, name: str | None = None) -> Layer | None:
    if not isinstance(node, DictNode):
        return None
    config = node.get("config")
    class_name, of_keras = text(node.get("class_name")), is_of_keras(node)
    arguments = flags(config)
    frozen = frozen or arguments.get("trainable") is False
    named = text(arguments.get("name")) if name is None else name
    container = _CONTAINERS.get(class_name, "") if of_keras else ""
    inside: tuple[tuple[str, Layer], ...] = ()
    if container:
        listed = config if isinstance(config, ListNode) else arguments.get(container)
        inner = listed.items if isinstance(listed, ListNode) else ()
        flat = flat_inputs(inner) if container == LAYERS else {}
        inside = tuple(
            ("", replace(one, flat=flat.get(one.name, "")))
            for part in inner
            if (one := _layer(part, frozen=frozen)) is not None
        )
    elif of_keras and class_name in WRAPPERS:
        places = WRAPPERS[class_name].items()
        parts = ((attribute, arguments.get(place) or arguments.get("layer")) for attribute, place in places)
        inside = tuple(
            (attribute, one)
            for attribute, part in parts
            if (one := _layer(part, frozen=frozen, name="")) is not None
        )
    return Layer(
        name=named,
        class_name=class_name,
        of_keras=of_keras,
        arguments=arguments,
        frozen=frozen,
        container=container,
        inside=inside,
    )
