"""Lays out a new torch.distributed.checkpoint folder: every entry's item, then the `.metadata`.

See `dcp_items` and `dcp_metadata` for the bytes. The values stand first, in the first file; then the tensors,
each whole, in the order of the tree. A tensor's item has a storage of its own, so that no item drags along
what it is a view of; entries that are the same view of the same bytes point to one item.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from ckptconv.formats.base import Layout, Placement, TargetFile
from ckptconv.formats.dcp_metadata import FILE, Chunk, Entry, Metadata, Place, TensorEntry, metadata_pickle
from ckptconv.formats.dcp_paths import flattened
from ckptconv.formats.json_tree import text_of
from ckptconv.formats.pytorch import plan_object
from ckptconv.formats.torch_layout import Laid, laid, strides_of
from ckptconv.formats.zip_layout import PlannedRecord, archive_frame
from ckptconv.rawtree import DictNode, Node, RawTree
from ckptconv.tensor import StoredTensor, TensorRef, dense_strides

BESIDE = "meta.pt"
"""What Lightning leaves beside the data files."""
COMMON, CONFIG = "common.pt", "metadata.json"
"""What Megatron leaves there: what is no tensor, and what the folder is, written last."""
UNFLATTENED = "unflattened"
"""Attribute: the tree's items are the folder's entries, whatever is in them."""
_ARCHIVE = "archive"


@dataclass(slots=True)
class _File:
    """A data file that is being laid out."""

    name: str
    nbytes: int = 0
    tensors_nbytes: int = 0
    items: list[tuple[int, str, tuple[PlannedRecord, ...]]] = field(default_factory=list)
    """(offset, key, records)."""
    placements: list[Placement] = field(default_factory=list)

    def add(self, key: str, node: Node, *, opaque_globals: bool) -> Place:
        """Append an item."""
        planned, storages = plan_object(node, _ARCHIVE, opaque_globals=opaque_globals)
        offsets = {place.record.name: place.offset for place in planned}
        for storage in storages:
            if storage.tensor.spec.nbytes:
                name = f"data/{storage.key}"
                self.placements.append(
                    Placement(
                        key=_placement_key(key, name),
                        offset=self.nbytes + offsets[name],
                        tensor=storage.tensor,
                        checksum="crc32",
                    )
                )
                self.tensors_nbytes += storage.tensor.spec.nbytes
        start = self.nbytes
        self.items.append((start, key, planned))
        self.nbytes += _archive_nbytes(planned)
        return Place(self.name, start, self.nbytes - start)

    def finish(self, checksums: Mapping[str, int]) -> Iterator[tuple[int, bytes]]:
        """Every byte of the items but the placed ones."""
        for start, key, planned in self.items:
            names = [place.record.name for place in planned]
            own = {n: checksums[k] for n in names if (k := _placement_key(key, n)) in checksums}
            for offset, data in archive_frame(planned, own):
                yield start + offset, data

    def target(self) -> TargetFile:
        return TargetFile(name=self.name, placements=tuple(self.placements), finish=self.finish)


def _placement_key(key: str, record: str) -> str:
    return f"{key}!{record}"


def _archive_nbytes(planned: tuple[PlannedRecord, ...]) -> int:
    """Size of an archive; the checksums do not change it."""
    unknown = {place.record.name: 0 for place in planned}
    return max(offset + len(data) for offset, data in archive_frame(planned, unknown))


def lay_folder(raw: RawTree, limit: int | None) -> Layout:
    """The folder, in data files with at most `limit` bytes of tensors each; a larger tensor has its own.

    Raises: duplicate-key, unknown-dtype, opaque-globals, limit-exceeded, unsupported-feature,
    reference-broken.
    """
    opaque = raw.attributes.get("allow_opaque_globals") is True
    files = [_File("__0_0.distcp")]
    root = raw.root
    others: list[_File] = []
    last: list[TargetFile] = []
    for name in (BESIDE, COMMON, CONFIG):
        beside = root.get(name) if isinstance(root, DictNode) else None
        if not isinstance(root, DictNode) or not isinstance(beside, DictNode):
            continue
        root = replace(root, items=tuple((key, node) for key, node in root.items if key != name))
        if name == CONFIG:
            last.append(TargetFile(name=name, finish=_constant(text_of(beside, None, name))))
            continue
        others.append(_File(name))
        others[-1].add(name, beside, opaque_globals=opaque)
    whole = raw.attributes.get(UNFLATTENED) is True
    flat = flattened(root, raw.note, raw.location or raw.format, entries=whole)
    entries: dict[str, Entry] = {}
    placed: dict[Hashable, Entry] = {}
    for key, leaf in flat.leaves.items():
        if not isinstance(leaf, TensorRef):
            entries[key] = files[0].add(key, leaf, opaque_globals=opaque)
    for key, leaf in flat.leaves.items():
        if not isinstance(leaf, TensorRef):
            continue
        view = _view_of(leaf)
        if view not in placed:
            full = limit is not None and files[-1].tensors_nbytes + leaf.spec.nbytes > limit
            if full and files[-1].tensors_nbytes:
                files.append(_File(f"__0_{len(files)}.distcp"))
            place = files[-1].add(key, _own_storage(leaf), opaque_globals=opaque)
            chunk = Chunk((0,) * len(leaf.shape), leaf.shape, place)
            placed[view] = TensorEntry(dtype=leaf.dtype, shape=leaf.shape, chunks=(chunk,))
        entries[key] = placed[view]
    metadata = Metadata(entries={key: entries[key] for key in flat.leaves}, paths=flat.paths)
    commit = TargetFile(name=FILE, finish=_constant(metadata_pickle(metadata)))
    return Layout(kind="directory", files=(*(file.target() for file in (*files, *others)), commit, *last))


def _view_of(tensor: TensorRef) -> Hashable:
    """Equal for leaves that are the same view of the same bytes."""
    if not isinstance(tensor, StoredTensor) or not tensor.spec.numel:
        return id(tensor)
    return tensor.storage_id, tensor.offset, tensor.strides, tensor.shape, tensor.dtype.name


def _own_storage(tensor: TensorRef) -> TensorRef:
    """The tensor without the rest of its storage; its strides stay, if they leave no gaps."""
    if not isinstance(tensor, StoredTensor) or tensor.extent.nbytes == tensor.spec.nbytes:
        return tensor
    if not tensor.spec.numel:
        return StoredTensor.of_array(np.empty(tensor.shape, tensor.dtype.numpy))
    return laid(tensor.apply(Laid(dense_strides(tensor.shape))), strides_of(tensor))


def _constant(data: bytes) -> Callable[[Mapping[str, int]], Iterable[tuple[int, bytes]]]:
    return lambda checksums: [(0, data)]
