"""Folders in which every rank saved for itself (`dcp.save(use_collectives=False)`): a `.metadata` of each.

Layout: `__<rank>.metadata` beside the rank's `__<rank>_<n>.distcp`, each as `.metadata` is (`dcp_metadata`),
with the sizes of whole tensors and the chunks of that rank alone. A chunk that several ranks have is there as
often as they are: nothing chose one of them to save it. The lowest rank's is read, and so are its values
(counters, random states). No file tells how many ranks there were: a missing last one is seen by the holes
that it leaves. Where there is a `.metadata` as well, torch reads that, and so do we.

Source: torch 2.13 `torch/distributed/checkpoint/filesystem.py` (`_get_metadata_path`),
`state_dict_loader.py`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ckptconv.errors import FormatError, Problem
from ckptconv.formats.dcp_metadata import Chunk, Entry, Metadata, Place, TensorEntry
from ckptconv.tensor import Index

REPEATED = "repeated"
"""Attribute: how many entries several ranks have saved."""

FIRST = "__0.metadata"
"""What tells such a folder."""

_NAME = re.compile(r"__(\d{1,9})\.metadata")


def ranks_of(path: Path) -> tuple[str, ...]:
    """The names of the ranks' metadata, in the order of ranks. I/O: lists the directory.

    Raises: missing-file where one of them is not there.
    """
    names = [file.name for file in path.glob("__*.metadata")]
    ranks = {int(told[1]): name for name in names if (told := _NAME.fullmatch(name)) is not None}
    gaps = [rank for rank in range(max(ranks, default=-1)) if rank not in ranks]
    if gaps:
        raise FormatError(
            *(
                Problem(
                    code="missing-file",
                    loc=(f"__{rank}.metadata",),
                    message=f"rank {max(ranks)} left its metadata, rank {rank} did not",
                    hint="Copy the whole folder again: each rank saved for itself.",
                )
                for rank in gaps[:20]
            )
        )
    return tuple(ranks[rank] for rank in sorted(ranks))


def joined(parts: Sequence[tuple[str, Metadata]]) -> tuple[Metadata, int]:
    """The metadata of all ranks as one, and how many entries several of them have.

    `parts`: in the order of ranks, with the names of their files. Raises: corrupt-file.
    """
    entries: dict[str, Entry] = {}
    repeated: set[str] = set()
    paths = dict(parts[0][1].paths)
    for name, metadata in parts:
        paths.update({key: path for key, path in metadata.paths.items() if key not in paths})
        for key, entry in metadata.entries.items():
            known = entries.get(key)
            if known is None:
                entries[key] = entry
            elif isinstance(known, Place) and isinstance(entry, Place):
                repeated.add(key)
            elif isinstance(known, TensorEntry) and isinstance(entry, TensorEntry) and _alike(known, entry):
                chunks, again = _united(known.chunks, entry.chunks)
                entries[key] = replace(known, chunks=chunks)
                repeated.update({key} if again else ())
            else:
                raise FormatError.of(
                    "corrupt-file",
                    f"'{key}' is {_told(known)} in '{parts[0][0]}', and {_told(entry)} in '{name}'",
                    "The files are of two runs: copy the whole folder again.",
                    loc=(name, key),
                )
    return Metadata(entries=entries, paths=paths), len(repeated)


def _alike(a: TensorEntry, b: TensorEntry) -> bool:
    return (a.dtype, a.shape) == (b.dtype, b.shape)


def _united(known: tuple[Chunk, ...], more: tuple[Chunk, ...]) -> tuple[tuple[Chunk, ...], bool]:
    """All chunks, and whether some are there twice: the first of each stays."""
    chunks: dict[tuple[Index, tuple[int, ...]], Chunk] = {(c.start, c.shape): c for c in known}
    fresh = {(c.start, c.shape): c for c in more if (c.start, c.shape) not in chunks}
    return (*known, *fresh.values()), len(fresh) < len(more)


def _told(entry: Entry) -> str:
    if isinstance(entry, Place):
        return "a value"
    return f"a tensor {entry.dtype.name} {list(entry.shape)}"
