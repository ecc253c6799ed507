"""Views for people: all is shown, nothing is cut off or drawn in a pipe, no file writes to the terminal."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from dataclasses import replace

import pytest
from rich.console import Console

from ckptconv import dtypes
from ckptconv.document import (
    Absent,
    Block,
    Candidate,
    Checkpoint,
    Group,
    Known,
    Optimizer,
    Param,
    Progress,
    Provenance,
    Schedule,
    Unknown,
)
from ckptconv.errors import Problem
from ckptconv.rendering.checkpoint import TABLE_ROWS, inspect_view
from ckptconv.rendering.problems import problems_view
from ckptconv.rendering.registry import dialect_rows, formats_view, raw_view
from ckptconv.rendering.report import report_view
from ckptconv.rendering.text import clean, clip, plain, size
from ckptconv.report import Entry, OptimizerVerdict, Report
from ckptconv.tensor import MissingTensor, TensorSpec

BOX = "─│┌┐└┘├┤━┃╭╮╰╯"


def tensor(*shape: int, dtype: str = "float32") -> MissingTensor:
    return MissingTensor(spec=TensorSpec(dtype=dtypes.BY_NAME[dtype], shape=shape))


def run(params: int = 2, **changes: object) -> Checkpoint:
    names = [f"encoder.layers.{i}.attention.projection.weight" for i in range(params)]
    fields: dict[str, object] = {
        "progress": Progress(
            step=Known(value=9, source="optimizer/_iterations"),
            epochs=Unknown(
                reason="a plain loop's 'epoch' may count finished epochs or name the last one",
                candidates=(
                    Candidate(value=1, source="epoch", condition="it is a count"),
                    Candidate(value=2, source="epoch", condition="it names the last finished epoch, 0-based"),
                ),
            ),
            loss_scale=Absent(reason="no scaler state"),
            micro_steps=Known(value=18, status="derived", source="step", formula="step * accumulation"),
            samples=Known(value=7321, status="supplied", source="--set"),
        ),
        "params": {
            name: Param(
                name=name,
                tensor=tensor(64, 32),
                role="kernel",
                layer="dense",
                axes=("out", "in"),
                evidence="matched",
                trainable=True,
            )
            for name in names
        },
        "optimizers": (
            Optimizer(
                name="optimizer",
                algorithm="adamw",
                framework="torch",
                form={"epsilon": "corrected"},
                step=Known(value=9, source="optimizer.state.0.step"),
                groups=(
                    Group(
                        params=tuple(names),
                        hyperparameters={
                            "weight_decay": Known(value=0.0125, source="g"),
                            "learning_rate": Known(value=0.00321, source="g"),
                            "beta_1": Known(value=0.875, status="supplied", source="template"),
                            "amsgrad": Unknown(reason="not stored"),
                        },
                    ),
                ),
                slots={"first_moment": {name: tensor(64, 32) for name in names}},
                param_order="declaration-order",
            ),
        ),
        "schedules": (
            Schedule(
                name="scheduler",
                family="cosine",
                position=Known(value=4, source="scheduler.last_epoch"),
                unit="epoch",
                parameters={"t_max": Known(value=77, source="scheduler.T_max")},
            ),
        ),
        "rng": (Block(name="rng_state", library="torch-cpu", tensors=("rng_state",)),),
        "extras": {"rng_state": tensor(5056, dtype="uint8"), "queue": tensor(3)},
        "oddities": ("the parameter 'queue' belongs to no layer",),
        "provenance": Provenance(
            format="pytorch", dialect="plain", evidence="key model_state_dict", producer="torch 2.13.0"
        ),
    }
    return Checkpoint(**(fields | changes))  # type: ignore[arg-type]


def on_terminal(views: Sequence[object], width: int = 80) -> str:
    out = io.StringIO()
    console = Console(file=out, width=width, force_terminal=True, highlight=False, emoji=False, markup=False)
    for view in views:
        console.print(view)
    return out.getvalue()


def test_inspect_shows_every_fact_once_and_progress_first() -> None:
    text = plain(inspect_view(run(), path="run.pt"))
    for part in (
        "optimizer/_iterations", "plain loop", "epoch", "0-based", "--set epochs", "7321", "--set",
        "step * accumulation", "no scaler state", "adamw", "0.00321", "0.0125", "0.875", "template",
        "first_moment", "cosine", "77", "last_epoch", "queue", "torch-cpu", "model_state_dict",
        "torch 2.13.0",
        "out 64 x in 32", "corrected", "belongs to no layer", "batch_in_epoch",
    ):  # fmt: skip
        assert part in text, part
    order = [
        text.index(word) for word in ("Progress", "Optimizer", "Schedule", "Parameters", "Worth knowing")
    ]
    assert order == sorted(order)


def test_totals_count_tied_parameters_once() -> None:
    document = run()
    first, second = document.params.values()
    tied = Param(name=second.name, tensor=second.tensor, tied_to=first.name)
    document = replace(document, params={first.name: first, second.name: tied})
    total = next(line for line in plain(inspect_view(document, path="x")).splitlines() if "Total" in line)
    assert "2,048" in total
    assert "1 tied" in total
    assert "8.2 kB" in total
    assert "16.4 kB" in total


def test_a_long_table_is_cut_and_says_so_unless_all_are_asked_for() -> None:
    document = run(params=TABLE_ROWS + 5)
    last = f"encoder.layers.{TABLE_ROWS + 4}.attention"
    short = plain(inspect_view(document, path="x"))
    assert last not in short
    assert "5 more" in short
    assert last in plain(inspect_view(document, path="x", all_params=True))


def test_a_pipe_gets_no_frames_no_colours_no_ellipses_no_trailing_blanks() -> None:
    document = run(params=3, oddities=("word " * 400,))
    text = plain(inspect_view(document, path="p" * 500))
    assert not set(text) & set(BOX + "…\x1b")
    assert all(line == line.rstrip() for line in text.splitlines())
    assert "p" * 500 in text
    assert ("word " * 400).strip() in text


@pytest.mark.parametrize("width", [80, 60, 120])
def test_a_terminal_folds_and_cuts_nothing(width: int) -> None:
    shown = on_terminal(inspect_view(run(), path="run.pt"), width)
    assert "…" not in shown
    assert not set(shown) & set(BOX)
    # Folded cells interleave, so the check is by letters: as many as in a pipe.
    piped = plain(inspect_view(run(), path="run.pt"))
    assert sorted(re.sub(r"\x1b\[[0-9;]*m|\s", "", shown)) == sorted(re.sub(r"\s", "", piped))


def test_names_of_a_file_cannot_write_to_the_terminal() -> None:
    evil = "w\x1b[2J\x07\r\n[bold]x[/bold]\u202e\ud800"
    document = Checkpoint(
        progress=Progress(step=Unknown(reason=evil)),
        params={evil: Param(name=evil, tensor=tensor(2))},
        extras={evil: tensor(1)},
        oddities=(evil,),
    )
    for text in (
        plain(inspect_view(document, path=evil)),
        plain(problems_view([Problem(code="usage", loc=(evil,), message=evil, hint=evil)])),
        plain(raw_view("pytorch", None, [{"key": evil, "value": evil}])),
        plain(report_view(Report(source=evil, target=evil, target_requires=(evil,), restore=evil))),
    ):
        assert not set(text) & {"\x1b", "\x07", "\r", "\u202e", "\ud800"}
        assert "[bold]x[/bold]" in text
        text.encode()


def test_weights_alone_and_an_empty_document_are_shown() -> None:
    empty = Checkpoint(progress=Progress(step=Absent(reason="weights only")))
    assert "No optimizer" in plain(inspect_view(empty, path="x"))


def test_a_report_names_what_was_not_simply_carried() -> None:
    report = Report(
        source="run.pt", target="out/ckpt-1", source_dialect="plain", target_dialect="keras3",
        progress={"step": 9},
        ledger=(
            Entry(item=("param", "fc.weight"), fate="transformed", target="dense/kernel",
                  ops=({"op": "permute", "order": [1, 0]},), evidence="names"),
            Entry(item=("extra", "rng_state"), fate="noted"),
            Entry(item=("residue", "args"), fate="left", allowed_by="state-dropped"),
        ),
        verdicts=(OptimizerVerdict(optimizer="optimizer", source="adam (torch)", target="adam (keras3)",
                                   verdict="approximate", residuals=("epsilon differs by 3e-5",)),),
        target_requires=("keras.optimizers.Adam(epsilon=1e-8)",),
        restore="import tensorflow as tf\ntf.train.Checkpoint(model=model)",
        files=(("ckpt-1.index", 1234),), verified=True, allowed=("state-dropped",),
    )  # fmt: skip
    text = plain(report_view(report))
    for part in (
        "step 9",
        "extra.rng_state",
        "residue.args",
        "approximate",
        "3e-5",
        "1.2 kB",
        "state-dropped",
    ):
        assert part in text, part
    assert "fc.weight" not in text
    # Code stands at the left margin, so that it can be pasted.
    assert "\nkeras.optimizers.Adam(epsilon=1e-8)\n" in text
    assert "\nimport tensorflow as tf\ntf.train.Checkpoint(model=model)\n" in text
    full = plain(report_view(report, verbose=True))
    for part in ("param.fc.weight", "dense/kernel", "permute", "allowed by state-dropped"):
        assert part in full, part


def test_a_plan_says_that_nothing_was_written() -> None:
    text = plain(report_view(Report(source="a", target="b", dry_run=True)))
    assert "nothing written" in text
    assert "wrote" not in text


def test_problems_show_code_place_and_next_step() -> None:
    problem = Problem(
        code="progress-unknown", loc=("optimizer", "step", 0), message="no step", hint="Pass it."
    )
    assert plain(problems_view([problem])).splitlines() == [
        "progress-unknown: no step",
        "  at optimizer.step.0",
        "  → Pass it.",
    ]


def test_formats_list_their_dialects() -> None:
    entry = {
        "name": "pytorch",
        "summary": "torch.save",
        "suffixes": [".pt"],
        "dialects": [{"name": "plain", "framework": "torch", "summary": "a dictionary"}],
    }
    text = plain(formats_view([entry], [{"algorithm": "adam", "classes": {"torch": "torch.optim.Adam"}}]))
    assert "torch.optim.Adam" in text
    assert "pytorch:plain" in text
    assert ".pt" in text


def test_a_dialect_of_two_formats_is_told_once() -> None:
    dialect = {"name": "plain", "framework": "torch", "summary": "a dictionary"}
    entries = [
        {"name": name, "summary": "", "suffixes": [], "dialects": [dialect]} for name in ("dcp", "pytorch")
    ]
    assert dialect_rows(entries[0], entries) == [("dcp:DIALECT", "as pytorch:DIALECT: plain")]
    assert dialect_rows(entries[1], entries) == [("pytorch:plain", "a dictionary")]


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.0 kB"),
        (999_499, "999.5 kB"),
        (999_600, "1.0 MB"),
        (5 * 10**15, "5000.0 TB"),
    ],
)
def test_sizes(nbytes: int, text: str) -> None:
    assert size(nbytes) == text


def test_long_values_are_cut_with_their_length_and_names_are_not() -> None:
    assert "1,000 characters" in clip("x" * 1000)
    assert clean("x" * 1000) == "x" * 1000


def test_the_parts_of_a_schedule_have_a_line_each_and_a_table_its_length() -> None:
    parameters = {
        "milestones": Known(value=(6,)),
        "0.family": Known(value="step", status="derived", source="keys"),
        "0.last_rate.0": Known(value=0.5),
        "1.family": Known(value="lambda"),
        "1.factors": Known(value=tuple(range(1000))),
    }
    schedule = Schedule(name="scheduler", family="sequential", position=Known(value=4), parameters=parameters)
    lines = plain(inspect_view(run(schedules=(schedule,)), path="run.pt")).splitlines()
    (first, second) = [line for line in lines if line.strip().startswith("part ")]
    assert first.split() == ["part", "0", "step,", "last_rate.0", "0.5"]
    assert second.split() == ["part", "1", "lambda,", "factors", "1000", "numbers"]
    assert any(line.split() == ["settings", "milestones", "(6)"] for line in lines)
