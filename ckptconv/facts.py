"""Values and facts <-> JSON: the smallest parts of the document, the same in manifests, notes and reports."""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping

from ckptconv.document import Absent, Candidate, Fact, Known, Unknown, Value
from ckptconv.strictjson import Json

SAFE_INT = 1 << 53
"""Integers beyond this are not carried exactly by every JSON reader."""


def value_to_json(value: Value) -> Json:
    """A plain value; numbers that JSON does not carry exactly as `{"exact", "about"}`."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return str(value)
    if isinstance(value, tuple):
        return [value_to_json(part) for part in value]
    if isinstance(value, int):
        number = int(value)
        if -SAFE_INT <= number <= SAFE_INT:
            return number
        return {"exact": f"int:{number:#x}", "about": _about(number)}
    number_ = float(value)
    if math.isfinite(number_):
        return number_
    return {"exact": f"float:0x{struct.pack('>d', number_).hex()}", "about": repr(number_)}


def _about(number: int) -> float | str:
    try:
        return float(number)
    except OverflowError:
        return "inf" if number > 0 else "-inf"


def value_from_json(value: Json) -> Value:
    """The inverse, of a value that is valid against the schema."""
    if isinstance(value, list):
        return tuple(value_from_json(part) for part in value)
    if not isinstance(value, dict):
        plain: Value = value
        return plain
    kind, _, text = value["exact"].partition(":")
    if kind == "int":
        return int(text, 16)
    number: float = struct.unpack(">d", bytes.fromhex(text[2:]))[0]
    return number


def fact_to_json(fact: Fact) -> dict[str, Json]:
    """A fact; empty optional parts are left out."""
    if isinstance(fact, Known):
        known: dict[str, Json] = {
            "status": fact.status,
            "value": value_to_json(fact.value),
            "source": fact.source,
        }
        if fact.formula is not None:
            known["formula"] = fact.formula
        return known
    if isinstance(fact, Absent):
        return {"status": "absent", "reason": fact.reason} if fact.reason else {"status": "absent"}
    unknown: dict[str, Json] = {"status": "unknown", "reason": fact.reason}
    if fact.candidates:
        unknown["candidates"] = [
            {"value": value_to_json(c.value), "source": c.source, "if": c.condition} for c in fact.candidates
        ]
    return unknown


def fact_from_json(fact: Mapping[str, Json]) -> Fact:
    """The inverse, of a fact that is valid against the schema."""
    status = fact["status"]
    if status == "absent":
        return Absent(reason=fact.get("reason", ""))
    if status == "unknown":
        candidates = tuple(
            Candidate(value=value_from_json(c["value"]), source=c["source"], condition=c["if"])
            for c in fact.get("candidates", ())
        )
        return Unknown(reason=fact["reason"], candidates=candidates)
    return Known(
        value=value_from_json(fact["value"]),
        status=status,
        source=fact["source"],
        formula=fact.get("formula"),
    )


def facts_to_json(facts: Mapping[str, Fact]) -> dict[str, Json]:
    """Facts by name."""
    return {name: fact_to_json(fact) for name, fact in facts.items()}


def facts_from_json(facts: Mapping[str, Json]) -> dict[str, Fact]:
    """The inverse."""
    return {name: fact_from_json(fact) for name, fact in facts.items()}
