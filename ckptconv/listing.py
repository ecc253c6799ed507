"""What there is, as plain data: the leaves of a raw tree (`inspect --raw`), the formats, the optimizers.

Keys are the path from the root joined with `/`. Containers are not leaves, unless they are empty. An object
that is only described (a global of a pickle) has its name under `<key>/@name`, its parts beside it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

from ckptconv.catalog.directions import directions
from ckptconv.catalog.optimizer_rows import COLUMNS, algorithms, row
from ckptconv.dialects.table import dialects_of
from ckptconv.facts import value_to_json
from ckptconv.formats.table import FORMATS, ROWS
from ckptconv.rawtree import DictNode, Lifted, ListNode, Node, Opaque, Path, RawTree, children
from ckptconv.tensor import TensorRef

INLINE_NBYTES = 256
"""Byte strings up to this length are listed in full, longer ones by length and digest."""


def leaves(node: Node, path: Path = ()) -> Iterator[tuple[Path, Node]]:
    """Every leaf with its path, in the file's order; iterative, since a file decides how deep it nests."""
    pending: list[tuple[Path, Node]] = [(path, node)]
    while pending:
        here, current = pending.pop()
        parts = list(children(current))
        if not parts:
            yield here, current
            continue
        if isinstance(current, Opaque):
            yield (*here, "@name"), current.name or current.kind
        pending.extend(((*here, step), part) for step, part in reversed(parts))


def key_of(path: Path) -> str:
    """The path as one string."""
    return "/".join(str(step) for step in path)


def digest(tensor: TensorRef) -> str:
    """sha256 of the C-order little-endian bytes, streamed; of the encoded bytes for strings."""
    state = hashlib.sha256()
    for window in tensor.windows():
        state.update(window.data)
    return state.hexdigest()


def plain(value: Node) -> object:
    """A leaf that is no tensor in JSON's terms: itself, or an object that says what JSON has no type for."""
    match value:
        case None | bool() | int() | float() | str():
            return value_to_json(value)
        case complex():
            return {"complex": [repr(value.real), repr(value.imag)]}
        case bytes() if len(value) <= INLINE_NBYTES:
            return {"bytes": value.hex()}
        case bytes():
            return {"nbytes": len(value), "sha256": hashlib.sha256(value).hexdigest()}
        case DictNode():
            return {"empty": value.kind}
        case ListNode():
            return {"empty": value.kind}
        case Opaque():
            return {value.kind: value.name}
        case Lifted():
            return {"lifted": list(value.to)}
    raise TypeError(f"no leaf: {type(value).__name__}")


def rows(raw: RawTree, *, digests: bool = False) -> Iterator[dict[str, object]]:
    """One object per leaf: key, dtype, shape (and sha256), or key and value.

    I/O: tensor bytes are read for `digests` only.
    """
    for path, leaf in leaves(raw.root):
        if not isinstance(leaf, TensorRef):
            yield {"key": key_of(path), "value": plain(leaf)}
            continue
        listed: dict[str, object] = {
            "key": key_of(path),
            "dtype": leaf.dtype.name,
            "shape": list(leaf.shape),
        }
        if digests:
            listed["sha256"] = digest(leaf)
        yield listed


def to_json(raw: RawTree, dialect: str | None, *, digests: bool = False) -> dict[str, object]:
    """The whole listing as one JSON object; `dialect` is null where no convention was recognised."""
    return {"format": raw.format, "dialect": dialect, "leaves": list(rows(raw, digests=digests))}


def formats() -> list[dict[str, object]]:
    """Every container that is read and written, each with its dialects."""
    return [
        {
            "name": name,
            "summary": FORMATS[name].summary,
            "suffixes": list(told.suffixes),
            "dialects": [
                {"name": dialect.name, "framework": dialect.framework, "summary": dialect.summary}
                for dialect in dialects_of(name)
            ],
        }
        for name, told in ROWS.items()
    ]


def optimizers() -> list[dict[str, object]]:
    """Every algorithm whose state converts, with its class in each framework."""
    return [
        {
            "algorithm": name,
            "classes": {f: found.class_name for f in COLUMNS if (found := row(name, f)) is not None},
        }
        for name in algorithms()
    ]


def optimizer_directions() -> list[dict[str, object]]:
    """Every algorithm from one framework to another: verdict, what stays different, what was measured."""
    return [
        {
            "algorithm": each.algorithm,
            "source": each.source,
            "target": each.target,
            "options": list(each.options),
            "verdict": each.verdict,
            "remains": list(each.remains),
            "needs": list(each.needs),
            "measured": [
                {
                    "run": run.run,
                    "verdict": run.verdict,
                    "stated": run.stated,
                    "float64": run.worst("float64"),
                    "float32": run.worst("float32"),
                }
                for run in each.measured
            ],
        }
        for each in directions()
    ]
