"""CRC-32C: that of a whole from those of its pieces, against the computation over the bytes."""

from __future__ import annotations

import google_crc32c
from hypothesis import given
from hypothesis import strategies as st

from ckptconv.formats.crc import crc32c, crc32c_combine, crc32c_joined, mask, unmask

PIECES = st.lists(st.binary(max_size=300), max_size=8)


@given(st.binary(max_size=300), st.binary(max_size=5000))
def test_two_pieces(first: bytes, second: bytes) -> None:
    expected = google_crc32c.value(first + second)
    assert crc32c_combine(crc32c(first), crc32c(second), len(second)) == expected


@given(PIECES)
def test_any_number_of_pieces(pieces: list[bytes]) -> None:
    joined = crc32c_joined([crc32c(piece) for piece in pieces], [len(piece) for piece in pieces])
    assert joined == google_crc32c.value(b"".join(pieces))


@given(st.integers(0, 2**32 - 1), st.integers(0, 2**50), st.integers(0, 2**50))
def test_lengths_that_no_test_could_compute_add_up(crc: int, first: int, second: int) -> None:
    at_once = crc32c_combine(crc, 0, first + second)
    assert at_once == crc32c_combine(crc32c_combine(crc, 0, first), 0, second)
    assert crc32c_joined([crc, 0, 0], [7, first, second]) == at_once


def test_a_large_piece() -> None:
    zeros = bytes(3_000_001)
    assert crc32c_combine(crc32c(b"head"), crc32c(zeros), len(zeros)) == google_crc32c.value(b"head" + zeros)


@given(st.integers(0, 2**32 - 1))
def test_the_masked_form_is_undone(crc: int) -> None:
    assert unmask(mask(crc)) == crc
