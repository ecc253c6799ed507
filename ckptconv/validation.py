"""What a manifest must look like: JSON Schema, the references that a schema cannot check, versions.

The schemas are the hand-written files in `schema/`; an installed wheel has them in `ckptconv/_schema`.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

import jsonschema_rs

from ckptconv import dtypes
from ckptconv.document import SCHEMA_VERSION
from ckptconv.errors import Code, Loc, Problem, SchemaError
from ckptconv.facts import value_from_json
from ckptconv.strictjson import Json, parse
from ckptconv.tensor import TensorSpec

SchemaName = Literal["checkpoint", "report", "mapping"]

MIGRATIONS: dict[str, Callable[[dict[str, Json]], dict[str, Json]]] = {}
"""Older version -> the function that makes the next version's manifest; it must not change its input."""

_MESSAGE_LENGTH = 300


@cache
def load_schema(name: SchemaName, version: str = SCHEMA_VERSION) -> dict[str, Json]:
    """The JSON Schema of that name, from the installed package or from the checkout."""
    file = f"{name}-{version}.schema.json"
    installed = files("ckptconv") / "_schema" / file
    if installed.is_file():
        text = installed.read_text(encoding="utf-8")
    else:
        text = (Path(__file__).parent.parent / "schema" / file).read_text(encoding="utf-8")
    schema: dict[str, Json] = parse(text, file)
    return schema


@cache
def _validator(name: SchemaName, definition: str | None = None) -> Any:
    schema = load_schema(name)
    if definition is not None:
        schema = {"$schema": schema["$schema"], "$defs": schema["$defs"], "$ref": f"#/$defs/{definition}"}
    return jsonschema_rs.Draft202012Validator(schema)


def schema_problems(obj: Json, name: SchemaName, definition: str | None = None) -> list[Problem]:
    """What in `obj` is not valid against a schema, or against one of its definitions."""
    try:
        errors = list(_validator(name, definition).iter_errors(obj))
    except ValueError as error:
        return [_problem("schema-invalid", (), f"not a JSON value: {str(error)[:_MESSAGE_LENGTH]}")]
    return [_problem("schema-invalid", tuple(e.instance_path), _short(e.message)) for e in errors]


def _short(message: str) -> str:
    return message if len(message) <= _MESSAGE_LENGTH else message[:_MESSAGE_LENGTH] + "..."


def _problem(code: Code, loc: Loc, message: str) -> Problem:
    return Problem(
        code=code,
        loc=loc,
        message=message,
        hint="See the schema's description of this field; correct the document or write it again.",
    )


def migrate(obj: Json) -> Json:
    """The manifest in the current version.

    Raises: schema-version for a version that is not listed.
    """
    if not isinstance(obj, dict) or obj.get("schema") != "ckptconv/checkpoint":
        return obj
    while (version := obj.get("schema_version")) != SCHEMA_VERSION:
        step = MIGRATIONS.get(version) if isinstance(version, str) else None
        if step is None:
            known = ", ".join([*MIGRATIONS, SCHEMA_VERSION])
            raise SchemaError.of(
                "schema-version",
                f"manifest version {version!r} is not known; known are {known}",
                "Update ckptconv, or write the checkpoint again with this version.",
                loc=("schema_version",),
            )
        obj = step(obj)
    return obj


def validate_manifest(obj: Json) -> list[Problem]:
    """What is wrong with a parsed manifest of any listed version: schema first, then references."""
    try:
        manifest = migrate(obj)
    except SchemaError as error:
        return list(error.problems)
    problems = schema_problems(manifest, "checkpoint")
    return problems or list(_references(manifest))


def validate_note(obj: Json) -> list[Problem]:
    """What is wrong with a parsed embedded note; its parameters are those that its groups name."""
    problems = schema_problems(obj, "checkpoint", "note")
    if problems:
        return problems
    for i, optimizer in enumerate(obj["optimizers"]):
        own = {name: None for group in optimizer["groups"] for name in group["params"]}
        problems += _optimizer(optimizer, ("optimizers", i), own)
    return [*problems, *_steps(obj)]


def checked(obj: Json) -> dict[str, Json]:
    """The manifest in the current version, valid.

    Raises: SchemaError with everything that is wrong.
    """
    manifest = migrate(obj)
    problems = validate_manifest(manifest)
    if problems:
        raise SchemaError(*problems)
    result: dict[str, Json] = manifest
    return result


def _references(manifest: dict[str, Json]) -> Iterator[Problem]:
    """Names that are not there, names that stand twice, and steps that disagree."""
    params = manifest["params"]
    by_name = {param["name"]: param for param in params}
    for key in ("params", "extras"):
        for i, item in enumerate(manifest[key]):
            yield from _inline_value(item, (key, i))
    optimizers = {optimizer["name"] for optimizer in manifest["optimizers"]}
    extras = {extra["name"] for extra in manifest["extras"]}
    for key, field in (
        ("params", "name"),
        ("flow", "param"),
        ("optimizers", "name"),
        ("schedules", "name"),
        ("extras", "name"),
        ("files", "path"),
    ):
        yield from _unique(((key, i, field), item[field]) for i, item in enumerate(manifest.get(key, ())))
    for i, param in enumerate(params):
        yield from _param(param, ("params", i), by_name)
    sites = {site["param"] for site in manifest.get("flow", ())}
    for i, site in enumerate(manifest.get("flow", ())):
        after = [(("flow", i, "after", j), name) for j, name in enumerate(site["after"])]
        yield from _exist(after, sites, "site")
    for i, optimizer in enumerate(manifest["optimizers"]):
        yield from _optimizer(optimizer, ("optimizers", i), by_name)
    for i, schedule in enumerate(manifest["schedules"]):
        loc = ("schedules", i, "optimizer")
        yield from _exist([(loc, schedule["optimizer"])], optimizers, "optimizer")
    for key in ("rng", "data", "described"):
        for i, block in enumerate(manifest.get(key, ())):
            tensors = [((key, i, "tensors", j), name) for j, name in enumerate(block["tensors"])]
            yield from _exist(tensors, extras, "extra")
    residue, listed = manifest["residue"], {file["path"] for file in manifest["files"]}
    if residue is not None and "file" in residue and listed:
        yield from _exist([(("residue", "file"), residue["file"])], listed, "file")
    yield from _steps(manifest)


def _inline_value(item: dict[str, Json], loc: Loc) -> Iterator[Problem]:
    """A value that stands in the document has the bytes that its dtype and shape need."""
    if "value" not in item:
        return
    spec = TensorSpec(
        dtype=dtypes.BY_NAME[item["dtype"]],
        shape=tuple(item["shape"]),
        encoded_nbytes=item.get("encoded_nbytes"),
    )
    need, have = spec.nbytes, len(base64.b64decode(item["value"]))
    if need != have:
        yield _problem(
            "schema-invalid",
            (*loc, "value"),
            f"{have} bytes for {item['dtype']} {item['shape']}, which has {need}",
        )


def _unique(names: Iterable[tuple[Loc, str]]) -> Iterator[Problem]:
    seen: set[str] = set()
    for loc, name in names:
        if name in seen:
            yield _problem("duplicate-key", loc, f"'{name}' stands twice")
        seen.add(name)


def _exist(names: Iterable[tuple[Loc, str]], there: Iterable[str], what: str) -> Iterator[Problem]:
    for loc, name in names:
        if name not in there:
            yield _problem("reference-broken", loc, f"there is no {what} '{name}'")


def _param(param: dict[str, Json], loc: Loc, by_name: dict[str, Json]) -> Iterator[Problem]:
    axes, shape, first = param["axes"], param["shape"], param["tied_to"]
    if axes is not None and len(axes) != len(shape):
        yield _problem("schema-invalid", (*loc, "axes"), f"{len(axes)} axes for a shape of {len(shape)}")
    if first is None:
        return
    yield from _exist([((*loc, "tied_to"), first)], by_name, "parameter")
    if first in by_name and by_name[first]["tied_to"] is not None:
        yield _problem(
            "reference-broken", (*loc, "tied_to"), f"'{first}' is tied itself; name the first of the group"
        )


def _optimizer(optimizer: dict[str, Json], loc: Loc, by_name: dict[str, Json]) -> Iterator[Problem]:
    grouped = [
        ((*loc, "groups", i, "params", j), name)
        for i, group in enumerate(optimizer["groups"])
        for j, name in enumerate(group["params"])
    ]
    if optimizer["param_order"] != "unknown":  # else they are the file's own numbers: `#0`, `#1`
        yield from _exist(grouped, by_name, "parameter")
    yield from _unique(grouped)
    yield from _unique(
        ((*loc, "slots", i, "slot"), slot["slot"]) for i, slot in enumerate(optimizer["slots"])
    )
    everyone = {name for _, name in grouped}
    lists = [((*loc, "slots", i), slot) for i, slot in enumerate(optimizer["slots"])]
    if optimizer["param_steps"] is not None:
        lists.append(((*loc, "param_steps"), optimizer["param_steps"]))
    for where, entry in lists:
        members = everyone
        if entry["params"] != "all":
            listed = [((*where, "params", j), name) for j, name in enumerate(entry["params"])]
            yield from _exist(listed, everyone, "parameter of this optimizer")
            yield from _unique(listed)
            members = set(entry["params"])
        differ = [
            ((*where, "differ", j, "param"), item["param"]) for j, item in enumerate(entry.get("differ", ()))
        ]
        yield from _exist(differ, members, "parameter in this entry")
        yield from _unique(differ)
    common = (optimizer["param_steps"] or {}).get("common")
    if common == "step" and optimizer["step"]["status"] in ("absent", "unknown"):
        yield _problem(
            "reference-broken", (*loc, "param_steps", "common"), "the optimizer's step is not known"
        )


def _steps(manifest: dict[str, Json]) -> Iterator[Problem]:
    """`progress.step` is that of the optimizer, or of one of them."""
    step = manifest["progress"]["step"]
    facts = [optimizer["step"] for optimizer in manifest["optimizers"]]
    for i, fact in enumerate(facts):
        if fact["status"] == "same" and "value" not in step:
            yield _problem("reference-broken", ("optimizers", i, "step"), "progress.step is not known")
    if "value" not in step or not facts or not all("value" in fact for fact in facts):
        return
    counts = [value_from_json(fact["value"]) for fact in facts]
    if value_from_json(step["value"]) not in counts:
        message = f"progress says {value_from_json(step['value'])}, the optimizers say {counts}"
        yield _problem("reference-broken", ("progress", "step", "value"), message)
