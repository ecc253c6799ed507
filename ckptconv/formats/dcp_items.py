"""The data files of torch.distributed.checkpoint: what lies at a place that the metadata names.

Byte layout of `__R_N.distcp` (rank, running number): items back to back, each a whole `torch.save` zip (see
`pytorch`) whose offsets count from the item's start. A tensor's item holds one chunk, with the strides it
had; any other value's item holds that value. With `SerializationFormat.SAFETENSORS` the tensors of a file are
one safetensors file instead, behind the other items; every chunk's offset is that file's start and its length
the tensor's bytes, and the chunk is found by its entry's name.

The items of a folder are alike: an item whose bytes around the tensor differ from those of an item read
before in checksums and serialization id only is laid out as that one, and is not parsed again.

Source: torch 2.13 `torch/distributed/checkpoint/filesystem.py` (`_write_item`, `_write_files_from_queue`).
"""

from __future__ import annotations

import struct
from collections.abc import Hashable
from dataclasses import dataclass, replace
from pathlib import Path

from ckptconv.errors import Code, FormatError
from ckptconv.formats.dcp_metadata import Place
from ckptconv.formats.pytorch import read_source
from ckptconv.formats.safetensors_header import Header, looks_like_header, read_header
from ckptconv.formats.torch_folder import is_member_name
from ckptconv.formats.zip_container import read_archive
from ckptconv.rawtree import Node, Opaque, transform, walk
from ckptconv.source import ByteSource, ends_early, open_source
from ckptconv.tensor import Checksum, DerivedTensor, Extent, StoredTensor, TensorRef

_SMALL_NBYTES = 1 << 13
"""Items up to this size are read in one piece to see what surrounds the tensor."""
_HEAD_NBYTES = 10
_TAIL_NBYTES = 22 + (1 << 16) - 1
"""A zip's end record and the longest comment behind it."""
_CHANGING = ("data/0", ".data/serialization_id")
"""Records that differ between items that are alike."""


class Section:
    """A run of a file as a source of its own; its end, where a zip's directory is, is read once."""

    __slots__ = ("_tail", "file", "name", "nbytes", "start")

    def __init__(self, file: ByteSource, start: int, nbytes: int, name: str) -> None:
        self.file, self.start, self.nbytes, self.name = file, start, nbytes, name
        self._tail = b""

    def read_into(self, offset: int, out: memoryview) -> None:
        if offset < 0 or offset + len(out) > self.nbytes:
            raise ends_early(self.name, offset, len(out), self.nbytes)
        within = offset - max(self.nbytes - _TAIL_NBYTES, 0)
        if within < 0:
            self.file.read_into(self.start + offset, out)
            return
        if not self._tail:
            tail = bytearray(min(self.nbytes, _TAIL_NBYTES))
            self.file.read_into(self.start + self.nbytes - len(tail), memoryview(tail))
            self._tail = bytes(tail)
        out[:] = self._tail[within : within + len(out)]

    def bytes_at(self, offset: int, nbytes: int) -> bytes:
        data = bytearray(nbytes)
        self.read_into(offset, memoryview(data))
        return bytes(data)


@dataclass(frozen=True, slots=True)
class _Frame:
    """The bytes around an item's tensor, and what they were found to mean."""

    head: bytes
    """Up to the tensor's bytes."""
    kept: tuple[tuple[int, int, bytes], ...]
    """(start, stop, bytes) of what follows the tensor's bytes, checksums and serialization id left out."""
    checksums: tuple[int, ...]
    """Where the tensor's CRC-32 stands in what follows: descriptor and directory."""
    tensor: StoredTensor
    """The first tensor that was read so."""


class Items:
    """The items of one folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files: dict[str, ByteSource] = {}
        self._frames: dict[int, list[_Frame]] = {}
        self._headers: dict[tuple[str, int], Header] = {}
        self._named_files: dict[str, bool] = {}
        self._read: dict[Hashable, TensorRef] = {}
        self._values: dict[bytes, Node] = {}

    def value(self, place: Place, key: str) -> Node:
        """The value of a byte entry.

        I/O: reads the item's pickle. Raises: missing-file, truncated-file, unsafe-path, and what reading a
        `torch.save` file raises.
        """
        section = self._section(place, key)
        if place.nbytes > _SMALL_NBYTES:
            return _moved_all(read_source(section, key).root, section)
        # A folder repeats its settings for every parameter.
        data = section.bytes_at(0, section.nbytes)
        if data not in self._values:
            root = read_source(section, key).root
            if any(isinstance(leaf, TensorRef) for _, leaf in walk(root)):
                return _moved_all(root, section)
            self._values[data] = root
        return self._values[data]

    def tensor(self, place: Place, key: str) -> TensorRef:
        """The chunk of an entry.

        I/O: reads what surrounds the tensor's bytes. Raises: as `value`; corrupt-file where it is no tensor.
        """
        # Chunks of one place are one tensor; those of a safetensors file share a place, and have names.
        identity = (place, key) if self._is_named(place, key) else place
        if identity not in self._read:
            section = self._section(place, key) if identity is place else None
            self._read[identity] = (
                self._named(place, key) if section is None else self._framed(section) or self._parsed(section)
            )
        return self._read[identity]

    @property
    def count(self) -> int:
        """Data files that were opened."""
        return len(self._files)

    def file(self, name: str, key: str) -> ByteSource:
        """A file of the folder, open. Raises: unsafe-path, missing-file."""
        if name not in self._files:
            if not is_member_name(name):
                message = f"'{key}' lies in {name!r:.80}, which is no name of a file in the folder"
                hint = "Names must stay in the directory: ask who wrote this folder."
                raise FormatError.of("unsafe-path", message, hint, loc=(key, name))
            path = self._folder / name
            if not path.is_file():
                message = f"'{key}' lies in '{name}', which is not there or is no file"
                raise FormatError.of("missing-file", message, "Copy the whole folder.", loc=(name, key))
            self._files[name] = open_source(path)
        return self._files[name]

    def _section(self, place: Place, key: str) -> Section:
        file = self.file(place.file, key)
        if place.offset + place.nbytes > file.nbytes:
            message = f"needs bytes {place.offset}..{place.offset + place.nbytes}, the file has {file.nbytes}"
            raise _problem("truncated-file", f"'{key}' {message}", place.file, key)
        return Section(file, place.offset, place.nbytes, f"{place.file}!{key}")

    # safetensors

    def _is_named(self, place: Place, key: str) -> bool:
        """Whether the tensors of the place's file are a safetensors file; a file has them in one way."""
        if place.file not in self._named_files:
            file = self.file(place.file, key)
            if place.offset + _HEAD_NBYTES > file.nbytes:
                return False
            head = bytearray(_HEAD_NBYTES)
            file.read_into(place.offset, memoryview(head))
            self._named_files[place.file] = looks_like_header(bytes(head), file.nbytes - place.offset)
        return self._named_files[place.file]

    def _named(self, place: Place, key: str) -> TensorRef:
        file = self.file(place.file, key)
        at = place.file, place.offset
        if at not in self._headers:
            rest = Section(file, place.offset, file.nbytes - place.offset, place.file)
            self._headers[at] = read_header(rest)
        found = self._headers[at].tensors.get(key)
        if found is None:
            raise _problem("corrupt-file", f"'{key}' is not among its tensors", place.file, key)
        spec, offset = found
        extent = Extent(source=file, offset=place.offset + offset, nbytes=spec.nbytes)
        return StoredTensor.dense(spec, extent)

    # torch.save

    def _framed(self, section: Section) -> StoredTensor | None:
        """The tensor of an item that is alike to one that was parsed."""
        frames = self._frames.get(section.nbytes)
        if not frames:
            return None
        small: bytearray | None = None
        if section.nbytes <= _SMALL_NBYTES:
            small = bytearray(section.nbytes)
            section.file.read_into(section.start, memoryview(small))
        for frame in frames:
            like = frame.tensor.extent
            start, stop = len(frame.head), len(frame.head) + like.nbytes
            head: bytes | bytearray
            tail: bytes | bytearray
            if small is not None:
                head, tail = small[:start], small[stop:]
            else:
                head, tail = section.bytes_at(0, start), section.bytes_at(stop, section.nbytes - stop)
            if head != frame.head or any(tail[low:high] != kept for low, high, kept in frame.kept):
                continue
            crc, *others = (int.from_bytes(tail[at : at + 4], "little") for at in frame.checksums)
            if others != [crc]:
                continue
            checksum = Checksum(kind="crc32", value=crc) if crc else None
            extent = Extent(
                source=section.file,
                offset=section.start + start,
                nbytes=like.nbytes,
                big_endian=like.big_endian,
                checksum=checksum,
            )
            return StoredTensor(
                spec=frame.tensor.spec,
                extent=extent,
                offset=frame.tensor.offset,
                strides=frame.tensor.strides,
            )
        return None

    def _parsed(self, section: Section) -> TensorRef:
        root = read_source(section, section.name).root
        if isinstance(root, Opaque) and root.kind in ("torch.parameter", "torch.tensor") and root.args:
            root = root.args[0]
        tensor = _moved(root, section)
        if not isinstance(tensor, TensorRef):
            what = getattr(root, "name", "") or getattr(root, "kind", type(root).__name__)
            file, _, key = section.name.partition("!")
            raise _problem(
                "unsupported-feature", f"the chunk of '{key}' is no plain tensor: {what}", file, key
            )
        if isinstance(tensor, StoredTensor):
            self._remember(section, tensor)
        return tensor

    def _remember(self, section: Section, tensor: StoredTensor) -> None:
        """Note what surrounds the tensor, if it lies as torch writes it."""
        start = tensor.extent.offset - section.start
        stop = start + tensor.extent.nbytes
        if tensor.extent.source is not section.file or not tensor.extent.nbytes:
            return
        tail = section.bytes_at(stop, section.nbytes - stop)
        archive = read_archive(section)
        cuts: list[tuple[int, int]] = []
        checksums: tuple[int, ...] = ()
        for name, record in archive.records.items():
            if not name.endswith(_CHANGING):
                continue
            raw = struct.pack("<L", record.crc)
            if tail.count(raw) != 2:  # descriptor and directory, and by no accident elsewhere
                return
            places = tail.index(raw), tail.rindex(raw)
            cuts += [(at, at + 4) for at in places]
            if record.offset == start:
                checksums = places
            else:
                cuts.append((record.offset - stop, record.offset - stop + record.nbytes))
        cuts.sort()
        edges = [0, *(edge for cut in cuts for edge in cut), len(tail)]
        spans = list(zip(edges[::2], edges[1::2], strict=True))
        if not checksums or any(low > high for low, high in spans):
            return
        frame = _Frame(
            head=section.bytes_at(0, start),
            kept=tuple((low, high, tail[low:high]) for low, high in spans),
            checksums=checksums,
            tensor=tensor,
        )
        self._frames.setdefault(section.nbytes, []).append(frame)


def _moved_all(root: Node, section: Section) -> Node:
    return transform(root, lambda _, node: _moved(node, section))


def _moved(node: Node, section: Section) -> Node:
    """A tensor that was read from a section, as one of the file."""
    if isinstance(node, StoredTensor) and node.extent.source is section:
        offset = node.extent.offset + section.start
        return replace(node, extent=node.extent._replace(source=section.file, offset=offset))
    if isinstance(node, DerivedTensor):
        parts = (_moved(part, section) for part in node.parts)
        return replace(node, parts=tuple(part for part in parts if isinstance(part, TensorRef)))
    return node


def _problem(code: Code, message: str, file: str, key: str) -> FormatError:
    error = FormatError.of(code, f"{message} [{file}]", "Copy the whole folder again.", loc=(file, key))
    assert isinstance(error, FormatError)
    return error
