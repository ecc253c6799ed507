"""The variables of a Keras model in its own files without a config: what the names of groups tell.

A list of layers is written in the model's order, each layer in a group that is named after its class
(*named*); so are those of a model inside. The attributes of a layer, or of a model of a user's own class, are
written by name: which order they are trained in tells the table, for classes that it has, and nothing else.
Since Keras 3.6 a group says what its layer is called, and so the class of one that was given no name. No flag
of training is in such a file; statistics are never trained.

Source: keras 3.15.1 `keras/src/saving/saving_lib.py` (`_save_container_state`, `_walk_saveable`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

from ckptconv.catalog import keras_variables
from ckptconv.dialects.keras_config import CELLS, LAYERS, MODELS, WRAPPERS, Layer, label, text
from ckptconv.dialects.keras_file_model import (
    DEPENDENCIES,
    VARS,
    Found,
    Model,
    Path,
    below,
    distinct,
    numbered,
    of_table,
    owners,
)
from ckptconv.rawtree import DictNode, Node
from ckptconv.tensor import StoredTensor

_CLASS_OF = {
    keras_variables.snake_case(name): name for name in (*keras_variables.VARIABLES, *MODELS, *WRAPPERS)
}


class _One(NamedTuple):
    """A variable, and whether it stands where it is trained."""

    found: Found
    in_order: bool


def model_by_groups(weights: DictNode, framework: str) -> Model:
    """The model's variables, in the order of its lists of layers; `framework` is the generation of Keras."""
    lists = [key for key in (LAYERS, DEPENDENCIES) if isinstance(below(weights, key), DictNode)]
    listed = [one for key in lists for one in _list(weights, (key,), "", framework)]
    others = [
        one
        for path, _ in owners(weights, ())
        if path[:1] not in [(key,) for key in lists]
        for one in _attribute(weights, path, "/".join(path) or "model", framework)
    ]
    ordered = not others and all(one.in_order and _is_placed(one.found) for one in listed)
    return Model(variables=distinct((*(one.found for one in listed), *others)), ordered=ordered)


def told(group: Node) -> str:
    """The name that a group of variables says it has, since Keras 3.6."""
    state = group.state if isinstance(group, DictNode) else None
    return text(state.get("name")) if isinstance(state, DictNode) else ""


def _is_placed(one: Found) -> bool:
    """Whether its place in the file is known: groups are read in the order of their places."""
    return isinstance(one.tensor, StoredTensor)


def _list(weights: DictNode, at: Path, prefix: str, framework: str) -> Iterator[_One]:
    """The variables of the layers in a list."""
    container = below(weights, *at)
    for key in container.keys if isinstance(container, DictNode) else ():
        if isinstance(key, str) and isinstance(below(container, key), DictNode):
            class_name = _CLASS_OF.get(key) or _CLASS_OF.get(re.sub(r"_\d+$", "", key), "")
            name = f"{prefix}{told(below(container, key, VARS)) or key}"
            yield from _layer(weights, (*at, key), class_name, name, framework)


def _layer(weights: DictNode, at: Path, class_name: str, name: str, framework: str) -> Iterator[_One]:
    group = below(weights, *at)
    inside = [key for key in (LAYERS, DEPENDENCIES, CELLS) if isinstance(below(group, key), DictNode)]
    if inside and class_name not in keras_variables.VARIABLES:
        for key in inside:
            yield from _list(weights, (*at, key), f"{name}/", framework)
        return
    if class_name in WRAPPERS:
        for attribute in WRAPPERS[class_name]:
            added = "/".join(filter(None, (name, label(attribute))))
            yield from _layer(weights, (*at, attribute), "", added, framework)
        return
    known = keras_variables.by_count(class_name, _shapes(group, class_name, framework), framework)
    layer = Layer(name=name, class_name=class_name)
    found = list(of_table(weights, at, name, layer, known, "named", framework))
    for one in found:
        yield _One(one if one.trainable is False else replace(one, trainable=None), True)
    if found:
        return
    own = [path for path, _ in owners(group, ())]
    for path in own:
        for one in _attribute(weights, (*at, *path), "/".join((name, *path)), framework):
            yield _One(one, len(own) == 1)


def _attribute(weights: DictNode, at: Path, name: str, framework: str) -> Iterator[Found]:
    """Variables of a layer that is an attribute: by its class, if it is named after that, or by number."""
    group = below(weights, *at)
    class_name = _CLASS_OF.get(re.sub(r"_\d+$", "", told(below(group, VARS))), "")
    if class_name in keras_variables.VARIABLES:
        known = keras_variables.by_count(class_name, _shapes(group, class_name, framework), framework)
        layer = Layer(name=name, class_name=class_name)
        found = list(of_table(weights, at, name, layer, known, "named", framework))
        if found:
            yield from (one if one.trainable is False else replace(one, trainable=None) for one in found)
            return
    yield from _numbers(weights, at, name)


def _shapes(group: Node, class_name: str, framework: str) -> tuple[tuple[int, ...], ...]:
    """Shapes of a layer's variables, in the order of the table."""
    parts = dict.fromkeys(one.part for one in keras_variables.all_of(class_name, framework))
    places = [(*part.split("/"), VARS) if part else (VARS,) for part in parts]
    return tuple(tensor.shape for place in places for _, tensor in numbered(below(group, *place)))


def _numbers(weights: DictNode, at: Path, name: str) -> Iterator[Found]:
    """The variables of one group by their numbers."""
    for number, tensor in numbered(below(weights, *at, VARS)):
        yield Found(path=(*at, VARS, number), name=f"{name}/{number}", tensor=tensor)
