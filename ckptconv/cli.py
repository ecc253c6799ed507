"""The command line: which commands there are, and what the program does around each of them.

Exit codes: 0 done, 1 problems found, 2 usage, 130 interrupted. What was asked for goes to stdout, problems
and progress to stderr; with `--json` problems are JSON on stdout too: `{"problems": [...]}`.
"""

from __future__ import annotations

import gc

import typer

from ckptconv.commands import check, compare, convert, formats, inspect, mapping
from ckptconv.console import DONE, end_cleanly_on_signals, prepare_streams, write
from ckptconv.options import Version

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
    try:
        app()
    finally:
        gc.freeze()  # nor would the walk that Python makes at the end


@app.callback(invoke_without_command=True)
def root(version: Version = False) -> None:
    if version:
        from importlib import metadata

        try:
            write(f"ckptconv {metadata.version('ckptconv')}\n")
        except metadata.PackageNotFoundError:
            write("ckptconv, run from its source without installation\n")
        raise typer.Exit(DONE)


app.command(short_help="Show what a checkpoint is, progress first.")(inspect.inspect)
app.command(short_help="Convert a checkpoint, training state included.")(convert.convert)
app.command(short_help="Show what convert would do; write nothing.")(convert.plan)
app.command(short_help="Check a checkpoint, or require fields of it.")(check.validate)
app.command(short_help="Say in what two checkpoints differ, across formats.")(compare.diff)
app.command(short_help="Say where the step is, and which restore would lose it.")(check.doctor)
app.command("map", short_help="Write a mapping file to start from, or check one.")(mapping.map_names)
app.command(short_help="List what is read and written, and whose state converts.")(formats.formats)
