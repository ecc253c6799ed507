"""Pickles and numbers one behind the other: what the PyTorch formats before the zip are made of.

Where a pickle ends is known when its opcodes have been run, so a window of the file is read that grows until
the pickle fits. Tensors lie behind it and are never read here. Numbers are little-endian.
"""

from __future__ import annotations

from ckptconv.errors import CkptError, Code, FormatError
from ckptconv.formats.pickle_reader import Parsed, parse
from ckptconv.rawtree import Node, Opaque
from ckptconv.source import ByteSource
from ckptconv.tensor import Extent

_WINDOW_NBYTES = 1 << 16
_MAX_PICKLE_NBYTES = 1 << 30
"""A pickle describes the tensors, it does not hold them."""


class PickleStream:
    """Reads on from an offset of a source to `end`; `member` names this part of the file in errors."""

    __slots__ = ("at", "end", "member", "source")

    def __init__(self, source: ByteSource, at: int, end: int, member: str) -> None:
        self.source, self.at, self.end, self.member = source, at, end, member

    def error(self, code: Code, message: str) -> FormatError:
        """The error for this part of the file."""
        error = FormatError.of(
            code,
            f"{message} [{self.source.name}]",
            "Copy or save the file again; nothing was written.",
            loc=(self.source.name, self.member),
        )
        assert isinstance(error, FormatError)
        return error

    def take(self, nbytes: int, what: str) -> bytes:
        """The next bytes. Raises: truncated-file."""
        self.need(nbytes, what)
        data = bytearray(nbytes)
        self.source.read_into(self.at, memoryview(data))
        self.at += nbytes
        return bytes(data)

    def need(self, nbytes: int, what: str) -> None:
        """Raises: truncated-file where fewer bytes than these follow."""
        if nbytes > self.end - self.at:
            raise self.error(
                "truncated-file", f"{what} needs bytes {self.at}..{self.at + nbytes}, it ends at {self.end}"
            )

    def count(self, nbytes: int, what: str) -> int:
        """The next number, which is no negative one. Raises: truncated-file, corrupt-file."""
        value = int.from_bytes(self.take(nbytes, what), "little", signed=True)
        if value < 0:
            raise self.error("corrupt-file", f"{what} is {value}")
        return value

    def extent(self, nbytes: int, what: str) -> Extent:
        """Where the next bytes lie; reads nothing. Raises: truncated-tensor."""
        if nbytes > self.end - self.at:
            raise self.error(
                "truncated-tensor",
                f"{what} needs bytes {self.at}..{self.at + nbytes}, the file ends at {self.end}",
            )
        extent = Extent(source=self.source, offset=self.at, nbytes=nbytes)
        self.at += nbytes
        return extent

    def parsed(self, what: str) -> Parsed:
        """The next pickle with its opcodes run. Raises: see `pickle_reader.parse`."""
        left = self.end - self.at
        window = min(_WINDOW_NBYTES, left)
        while True:
            data = bytearray(window)
            self.source.read_into(self.at, memoryview(data))
            try:
                found = parse(bytes(data), name=f"{self.source.name}!{what}")
            except CkptError as error:
                if window == left or error.problems[0].code != "truncated-file":
                    raise
            else:
                self.at += found.end
                return found
            if window >= _MAX_PICKLE_NBYTES:
                raise self.error(
                    "limit-exceeded", f"the pickle of {what} has more than {_MAX_PICKLE_NBYTES} bytes"
                )
            window = min(4 * window, left)

    def plain(self, what: str) -> Node:
        """The next pickle, which holds plain values and globals. Raises: see `pickle_reader.parse`."""
        return self.parsed(what).root(_inert)


def _inert(node: Opaque) -> Node:
    return node
