"""The report of a conversion: what became of every item, and what the target's code must say."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from ckptconv.document import Value
from ckptconv.errors import Problem
from ckptconv.rawtree import Path

REPORT_VERSION = "1.0.0"


def place(address: Path) -> str:
    """What an array is called in `Entry.target`: a parameter by its name, a slot by `parameter/slot`."""
    if address[0] == "slot":
        return f"{address[3]}/{address[2]}"
    return str(address[-1])


ALLOWABLE: dict[str, str] = {
    "assumed-layout": "take a framework's convention for a layout that two layer kinds would explain",
    "flatten-layout": "keep the rows of a dense layer behind a flatten as they are",
    "form-mismatch": "convert although the update rules differ in a way that no conversion closes",
    "groups-differ": "give all parameters the first group's value, where the target has one for all",
    "hyperparameter-unsupported": "leave out a hyperparameter that the target's class does not have",
    "opaque-globals": "write globals that were not decoded into a new pickle of the same dialect",
    "param-unmatched": "leave parameters without a partner behind, or as the template has them",
    "precision-loss": "round values to the target's narrower dtype",
    "progress-range": "write a step from which the target's float32 counter does not advance",
    "schedule-unsupported": "freeze the learning rate and leave the schedule to the target's code",
    "slots-missing": "start the target's optimizer without state that the source does not have",
    "state-dropped": "leave behind state that the target has no place for",
    "tie-mismatch": "tie or untie parameters that are not so in the source",
    "unequal-steps": "give all parameters the largest of their differing steps",
}
"""Losses that a caller may allow by code, and what that means."""

Fate = Literal[
    "copied",  # bit for bit
    "transformed",  # by the ops listed
    "supplied",  # by the caller or a skeleton
    "created",  # from a catalog row, because the source has none
    "kept-from-template",  # because only the target's framework has it
    "noted",  # in the embedded note
    "aliased",  # with another item
    "left",  # behind, by the target's nature or an allowed code
]

Verdict = Literal["exact", "exact-at-constant-learning-rate", "approximate", "lossy", "refused"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One line of the ledger."""

    item: Path
    """Address in the source document (see `Checkpoint.lookup`), or `("residue", ...)`."""
    fate: Fate
    target: str = ""
    """Name in the target, where it has one."""
    ops: tuple[Mapping[str, object], ...] = ()
    """What was done to it, in order."""
    evidence: str = ""
    """Why it belongs there: how names and axes were matched."""
    detail: str = ""
    """For people."""
    allowed_by: str = ""
    """The code that the caller allowed, where the fate is a loss."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimizerVerdict:
    """How exactly an optimizer's state crossed."""

    optimizer: str
    source: str
    """`algorithm (framework)` of the source."""
    target: str
    verdict: Verdict
    residuals: tuple[str, ...] = ()
    """Each difference of the update rules that remains, with its size on this state."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Producer:
    """One item of the source that makes an array of the target, or a part of it."""

    item: Path
    """Address in the source document, or `("template", key)`."""
    ops: tuple[Mapping[str, object], ...] = ()
    """What is done to it, in order; `add` sums several producers, `concat` joins them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One array of the target, and what makes it."""

    target: Path
    """Address in the target's document."""
    dtype: str
    shape: tuple[int, ...]
    axes: tuple[tuple[str, ...], tuple[str, ...]] | None = None
    """Those of the source's array and of the target's, where both are known."""
    producers: tuple[Producer, ...]
    fate: Fate
    evidence: str = ""
    """Why it belongs there: how its axes are known, and how it was matched."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Every array of the target with what makes it, and what is left over on both sides."""

    rows: tuple[Row, ...]
    left_in_source: tuple[Path, ...]
    """Arrays of the source that make none of the target."""
    left_in_target: tuple[Path, ...]
    """Arrays of the target that none of the source makes: its own, created ones, without partner."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What a conversion did, or would do."""

    source: str
    target: str
    chosen: str = ""
    """How the source was chosen of a folder that holds several; empty where it was named."""
    source_dialect: str = ""
    target_dialect: str = ""
    dry_run: bool = False
    progress: Mapping[str, Value] = field(default_factory=dict)
    """Known progress fields of the target."""
    ledger: tuple[Entry, ...] = ()
    verdicts: tuple[OptimizerVerdict, ...] = ()
    target_requires: tuple[str, ...] = ()
    """Lines that the target's code must say because its file cannot."""
    restore: str = ""
    """Code that restores the result."""
    problems: tuple[Problem, ...] = ()
    """Of a dry run: what would stop the conversion."""
    plan: Plan | None = None
    """Of a dry run: what makes each array of the target."""
    allowed: tuple[str, ...] = ()
    files: tuple[tuple[str, int], ...] = ()
    """(name, bytes) of what was written."""
    bytes_read: int = 0
    bytes_written: int = 0
    seconds: float = 0.0
    verified: bool = False
