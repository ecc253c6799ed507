"""The same model with its modules under other names, and declared in another order."""

from __future__ import annotations

import copy
import random
from typing import Any

import keras
from torch import nn


def torch_variant(model: nn.Module, seed: int) -> tuple[nn.Module, dict[str, str]]:
    """A copy in which every module has a random name and stands among its siblings in a random order.

    Members of a Sequential or a ModuleList keep their order, which is what it computes, and a ModuleList's
    their numbers. Also new -> old name of every parameter and buffer.
    """
    rng = random.Random(seed)
    model = copy.deepcopy(model)
    old: dict[int, str] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        old.setdefault(id(tensor), name)  # the first of those that are tied
    for module in list(model.modules()):
        if not module._modules or isinstance(module, nn.ModuleList):
            continue
        names = {name: f"m{rng.randrange(10**6)}_{i}" for i, name in enumerate(module._modules)}
        items = list(module._modules.items())
        if not isinstance(module, nn.Sequential):
            rng.shuffle(items)
            module.__class__ = _renamed(type(module), names)
        module._modules = {names[name]: inner for name, inner in items}
    return model, {name: old[id(tensor)] for name, tensor in model.state_dict(keep_vars=True).items()}


def _renamed(cls: type[nn.Module], names: dict[str, str]) -> type[nn.Module]:
    """The class, whose methods find its members under their new names."""

    class Renamed(cls):  # type: ignore[misc, valid-type]
        def __getattr__(self, name: str) -> Any:
            return super().__getattr__(names.get(name, name))

    return Renamed


def keras_variant(model: Any, seed: int) -> Any:
    """A copy in which every layer has a random name."""
    rng = random.Random(seed)
    used: set[str] = set()

    def clone(layer: Any) -> Any:
        name = "".join(rng.choices("abcdefgh", k=8))
        while name in used:
            name += "x"
        used.add(name)
        return layer.__class__.from_config({**layer.get_config(), "name": name})

    return keras.models.clone_model(model, clone_function=clone)
