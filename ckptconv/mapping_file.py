"""Mapping files: which parameters of two models belong together, as their user says it.

    {"schema": "ckptconv/mapping", "schema_version": "1.0.0",
     "rules": [{"left": "encoder.layers.{i}.linear1.weight", "right": "block_{i+1}/dense/kernel",
                "axes": "out in -> in out"}]}

`schema/mapping-1.0.0.schema.json` describes every field. One file serves both directions.

    mapping_of(value) -> MappingFile      of a path, of parsed JSON, or of itself: what `mapping=` takes
    ckptconv.convert(source, target, template=..., mapping=value)
    mapping_rules.ruled(mapping, source, template, frameworks) -> Ruled    the rules on two documents
    write_mapping(mapping, path)
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ckptconv.catalog.axes import Axes, atoms, entries
from ckptconv.errors import FormatError, Loc, MappingError, Problem, SchemaError, TargetError
from ckptconv.name_pattern import NamePattern, parse_pattern
from ckptconv.remote import place
from ckptconv.strictjson import Json, dump, lines, parse
from ckptconv.validation import schema_problems

MAPPING_VERSION = "1.0.0"


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """Parameters that belong together; `{i}` in their names makes it one rule for many."""

    left: tuple[NamePattern, ...]
    right: tuple[NamePattern, ...]
    axes: tuple[Axes, Axes] | None = None
    """Of the left and of the right side; None leaves them to the layer catalog."""
    cut: int | str | None = None
    """The axis along which the one is cut into the several of the other side: its place, or its name in
    `axes`."""
    is_sum: bool = False
    """Whether the several act through their sum, which is the one."""
    overrides: bool = False
    """Whether `axes` stand against what the layers' kinds tell."""
    choices: tuple[str, ...] = ()
    """Axes that fit, for the reader to choose from."""
    note: str = ""
    line: int | None = None
    """Where it begins in its file."""

    def __str__(self) -> str:
        left, right = (", ".join(map(str, side)) for side in (self.left, self.right))
        return f"{left} <-> {right}" + (f" (line {self.line})" if self.line else "")


@dataclass(frozen=True, slots=True, kw_only=True)
class Lonely:
    """A parameter, or one of each layer, without a partner."""

    name: NamePattern
    shape: tuple[int, ...]
    nearest: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class MappingFile:
    """A mapping file's content."""

    rules: tuple[Rule, ...]
    left: str | None = None
    """The framework of the left side."""
    right: str | None = None
    left_only: tuple[NamePattern, ...] = ()
    """What has no counterpart and stays behind."""
    right_only: tuple[NamePattern, ...] = ()
    left_unmatched: tuple[Lonely, ...] = ()
    """What is still to be done, for the reader."""
    right_unmatched: tuple[Lonely, ...] = ()
    note: str = ""


MappingLike = str | os.PathLike[str] | Mapping[str, Json] | MappingFile
"""A mapping, or where it stands: a path, or its parsed JSON."""


def mapping_of(value: MappingLike) -> MappingFile:
    """The mapping that a path, a parsed JSON object or a mapping itself stands for.

    Raises: missing-file, corrupt-file, duplicate-key, schema-invalid, schema-version, mapping-invalid, each
    with the line where there is a file.
    """
    if isinstance(value, MappingFile):
        return value
    if isinstance(value, Mapping):
        return _parsed(dict(value), {}, "mapping")
    file = place(value)
    try:
        data = file.read_bytes()
    except OSError as error:
        raise FormatError.of(
            "missing-file",
            f"the mapping file '{file.name}' cannot be read: {error.strerror}",
            "Check the path, or make one with 'ckptconv map SRC TEMPLATE -o FILE'.",
            loc=(file.name,),
        ) from None
    obj = parse(data, file.name)
    return _parsed(obj, lines(data.decode("utf-8")), file.name)


def _parsed(obj: Json, where: Mapping[Loc, int], name: str) -> MappingFile:
    def at(loc: Loc) -> str:
        line = next((where[loc[:n]] for n in range(len(loc), -1, -1) if loc[:n] in where), None)
        return f"[{name}, line {line}]" if line else f"[{name}]"

    version = obj.get("schema_version") if isinstance(obj, dict) else None
    is_mapping = isinstance(obj, dict) and obj.get("schema") == "ckptconv/mapping"
    if is_mapping and isinstance(version, str) and version != MAPPING_VERSION:
        raise SchemaError.of(
            "schema-version",
            f"version {version!r:.80} of a mapping file is not known; known is {MAPPING_VERSION} "
            f"{at(('schema_version',))}",
            "Update ckptconv, or write the file again with this version.",
            loc=("schema_version",),
        )
    invalid = schema_problems(obj, "mapping")
    if invalid:
        raise SchemaError(*(_told(problem, f"{problem.message} {at(problem.loc)}") for problem in invalid))
    reader = _Reader()
    rules = tuple(
        reader.rule(rule, ("rules", k), where.get(("rules", k))) for k, rule in enumerate(obj["rules"])
    )
    only = {
        side: tuple(reader.name(text, (side, k)) for k, text in enumerate(obj.get(side, ())))
        for side in ("left_only", "right_only")
    }
    lonely = {
        side: tuple(
            reader.lonely(one, ("unmatched", side, k)) for k, one in enumerate(obj["unmatched"].get(side, ()))
        )
        if "unmatched" in obj
        else ()
        for side in ("left", "right")
    }
    if reader.problems:
        raise MappingError(*(_told(p, f"{p.message} {at(p.loc)}") for p in reader.problems))
    return MappingFile(
        rules=rules,
        left=obj.get("left"),
        right=obj.get("right"),
        left_only=only["left_only"],
        right_only=only["right_only"],
        left_unmatched=lonely["left"],
        right_unmatched=lonely["right"],
        note=obj.get("note", ""),
    )


def _told(problem: Problem, message: str) -> Problem:
    return Problem(code=problem.code, loc=problem.loc, message=message, hint=problem.hint)


class _Reader:
    """Makes rules of JSON that the schema accepts; collects what is wrong with them."""

    def __init__(self) -> None:
        self.problems: list[Problem] = []

    def _wrong(self, loc: Loc, message: str, hint: str) -> None:
        self.problems.append(Problem(code="mapping-invalid", loc=loc, message=message, hint=hint))

    def name(self, text: str, loc: Loc) -> NamePattern:
        found = parse_pattern(text)
        if isinstance(found, NamePattern):
            return found
        self._wrong(loc, f"'{text}' is no name of a parameter: {found}", "Counters: {i}, {i+1}, {2*i}, {_i}.")
        return NamePattern((text,))

    def lonely(self, one: Json, loc: Loc) -> Lonely:
        name = self.name(one["name"], (*loc, "name"))
        return Lonely(name=name, shape=tuple(one["shape"]), nearest=tuple(one["nearest"]))

    def rule(self, rule: Json, loc: Loc, line: int | None) -> Rule:
        sides = []
        for side in ("left", "right"):
            value = rule[side]
            texts = [(value, (*loc, side))] if isinstance(value, str) else []
            texts = texts or [(text, (*loc, side, n)) for n, text in enumerate(value)]
            sides.append(tuple(self.name(text, at) for text, at in texts))
        left, right = sides
        names = (*left, *right)
        if len({str(name) for name in left}) < len(left) or len({str(name) for name in right}) < len(right):
            self._wrong(loc, "a rule names a parameter twice", "Name each once.")
        counters = frozenset[str]().union(*(name.variables for name in names))
        for name in names:
            if missing := counters - name.variables:
                told = ", ".join("{" + variable + "}" for variable in sorted(missing))
                self._wrong(
                    loc,
                    f"'{name}' has no {told}, which other names of its rule have: one would be many",
                    "Use the same counters in all names of a rule.",
                )
        several = len(left) > 1 or len(right) > 1
        if len(left) > 1 and len(right) > 1:
            self._wrong(loc, "a rule has several parameters on both sides", "Split it into several rules.")
        elif several and ("cut" in rule) == ("sum" in rule):
            message = (
                "a rule with several parameters on one side says whether they are cut or summed, not both"
            )
            self._wrong(loc, message, "Add 'cut' with the axis, or 'sum': 'first'.")
        elif not several and ("cut" in rule or "sum" in rule):
            message = "'cut' and 'sum' are for rules with several parameters on one side, this one has none"
            self._wrong(loc, message, "Leave them out, or name all pieces in a list.")
        axes = parse_axes(rule["axes"]) if "axes" in rule else None
        if isinstance(axes, str):
            self._wrong((*loc, "axes"), axes, "Write both sides' axes, as in 'out in -> in out'.")
            axes = None
        named = rule["cut"] if isinstance(rule.get("cut"), str) else None
        if named is not None and several:
            sides_with = [side for side in axes or () if any(named in atoms(axis) for axis in side)]
            if not axes or sides_with != [axes[0 if len(left) == 1 else 1]]:
                message = (
                    f"'cut' names '{named}', which is no axis of the one parameter, or one of the several"
                )
                self._wrong(loc, message, "Name it in 'axes' of the one, as in 'heads*part*width in -> ...'.")
        if rule.get("overrides") and "axes" not in rule:
            self._wrong(loc, "the rule overrides nothing: it has no axes", "Add 'axes', or leave it out.")
        return Rule(
            left=left,
            right=right,
            axes=axes,
            cut=rule.get("cut"),
            is_sum="sum" in rule,
            overrides=rule.get("overrides", False),
            choices=tuple(rule.get("choices", ())),
            note=rule.get("note", ""),
            line=line,
        )


_ATOM = re.compile(r"[A-Za-z_][A-Za-z0-9_]*(?:\([A-Za-z0-9_]+(?:,[A-Za-z0-9_]+)*\))?'?(?:=[1-9][0-9]{0,17})?")


def parse_axes(text: str) -> tuple[Axes, Axes] | str:
    """The axes of both sides in `out in -> in out`, or what is wrong with them."""
    first, arrow, second = text.partition("->")
    sides = (tuple(first.split()), tuple(second.split()))
    if not arrow or "->" in second:
        return f"'{text}' has not one '->' between two lists of axes"
    named: list[dict[str, tuple[str, ...]]] = []
    for axes in sides:
        found = []
        for axis in axes:
            if axis != "1" and not all(_ATOM.fullmatch(part) for part in axis.split("*")):
                return f"'{axis}' is no axis"
            found += [entries(atom) for atom in atoms(axis)]
        if len({name for name, _ in found}) < len(found):
            return f"'{' '.join(axes)}' names an axis twice"
        named.append(dict(found))
    for name in named[0].keys() & named[1].keys():
        if sorted(named[0][name]) != sorted(named[1][name]):
            return f"the entries of '{name}' are not the same on both sides"
    return sides


def axes_text(axes: tuple[Sequence[str], Sequence[str]]) -> str:
    """The axes as a rule writes them."""
    return f"{' '.join(axes[0])} -> {' '.join(axes[1])}"


def to_json(mapping: MappingFile) -> dict[str, Json]:
    """The mapping as its schema has it."""
    obj: dict[str, Json] = {"schema": "ckptconv/mapping", "schema_version": MAPPING_VERSION}
    for side in ("left", "right", "note"):
        if getattr(mapping, side):
            obj[side] = getattr(mapping, side)
    obj["rules"] = [_rule_json(rule) for rule in mapping.rules]
    for side in ("left_only", "right_only"):
        if getattr(mapping, side):
            obj[side] = [str(name) for name in getattr(mapping, side)]
    unmatched = {"left": mapping.left_unmatched, "right": mapping.right_unmatched}
    if any(unmatched.values()):
        obj["unmatched"] = {
            side: [
                {"name": str(one.name), "shape": list(one.shape), "nearest": list(one.nearest)}
                for one in some
            ]
            for side, some in unmatched.items()
        }
    return obj


def _rule_json(rule: Rule) -> dict[str, Json]:
    left, right = ([str(name) for name in side] for side in (rule.left, rule.right))
    obj: dict[str, Json] = {
        "left": left[0] if len(left) == 1 else left,
        "right": right[0] if len(right) == 1 else right,
    }
    if rule.cut is not None:
        obj["cut"] = rule.cut
    if rule.is_sum:
        obj["sum"] = "first"
    if rule.axes is not None:
        obj["axes"] = axes_text(rule.axes)
    if rule.overrides:
        obj["overrides"] = True
    if rule.choices:
        obj["choices"] = list(rule.choices)
    if rule.note:
        obj["note"] = rule.note
    return obj


def text_of(mapping: MappingFile) -> str:
    """The file's text: a line for each field of a rule, so that it can be read and edited."""
    fields = []
    for key, value in to_json(mapping).items():
        if key == "rules":
            rules = [
                ",\n   ".join(f"{dump(name)}: {dump(part)}" for name, part in rule.items()) for rule in value
            ]
            text = "[\n  {" + "},\n  {".join(rules) + "}\n ]" if rules else "[]"
        elif isinstance(value, dict):
            inner = (f"{dump(side)}: {_column(some, '   ')}" for side, some in value.items())
            text = "{\n  " + ",\n  ".join(inner) + "\n }"
        else:
            text = _column(value, "  ") if isinstance(value, list) else dump(value)
        fields.append(f" {dump(key)}: {text}")
    return "{\n" + ",\n".join(fields) + "\n}\n"


def _column(items: Sequence[Json], indent: str) -> str:
    return f"[\n{indent}" + f",\n{indent}".join(map(dump, items)) + f"\n{indent[1:]}]" if items else "[]"


def write_mapping(mapping: MappingFile, path: str | os.PathLike[str], *, force: bool = False) -> None:
    """Write a mapping file. Raises: target-exists unless `force`, target-unwritable."""
    target = Path(path)
    try:
        with target.open("w" if force else "x", encoding="utf-8") as file:
            file.write(text_of(mapping))
    except FileExistsError:
        raise TargetError.of(
            "target-exists",
            f"'{target.name}' is there already",
            "Choose another name, or pass --force to replace it.",
            loc=(target.name,),
        ) from None
    except OSError as error:
        raise TargetError.of(
            "target-unwritable",
            f"'{target.name}' cannot be written: {error.strerror}",
            "Choose another path, or make room.",
            loc=(target.name,),
        ) from None


__all__ = [
    "Lonely",
    "MappingFile",
    "MappingLike",
    "Rule",
    "axes_text",
    "mapping_of",
    "parse_axes",
    "text_of",
    "to_json",
    "write_mapping",
]
