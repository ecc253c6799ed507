"""Tables as TensorFlow never writes them: snappy blocks, changed entries, checksums made to fit."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path

from ckptconv.formats import crc, sstable
from ckptconv.formats.varint import write_varint
from ckptconv.tensor import BufferSource

Entries = list[tuple[bytes, bytes]]


def table_of(entries: Entries) -> bytes:
    return b"".join(sstable.write_table(entries))


def entries_of(table: bytes) -> Entries:
    return sstable.read_table(BufferSource(table, "a.index"))


def rewrite(index: Path, change: Callable[[Entries], Entries]) -> None:
    """Change a table's entries, keeping it a sound table."""
    index.write_bytes(table_of(change(entries_of(index.read_bytes()))))


def assembled(
    blocks: list[bytes], index: Entries, metaindex: bytes | None = None, compress: bool = False
) -> bytes:
    """A table of raw blocks; each index value is replaced by the handle of the block of its position."""
    out, handles = bytearray(), []

    def put(block: bytes, kind: int) -> bytes:
        handle = write_varint(len(out)) + write_varint(len(block))
        out.extend(block + bytes((kind,)) + struct.pack("<I", crc.mask(crc.crc32c(block + bytes((kind,))))))
        return handle

    for data in blocks:
        handles.append(put(snappy(data), 1) if compress else put(data, 0))
    meta = put(block([]) if metaindex is None else metaindex, 0)
    rows = [(key, handles[int(value)] if value.isdigit() else value) for key, value in index]
    footer = meta + put(block(rows, interval=1), 0)
    return bytes(out) + footer.ljust(40, b"\0") + sstable.MAGIC


def block(rows: Entries, interval: int = 16) -> bytes:
    """A block with full keys, whatever their order."""
    out, restarts = bytearray(), []
    for i, (key, value) in enumerate(rows):
        if i % interval == 0:
            restarts.append(len(out))
        out += write_varint(0) + write_varint(len(key)) + write_varint(len(value)) + key + value
    restarts = restarts or [0]
    return bytes(out) + struct.pack(f"<{len(restarts) + 1}I", *restarts, len(restarts))


def snappy(data: bytes) -> bytes:
    """A greedy compressor that makes every kind of element."""
    out, at, literal = bytearray(write_varint(len(data))), 0, bytearray()

    def flush() -> None:
        while literal:
            piece = bytes(literal[:70_000])
            del literal[:70_000]
            n = len(piece) - 1
            if n < 60:
                out.append(n << 2)
            else:
                width = (n.bit_length() + 7) // 8
                out.append((59 + width) << 2)
                out.extend(n.to_bytes(width, "little"))
            out.extend(piece)

    while at < len(data):
        found = data.rfind(data[at : at + 4], 0, at) if at + 4 <= len(data) else -1
        if found < 0:
            literal.append(data[at])
            at += 1
            continue
        length = 4
        while length < 64 and at + length < len(data) and data[found + length] == data[at + length]:
            length += 1
        flush()
        offset = at - found
        if length <= 11 and offset < 2048:
            out.extend((1 | (length - 4) << 2 | offset >> 8 << 5, offset & 0xFF))
        elif offset < 65_536 and at % 3:
            out.append(2 | (length - 1) << 2)
            out.extend(offset.to_bytes(2, "little"))
        else:
            out.append(3 | (length - 1) << 2)
            out.extend(offset.to_bytes(4, "little"))
        at += length
    flush()
    return bytes(out)
