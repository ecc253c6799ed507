"""What stands in the way of a conversion, and how exact it is all the same."""

from __future__ import annotations

from ckptconv.errors import Code, Loc, Problem
from ckptconv.report import Verdict

_RANK: tuple[Verdict, ...] = ("exact", "exact-at-constant-learning-rate", "approximate", "lossy", "refused")


def worst(one: Verdict, other: Verdict) -> Verdict:
    """The less exact of two verdicts."""
    return max(one, other, key=_RANK.index)


def exactly(residual: str, helper: str) -> str:
    """What remains different, and the call with which nothing does."""
    return f"{residual}; exact with {helper}" if helper else residual


class Findings:
    """Collects problems, what the caller allowed, and how exact the whole still is."""

    def __init__(self, optimizer: str, allow: frozenset[str]) -> None:
        self.loc: Loc = ("optimizers", optimizer)
        self.allow = allow
        self.problems: list[Problem] = []
        self.residuals: list[str] = []
        self.verdict: Verdict = "exact"

    def differ(self, verdict: Verdict, residual: str) -> None:
        """A difference that remains; the worst one names the verdict."""
        self.residuals.append(residual)
        self.verdict = worst(self.verdict, verdict)

    def refuse(self, code: Code, message: str, hint: str, *loc: str | int, helper: str = "") -> None:
        """A difference that only the caller can accept; `helper`: the call that makes up for it."""
        if code in self.allow:
            self.differ("lossy", exactly(f"{message} (allowed: {code})", helper))
            return
        self.stop(code, message, f"{hint} {helper} makes it exact." if helper else hint, *loc)

    def stop(self, code: Code, message: str, hint: str, *loc: str | int) -> None:
        """A difference that nobody can accept."""
        self.verdict = "refused"
        self.problems.append(Problem(code=code, loc=(*self.loc, *loc), message=message, hint=hint))
