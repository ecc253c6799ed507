"""Which formats there are, and what a path tells of the format that it is in.

One row per format, so that only the code of the formats that a path may be in is imported. A new format is a
module that calls `register(...)` at its end, and a row here.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ckptconv.formats.base import REGISTERED, Format
from ckptconv.registry import Registry
from ckptconv.source import open_source

Look = Literal["directory", "torch-zip", "zip", "hdf5", "file", "nothing"]
"""What stands at a path, told from the file system and the first bytes; `file` is any other file."""

_HEAD_NBYTES = 256
_HEADS: dict[re.Pattern[bytes], Look] = {
    re.compile(rb"PK\x03\x04.{26}[^/]+/data\.pkl", re.DOTALL): "torch-zip",
    re.compile(rb"PK\x03\x04"): "zip",
    re.compile(rb"\x89HDF\r\n\x1a\n"): "hdf5",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """What is known of a format without its code."""

    module: str
    suffixes: tuple[str, ...] = ()
    """File suffixes from which a target's format is inferred."""
    looks: frozenset[Look]
    """What may stand at a path of this format."""


ROWS: dict[str, Row] = {
    "dcp": Row(module="dcp", looks=frozenset({"directory"})),
    "h5": Row(module="h5", suffixes=(".h5", ".hdf5"), looks=frozenset({"hdf5"})),
    "keras": Row(module="keras_archive", suffixes=(".keras",), looks=frozenset({"zip"})),
    "neutral": Row(module="neutral", suffixes=(".neutral",), looks=frozenset({"directory"})),
    "pytorch": Row(
        module="pytorch",
        suffixes=(".pt", ".pth", ".bin", ".ckpt", ".tar", ".pkl"),
        looks=frozenset({"directory", "torch-zip", "zip", "file"}),
    ),
    "safetensors": Row(
        module="safetensors",
        suffixes=(".safetensors", ".safetensors.index.json"),
        looks=frozenset({"directory", "file", "nothing"}),
    ),
    "tensorflow": Row(
        module="tensor_bundle", suffixes=(".index",), looks=frozenset({"directory", "file", "nothing"})
    ),
    "weights-h5": Row(
        module="weights_h5",
        suffixes=(".weights.h5", ".weights.json"),
        looks=frozenset({"hdf5", "file", "nothing"}),
    ),
}
"""In the order in which they are asked: a trainer's folder is PyTorch's before it is one of safetensors."""

FORMATS: Registry[str, Format] = Registry(
    REGISTERED, {name: (f"{__package__}.{row.module}",) for name, row in ROWS.items()}, str
)


def format_at(path: Path) -> Format | None:
    """The format of what stands at a path, judged by its bytes; None where it is in none.

    Raises: missing-file where a file cannot be read.
    """
    seen = _look(path)
    candidates = (FORMATS[name] for name, row in ROWS.items() if seen in row.looks)
    return next((candidate for candidate in candidates if candidate.sniff(path)), None)


def _look(path: Path) -> Look:
    if path.is_dir():
        return "directory"
    if not path.is_file():
        return "nothing"
    source = open_source(path)
    head = bytearray(min(source.nbytes, _HEAD_NBYTES))
    source.read_into(0, memoryview(head))
    return next((look for begins, look in _HEADS.items() if begins.match(head)), "file")


def suffixes() -> tuple[str, ...]:
    """Those of all formats, the longest first: `.weights.h5` ends in `.h5` too."""
    return tuple(sorted((s for row in ROWS.values() for s in row.suffixes), key=len, reverse=True))
