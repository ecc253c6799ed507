"""Checks of what a pickle claims: counts and shapes that are no larger than anything can be."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, cast

from ckptconv.errors import Code, FormatError
from ckptconv.rawtree import ListNode, Node, Opaque

INT64: Final = 1 << 63
_MAX_RANK: Final = 64


@dataclass(frozen=True, slots=True)
class Checks:
    """Errors and checked numbers of one pickle; `name` is the file's."""

    name: str
    member: str = "data.pkl"
    """Where in the file the pickle stands."""

    def error(self, code: Code, message: str) -> FormatError:
        """The error for the pickle."""
        error = FormatError.of(
            code,
            f"{message} [{self.name}]",
            "Copy or save the file again; nothing was written.",
            loc=(self.name, self.member),
        )
        assert isinstance(error, FormatError)
        return error

    def count(self, value: Node, what: str) -> int:
        """A number from 0 to 2**63 - 1. Raises: malformed-pickle, limit-exceeded."""
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise self.error("malformed-pickle", f"{what} should be a count, it is {short(value)}")
        if value >= INT64:
            raise self.error("limit-exceeded", f"{what} is {short(value)}, at most {INT64 - 1} is possible")
        return value

    def counts(self, value: Node, what: str) -> tuple[int, ...]:
        """A shape, or strides. Raises: malformed-pickle, limit-exceeded."""
        if type(value) is ListNode and value.kind == "tuple" and len(value.items) <= _MAX_RANK:
            for item in value.items:
                if type(item) is not int or not 0 <= item < INT64:
                    break
            else:
                return cast("tuple[int, ...]", value.items)
        if not isinstance(value, ListNode) or value.kind not in ("tuple", "list", "torch.Size"):
            raise self.error("malformed-pickle", f"{what} should be a tuple, it is {short(value)}")
        if len(value.items) > _MAX_RANK:
            raise self.error(
                "limit-exceeded", f"{what} has {len(value.items)} axes, at most {_MAX_RANK} are possible"
            )
        return tuple([self.count(item, what) for item in value.items])


def short(value: object) -> str:
    """A value for a message, whatever its size."""
    if isinstance(value, Opaque):
        return f"{value.kind} {value.name}"
    if isinstance(value, int) and value.bit_length() > 200:
        return f"a number of {value.bit_length()} bits"
    return repr(value)[:60] if isinstance(value, (str, int, float)) else type(value).__name__
