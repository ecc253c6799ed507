"""What a run of a model tells of its modules: which takes the output of which.

A framework's operations are followed one by one. Where a tensor that comes from the input meets one that is
made of parameters, the modules that own these are used: their *site*. What the operation gives out comes from
them from then on. Operations without parameters (additions, poolings, reshapings) hand on what they get.

A module that takes several operations (a normalization scales, then shifts) takes its own output, and may
take its input once more; so what reaches a module through another one is not said again.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from graphlib import TopologicalSorter
from typing import NamedTuple

from ckptconv.adapters.images import Images
from ckptconv.document import Site

_Names = frozenset[str]
_NOBODY: _Names = frozenset()


class Origin(NamedTuple):
    """What a tensor is made of."""

    owners: _Names = _NOBODY
    """Modules whose parameters are in it, of a tensor that does not depend on the input."""
    given: _Names | None = None
    """Modules whose outputs are in it, of a tensor that depends on the input; else None."""


INPUT = Origin(_NOBODY, _NOBODY)
CONSTANT = Origin()


def module_of(name: str) -> str:
    """What a parameter's name begins with: all but its last part."""
    return name[: max(name.rfind("."), name.rfind("/"), 0)]


class Run:
    """The sites of one run, in their order, and the images in it."""

    def __init__(self) -> None:
        self._after: dict[str, dict[str, None]] = {}
        self.images = Images()

    def through(self, origins: Sequence[Origin], tensors: Iterable[Hashable]) -> Origin:
        """What an operation's output is made of; the tensors are those that it takes."""
        owners = _NOBODY.union(*(o.owners for o in origins if o.given is None))
        flowing = [o.given for o in origins if o.given is not None]
        if not flowing:
            return Origin(owners)
        given = _NOBODY.union(*flowing)
        if not owners:
            return Origin(_NOBODY, given)
        self.images.taken(tensors, owners)
        order = [name for name in self._after if name in given]
        for owner in sorted(owners):
            known = self._after.setdefault(owner, {})
            # A module that is used again takes what it gave out itself: the first use counts.
            known.update((name, None) for name in order if name not in known and not self._leads(owner, name))
        return Origin(_NOBODY, owners)

    def _leads(self, first: str, then: str) -> bool:
        """Whether a module's output is in the input of another, or the two are one."""
        seen, pending = {then}, [then]
        while pending:
            name = pending.pop()
            if name == first:
                return True
            for before in self._after.get(name, ()):
                if before not in seen:
                    seen.add(before)
                    pending.append(before)
        return False

    def sites(self) -> tuple[Site, ...]:
        """Every site with the modules before it that reach it through no other one."""
        above: dict[str, set[str]] = {}
        for name in TopologicalSorter(self._after).static_order():
            above[name] = set(self._after[name]).union(*(above[before] for before in self._after[name]))
        return tuple(
            Site(module=name, after=tuple(one for one in after if not any(one in above[o] for o in after)))
            for name, after in self._after.items()
        )
