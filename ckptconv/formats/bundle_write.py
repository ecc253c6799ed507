"""From a tree of tensors to the places of a bundle: what may be written, in which shard, at which offset."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from ckptconv.errors import CkptError, Code, FormatError, Problem
from ckptconv.formats import string_tensor
from ckptconv.formats.base import Placement
from ckptconv.formats.bundle_index import Entry, write_index
from ckptconv.formats.bundle_origin import Attributes, Partition, partitions_of, shards_of
from ckptconv.formats.bundle_slices import cut
from ckptconv.formats.ordered_code import slice_key
from ckptconv.rawtree import DictNode, Node, RawTree
from ckptconv.tensor import TensorRef

NOTE_KEY = "ckptconv/note"
"""Where the embedded note stands: outside the object graph, where no `restore` asks for it."""


def items_of(raw: RawTree) -> list[tuple[str, TensorRef]]:
    """The tensors to write in order, the note behind them.

    Raises: unsupported-feature, unknown-dtype, duplicate-key; all that are found.
    """
    if not isinstance(raw.root, DictNode):
        raise FormatError.of(
            "unsupported-feature", "a bundle holds a dict of tensors", "Name each tensor.", loc=()
        )
    pairs = [*raw.root.items, *(((NOTE_KEY, raw.note),) if raw.note is not None else ())]
    result: dict[str, TensorRef] = {}
    problems: list[Problem] = []
    for key, node in pairs:
        try:
            name = _checked_key(key)
            if name in result:
                raise _unwritable("duplicate-key", name, "stands twice", "Rename one.")
            result[name] = _leaf(name, node)
        except CkptError as error:
            problems.extend(error.problems)
    if problems:
        raise FormatError(*problems)
    return list(result.items())


def _checked_key(key: Node) -> str:
    try:
        if isinstance(key, str) and key and key[0] != "\0" and key.encode():
            return key
    except UnicodeEncodeError:
        pass
    raise _unwritable(
        "unsupported-feature", str(key), "no key of a bundle", "Use text that is UTF-8 and not empty."
    )


def _leaf(name: str, node: Node) -> TensorRef:
    if isinstance(node, str):
        return string_tensor.of_strings([node.encode("utf-8", "surrogatepass")], name=name)
    if isinstance(node, bytes):
        return string_tensor.of_strings([node], name=name)
    if not isinstance(node, TensorRef):
        raise _unwritable(
            "unsupported-feature", name, f"a {type(node).__name__} is no tensor", "Make it a 0-d tensor."
        )
    if node.dtype.tensorflow is None:
        raise _unwritable("unknown-dtype", name, f"TensorFlow has no {node.dtype.name}", "Cast it (--dtype).")
    if (node.dtype.itemsize == 0) != (node.spec.encoded_nbytes is not None):
        raise _unwritable(
            "unsupported-feature", name, f"{node.dtype.name} that is not encoded", "Encode its elements."
        )
    return node


def _unwritable(code: Code, name: str, what: str, hint: str) -> CkptError:
    return FormatError.of(code, f"'{name}': {what}", hint, loc=(name,))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Stored:
    """A tensor or slice whose bytes the target will hold."""

    key: bytes
    placement: str
    entry: Entry
    """Complete but for the checksum, where that is the engine's."""


class Writing:
    """Gives every tensor its place."""

    def __init__(self, items: list[tuple[str, TensorRef]], attributes: Attributes) -> None:
        assigned, kept = shards_of(attributes), partitions_of(attributes)
        parts = list(self._parts(items, assigned, kept))
        # Shards that hold nothing (any more) are not written.
        numbers = {shard: i for i, shard in enumerate(sorted({part[3] for part in parts}))}
        self.num_shards = max(len(numbers), 1)
        self.placements: list[list[Placement]] = [[] for _ in range(self.num_shards)]
        self._logical: list[tuple[bytes, Entry]] = [
            (name.encode(), Entry(tensor.dtype, tensor.shape, slices=kept[name].slices))
            for name, tensor in items
            if name in kept
        ]
        self._stored: list[_Stored] = []
        taken = {name for name, _ in items}
        ends = [0] * self.num_shards
        for key, name, tensor, shard in parts:
            shard = numbers[shard]
            nbytes = tensor.spec.nbytes
            encoded = tensor.dtype.itemsize == 0
            crc32c = string_tensor.entry_crc(tensor, (name,)) if encoded else 0
            placement = name
            while key != name.encode() and placement in taken:
                placement += "'"
            taken.add(placement)
            entry = Entry(tensor.dtype, tensor.shape, shard, ends[shard], nbytes, crc32c)
            self._stored.append(_Stored(key=key, placement=placement, entry=entry))
            if nbytes:
                self.placements[shard].append(
                    Placement(
                        key=placement,
                        offset=ends[shard],
                        tensor=tensor,
                        checksum=None if encoded else "crc32c",
                    )
                )
            ends[shard] += nbytes

    @staticmethod
    def _parts(
        items: list[tuple[str, TensorRef]], assigned: dict[str, int], kept: dict[str, Partition]
    ) -> Iterator[tuple[bytes, str, TensorRef, int]]:
        """Key, name for people, tensor and shard of all that is stored."""
        for name, tensor in items:
            how = kept.get(name)
            if how is None:
                yield name.encode(), name, tensor, assigned.get(name, 0)
                continue
            if how.shape != tensor.shape:
                raise FormatError.of(
                    "shape-mismatch",
                    f"'{name}' was partitioned as {list(how.shape)}, it is {list(tensor.shape)} now",
                    "Convert it without the source's partitioning.",
                    loc=(name,),
                )
            for extents, shard in zip(how.slices, how.shards, strict=True):
                place = ",".join(f"{start}:{length}" for start, length in extents)
                yield slice_key(name, extents), f"{name} [{place}]", cut(tensor, extents), shard

    def finish(self, checksums: Mapping[str, int]) -> Iterator[tuple[int, bytes]]:
        """The index, once the checksums are known."""
        rows = list(self._logical)
        for stored in self._stored:
            entry = stored.entry
            if entry.nbytes and entry.dtype.itemsize:
                entry = entry._replace(crc32c=checksums[stored.placement])
            rows.append((stored.key, entry))
        offset = 0
        for piece in write_index(self.num_shards, rows):
            yield offset, piece
            offset += len(piece)
