"""What a transfer collects on its way: the ledger, the problems, the verdicts."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from ckptconv.catalog.findings import worst
from ckptconv.catalog.residuals import Residual
from ckptconv.document import (
    Checkpoint,
)
from ckptconv.errors import Loc, Problem
from ckptconv.ops import Cast
from ckptconv.pieces import MASTER as MASTER
from ckptconv.rawtree import Path
from ckptconv.report import Entry, OptimizerVerdict, Verdict
from ckptconv.tensor import Op, TensorRef, TensorSpec

Addresses = frozenset[Path]
"""The places that a file has, by `Checkpoint.lookup` address."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Transfer:
    """The target's document, and the account of how it came about."""

    checkpoint: Checkpoint
    ledger: tuple[Entry, ...]
    verdicts: tuple[OptimizerVerdict, ...] = ()
    target_requires: tuple[str, ...] = ()
    residuals: tuple[tuple[int, Residual], ...] = ()
    """(position in `verdicts`, what to compute on the state) where a difference has a size."""
    problems: tuple[Problem, ...] = ()


@dataclass(slots=True)
class Account:
    """What is collected on the way."""

    allow: frozenset[str]
    ledger: list[Entry] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    verdicts: list[OptimizerVerdict] = field(default_factory=list)
    requires: list[str] = field(default_factory=list)
    residuals: list[tuple[int, Residual]] = field(default_factory=list)
    merged: frozenset[str] = frozenset()
    """Parameters of the source in whose place another one stands."""

    def differ(self, verdict: Verdict, residual: str) -> None:
        """A difference beside the rule, which belongs to the optimizer that was judged last."""
        if self.verdicts:
            one = self.verdicts[-1]
            residuals = (*one.residuals, residual)
            self.verdicts[-1] = replace(one, verdict=worst(one.verdict, verdict), residuals=residuals)

    def refuse(self, problem: Problem) -> bool:
        """Note a loss; True where the caller allowed it by its code."""
        if problem.code in self.allow:
            return True
        self.problems.append(problem)
        return False


def through(
    tensor: TensorRef, ops: tuple[Op, ...], spec: TensorSpec, loc: Loc, account: Account
) -> tuple[TensorRef, tuple[Op, ...]]:
    """The tensor after its ops, in the target's dtype."""
    done = list(ops)
    for op in ops:
        tensor = tensor.apply(op)
    if tensor.dtype != spec.dtype:
        cast = Cast(spec.dtype.name)
        if not cast.is_exact(tensor.dtype):
            account.refuse(
                Problem(
                    code="precision-loss",
                    loc=loc,
                    message=f"'{'/'.join(map(str, loc[1:]))}' is {tensor.dtype.name} in the source "
                    f"and {spec.dtype.name} in the target",
                    hint="Use a template of the source's precision, or --allow precision-loss.",
                )
            )
        tensor = tensor.apply(cast)
        done.append(cast)
    return tensor, tuple(done)
