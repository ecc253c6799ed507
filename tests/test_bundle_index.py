"""The entries of an index: what begins like one before is read as if nothing had come before it."""

from __future__ import annotations

import math

import pytest
from google.protobuf.message import DecodeError
from hypothesis import given, settings
from hypothesis import strategies as st

from ckptconv import dtypes
from ckptconv.errors import CkptError
from ckptconv.formats.bundle_index import Entry, _Entries, read_index, write_index
from ckptconv.formats.sstable import read_table
from ckptconv.tensor import BufferSource

FLOAT32, STRING = dtypes.BY_NAME["float32"], dtypes.BY_NAME["string"]
SHARDS = 300


def entry(shape: tuple[int, ...], shard: int = 0, offset: int = 0) -> Entry:
    return Entry(FLOAT32, shape, shard, offset, 4 * math.prod(shape), 0x12345678)


ENTRIES = {
    b"a": entry((6, 4)),
    b"b": entry((6, 4), SHARDS - 1, 1 << 40),
    b"c": entry(()),
    b"d": entry((), 1, 7),
    b"e": entry((0, 3)),
    b"f": entry((0, 3), 2),
    b"g": entry((1 << 20, 2), 2, 1 << 61),
    b"h": Entry(STRING, (2,), 0, 9, 30, 5),
    b"i": Entry(STRING, (2,), 0, 9, 2, 5),
    b"j": Entry(FLOAT32, (6, 4), slices=(((0, 3), (0, -1)), ((3, 3), (0, -1)))),
    b"k": entry((3,) * 32),
}


def values(entries: dict[bytes, Entry]) -> list[tuple[bytes, bytes]]:
    data = b"".join(write_index(SHARDS, entries.items()))
    return read_table(BufferSource(data))[1:]


def outcome(reading: _Entries, value: bytes, key: bytes) -> object:
    try:
        return reading.entry(value, key)
    except CkptError as error:
        return [(problem.code, problem.loc) for problem in error.problems]
    except DecodeError:
        return DecodeError


def test_what_was_written_is_read() -> None:
    data = b"".join(write_index(SHARDS, ENTRIES.items()))
    assert read_index(BufferSource(data)).entries == ENTRIES


VALUES = values(ENTRIES)
INSERTED = [
    b"\x08\x01",
    b"\x12\x00",
    b"\x18\x01",
    b"\x20\x80\x01",
    b"\x28\x60",
    b"\x35\0\0\0\0",
    b"\x3a\x00",
    b"\x40\x01",
]


@st.composite
def damaged(draw: st.DrawFn) -> tuple[bytes, bytes]:
    key, value = draw(st.sampled_from(VALUES))
    data = bytearray(value)
    for _ in range(draw(st.integers(0, 2))):
        at = draw(st.integers(0, len(data)))
        end = at + draw(st.sampled_from((0, 1, 2)))
        data[at:end] = draw(st.one_of(st.binary(max_size=2), st.sampled_from(INSERTED)))
    return key, bytes(data)


@settings(max_examples=500, deadline=None)
@given(st.lists(damaged(), min_size=1, max_size=4))
def test_entries_read_alike_after_others(entries: list[tuple[bytes, bytes]]) -> None:
    experienced = _Entries(SHARDS)
    for key, value in VALUES:
        experienced.entry(value, key)
    for key, value in entries:
        assert outcome(experienced, value, key) == outcome(_Entries(SHARDS), value, key)


@pytest.mark.parametrize(("key", "value"), VALUES)
def test_every_byte_changed_reads_alike(key: bytes, value: bytes) -> None:
    experienced = _Entries(SHARDS)
    for other, there in VALUES:
        experienced.entry(there, other)
    for at in range(len(value)):
        for byte in (value[at] ^ 1, value[at] ^ 0x80, 0x08, 0x12, 0x35, 0xFF):
            changed = value[:at] + bytes((byte,)) + value[at + 1 :]
            assert outcome(experienced, changed, key) == outcome(_Entries(SHARDS), changed, key)
