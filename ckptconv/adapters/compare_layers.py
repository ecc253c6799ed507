"""Which live modules of a PyTorch model are which layers of a Keras model, from what makes which parameter.

A module and a layer are compared where the one's parameters make the other's. A layer that is several
modules, as a separable convolution, is compared where the last of them has run; a recurrent module with
several layers where the last of these has. Attention and recurrent modules stand for all that is in them. A
module whose output several layers share, such as one product for query, key and value, is compared with none.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ckptconv.adapters.keras import Layer
from ckptconv.catalog import layers
from ckptconv.document import module_of

if TYPE_CHECKING:
    import torch

_WHOLE = frozenset({"MultiheadAttention", "RNNBase"})
"""Modules of torch that do the work of several Keras layers by themselves."""
_AROUND = frozenset({"MultiHeadAttention", "RNN", "Bidirectional"})
"""Keras layers that call others for a part of their work."""
_REPEATED = frozenset({"TimeDistributed"})
"""Keras layers that call another at every step of time, where torch's takes all steps at once."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Match:
    """Modules and layers of which one makes the other; with more than one, the last that runs counts."""

    modules: Mapping[str, torch.nn.Module]
    """Path -> module."""
    layers: Mapping[str, Layer]
    """Name in the document -> layer."""


def matches(
    pairs: Iterable[tuple[str, str]], model: torch.nn.Module, keras_model: Layer, holders: Mapping[str, Layer]
) -> Iterator[Match]:
    """What is compared. `pairs`: names of a torch and a Keras parameter; `holders`: the layer of each."""
    around = list(_enclosing(keras_model, _AROUND))
    repeated = list(_enclosing(keras_model, _REPEATED))
    mine: dict[str, set[int]] = {}
    found: dict[int, Layer] = {}
    below: dict[int, list[str]] = {}
    for parameter, variable in pairs:
        path = module_of(parameter)
        module, layer = model.get_submodule(path), holders[variable]
        if _is(module, _WHOLE):
            layer = _outermost(layer, around)
        elif _holds_others(module) or sum(1 for _ in layer._flatten_layers()) > 1:
            continue  # what it gives out is made by others, too
        layer = _outermost(layer, repeated)
        mine.setdefault(path, set()).add(id(layer))
        found[id(layer)] = layer
        below.setdefault(id(layer), []).append(module_of(variable))
    names = {key: _common(each) for key, each in below.items()}
    for paths, keys in _components(mine):
        whole = _is(model.get_submodule(paths[0]), _WHOLE)
        if len(keys) > 1 and not whole:
            continue  # what it gives out is cut into what several layers do
        yield Match(
            modules={path: model.get_submodule(path) for path in paths},
            layers={names[key]: found[key] for key in keys},
        )


def is_around(layer: Layer) -> bool:
    """Whether a layer calls others for a part of its work."""
    return _is(layer, _AROUND)


def _common(names: Sequence[str]) -> str:
    """What the names of all that is in a layer begin with."""
    first, last = min(names).split("/"), max(names).split("/")
    return "/".join(one for one, other in zip(first, last, strict=False) if one == other)


def _is(value: object, classes: frozenset[str]) -> bool:
    return any(base.__name__ in classes for base in type(value).__mro__)


def _holds_others(module: torch.nn.Module) -> bool:
    known = layers.kind_of_class("torch", type(module), module) is not None
    return not known and next(module.children(), None) is not None


def _outermost(layer: Layer, around: Iterable[tuple[Layer, frozenset[int]]]) -> Layer:
    """The first layer that the layer is in, or itself."""
    return next((each for each, inside in around if id(layer) in inside), layer)


def _enclosing(model: Layer, classes: frozenset[str]) -> Iterator[tuple[Layer, frozenset[int]]]:
    """Layers of some classes, the outermost first, and the identities of all in them."""
    found = [
        (layer, frozenset(map(id, layer._flatten_layers())))
        for layer in model._flatten_layers()
        if _is(layer, classes)
    ]
    yield from sorted(found, key=lambda one: -len(one[1]))


def _components(links: Mapping[str, set[int]]) -> Iterator[tuple[tuple[str, ...], tuple[int, ...]]]:
    """Sets of modules and layers that are linked, in the order of the modules."""
    rest = dict(links)
    while rest:
        path, keys = next(iter(rest.items()))
        paths = {path: None}
        while more := [other for other, its in rest.items() if other not in paths and its & keys]:
            for other in more:
                paths[other] = None
                keys = keys | rest[other]
        for each in paths:
            del rest[each]
        yield tuple(paths), tuple(keys)
