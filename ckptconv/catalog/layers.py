"""The layer table: what the variables of each kind of layer mean, per framework, axis by axis.

`data/layers.json` names axes so that equal names are equal numbers on both sides; a layout op follows from
two lists of axes and never from a shape alone. `out*in` is a merged axis (the first atom outermost), `1` a
singleton, `x...` any number of axes. Where a framework has several variables for another's one (a gate each),
its column lists them as `parts`, each with its entry of the axis that they share: `gate(input)*units`.

A kind is possible for a variable where all that is known of its layer fits: every variable of the layer
is one of the kind's, no obligatory one is missing, and an axis has the same size wherever it occurs. Where
several kinds fit, all are given; the caller decides, or does not.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import cache, lru_cache
from types import MappingProxyType
from typing import NamedTuple

from ckptconv.catalog.axes import bind, expand, layout_ops
from ckptconv.catalog.layer_rows import FRAMEWORKS, Kind, Variable, kind_row
from ckptconv.catalog.layer_settings import Settings
from ckptconv.catalog.loading import load

__all__ = [
    "Candidate",
    "alike",
    "axes_of",
    "candidates",
    "classes_of",
    "counterpart",
    "declared",
    "in_terms_of",
    "initial_value",
    "is_framework_only",
    "keras_candidates",
    "kind_of_class",
    "kind_of_class_name",
    "kinds",
    "lacking",
    "layout_ops",
    "roles",
    "same_layer",
    "settings",
    "told_settings",
    "torch_candidates",
]

_COLUMN = {"tf_keras_legacy": "tf_keras"}
"""Frameworks whose layers are another one's: the legacy optimizers train tf_keras' layers."""

Shape = tuple[int, ...]


class Candidate(NamedTuple):
    """One thing that a variable may be."""

    kind: str
    role: str
    axes: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Table:
    kinds: Mapping[str, Kind]
    only: Mapping[str, str]
    """Role -> the one framework that has it."""
    inits: Mapping[str, float]
    """Role -> its value in a new model, where every new model has the same."""
    roles: tuple[str, ...]

    keys: Mapping[str, frozenset[str]]
    """Framework -> every key that says something about the kind, those of kinds that are not here too."""


@cache
def _table() -> _Table:
    record = load("layers.json")
    record.text("source")
    only, names, inits = {}, [], {}
    for role, entry in record.records("roles"):
        entry.text("definition")
        names.append(role)
        framework = entry.optional_text("only")
        if framework is not None:
            only[role] = framework
        if entry.has("init"):
            inits[role] = entry.number("init")
        entry.close()
    found = {name: kind_row(name, entry, names) for name, entry in record.records("kinds")}
    foreign = record.record("foreign_keys")
    keys = {
        framework: frozenset(foreign.texts(framework)).union(
            *(kind.variables.get(framework, {}) for kind in found.values())
        )
        for framework in sorted(FRAMEWORKS)
    }
    foreign.close()
    table = _Table(kinds=found, only=only, inits=inits, roles=tuple(names), keys=keys)
    record.close()
    return table


def kinds() -> tuple[str, ...]:
    """Names of all kinds of layers."""
    return tuple(_table().kinds)


def roles() -> tuple[str, ...]:
    """Names of all roles."""
    return _table().roles


def is_framework_only(role: str) -> bool:
    """Whether only one framework has variables of this role (torch's `batch_count`)."""
    return role in _table().only


def initial_value(role: str) -> float | None:
    """What a variable of a role that only one framework has is in every new model; None where it differs."""
    return _table().inits.get(role)


def same_layer(kind: str, other: str) -> bool:
    """Whether two kinds compute the same: equal, or one the other's counterpart (`gpt2_conv1d`, `dense`)."""
    table = _table().kinds
    return kind in table and other in table and table[kind].counterpart == table[other].counterpart


def in_terms_of(kind: str, reading: Candidate) -> Candidate:
    """The reading with axes as `kind` names them, where it is read as the counterpart of that."""
    other, own = _table().kinds.get(kind), _table().kinds.get(reading.kind)
    if other is None or own is None or other.counterpart != own.counterpart or own.counterpart_axes:
        return reading
    return reading._replace(axes=tuple(other.counterpart_axes.get(axis, axis) for axis in reading.axes))


def axes_of(framework: str, kind: str, role: str, rank: int) -> tuple[str, ...] | None:
    """The axes of a kind's variable by its role; None where a framework has none of that rank, or several."""
    framework = _COLUMN.get(framework, framework)
    entry = _table().kinds.get(kind)
    variables = entry.variables.get(framework, {}).values() if entry else ()
    found = [expand(variable.axes, rank) for variable in variables if variable.role == role]
    return found[0] if len(found) == 1 else None


def candidates(
    framework: str, key: str, shape: Shape, siblings: Mapping[str, Shape]
) -> tuple[Candidate, ...]:
    """What a variable may be, from its key, its shape and the shapes of its layer's variables.

    `key`: the last part of its name (torch) or its edge in the object graph. `siblings` may hold
    the variable itself.
    """
    return _fitting(framework, key, shape, len(shape), siblings)


def torch_candidates(suffix: str, rank: int, siblings: Collection[str]) -> tuple[Candidate, ...]:
    """What a torch parameter may be, where nothing but names and its rank is known."""
    return _fitting("torch", suffix, None, rank, dict.fromkeys(siblings))


def keras_candidates(
    framework: str, edge: str, shape: Shape, siblings: Mapping[str, Shape]
) -> tuple[Candidate, ...]:
    """`candidates` of a variable of a Keras object graph, `framework` `keras3` or `tf_keras`."""
    return candidates(framework, edge, shape, siblings)


def _fitting(
    framework: str, key: str, shape: Shape | None, rank: int, siblings: Mapping[str, Shape | None]
) -> tuple[Candidate, ...]:
    framework = _COLUMN.get(framework, framework)
    keys = _table().keys.get(framework, frozenset())
    if key not in keys:
        return ()
    telling = {name: size for name, size in siblings.items() if name in keys}
    if shape is not None:
        telling[key] = shape
    return _readings(framework, key, rank, tuple(telling.items()))


@lru_cache(maxsize=4096)
def _readings(
    framework: str, key: str, rank: int, siblings: tuple[tuple[str, Shape | None], ...]
) -> tuple[Candidate, ...]:
    """What the variable may be; a model repeats its layers, so that few are worked out."""
    table = _table()
    telling = dict(siblings)
    found = []
    for kind in table.kinds.values():
        variables = kind.variables.get(framework, {})
        if kind.only_declared or key not in variables or not telling.keys() <= variables.keys():
            continue
        if any(not v.optional and name not in telling for name, v in variables.items()):
            continue
        axes = expand(variables[key].axes, rank)
        if axes is None or not _is_uniform(variables, key, rank, telling):
            continue
        sizes = bind((variables[name].axes, size) for name, size in telling.items() if size is not None)
        if sizes is None or any(sizes.get(atom, due) != due for atom, due in kind.sizes.items()):
            continue
        found.append(Candidate(kind.name, variables[key].role, axes))
    return tuple(found)


def _is_uniform(
    variables: Mapping[str, Variable], key: str, rank: int, siblings: Mapping[str, Shape | None]
) -> bool:
    """Whether variables with any number of axes have the same ones; more than one axis needs a witness."""
    open_ended = [
        name for name, variable in variables.items() if any("..." in axis for axis in variable.axes)
    ]
    shapes = [siblings[name] for name in open_ended if name in siblings]
    if len(open_ended) < 2 or key not in open_ended or (rank < 2 and None in shapes):
        return True
    return len(set(shapes)) == 1 and (rank < 2 or (len(shapes) > 1 and None not in shapes))


def declared(framework: str, kind: str, key: str, shape: Shape) -> tuple[str, tuple[str, ...]] | None:
    """Role and axes of a variable whose layer is known; None where the kind has no such variable."""
    framework = _COLUMN.get(framework, framework)
    entry = _table().kinds.get(kind)
    variable = entry.variables.get(framework, {}).get(key) if entry else None
    axes = expand(variable.axes, len(shape)) if variable else None
    return (variable.role, axes) if variable is not None and axes is not None else None


def alike(framework: str, reading: Candidate) -> tuple[Candidate, ...]:
    """A reading of a declared layer, and those of the other kinds for which its framework has one class.

    A Conv2d with a group for each channel is a depthwise convolution, and a convolution with groups.
    """
    framework = _COLUMN.get(framework, framework)
    own = _table().kinds.get(reading.kind)
    classes = set(own.classes.get(framework, ())) if own else set()
    others = [
        Candidate(kind.name, reading.role, variable.axes)
        for kind in _table().kinds.values()
        if kind is not own and own and own.equal_attributes and classes & set(kind.classes.get(framework, ()))
        for variable in kind.variables.get(framework, {}).values()
        if variable.role == reading.role
    ]
    return (reading, *others)


def kind_of_class(framework: str, cls: type, layer: object = None) -> str | None:
    """The kind of a live layer's class, or of the class that it extends; None where the table has none.

    `layer` is the live object: it tells a depthwise convolution from others of its class.
    """
    framework = _COLUMN.get(framework, framework)

    def read(attribute: str) -> object:
        return getattr(layer, attribute, None)

    for base in cls.__mro__:
        name = f"{base.__module__.partition('.')[0]}.{base.__qualname__}"
        fitting = [kind for kind in _table().kinds.values() if kind.is_of_class(framework, name, read)]
        if fitting:
            return _chosen(fitting, read).name
    return None


def kind_of_class_name(
    framework: str, name: str, settings: Mapping[str, object] = MappingProxyType({})
) -> str | None:
    """The kind of a class by its name in a file (`keras.Dense`) and the layer's settings there, if any."""
    found = [kind for kind in _table().kinds.values() if kind.is_of_class(framework, name, settings.get)]
    return _chosen(found, settings.get).name if found else None


def _chosen(kinds: list[Kind], read: Callable[[str], object]) -> Kind:
    """Of the kinds of one class the special one that the layer's attributes tell, else the ordinary one."""
    special = [kind for kind in kinds if kind.is_special and kind.means(read)]
    return next(iter(special), next((kind for kind in kinds if not kind.is_special), kinds[0]))


def settings(framework: str, kind: str) -> Settings:
    """The numbers that a layer of the kind computes with beside its variables, by canonical name."""
    entry = _table().kinds.get(kind)
    return entry.settings.get(_COLUMN.get(framework, framework), {}) if entry is not None else {}


def told_settings(framework: str, kind: str, read: Callable[[str], object]) -> dict[str, float]:
    """The settings of a layer whose arguments `read` gives, as far as it tells them."""
    found = {name: setting.read(read) for name, setting in settings(framework, kind).items()}
    return {name: value for name, value in found.items() if value is not None}


def classes_of(framework: str, kind: str) -> tuple[str, ...]:
    """The classes of a kind, as their packages have them: `keras.BatchNormalization`."""
    entry = _table().kinds.get(kind)
    return entry.classes.get(_COLUMN.get(framework, framework), ()) if entry is not None else ()


def counterpart(kind: str) -> str:
    """The kind whose output it equals; its own name where it has no namesake."""
    return _table().kinds[kind].counterpart


def lacking(kind: str, family: str) -> str | None:
    """What the nearest layer of a family of frameworks does that has none of this kind; None where it has."""
    entry = _table().kinds.get(kind)
    return entry.lacking.get(family) if entry is not None else None
