"""The variables of a Keras 3 model in its own files, by config where there is one, else by groups.

With a config: the layers of a Sequential or Functional model stand in `layers/<class>[_k]`, k counting the
layers of a class in the config's order; names, classes, flags and order are *declared*. Layers that the
table does not know keep their numbers for names. Without a config, or under a model of a user's own class,
the groups' names tell the class inside a list of layers (*named*) and nothing elsewhere.

Order without a config is that in which the groups were written, which is the models' for lists of layers;
attributes of a class are written by name, so that the order of training is not told there.

Source: keras 3.15.1 `keras/src/saving/saving_lib.py` (`_save_container_state`, `_walk_saveable`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from ckptconv.catalog import keras_variables
from ckptconv.catalog.keras_variables import FileVariable
from ckptconv.document import Evidence
from ckptconv.rawtree import DictNode, ListNode, Node
from ckptconv.tensor import StoredTensor, TensorRef

Path = tuple[str, ...]
VARS, LAYERS = "vars", "layers"
_MODELS = frozenset({"Sequential", "Functional", "Model"})
_INSIDE = {"TimeDistributed": ("layer",), "Bidirectional": ("forward_layer", "backward_layer")}
_OPTIMIZER = "optimizer"


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """One variable of the model."""

    path: Path
    """Below the root of the weights."""
    name: str
    tensor: TensorRef
    layer: str = "unknown"
    role: str = "unknown"
    axes: tuple[str, ...] | None = None
    evidence: Evidence = "unknown"
    trainable: bool | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """What the files tell of the model."""

    variables: tuple[Found, ...]
    declared: bool
    """Whether the order, names and flags are the config's."""
    ordered: bool
    """Whether the variables are in the order in which they are trained."""


def model_of(weights: DictNode, config: DictNode | None) -> Model:
    """The model's variables, in its order."""
    if config is not None and config.get("class_name") in _MODELS and _is_keras(config):
        inner = config.get("config")
        if isinstance(inner, DictNode):
            found = tuple(_layers(weights, (), inner, "", frozen=inner.get("trainable") is False))
            unknown = any(one.trainable is None for one in found)
            return Model(variables=_distinct(found), declared=True, ordered=not unknown)
    groups = sorted(_groups(weights, ()), key=lambda item: _offset(item[1]))
    found = tuple(one for path, group in groups for one in _by_group(path, group, weights))
    listed = all(path[:1] == (LAYERS,) and _offset(group) >= 0 for path, group in groups)
    return Model(variables=_distinct(found), declared=False, ordered=listed)


def numbered(group: Node) -> list[tuple[str, TensorRef]]:
    """The variables of a `vars` group by their numbers, which sort as numbers."""
    if not isinstance(group, DictNode):
        return []
    found = [
        (key, node)
        for key, node in group.items
        if isinstance(key, str) and key.isdecimal() and isinstance(node, TensorRef)
    ]
    return sorted(found, key=lambda item: int(item[0]))


def below(group: Node, *path: str) -> Node:
    """The node at a path of groups, None where there is none."""
    for step in path:
        group = group.get(step) if isinstance(group, DictNode) else None
    return group


def text(node: Node) -> str:
    return node if isinstance(node, str) else ""


def _is_keras(config: DictNode) -> bool:
    return text(config.get("module")).split(".")[0] == "keras"


def _layers(weights: DictNode, at: Path, config: DictNode, prefix: str, *, frozen: bool) -> Iterator[Found]:
    """Every layer of a Sequential or Functional config, whose group is at `at`."""
    counted: dict[str, int] = {}
    layers = config.get("layers")
    for layer in layers.items if isinstance(layers, ListNode) else ():
        if not isinstance(layer, DictNode):
            continue
        group = keras_variables.snake_case(text(layer.get("class_name")))
        count = counted[group] = counted.get(group, -1) + 1
        yield from _layer(
            weights, (*at, LAYERS, f"{group}_{count}" if count else group), layer, prefix, frozen=frozen
        )


def _layer(
    weights: DictNode, at: Path, layer: DictNode, prefix: str, *, frozen: bool, name: str | None = None
) -> Iterator[Found]:
    config = layer.get("config")
    class_name = text(layer.get("class_name"))
    if not isinstance(config, DictNode) or not isinstance(below(weights, *at), DictNode):
        return
    name = name or text(config.get("name")) or at[-1]
    frozen = frozen or config.get("trainable") is False
    if not _is_keras(layer):
        class_name = ""
    if class_name in _MODELS:
        yield from _layers(weights, at, config, f"{prefix}{name}/", frozen=frozen)
        return
    if class_name in _INSIDE:
        for part in _INSIDE[class_name]:
            inner = config.get("backward_layer" if part == "backward_layer" else "layer")
            inner = inner if isinstance(inner, DictNode) else config.get("layer")
            if isinstance(inner, DictNode):
                yield from _layer(weights, (*at, part), inner, f"{prefix}{name}/", frozen=frozen, name=part)
        return
    flags = {key: value for key, value in config.items if isinstance(key, str)}
    known = keras_variables.variables_of(class_name, flags)
    found = list(_of_table(weights, at, f"{prefix}{name}", class_name, known, "declared", frozen=frozen))
    yield from found or _untold(below(weights, *at), at, f"{prefix}{name}", frozen=frozen)


def _of_table(
    weights: DictNode,
    at: Path,
    name: str,
    class_name: str,
    known: tuple[FileVariable, ...] | None,
    evidence: Evidence,
    *,
    frozen: bool,
) -> Iterator[Found]:
    """The variables of a layer of a known class; none where the file has others than the class makes."""
    parts: dict[str, list[FileVariable]] = {}
    for variable in known or ():
        parts.setdefault(variable.part, []).append(variable)
    owners = {part: (*at, *part.split("/"), VARS) if part else (*at, VARS) for part in parts}
    stored = {part: numbered(below(weights, *owner)) for part, owner in owners.items()}
    if any(len(stored[part]) != len(variables) for part, variables in parts.items()):
        return
    for part, variables in parts.items():
        for variable, (number, tensor) in zip(variables, stored[part], strict=True):
            layout = keras_variables.layout(class_name, variable, tensor.shape)
            kind, role, axes = layout or ("unknown", "unknown", None)
            leaf = variable.edge.removeprefix("_")
            yield Found(
                path=(*owners[part], number),
                name=f"{name}/{part}/{leaf}" if part and part != "cell" else f"{name}/{leaf}",
                tensor=tensor,
                layer=kind,
                role=role,
                axes=axes,
                evidence=evidence if layout else "unknown",
                trainable=variable.trained and not frozen,
            )


def _untold(group: Node, at: Path, name: str, *, frozen: bool) -> Iterator[Found]:
    """Variables of a layer that no table knows: by their numbers."""
    if not isinstance(group, DictNode):
        return
    for path, owner in sorted(_groups(group, ()), key=lambda item: _offset(item[1])):
        if path[:1] == ("seed_generator",):
            continue
        inner = "/".join((name, *path))
        for number, tensor in numbered(owner):
            yield Found(
                path=(*at, *path, VARS, number),
                name=f"{inner}/{number}",
                tensor=tensor,
                trainable=False if frozen else None,
            )


def _groups(group: DictNode, at: Path) -> Iterator[tuple[Path, DictNode]]:
    """The owners of variables, with their `vars`; not those of optimizers and generators."""
    for key, node in group.items:
        if not isinstance(node, DictNode) or not isinstance(key, str):
            continue
        if key == VARS:
            if numbered(node):
                yield at, node
        elif (at or key != _OPTIMIZER) and not key.startswith("seed_generator"):
            yield from _groups(node, (*at, key))


def _offset(group: DictNode) -> int:
    """Where a group's first variable lies, -1 where that is not known: groups follow one another."""
    return min(
        (t.extent.offset if isinstance(t, StoredTensor) else -1 for _, t in numbered(group)), default=-1
    )


def _by_group(path: Path, group: DictNode, weights: DictNode) -> Iterator[Found]:
    """The variables of one `vars` group without a config."""
    own = numbered(group)
    state = group.state
    told = text(state.get("name")) if isinstance(state, DictNode) else ""
    owner = path[-1] if path else "model"
    class_name = ""
    if LAYERS in path[:-1] and path[-2] == LAYERS:
        class_name = keras_variables.CLASS_OF.get(re.sub(r"_\d+$", "", owner), "")
        class_name = class_name or keras_variables.CLASS_OF.get(owner, "")
    shapes = tuple(tensor.shape for _, tensor in own)
    known = keras_variables.by_count(class_name, shapes) if class_name else None
    outer = [step for step in path[:-1] if step != LAYERS]
    name = "/".join([*outer, told or owner])
    found = list(_of_table(weights, path, name, class_name, known, "named", frozen=False))
    for one in found:
        # No flag of training is in such a file; statistics are never trained.
        yield one if one.trainable is False else replace(one, trainable=None)
    if not found:
        for number, tensor in own:
            yield Found(path=(*path, VARS, number), name=f"{name}/{number}", tensor=tensor)


def _distinct(found: tuple[Found, ...]) -> tuple[Found, ...]:
    """The variables under names that are theirs alone: the path where two would have the same."""
    counts: dict[str, int] = {}
    for one in found:
        counts[one.name] = counts.get(one.name, 0) + 1
    return tuple(one if counts[one.name] == 1 else replace(one, name="/".join(one.path)) for one in found)


def flags(config: Node) -> Mapping[str, Node]:
    """The entries of a config by name."""
    return {str(key): value for key, value in config.items} if isinstance(config, DictNode) else {}
