"""`ckptconv convert` and `ckptconv plan`: one conversion, made or only shown."""

from __future__ import annotations

import json
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from ckptconv.console import PROBLEMS, outcome, print_json, progress_bar, show, show_problems
from ckptconv.errors import TargetError
from ckptconv.options import (
    Allow,
    AsJson,
    DryRun,
    DType,
    Exclude,
    ExecutorAt,
    Force,
    From,
    Jobs,
    Keep,
    MappingFile,
    NoVerify,
    Only,
    ReportFile,
    Select,
    Set,
    ShardSize,
    Source,
    SourceSpec,
    Target,
    Template,
    TemplateSpec,
    To,
    Verbose,
    parse_container,
    parse_settings,
)
from ckptconv.report_file import check_report_file

if TYPE_CHECKING:
    from concurrent.futures import Executor

    from ckptconv.report import Report


def convert(
    source: Source,
    target: Target,
    from_: From = None,
    to: To = None,
    template: Template = None,
    source_spec: SourceSpec = None,
    template_spec: TemplateSpec = None,
    mapping: MappingFile = None,
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
    executor: ExecutorAt = None,
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
            check_report_file(
                report, (source, target, template, source_spec, template_spec, mapping), force=force
            )
        with _workers(executor) as workers, progress_bar(f"converting {source.name}") as progress:
            result = run(
                source,
                target,
                from_=from_,
                to=to,
                template=template,
                source_spec=source_spec,
                template_spec=template_spec,
                mapping=mapping,
                set_=settings,
                only=only or (),
                exclude=exclude or (),
                dtype=dtype,
                allow=allow or (),
                shard_size=shard_size,
                select=select or (),
                keep=keep,
                jobs=jobs,
                executor=workers,
                dry_run=dry_run,
                verify=not no_verify,
                force=force,
                progress=progress,
            )
        _deliver(result, report, verbose=verbose, as_json=as_json)


def _workers(text: str | None) -> AbstractContextManager[Executor | None]:
    """Those that write the files: of the cluster that was named, or nobody else."""
    if text is None:
        return nullcontext()
    from ckptconv.executors import executor_at

    return executor_at(text)


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


def plan(
    source: Source,
    target: Target,
    from_: From = None,
    to: To = None,
    template: Template = None,
    source_spec: SourceSpec = None,
    template_spec: TemplateSpec = None,
    mapping: MappingFile = None,
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
        mapping=mapping,
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
