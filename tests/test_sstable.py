"""Tables: what is written reads back, and what is not a table says why."""

from __future__ import annotations

import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ckptconv.errors import CkptError
from ckptconv.formats import crc, snappy, sstable
from ckptconv.formats.varint import read_varint, write_varint
from ckptconv.tensor import BufferSource
from tests.support.tables import assembled, block, entries_of, table_of
from tests.support.tables import snappy as compress


def code_of(table: bytes) -> str:
    with pytest.raises(CkptError) as caught:
        sstable.read_table(BufferSource(table, "a.index"))
    assert caught.value.problems[0].loc[0] == "a.index"
    return caught.value.problems[0].code


@settings(max_examples=60, deadline=None)
@given(st.dictionaries(st.binary(max_size=40), st.binary(max_size=300), max_size=80))
def test_entries_survive(entries: dict[bytes, bytes]) -> None:
    rows = sorted(entries.items())
    assert entries_of(table_of(rows)) == rows


def test_many_blocks_and_keys_longer_than_a_byte() -> None:
    rows = sorted((b"k" * (i % 300) + b"%07d" % i, b"v" * (i % 400)) for i in range(6000))
    table = table_of(rows)
    assert len(table) > 3 * 262_144
    assert entries_of(table) == rows


def test_a_giant_entry_has_a_block_of_its_own() -> None:
    rows = [(b"a", b"1"), (b"b", b"x" * 600_000), (b"c", b"2")]
    assert entries_of(table_of(rows)) == rows


@pytest.mark.parametrize(
    ("last", "following", "separator"),
    [
        (b"abc", b"abd", b"abc"),
        (b"abc", b"abe", b"abd"),
        (b"abc", b"b", b"abc"),
        (b"abc", b"c", b"b"),
        (b"ab", b"abc", b"ab"),
        (b"a\xff", b"b", b"a\xff"),
    ],
)
def test_separators_are_short_and_between(last: bytes, following: bytes, separator: bytes) -> None:
    assert sstable._separator(last, following) == separator
    assert last <= separator < following


def test_successor_is_short() -> None:
    assert sstable._successor(b"\xff\xffab") == b"\xff\xffb"
    assert sstable._successor(b"\xff\xff") == b"\xff\xff"


def test_snappy_blocks_are_read() -> None:
    rows = [(b"%04d" % i, b"abcdefgh" * (i % 7) + b"%d" % i) for i in range(500)]
    table = assembled(
        [block(rows[:300]), block(rows[300:])], [(b"0299", b"0"), (b"0499", b"1")], compress=True
    )
    assert entries_of(table) == rows


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from([b"a", b"bcd", b"\0" * 70, bytes(range(256))]), max_size=40).map(b"".join))
def test_snappy_round_trip(data: bytes) -> None:
    assert snappy.decode(compress(data), ()) == data


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (b"", "corrupt-file"),
        (write_varint(1 << 40), "limit-exceeded"),
        (b"\x05\x00a", "corrupt-file"),  # ends early
        (b"\x01\x04ab", "corrupt-file"),  # a literal beyond the stated length
        (b"\x05\x00a\x01\x00", "corrupt-file"),  # a copy with offset 0
        (b"\x05\x00a\x01\x02", "corrupt-file"),  # a copy from before the beginning
        (b"\x08\xf0\xff", "corrupt-file"),  # a literal that is not there
        (b"\x08\xfc\xff\xff\xff\xff", "corrupt-file"),
        (b"\x05\x00a\x02\x01", "corrupt-file"),  # half an offset
    ],
)
def test_bad_snappy(data: bytes, code: str) -> None:
    with pytest.raises(CkptError) as caught:
        snappy.decode(data, ("x",))
    assert [(p.code, p.loc) for p in caught.value.problems] == [(code, ("x",))]


def test_varints() -> None:
    for value in (0, 1, 127, 128, 300, 2**32, 2**64 - 1):
        assert read_varint(write_varint(value), 0, ()) == (value, len(write_varint(value)))
    for bad in (b"", b"\x80", b"\xff" * 10, b"\xff" * 9 + b"\x02"):
        with pytest.raises(CkptError):
            read_varint(bad, 0, ())


def test_crc_takes_every_buffer() -> None:
    data = b"123456789"
    buffers = (
        data,
        bytearray(data),
        memoryview(data),
        memoryview(bytearray(data)),
        np.frombuffer(data, np.uint8),
    )
    assert {crc.crc32c(buffer) for buffer in buffers} == {0xE3069283}
    assert crc.crc32c(b"") == crc.crc32c(memoryview(b"")) == 0
    assert crc.mask(0) == 0xA282EAD8
    assert crc.unmask(crc.mask(0xE3069283)) == 0xE3069283
    assert crc.extend(crc.crc32c(data[:4]), data[4:]) == crc.crc32c(data)


def test_not_a_table() -> None:
    assert code_of(b"") == "truncated-file"
    assert code_of(b"x" * 100) == "corrupt-file"


def test_keys_must_increase() -> None:
    twice = [(b"a", b"1"), (b"a", b"2")]
    assert code_of(assembled([block(twice)], [(b"a", b"0")])) == "duplicate-key"
    assert code_of(assembled([block([(b"b", b""), (b"a", b"")])], [(b"b", b"0")])) == "corrupt-file"


def test_the_index_must_bound_its_blocks() -> None:
    blocks = [block([(b"b", b"")]), block([(b"d", b"")])]
    assert len(entries_of(assembled(blocks, [(b"c", b"0"), (b"d", b"1")]))) == 2
    assert code_of(assembled(blocks, [(b"a", b"0"), (b"d", b"1")])) == "corrupt-file"
    assert code_of(assembled(blocks, [(b"d", b"0"), (b"e", b"1")])) == "corrupt-file"


def test_a_block_cannot_stand_for_several() -> None:
    """Many handles of one block would multiply the file."""
    data = block([(b"b", b"")])
    handle = write_varint(0) + write_varint(len(data))
    assert code_of(assembled([data], [(b"b", b"0"), (b"c", handle)])) == "corrupt-file"


def test_handles_must_lie_in_the_file() -> None:
    data = block([(b"b", b"")])
    far = write_varint(1 << 60) + write_varint(10)
    assert code_of(assembled([data], [(b"b", far)])) == "truncated-file"
    assert code_of(assembled([data], [(b"b", write_varint(0) + write_varint(1 << 62))])) == "truncated-file"
    assert code_of(assembled([data], [(b"b", b"\xff" * 11)])) == "corrupt-file"


def test_shared_prefixes_cannot_multiply() -> None:
    """A long key that a thousand entries share would be a thousand times as long in memory."""
    long = b"k" * 20_000
    out = bytearray(write_varint(0) + write_varint(len(long)) + b"\0" + long)
    for i in range(20_000):
        out += write_varint(20_000) + b"\x03\0" + i.to_bytes(3, "big")
    table = assembled([bytes(out) + struct.pack("<2I", 0, 1)], [(b"l", b"0")])
    assert code_of(table) == "limit-exceeded"


@pytest.mark.parametrize(
    "bad",
    [
        b"",
        b"\x01\0\0\0",  # restarts that are not there
        b"\0\0\0\0",  # none
        struct.pack("<2I", 0, 0xFFFFFFFF),
        b"\0\x01\0b" + struct.pack("<2I", 1, 1),  # the first restart is not the first entry
        b"\0\x01\0b" + struct.pack("<3I", 0, 3, 2),  # a restart at no entry
        b"\x01\x01\0b" + struct.pack("<2I", 0, 1),  # a restart that shares
        b"\0\x05\0b" + struct.pack("<2I", 0, 1),  # a key longer than the block
        b"\0\x01\x05b" + struct.pack("<2I", 0, 1),  # a value longer than the block
        b"\xff" * 12 + struct.pack("<2I", 0, 1),
        b"\0\x01" + struct.pack("<2I", 0, 1),
        struct.pack("<2I", 0, 1),  # a data block without an entry
    ],
)
def test_bad_blocks(bad: bytes) -> None:
    assert code_of(assembled([bad], [(b"z", b"0")])) == "corrupt-file"


def test_what_is_not_read() -> None:
    meta = block([(b"filter.x", b"")])
    assert code_of(assembled([block([(b"b", b"")])], [(b"b", b"0")], metaindex=meta)) == "unsupported-feature"
    table = bytearray(table_of([(b"b", b"")]))
    size = 4 + 8
    table[size] = 7
    table[size + 1 : size + 5] = struct.pack("<I", crc.mask(crc.crc32c(table[: size + 1])))
    assert code_of(bytes(table)) == "unsupported-feature"


def test_a_flipped_byte_is_a_checksum_mismatch() -> None:
    table = bytearray(table_of([(b"b", b"value")]))
    table[4] ^= 1
    assert code_of(bytes(table)) == "checksum-mismatch"
