"""What a format is: it recognises, reads and lays out one kind of container, and knows no meaning.

A file below `ckptconv/formats` registers its format with one `register(...)` call at its end; `table` says
which file that is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol

from ckptconv.rawtree import RawTree
from ckptconv.tensor import TensorRef

ChecksumKind = Literal["crc32", "crc32c"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """One run of tensor bytes in a target file."""

    key: str
    """Unique in its file; names the tensor in messages and in `TargetFile.finish`."""
    offset: int
    tensor: TensorRef
    checksum: ChecksumKind | None = None
    """Computed by the engine in the pass that writes, and handed to `finish`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetFile:
    """One file of a target: where each tensor goes, and every other byte once the checksums are known."""

    name: str
    """Relative to the directory that the target stands in; `""` is the target itself."""
    placements: tuple[Placement, ...] = ()
    finish: Callable[[Mapping[str, int]], Iterable[tuple[int, bytes]]]
    """Checksums by placement key -> all remaining (offset, bytes): headers, descriptors, directory, index.
    Called after every placement of *all* files is written; `checksums` holds those of all files,
    keyed `placement key` (keys are unique across the layout)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """The whole target, laid out before a tensor byte is read."""

    kind: Literal["file", "prefix", "directory"]
    """`file`: one file at the target path. `prefix`: several files whose names begin with the target's name.
    `directory`: the target path is a directory, file names are relative to it."""
    files: tuple[TargetFile, ...]
    """In the order of publication: the last one is the commit (an index, a manifest)."""
    bookkeeping: tuple[Callable[[Path, Path], None], ...] = field(default=())
    """What is done beside the target after publication (TensorFlow's `checkpoint` state file): gets the
    target, and a directory for what is not whole yet."""
    replaces: tuple[str, ...] = ()
    """Files beside the target that only the one that stands there now has; they make way with it."""


class Format(Protocol):
    """One kind of container."""

    name: str
    """As on the command line: `pytorch`, `tensorflow`, `safetensors`, `neutral`."""
    summary: str
    """One line for `ckptconv formats`."""
    checksums: tuple[ChecksumKind, ...]
    """Those that its files record."""
    shards: bool
    """Whether the attribute `shard_nbytes` of a tree is obeyed: most bytes of tensors in one file."""

    def sniff(self, path: Path) -> bool:
        """Whether the file or directory is of this format, judged by its bytes."""

    def read(self, path: Path) -> RawTree:
        """The container's tree; reads headers and indexes, never tensor bytes.

        Raises: truncated-file, corrupt-file, unsupported-feature, ... with a location.
        """

    def layout(self, raw: RawTree, path: Path) -> Layout:
        """Where everything goes when `raw` is written to `path`; touches nothing.

        Raises: unknown-dtype and others for what the container cannot hold.
        """


REGISTERED: dict[str, Format] = {}
"""Those whose module is imported; `table.FORMATS` has all."""


def register(format_: Format) -> Format:
    """Make a format known under its name."""
    REGISTERED[format_.name] = format_
    return format_
