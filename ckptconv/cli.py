"""The command line: arguments in, one library call, text or JSON out.

Exit codes: 0 done, 1 problems found, 2 usage, 130 interrupted. What was asked for goes to stdout, problems
and progress to stderr; with `--json` problems are JSON on stdout too: `{"problems": [...]}`.
"""

from __future__ import annotations

import gc
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from ckptconv.console import (
    DONE,
    PROBLEMS,
    USAGE,
    end_cleanly_on_signals,
    outcome,
    prepare_streams,
    print_json,
    progress_bar,
    show,
    show_problems,
    stop,
    write,
)
from ckptconv.errors import CkptError, TargetError
from ckptconv.options import (
    Absolute,
    Allow,
    AsJson,
    Digest,
    Directions,
    DryRun,
    DType,
    Exclude,
    First,
    Force,
    From,
    Jobs,
    Keep,
    NoVerify,
    Only,
    Raw,
    Readable,
    Relative,
    ReportFile,
    Require,
    Second,
    Select,
    Set,
    ShardSize,
    Source,
    SourceSpec,
    Target,
    Template,
    TemplateSpec,
    Tensors,
    To,
    Verbose,
    Version,
    parse_container,
    parse_settings,
    split_names,
)
from ckptconv.report_file import check_report_file

if TYPE_CHECKING:
    from ckptconv.report import Report

app = typer.Typer(
    name="ckptconv",
    help="Moves a training run between frameworks: weights, optimizer state and progress.\n\n"
    "Start with: ckptconv inspect PATH",
    epilog="Exit codes: 0 done, 1 problems found, 2 wrong usage, 130 interrupted.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main() -> None:
    """The console script."""
    # A document is a tree of small values without cycles, often millions of them, that lives until the end:
    # walking it again each time it has grown by a quarter takes a fifth of the time and frees nothing.
    gc.disable()
    prepare_streams()
    end_cleanly_on_signals()
    app()


@app.callback(invoke_without_command=True)
def root(version: Version = False) -> None:
    if version:
        from importlib import metadata

        try:
            write(f"ckptconv {metadata.version('ckptconv')}\n")
        except metadata.PackageNotFoundError:
            write("ckptconv, run from its source without installation\n")
        raise typer.Exit(DONE)


@app.command(short_help="Show what a checkpoint is, progress first.")
def inspect(
    path: Readable,
    as_json: AsJson = False,
    tensors: Tensors = False,
    raw: Raw = False,
    digest: Digest = False,
    from_: From = None,
    select: Select = None,
) -> None:
    """Show what a checkpoint is: progress, optimizers, schedules, parameters.

    With --json it is the neutral document. Nothing is written, nothing in the file is run.

    Example: ckptconv inspect run.pt
    """
    if digest and not raw:
        raise typer.BadParameter("it goes with --raw.", param_hint="--digest")
    with outcome(as_json=as_json):
        format_, dialect = parse_container("--from", from_)
        if raw:
            _inspect_raw(path, format_, dialect, select or (), as_json=as_json, digest=digest)
            return
        from ckptconv.detect import open

        checkpoint = open(path, format=format_, dialect=dialect, select=select or ())
        if as_json:
            from ckptconv import schema

            print_json(schema.to_json(checkpoint, values=True))
            return
        from ckptconv.rendering.checkpoint import inspect_view

        show(inspect_view(checkpoint, path=str(path), all_params=tensors))


def _inspect_raw(
    path: Path,
    format_: str | None,
    dialect: str | None,
    select: Sequence[str],
    *,
    as_json: bool,
    digest: bool,
) -> None:
    from ckptconv import listing
    from ckptconv.detect import choose, detect_dialect, read_raw
    from ckptconv.rendering.registry import raw_view

    choice = choose(path, select)
    if choice.names:
        raise CkptError.of(
            "usage",
            f"there is no checkpoint '{choice.names[0]}' in '{path.name}'",
            "--raw lists a whole file: name one, or pass --select with: "
            + ", ".join(choice.candidates)
            + ".",
            loc=("--select", choice.names[0]),
        )
    raw = read_raw(choice.path, format_)
    try:
        name = detect_dialect(raw, dialect)[0].name
    except CkptError as error:
        # The keys are listed also where nobody knows what they mean: that is what --raw is for.
        if any(problem.code != "unknown-dialect" for problem in error.problems):
            raise
        name = None
    if as_json:
        print_json(listing.to_json(raw, name, digests=digest))
    else:
        show(raw_view(raw.format, name, listing.rows(raw, digests=digest)))


@app.command(short_help="Convert a checkpoint, training state included.")
def convert(
    source: Source,
    target: Target,
    from_: From = None,
    to: To = None,
    template: Template = None,
    source_spec: SourceSpec = None,
    template_spec: TemplateSpec = None,
    set_: Set = None,
    only: Only = None,
    exclude: Exclude = None,
    dtype: DType = None,
    allow: Allow = None,
    shard_size: ShardSize = None,
    select: Select = None,
    keep: Keep = False,
    report: ReportFile = None,
    jobs: Jobs = None,
    dry_run: DryRun = False,
    no_verify: NoVerify = False,
    force: Force = False,
    verbose: Verbose = False,
    as_json: AsJson = False,
) -> None:
    """Convert a checkpoint: weights, optimizer state and progress.

    SRC is only read. DST appears whole and verified, or not at all. What cannot be carried is an error
    that names its code, never a silent loss.

    Example, from PyTorch to Keras with a fresh checkpoint of the Keras model:
    ckptconv convert run.pt out/ckpt-1 --template fresh/ckpt-1

    Example, the weights alone: ckptconv convert run.pt weights.safetensors
    """
    settings = parse_settings(set_)
    with outcome(as_json=as_json):
        from ckptconv.conversion import convert as run

        parse_container("--from", from_)
        parse_container("--to", to)
        if report is not None:
            check_report_file(report, (source, target, template, source_spec, template_spec), force=force)
        with progress_bar(f"converting {source.name}") as progress:
            result = run(
                source,
                target,
                from_=from_,
                to=to,
                template=template,
                source_spec=source_spec,
                template_spec=template_spec,
                set_=settings,
                only=only or (),
                exclude=exclude or (),
                dtype=dtype,
                allow=allow or (),
                shard_size=shard_size,
                select=select or (),
                keep=keep,
                jobs=jobs,
                dry_run=dry_run,
                verify=not no_verify,
                force=force,
                progress=progress,
            )
        _deliver(result, report, verbose=verbose, as_json=as_json)


def _deliver(result: Report, path: Path | None, *, verbose: bool, as_json: bool) -> None:
    """Shows a report, writes it if asked to, and leaves with 1 where a dry run found problems."""
    from ckptconv import schema

    if path is not None:
        try:
            path.write_text(json.dumps(schema.report_to_json(result), indent=2) + "\n", encoding="utf-8")
        except OSError as error:
            raise TargetError.of(
                "target-unwritable",
                f"the report cannot be written to '{path}': {error.strerror}",
                "The conversion itself is done." if not result.dry_run else "Choose another name.",
                loc=("--report",),
            ) from error
    if as_json:
        print_json(schema.report_to_json(result))
    else:
        from ckptconv.rendering.report import report_view

        show(report_view(result, verbose=verbose))
        show_problems(result.problems, as_json=False)
    if result.problems:
        raise typer.Exit(PROBLEMS)


@app.command(short_help="Show what convert would do; write nothing.")
def plan(
    source: Source,
    target: Target,
    from_: From = None,
    to: To = None,
    template: Template = None,
    source_spec: SourceSpec = None,
    template_spec: TemplateSpec = None,
    set_: Set = None,
    only: Only = None,
    exclude: Exclude = None,
    dtype: DType = None,
    allow: Allow = None,
    shard_size: ShardSize = None,
    select: Select = None,
    keep: Keep = False,
    report: ReportFile = None,
    force: Force = False,
    verbose: Verbose = False,
    as_json: AsJson = False,
) -> None:
    """Show what convert would do, and write nothing: the same as convert --dry-run.

    Example: ckptconv plan run.pt out/ckpt-1 --template fresh/ckpt-1
    """
    convert(
        source,
        target,
        from_=from_,
        to=to,
        template=template,
        source_spec=source_spec,
        template_spec=template_spec,
        set_=set_,
        only=only,
        exclude=exclude,
        dtype=dtype,
        allow=allow,
        shard_size=shard_size,
        select=select,
        keep=keep,
        report=report,
        dry_run=True,
        force=force,
        verbose=verbose,
        as_json=as_json,
    )


@app.command(short_help="Check a checkpoint, or require fields of it.")
def validate(
    path: Readable,
    require: Require = None,
    select: Select = None,
    as_json: AsJson = False,
) -> None:
    """Check a checkpoint: schema, digests, cross-references, and what the container itself records.

    With --require it is a gate for pipelines: a field that is not known is a problem.

    Example: ckptconv validate run.pt --require step,learning_rate
    """
    with outcome(as_json=as_json):
        from ckptconv.conversion import validate as check

        problems = check(path, require=split_names(require), select=select or ())
        if problems:
            stop(problems, as_json=as_json)
        if as_json:
            print_json({"problems": []})
        else:
            from ckptconv.rendering.text import clean

            write(f"{clean(path)}: no problems\n")


@app.command(short_help="Say in what two checkpoints differ, across formats.")
def diff(
    first: First,
    second: Second,
    absolute: Absolute = 0.0,
    relative: Relative = 0.0,
    allow: Allow = None,
    verbose: Verbose = False,
    as_json: AsJson = False,
) -> None:
    """Say in what two checkpoints differ: progress, optimizers, names, shapes, dtypes and values.

    They may be in different formats and of different frameworks: then A is carried onto B's names, layouts
    and optimizer, as convert would do it, and the result is compared. Exit codes: 0 the same, 1 different,
    2 trouble.

    Example: ckptconv diff run.pt out/ckpt-1 --rtol 1e-6
    """
    with outcome(as_json=as_json, code=USAGE):
        from ckptconv import difference

        with progress_bar("comparing") as progress:
            found = difference.compare(
                first,
                second,
                tolerance=difference.Tolerance(absolute=absolute, relative=relative),
                allow=allow or (),
                progress=progress,
            )
        if as_json:
            print_json(difference.to_json(found))
        else:
            from ckptconv.rendering.difference import difference_view

            show(difference_view(found, verbose=verbose))
        if not found.same:
            raise typer.Exit(PROBLEMS)


@app.command(short_help="Say where the step is, and which restore would lose it.")
def doctor(
    path: Readable,
    from_: From = None,
    select: Select = None,
    as_json: AsJson = False,
) -> None:
    """Say where the step of a checkpoint is, which restoring calls of which framework bring it back, leave it
    at 0 or put optimizer state in the wrong place, why, and what mends that.

    Nothing is written, nothing in the file is run.

    Example: ckptconv doctor ckpts/ckpt-9
    """
    with outcome(as_json=as_json):
        from ckptconv import doctor as doctors

        format_, dialect = parse_container("--from", from_)
        found = doctors.diagnose(path, format=format_, dialect=dialect, select=select or ())
        if as_json:
            print_json(doctors.to_json(found))
            return
        from ckptconv.rendering.doctor import doctor_view

        show(doctor_view(found))


@app.command(short_help="List what is read and written, and whose state converts.")
def formats(
    directions: Directions = False,
    as_json: AsJson = False,
) -> None:
    """List the containers that are read and written, their dialects, and the optimizers that convert.

    Example: ckptconv formats --optimizers
    """
    with outcome(as_json=as_json):
        from ckptconv import listing

        if directions:
            listed = listing.optimizer_directions()
            if as_json:
                print_json({"optimizers": listed})
                return
            from ckptconv.rendering.registry import directions_view

            show(directions_view(listed))
            return

        containers, optimizers = listing.formats(), listing.optimizers()
        if as_json:
            print_json({"formats": containers, "optimizers": optimizers})
            return
        from ckptconv.rendering.registry import formats_view

        show(formats_view(containers, optimizers))
