"""`.keras`: a whole Keras 3 model, a zip of `metadata.json`, `config.json`, `model.weights.h5` and assets.

Records are stored or deflated; the weights are read in place where they are stored, else from a temporary
file. The tree: `metadata` and `config` as they parse, `weights` the tree of the HDF5 file (see `hdf5_read`),
`files` any other record, by name, as bytes. The zip's checksum of the weights is compared by whoever reads
the tensors.

Written: all records stored, in Keras' order; the JSON texts as `json.dumps` of Python writes them, which is
how Keras does. The embedded note is in the weights.

Producers: Keras 3.0 to 3.15, tf_keras 2.21. Refused: archives without one of the three records, and the code
of lambdas is text here and never run. Source: keras 3.15.1 `keras/src/saving/saving_lib.py`.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

from ckptconv.errors import CkptError
from ckptconv.formats.base import ChecksumKind, Layout, Placement, TargetFile, register
from ckptconv.formats.crc import crc32_joined
from ckptconv.formats.hdf5_file import failure
from ckptconv.formats.hdf5_read import read_tree
from ckptconv.formats.hdf5_write import NewFile, lay_out
from ckptconv.formats.json_tree import node_of, value_of
from ckptconv.formats.zip_container import LOCAL_SIGNATURE, Archive, mentions, read_archive
from ckptconv.formats.zip_layout import NewRecord, PlannedRecord, archive_frame, plan_archive
from ckptconv.rawtree import DictNode, Node, RawTree
from ckptconv.source import open_source
from ckptconv.strictjson import parse
from ckptconv.tensor import StoredTensor, TensorRef

METADATA, CONFIG, WEIGHTS, FILES = "metadata", "config", "weights", "files"
_RECORDS = {METADATA: "metadata.json", CONFIG: "config.json", WEIGHTS: "model.weights.h5"}
_ALIGNMENT = 64


class KerasArchive:
    """The format `keras`."""

    name = "keras"
    summary = "whole Keras 3 model (.keras: config, weights and optimizer in a zip)"
    checksums: tuple[ChecksumKind, ...] = ("crc32",)
    shards = False

    def sniff(self, path: Path) -> bool:
        """Whether it is a zip that has the model's records; else its first record tells."""
        if not path.is_file():
            return False
        source = open_source(path)
        head = bytearray(min(source.nbytes, 64))
        source.read_into(0, memoryview(head))
        if not head.startswith(LOCAL_SIGNATURE):
            return False
        try:
            needed = {_RECORDS[CONFIG], _RECORDS[WEIGHTS]}
            return mentions(source, needed) and needed <= read_archive(source).records.keys()
        except CkptError:
            return bytes(head[30 : 30 + int.from_bytes(head[26:28], "little")]) == b"metadata.json"

    def read(self, path: Path) -> RawTree:
        """The model's records.

        I/O: reads directory, JSON records and the headers of the weights.
        Raises: those of `read_archive`, `read_tree` and `strictjson.parse`; missing-file.
        """
        archive = read_archive(open_source(path))
        name = path.name
        for record in _RECORDS.values():
            if record not in archive.records:
                raise failure("missing-file", name, f"there is no '{record}' in the archive", record)
        weights = archive.records[_RECORDS[WEIGHTS]]
        tree, note = read_tree(archive.extent(weights), name)
        items: list[tuple[Node, Node]] = [
            (METADATA, _json(archive, METADATA, name)),
            (CONFIG, _json(archive, CONFIG, name)),
            (WEIGHTS, tree),
        ]
        others: list[tuple[Node, Node]] = [
            (key, StoredTensor.raw(archive.extent(record)))
            for key, record in archive.records.items()
            if key not in _RECORDS.values() and not key.endswith("/")
        ]
        if others:
            items.append((FILES, DictNode(items=tuple(others))))
        return RawTree(format=self.name, root=DictNode(items=tuple(items)), note=note, location=name)

    def layout(self, raw: RawTree, path: Path) -> Layout:
        """One archive.

        Raises: those of `lay_out`; unsupported-feature for a tree that is no model's.
        """
        name, root = path.name, raw.root
        weights = root.get(WEIGHTS) if isinstance(root, DictNode) else None
        if not isinstance(root, DictNode) or not isinstance(weights, DictNode):
            raise failure("unsupported-feature", name, f"there is no group '{WEIGHTS}' in the tree")
        known = {METADATA, CONFIG, WEIGHTS, FILES}
        if strange := [str(key) for key in root.keys if key not in known]:
            raise failure(
                "unsupported-feature", name, f"the tree has '{strange[0]}', no archive does", strange[0]
            )
        texts = {
            key: json.dumps(value_of(root.get(key), f"{name}!{_RECORDS[key]}")).encode()
            for key in (METADATA, CONFIG)
        }
        new = lay_out(weights, raw.note, name)
        files = dict(_files(root, name))
        records = [
            *(NewRecord(name=_RECORDS[key], nbytes=len(text), data=text) for key, text in texts.items()),
            NewRecord(name=_RECORDS[WEIGHTS], nbytes=new.nbytes),
            *(NewRecord(name=key, nbytes=tensor.spec.nbytes) for key, tensor in files.items()),
        ]
        planned = plan_archive("", records, _ALIGNMENT)
        places = {place.record.name: place for place in planned}
        begin = places[_RECORDS[WEIGHTS]].offset
        placements = [
            Placement(key=key, offset=begin + offset, tensor=tensor, checksum="crc32")
            for key, offset, tensor in new.tensors
        ]
        placements += [
            Placement(key=f"{FILES}/{key}", offset=places[key].offset, tensor=tensor, checksum="crc32")
            for key, tensor in files.items()
            if tensor.spec.nbytes
        ]
        file = TargetFile(name="", placements=tuple(placements), finish=_finish(planned, new, begin))
        return Layout(kind="file", files=(file,))


def _finish(
    planned: tuple[PlannedRecord, ...], new: NewFile, begin: int
) -> Callable[[Mapping[str, int]], Iterable[tuple[int, bytes]]]:
    def finish(checksums: Mapping[str, int]) -> Iterator[tuple[int, bytes]]:
        pieces = [(offset, zlib.crc32(data), len(data)) for offset, data in new.literals]
        pieces += [(offset, checksums[key], tensor.spec.nbytes) for key, offset, tensor in new.tensors]
        pieces.sort()
        whole = crc32_joined([crc for _, crc, _ in pieces], [nbytes for _, _, nbytes in pieces])
        others = {key.removeprefix(f"{FILES}/"): value for key, value in checksums.items()}
        yield from ((begin + offset, data) for offset, data in new.literals)
        yield from archive_frame(planned, {**others, _RECORDS[WEIGHTS]: whole})

    return finish


def _json(archive: Archive, key: str, name: str) -> Node:
    record = archive.records[_RECORDS[key]]
    return node_of(parse(archive.data(record), f"{name}!{record.name}"))


def _files(root: DictNode, name: str) -> Iterator[tuple[str, TensorRef]]:
    others = root.get(FILES)
    for key, node in others.items if isinstance(others, DictNode) else ():
        assert isinstance(key, str)
        if not isinstance(node, TensorRef) or node.dtype.name != "uint8":
            raise failure("unsupported-feature", name, f"'{key}' is no record of bytes", FILES, key)
        yield key, node


FORMAT = register(KerasArchive())
