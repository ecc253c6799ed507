"""The rows of the layer table: what a kind of layer is, and how `data/layers.json` says it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

from ckptconv.catalog.einsum import contraction
from ckptconv.catalog.layer_settings import Settings, settings_of
from ckptconv.catalog.loading import Record

FRAMEWORKS = frozenset({"torch", "keras3", "tf_keras", "flax"})

Scalar = bool | int | float | str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Variable:
    role: str
    axes: tuple[str, ...]
    optional: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    name: str
    counterpart: str
    """The kind whose output it equals; its own name where it has no namesake."""
    counterpart_axes: Mapping[str, str]
    """Axis of the counterpart -> the same in this kind's terms, where it is not called the same."""
    only_declared: bool
    """Whether shapes alone never lead to it."""
    variables: Mapping[str, Mapping[str, Variable]]
    """Framework -> key of the variable -> what it is."""
    classes: Mapping[str, tuple[str, ...]]
    sizes: Mapping[str, float]
    """Atoms of its axes that have one size in every layer of the kind."""
    equal_attributes: tuple[str, ...]
    """Attributes of the live layer that are equal and above 1 where a class stands for two kinds."""
    attributes: Mapping[str, Scalar]
    """Attributes of the layer with these values where a class stands for two kinds."""
    lengths: Mapping[str, Mapping[str, float]]
    """Framework whose class stands for layers of any rank -> attribute -> the number of its entries here."""
    equation: tuple[str, ...]
    """Axes of an einsum layer's kernel (`catalog.einsum`) where the class stands for several kinds."""
    settings: Mapping[str, Settings]
    """Framework -> the numbers that a layer computes with beside its variables."""
    lacking: Mapping[str, str]
    """Family of frameworks that has no such layer -> what its nearest does."""

    def means(self, read: Callable[[str], object]) -> bool:
        """Whether a layer of the kind's class is of this kind and not of another; `read`: its attributes."""
        if self.equation:
            return contraction(read("equation")) == self.equation
        equal = {read(name) for name in self.equal_attributes}
        if len(self.equal_attributes) > 1:
            return len(equal) == 1 and all(isinstance(value, int) and value > 1 for value in equal)
        return bool(self.attributes) and all(read(n) == value for n, value in self.attributes.items())

    def is_of_class(self, framework: str, name: str, read: Callable[[str], object]) -> bool:
        """Whether a class makes layers of the kind, and this one has its rank; `read`: its attributes."""
        told = self.lengths.get(framework, {}).items()
        return name in self.classes.get(framework, ()) and all(_length(read(n)) == due for n, due in told)

    @property
    def is_special(self) -> bool:
        """Whether it is one of two kinds of a class, the one that its attributes must tell."""
        return bool(self.equal_attributes or self.attributes or self.equation)


def _length(value: object) -> int:
    """The number of entries of an attribute that may be written without brackets where it has one."""
    return len(value) if isinstance(value, (tuple, list)) else int(isinstance(value, int))


def kind_row(name: str, record: Record, names: Collection[str]) -> Kind:
    record.text("source")
    variables: dict[str, dict[str, Variable]] = {}
    for role, entry in record.records("roles"):
        if role not in names:
            raise ValueError(f"{entry.where}: the role is not defined")
        optional = entry.flag("optional", False)
        for framework in sorted(FRAMEWORKS):
            if not entry.has(framework):
                continue
            column = entry.record(framework)
            for part in column.list_of_records("parts") or (column,):
                variable = Variable(role=role, axes=part.texts("axes"), optional=optional)
                variables.setdefault(framework, {})[part.text("key")] = variable
                part.close()
            column.close()
        entry.close()
    classes = {}
    if record.has("classes"):
        inner = record.record("classes")
        classes = {framework: inner.texts(framework) for framework in inner.keys}
    lengths = {}
    if record.has("lengths"):
        inner = record.record("lengths")
        lengths = {framework: inner.number_map(framework) for framework in inner.keys}
    kind = Kind(
        name=name,
        counterpart=record.text("counterpart", name),
        counterpart_axes=record.text_map("counterpart_axes"),
        only_declared=record.flag("only_declared", False),
        variables=variables,
        classes=classes,
        sizes=record.number_map("sizes"),
        equal_attributes=record.texts("equal_attributes"),
        attributes=record.scalar_map("attributes"),
        lengths=lengths,
        equation=record.texts("equation"),
        settings=settings_of(record),
        lacking=record.text_map("lacking"),
    )
    record.close()
    return kind
