"""Reading the catalog's JSON files: unknown keys are refused, every row says where its facts come from.

The files ship inside the package. A file that does not fit is a defect of the release, not of the user's
input, so it fails on first use with a `ValueError` that names the file and the key.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib import resources

Json = dict[str, "Json"] | list["Json"] | str | int | float | bool | None


def names(directory: str) -> tuple[str, ...]:
    """Names of the JSON files in a folder of the catalog's data, without suffix, sorted."""
    folder = resources.files("ckptconv.catalog").joinpath("data").joinpath(directory)
    return tuple(sorted(entry.name[:-5] for entry in folder.iterdir() if entry.name.endswith(".json")))


def load(path: str) -> Record:
    """One JSON file of the catalog, e.g. `optimizers/adam.json`."""
    file = resources.files("ckptconv.catalog").joinpath("data")
    for part in path.split("/"):
        file = file.joinpath(part)
    data: Json = json.loads(file.read_text("utf-8"), object_pairs_hook=_no_duplicates)
    return Record(data, path)


def _no_duplicates(pairs: list[tuple[str, Json]]) -> dict[str, Json]:
    keys = [key for key, _ in pairs]
    if len(set(keys)) != len(keys):
        raise ValueError(f"a key stands twice among {keys}")
    return dict(pairs)


class Record:
    """A JSON object whose every key must be asked for: `close()` refuses the ones that were not."""

    def __init__(self, data: Json, where: str) -> None:
        if not isinstance(data, dict):
            raise ValueError(f"{where}: expected an object, got {type(data).__name__}")
        self._data = data
        self._asked: set[str] = set()
        self.where = where

    def _get(self, key: str) -> Json:
        self._asked.add(key)
        if key not in self._data:
            raise ValueError(f"{self.where}: '{key}' is missing")
        return self._data[key]

    def has(self, key: str) -> bool:
        """Whether the object has the key; asking counts as knowing it."""
        self._asked.add(key)
        return key in self._data

    def text(self, key: str, default: str | None = None) -> str:
        """A string."""
        value = default if default is not None and not self.has(key) else self._get(key)
        if not isinstance(value, str):
            raise ValueError(f"{self.where}.{key}: expected text, got {value!r}")
        return value

    def optional_text(self, key: str) -> str | None:
        """A string, or None where the key does not stand."""
        return self.text(key) if self.has(key) and self._data[key] is not None else None

    def optional_int(self, key: str) -> int | None:
        """A whole number, or None where the key does not stand."""
        value = self._get(key) if self.has(key) else None
        if value is not None and (not isinstance(value, int) or isinstance(value, bool)):
            raise ValueError(f"{self.where}.{key}: expected a whole number, got {value!r}")
        return value

    def number(self, key: str) -> float:
        """A number."""
        value = self._get(key)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise ValueError(f"{self.where}.{key}: expected a number, got {value!r}")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        """True or false."""
        value = self._get(key) if self.has(key) else default
        if not isinstance(value, bool):
            raise ValueError(f"{self.where}.{key}: expected true or false, got {value!r}")
        return value

    def scalar(self, key: str) -> bool | int | float | str | None:
        """Any plain value."""
        value = self._get(key)
        if isinstance(value, (dict, list)):
            raise ValueError(f"{self.where}.{key}: expected a plain value, got {value!r}")
        return value

    def texts(self, key: str) -> tuple[str, ...]:
        """A list of strings; empty where the key does not stand."""
        value = self._get(key) if self.has(key) else []
        if not isinstance(value, list):
            raise ValueError(f"{self.where}.{key}: expected a list, got {value!r}")
        result = []
        for item in value:
            if not isinstance(item, str):
                raise ValueError(f"{self.where}.{key}: expected text, got {item!r}")
            result.append(item)
        return tuple(result)

    def text_map(self, key: str) -> Mapping[str, str]:
        """An object of strings; empty where the key does not stand."""
        if not self.has(key):
            return {}
        inner = self.record(key)
        return {name: inner.text(name) for name in inner.keys}

    def scalar_map(self, key: str) -> Mapping[str, bool | int | float | str | None]:
        """An object of plain values; empty where the key does not stand."""
        if not self.has(key):
            return {}
        inner = self.record(key)
        return {name: inner.scalar(name) for name in inner.keys}

    def number_map(self, key: str) -> Mapping[str, float]:
        """An object of numbers; empty where the key does not stand."""
        if not self.has(key):
            return {}
        inner = self.record(key)
        return {name: inner.number(name) for name in inner.keys}

    def record(self, key: str) -> Record:
        """An object."""
        return Record(self._get(key), f"{self.where}.{key}")

    def records(self, key: str) -> tuple[tuple[str, Record], ...]:
        """The objects of an object, in the file's order; none where the key does not stand."""
        if not self.has(key):
            return ()
        inner = self.record(key)
        return tuple((name, inner.record(name)) for name in inner.keys)

    def list_of_records(self, key: str) -> tuple[Record, ...]:
        """A list of objects; empty where the key does not stand."""
        value = self._get(key) if self.has(key) else []
        if not isinstance(value, list):
            raise ValueError(f"{self.where}.{key}: expected a list, got {value!r}")
        return tuple(Record(item, f"{self.where}.{key}[{i}]") for i, item in enumerate(value))

    @property
    def keys(self) -> tuple[str, ...]:
        """Its keys in the file's order."""
        return tuple(self._data)

    def close(self) -> None:
        """Refuse keys that nobody asked for."""
        unknown = sorted(set(self._data) - self._asked)
        if unknown:
            raise ValueError(f"{self.where}: unknown keys {unknown}")
