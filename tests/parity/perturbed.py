"""The catalog with one claim of it changed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from ckptconv.catalog import completion, loading, optimizer_rows, transitions

Change = Callable[[dict[str, Any]], None]
_CACHES = (optimizer_rows._tables, transitions._family, completion.hyperparameter_names)


@contextmanager
def claiming(algorithm: str, change: Change) -> Iterator[None]:
    """The catalog says something else about an algorithm."""
    original = loading.load

    def load(path: str) -> loading.Record:
        record = original(path)
        if path == f"optimizers/{algorithm}.json":
            change(record._data)
        return record

    optimizer_rows.load = transitions.load = load  # type: ignore[attr-defined]
    try:
        _forget()
        yield
    finally:
        optimizer_rows.load = transitions.load = original  # type: ignore[attr-defined]
        _forget()


def _forget() -> None:
    for cached in _CACHES:
        cached.cache_clear()


def swapped_slots(framework: str, one: str, other: str) -> Change:
    """The two slots stand in each other's place."""

    def change(data: dict[str, Any]) -> None:
        slots = data["frameworks"][framework]["slots"]
        slots[one]["key"], slots[other]["key"] = slots[other]["key"], slots[one]["key"]

    return change


def other_form(framework: str, point: str, value: str) -> Change:
    """The class is said to follow another rule."""

    def change(data: dict[str, Any]) -> None:
        data["frameworks"][framework]["form"][point] = value

    return change


def other_amount(transition: str, slot: str, kind: str, **amount: float) -> Change:
    """A slot is said to be changed by something else."""

    def change(data: dict[str, Any]) -> None:
        data["transitions"][transition]["slots"][slot] = {kind: amount}

    return change


def other_neutral(framework: str, name: str, value: float) -> Change:
    """The class is said to behave as if a hyperparameter that it lacks had another value."""

    def change(data: dict[str, Any]) -> None:
        data["frameworks"][framework].setdefault("neutral", {})[name] = value

    return change


def swapped_arguments(framework: str, one: str, other: str) -> Change:
    """The two hyperparameters are said to be each other's argument."""

    def change(data: dict[str, Any]) -> None:
        own = data["frameworks"][framework]["hyperparameters"]
        own[one]["argument"], own[other]["argument"] = own[other]["argument"], own[one]["argument"]

    return change


def no_switch(framework: str, name: str) -> Change:
    """A choice that the class has is forgotten."""

    def change(data: dict[str, Any]) -> None:
        del data["frameworks"][framework]["switches"][name]

    return change
