"""Which layers of a Keras model take a flattened image, from its config.

    {"class_name": "Flatten", "build_config": {"input_shape": [null, 4, 3, 8]}, "inbound_nodes": [...]}

A Flatten whose input a convolution made (poolings, activations and the like between) has an image before it,
the channels last: what the layers behind it take is in the order of `build_config`. Nothing is said behind
LSTM layers, which have their features last in every framework, behind layers of which nothing is known, and
in `.h5` files, whose config has no shapes.

Source: keras 3.15.1 `keras/src/layers/reshaping/flatten.py`, `keras/src/models/functional.py` (the inbound
nodes' `keras_history`), tf_keras 2.21 `tf_keras/src/engine/functional.py` (`[[["conv2d", 0, 0, {}]]]`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from ckptconv.rawtree import DictNode, ListNode, Node, children

_SPACE = {4: ("h", "w"), 3: ("w",), 5: ("d", "h", "w")}
"""Rank of a batch of images -> the axes between the batch and the channels."""
_KEEPS = frozenset(
    (
        *("Activation", "ReLU", "LeakyReLU", "ELU", "PReLU", "ThresholdedReLU", "Add", "Average", "Maximum"),
        *(
            "Multiply",
            "Dropout",
            "AlphaDropout",
            "GaussianDropout",
            "GaussianNoise",
            "ActivityRegularization",
        ),
        *("BatchNormalization", "LayerNormalization", "GroupNormalization", "RMSNormalization"),
        "UnitNormalization",
        *(
            f"{name}{rank}D"
            for rank in (1, 2, 3)
            for name in (
                *("MaxPooling", "AveragePooling", "ZeroPadding", "Cropping"),
                *("UpSampling", "SpatialDropout"),
            )
        ),
    )
)
"""Classes that leave the channels where they are."""


@dataclass(frozen=True, slots=True)
class _One:
    """A layer in the list of a model."""

    class_name: str
    before: tuple[str, ...]
    """Layers whose output it takes."""
    shape: tuple[int, ...] | None
    """Of its input, without the batch, where the config tells it whole."""
    channels_last: bool


def flat_inputs(layers: Sequence[Node]) -> Mapping[str, str]:
    """Layer -> the axes that are merged in its input, `c` for the channels: `h=4*w=3*c`."""
    listed: dict[str, _One] = {}
    for node in layers:
        if isinstance(node, DictNode):
            name, one = _read(node, tuple(listed)[-1:])
            listed[name] = one
    behind: dict[str, list[str]] = {}
    for name, one in listed.items():
        for before in one.before:
            behind.setdefault(before, []).append(name)
    found: dict[str, str] = {}
    for name, one in listed.items():
        merged = _merged(one) if one.class_name == "Flatten" else None
        if merged is None or not _is_image(name, listed):
            continue
        pending = list(behind.get(name, ()))
        while pending:
            taker = pending.pop()
            if taker in found:
                continue
            found[taker] = merged
            if listed[taker].class_name in _KEEPS:
                pending += behind.get(taker, ())
    return found


def _read(node: DictNode, previous: tuple[str, ...]) -> tuple[str, _One]:
    config, built = node.get("config"), node.get("build_config")
    own = config if isinstance(config, DictNode) else DictNode()
    inbound = node.get("inbound_nodes")
    shape = built.get("input_shape") if isinstance(built, DictNode) else None
    sizes = shape.items[1:] if isinstance(shape, ListNode) else ()
    whole = tuple(size for size in sizes if isinstance(size, int) and size > 0)
    one = _One(
        class_name=str(node.get("class_name")).rpartition(">")[2],
        before=previous if inbound is None else tuple(dict.fromkeys(_names(inbound))),
        shape=whole if whole and len(whole) == len(sizes) else None,
        channels_last=own.get("data_format") in (None, "channels_last"),
    )
    return str(node.get("name") or own.get("name")), one


def _names(node: Node) -> Iterator[str]:
    """The layers that `inbound_nodes` names, in either form."""
    pending = [node]
    while pending:
        one = pending.pop()
        items = one.items if isinstance(one, ListNode) else ()
        if len(items) >= 3 and isinstance(items[0], str) and isinstance(items[1], int):
            yield items[0]
        pending += [part for _, part in children(one)]


def _merged(flatten: _One) -> str | None:
    names = _SPACE.get(len(flatten.shape) + 1) if flatten.shape is not None else None
    if names is None or flatten.shape is None or not flatten.channels_last:
        return None
    return "*".join([*(f"{name}={size}" for name, size in zip(names, flatten.shape, strict=False)), "c"])


def _is_image(name: str, listed: Mapping[str, _One]) -> bool:
    """Whether convolutions with their channels last made what the layer takes, and nothing else did."""
    pending, seen = list(listed[name].before), set[str]()
    if not pending:
        return False
    while pending:
        name = pending.pop()
        one = listed.get(name)
        if name in seen:
            continue
        seen.add(name)
        if one is None or not one.channels_last:
            return False
        if "Conv" in one.class_name and "LSTM" not in one.class_name:
            continue
        if one.class_name not in _KEEPS or not one.before:
            return False
        pending += one.before
    return True
