"""JSON as its grammar has it: no key twice, no NaN, UTF-8 without lone surrogates, bounded nesting.

Python's reader keeps the last of two equal keys and takes `NaN`; a header read so says something else to the
next reader. Every failure is a `FormatError` with the file's name.
"""

from __future__ import annotations

import json
import re
from typing import Any

from ckptconv.errors import CkptError, Code, FormatError

Json = Any
"""A parsed JSON value; what it must look like is the business of a schema."""

_HINT = "The file is damaged or was not written by a well-behaved program: copy it again."


def parse(text: str | bytes, name: str, *, constants: bool = False) -> Json:
    """The value of a JSON text.

    `constants`: `NaN` and `Infinity` are read too, for files that other programs write so.
    Raises: corrupt-file, duplicate-key, limit-exceeded (nesting, digits), all located at `name`.
    """

    def failure(code: Code, message: str) -> CkptError:
        return FormatError.of(code, f"{message} [{name}]", _HINT, loc=(name,))

    def unique(pairs: list[tuple[str, Json]]) -> dict[str, Json]:
        result = dict(pairs)
        if len(result) != len(pairs):
            seen: set[str] = set()
            twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
            raise failure("duplicate-key", f"the key {twice!r} stands twice in one JSON object")
        return result

    def no_constant(word: str) -> Json:
        raise failure("corrupt-file", f"{word} is not JSON")

    try:
        if isinstance(text, bytes):
            text = text.decode("utf-8")
        constant = float if constants else no_constant
        value = json.loads(text, object_pairs_hook=unique, parse_constant=constant)
        if "\\ud" in text or "\\uD" in text:
            # Only an escape can bring in half a character; most texts have none.
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeError as error:
        raise failure("corrupt-file", f"not UTF-8 text: {error.reason}") from None  # type: ignore[attr-defined]
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, column {error.colno}"
        raise failure("corrupt-file", f"not JSON: {error.msg} at {place}") from None
    except RecursionError:
        raise failure("limit-exceeded", "JSON nested too deeply to be read") from None
    except ValueError:
        raise failure("limit-exceeded", "a JSON number with more digits than can be read") from None
    return value


_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|[{}\[\],:]|[^\s{}\[\],:"]+')


def lines(text: str) -> dict[tuple[str | int, ...], int]:
    """Path of each value of a JSON text -> the line on which it begins, counted from 1.

    `text` is one that `parse` reads.
    """
    result: dict[tuple[str | int, ...], int] = {}
    path: list[str | int] = []
    awaits_key = False
    line, at = 1, 0
    for token in _TOKEN.finditer(text):
        line, at = line + text.count("\n", at, token.start()), token.start()
        mark = token[0]
        if mark in "}]":
            path.pop()
            awaits_key = False
        elif mark == ",":
            last = path[-1]
            if isinstance(last, int):
                path[-1] = last + 1
            else:
                awaits_key = True
        elif awaits_key:
            path[-1] = json.loads(mark)
            awaits_key = False
        elif mark != ":":
            result[tuple(path)] = line
            if mark in "{[":
                path.append("" if mark == "{" else 0)
                awaits_key = mark == "{"
    return result


def dump(value: Json, *, indent: int | None = None) -> str:
    """JSON text of a value, not escaped beyond need.

    Raises: schema-invalid for what JSON cannot hold.
    """
    try:
        separators = (",", ":") if indent is None else None
        text = json.dumps(value, ensure_ascii=False, allow_nan=False, indent=indent, separators=separators)
        text.encode("utf-8")
    except (ValueError, TypeError) as error:
        raise FormatError.of(
            "schema-invalid",
            f"a value cannot be written as JSON: {str(error)[:200]}",
            "Names must be Unicode text; numbers in `extensions` must be finite.",
        ) from None
    return text


def dump_document(document: dict[str, Json]) -> str:
    """JSON text of an object for people and for diffs: a line per field, and per item of each field.

    Raises: schema-invalid for what JSON cannot hold.
    """
    fields = []
    for key, value in document.items():
        if value and isinstance(value, dict):
            inner = [f"{dump(name)}: {dump(item)}" for name, item in value.items()]
            text = "{\n  " + ",\n  ".join(inner) + "\n }"
        elif value and isinstance(value, list):
            text = "[\n  " + ",\n  ".join(dump(item) for item in value) + "\n ]"
        else:
            text = dump(value)
        fields.append(f" {dump(key)}: {text}")
    return "{\n" + ",\n".join(fields) + "\n}\n"
