"""torch.distributed.checkpoint: a folder of any number of ranks, read and written without torch.

A folder has `.metadata` (`dcp_metadata`), written last, and data files `__R_N.distcp` (`dcp_items`). A tensor
lies in chunks that cover it once, in whatever grid the ranks had; chunks without elements are passed over.
Entries have flat keys, the metadata tells their paths (`dcp_paths`).

Tree: the dictionary that was saved, nested: `DictNode(kind="dict")` and `ListNode(kind="list")` where torch
took a container apart; for a tensor entry the tensor, joined from its chunks; for every other entry the
value, as `pytorch` has it. Two entries at one place of one file share their memory. `RawTree.attributes`:
`files` (number of data files). `RawTree.note` is the entry `ckptconv.note`, which whoever loads the folder
passes over.

Lightning leaves a part of its checkpoint beside the entries, in the `torch.save` file `meta.pt`: it is the
tree's last item, under that name. So does Megatron, in `common.pt` and `metadata.json`. Folders of the
HuggingFace writer without `.metadata` are `dcp_shards`, those whose ranks have one each `dcp_ranks`.

Written: one data file, or `__0_N.distcp` of at most `shard_nbytes` (an attribute of the tree) of tensors
each; values first, as torch orders them; tensors with their strides, shared ones once; the items of a tree
with the attribute `unflattened` as entries. Refused: a missing data file, items beyond their file, names that
leave the folder, chunks that overlap or leave holes, items that are not what the metadata says.

Source: torch 2.13 `torch/distributed/checkpoint/`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from ckptconv.errors import CkptError, Code, FormatError
from ckptconv.formats.base import ChecksumKind, Layout, register
from ckptconv.formats.bundle_slices import Box, assemble
from ckptconv.formats.dcp_items import Items
from ckptconv.formats.dcp_metadata import FILE, Metadata, Place, TensorEntry, read_metadata
from ckptconv.formats.dcp_paths import NOTE, nested
from ckptconv.formats.dcp_ranks import FIRST, REPEATED, joined, ranks_of
from ckptconv.formats.dcp_shards import read_shards, shards_of
from ckptconv.formats.dcp_write import BESIDE, COMMON, CONFIG, lay_folder
from ckptconv.formats.json_tree import read_text
from ckptconv.formats.pytorch import read_source
from ckptconv.formats.safetensors_file import shard_limit
from ckptconv.rawtree import Node, RawTree
from ckptconv.source import open_source
from ckptconv.tensor import StoredTensor, TensorRef, TensorSpec

_MAX_METADATA_NBYTES = 4 << 30


class DistributedCheckpoint:
    """Folders of torch.distributed.checkpoint."""

    name = "dcp"
    summary = "torch.distributed.checkpoint folder of any number of ranks (FSDP, torchtitan)"
    checksums: tuple[ChecksumKind, ...] = ("crc32",)
    shards = True

    def sniff(self, path: Path) -> bool:
        """Whether a directory has a `.metadata`, one of each rank, or the shards that have none."""
        if not path.is_dir():
            return False
        return (path / FILE).is_file() or (path / FIRST).is_file() or bool(shards_of(path))

    def read(self, path: Path) -> RawTree:
        """The dictionary that was saved.

        I/O: reads `.metadata`, the items of values, what surrounds each tensor.
        Raises: see `read_metadata`, `Items`, `nested`; corrupt-file for items that are not what the metadata
        says, for holes and overlaps; unsupported-feature for chunks that no cuts along whole axes make.
        """
        if not (path / FILE).exists() and shards_of(path):
            root, attributes = read_shards(path)
            return RawTree(format=self.name, root=root, attributes=attributes, location=str(path))
        metadata, attributes = _metadata(path)
        items = Items(path)
        leaves: dict[str, Node] = {}
        problems: list[CkptError] = []
        for key, entry in metadata.entries.items():
            try:
                if isinstance(entry, Place):
                    leaves[key] = items.value(entry, key)
                else:
                    leaves[key] = _assembled(entry, items, key)
            except CkptError as error:
                problems.append(error)
        if problems:
            raise FormatError(*(problem for error in problems for problem in error.problems))
        note = leaves.pop(NOTE, None)
        if note is not None and not isinstance(note, str):
            raise _problem("corrupt-file", f"the entry '{NOTE}' should be text", FILE, NOTE)
        root = nested(leaves, metadata.paths, path.name)
        root = replace(root, items=(*root.items, *_beside(path)))
        return RawTree(
            format=self.name,
            root=root,
            attributes={**attributes, "files": items.count},
            note=note,
            location=str(path),
        )

    def layout(self, raw: RawTree, path: Path) -> Layout:
        """One data file, or several where there is a `shard_nbytes`.

        Raises: usage, and see `lay_folder`.
        """
        return lay_folder(raw, shard_limit(raw))


def _metadata(path: Path) -> tuple[Metadata, dict[str, bool | int]]:
    """The folder's metadata, that of all ranks together where each has its own."""
    if (path / FILE).exists() or not (path / FIRST).exists():
        return read_metadata(_whole(path / FILE), FILE), {}
    parts = [(name, read_metadata(_whole(path / name), name)) for name in ranks_of(path)]
    metadata, repeated = joined(parts)
    return metadata, {REPEATED: repeated}


def _beside(path: Path) -> Iterator[tuple[str, Node]]:
    """What whole files beside the entries hold, by their names."""
    for name in (BESIDE, COMMON):
        if (path / name).is_file():
            yield name, read_source(open_source(path / name), name).root
    if (path / COMMON).is_file() and (path / CONFIG).is_file():
        yield CONFIG, read_text(_whole(path / CONFIG), CONFIG)[0]


def _whole(path: Path) -> bytes:
    source = open_source(path)
    if source.nbytes > _MAX_METADATA_NBYTES:
        message = f"'{path.name}' has {source.nbytes} bytes, at most {_MAX_METADATA_NBYTES} are read"
        raise _problem("limit-exceeded", message, path.name)
    data = bytearray(source.nbytes)
    source.read_into(0, memoryview(data))
    return bytes(data)


def _assembled(entry: TensorEntry, items: Items, key: str) -> TensorRef:
    """The tensor of all chunks."""
    boxes: list[Box] = []
    filled = [chunk for chunk in entry.chunks if 0 not in chunk.shape]
    for chunk in filled or entry.chunks[:1]:
        tensor = items.tensor(chunk.place, key)
        if (tensor.dtype, tensor.shape) != (entry.dtype, chunk.shape):
            raise _problem(
                "corrupt-file",
                f"the chunk of '{key}' at {list(chunk.start)} should be {entry.dtype.name} "
                f"{list(chunk.shape)}, it is {tensor.dtype.name} {list(tensor.shape)} [{chunk.place.file}]",
                chunk.place.file,
                key,
            )
        if 0 in entry.shape and isinstance(tensor, StoredTensor):
            return StoredTensor.dense(TensorSpec(dtype=entry.dtype, shape=entry.shape), tensor.extent)
        stop = tuple([low + size for low, size in zip(chunk.start, chunk.shape, strict=True)])
        boxes.append(Box(chunk.start, stop, tensor))
    return assemble(boxes, entry.shape, (key,))


def _problem(code: Code, message: str, *loc: str) -> FormatError:
    error = FormatError.of(code, message, "Copy the whole folder again; nothing was written.", loc=loc)
    assert isinstance(error, FormatError)
    return error


FORMAT = register(DistributedCheckpoint())
