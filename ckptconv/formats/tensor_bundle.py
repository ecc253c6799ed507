"""TensorFlow checkpoints ("V2", TensorBundle): an index and shards of raw tensor bytes.

Files of a prefix P: `P.index` (see `bundle_index`) and `P.data-00000-of-00001` and so on: the tensors' bytes,
C order, packed without alignment, in the byte order that the header names. The checkpoint's path is the
prefix; one of its files, or the directory that it stands in, means it too.

What the tree holds: a dict of key to tensor in key order; strings and variants are tensors of encoded bytes
(see `string_tensor`), the object graph is one of them (see `object_graph`). A partitioned variable is one
tensor; the keys of its slices are not listed. Checkpoints of the first format (`saved_slices`) give the same
tree. Attributes:
- `prefix`: base name; `container`: `v1` of the first format;
- `chosen_by`: how a directory's checkpoint was chosen, a sentence;
- `layer_classes`: of a SavedModel of tf_keras, see `keras_metadata`;
- where the tensors were: see `bundle_origin`.

Written: what `SaveV2` writes for the same tensors in the same order; a source's shards and slices are kept.
The embedded note is a scalar string under a key of its own outside the object graph, which no `restore` asks
for. The `checkpoint` state file beside the prefix then names the checkpoint as the newest.

Refused: shards that are missing or too short, tensors that overlap, slices that leave gaps or belong to no
variable, keys that are not UTF-8, dtypes without a TensorFlow enum, values that are no tensor and no string.

Source: tensorflow v2.21 `core/util/tensor_bundle/tensor_bundle.cc`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from ckptconv.errors import FormatError
from ckptconv.formats import string_tensor
from ckptconv.formats.base import ChecksumKind, Layout, TargetFile, register
from ckptconv.formats.bundle_index import read_index
from ckptconv.formats.bundle_path import (
    Prefix,
    has_magic,
    has_shard,
    locate,
    names_in,
    prefix_of,
    saved_model_prefix,
    slice_files,
)
from ckptconv.formats.bundle_read import Reading
from ckptconv.formats.bundle_write import NOTE_KEY, Writing, items_of
from ckptconv.formats.checkpoint_state import STATE_FILE, read_state, record
from ckptconv.formats.keras_metadata import layer_classes
from ckptconv.formats.saved_slices import SliceReading
from ckptconv.rawtree import DictNode, RawTree, Scalar
from ckptconv.source import open_source
from ckptconv.tensor import TensorRef

__all__ = ["FORMAT", "NOTE_KEY", "TensorBundle"]


class TensorBundle:
    """The format `tensorflow`."""

    name = "tensorflow"
    summary = "TensorFlow checkpoint (TensorBundle: P.index, P.data-*; V1 is read): object graph or names"
    checksums: tuple[ChecksumKind, ...] = ("crc32c",)
    shards = False

    def sniff(self, path: Path) -> bool:
        """A prefix (also where only data are left), one of its files, or a directory with an index."""
        try:
            if path.is_dir() and not Prefix.at(path).index.is_file():
                saved = saved_model_prefix(path)
                return bool(names_in(path)) or (saved is not None and has_magic(saved.index))
            prefix = prefix_of(path)
            return has_magic(prefix.index) or has_shard(prefix) or bool(slice_files(path))
        except OSError:
            return False
        except FormatError:
            return True  # which reading it tells

    def read(self, path: Path) -> RawTree:
        """The checkpoint's tensors; also the one string that is the note.

        I/O: reads the index, and the note.
        Raises: those of `locate` and `read_index`; missing-file, truncated-tensor, corrupt-file,
        unsupported-feature.
        """
        located = locate(path)
        attributes: dict[str, Scalar | tuple[str, ...]] = {"prefix": located.prefix.name}
        if located.why is not None:
            attributes["chosen_by"] = located.why
        if located.prefix == saved_model_prefix(path):
            lines = tuple(f"{node} {name}" for node, name in layer_classes(path))
            attributes |= {"layer_classes": lines} if lines else {}
        if located.slices:
            tensors, origin = SliceReading(located.slices).tensors()
            attributes["container"] = "v1"
        else:
            index = read_index(open_source(located.prefix.index))
            tensors, origin = Reading(located.prefix, index).tensors()
        note = tensors.get(NOTE_KEY)
        text = None
        if note is not None and note.spec.dtype == string_tensor.STRING and note.shape == ():
            text = _note_text(tensors.pop(NOTE_KEY))
        return RawTree(
            format=self.name,
            root=DictNode(items=tuple(tensors.items())),
            attributes={**attributes, **origin},
            note=text,
            location=str(located.prefix),
        )

    def layout(self, raw: RawTree, path: Path) -> Layout:
        """Shards in order, then the index.

        I/O: streams string and variant tensors, whose checksums are not over their raw bytes.
        Raises: unknown-dtype, unsupported-feature, duplicate-key, shape-mismatch, target-unwritable.
        """
        prefix = prefix_of(path)
        if (prefix.directory / STATE_FILE).is_dir():
            raise FormatError.of(
                "target-unwritable",
                f"'{prefix.directory / STATE_FILE}' is a directory, TensorFlow's state file has that name",
                "Write the checkpoint into another directory.",
                loc=(STATE_FILE,),
            )
        read_state(prefix.directory)  # complains before anything is written, not after
        writing = Writing(items_of(raw), raw.attributes)
        files = [
            TargetFile(
                name=prefix.shard(shard, writing.num_shards).name,
                placements=tuple(writing.placements[shard]),
                finish=_nothing,
            )
            for shard in range(writing.num_shards)
        ]
        files.append(TargetFile(name=prefix.index.name, finish=writing.finish))
        return Layout(kind="prefix", files=tuple(files), bookkeeping=(_record,))


def _nothing(_: Mapping[str, int]) -> Iterable[tuple[int, bytes]]:
    return ()


def _record(path: Path, scratch: Path) -> None:
    prefix = prefix_of(path)
    record(prefix.directory, prefix.name, scratch)


def _note_text(note: TensorRef) -> str:
    (data,) = string_tensor.read_strings(note, (NOTE_KEY,))
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise FormatError.of(
            "corrupt-file", f"the note is not UTF-8: {error}", "Copy the file again.", loc=(NOTE_KEY,)
        ) from error


FORMAT = register(TensorBundle())
