"""Taking leaves out of a raw tree, and putting them back: the one mechanism below every dialect."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np

from ckptconv import dtypes
from ckptconv.document import PROGRESS_FIELDS, Checkpoint, Known, Unknown, Value
from ckptconv.errors import CkptError, LossError, MappingError
from ckptconv.note import SOURCE as NOTED
from ckptconv.rawtree import DictNode, Lifted, ListNode, Node, Path, transform, walk
from ckptconv.tensor import StoredTensor, TensorRef


def untold(checkpoint: Checkpoint, root: Node) -> tuple[str, ...]:
    """Progress fields that somebody supplied and the tree has no place for: only a note can hold them."""
    held = set()
    for _, leaf in walk(root):
        if isinstance(leaf, Lifted) and "raw" not in leaf.encoding:  # such a place does not tell which it is
            if leaf.to[0] == "progress":
                held.add(leaf.to[1])
            elif leaf.to[0] in ("step", "param_step"):
                held.add("step")
    return tuple(
        name
        for name in PROGRESS_FIELDS
        if isinstance(fact := getattr(checkpoint.progress, name), Known)
        and fact.status == "supplied"
        and fact.source != NOTED
        and name not in held
    )


class Lifter:
    """Collects which leaf was lifted to which address while a dialect walks a tree."""

    def __init__(self, root: Node) -> None:
        self._root = root
        self._taken: dict[Path, Lifted] = {}

    def take(
        self, path: Path, to: Path, **encoding: str | int | float | bool | tuple[int, ...] | None
    ) -> None:
        """The node at `path` now stands at `to` in the document."""
        self._taken[path] = Lifted(to=to, encoding=encoding)

    def has(self, path: Path) -> bool:
        """Whether the node at `path` was taken already."""
        return path in self._taken

    def residue(self) -> Node:
        """The tree with every taken node replaced by its address."""
        return transform(self._root, lambda path, node: self._taken.get(path, node))


def scalar_tensor(value: Value, dtype: str, shape: tuple[int, ...] = ()) -> TensorRef:
    """A counter as the tensor that a file holds it in.

    Raises: progress-range where the dtype cannot hold the number exactly.
    """
    row = dtypes.BY_NAME[dtype]
    try:
        array = np.full(shape, np.array(value).astype(row.numpy), row.numpy)
    except OverflowError:
        raise _out_of_range(value, dtype, "it is out of range") from None
    if isinstance(value, int) and not isinstance(value, bool) and array.size and int(array.flat[0]) != value:
        raise _out_of_range(value, dtype, f"it becomes {array.flat[0]}")
    return StoredTensor.of_array(array)


def _out_of_range(value: Value, dtype: str, why: str) -> CkptError:
    message = f"{value} cannot be held exactly in {dtype} ({why})"
    return LossError.of("progress-range", message, "Use a target that counts in a wider type.")


def encode(value: TensorRef | Value, lifted: Lifted) -> Node:
    """A document value in the encoding that the file has for it.

    Encodings: none or `{"as": "value"}` the plain number; `{"as": "tensor", "dtype": ..}` a 0-d tensor of
    that dtype (`"shape"` for others); `{"as": "int" | "float"}` a number of that type; `{"plus": n}` is
    added first, where a producer counts from elsewhere. `{"raw": n}`: see `_settle`. A sequence is a
    `{"as": "list"}`, or a `{"as": "counter"}` of how often each number is in it.
    """
    if isinstance(value, TensorRef):
        return value
    encoding = lifted.encoding
    plus = encoding.get("plus", 0)
    if plus and isinstance(value, (int, float)) and isinstance(plus, (int, float)):
        value = value + plus
    how = encoding.get("as", "value")
    if how == "tensor":
        shape = encoding.get("shape", ())
        assert isinstance(shape, tuple)
        return scalar_tensor(value, str(encoding["dtype"]), shape)
    if how == "int" and isinstance(value, (int, float)):
        return int(value)
    if how == "float" and isinstance(value, (int, float)):
        return float(value)
    if isinstance(value, tuple):
        return _sequence(value, str(how))
    return value


def _sequence(values: tuple[Value, ...], how: str) -> Node:
    """Several numbers that stand in one place: as a list, or counted."""
    plain = [value for value in values if not isinstance(value, tuple)]
    if how == "counter":
        counts = Counter(plain)
        return DictNode(items=tuple(counts.items()), kind="collections.Counter")
    return ListNode(items=tuple(plain))


def fill(root: Node, checkpoint: Checkpoint) -> Node:
    """A residue with every address replaced by what the document holds there.

    Raises: progress-unknown for a counter that the document does not know; reference-broken for an
    address that the document does not have; all of them at once.
    """
    problems: list[CkptError] = []

    def put(path: Path, node: Node) -> Node:
        if not isinstance(node, Lifted):
            return node
        where = "/".join(str(step) for step in path)
        try:
            value = checkpoint.lookup(node.to)
        except (KeyError, IndexError):
            problems.append(
                MappingError.of(
                    "reference-broken",
                    f"'{where}' is filled from {'.'.join(map(str, node.to))}, which the document lacks",
                    "The document was edited or the template is of another model: pass the matching one.",
                    loc=path,
                )
            )
            return node
        if "raw" in node.encoding:
            try:
                return _settle(value, node, checkpoint, path)
            except CkptError as error:
                problems.append(error)
                return node
        if value is None and node.encoding.get("nullable") is not True:
            problems.append(
                MappingError.of(
                    "progress-unknown",
                    f"the target's value at '{where}' ({'.'.join(map(str, node.to))}) is not known",
                    _how_to_supply(node.to),
                    loc=path,
                )
            )
            return node
        try:
            return encode(value, node)
        except CkptError as error:
            located = (replace(p, loc=path, message=f"'{where}': {p.message}") for p in error.problems)
            problems.append(CkptError(*located))
            return node

    filled = transform(root, put)
    if problems:
        raise MappingError(*(problem for error in problems for problem in error.problems))
    return filled


def _settle(value: TensorRef | Value, lifted: Lifted, checkpoint: Checkpoint, path: Path) -> Node:
    """What a place holds whose counting convention the file does not tell (`{"raw": n}`).

    The document's value is one of the readings `n` and `n + 1` (`{"low": m}`: `m` and `m + 1`), or still
    unknown between them: the place keeps what it has.
    Raises: progress-unknown where the document is of another run and knows nothing;
    residue-stale where a new value cannot be written without the convention.
    """
    raw = lifted.encoding["raw"]
    where = "/".join(str(step) for step in path)
    name = str(lifted.to[-1])
    fact = getattr(checkpoint.progress, name, None) if lifted.to[0] == "progress" else None
    readings = {c.value for c in fact.candidates} if isinstance(fact, Unknown) else set()
    low = lifted.encoding.get("low", raw)
    fits = isinstance(low, (int, float)) and value in (low, low + 1)
    if isinstance(raw, (int, float)) and (fits or (value is None and raw in readings)):
        return encode(raw, Lifted(to=lifted.to, encoding={**lifted.encoding, "plus": 0}))
    if value is None:
        raise MappingError.of(
            "progress-unknown",
            f"the target holds {raw} at '{where}', and '{name}' is not known",
            _how_to_supply(lifted.to),
            loc=path,
        )
    raise MappingError.of(
        "residue-stale",
        f"'{where}' holds {raw} and '{name}' is now {value}: whether the place counts what is finished "
        "or names the last one is not recorded",
        f"Keep {name} at {raw} or {raw} + 1, or write to a target without that key.",
        loc=path,
    )


def _how_to_supply(address: Path) -> str:
    match address:
        case ("step", *_) | ("param_step", *_):
            return "Pass --set step=N."
        case ("progress" | "loss_scaling", name):
            return f"Pass --set {name}=N."
        case ("hyperparameter", _, _, name):
            return f"Pass --set {name}=VALUE."
    return "Supply it with --set or a --source-spec."
