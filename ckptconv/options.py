"""What each argument and option of the command line is called, accepts and explains."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from ckptconv.errors import CkptError
from ckptconv.remote import place


def parse_container(option: str, value: str | None) -> tuple[str | None, str | None]:
    """`FORMAT[:DIALECT]` as (format, dialect).

    Raises: usage with the nearest name where there is no such format or dialect.
    """
    from ckptconv import detect

    format_, dialect = detect.parse_target(value)
    try:
        if format_ is not None:
            detect.format_named(format_)
            if dialect is not None:
                detect.dialect_named(format_, dialect)
    except CkptError as error:
        problems = (replace(problem, code="usage", loc=(option, value or "")) for problem in error.problems)
        raise CkptError(*problems) from None
    return format_, dialect


def parse_settings(values: list[str] | None) -> dict[str, str]:
    """`FIELD=VALUE` items as a mapping; the library judges fields and values."""
    result: dict[str, str] = {}
    for item in values or ():
        field, equals, value = item.partition("=")
        if not equals or not field or not value:
            raise typer.BadParameter(f"'{item}' is not FIELD=VALUE, as in step=9.", param_hint="--set")
        if field in result:
            raise typer.BadParameter(f"'{field}' is set twice.", param_hint="--set")
        result[field] = value
    return result


def split_names(value: str | None) -> list[str]:
    """A comma-separated list."""
    return [name.strip() for name in (value or "").split(",") if name.strip()]


Source = Annotated[
    Path,
    typer.Argument(parser=place, metavar="SRC", help="The checkpoint to read, e.g. run.pt or ckpts/ckpt-9."),
]
Target = Annotated[
    Path,
    typer.Argument(parser=place, metavar="DST", help="What to write, e.g. out/ckpt-9 or out.safetensors."),
]
Readable = Annotated[
    Path,
    typer.Argument(
        parser=place,
        metavar="PATH",
        help="A checkpoint file, prefix or directory, e.g. run.pt or ckpts/ckpt-9.",
    ),
]
First = Annotated[
    Path,
    typer.Argument(
        parser=place, metavar="A", help="A checkpoint in any format, e.g. run.pt or ckpts/ckpt-9."
    ),
]
Second = Annotated[
    Path, typer.Argument(parser=place, metavar="B", help="Another one, in the same format or another.")
]
Absolute = Annotated[
    float,
    typer.Option(
        "--atol", metavar="X", min=0, help="Values may be apart by X, e.g. --atol 1e-6. Default: equal bits."
    ),
]
Relative = Annotated[
    float,
    typer.Option(
        "--rtol", metavar="X", min=0, help="And by X times the size of B's value, e.g. --rtol 1e-5."
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON on stdout, problems too, e.g. for jq.")]
From = Annotated[
    str | None,
    typer.Option(
        "--from",
        metavar="FORMAT[:DIALECT]",
        help="Read the checkpoint as this instead of recognising it, e.g. --from pytorch:plain.",
    ),
]
To = Annotated[
    str | None,
    typer.Option(
        "--to",
        metavar="FORMAT[:DIALECT]",
        help="Write this, e.g. --to tensorflow. Needed where neither DST's suffix nor the template tells.",
    ),
]
Template = Annotated[
    Path | None,
    typer.Option(
        parser=place,
        metavar="PATH",
        help="A fresh checkpoint of the target model, saved by the target's own code, or its description "
        "(describe()): gives names, layouts and optimizer settings, e.g. --template fresh/ckpt-1.",
    ),
]
SourceSpec = Annotated[
    Path | None,
    typer.Option(
        parser=place,
        metavar="PATH",
        help="A checkpoint or manifest that supplies what SRC does not record, such as layer kinds and "
        "parameter order, e.g. --source-spec described.json.",
    ),
]
TemplateSpec = Annotated[
    Path | None,
    typer.Option(
        parser=place,
        metavar="PATH",
        help="A checkpoint or manifest that supplies what the template does not record, such as the order of "
        "an HF Trainer's parameters, e.g. --template-spec described.json.",
    ),
]
MappingFile = Annotated[
    Path | None,
    typer.Option(
        "--mapping",
        parser=place,
        metavar="FILE",
        help="Which names and axes of SRC and the template belong together, where nothing else tells: a file "
        "that 'ckptconv map' begins, e.g. --mapping names.json.",
    ),
]
MapTemplate = Annotated[
    Path,
    typer.Argument(
        parser=place,
        metavar="TEMPLATE",
        help="A checkpoint or manifest of the target model, e.g. fresh/ckpt-1.",
    ),
]
MapOutput = Annotated[
    Path | None,
    typer.Option("--output", "-o", metavar="FILE", help="Write the mapping file there, e.g. -o names.json."),
]
MapCheck = Annotated[
    Path | None,
    typer.Option(
        "--check",
        parser=place,
        metavar="FILE",
        help="Say what this mapping file covers instead of making one, e.g. --check names.json.",
    ),
]
MapBegun = Annotated[
    Path | None,
    typer.Option(
        "--mapping",
        parser=place,
        metavar="FILE",
        help="Go on with a mapping file: its rules stay, the rest is added, e.g. --mapping names.json.",
    ),
]
DiffTemplate = Annotated[
    Path | None,
    typer.Option(
        "--template",
        parser=place,
        metavar="PATH",
        help="A checkpoint or manifest in whose names and layouts both are compared, where B's own do not "
        "tell them, e.g. --template described.json.",
    ),
]
DiffMapping = Annotated[
    Path | None,
    typer.Option(
        "--mapping",
        parser=place,
        metavar="FILE",
        help="Which names and axes of A and B belong together: a file that 'ckptconv map' begins, e.g. "
        "--mapping names.json.",
    ),
]
SelectBoth = Annotated[
    list[str] | None,
    typer.Option(
        "--select",
        metavar="NAME",
        help="Compare this one of several checkpoints in a folder, or this part, of both sides, e.g. "
        "--select optimizer:0. May be repeated.",
    ),
]
SelectFirst = Annotated[
    list[str] | None,
    typer.Option("--select-a", metavar="NAME", help="The same of A alone, e.g. --select-a best."),
]
SelectSecond = Annotated[
    list[str] | None,
    typer.Option("--select-b", metavar="NAME", help="The same of B alone, e.g. --select-b ema."),
]
Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="FIELD=VALUE",
        help="Supply what the source does not record, e.g. --set step=9 --set epochs=2. May be repeated.",
    ),
]
Only = Annotated[
    list[str] | None,
    typer.Option(
        metavar="GLOB", help="Convert only parameters that match, e.g. --only 'encoder.*'. May be repeated."
    ),
]
Exclude = Annotated[
    list[str] | None,
    typer.Option(
        metavar="GLOB", help="Leave matching parameters out, e.g. --exclude 'head.*'. May be repeated."
    ),
]
DType = Annotated[
    str | None,
    typer.Option(metavar="DTYPE", help="Cast floating-point parameters, e.g. --dtype bfloat16."),
]
Allow = Annotated[
    list[str] | None,
    typer.Option(
        metavar="CODE",
        help="Accept one loss by the code that an error named, e.g. --allow precision-loss. May be repeated.",
    ),
]
Select = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME",
        help="Take this one of several checkpoints in a folder, or this part of one, e.g. --select best, "
        "checkpoint-500, ema, unet, model:generator or optimizer:0. May be repeated.",
    ),
]
ShardSize = Annotated[
    str | None,
    typer.Option(
        metavar="SIZE",
        help="Write safetensors or neutral in files of at most SIZE each, e.g. --shard-size 5GB, 500MB or "
        "2GiB. A larger tensor has a file of its own.",
    ),
]
Keep = Annotated[
    bool,
    typer.Option(
        "--keep", help="Also write a neutral directory beside DST, so that the way back is exact: --keep."
    ),
]
ReportFile = Annotated[
    Path | None,
    typer.Option(
        "--report", metavar="FILE", help="Write the full report as JSON, e.g. --report report.json."
    ),
]
Jobs = Annotated[
    int | None,
    typer.Option(
        metavar="N", min=1, help="Threads that copy tensors, e.g. --jobs 4. Default: chosen by the machine."
    ),
]
ExecutorAt = Annotated[
    str | None,
    typer.Option(
        "--executor",
        metavar="KIND:ADDRESS",
        help="A running Dask or Ray cluster that writes the target's files, one job for each, "
        "e.g. --executor dask:tcp://10.0.0.5:8786 or --executor ray:auto.",
    ),
]
NoVerify = Annotated[
    bool,
    typer.Option(
        "--no-verify", help="Do not read the result back to compare it, e.g. on slow storage: --no-verify."
    ),
]
Force = Annotated[bool, typer.Option("--force", help="Replace what is already there: --force.")]
Verbose = Annotated[
    bool, typer.Option("--verbose", "-v", help="Show what became of every single item: --verbose.")
]
Require = Annotated[
    str | None,
    typer.Option(
        metavar="FIELD,...",
        help="Fields that must be known, of progress or of optimizers, e.g. --require step,learning_rate.",
    ),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Show what would be done, write nothing: --dry-run.")]
Tensors = Annotated[bool, typer.Option("--tensors", help="Show every parameter, however many: --tensors.")]
Raw = Annotated[
    bool, typer.Option("--raw", help="Show every leaf under the file's own keys, without meaning: --raw.")
]
Digest = Annotated[bool, typer.Option("--digest", help="Also the sha256 of every tensor: --raw --digest.")]
Directions = Annotated[
    bool,
    typer.Option("--optimizers", help="How exactly each optimizer converts, each direction: --optimizers."),
]
Version = Annotated[bool, typer.Option("--version", help="Print the version: ckptconv --version.")]
