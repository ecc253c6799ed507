"""The variables of a Keras model in its own files, where its config is there too.

The layers of a Sequential or Functional model stand in `layers/<class>[_k]`, k counting the layers of a
class in the config's order; names, classes, flags and order are *declared*. Layers that the table does not
know keep their numbers for names. Without a config: see `keras_file_groups`.

Keras 2.12 and 2.13 put the layers into `_layer_checkpoint_dependencies`, a dictionary in which a layer with
weights stands twice: k counts both places.

Source: keras 3.15.1 `keras/src/saving/saving_lib.py` (`_save_container_state`, `_walk_saveable`), tf_keras
2.21 and keras 2.12.0, 2.13.1 `saving/saving_lib.py` (`_walk_trackable`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from ckptconv.catalog import keras_variables
from ckptconv.catalog.keras_variables import FileVariable
from ckptconv.dialects.keras_config import LAYERS, Layer, label, leaves
from ckptconv.document import Evidence, Layout
from ckptconv.rawtree import DictNode, Node
from ckptconv.tensor import TensorRef

Path = tuple[str, ...]
VARS = "vars"
DEPENDENCIES = "_layer_checkpoint_dependencies"
_RANDOM = ("rate", "stddev", "dropout", "recurrent_dropout")
"""Arguments without which a layer with a seed draws no number."""
_SHOWN = 5
_BESIDE = frozenset({"optimizer", "metrics"})
"""Groups at the root that are no layers."""


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
    candidates: tuple[Layout, ...] = ()
    trainable: bool | None = None
    settings: Mapping[str, float] = field(default_factory=dict)
    """What its layer computes with beside its variables, by the config."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """What the files tell of the model."""

    variables: tuple[Found, ...]
    ordered: bool
    """Whether the variables are in the order in which they are trained."""
    oddities: tuple[str, ...] = ()


def declared_model(weights: DictNode, whole: Layer, framework: str) -> Model:
    """The variables of a model whose config is there, in its order."""
    found = tuple(_listed(weights, (), whole, "", framework))
    unknown = any(one.trainable is None for one in found)
    return Model(variables=distinct(found), ordered=not unknown, oddities=what_lacks(whole, found, framework))


def what_lacks(whole: Layer, found: Sequence[Found], framework: str) -> tuple[str, ...]:
    """What the config declares and the file does not hold: variables of layers, states of generators."""
    there = {"/".join(one.name.split("/")[:end]) for one in found for end in range(one.name.count("/") + 1)}
    without, random = [], []
    for name, leaf in (one for _, layer in whole.inside for one in leaves(layer)):
        if not leaf.of_keras:
            continue
        due = keras_variables.variables_of(leaf.class_name, leaf.arguments, framework)
        if due and name not in there and any(one.trained for one in due):
            without.append(name)
        if "seed" in leaf.arguments and any(leaf.arguments.get(key) for key in _RANDOM):
            random.append(name)
    said = []
    if without:
        said.append(f"the config declares layers of which the file has no variables: {_some(without)}")
    if random:
        said.append(f"states of random generators are not in the file: those of {_some(random)}")
    return tuple(said)


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


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


def _listed(weights: DictNode, at: Path, owner: Layer, prefix: str, framework: str) -> Iterator[Found]:
    """The variables of every layer in the list of one whose group is at `at`."""
    here = below(weights, *at)
    older = owner.container == LAYERS and isinstance(below(here, DEPENDENCIES), DictNode)
    container = DEPENDENCIES if older else owner.container
    counted: dict[str, int] = {}
    for _, layer in owner.inside:
        group = keras_variables.snake_case(layer.class_name)
        count = counted[group] = counted.get(group, -1) + 1
        path = (*at, container, f"{group}_{count}" if count else group)
        if older and any(owners(below(weights, *path), ())):
            counted[group] += 1
        yield from _of_layer(weights, path, layer, f"{prefix}{layer.name or path[-1]}", framework)


def _of_layer(weights: DictNode, at: Path, layer: Layer, name: str, framework: str) -> Iterator[Found]:
    if not isinstance(below(weights, *at), DictNode):
        return
    if layer.container:
        yield from _listed(weights, at, layer, f"{name}/", framework)
        return
    for attribute, inner in layer.inside:
        added = "/".join(part for part in (name, label(attribute)) if part)
        yield from _of_layer(weights, (*at, attribute), inner, added, framework)
    if layer.inside:
        return
    known = None
    if layer.of_keras:
        known = keras_variables.variables_of(layer.class_name, layer.arguments, framework)
    found = list(of_table(weights, at, name, layer, known, "declared", framework))
    yield from found or _untold(below(weights, *at), at, name, frozen=layer.frozen)


def of_table(
    weights: DictNode,
    at: Path,
    name: str,
    layer: Layer,
    known: tuple[FileVariable, ...] | None,
    evidence: Evidence,
    framework: str,
) -> Iterator[Found]:
    """The variables of a layer of a known class; none where the file has others than the class makes."""
    parts: dict[str, list[FileVariable]] = {}
    for variable in known or ():
        parts.setdefault(variable.part, []).append(variable)
    places = {part: (*at, *part.split("/"), VARS) if part else (*at, VARS) for part in parts}
    stored = {part: numbered(below(weights, *place)) for part, place in places.items()}
    if any(len(stored[part]) != len(variables) for part, variables in parts.items()):
        return
    for part, variables in parts.items():
        for variable, (number, tensor) in zip(variables, stored[part], strict=True):
            layout = keras_variables.layout(
                layer.class_name, variable, tensor.shape, framework, layer.arguments, layer.flat
            )
            kind, role, axes = layout or ("unknown", "unknown", None)
            inner = label(part).removeprefix("_")
            yield Found(
                path=(*places[part], number),
                name="/".join(filter(None, (name, inner, variable.leaf))),
                tensor=tensor,
                layer=kind,
                role=role,
                axes=axes,
                evidence=evidence if layout else "unknown",
                trainable=variable.trained and not layer.frozen,
                settings=keras_variables.settings(layer.class_name, framework, layer.arguments),
            )


def _untold(group: Node, at: Path, name: str, *, frozen: bool) -> Iterator[Found]:
    """Variables of a layer that no table knows: by their numbers."""
    if not isinstance(group, DictNode):
        return
    for path, owner in owners(group, ()):
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


def owners(group: Node, at: Path) -> Iterator[tuple[Path, DictNode]]:
    """The owners of variables, with their `vars`; not those of optimizers and generators."""
    for key, node in group.items if isinstance(group, DictNode) else ():
        if not isinstance(node, DictNode) or not isinstance(key, str):
            continue
        if key == VARS:
            if numbered(node):
                yield at, node
        elif (at or key not in _BESIDE) and not key.startswith("seed_generator"):
            yield from owners(node, (*at, key))


def distinct(found: tuple[Found, ...]) -> tuple[Found, ...]:
    """The variables under names that are theirs alone: the path where two would have the same."""
    counts: dict[str, int] = {}
    for one in found:
        counts[one.name] = counts.get(one.name, 0) + 1
    return tuple(one if counts[one.name] == 1 else replace(one, name="/".join(one.path)) for one in found)
