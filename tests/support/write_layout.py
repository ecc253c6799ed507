"""A small sequential writer of layouts, for tests of formats: no temporaries, no threads, no verification."""

from __future__ import annotations

import zlib
from pathlib import Path

import google_crc32c

from ckptconv.formats.base import Layout, Placement


def _checksum(placement: Placement, path: Path) -> int | None:
    """Write one placement; the checksum that it asks for."""
    crc = 0
    with path.open("r+b") as file:
        file.seek(placement.offset)
        for window in placement.tensor.windows():
            file.write(window)
            if placement.checksum == "crc32":
                crc = zlib.crc32(window, crc)
            elif placement.checksum == "crc32c":
                crc = google_crc32c.extend(crc, window.tobytes())
    return None if placement.checksum is None else crc


def write_layout(layout: Layout, path: Path) -> None:
    """Write `layout` to `path`, then do its bookkeeping."""
    path = Path(path)
    base = path if layout.kind == "directory" else path.parent
    base.mkdir(parents=True, exist_ok=True)
    paths = {file.name: base / file.name if file.name else path for file in layout.files}
    checksums: dict[str, int] = {}
    for file in layout.files:
        paths[file.name].parent.mkdir(parents=True, exist_ok=True)
        paths[file.name].write_bytes(b"")
        for placement in file.placements:
            assert placement.key not in checksums, f"placement key {placement.key!r} stands twice"
            crc = _checksum(placement, paths[file.name])
            if crc is not None:
                checksums[placement.key] = crc
    for file in layout.files:
        for offset, data in file.finish(checksums):
            with paths[file.name].open("r+b") as stream:
                stream.seek(offset)
                stream.write(data)
    for step in layout.bookkeeping:
        step(path, path.parent)
