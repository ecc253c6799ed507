"""The conversion itself: detect -> read -> lift -> map -> transfer -> lower -> lay out -> write -> verify."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, replace

from ckptconv import engine, supply, verification
from ckptconv.account import Transfer
from ckptconv.catalog.residuals import measure
from ckptconv.detect import (
    PathLike,
    choose,
    detect_dialect,
    detect_format,
    open,
    open_chosen,
    parse_target,
    read_raw,
)
from ckptconv.document import PROGRESS_FIELDS, Checkpoint, Value, value_of
from ckptconv.errors import CkptError, MappingError, Problem
from ckptconv.formats.base import Layout
from ckptconv.goal import Goal, document_of, goal_of
from ckptconv.mapping_file import MappingLike, mapping_of
from ckptconv.plan import Wishes, allowed_codes, plan, shard_nbytes
from ckptconv.plan_table import table
from ckptconv.rawtree import RawTree
from ckptconv.remote import place
from ckptconv.report import OptimizerVerdict, Plan, Report
from ckptconv.selection import selected
from ckptconv.spec import apply_spec
from ckptconv.upload import destination
from ckptconv.workers import Workers

__all__ = ["convert", "detect_dialect", "detect_format", "open", "read_raw", "save", "validate"]

Progress = Callable[[int, int], None]
"""Gets bytes done and bytes in all."""

KEPT_SUFFIX = ".neutral"
"""Of the directory beside the target that `keep` writes."""


def convert(
    source: PathLike | Checkpoint,
    target: PathLike,
    *,
    from_: str | None = None,
    to: str | None = None,
    template: PathLike | Checkpoint | None = None,
    source_spec: PathLike | Checkpoint | None = None,
    template_spec: PathLike | Checkpoint | None = None,
    mapping: MappingLike | None = None,
    set_: Mapping[str, str] | None = None,
    only: Sequence[str] = (),
    exclude: Sequence[str] = (),
    dtype: str | None = None,
    allow: Sequence[str] = (),
    shard_size: int | str | None = None,
    select: Sequence[str] = (),
    keep: bool = False,
    jobs: int | None = None,
    executor: Executor | None = None,
    dry_run: bool = False,
    verify: bool = True,
    force: bool = False,
    progress: Progress | None = None,
) -> Report:
    """Convert the checkpoint at `source` into `target`, and account for every item.

    The target appears whole and verified, or not at all; the source is only read. With `dry_run` nothing is
    written and what would stop the conversion is in `Report.problems`. `shard_size` (bytes, `500MB`, `2GiB`)
    is the most that one file of a target with shards holds; a tensor that is larger has a file of its own.
    `source_spec` and `template_spec` are skeletons that supply what source and template do not record.
    `mapping` says which names and axes of source and template belong together (`mapping_file`).
    `select` names one of several checkpoints in a folder, and parts of one (`ema`, `optimizer:0`).

    Raises: every code of the conversion, all that were found at once.
    """
    started = time.monotonic()
    wishes = Wishes(
        only=tuple(only),
        exclude=tuple(exclude),
        dtype=dtype,
        allowed=allowed_codes(allow),
        mapping=None if mapping is None else mapping_of(mapping),
    )
    values = supply.settings(set_ or {})
    from_format, from_dialect = parse_target(from_)
    if isinstance(source, Checkpoint):
        checkpoint, source_name = selected(source, select), source.provenance.source or "<document>"
        chosen = ""
    else:
        choice = choose(source, select)
        checkpoint = open_chosen(choice, format=from_format, dialect=from_dialect)
        source_name, chosen = choice.path.name, choice.why
    if source_spec is not None:
        checkpoint = apply_spec(checkpoint, document_of(source_spec))
    checkpoint = supply.set_fields(checkpoint, values)
    goal = goal_of(place(target), to, template, checkpoint, template_spec)
    wishes = replace(
        wishes,
        conventions=supply.conventions(values),
        shard_nbytes=shard_nbytes(shard_size, goal.format),
    )
    planned = _planned(checkpoint, goal, wishes, source_name)
    planned = replace(planned, report=replace(planned.report, chosen=chosen))
    if dry_run:
        rows = _table(planned, checkpoint, goal)
        return replace(planned.report, dry_run=True, plan=rows, seconds=time.monotonic() - started)
    writing = _Writing(jobs=jobs, executor=executor, verify=verify, force=force, progress=progress)
    report = _written(planned, goal, writing)
    if keep:
        aside = goal.path.with_name(goal.path.name + KEPT_SUFFIX)
        save(checkpoint, aside, to="neutral", shard_size=shard_size, jobs=jobs, verify=verify, force=force)
    return replace(report, seconds=time.monotonic() - started)


def save(
    checkpoint: Checkpoint,
    target: PathLike,
    *,
    to: str | None = None,
    template: PathLike | Checkpoint | None = None,
    allow: Sequence[str] = (),
    shard_size: int | str | None = None,
    jobs: int | None = None,
    verify: bool = True,
    force: bool = False,
    progress: Progress | None = None,
) -> Report:
    """Write a document, edited or not, in any format; as `convert` otherwise."""
    started = time.monotonic()
    goal = goal_of(place(target), to, template, checkpoint)
    name = checkpoint.provenance.source or "<document>"
    wishes = Wishes(allowed=allowed_codes(allow), shard_nbytes=shard_nbytes(shard_size, goal.format))
    planned = _planned(checkpoint, goal, wishes, name)
    writing = _Writing(jobs=jobs, verify=verify, force=force, progress=progress)
    report = _written(planned, goal, writing)
    return replace(report, seconds=time.monotonic() - started)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Writing:
    """How the target is written."""

    jobs: int | None = None
    executor: Executor | None = None
    verify: bool = True
    force: bool = False
    progress: Progress | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Plan:
    """All that is known before a tensor byte is read."""

    report: Report
    """Of what would be done; its `problems` stop it."""
    transfer: Transfer
    laid_out: tuple[RawTree, Layout] | None
    """None where there are problems."""


def _planned(checkpoint: Checkpoint, goal: Goal, wishes: Wishes, source_name: str) -> _Plan:
    result = plan(checkpoint, goal, wishes)
    problems = list(result.problems)
    laid_out: tuple[RawTree, Layout] | None = None
    if not problems:
        try:
            raw = goal.dialect.lower(result.checkpoint)
            if "opaque-globals" in wishes.allowed and raw.format in (
                "pytorch",
                "dcp",
            ):  # nothing else holds any
                raw = replace(raw, attributes={**raw.attributes, "allow_opaque_globals": True})
            if wishes.shard_nbytes is not None:
                raw = replace(raw, attributes={**raw.attributes, "shard_nbytes": wishes.shard_nbytes})
            laid_out = raw, goal.format.layout(raw, goal.path)
        except CkptError as error:
            problems += error.problems
    counters = ((name, value_of(getattr(result.checkpoint.progress, name))) for name in PROGRESS_FIELDS)
    report = Report(
        source=source_name,
        target=goal.path.name,
        source_dialect=f"{checkpoint.provenance.format}:{checkpoint.provenance.dialect}",
        target_dialect=f"{goal.format.name}:{goal.dialect.name}",
        progress={name: value for name, value in counters if value is not None},
        ledger=result.ledger,
        verdicts=result.verdicts,
        target_requires=result.target_requires,
        problems=tuple(problems),
        allowed=tuple(sorted(wishes.allowed)),
    )
    return _Plan(report=report, transfer=result, laid_out=laid_out)


def _table(planned: _Plan, source: Checkpoint, goal: Goal) -> Plan:
    """What makes each array of the target; of a transfer that is stopped, as far as it is known."""
    stopped = bool(planned.transfer.problems)
    target = goal.template if stopped and goal.template is not None else planned.transfer.checkpoint
    return table(planned.report.ledger, source, target, stopped=stopped)


def _written(planned: _Plan, goal: Goal, writing: _Writing) -> Report:
    """The report after the target stands, whole and verified.

    Raises: every problem of the plan, and what goes wrong while writing.
    """
    report = planned.report
    if planned.laid_out is None:
        raise MappingError(*report.problems)
    raw, layout = planned.laid_out
    verdicts = tuple(_sized(report.verdicts, planned.transfer))
    workers = Workers(jobs=writing.jobs, executor=writing.executor)
    checker = verification.checker(goal.format, raw, layout, workers) if writing.verify else None
    with destination(goal.path, layout, force=writing.force, progress=writing.progress) as local:
        written = engine.write(
            layout,
            local,
            force=writing.force,
            jobs=writing.jobs,
            executor=writing.executor,
            verify=checker,
            progress=writing.progress,
        )
    return replace(
        report,
        verdicts=verdicts,
        files=tuple(written.files),
        bytes_written=written.bytes_written,
        verified=writing.verify,
        restore=goal.dialect.restore_code(planned.transfer.checkpoint, str(goal.path)),
    )


def _sized(verdicts: Sequence[OptimizerVerdict], planned: Transfer) -> list[OptimizerVerdict]:
    """The verdicts with each difference's size on the state that is converted."""
    result = list(verdicts)
    for position, what in planned.residuals:
        verdict = result[position]
        optimizer = next(o for o in planned.checkpoint.optimizers if o.name == verdict.optimizer)
        largest, median = measure(optimizer.slots, what)
        text = (
            f"{what.formula.partition(':')[0]}: changes the next update by {largest:.1e} of itself at most, "
            f"{median:.1e} in the median"
        )
        result[position] = replace(verdict, residuals=(*verdict.residuals, text))
    return result


def validate(path: PathLike, *, require: Sequence[str] = (), select: Sequence[str] = ()) -> list[Problem]:
    """Everything that is wrong with a checkpoint or document: schema, references, digests, checksums.

    `require` names progress fields or hyperparameters that must be known.
    Raises: usage for a field that does not exist; missing-file.
    """
    return verification.validate(path, require=require, select=select)


def hyperparameter(checkpoint: Checkpoint, name: str) -> Value:
    """A hyperparameter that all groups share, None where it is unknown or differs."""
    values = {
        value_of(group.hyperparameters.get(name))
        for optimizer in checkpoint.optimizers
        for group in optimizer.groups
    }
    return values.pop() if len(values) == 1 else None
