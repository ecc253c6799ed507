"""From the entries of a bundle's index to lazy tensors: shards, partitioned variables, what overlaps."""

from __future__ import annotations

from ckptconv.errors import CkptError, Code, FormatError, Problem
from ckptconv.formats.bundle_index import Entry, Index
from ckptconv.formats.bundle_origin import Attributes, Partition, attributes_of
from ckptconv.formats.bundle_path import Prefix
from ckptconv.formats.bundle_slices import Box, assemble, bounds
from ckptconv.formats.ordered_code import slice_key
from ckptconv.formats.string_tensor import EncodedTensor
from ckptconv.source import ByteSource, open_source
from ckptconv.tensor import Checksum, Extent, StoredTensor, TensorRef, TensorSpec, dense_strides


class Reading:
    """Makes tensors of the entries of one index."""

    def __init__(self, prefix: Prefix, index: Index) -> None:
        self._prefix = prefix
        self._index = index
        self._shards: dict[int, ByteSource | None] = {}
        self._specs: dict[tuple[str, tuple[int, ...]], tuple[TensorSpec, tuple[int, ...]]] = {}
        self._problems: list[Problem] = []

    def tensors(self) -> tuple[dict[str, TensorRef], Attributes]:
        """Tensors by key, and the attributes that say where they were."""
        entries = self._index.entries
        result: dict[str, TensorRef] = {}
        shards: dict[str, int] = {}
        partitions: dict[str, Partition] = {}
        claimed: set[bytes] = set()
        for key, entry in entries.items():
            if key[0] == 0:
                continue
            try:
                name = key.decode()
            except UnicodeDecodeError:
                self._complain(
                    "unsupported-feature", repr(key), "the key is not UTF-8", "Save it under another name."
                )
                continue
            if entry.slices:
                keys = [slice_key(name, extents) for extents in entry.slices]
                claimed.update(keys)
                parts = [entries.get(part) for part in keys]
                tensor = self._partitioned(name, entry, parts)
                owners = tuple(part.shard if part else 0 for part in parts)
                partitions[name] = Partition(entry.shape, entry.slices, owners)
            else:
                tensor = self._tensor(name, entry)
                shards[name] = entry.shard
            if tensor is not None:
                result[name] = tensor
        for key in entries:
            if key[0] == 0 and key not in claimed:
                self._complain("corrupt-file", repr(key), "a slice of no variable")
        self._check_overlaps()
        if self._problems:
            raise FormatError(*self._problems)
        return result, attributes_of(self._index.num_shards, shards, partitions)

    def _tensor(self, name: str, entry: Entry) -> TensorRef | None:
        dtype, shape, shard, offset, nbytes, crc32c, _ = entry
        source = self._shards[shard] if shard in self._shards else self._shard(shard)
        if source is None:
            return None
        if offset + nbytes > source.nbytes:
            self._complain(
                "truncated-tensor",
                name,
                f"needs bytes {offset}..{offset + nbytes}, the file ends at {source.nbytes} [{source.name}]",
            )
            return None
        checksum = Checksum(kind="crc32c", value=crc32c)
        if dtype.itemsize == 0:
            return EncodedTensor(
                spec=TensorSpec(dtype=dtype, shape=shape, encoded_nbytes=nbytes),
                extent=Extent(source=source, offset=offset, nbytes=nbytes),
                entry_checksum=checksum,
                name=name,
            )
        known = self._specs.get((dtype.name, shape))
        if known is None:
            known = TensorSpec(dtype=dtype, shape=shape), dense_strides(shape)
            self._specs[dtype.name, shape] = known
        extent = Extent(
            source=source,
            offset=offset,
            nbytes=nbytes,
            big_endian=self._index.big_endian,
            checksum=checksum,
        )
        return StoredTensor(spec=known[0], extent=extent, strides=known[1])

    def _partitioned(self, name: str, entry: Entry, parts: list[Entry | None]) -> TensorRef | None:
        boxes = []
        for extents, part in zip(entry.slices, parts, strict=True):
            start, stop = bounds(extents, entry.shape)
            shape = tuple(high - low for low, high in zip(start, stop, strict=True))
            if part is None:
                self._complain("corrupt-file", name, f"the slice {start} to {stop} is not there")
            elif (part.dtype, part.shape) != (entry.dtype, shape) or part.slices:
                self._complain(
                    "corrupt-file",
                    name,
                    f"a slice is {part.dtype.name}{list(part.shape)}, "
                    f"expected {entry.dtype.name}{list(shape)}",
                )
            elif part.dtype.itemsize == 0:
                self._complain(
                    "unsupported-feature", name, "slices of strings", "Save the variable unpartitioned."
                )
            else:
                tensor = self._tensor(name, part)
                if tensor is not None:
                    boxes.append(Box(start, stop, tensor))
        if len(boxes) != len(parts):
            return None
        try:
            return assemble(boxes, entry.shape, (name,))
        except CkptError as error:
            self._problems.extend(error.problems)
            return None

    def _shard(self, shard: int) -> ByteSource | None:
        if shard not in self._shards:
            self._shards[shard] = None
            path = self._prefix.shard(shard, self._index.num_shards)
            if path.is_file():
                self._shards[shard] = open_source(path)
            else:
                self._complain(
                    "missing-file",
                    path.name,
                    "the index needs this shard, it is not there",
                    "Copy all files of the checkpoint.",
                )
        return self._shards[shard]

    def _check_overlaps(self) -> None:
        """TensorFlow writes no overlaps; with them a small file could stand for any amount of data."""
        extents = sorted(
            (entry.shard, entry.offset, entry.nbytes, key)
            for key, entry in self._index.entries.items()
            if entry.nbytes
        )
        shard, end, owner = -1, 0, b""
        for at, offset, nbytes, key in extents:
            if at == shard and offset < end:
                text = key.decode("utf-8", "backslashreplace")
                other = owner.decode("utf-8", "backslashreplace")
                self._complain("corrupt-file", text, f"begins at {offset}, '{other}' ends at {end}")
            else:
                shard, end, owner = at, offset + nbytes, key

    def _complain(self, code: Code, name: str, what: str, hint: str = "Copy the files again.") -> None:
        self._problems.append(Problem(code=code, loc=(name,), message=f"'{name}': {what}", hint=hint))
