"""One record of a zip file, and the error that names it."""

from __future__ import annotations

from typing import NamedTuple

from ckptconv.errors import Code, FormatError
from ckptconv.source import ByteSource
from ckptconv.tensor import Checksum


class Record(NamedTuple):
    """One entry of the central directory, checked against its local header."""

    name: str
    method: int
    crc: int
    """CRC-32 of the data; 0 with data means that none was recorded."""
    packed_nbytes: int
    """Bytes in the file."""
    nbytes: int
    """Bytes of the data."""
    offset: int
    """Where the bytes in the file begin."""

    @property
    def checksum(self) -> Checksum | None:
        return Checksum(kind="crc32", value=self.crc) if self.crc and self.nbytes else None


def problem(code: Code, source: ByteSource, member: str, message: str) -> FormatError:
    """The error for a record, or for the archive where `member` is empty."""
    error = FormatError.of(
        code,
        f"{message} [{source.name}]",
        "Copy or save the file again; nothing was written.",
        loc=(source.name, member) if member else (source.name,),
    )
    assert isinstance(error, FormatError)
    return error
