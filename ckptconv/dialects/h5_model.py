"""The variables of a Keras model in the `.h5` layout, by its arrays of names and by its config.

`layer_names` has the layers in the model's order, `weight_names` of each layer its variables: those that are
trained, then the others, also of a layer of layers. A config says which they are (*declared*), the variables'
own names have to agree. Without one, or for a layer that no table knows, the names are taken as they stand,
and tf_keras' last parts are the edges of its layers (*named*, or candidates).

Source: keras 3.15.1 `keras/src/legacy/saving/legacy_h5_format.py`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence

from ckptconv.catalog import keras_variables
from ckptconv.catalog.keras_variables import FileVariable
from ckptconv.dialects.graph_optimizer import STATISTICS
from ckptconv.dialects.keras_config import Layer, label, leaves
from ckptconv.dialects.keras_file_model import Found, Model, Path, below, distinct, what_lacks
from ckptconv.dialects.keras_layers import Reading, read_layer
from ckptconv.errors import FormatError
from ckptconv.rawtree import DictNode, ListNode, Node
from ckptconv.tensor import TensorRef

TOP_LEVEL = "top_level_model_weights"
_EDGES = frozenset({"tf_keras", "tf_keras_legacy"})
"""Generations whose variables are named like the edges of the layer catalog."""


def names_of(group: Node, attribute: str, where: Path) -> list[str]:
    """The names in an attribute, whole or split.

    Raises: corrupt-file for a name that is no text.
    """
    state = group.state if isinstance(group, DictNode) else None
    told = {str(key): value for key, value in state.items} if isinstance(state, DictNode) else {}
    found: list[Node] = []
    if attribute in told:
        found += _texts(told[attribute])
    else:
        number = 0
        while f"{attribute}{number}" in told:
            found += _texts(told[f"{attribute}{number}"])
            number += 1
    names = []
    for name in found:
        try:
            names.append(name.decode() if isinstance(name, bytes) else str(name))
        except UnicodeDecodeError as error:
            raise FormatError.of(
                "corrupt-file",
                f"a name in '{attribute}' of '{'/'.join(where) or '/'}' is not UTF-8: {error.reason}",
                "Save the model again.",
                loc=where,
            ) from None
    return names


def _texts(value: Node) -> tuple[Node, ...]:
    """The elements of an attribute; an empty one is an array of numbers."""
    if isinstance(value, ListNode):
        return tuple(part for part in value.items if isinstance(part, (str, bytes)))
    return ()


def stored_in(group: Node, where: Path, base: Path) -> list[tuple[Path, TensorRef]]:
    """The datasets that a group's `weight_names` lists, by their paths below `base`.

    Raises: corrupt-file for a name without a dataset, or listed twice.
    """
    found: dict[Path, TensorRef] = {}
    for name in names_of(group, "weight_names", where):
        path = tuple(part for part in name.split("/") if part)
        tensor = below(group, *path)
        if not isinstance(tensor, TensorRef) or (*base, *path) in found:
            what = "is listed twice" if (*base, *path) in found else "is listed and not there"
            raise FormatError.of(
                "corrupt-file",
                f"'{name}' of '{'/'.join(where)}' {what}",
                "Save the model again.",
                loc=(*where, name),
            )
        found[*base, *path] = tensor
    return list(found.items())


def model_of(weights: DictNode, at: Path, whole: Layer | None, framework: str) -> Model:
    """The model's variables, in its order; `at` is where the group stands, for messages.

    Raises: corrupt-file.
    """
    declared = {layer.name: layer for _, layer in whole.inside} if whole is not None else {}
    found: list[Found] = []
    for name in (*names_of(weights, "layer_names", at), TOP_LEVEL):
        group = below(weights, name)
        if group is None and name == TOP_LEVEL:
            continue
        if not isinstance(group, DictNode):
            raise FormatError.of(
                "corrupt-file",
                f"the layer '{name}' is listed and has no group",
                "Save the model again.",
                loc=(*at, name),
            )
        own = stored_in(group, (*at, name), (name,))
        layer = declared.get(name)
        told = list(_of_config(layer, own, framework)) if layer is not None else []
        found += told or _by_names(name, own, framework, frozen=layer is not None and layer.frozen)
    oddities = () if whole is None else what_lacks(whole, found, framework)
    return Model(variables=distinct(tuple(found)), ordered=True, oddities=oddities)


def _of_config(layer: Layer, own: Sequence[tuple[Path, TensorRef]], framework: str) -> Iterator[Found]:
    """The variables as the config has them; none where the names are others."""
    due: list[tuple[str, Layer, FileVariable]] = []
    for name, leaf in leaves(layer):
        known = keras_variables.variables_of(leaf.class_name, leaf.arguments, framework)
        if known is None or not leaf.of_keras:
            if not leaf.of_keras or not _has_none(leaf, own):
                return
            continue
        due += [(name, leaf, variable) for variable in known]
    trained = [one for one in due if one[2].trained and not one[1].frozen]
    others = [one for one in due if not one[2].trained or one[1].frozen]
    due = [*trained, *others]
    if len(due) != len(own) or any(
        variable.leaf != leaf_of(path) for (_, _, variable), (path, _) in zip(due, own, strict=True)
    ):
        return
    for (name, leaf, variable), (path, tensor) in zip(due, own, strict=True):
        layout = keras_variables.layout(
            leaf.class_name, variable, tensor.shape, framework, leaf.arguments, leaf.flat
        )
        kind, role, axes = layout or ("unknown", "unknown", None)
        inner = label(variable.part).removeprefix("_")
        yield Found(
            path=path,
            name="/".join(filter(None, (name, inner, variable.leaf))),
            tensor=tensor,
            layer=kind,
            role=role,
            axes=axes,
            evidence="declared" if layout else "unknown",
            trainable=variable.trained and not leaf.frozen,
            settings=keras_variables.settings(leaf.class_name, framework, leaf.arguments),
        )


def _has_none(leaf: Layer, own: Sequence[tuple[Path, TensorRef]]) -> bool:
    """Whether no variable is named after a layer: one of a class without variables (Flatten)."""
    return not any(leaf.name in path for path, _ in own)


def leaf_of(path: Path) -> str:
    """The last part of a variable's name, without the number of its output (`kernel:0`, `kernel:0_1`)."""
    return re.sub(r":\d+(_\d+)?$", "", path[-1])


def _by_names(
    layer: str, own: Sequence[tuple[Path, TensorRef]], framework: str, *, frozen: bool
) -> Iterator[Found]:
    """The variables by what they are called."""
    groups: dict[Path, dict[str, tuple[int, ...]]] = {}
    for path, tensor in own:
        groups.setdefault(path[:-1], {})[leaf_of(path)] = tensor.shape
    readings: dict[Path, Mapping[str, Reading]] = {
        owner: read_layer("tf_keras", shapes) if framework in _EDGES else {}
        for owner, shapes in groups.items()
    }
    for path, tensor in own:
        reading = readings[path[:-1]].get(leaf_of(path), Reading())
        steps = path[1:-1]
        inside = steps[steps.index(layer) + 1 :] if layer in steps else steps
        around = () if path[0] == TOP_LEVEL else (layer,)
        yield Found(
            path=path,
            name="/".join((*around, *inside, leaf_of(path))),
            tensor=tensor,
            layer=reading.layer,
            role=reading.role,
            axes=reading.axes,
            evidence=reading.evidence,
            candidates=reading.candidates,
            trainable=False if frozen or reading.role in STATISTICS else None,
        )
