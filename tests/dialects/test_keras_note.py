"""The embedded note of a bundle: it completes the document, never overrides it, and stays with the file."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from ckptconv.detect import read_raw
from ckptconv.dialects.table import DIALECTS
from ckptconv.document import Checkpoint, Known, Unknown, value_of
from ckptconv.note import read_note, write_note
from ckptconv.rawtree import RawTree

CASE = Path(__file__).resolve().parents[2] / "fixtures/keras3/sequential-adam/artifact/ckpt-1"
DIALECT = "tensorflow", "keras3"


def noted(**progress: int) -> RawTree:
    """The fixture with a note that knows more: finished epochs, and Adam's first beta."""
    raw = read_raw(CASE)
    run = DIALECTS[DIALECT].lift(raw)
    facts = {name: Known(value=value) for name, value in {"epochs": 2, **progress}.items()}
    (optimizer,) = run.optimizers
    (group,) = optimizer.groups
    group = replace(group, hyperparameters={**group.hyperparameters, "beta_1": Known(value=0.8)})
    step = facts.get("step", optimizer.step)
    known = replace(
        run,
        progress=replace(run.progress, **facts),
        optimizers=(replace(optimizer, step=step, groups=(group,)),),
    )
    return replace(raw, note=write_note(known))


def lift(raw: RawTree) -> Checkpoint:
    return DIALECTS[DIALECT].lift(raw)


def test_the_note_tells_what_the_file_lacks() -> None:
    checkpoint = lift(noted())
    assert checkpoint.progress.epochs == Known(value=2, source="embedded note")
    assert checkpoint.progress.step == Known(value=5, source="optimizer/_iterations")
    facts = checkpoint.optimizers[0].groups[0].hyperparameters
    assert facts["beta_1"] == Known(value=0.8, source="embedded note")
    assert value_of(facts["learning_rate"]) == pytest.approx(0.003)


def test_the_note_goes_back_as_it_was() -> None:
    raw = noted()
    back = DIALECTS[DIALECT].lower(lift(raw))
    assert back.note == raw.note
    assert back.attributes == raw.attributes


def test_an_edited_step_is_edited_in_the_note() -> None:
    checkpoint = lift(noted())
    checkpoint = replace(checkpoint, progress=replace(checkpoint.progress, step=Known(value=9)))
    back = DIALECTS[DIALECT].lower(checkpoint)
    assert back.note is not None
    assert value_of(read_note(back.note).progress.step) == 9
    assert value_of(lift(back).progress.step) == 9


def test_nothing_is_taken_from_a_note_that_the_file_contradicts() -> None:
    checkpoint = lift(noted(step=6))
    assert checkpoint.progress.step == Known(value=5, source="optimizer/_iterations")
    epochs = checkpoint.progress.epochs
    assert isinstance(epochs, Unknown)
    assert [(c.value, c.source) for c in epochs.candidates] == [(2, "embedded note")]
    assert "beta_1" not in checkpoint.optimizers[0].groups[0].hyperparameters
    assert len(checkpoint.oddities) == 1 + len(lift(noted()).oddities)


def test_a_note_that_the_file_contradicts_is_mended_when_it_is_written() -> None:
    back = DIALECTS[DIALECT].lower(lift(noted(step=6)))
    assert back.note is not None
    progress = read_note(back.note).progress
    assert (value_of(progress.step), value_of(progress.epochs)) == (5, None)
