"""What can go wrong, as data: a `Problem` has a code that programs read and a message that people read.

The codes are public API. Tests and callers compare `code` and `loc`, never the message. Every failure
of the library is a `CkptError` carrying all the problems that were found, not only the first.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

Code = Literal[
    # bytes
    "unknown-format",  # no registered format recognises the file
    "missing-file",  # a file that is needed is not there
    "truncated-file",  # the container ends before its own records do
    "truncated-tensor",  # a tensor's bytes reach past the end of the file
    "corrupt-file",  # the container contradicts itself
    "checksum-mismatch",  # recorded and computed checksum differ
    "malformed-pickle",  # the opcode machine cannot go on
    "unsupported-feature",  # a legal construct that is not read or written
    "unknown-dtype",  # a dtype that no row of the table has
    "duplicate-key",  # the same key twice in one container
    "unsafe-path",  # a name that leaves the checkpoint's directory
    "limit-exceeded",  # a length, count or depth beyond what the file can hold
    "checkpoint-ambiguous",  # a folder with several checkpoints, and nothing tells which is meant
    "source-changed",  # the source was modified while it was read
    # meaning
    "unknown-dialect",  # the container is readable, its convention is not known
    "progress-unknown",  # the target has a counter to fill and the source does not tell it
    "progress-conflict",  # two places of the source disagree
    "progress-range",  # a counter does not fit the place it is written to
    "optimizer-unknown",  # the state keys fit no catalog entry, or more than one
    "optimizer-mismatch",  # source and target optimizers are different algorithms
    "form-mismatch",  # update rules differ in a way that no conversion closes
    "hyperparameter-missing",  # the target needs a value that the source does not record
    "hyperparameter-unsupported",  # the target's class has no such hyperparameter
    "groups-differ",  # parameter groups with different settings, for a target that has one
    "unequal-steps",  # parameters with different steps, for a target that counts one
    "slots-missing",  # a step without the slots it belongs to
    "slots-mismatch",  # a slot does not have its parameter's shape
    "order-ambiguous",  # optimizer state that cannot be matched to parameter names
    "schedule-unsupported",  # a schedule that cannot cross to the other framework
    "param-unmatched",  # a parameter without a partner on the other side
    "shape-mismatch",  # partners whose shapes no operation reconciles
    "layout-ambiguous",  # two layouts fit and nothing declares which
    "flatten-layout",  # a dense layer behind a flatten whose rows depend on the image layout
    "tie-mismatch",  # tied on one side only, and the values differ
    "precision-loss",  # a value does not fit the target's dtype
    "template-required",  # a target that cannot be written without a template
    "template-unbuilt",  # the template has no variables yet
    "template-mismatch",  # the template is of another format or dialect
    "mapping-invalid",  # a mapping file that names what is not there
    "state-dropped",  # the target has no place for this state
    "residue-stale",  # an edited value has a second place that cannot be rewritten
    "opaque-globals",  # undecoded globals would be written into a new pickle
    # documents
    "schema-invalid",  # not valid against the JSON Schema
    "schema-version",  # an unknown schema version
    "reference-broken",  # a name in the document that is not there
    "digest-mismatch",  # recorded and computed digest differ
    "requirement-missing",  # a field asked for with --require is not known
    # the machine
    "target-exists",  # the target is there already, and replacing it was not asked for
    "target-busy",  # another run is writing the same target
    "worker-lost",  # a worker of the executor did not do its work
    "target-unwritable",  # no directory or no permission to write to
    "no-space",  # the disk is full, or a quota is
    "verify-failed",  # what was written does not read back equal
    "missing-dependency",  # an optional package is needed
    "usage",  # an argument that makes no sense
]
CODES: frozenset[str] = frozenset(get_args(Code))

Loc = tuple[str | int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """One thing that is wrong, where, and what to do next."""

    code: Code
    """Stable name of the kind of problem."""
    loc: Loc
    """Path of the item: keys of the file or fields of the document, outermost first."""
    message: str
    """What happened: expected X, got Y, with names and both numbers."""
    hint: str
    """The next step for the reader."""

    def __str__(self) -> str:
        where = ".".join(str(part) for part in self.loc)
        at = f" at {where}" if where else ""
        return f"{self.code}: {self.message}{at}. {self.hint}"


class CkptError(Exception):
    """Base of every failure of the library; `problems` holds all that were found."""

    problems: tuple[Problem, ...]

    def __init__(self, *problems: Problem) -> None:
        self.problems = problems
        super().__init__("\n".join(str(problem) for problem in problems))

    @classmethod
    def of(cls, code: Code, message: str, hint: str, *, loc: Loc = ()) -> CkptError:
        """The error with one problem."""
        return cls(Problem(code=code, loc=loc, message=message, hint=hint))


class FormatError(CkptError):
    """The bytes of a container are not what the container says."""


class UnsafeContentError(CkptError):
    """Content that would act on the machine of whoever loads it."""


class SchemaError(CkptError):
    """A document that is not valid."""


class MappingError(CkptError):
    """Source and target cannot be brought together without guessing."""


class LossError(CkptError):
    """Something would be lost that the caller did not allow by name."""


class TargetError(CkptError):
    """The target cannot be written."""


class MissingDependencyError(CkptError, ImportError):
    """An optional package is needed for this."""


def missing_extra(package: str, extra: str, purpose: str) -> MissingDependencyError:
    """The error for an optional package that is not installed."""
    return MissingDependencyError(
        Problem(
            code="missing-dependency",
            loc=(package,),
            message=f"{purpose} needs the package '{package}', which is not installed",
            hint=f"Run: pip install 'ckptconv[{extra}]'.",
        )
    )
