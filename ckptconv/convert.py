"""The conversion itself: detect -> read -> lift -> map -> transfer -> lower -> lay out -> write -> verify."""

from __future__ import annotations

import difflib
import fnmatch
import os
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, replace
from pathlib import Path

from ckptconv import engine, mapping, note, supply, verification
from ckptconv.catalog.residuals import epsilon_residual
from ckptconv.detect import (
    PathLike,
    detect_dialect,
    detect_format,
    dialect_named,
    format_named,
    load_registries,
    open,
    parse_target,
    read_raw,
)
from ckptconv.dialects.base import DIALECTS, Dialect
from ckptconv.document import PROGRESS_FIELDS, Checkpoint, Known, Param, Value, value_of
from ckptconv.errors import CkptError, LossError, MappingError, Problem
from ckptconv.formats.base import FORMATS, Format
from ckptconv.ops import Cast
from ckptconv.rawtree import RawTree
from ckptconv.report import ALLOWABLE, Entry, OptimizerVerdict, Report
from ckptconv.transfer import Transfer, progress_entries, transfer

__all__ = ["convert", "detect_dialect", "detect_format", "open", "read_raw", "save", "validate"]

Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Target:
    """Where a conversion goes."""

    path: Path
    format: Format
    dialect: Dialect
    template: Checkpoint | None


def convert(
    source: PathLike | Checkpoint,
    target: PathLike,
    *,
    from_: str | None = None,
    to: str | None = None,
    template: PathLike | Checkpoint | None = None,
    source_spec: PathLike | Checkpoint | None = None,
    set_: Mapping[str, str] | None = None,
    only: Sequence[str] = (),
    exclude: Sequence[str] = (),
    dtype: str | None = None,
    allow: Sequence[str] = (),
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
    written and what would stop the conversion is in `Report.problems`.

    Raises: every code of the conversion, all that were found at once.
    """
    started = time.monotonic()
    allowed = _allowed(allow)
    values = supply.settings(set_ or {})
    from_format, from_dialect = parse_target(from_)
    if isinstance(source, Checkpoint):
        checkpoint, source_name = source, source.provenance.source or "<document>"
    else:
        checkpoint = open(source, format=from_format, dialect=from_dialect)
        source_name = Path(source).name
    if source_spec is not None:
        checkpoint = supply.apply_spec(checkpoint, _document(source_spec))
    checkpoint = supply.set_fields(checkpoint, values)
    goal = _target(Path(target), to, template, checkpoint)
    return _finish(
        checkpoint,
        goal,
        source_name=source_name,
        only=only,
        exclude=exclude,
        dtype=dtype,
        allowed=allowed,
        conventions=supply.conventions(values),
        keep=keep,
        jobs=jobs,
        executor=executor,
        dry_run=dry_run,
        verify=verify,
        force=force,
        progress=progress,
        started=started,
    )


def save(
    checkpoint: Checkpoint,
    target: PathLike,
    *,
    to: str | None = None,
    template: PathLike | Checkpoint | None = None,
    allow: Sequence[str] = (),
    jobs: int | None = None,
    verify: bool = True,
    force: bool = False,
    progress: Progress | None = None,
) -> Report:
    """Write a document, edited or not, in any format; as `convert` otherwise."""
    started = time.monotonic()
    return _finish(
        checkpoint,
        _target(Path(target), to, template, checkpoint),
        source_name=checkpoint.provenance.source or "<document>",
        only=(),
        exclude=(),
        dtype=None,
        allowed=_allowed(allow),
        conventions={},
        keep=False,
        jobs=jobs,
        executor=None,
        dry_run=False,
        verify=verify,
        force=force,
        progress=progress,
        started=started,
    )


def _finish(
    checkpoint: Checkpoint,
    goal: _Target,
    *,
    source_name: str,
    only: Sequence[str],
    exclude: Sequence[str],
    dtype: str | None,
    allowed: frozenset[str],
    conventions: Mapping[str, str],
    keep: bool,
    jobs: int | None,
    executor: Executor | None,
    dry_run: bool,
    verify: bool,
    force: bool,
    progress: Progress | None,
    started: float,
) -> Report:
    plan = plan_transfer(
        checkpoint, goal, only=only, exclude=exclude, dtype=dtype, allowed=allowed, conventions=conventions
    )
    report = Report(
        source=source_name,
        target=goal.path.name,
        source_dialect=f"{checkpoint.provenance.format}:{checkpoint.provenance.dialect}",
        target_dialect=f"{goal.format.name}:{goal.dialect.name}",
        dry_run=dry_run,
        progress={
            name: value
            for name in PROGRESS_FIELDS
            if (value := value_of(getattr(plan.checkpoint.progress, name))) is not None
        },
        ledger=plan.ledger,
        verdicts=plan.verdicts,
        target_requires=plan.target_requires,
        problems=plan.problems,
        allowed=tuple(sorted(allowed)),
    )
    problems = list(plan.problems)
    raw: RawTree | None = None
    if not problems:
        try:
            raw = _lowered(plan.checkpoint, goal, allowed)
            layout = goal.format.layout(raw, goal.path)
        except CkptError as error:
            problems += error.problems
    if dry_run:
        return replace(report, problems=tuple(problems), seconds=time.monotonic() - started)
    if problems or raw is None:
        raise MappingError(*problems)
    verdicts = tuple(_sized(report.verdicts, plan))
    checker = verification.checker(goal.format, raw, layout, jobs) if verify else None
    written = engine.write(
        layout, goal.path, force=force, jobs=jobs, executor=executor, verify=checker, progress=progress
    )
    if keep:
        save(
            checkpoint, goal.path.with_name(goal.path.name + ".neutral"), to="neutral", jobs=jobs, force=force
        )
    return replace(
        report,
        verdicts=verdicts,
        files=tuple(written.files),
        bytes_written=written.bytes_written,
        verified=verify,
        restore=goal.dialect.restore_code(plan.checkpoint, goal.path.name),
        seconds=time.monotonic() - started,
    )


def _allowed(codes: Sequence[str]) -> frozenset[str]:
    for code in codes:
        if code not in ALLOWABLE:
            close = difflib.get_close_matches(code, ALLOWABLE, n=1)
            raise CkptError.of(
                "usage",
                f"'{code}' is not a loss that can be allowed"
                + (f" (did you mean '{close[0]}'?)" if close else ""),
                "Codes: " + ", ".join(ALLOWABLE) + ".",
                loc=("--allow", code),
            )
    return frozenset(codes)


def _document(spec: PathLike | Checkpoint) -> Checkpoint:
    return spec if isinstance(spec, Checkpoint) else open(spec)


def _target(
    path: Path, to: str | None, template: PathLike | Checkpoint | None, source: Checkpoint
) -> _Target:
    """Format and dialect of the target, from `--to`, the template and the suffix, in that order.

    Raises: usage, template-mismatch.
    """
    load_registries()
    format_name, dialect_name = parse_target(to)
    document = None if template is None else _document(template)
    if document is not None:
        theirs = document.provenance
        if format_name not in (None, theirs.format) or dialect_name not in (None, theirs.dialect):
            raise MappingError.of(
                "template-mismatch",
                f"--to {to} asks for another target than the template is ({theirs.format}:{theirs.dialect})",
                "Leave --to out, or use a template of that format.",
                loc=("--template",),
            )
        format_name, dialect_name = theirs.format, theirs.dialect
    if format_name is None:
        format_name = _by_suffix(path)
    chosen = format_named(format_name)
    if dialect_name is not None:
        dialect = dialect_named(format_name, dialect_name)
    else:
        dialect = _default_dialect(format_name, source)
    return _Target(path=path, format=chosen, dialect=dialect, template=document)


def _by_suffix(path: Path) -> str:
    for candidate in FORMATS.values():
        if any(path.name.endswith(suffix) for suffix in candidate.suffixes):
            return candidate.name
    raise CkptError.of(
        "usage",
        f"the name '{path.name}' does not tell the target's format",
        "Pass --to with one of: " + ", ".join(sorted(FORMATS)) + ".",
        loc=("--to",),
    )


def _default_dialect(format_name: str, source: Checkpoint) -> Dialect:
    """The source's own dialect where it lives in the format, else the format's dialect that needs no template."""
    residue = source.residue
    if residue is not None and residue.format == format_name:
        return DIALECTS[format_name, residue.dialect]
    there = [dialect for (fmt, _), dialect in sorted(DIALECTS.items()) if fmt == format_name]
    free = [dialect for dialect in there if not dialect.needs_template]
    if len(there) == 1 or len(free) == 1 and format_name not in ("pytorch", "tensorflow"):
        return (free or there)[0]
    raise MappingError.of(
        "template-required",
        f"a {format_name} target needs a checkpoint of the target's model to take names and structure from",
        "Build model and optimizer in the target's framework, save them once, and pass that file as --template"
        + "".join(f"; or write the weights alone with --to {format_name}:{d.name}" for d in free)
        + ".",
        loc=("--template",),
    )


def plan_transfer(
    checkpoint: Checkpoint,
    goal: _Target,
    *,
    only: Sequence[str],
    exclude: Sequence[str],
    dtype: str | None,
    allowed: frozenset[str],
    conventions: Mapping[str, str],
) -> Transfer:
    """The target's document and the account, before a tensor byte is read."""
    kept, dropped = _selected(checkpoint, only, exclude)
    problems: tuple[Problem, ...] = ()
    if dtype is not None:
        kept, problems = _cast(kept, dtype, allowed)
    if goal.template is None:
        result = _untemplated(kept, goal, allowed)
    elif unready := goal.dialect.template_problems(goal.template):
        return Transfer(checkpoint=kept, ledger=(), problems=unready)
    else:
        frameworks = (_framework(kept), goal.dialect.framework or "torch")
        cover = mapping.match(kept, goal.template, frameworks=frameworks)
        unsolved = tuple(p for p in cover.problems if _code_to_allow(p) not in allowed)
        cover = replace(cover, problems=())
        result = transfer(kept, goal.template, cover, allow=allowed, conventions=conventions)
        result = replace(result, problems=(*unsolved, *result.problems))
        if not result.problems:
            result = replace(result, checkpoint=_with_note(result.checkpoint, kept))
    return replace(result, ledger=(*dropped, *result.ledger), problems=(*problems, *result.problems))


def _code_to_allow(problem: Problem) -> str:
    return mapping.ASSUMED_LAYOUT if problem.code == "layout-ambiguous" else problem.code


def _framework(checkpoint: Checkpoint) -> str:
    """The catalog column that explains the document's names and axes."""
    provenance = checkpoint.provenance
    dialect = DIALECTS.get((provenance.format, provenance.dialect))
    return (dialect.framework if dialect else None) or "torch"


def _with_note(checkpoint: Checkpoint, source: Checkpoint) -> Checkpoint:
    text = note.write_note(replace(checkpoint, schedules=source.schedules))
    return replace(checkpoint, extensions={**checkpoint.extensions, note.EXTENSION: text})


def _untemplated(checkpoint: Checkpoint, goal: _Target, allowed: frozenset[str]) -> Transfer:
    """A target that takes its structure from the document: the way back, an archive, or weights."""
    residue = checkpoint.residue
    own = residue is not None and (residue.format, residue.dialect) == (goal.format.name, goal.dialect.name)
    everything = own or goal.format.name == "neutral"
    ledger = [
        Entry(item=address, fate="copied", target=".".join(map(str, address[1:])))
        for address, _ in checkpoint.tensors()
        if everything or address[0] == "param"
    ]
    problems: list[Problem] = []
    if not everything:
        if goal.dialect.needs_template:
            problems.append(
                Problem(
                    code="template-required",
                    loc=("--template",),
                    message=f"{goal.format.name}:{goal.dialect.name} takes names and structure from a template",
                    hint="Build model and optimizer in the target's framework, save them once, and pass that file.",
                )
            )
        weights_only = goal.format.name == "safetensors"  # its choice is consent to leave the rest behind
        for optimizer in checkpoint.optimizers:
            if not weights_only and "state-dropped" not in allowed:
                problems.append(
                    Problem(
                        code="state-dropped",
                        loc=("optimizers", optimizer.name),
                        message=f"{goal.format.name}:{goal.dialect.name} holds no optimizer state, "
                        f"the source has that of '{optimizer.name}' ({optimizer.algorithm})",
                        hint="Pass a --template with an optimizer, or --allow state-dropped.",
                    )
                )
            for slot in optimizer.slots:
                ledger.append(
                    Entry(
                        item=("slot", optimizer.name, slot),
                        fate="left",
                        detail="the target holds weights only; progress and hyperparameters are in its note",
                        allowed_by="" if weights_only else "state-dropped",
                    )
                )
        ledger += [
            Entry(item=("extra", key), fate="left", detail="the target holds weights only")
            for key in checkpoint.extras
        ]
        ledger += progress_entries(replace(checkpoint, residue=None))
        checkpoint = _with_note(checkpoint, checkpoint)
        checkpoint = replace(checkpoint, residue=None)
    return Transfer(checkpoint=checkpoint, ledger=tuple(ledger), problems=tuple(problems))


def _lowered(checkpoint: Checkpoint, goal: _Target, allowed: frozenset[str]) -> RawTree:
    raw = goal.dialect.lower(checkpoint)
    if "opaque-globals" in allowed:
        raw = replace(raw, attributes={**raw.attributes, "allow_opaque_globals": True})
    return raw


def _selected(
    checkpoint: Checkpoint, only: Sequence[str], exclude: Sequence[str]
) -> tuple[Checkpoint, tuple[Entry, ...]]:
    """The document with the parameters that the globs leave, and their slots."""
    if not only and not exclude:
        return checkpoint, ()

    def wanted(name: str) -> bool:
        inside = not only or any(fnmatch.fnmatchcase(name, glob) for glob in only)
        return inside and not any(fnmatch.fnmatchcase(name, glob) for glob in exclude)

    for glob in (*only, *exclude):
        if not any(fnmatch.fnmatchcase(name, glob) for name in checkpoint.params):
            close = difflib.get_close_matches(glob, list(checkpoint.params), n=1)
            raise MappingError.of(
                "mapping-invalid",
                f"no parameter matches '{glob}'" + (f" (did you mean '{close[0]}'?)" if close else ""),
                "See the names with 'ckptconv inspect --tensors'.",
                loc=("--only" if glob in only else "--exclude", glob),
            )
    names = {name for name in checkpoint.params if wanted(name)}
    params = {
        name: replace(param, tied_to=param.tied_to if param.tied_to in names else None)
        for name, param in checkpoint.params.items()
        if name in names
    }
    optimizers = tuple(
        replace(
            optimizer,
            groups=tuple(
                replace(g, params=tuple(p for p in g.params if p in names)) for g in optimizer.groups
            ),
            slots={s: {n: t for n, t in by.items() if n in names} for s, by in optimizer.slots.items()},
            param_steps={n: s for n, s in optimizer.param_steps.items() if n in names},
        )
        for optimizer in checkpoint.optimizers
    )
    dropped = tuple(
        Entry(item=("param", name), fate="left", detail="not selected", allowed_by="--only/--exclude")
        for name in checkpoint.params
        if name not in names
    )
    return replace(checkpoint, params=params, optimizers=optimizers, residue=None), dropped


def _cast(
    checkpoint: Checkpoint, dtype: str, allowed: frozenset[str]
) -> tuple[Checkpoint, tuple[Problem, ...]]:
    """The document with its floating-point parameters in another dtype: the caller's word is the consent."""
    from ckptconv import dtypes

    row = dtypes.BY_NAME.get(dtype)
    if row is None or row.kind != "float":
        names = [r.name for r in dtypes.ROWS if r.kind == "float"]
        close = difflib.get_close_matches(dtype, names, n=1)
        raise CkptError.of(
            "usage",
            f"'{dtype}' is not a floating-point dtype" + (f" (did you mean '{close[0]}'?)" if close else ""),
            "Dtypes: " + ", ".join(names) + ".",
            loc=("--dtype",),
        )

    def one(param: Param) -> Param:
        if param.tensor.dtype.kind != "float":
            return param
        return replace(param, tensor=param.tensor.apply(Cast(dtype)))

    return replace(checkpoint, params={name: one(param) for name, param in checkpoint.params.items()}), ()


def _sized(verdicts: Sequence[OptimizerVerdict], plan: Transfer) -> list[OptimizerVerdict]:
    """The verdicts with each difference's size on the state that is converted."""
    result = list(verdicts)
    for position, what in plan.residuals:
        verdict = result[position]
        optimizer = next(o for o in plan.checkpoint.optimizers if o.name == verdict.optimizer)
        largest, median = epsilon_residual(
            optimizer.slots[what.slot].values(), what.step, what.beta_2, what.epsilon, what.direction
        )
        text = f"epsilon's place changes the next update by {largest:.1e} at most, {median:.1e} in the median (relative)"
        result[position] = replace(verdict, residuals=(*verdict.residuals, text))
    return result


def validate(path: PathLike, *, require: Sequence[str] = ()) -> list[Problem]:
    """Everything that is wrong with a checkpoint or document: schema, cross-references, digests, the container's own checks.

    `require` names progress fields or hyperparameters that must be known.
    Raises: usage for a field that does not exist; missing-file.
    """
    return verification.validate(path, require=require)


def hyperparameter(checkpoint: Checkpoint, name: str) -> Value:
    """A hyperparameter that all groups share, None where it is unknown or differs."""
    values = {
        value_of(group.hyperparameters.get(name))
        for optimizer in checkpoint.optimizers
        for group in optimizer.groups
    }
    return values.pop() if len(values) == 1 else None
