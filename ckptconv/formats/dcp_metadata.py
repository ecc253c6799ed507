"""The `.metadata` of torch.distributed.checkpoint: which entries there are, and where their bytes lie.

Byte layout: one plain pickle (protocol 4 or 5 in the wild; ours is 2), no persistent ids, of a `Metadata`
whose state is a dict:

- `state_dict_metadata`: key -> `TensorStorageMetadata` (`properties`, whose state is the tuple (dtype,
  layout, requires_grad, memory format, pinned); `size`; `chunks`, each with `offsets` and `sizes`) or
  `BytesStorageMetadata` (no state);
- `planner_data`: key -> the path that the key was flattened from, `("optim", "state", "0.weight", "step")`;
  None where nothing was flattened. Dictionary keys are text in it, positions of lists are numbers;
- `storage_data`: `MetadataIndex` (`fqn`, `offset`, left out of byte entries) -> `_StorageInfo`
  (`relative_path`, `offset`, `length`, maybe `transform_descriptors`);
- `storage_meta`, and `version`: None in old files, else 1.0.0.

The opcodes are run by `pickle_machine`; what it made is read as it is, since the classes are known and a
large folder has millions of values. Refused: transformed streams (compression), other versions, chunks
without storage, storage without an entry.

Source: torch 2.13 `torch/distributed/checkpoint/metadata.py`, `filesystem.py`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple, cast

from ckptconv.dtypes import BY_TORCH, DType
from ckptconv.errors import Code, FormatError
from ckptconv.formats.pickle_checks import INT64
from ckptconv.formats.pickle_machine import AtOnce, Machine, Made, Value
from ckptconv.formats.pickle_run import run
from ckptconv.formats.pickle_writer import pickle_tree
from ckptconv.rawtree import DictNode, ListNode, Node, Opaque, Path
from ckptconv.tensor import Index

FILE: Final = ".metadata"
_MODULE = "torch.distributed.checkpoint.metadata"
_SIZE = "torch.Size"
_LAYOUT = "torch.serialization._get_layout"
_MEMORY = f"{_MODULE}._MEM_FORMAT_ENCODING"
_VERSION = "1.0.0"
_MAX_RANK = 64


class Place(NamedTuple):
    """Where an item lies."""

    file: str
    """As the metadata names it."""
    offset: int
    nbytes: int
    """As the metadata says; of a safetensors file the bytes of the tensor."""


class Chunk(NamedTuple):
    """A part of a tensor."""

    start: Index
    shape: tuple[int, ...]
    place: Place


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorEntry:
    """A tensor in chunks."""

    dtype: DType
    shape: tuple[int, ...]
    chunks: tuple[Chunk, ...]


Entry = TensorEntry | Place
"""A tensor, or where the bytes of any other value lie."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Metadata:
    """A folder's entries."""

    entries: Mapping[str, Entry]
    paths: Mapping[str, Path]
    """Key -> path, in the order of the dictionary that was saved; empty where nothing was flattened."""


def read_metadata(data: bytes, name: str) -> Metadata:
    """The entries that a `.metadata` tells of.

    Raises: malformed-pickle, truncated-file, limit-exceeded, corrupt-file, duplicate-key, unknown-dtype,
    unsupported-feature.
    """
    return _Reader(name).metadata(run(Machine(data, 0, name, _AT_ONCE)))


def _size_of(args: Sequence[Node]) -> Node:
    """A `torch.Size` of counts; anything else is no size."""
    inner = args[0] if len(args) == 1 else None
    if isinstance(inner, ListNode) and len(inner.items) <= _MAX_RANK and all(map(_is_count, inner.items)):
        return ListNode(items=inner.items, kind=_SIZE)
    return Opaque(kind="call", name=_SIZE, args=tuple(args))


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value < INT64


def _refused(identifier: ListNode) -> Node:
    return Opaque(kind="persistent", args=(identifier,))


_AT_ONCE = AtOnce(
    persistent=_refused,
    calls={
        _SIZE: _size_of,
        # What stands beside the dtype: nothing of it is asked for.
        _LAYOUT: lambda args: Opaque(kind="call", name=_LAYOUT, args=tuple(args)),
        _MEMORY: lambda args: Opaque(kind="call", name=_MEMORY, args=tuple(args)),
    },
)


class _Reader:
    """Reads what the opcode machine made of one `.metadata`."""

    def __init__(self, name: str) -> None:
        self._name = name

    def metadata(self, root: Value) -> Metadata:
        state = self._state(root, "Metadata")
        version = state.get("version")
        if version is not None and not (isinstance(version, str) and version.startswith("1.")):
            raise self._error("unsupported-feature", f"version {version!r:.40}, 1.0.0 is read", "version")
        paths = self._paths(state.get("planner_data"))
        places = self._places(state.get("storage_data"))
        entries: dict[str, Entry] = {}
        used: set[tuple[str, Index | None]] = set()
        for key, value in self._pairs(state.get("state_dict_metadata"), "state_dict_metadata"):
            if not isinstance(key, str) or not isinstance(value, Made):
                raise self._error("corrupt-file", f"{_short(key)} is {_short(value)}", "state_dict_metadata")
            if key in entries:
                raise self._error("duplicate-key", f"'{key}' stands twice", key)
            if value.name.endswith(".BytesStorageMetadata"):
                entries[key] = self._place(places, key, None, used)
            else:
                entries[key] = self._tensor(value, key, places, used)
        orphans = places.keys() - used
        if orphans:
            key, offset = min(orphans, key=str)
            raise self._error("corrupt-file", f"the bytes of '{key}' at {offset} belong to no entry", key)
        if paths and paths.keys() != entries.keys():
            key = min(paths.keys() ^ entries.keys())
            raise self._error("corrupt-file", f"'{key}' has an entry or a path, not both", key)
        return Metadata(entries=entries, paths=paths)

    def _tensor(
        self,
        value: Made,
        key: str,
        places: Mapping[tuple[str, Index | None], Place],
        used: set[tuple[str, Index | None]],
    ) -> TensorEntry:
        state = self._state(value, "TensorStorageMetadata")
        shape = self._shape(state.get("size"), key)
        listed = state.get("chunks")
        if not isinstance(listed, Made) or listed.kind != "list" or not listed.items:
            raise self._error("corrupt-file", f"'{key}' has no list of chunks, but {_short(listed)}", key)
        chunks = []
        for item in listed.items:
            chunk = self._state(item, "ChunkStorageMetadata")
            start, sizes = self._shape(chunk.get("offsets"), key), self._shape(chunk.get("sizes"), key)
            within = len(start) == len(sizes) == len(shape) and all(
                low + size <= whole for low, size, whole in zip(start, sizes, shape, strict=True)
            )
            if not within:
                message = f"'{key}' of shape {list(shape)} has a chunk of {list(sizes)} at {list(start)}"
                raise self._error("corrupt-file", message, key)
            chunks.append(Chunk(start, sizes, self._place(places, key, start, used)))
        return TensorEntry(dtype=self._dtype(state.get("properties"), key), shape=shape, chunks=tuple(chunks))

    def _dtype(self, value: Value, key: str) -> DType:
        """The dtype of `TensorProperties`, whose state is a tuple that it leads."""
        state = value.state if isinstance(value, Made) and value.kind == "object" else None
        first = state.items[0] if isinstance(state, Made | ListNode) and state.items else None
        if not isinstance(first, Opaque) or first.kind != "global":
            raise self._error("corrupt-file", f"'{key}' has no dtype, but {_short(first)}", key)
        row = BY_TORCH.get(first.name.removeprefix("torch."))
        if row is None:
            raise self._error("unknown-dtype", f"'{key}' has the unknown dtype {first.name}", key)
        return row

    def _shape(self, value: Value, key: str) -> tuple[int, ...]:
        """A size or an offset; `_size_of` has seen that it holds counts."""
        if isinstance(value, ListNode) and value.kind == _SIZE:
            return cast("tuple[int, ...]", value.items)
        raise self._error("corrupt-file", f"'{key}' has no size of counts, but {_short(value)}", key)

    def _paths(self, value: Value) -> dict[str, Path]:
        """`planner_data`, where the default planner wrote it."""
        if value is None:
            return {}
        paths: dict[str, Path] = {}
        for key, path in self._pairs(value, "planner_data"):
            steps = path.items if isinstance(path, ListNode) and path.kind == "tuple" else ()
            plain = tuple([s for s in steps if isinstance(s, str) or (type(s) is int and _is_count(s))])
            if not isinstance(key, str) or not steps or len(plain) != len(steps) or key in paths:
                message = f"{_short(key)} has no path of names and positions, but {_short(path)}"
                raise self._error("corrupt-file", message, "planner_data")
            paths[key] = plain
        return paths

    def _places(self, value: Value) -> dict[tuple[str, Index | None], Place]:
        places: dict[tuple[str, Index | None], Place] = {}
        for index, info in self._pairs(value, "storage_data"):
            where = self._state(index, "MetadataIndex")
            key, offset = where.get("fqn"), where.get("offset")
            if not isinstance(key, str):
                message = f"an index should have a text 'fqn', it has {_short(key)}"
                raise self._error("corrupt-file", message, "storage_data")
            state = self._state(info, "_StorageInfo")
            if state.get("transform_descriptors") is not None:
                message = f"the bytes of '{key}' are transformed (compressed), which is not read"
                raise self._error("unsupported-feature", message, key)
            file, at, nbytes = (state.get(name) for name in ("relative_path", "offset", "length"))
            counts = [n for n in (at, nbytes) if type(n) is int and _is_count(n)]
            if not isinstance(file, str) or len(counts) != 2:
                message = f"'{key}' should lie at counts in a file, it does at {_short(at)}, {_short(nbytes)}"
                raise self._error("corrupt-file", message, key)
            places[key, None if offset is None else self._shape(offset, key)] = Place(file, *counts)
        return places

    def _place(
        self,
        places: Mapping[tuple[str, Index | None], Place],
        key: str,
        offset: Index | None,
        used: set[tuple[str, Index | None]],
    ) -> Place:
        place = places.get((key, offset))
        if place is None:
            at = "" if offset is None else f" at {list(offset)}"
            raise self._error("corrupt-file", f"nothing tells where the bytes of '{key}'{at} lie", key)
        used.add((key, offset))
        return place

    def _state(self, value: Value, class_: str) -> dict[str, Value]:
        """The attributes of an object of the class."""
        if isinstance(value, Made) and value.kind == "object" and value.name.endswith(f".{class_}"):
            state = value.state
            if isinstance(state, Made) and state.kind == "dict":
                return dict(_keyed(state))
        raise self._error("corrupt-file", f"a {class_} is expected, found is {_short(value)}", class_)

    def _pairs(self, value: Value, where: str) -> Iterable[tuple[Value, Value]]:
        if isinstance(value, Made) and value.kind == "dict":
            return value.pairs
        raise self._error("corrupt-file", f"'{where}' should be a dict, it is {_short(value)}", where)

    def _error(self, code: Code, message: str, *loc: str) -> FormatError:
        hint = "Copy or save the folder again; nothing was written."
        error = FormatError.of(code, f"{message} [{self._name}]", hint, loc=(self._name, *loc))
        assert isinstance(error, FormatError)
        return error


def _keyed(state: Made) -> list[tuple[str, Value]]:
    return [(key, value) for key, value in state.pairs if isinstance(key, str)]


def _short(value: Value) -> str:
    """A value for a message, whatever its size."""
    if isinstance(value, Made | Opaque):
        return f"a {value.kind} {value.name}".rstrip()
    if isinstance(value, DictNode | ListNode):
        return f"a {value.kind}"
    if isinstance(value, int) and value.bit_length() > 200:
        return f"a number of {value.bit_length()} bits"
    return repr(value)[:60]


# Writing


def metadata_pickle(metadata: Metadata) -> bytes:
    """The `.metadata` of a new folder, as torch reads it."""
    properties = {}
    described: list[tuple[Node, Node]] = []
    stored: list[tuple[Node, Node]] = []
    for key, entry in metadata.entries.items():
        if isinstance(entry, Place):
            described.append((key, _object("BytesStorageMetadata")))
            stored.append((_object("MetadataIndex", fqn=key, index=None), _info(entry)))
            continue
        if entry.dtype not in properties:
            properties[entry.dtype] = _properties(entry.dtype)
        chunks = [
            _object("ChunkStorageMetadata", offsets=_size(c.start), sizes=_size(c.shape))
            for c in entry.chunks
        ]
        described.append(
            (
                key,
                _object(
                    "TensorStorageMetadata",
                    properties=properties[entry.dtype],
                    size=_size(entry.shape),
                    chunks=ListNode(items=tuple(chunks)),
                ),
            )
        )
        for number, chunk in enumerate(entry.chunks):
            index = _object("MetadataIndex", fqn=key, offset=_size(chunk.start), index=number)
            stored.append((index, _info(chunk.place)))
    planned = [(key, ListNode(items=path, kind="tuple")) for key, path in metadata.paths.items()]
    root = _object(
        "Metadata",
        state_dict_metadata=DictNode(items=tuple(described)),
        planner_data=DictNode(items=tuple(planned)) if planned else None,
        storage_data=DictNode(items=tuple(stored)),
        storage_meta=_object(
            "StorageMeta", checkpoint_id=None, save_id=None, load_id=None, modules=ListNode()
        ),
        version=_VERSION,
    )
    return pickle_tree(root, lambda node: node)[0]


def _object(class_: str, module: str = _MODULE, **state: Node) -> Opaque:
    attributes = DictNode(items=tuple(state.items())) if state else None
    return Opaque(kind="object", name=f"{module}.{class_}", state=attributes)


def _size(shape: tuple[int, ...]) -> Opaque:
    return Opaque(kind="call", name=_SIZE, args=(ListNode(items=shape, kind="tuple"),))


def _info(place: Place) -> Opaque:
    module = "torch.distributed.checkpoint.filesystem"
    return _object("_StorageInfo", module, relative_path=place.file, offset=place.offset, length=place.nbytes)


def _properties(dtype: DType) -> Opaque:
    """A `TensorProperties`: dtype, strided, no gradient, contiguous, not pinned."""
    state = (
        Opaque(kind="global", name=f"torch.{dtype.torch}"),
        Opaque(kind="call", name=_LAYOUT, args=("torch.strided",)),
        False,
        Opaque(kind="call", name=_MEMORY, args=(0,)),
        False,
    )
    return Opaque(
        kind="object", name=f"{_MODULE}.TensorProperties", state=ListNode(items=state, kind="tuple")
    )
