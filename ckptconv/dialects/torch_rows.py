"""What a row of the table of PyTorch dialects says, and how it is held against a file.

A *pattern* is a path in which `"*"` stands for every entry of a dictionary or list, and -1 for the last
entry of a list; `"@state"` leads to the attributes of an object. A counter's `plus` is what the file's number
is more than the quantity: 0 where it counts what is completed (which is also the 0-based number of the next
one), -1 where it names the last finished one from 0, 1 where it names the next one from 1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal

from ckptconv.dialects.torch_groups import GroupRule
from ckptconv.dialects.torch_values import count_of, dotted
from ckptconv.rawtree import DictNode, ListNode, Node, Opaque, Path

ANY = "*"
LAST = -1
ATTRIBUTES = "@state"

Quantity = Literal["updates", "iterations", "epochs", "batch_in_epoch", "samples", "tokens", "skipped_steps"]
"""A field of the progress, `updates` that the loop tried to make, or `iterations`: batches, of which an
update may take several."""

WORDS = {0: "completed", -1: "last finished, from 0", 1: "the next one, from 1"}
"""`plus` -> what it says to people."""


@dataclass(frozen=True, slots=True, kw_only=True)
class When:
    """What a counter's convention depends on: a number in the file, or the file's name."""

    key: Path = ()
    below: int | None = None
    at_least: int | None = None
    file: str = ""
    """A pattern of the file's name, as in a shell."""

    def holds(self, root: Node, file: str) -> bool:
        """Whether it is so; a number that is not there is below every other."""
        if self.file:
            return fnmatchcase(file, self.file)
        found = next((count_of(node) for _, node in matching(root, self.key)), None)
        number = found[0] if found is not None else None
        if self.at_least is not None:
            return number is not None and number >= self.at_least
        return number is None or (self.below is not None and number < self.below)

    def __str__(self) -> str:
        if self.file:
            return f"in a file `{self.file}`"
        bound = (
            f"{self.at_least} or more" if self.at_least is not None else f"below {self.below} or not there"
        )
        return f"where `{dotted(self.key)}` is {bound}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Counter:
    """One key that holds a counter, and what it counts there."""

    key: Path
    counts: Quantity
    plus: int = 0
    when: When | None = None
    unset: tuple[int, str] | None = None
    """The number that stands for none, and why there is none."""
    per_epoch: Path = ()
    """Where the number of iterations in an epoch stands, where epochs follow from it."""

    def __str__(self) -> str:
        condition = f", {self.when}" if self.when is not None else ""
        condition += f", `{dotted(self.per_epoch)}` of them an epoch" if self.per_epoch else ""
        return f"`{dotted(self.key)}`: {self.counts.replace('_', ' ')}, {WORDS[self.plus]}{condition}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Signature:
    """By what a file is known to be of a dialect."""

    has: tuple[Path, ...] = ()
    one_of: tuple[Path, ...] = ()
    only: tuple[str, ...] = ()
    """No other keys than these."""
    named: tuple[tuple[Path, str], ...] = ()
    """Objects and the global that made each."""
    file: tuple[str, ...] = ()
    """Patterns of the file's name, where the keys alone are anybody's."""
    score: int = 90

    def holds(self, root: DictNode, file: str) -> bool:
        """Whether a file has all that it asks for."""
        return (
            all(there(root, key) for key in self.has)
            and (not self.one_of or any(there(root, key) for key in self.one_of))
            and (not self.only or all(key in self.only for key in root.keys))
            and all(_made_by(root, key) == name for key, name in self.named)
            and (not self.file or any(fnmatchcase(file, pattern) for pattern in self.file))
        )

    def __str__(self) -> str:
        parts = [" ".join(f"`{dotted(key)}`" for key in self.has)] if self.has else []
        if self.one_of:
            parts.append("one of " + " ".join(f"`{dotted(key)}`" for key in self.one_of))
        parts += [f"`{dotted(key)}` a `{name}`" for key, name in self.named]
        if self.only:
            parts.append("no key but " + " ".join(f"`{key}`" for key in self.only))
        if self.file:
            parts.append("named " + " or ".join(f"`{pattern}`" for pattern in self.file))
        return "; ".join(parts)


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One dialect: who writes it, by what it is known, where everything stands."""

    name: str
    summary: str
    producer: str
    signature: Signature
    models: tuple[Path, ...] = ()
    """Patterns; the first that leads to a model is the model, further ones are averages of it."""
    optimizers: tuple[Path, ...] = ()
    rule: Callable[[DictNode], GroupRule | None] | None = None
    """How the producer fills the groups of an optimizer, told by its state_dict."""
    schedulers: tuple[Path, ...] = ()
    scaler: tuple[Path, ...] = ()
    """A GradScaler's state, or the scale itself."""
    schedule_unit: Literal["update", "epoch", "unknown"] = "unknown"
    """What the producer's loop calls a scheduler for."""
    counters: tuple[Counter, ...] = ()
    """Best first: what further ones of the same quantity hold is a copy."""
    updates_before: int = 0
    """Updates that the producer's optimizers may make before the loop counts its first."""
    within_epoch: tuple[Path, ...] = ()
    """Numbers beside `batch_in_epoch` that begin anew with every epoch, at a pace that no file tells."""
    tokens_per_update: tuple[Path, ...] = ()
    """Numbers whose product is the tokens of one update."""
    source: str
    """Where the convention was read."""


def matching(node: Node, pattern: Path, path: Path = ()) -> Iterator[tuple[Path, Node]]:
    """The nodes that a pattern leads to, with their paths."""
    if not pattern:
        yield path, node
        return
    step, rest = pattern[0], pattern[1:]
    entries: list[tuple[str | int, Node]] = []
    if isinstance(node, DictNode) and step != ANY:
        entries = [(step, node.get(step))] if step in node else []
    elif isinstance(node, DictNode):
        entries = [(k, v) for k, v in node.items if isinstance(k, (str, int)) and not isinstance(k, bool)]
    elif isinstance(node, ListNode):
        numbered = list(enumerate(node.items))
        entries = [(i, v) for i, v in numbered if step == ANY or step in (i, i - len(numbered))]
    elif isinstance(node, Opaque) and step == ATTRIBUTES:
        entries = [(ATTRIBUTES, node.state)]
    for key, value in entries:
        yield from matching(value, rest, (*path, key))


def there(root: Node, pattern: Path) -> bool:
    """Whether a pattern leads to something that is not None."""
    return any(node is not None for _, node in matching(root, pattern))


def _made_by(root: Node, key: Path) -> str | None:
    node = next((node for _, node in matching(root, key)), None)
    return node.name if isinstance(node, Opaque) else None
