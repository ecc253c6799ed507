"""Neither the library nor any command imports a framework, and the library imports nothing that prints.

Each run has an import hook that records every attempt, so that a `try: import torch` is seen as well, whether
or not the framework is installed.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
RUN = ROOT / "fixtures" / "plain" / "mlp-adamw" / "run.pt"
FRESH = ROOT / "fixtures" / "keras3" / "mlp-adamw-fresh" / "ckpt-1"
FRAMEWORKS = ["torch", "tensorflow", "keras", "tf_keras", "jax", "flax", "orbax", "transformers", "lightning"]

WATCH = """
import json, sys

class Watch:
    seen = []
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in WATCHED:
            self.seen.append(name)

WATCHED = set(json.loads(sys.argv.pop(1)))
sys.meta_path.insert(0, Watch())
code = 0
try:
    exec(sys.argv.pop(1))
except SystemExit as leaving:
    code = leaving.code
print(json.dumps({"code": code, "seen": Watch.seen}), file=sys.stderr)
"""


def attempts(statement: str, *arguments: str, watched: list[str]) -> tuple[int, list[str]]:
    """(exit code, watched modules that a fresh interpreter tried to import)."""
    command = [sys.executable, "-c", WATCH, json.dumps(watched), statement, *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    last = json.loads(done.stderr.splitlines()[-1])
    return last["code"] or 0, last["seen"]


def test_the_library_imports_no_framework_and_no_command_line() -> None:
    everything = "import ckptconv, ckptconv.conversion, ckptconv.schema, ckptconv.engine, ckptconv.mapping"
    assert attempts(everything, watched=[*FRAMEWORKS, "typer", "rich"]) == (0, [])


def test_the_adapters_import_their_framework_only_when_called() -> None:
    statement = (
        "import ckptconv; from ckptconv.adapters import keras, pytorch; ckptconv.pytorch, ckptconv.keras"
    )
    assert attempts(statement, watched=FRAMEWORKS) == (0, [])


def test_help_needs_no_array_library() -> None:
    code, seen = attempts("from ckptconv.cli import main; main()", "--help", watched=[*FRAMEWORKS, "numpy"])
    assert (code, seen) == (0, [])


@pytest.fixture(scope="module")
def neutral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("neutral") / "archived"
    done = subprocess.run(
        [sys.executable, "-m", "ckptconv", "convert", str(RUN), str(target), "--to", "neutral"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return target


COMMANDS = {
    "inspect": ["inspect", "SRC"],
    "inspect-json": ["inspect", "SRC", "--json"],
    "raw": ["inspect", "SRC", "--raw", "--digest", "--json"],
    "to-neutral": ["convert", "SRC", "OUT", "--to", "neutral"],
    "to-safetensors": ["convert", "SRC", "OUT.safetensors"],
    "neutral-to-torch": ["convert", "NEUTRAL", "OUT.pt", "--to", "pytorch"],
    "to-tensorflow": ["convert", "SRC", "OUT", "--template", "FRESH"],
    "tensorflow": ["inspect", "FRESH"],
    "plan": ["plan", "SRC", "OUT", "--to", "neutral"],
    "validate": ["validate", "NEUTRAL", "--require", "step"],
    "validate-torch": ["validate", "SRC"],
    "formats": ["formats"],
    "help": ["--help"],
}


@pytest.mark.parametrize("name", COMMANDS)
def test_no_command_imports_a_framework(name: str, neutral: Path, tmp_path: Path) -> None:
    places = {"SRC": str(RUN), "NEUTRAL": str(neutral), "FRESH": str(FRESH)}
    arguments = [
        str(tmp_path / a.lower()) if a.startswith("OUT") else places.get(a, a) for a in COMMANDS[name]
    ]
    statement = "from ckptconv.cli import main; main()"
    assert attempts(statement, *arguments, watched=FRAMEWORKS) == (0, [])
