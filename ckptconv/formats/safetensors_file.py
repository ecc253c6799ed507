"""One safetensors file as tensors and metadata, and as part of a layout: what single files, shards and the
neutral directory have in common."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ckptconv.errors import Code, FormatError, Problem
from ckptconv.formats import crc
from ckptconv.formats.base import ChecksumKind, Placement, TargetFile
from ckptconv.formats.safetensors_header import (
    METADATA,
    Header,
    file_order,
    make_header,
    read_header,
    tag_of,
)
from ckptconv.rawtree import DictNode, Node, RawTree
from ckptconv.source import ByteSource, open_source
from ckptconv.tensor import (
    Checksum,
    DerivedTensor,
    Extent,
    StoredTensor,
    TensorRef,
    TensorSpec,
    dense_strides,
)

SUFFIX = ".safetensors"
NOTE = "ckptconv"
_OURS = frozenset({NOTE, "format"})
"""Metadata keys that are never aliases."""

Tensors = dict[str, TensorRef]


def format_error(code: Code, message: str, hint: str, *loc: str | int) -> FormatError:
    return FormatError(Problem(code=code, loc=loc, message=message, hint=hint))


@dataclass(frozen=True, slots=True, kw_only=True)
class Contents:
    """One file as read."""

    tensors: Tensors
    """In the header's order, aliases last."""
    stored: frozenset[str]
    """The names that are in the header."""
    metadata: Mapping[str, str]
    """Without aliases and note."""
    note: str | None
    crc32c: int | None
    """Of the whole file if its tensors have the recorded checksums; None where none were given."""


def read_file(path: Path, recorded: Sequence[int] | None = None) -> Contents:
    """Tensors and metadata of one file.

    `recorded` are the crc32c of its tensors in the order of their bytes, where something beside it has them.
    I/O: reads the header only.
    Raises: missing-file and those of `read_header`; corrupt-file for another number of tensors than recorded.
    """
    if not path.is_file():
        raise format_error(
            "missing-file", f"'{path.name}' is not there or is no file", "Copy it too.", path.name
        )
    source = open_source(path)
    header = read_header(source)
    checksums = {} if recorded is None else _by_name(header, recorded, path.name)
    tensors = {key: _tensor(source, *place, checksums.get(key)) for key, place in header.tensors.items()}
    metadata: dict[str, str] = {}
    aliases: Tensors = {}
    for key, text in header.metadata.items():
        if key not in _OURS and key not in tensors and text in tensors:
            aliases[key] = tensors[text]
        elif key != NOTE:
            metadata[key] = text
    return Contents(
        tensors={**tensors, **aliases},
        stored=frozenset(tensors),
        metadata=metadata,
        note=header.metadata.get(NOTE),
        crc32c=None if recorded is None else _whole(source, header, checksums),
    )


def _by_name(header: Header, recorded: Sequence[int], name: str) -> dict[str, Checksum]:
    """The recorded checksums in the order of the tensors' bytes."""
    places = {key: (offset, spec.nbytes) for key, (spec, offset) in header.tensors.items()}
    if len(recorded) != len(places):
        raise format_error(
            "corrupt-file",
            f"{len(recorded)} checksums are recorded, the file has {len(places)} tensors [{name}]",
            "Copy the whole checkpoint again.",
            name,
        )
    order = sorted(places, key=places.__getitem__)
    return {key: Checksum(kind="crc32c", value=crc) for key, crc in zip(order, recorded, strict=True)}


def _tensor(source: ByteSource, spec: TensorSpec, offset: int, checksum: Checksum | None) -> TensorRef:
    extent = Extent(source=source, offset=offset, nbytes=spec.nbytes, checksum=checksum)
    return StoredTensor.dense(spec, extent)


def _whole(source: ByteSource, header: Header, checksums: Mapping[str, Checksum]) -> int:
    """crc32c of the header that is there and of tensors that have these checksums."""
    head = bytearray(header.nbytes)
    source.read_into(0, memoryview(head))
    values = [checksum.value for checksum in checksums.values()]
    nbytes = [header.tensors[key][0].nbytes for key in checksums]
    return crc.crc32c_joined([crc.crc32c(head), *values], [header.nbytes, *nbytes])


def identity(tensor: TensorRef) -> Hashable | None:
    """Equal for tensors that are the same view of the same memory; None where there is no memory or byte."""
    if tensor.spec.nbytes == 0:
        return None
    if isinstance(tensor, StoredTensor):
        strides = tuple(s for s, n in zip(tensor.strides, tensor.shape, strict=True) if n > 1)
        if tensor.is_dense:
            strides = dense_strides(tensor.shape)
        return ("stored", tensor.extent.id, tensor.offset, strides, tensor.spec)
    if isinstance(tensor, DerivedTensor):
        parts = tuple(identity(part) for part in tensor.parts)
        return None if None in parts else ("derived", tensor.op, parts)
    return None


def dedupe(tensors: Mapping[str, TensorRef]) -> tuple[Tensors, dict[str, str]]:
    """The tensors to store, and dropped name -> kept name for those that are another's twin."""
    kept: Tensors = {}
    first: dict[Hashable, str] = {}
    aliases: dict[str, str] = {}
    for name, tensor in tensors.items():
        key = identity(tensor)
        if key is not None and key in first and name not in _OURS:
            aliases[name] = first[key]
            continue
        if key is not None:
            first[key] = name
        kept[name] = tensor
    return kept, aliases


def check_tensors(root: Node, hint: str) -> Tensors:
    """The tensors of a flat tree.

    Raises: unsupported-feature for anything that is no named tensor; duplicate-key; unknown-dtype.
    """
    if not isinstance(root, DictNode):
        raise format_error("unsupported-feature", "safetensors holds named tensors only", hint)
    problems: list[Problem] = []
    tensors: Tensors = {}
    for key, value in root.items:
        loc = (key if isinstance(key, (str, int)) else repr(key)[:80],)
        if not isinstance(key, str) or not _is_name(key) or not isinstance(value, TensorRef):
            message = f"{key!r:.80}: safetensors holds tensors under names of Unicode text only"
            problems.append(Problem(code="unsupported-feature", loc=loc, message=message, hint=hint))
        elif key in tensors:
            message = f"'{key}' stands twice"
            problems.append(Problem(code="duplicate-key", loc=loc, message=message, hint=hint))
        elif tag_of(value.spec) is None:
            message = f"'{key}' is {value.dtype.name} {list(value.shape)}, for which safetensors has no type"
            problems.append(Problem(code="unknown-dtype", loc=loc, message=message, hint=hint))
        else:
            tensors[key] = value
    if problems:
        raise FormatError(*problems)
    return tensors


def _is_name(key: str) -> bool:
    """Whether a tensor can be stored under it: no half of a character, not the reserved name."""
    return key != METADATA and not any("\ud800" <= character <= "\udfff" for character in key)


def target_file(
    name: str,
    title: str,
    tensors: Mapping[str, TensorRef],
    metadata: Mapping[str, str],
    checksum: ChecksumKind | None = None,
) -> TargetFile:
    """One safetensors file of a layout; `title` names it in keys and messages.

    Its placements stand in the order of their bytes, and ask for the checksum.
    """
    specs = {key: tensor.spec for key, tensor in tensors.items()}
    order = file_order(specs)
    head, offsets = make_header(((key, specs[key]) for key in order), metadata, title)
    placements = tuple(
        Placement(key=f"{title}/{key}", offset=offsets[key], tensor=tensors[key], checksum=checksum)
        for key in order
    )
    return TargetFile(name=name, placements=placements, finish=constant([(0, head)]))


def file_nbytes(file: TargetFile) -> int:
    """Size of a file made by `target_file`."""
    pieces = [offset + len(data) for offset, data in file.finish({})]
    return max([*pieces, *(p.offset + p.tensor.spec.nbytes for p in file.placements)])


def constant(pieces: list[tuple[int, bytes]]) -> Callable[[Mapping[str, int]], Iterable[tuple[int, bytes]]]:
    return lambda checksums: pieces


def split(tensors: Mapping[str, TensorRef], limit: int | None) -> list[Tensors]:
    """Consecutive shards of at most `limit` bytes each; a larger tensor has one of its own."""
    shards: list[Tensors] = [{}]
    filled = 0
    for name, tensor in tensors.items():
        nbytes = tensor.spec.nbytes
        if limit is not None and shards[-1] and filled + nbytes > limit:
            shards.append({})
            filled = 0
        shards[-1][name] = tensor
        filled += nbytes
    return shards


def shard_names(stem: str, count: int) -> list[str]:
    """File names of `count` shards."""
    return [f"{stem}-{i:05d}-of-{count:05d}{SUFFIX}" for i in range(1, count + 1)]


def shard_limit(raw: RawTree) -> int | None:
    """The attribute `shard_nbytes`.

    Raises: usage for a limit that is no positive number.
    """
    limit = raw.attributes.get("shard_nbytes")
    if limit is None:
        return None
    if not isinstance(limit, int) or isinstance(limit, bool) or limit <= 0:
        raise format_error("usage", f"a shard size of {limit!r}", "Give a number of bytes.", "shard_nbytes")
    return limit
