"""Every format and dialect is in its table, and nothing is imported that the path at hand does not need."""

from __future__ import annotations

import importlib
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

from ckptconv import dialects, formats
from ckptconv.dialects import base as dialect_base
from ckptconv.dialects.table import DIALECTS
from ckptconv.formats import base as format_base
from ckptconv.formats.table import FORMATS, ROWS

ROOT = Path(__file__).resolve().parent.parent


def test_every_module_that_registers_something_is_in_its_table() -> None:
    """A file that nobody lists would be known by luck: where another one happens to import it."""
    known = set(FORMATS), set(DIALECTS)
    for package in (formats, dialects):
        for info in pkgutil.iter_modules(package.__path__):
            importlib.import_module(f"{package.__name__}.{info.name}")
    assert (set(format_base.REGISTERED), set(dialect_base.REGISTERED)) == known
    assert all(FORMATS[name].name == name for name in ROWS)
    assert all((dialect.format, dialect.name) == key for key, dialect in DIALECTS.items())


SEEN = """
import sys
from ckptconv.detect import open
open(sys.argv[1])
print(*(name.removeprefix("ckptconv.") for name in sys.modules if name.startswith("ckptconv.")))
"""

RUNS = {
    "pytorch": "plain/mlp-adamw/run.pt",
    "tensorflow": "keras3/mlp-adamw-fresh/ckpt-1",
    "keras": "keras-file/keras3-adam/artifact/model.keras",
}
MARKS = {
    "pytorch": {"formats.pytorch", "formats.pickle_machine", "dialects.torch_plain"},
    "tensorflow": {"formats.tensor_bundle", "formats.sstable", "dialects.keras3"},
    "keras": {"formats.keras_archive", "formats.hdf5_read", "dialects.keras_file"},
}
"""Modules that only a checkpoint of the format needs."""


@pytest.mark.parametrize("name", RUNS)
def test_only_the_format_at_hand_is_imported(name: str) -> None:
    path = ROOT / "fixtures" / RUNS[name]
    command = [sys.executable, "-c", SEEN, str(path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    seen = set(done.stdout.split())
    assert MARKS[name] <= seen
    others = {mark for other, marks in MARKS.items() if other != name for mark in marks}
    assert not others & seen
