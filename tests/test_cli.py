"""The command line as a user meets it: exit codes, streams, JSON, pipes, terminals, Ctrl-C."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import pty
import select
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ckptconv.schema import schema_problems

ROOT = Path(__file__).resolve().parent.parent
RUN = ROOT / "fixtures" / "plain" / "mlp-adamw" / "run.pt"
FRESH = ROOT / "fixtures" / "keras3" / "mlp-adamw-fresh" / "ckpt-1"
COMMAND = [sys.executable, "-m", "ckptconv"]


def run(*arguments: object, cwd: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *map(str, arguments)],
        cwd=cwd or ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def codes(done: subprocess.CompletedProcess[str]) -> list[str]:
    """Codes of the problems that a `--json` command printed."""
    assert done.stderr == ""
    return [problem["code"] for problem in json.loads(done.stdout)["problems"]]


def on_terminal(*arguments: object, columns: int = 80) -> tuple[int, str]:
    """(exit code, everything shown) of a command whose three streams are a terminal."""
    master, slave = pty.openpty()
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TERM": "xterm-256color", "COLUMNS": str(columns)}
    process = subprocess.Popen(
        [*COMMAND, *map(str, arguments)], cwd=ROOT, env=environment, stdin=slave, stdout=slave, stderr=slave
    )
    os.close(slave)
    shown = b""
    while True:
        select.select([master], [], [])
        try:
            piece = os.read(master, 65536)
        except OSError as error:
            if error.errno != errno.EIO:  # Linux's end of file of a terminal
                raise
            break
        if not piece:
            break
        shown += piece
    os.close(master)
    return process.wait(), shown.decode()


def tree_digest(directory: Path) -> dict[str, str]:
    return {
        str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


# inspect


def test_inspect_shows_step_and_source_on_stdout_alone() -> None:
    done = run("inspect", RUN)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.index("Progress") < done.stdout.index("Optimizer") < done.stdout.index("Parameters")
    assert "\x1b" not in done.stdout


def test_inspect_on_a_terminal_is_coloured_and_fits() -> None:
    code, shown = on_terminal("inspect", RUN)
    assert code == 0
    assert "\x1b[" in shown


def test_inspect_json_is_a_valid_document() -> None:
    done = run("inspect", RUN, "--json")
    document = json.loads(done.stdout)
    assert (done.returncode, done.stderr) == (0, "")
    assert schema_problems(document, "checkpoint") == []
    assert document["progress"]["step"]["status"] == "recorded"


def test_inspect_reads_a_bundle_by_its_prefix() -> None:
    document = json.loads(run("inspect", FRESH, "--json").stdout)
    assert document["provenance"]["format"] == "tensorflow"
    assert document["optimizers"][0]["algorithm"] == "adamw"


def test_raw_digests_are_those_of_the_arrays() -> None:
    torch = pytest.importorskip("torch")
    listing = json.loads(run("inspect", RUN, "--raw", "--digest", "--json").stdout)
    assert list(listing) == ["format", "dialect", "leaves"]
    leaves = {leaf.pop("key"): leaf for leaf in listing["leaves"]}

    def expected(node: object, key: str) -> dict[str, dict[str, object]]:
        if isinstance(node, torch.Tensor):
            array = node.detach().contiguous().numpy()
            return {
                key: {
                    "dtype": str(node.dtype).removeprefix("torch."),
                    "shape": list(node.shape),
                    "sha256": hashlib.sha256(array.tobytes()).hexdigest(),
                }
            }
        items = (
            node.items()
            if isinstance(node, dict)
            else enumerate(node)
            if isinstance(node, (list, tuple))
            else None
        )
        if items is None:
            return {key: {"value": node}}
        found: dict[str, dict[str, object]] = {}
        for name, part in items:
            found |= expected(part, f"{key}/{name}" if key else str(name))
        return found

    plain = {
        key: leaf for key, leaf in leaves.items() if "@" not in key and "empty" not in str(leaf.get("value"))
    }
    assert plain == expected(torch.load(RUN, weights_only=True), "")


def test_raw_without_digest_reads_no_tensor() -> None:
    leaves = json.loads(run("inspect", RUN, "--raw", "--json").stdout)["leaves"]
    assert not any("sha256" in leaf for leaf in leaves)
    assert run("inspect", RUN, "--raw").returncode == 0


def test_digest_alone_is_wrong_usage() -> None:
    assert run("inspect", RUN, "--digest").returncode == 2


# convert


def test_convert_writes_and_says_how_to_go_on(tmp_path: Path) -> None:
    before = tree_digest(RUN.parent), tree_digest(FRESH.parent)
    done = run("convert", RUN, tmp_path / "ckpt-1", "--template", FRESH)
    assert (done.returncode, done.stderr) == (0, "")
    assert "adamw" in done.stdout
    assert "step" in done.stdout
    assert {"ckpt-1.index", "ckpt-1.data-00000-of-00001"} <= {path.name for path in tmp_path.iterdir()}
    assert (tree_digest(RUN.parent), tree_digest(FRESH.parent)) == before
    step = json.loads(run("inspect", tmp_path / "ckpt-1", "--json").stdout)["progress"]["step"]
    assert step["value"] == json.loads(run("inspect", RUN, "--json").stdout)["progress"]["step"]["value"]


def test_plan_and_dry_run_write_nothing(tmp_path: Path) -> None:
    for arguments in (("plan",), ("convert", "--dry-run")):
        command, *flags = arguments
        done = run(command, RUN, tmp_path / "out", "--to", "neutral", *flags)
        assert (done.returncode, done.stderr) == (0, "")
        assert list(tmp_path.iterdir()) == []


def test_a_plan_that_cannot_be_carried_out_exits_with_1(tmp_path: Path) -> None:
    done = run("plan", RUN, tmp_path / "ckpt-1", "--to", "tensorflow:keras3", "--json")
    assert done.returncode == 1
    assert "template-required" in [p["code"] for p in json.loads(done.stdout)["problems"]]


def test_the_report_is_valid_and_whole(tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    done = run("convert", RUN, tmp_path / "archived", "--to", "neutral", "--report", report, "--json")
    assert (done.returncode, done.stderr) == (0, "")
    written = json.loads(report.read_text())
    assert schema_problems(written, "report") == []
    assert written == json.loads(done.stdout)
    assert written["ledger"]


def test_a_report_does_not_replace_a_file_unless_forced(tmp_path: Path) -> None:
    precious = tmp_path / "run.pt"
    shutil.copy(RUN, precious)
    arguments = ("convert", RUN, tmp_path / "archived", "--to", "neutral", "--report", precious, "--json")
    done = run(*arguments)
    assert (done.returncode, codes(done)) == (1, ["target-exists"])
    assert precious.read_bytes() == RUN.read_bytes()
    assert not (tmp_path / "archived").exists()
    assert run(*arguments, "--force").returncode == 0
    assert json.loads(precious.read_text())["schema"] == "ckptconv/report"


def test_verbose_shows_every_item(tmp_path: Path) -> None:
    done = run("convert", RUN, tmp_path / "archived", "--to", "neutral", "--verbose")
    for name in json.loads(run("inspect", RUN, "--json").stdout)["params"]:
        assert name["name"] in done.stdout


def test_an_existing_target_is_refused_without_force(tmp_path: Path) -> None:
    target = tmp_path / "w.safetensors"
    assert run("convert", RUN, target).returncode == 0
    before = target.read_bytes()
    done = run("convert", RUN, target, "--json")
    assert (done.returncode, codes(done)) == (1, ["target-exists"])
    assert target.read_bytes() == before
    assert run("convert", RUN, target, "--force").returncode == 0


# problems


def test_problems_go_to_stderr_and_nothing_to_stdout(tmp_path: Path) -> None:
    done = run("inspect", tmp_path / "missing.pt")
    assert (done.returncode, done.stdout) == (1, "")
    first, *rest = done.stderr.splitlines()
    assert first.startswith("missing-file: ")
    assert rest[-1].startswith("  → ")
    assert "\x1b" not in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("command", [["inspect"], ["validate"], ["inspect", "--raw"]])
def test_problems_as_json_go_to_stdout_alone(command: list[str], tmp_path: Path) -> None:
    done = run(*command, tmp_path / "missing.pt", "--json")
    assert (done.returncode, codes(done)) == (1, ["missing-file"])


@pytest.mark.parametrize("content", [b"", b"\x00" * 100, b"PK\x03\x04", b"{}", b"not a checkpoint"])
def test_what_is_no_checkpoint_is_a_problem_not_a_traceback(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "x.bin"
    path.write_bytes(content)
    for command in (["inspect"], ["inspect", "--raw"], ["validate"]):
        done = run(*command, path)
        assert done.returncode == 1
        assert "Traceback" not in done.stderr


# usage


@pytest.mark.parametrize(
    ("arguments", "near"),
    [
        (["--set", "step=abc"], "abc"),
        (["--set", "step"], "FIELD=VALUE"),
        (["--set", "step="], "FIELD=VALUE"),
        (["--set", "step=1", "--set", "step=2"], "twice"),
        (["--set", "step=-1"], "-1"),
        (["--set", "stepp=9"], "'step'"),
        (["--set", "epoch=2"], "'epochs'"),
        (["--allow", "precision-los"], "'precision-loss'"),
        (["--to", "pytorh"], "'pytorch'"),
        (["--from", "pytorch:plane"], "'plain'"),
        (["--dtype", "bfloat15"], "'bfloat16'"),
        (["--jobs", "0"], "--jobs"),
        (["--nonsense"], "--nonsense"),
    ],
)
def test_wrong_usage_exits_with_2_and_names_what_is_near(
    arguments: list[str], near: str, tmp_path: Path
) -> None:
    done = run("convert", RUN, tmp_path / "out.safetensors", *arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert near in done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_no_command_shows_help_and_an_unknown_one_is_wrong_usage() -> None:
    assert "inspect" in run().stdout + run().stderr
    assert run("convrt").returncode == 2
    for command in ("inspect", "convert", "plan", "validate", "formats"):
        done = run(command, "--help")
        assert (done.returncode, done.stderr) == (0, "")
        assert "xample" in done.stdout


def test_every_option_has_help_with_an_example() -> None:
    from tests.test_readme import options

    for command, flag, text in options():
        name = flag.split()[0]
        assert f"{name}" in text or "e.g." in text or "ckptconv" in text, (command, flag)


# validate, formats


def test_validate_is_a_gate(tmp_path: Path) -> None:
    done = run("validate", RUN, "--require", "step,learning_rate")
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(run("validate", RUN, "--json").stdout) == {"problems": []}
    done = run("validate", RUN, "--require", "step, tokens", "--json")
    assert (done.returncode, codes(done)) == (1, ["requirement-missing"])
    done = run("validate", RUN, "--require", "stepp", "--json")
    assert (done.returncode, codes(done)) == (2, ["usage"])


def test_validate_takes_a_manifest_that_inspect_printed(tmp_path: Path) -> None:
    manifest = tmp_path / "manifest.json"
    manifest.write_text(run("inspect", RUN, "--json").stdout)
    assert run("validate", manifest).returncode == 0
    document = json.loads(manifest.read_text())
    document["progress"].pop("step")
    manifest.write_text(json.dumps(document))
    done = run("validate", manifest, "--json")
    assert (done.returncode, set(codes(done))) == (1, {"schema-invalid"})


def test_formats_lists_what_the_registries_hold() -> None:
    listing = json.loads(run("formats", "--json").stdout)
    names = {entry["name"] for entry in listing["formats"]}
    assert {"pytorch", "tensorflow", "safetensors", "neutral"} <= names
    assert {"sgd", "adam", "adamw"} <= {entry["algorithm"] for entry in listing["optimizers"]}
    shown = run("formats").stdout
    assert all(name in shown for name in names)


# streams and signals


def test_a_reader_that_goes_away_is_no_failure() -> None:
    shell = f"set -o pipefail; {' '.join(COMMAND)} inspect {RUN} --raw --json | head -n 1"
    done = subprocess.run(["bash", "-c", shell], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    closed = subprocess.run(
        ["bash", "-c", f"{' '.join(COMMAND)} inspect {RUN} >&-"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert "Traceback" not in closed.stderr


def test_output_survives_an_encoding_that_lacks_the_characters(tmp_path: Path) -> None:
    done = run("inspect", tmp_path / "fehlt-ü.pt", PYTHONIOENCODING="ascii")
    assert done.returncode == 1
    assert "missing-file" in done.stderr


INTERRUPTED = """
import importlib, os, signal

module = importlib.import_module("ckptconv.conversion")
real = module.convert

def interrupted(*arguments, **options):
    def midway(done, total):
        os.kill(os.getpid(), signal.SIGINT)
    return real(*arguments, **(options | {"progress": midway}))

module.convert = interrupted
from ckptconv.cli import main
main()
"""


def test_ctrl_c_exits_with_130_and_leaves_nothing(tmp_path: Path) -> None:
    target = tmp_path / "out.safetensors"
    command = [sys.executable, "-c", INTERRUPTED, "convert", str(RUN), str(target)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "interrupted; nothing was written\n")
    assert list(tmp_path.iterdir()) == []


def test_no_progress_bar_in_a_pipe_and_one_on_a_terminal(tmp_path: Path) -> None:
    done = run("convert", RUN, tmp_path / "a.safetensors")
    assert done.stderr == ""
    code, shown = on_terminal("convert", RUN, tmp_path / "b.safetensors")
    assert code == 0
    assert "converting run.pt" in shown
