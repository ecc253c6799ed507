"""The table behind `doctor`: each call on each kind of file does what it says, in the real framework."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from ckptconv.catalog.restores import _OUTCOMES, kinds_of_file, unmeasured
from ckptconv.dialects.table import DIALECTS
from ckptconv.rendering import doctor as words
from tests.restores import calls, files, program_calls, tf1_calls, torch_calls, trainer_calls
from tests.restores.outcome import Call, Make, Outcome, judged

ROWS = {row.name: (kind.name, row) for kind in kinds_of_file() for row in kind.restores}
OTHERS = (tf1_calls, torch_calls, trainer_calls, program_calls)
FILES = {**files.FILES, **{name: make for one in OTHERS for name, make in one.FILES.items()}}
CALLS = {**calls.CALLS, **{name: call for one in OTHERS for name, call in one.CALLS.items()}}

PACKAGES = (
    ("deepspeed", program_calls.deepspeed_folder, program_calls.OF_DEEPSPEED),
    ("peft", program_calls.adapter_folder, program_calls.OF_PEFT),
    ("diffusers", program_calls.pipeline_folder, program_calls.OF_DIFFUSERS),
)
"""That the other tests do not need: what they save, and their calls."""

Made = Callable[[str], tuple[Path, Any]]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    @cache
    def make(file: str) -> tuple[Path, Any]:
        return FILES[file](tmp_path_factory.mktemp(file))

    return make


def test_every_row_is_measured_or_names_its_source() -> None:
    measured = {*CALLS, *(name for _, _, of in PACKAGES for name in of), *program_calls.OF_MODULES}
    assert measured == {name for name, (_, row) in ROWS.items() if not row.source}
    assert all(row.source.startswith("https://") for _, row in ROWS.values() if row.source)
    for _, row in ROWS.values():  # what can be installed here is not taken from a source
        told = {"TensorFlow", "Keras", "tf_keras", "PyTorch", "Lightning", "transformers", "accelerate"}
        assert not row.source or not any(row.framework.startswith(name) for name in told)


def test_every_readable_dialect_has_rows_or_says_why_not() -> None:
    listing = {(dialect.format, dialect.name) for dialect in DIALECTS.values()}
    rows = {(kind.format, dialect) for kind in kinds_of_file() for dialect in kind.dialects}
    assert rows <= listing
    assert not rows & unmeasured().keys()
    assert rows | unmeasured().keys() == listing


def test_every_outcome_has_its_words_and_is_used() -> None:
    shown = {"step": words._STEP, "weights": words._WEIGHTS, "state": words._STATE, "signal": words._SIGNAL}
    for what, sentences in shown.items():
        used = {getattr(row, what) for _, row in ROWS.values()}
        assert used == set(_OUTCOMES[what])
        assert used - sentences.keys() <= {"refused", "error"}  # a refusal has a sentence of its own
        assert sentences.keys() <= used


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
@pytest.mark.parametrize("name", program_calls.CALLS)
def test_a_call_on_a_program_s_file_does_what_the_table_says(name: str, made: Made) -> None:
    pytest.importorskip("lightning")
    assert program_calls.observed(name, *made(CALLS[name][0])) == said(name)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("package", "make", "of"), PACKAGES, ids=[package for package, _, _ in PACKAGES])
def test_the_calls_of_a_package_do_what_the_table_says(
    package: str, make: Make, of: Mapping[str, Call], tmp_path: Path
) -> None:
    pytest.importorskip(package, reason=f"needs {package} to make its calls")
    path, saved = make(tmp_path)
    for name, call in of.items():
        assert judged(call, path, saved) == said(name)


@pytest.mark.slow
def test_the_calls_on_modules_of_tensorflow_do_what_the_table_says(tmp_path: Path) -> None:
    pytest.importorskip("tensorflow")
    path, saved = program_calls.module_checkpoint(tmp_path)
    for name, call in program_calls.OF_MODULES.items():
        found, signal = calls.listened(call, path)
        assert judged(lambda _, found=found: found, path, saved) == replace(said(name), signal="none")
        assert signal == said(name).signal


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
