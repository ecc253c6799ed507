"""The table behind `doctor`: each call on each kind of file does what it says, in the real framework."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from ckptconv.catalog.restores import kinds_of_file
from tests.restores import calls, files, tf1_calls, torch_calls, trainer_calls
from tests.restores.outcome import Outcome, judged

ROWS = {row.name: (kind.name, row) for kind in kinds_of_file() for row in kind.restores}
FILES = {**files.FILES, **tf1_calls.FILES, **torch_calls.FILES, **trainer_calls.FILES}
CALLS = {**calls.CALLS, **tf1_calls.CALLS, **torch_calls.CALLS, **trainer_calls.CALLS}

Made = Callable[[str], tuple[Path, Any]]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    @cache
    def make(file: str) -> tuple[Path, Any]:
        return FILES[file](tmp_path_factory.mktemp(file))

    return make


def test_every_row_is_measured() -> None:
    assert CALLS.keys() == ROWS.keys()


QUICK = ("legacy-into-keras3", "tf-keras-into-keras3-unbuilt", "weights-h5-unbuilt", "weights-h5-built")


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in calls.CALLS]
)
def test_a_call_of_keras_does_what_the_table_says(name: str, made: Made) -> None:
    for module in ("tensorflow", "tf_keras", "h5py"):
        pytest.importorskip(module)
    found = calls.observed(name, *made(CALLS[name][0]))
    if ROWS[name][1].signal == "error":  # what a refusal has touched before it failed is not looked at
        assert (found.step, found.signal) == ("refused", "error")
        return
    assert found == said(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", tf1_calls.CALLS)
def test_a_call_of_tensorflow_1_does_what_the_table_says(name: str, made: Made) -> None:
    for module in ("tensorflow", "tf_keras"):
        pytest.importorskip(module)
    assert tf1_calls.observed(name, *made(CALLS[name][0])) == said(name)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", torch_calls.CALLS)
def test_a_call_of_torch_does_what_the_table_says(name: str, made: Made) -> None:
    pytest.importorskip("torch")
    assert torch_calls.observed(name, *made(CALLS[name][0])) == said(name)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", trainer_calls.CALLS)
def test_a_call_of_a_trainer_does_what_the_table_says(name: str, made: Made) -> None:
    for module in ("lightning", "transformers", "accelerate"):
        pytest.importorskip(module)
    assert trainer_calls.observed(name, *made(CALLS[name][0])) == said(name)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_lightning_counts_where_the_optimizer_does_not(tmp_path: Path) -> None:
    for module in ("lightning", "transformers"):
        pytest.importorskip(module)
    path, saved = trainer_calls.lightning_file("SGD")(tmp_path)
    assert judged(trainer_calls.lightning_fit("SGD"), path, saved) == said("lightning-fit")
    assert judged(trainer_calls.load_from_checkpoint("SGD"), path, saved) == said("lightning-load-from")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["keras3-same", "keras3-unbuilt", "keras3-renamed", "keras3-model-only"])
def test_an_accumulating_optimizer_is_restored_alike(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its counter is of batches, and it tells the updates: half as many."""
    for module in ("tensorflow", "tf_keras"):
        pytest.importorskip(module)
    monkeypatch.setattr(files, "adam", lambda _: files.keras_of("keras3").optimizers.Adam(
        0.01, gradient_accumulation_steps=2
    ))  # fmt: skip
    monkeypatch.setattr(calls, "STEPS", files.STEPS // 2)
    assert calls.observed(name, *files.FILES["checkpoint-keras3"](tmp_path)) == said(name)


def said(name: str) -> Outcome:
    _, row = ROWS[name]
    return Outcome(row.step, row.weights, row.state, row.signal)
