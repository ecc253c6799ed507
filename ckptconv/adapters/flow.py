"""What a run of a model tells of its parameters: which are applied to what others made.

A framework's operations are followed one by one. Where a tensor that comes from the input meets one that is
made of parameters, these are used: their *site*. What the operation gives out comes from them from then on.
Operations without parameters (additions, poolings, reshapings) hand on what they get.

A layer that takes several operations (a normalization scales, then shifts) may take its input once more; so
what reaches a parameter through another one is not said again.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from typing import NamedTuple

from ckptconv.acyclic import Acyclic
from ckptconv.adapters.attention import Attention
from ckptconv.adapters.images import Images
from ckptconv.document import Site

_Names = frozenset[str]
_NOBODY: _Names = frozenset()


class Origin(NamedTuple):
    """What a tensor is made of."""

    params: _Names = _NOBODY
    """The parameters in it, of a tensor that does not depend on the input."""
    given: _Names | None = None
    """Parameters that made it, of a tensor that depends on the input; else None."""


INPUT = Origin(_NOBODY, _NOBODY)
CONSTANT = Origin()


class Run:
    """The sites of one run, in their order, and what is done with its tensors."""

    def __init__(self) -> None:
        self._after: Acyclic[str] = Acyclic()
        self.images = Images()
        self.attention = Attention()
        self.followers = (self.images, self.attention)

    def through(self, origins: Sequence[Origin], tensors: Iterable[Hashable]) -> Origin:
        """What an operation's output is made of; the tensors are those that it takes."""
        params = _NOBODY.union(*(o.params for o in origins if o.given is None))
        flowing = [o.given for o in origins if o.given is not None]
        if not flowing:
            return Origin(params)
        given = _NOBODY.union(*flowing)
        if not params:
            return Origin(_NOBODY, given)
        self.images.taken(tensors, params)
        order = [name for name in self._after if name in given]
        for param in sorted(params):
            self._after.add(param, order)
        return Origin(_NOBODY, params)

    def sites(self) -> tuple[Site, ...]:
        """Every site with the parameters before it that reach it through no other one."""
        part = self.attention.part
        return tuple(
            Site(param=name, after=after, part=part(name)) for name, after in self._after.reduced().items()
        )
