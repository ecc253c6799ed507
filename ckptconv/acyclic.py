"""What comes after what, where nothing comes after itself: links that would close a circle are left out."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator
from graphlib import TopologicalSorter
from typing import Generic, TypeVar

N = TypeVar("N", bound=Hashable)


class Acyclic(Generic[N]):
    """Nodes in the order of their first use, each with those before it."""

    def __init__(self) -> None:
        self._before: dict[N, dict[N, None]] = {}
        self._followed: set[N] = set()

    def __iter__(self) -> Iterator[N]:
        return iter(self._before)

    def add(self, node: N, before: Iterable[N]) -> None:
        """One more use of a node. What a node gives out itself is not before it: its first use counts."""
        known = self._before.setdefault(node, {})
        for one in before:
            if one not in known and not self._leads(node, one):
                known[one] = None
                self._followed.add(one)

    def _leads(self, first: N, then: N) -> bool:
        """Whether one node is before another, or the two are one."""
        if first == then:
            return True
        if first not in self._followed:
            return False
        seen, pending = {then}, [then]
        while pending:
            for before in self._before.get(pending.pop(), ()):
                if before == first:
                    return True
                if before not in seen:
                    seen.add(before)
                    pending.append(before)
        return False

    def reduced(self) -> dict[N, tuple[N, ...]]:
        """Every node with those before it that reach it through no other one."""
        above: dict[N, set[N]] = {}
        for node in TopologicalSorter(self._before).static_order():
            before = self._before[node]
            above[node] = set(before).union(*(above[one] for one in before))
        return {
            node: tuple(one for one in before if not any(one in above[other] for other in before))
            for node, before in self._before.items()
        }
