"""Values under keys, from modules that are imported when one of their keys is first asked for."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Generic, TypeVar

Key = TypeVar("Key")
Value = TypeVar("Value")


class Registry(Mapping[Key, Value], Generic[Key, Value]):
    """A mapping whose values add themselves to `registered` when their module is imported.

    Keys are grouped: `modules` has those to import for a group, `group_of` tells that of a key. To iterate is
    to import all of them.
    """

    def __init__(
        self,
        registered: Mapping[Key, Value],
        modules: Mapping[str, Sequence[str]],
        group_of: Callable[[Key], str],
    ) -> None:
        self._registered, self._modules, self._group_of = registered, modules, group_of

    def group(self, name: str) -> dict[Key, Value]:
        """The values of a group, by key in order; none where there is no such group."""
        for module in self._modules.get(name, ()):
            importlib.import_module(module)
        ours = [(key, value) for key, value in self._registered.items() if self._group_of(key) == name]
        return dict(sorted(ours, key=lambda item: str(item[0])))

    def __getitem__(self, key: Key) -> Value:
        return self.group(self._group_of(key))[key]

    def __iter__(self) -> Iterator[Key]:
        for name in self._modules:
            yield from self.group(name)

    def __len__(self) -> int:
        return sum(1 for _ in self)
