"""The table behind `doctor`: each call on each kind of file does what it says, in the real framework."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

pytest.importorskip("tensorflow")
pytest.importorskip("tf_keras")
pytest.importorskip("h5py")

from ckptconv.catalog.restores import kinds_of_file
from tests.restores.calls import CALLS, Outcome, observed
from tests.restores.files import FILES, Run

ROWS = {row.name: row for kind in kinds_of_file() for row in kind.restores if kind.format != "pytorch"}

Made = Callable[[str], tuple[Path, Run]]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    @cache
    def make(file: str) -> tuple[Path, Run]:
        return FILES[file](tmp_path_factory.mktemp(file))

    return make


def test_every_row_is_measured() -> None:
    assert CALLS.keys() == ROWS.keys()


QUICK = ("legacy-into-keras3", "tf-keras-into-keras3-unbuilt", "weights-h5-unbuilt", "weights-h5-built")


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in CALLS]
)
def test_the_call_does_what_the_table_says(name: str, made: Made) -> None:
    row = ROWS[name]
    found = observed(name, *made(CALLS[name][0]))
    if row.signal == "error":  # what a refusal has touched before it failed is not looked at
        assert (found.step, found.signal) == (row.step, row.signal)
        return
    assert found == Outcome(row.step, row.weights, row.state, row.signal)
