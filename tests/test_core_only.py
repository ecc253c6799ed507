"""The whole command line with the core dependencies alone: no framework is installed there, none is imported.

The slow test makes a virtual environment, installs the project into it without extras, and runs every command
in one process. The quick one runs the same commands with the Python of the tests.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
RUN = ROOT / "fixtures" / "plain" / "mlp-adamw" / "run.pt"
KERAS = ROOT / "fixtures" / "keras3" / "mlp-adamw-fresh" / "ckpt-1"
TF_KERAS = ROOT / "fixtures" / "tf-keras" / "sequential-adam" / "artifact" / "ckpt-1"
FRAMEWORKS = ["torch", "tensorflow", "keras", "tf_keras", "jax", "flax", "lightning", "transformers", "h5py"]

IN_ONE_PROCESS = """
import contextlib, importlib.util, io, json, sys
from ckptconv.cli import main

watched, runs = json.loads(sys.argv[1]), []
for arguments in json.loads(sys.argv[2]):
    sys.argv = ["ckptconv", *arguments]
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main()
            code = 0
        except SystemExit as leaving:
            code = leaving.code or 0
    loaded = sorted({name.partition(".")[0] for name in sys.modules} & set(watched))
    runs.append({"code": code, "out": out.getvalue(), "err": err.getvalue(), "loaded": loaded})
installed = [name for name in watched if importlib.util.find_spec(name)]
print(json.dumps({"runs": runs, "installed": installed, "file": main.__code__.co_filename}))
"""


def commands(folder: Path) -> dict[str, list[str]]:
    """Every command and both directions of the main job, in an order in which each finds what it reads."""
    torch, keras, archive = folder / "back.pt", folder / "out-1", folder / "archive"
    settled = ["--set", "epochs=3", "--set", "epoch_convention=last"]
    wanted: dict[str, list[object]] = {
        "version": ["--version"],
        "inspect a torch file": ["inspect", RUN],
        "its document": ["inspect", RUN, "--json"],
        "its leaves": ["inspect", RUN, "--raw", "--digest"],
        "its leaves as JSON": ["inspect", RUN, "--raw", "--digest", "--json"],
        "all its tensors": ["inspect", RUN, "--tensors"],
        "inspect a bundle": ["inspect", KERAS],
        "its leaves, too": ["inspect", KERAS, "--raw", "--digest"],
        "inspect a legacy one": ["inspect", TF_KERAS],
        "plan": ["plan", RUN, keras, "--template", KERAS],
        "torch to Keras": ["convert", RUN, keras, "--template", KERAS, "--report", folder / "report.json"],
        "Keras to torch": ["convert", keras, torch, "--template", RUN, *settled],
        "torch to safetensors": ["convert", RUN, folder / "torch.safetensors"],
        "Keras to safetensors": ["convert", keras, folder / "keras.safetensors", "--dtype", "bfloat16"],
        "inspect safetensors": ["inspect", folder / "torch.safetensors"],
        "torch to neutral": ["convert", RUN, archive, "--to", "neutral"],
        "neutral to torch": ["convert", archive, folder / "again.pt"],
        "Keras to neutral": ["convert", keras, folder / "keras-archive", "--to", "neutral"],
        "neutral to Keras": ["convert", folder / "keras-archive", folder / "again-1", "--to", "tensorflow"],
        "neutral to Keras, crossing": ["convert", archive, folder / "cross-1", "--template", KERAS],
        "replace": ["convert", RUN, torch, "--force", "--jobs", "2", "--keep"],
        "validate torch": ["validate", RUN, "--require", "step,learning_rate"],
        "validate a bundle": ["validate", keras, "--require", "step"],
        "validate neutral": ["validate", archive, "--require", "step,learning_rate"],
        "validate safetensors": ["validate", folder / "torch.safetensors", "--json"],
        "formats": ["formats"],
        "formats as JSON": ["formats", "--json"],
        "help": ["--help"],
    }
    for command in ("inspect", "convert", "plan", "validate", "formats"):
        wanted[f"help of {command}"] = [command, "--help"]
    return {name: [str(argument) for argument in arguments] for name, arguments in wanted.items()}


FAILING = {
    "a problem": (["inspect", "nowhere.pt"], 1),
    "a problem of a plan": (["plan", str(RUN), "out", "--to", "tensorflow"], 1),
    "a requirement": (["validate", str(RUN), "--require", "tokens"], 1),
    "wrong usage": (["convert", str(RUN)], 2),
    "a wrong option": (["convert", str(RUN), "out.safetensors", "--allow", "everything"], 2),
}


def clean_environment() -> dict[str, str]:
    """Ours without what would lead another Python to our modules."""
    return {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}


def check(python: Path, folder: Path, **environment: str) -> dict[str, object]:
    """Run everything in one process of that Python; the process's own account, after its checks."""
    good = commands(folder)
    arguments = [*good.values(), *(arguments for arguments, _ in FAILING.values())]
    done = subprocess.run(
        [str(python), "-c", IN_ONE_PROCESS, json.dumps(FRAMEWORKS), json.dumps(arguments)],
        cwd=folder, capture_output=True, text=True, check=False,
        env={**clean_environment(), **environment},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    account: dict[str, object] = json.loads(done.stdout.splitlines()[-1])
    runs = account["runs"]
    assert isinstance(runs, list)
    expected = [*((name, 0) for name in good), *((name, code) for name, (_, code) in FAILING.items())]
    for (name, code), run in zip(expected, runs, strict=True):
        assert run["code"] == code, (name, run["out"], run["err"])
        assert run["loaded"] == [], name
        assert "Traceback" not in run["err"], name
        assert bool(run["err"]) == bool(code), (name, run["err"])
    shown = {name: run["out"] for (name, _), run in zip(expected, runs, strict=True)}
    assert json.loads(shown["its document"])["progress"]["step"]["value"] == 9
    assert leaves(folder / "again.pt", shown) == leaves(RUN, shown)
    return account


def leaves(path: Path, shown: dict[str, str]) -> object:
    """Every leaf of a torch file with its digest; read with the Python of the tests."""
    if path == RUN:
        return json.loads(shown["its leaves as JSON"])["leaves"]
    done = subprocess.run(
        [sys.executable, "-m", "ckptconv", "inspect", str(path), "--raw", "--digest", "--json"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    return json.loads(done.stdout)["leaves"]


@pytest.fixture(scope="session")
def core_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of a fresh environment with the project's core dependencies, and nothing else."""
    folder = tmp_path_factory.mktemp("core")
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    subprocess.run(
        [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", str(ROOT)],
        check=True, cwd=folder,
    )  # fmt: skip
    return python


@pytest.mark.slow
def test_the_whole_command_line_with_core_dependencies_alone(core_python: Path, tmp_path: Path) -> None:
    account = check(core_python, tmp_path)
    assert account["installed"] == []
    assert "site-packages" in Path(str(account["file"])).parts
    script = core_python.with_name("ckptconv")
    done = subprocess.run(
        [str(script), "inspect", str(RUN)],
        cwd=tmp_path, env=clean_environment(), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")


def test_no_framework_in_the_process_of_any_command(tmp_path: Path) -> None:
    check(Path(sys.executable), tmp_path, PYTHONPATH=str(ROOT))
