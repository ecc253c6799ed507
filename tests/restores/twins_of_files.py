"""A fresh model and optimizer of the architecture of a checkpoint, in the framework that is to go on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ckptconv.document import Checkpoint, Optimizer, Param
from tests.restores.files import keras_of

TORCH = {"adam": "Adam", "adamw": "AdamW", "nadam": "NAdam", "rmsprop": "RMSprop", "sgd": "SGD"}
KERAS = {"adam": "Adam", "adamw": "AdamW", "nadam": "Nadam", "rmsprop": "RMSprop", "sgd": "SGD"}


class NoTwin(Exception):
    """There is no layer for what stands in the file."""


def modules_of(checkpoint: Checkpoint) -> dict[str, dict[str, Param]]:
    """Name of a module -> its parameters by role."""
    found: dict[str, dict[str, Param]] = {}
    for name, param in checkpoint.params.items():
        cut = max(name.rfind("."), name.rfind("/"))
        role = "kernel" if param.role == "unknown" and name.endswith("embed.weight") else param.role
        if role == "unknown":
            raise NoTwin(name)
        if "embed" in name and role == "kernel":
            role = "embeddings"
        found.setdefault(name[: max(cut, 0)], {})[role] = param
    return found


def layer_shape(roles: Mapping[str, Param], of_torch: bool) -> tuple[str, tuple[int, ...]]:
    """Kind of layer, and its sizes: (in, out), (height, width, in, out), (rows, columns), (features,)."""
    if "embeddings" in roles:
        return "embedding", roles["embeddings"].tensor.shape
    if "gamma" in roles:
        kind = "batch-norm" if "moving_mean" in roles else "layer-norm"
        return kind, roles["gamma"].tensor.shape
    shape = roles["kernel"].tensor.shape if "kernel" in roles else ()
    axes = roles["kernel"].axes if "kernel" in roles else None
    if len(shape) == 2:
        turned = of_torch if not axes else axes[0] == "out"
        return "dense", tuple(reversed(shape)) if turned else shape
    if len(shape) == 4:
        return "conv", (*shape[2:], shape[1], shape[0]) if of_torch else shape
    raise NoTwin(", ".join(roles))


def optimizer_options(optimizer: Optimizer) -> dict[str, Any]:
    """What decides which state there is."""
    options: dict[str, Any] = {}
    if optimizer.algorithm == "sgd" and optimizer.slots:
        options["momentum"] = 0.9
    if any("max" in slot for slot in optimizer.slots):
        options["amsgrad"] = True
    return options


def torch_twin(checkpoint: Checkpoint, *, layers: bool = False) -> tuple[Any, Any]:
    """Modules of the same names; of a torch checkpoint its very parameters, unless it has to be layers."""
    import torch

    model = torch.nn.Module()
    if of_torch(checkpoint) and not layers:
        for name, param in checkpoint.params.items():
            *path, leaf = name.split(".")
            home = _inside(model, path)
            if param.role == "batch_count":
                home.register_buffer(leaf, torch.tensor(0))
            elif param.tied_to is not None:
                home.register_parameter(leaf, model.get_parameter(param.tied_to))
            elif param.trainable is False:
                home.register_buffer(leaf, torch.randn(param.tensor.shape))
            else:
                home.register_parameter(leaf, torch.nn.Parameter(torch.randn(param.tensor.shape)))
    elif (modules := modules_of(checkpoint)).keys() == {""}:
        model = _torch_layer(*layer_shape(modules[""], of_torch(checkpoint)), modules[""])
    else:
        for name, roles in modules.items():
            *path, leaf = name.replace("/", ".").split(".")
            layer = _torch_layer(*layer_shape(roles, of_torch(checkpoint)), roles)
            _inside(model, path).add_module(leaf, layer)
    chosen = checkpoint.optimizers[0] if checkpoint.optimizers else None
    algorithm = algorithm_of(checkpoint)
    options = optimizer_options(chosen) if chosen else {}
    groups: Any = model.parameters()
    if chosen and of_torch(checkpoint) and len(chosen.groups) > 1:
        named, unnamed = dict(model.named_parameters()), iter(model.parameters())
        groups = [
            {"params": [named[n] if n in named else next(unnamed) for n in group.params]}
            for group in chosen.groups
        ]
    return model, getattr(torch.optim, TORCH[algorithm])(groups, lr=0.01, **options)


def _inside(model: Any, path: list[str]) -> Any:
    import torch

    for part in path:
        if part not in dict(model.named_children()):
            model.add_module(part, torch.nn.Module())
        model = getattr(model, part)
    return model


def _torch_layer(kind: str, shape: tuple[int, ...], roles: Mapping[str, Param]) -> Any:
    import torch

    bias = "bias" in roles
    layers = {
        "dense": lambda: torch.nn.Linear(*shape, bias=bias),
        "conv": lambda: torch.nn.Conv2d(shape[2], shape[3], shape[:2], bias=bias),
        "embedding": lambda: torch.nn.Embedding(*shape),
        "batch-norm": lambda: torch.nn.BatchNorm1d(*shape),
        "layer-norm": lambda: torch.nn.LayerNorm(shape),
    }
    layer = layers[kind]()
    if all(param.trainable is False for param in roles.values()):
        layer.requires_grad_(False)
    return layer


def keras_twin(checkpoint: Checkpoint, generation: str) -> tuple[Any, Any]:
    """Layers one after the other, each built for the sizes that it has in the file."""
    keras = keras_of(generation)

    class Twin(keras.Model):  # type: ignore[misc]  # untyped
        def __init__(self) -> None:
            super().__init__()
            layers = [
                _keras_layer(keras, name, *layer_shape(roles, of_torch(checkpoint)), roles)
                for name, roles in modules_of(checkpoint).items()
            ]
            self.parts = tuple(layers)

    model = Twin()
    chosen = checkpoint.optimizers[0] if checkpoint.optimizers else None
    options = optimizer_options(chosen) if chosen else {}
    optimizer = getattr(keras.optimizers, KERAS[algorithm_of(checkpoint)])(0.01, **options)
    return model, optimizer


def _keras_layer(keras: Any, name: str, kind: str, shape: tuple[int, ...], roles: Mapping[str, Param]) -> Any:
    bias, layers = "bias" in roles, keras.layers
    made = {
        "dense": lambda: (layers.Dense(shape[-1], use_bias=bias), (None, shape[0])),
        "conv": lambda: (layers.Conv2D(shape[-1], shape[:2], use_bias=bias), (None, 9, 9, shape[2])),
        "embedding": lambda: (layers.Embedding(*shape), (None,)),
        "batch-norm": lambda: (layers.BatchNormalization(), (None, *shape)),
        "layer-norm": lambda: (layers.LayerNormalization(), (None, *shape)),
    }
    layer, sizes = made[kind]()
    layer(np.zeros([size or 1 for size in sizes], "f4" if kind != "embedding" else "i4"))
    if all(param.trainable is False for param in roles.values()):
        layer.trainable = False
    return layer


def of_torch(checkpoint: Checkpoint) -> bool:
    return checkpoint.provenance.format in ("pytorch", "dcp", "safetensors")


def algorithm_of(checkpoint: Checkpoint) -> str:
    """That of the file, or the first of those that it may be."""
    if not checkpoint.optimizers:
        return "adam"
    chosen = checkpoint.optimizers[0]
    name = chosen.algorithm_candidates[0] if chosen.algorithm_candidates else chosen.algorithm
    if name not in TORCH:
        raise NoTwin(name)
    return name
