"""What goes wrong on the command line: a code, a location and a next step, exit 1 (2 for usage), nothing
written, and the source as it was. Most runs are in this process, where an exception that escapes fails them.
"""

from __future__ import annotations

import hashlib
import json
import os
import resource
import shutil
import signal
import stat
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ckptconv.errors import CODES
from tests.support.command import FIXTURES, ROOT, convert_here, invoke

RUN = FIXTURES / "plain" / "mlp-adamw" / "run.pt"
SGD = FIXTURES / "plain" / "linear-sgd-9-steps" / "run.pt"
FRESH = FIXTURES / "keras3" / "mlp-adamw-fresh" / "ckpt-1"
UNBUILT = FIXTURES / "keras3" / "adam-unbuilt" / "artifact" / "ckpt-1"
OTHER_MODEL = FIXTURES / "keras3" / "embedding-conv-bn-adamw" / "artifact" / "ckpt-1"
WITH_SGD = FIXTURES / "keras3" / "sgd-plain" / "artifact" / "ckpt-1"
OTHER_NAMES = FIXTURES / "tensorflow" / "bundle" / "bundle"

COMMAND = [sys.executable, "-m", "ckptconv"]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}


def snapshot(folder: Path) -> dict[str, tuple[int, str]]:
    """Every name below the folder with its kind and content."""
    found = {}
    for path in sorted(folder.rglob("*")):
        mode = path.lstat().st_mode
        content = hashlib.sha256(path.read_bytes()).hexdigest() if stat.S_ISREG(mode) else ""
        found[str(path.relative_to(folder))] = (stat.S_IFMT(mode), content)
    return found


def problems_of(shown: str) -> list[dict[str, Any]]:
    """The problems of a `--json` run, each of which must be whole."""
    problems: list[dict[str, Any]] = json.loads(shown)["problems"]
    assert problems
    for problem in problems:
        assert problem["code"] in CODES
        assert problem["loc"] or problem["code"] == "schema-invalid", problem  # the document as a whole
        assert problem["message"], problem
        assert problem["hint"].endswith((".", "'", ")")) or ":" in problem["hint"], problem
    return problems


def codes(*arguments: object, exit_code: int = 1) -> list[str]:
    """The codes for which the command leaves."""
    code, shown = invoke(*arguments, "--json")
    assert code == exit_code, shown
    return [problem["code"] for problem in problems_of(shown)]


def refused(folder: Path, *arguments: object, exit_code: int = 1) -> list[dict[str, Any]]:
    """The problems of a command that leaves everything in the folder as it was."""
    before = snapshot(folder)
    code, shown = invoke(*arguments, "--json")
    assert code == exit_code, shown
    assert snapshot(folder) == before
    return problems_of(shown)


def attempts(source: Path, folder: Path) -> list[list[object]]:
    """The commands that read a source in its whole."""
    return [
        ["validate", source],
        ["convert", source, folder / "new", "--to", "neutral"],
    ]


def copied(source: Path, folder: Path) -> Path:
    """A file or the files of a prefix in a folder of their own."""
    folder.mkdir(exist_ok=True)
    files = [source] if source.is_file() else list(source.parent.glob(f"{source.name}.*"))
    for file in files:
        shutil.copy(file, folder / file.name)
    return folder / source.name


# Truncated and flipped, every container.


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    """Container -> (what the command is given, the file that is damaged), made once, copied by each test."""
    folder = tmp_path_factory.mktemp("sources")
    convert_here(RUN, folder / "weights.safetensors")
    convert_here(RUN, folder / "archive", "--to", "neutral")
    shutil.copy(RUN, folder / "run.pt")
    copied(FRESH, folder)
    paths = {
        "pytorch": ("run.pt", "run.pt"),
        "bundle index": ("ckpt-1", "ckpt-1.index"),
        "bundle data": ("ckpt-1", "ckpt-1.data-00000-of-00001"),
        "safetensors": ("weights.safetensors", "weights.safetensors"),
    }
    for name in ("manifest.json", "weights.safetensors", "optimizer.safetensors", "state.msgpack"):
        paths[f"neutral {name}"] = ("archive", f"archive/{name}")
    return {key: (folder / given, folder / file) for key, (given, file) in paths.items()}


CONTAINERS = [
    "pytorch",
    "bundle index",
    "bundle data",
    "safetensors",
    "neutral manifest.json",
    "neutral weights.safetensors",
    "neutral optimizer.safetensors",
    "neutral state.msgpack",
]


@pytest.fixture(params=CONTAINERS)
def damaged(
    request: pytest.FixtureRequest, sources: dict[str, tuple[Path, Path]], tmp_path: Path
) -> tuple[str, Path, Path]:
    """(container, what the command is given, the file to damage) in a fresh folder."""
    given, file = sources[request.param]
    shutil.copytree(given.parent, tmp_path / "in")
    return request.param, tmp_path / "in" / given.name, tmp_path / "in" / file.relative_to(given.parent)


CHECKED_WHOLE = {
    "bundle index",
    "bundle data",
    "neutral weights.safetensors",
    "neutral optimizer.safetensors",
    "neutral state.msgpack",
}
"""Where no flipped bit goes unnoticed."""

CUT = {"truncated-file", "truncated-tensor", "corrupt-file", "unknown-format", "schema-invalid"}


def test_truncated_anywhere(damaged: tuple[str, Path, Path], tmp_path: Path) -> None:
    container, given, file = damaged
    whole = file.read_bytes()
    points = {0, 1, 7, 8, 9, 29, 30, len(whole) // 2, len(whole) - 2, len(whole) - 8}
    points.update(range(0, len(whole), max(1, len(whole) // 16)))
    for length in sorted(points):
        file.write_bytes(whole[:length])
        for arguments in attempts(given, tmp_path):
            found = {problem["code"] for problem in refused(tmp_path, *arguments)}
            assert found <= CUT, (length, found)
            if container.startswith("bundle"):
                assert "unknown-format" not in found


def test_missing(damaged: tuple[str, Path, Path], tmp_path: Path) -> None:
    _, given, file = damaged
    file.unlink()
    for arguments in attempts(given, tmp_path):
        assert {problem["code"] for problem in refused(tmp_path, *arguments)} == {"missing-file"}


def test_a_flipped_bit_anywhere_is_refused_or_makes_no_difference(
    damaged: tuple[str, Path, Path], tmp_path: Path
) -> None:
    """Containers with checksums over everything refuse each flip; the others at least never break down."""
    container, given, file = damaged
    whole = file.read_bytes()
    for position in range(0, len(whole), max(1, len(whole) // 40)):
        flipped = bytearray(whole)
        flipped[position] ^= 1 << position % 8
        file.write_bytes(flipped)
        for arguments in attempts(given, tmp_path):
            code, shown = invoke(*arguments, "--json")
            if code:
                assert code == 1, shown
                problems_of(shown)
                assert not (tmp_path / "new").exists()
                continue
            assert container not in CHECKED_WHOLE, (position, arguments[0])
            if container == "pytorch" and arguments[0] == "convert":
                # The zip's padding, times and attributes are nobody's data.
                assert values(given) == values(RUN), position
            shutil.rmtree(tmp_path / "new", ignore_errors=True)
        assert file.read_bytes() == bytes(flipped)


def values(path: Path) -> object:
    code, shown = invoke("inspect", path, "--raw", "--json", "--digest")
    assert code == 0, shown
    return json.loads(shown)["leaves"]


def test_a_flipped_bit_in_a_tensor_is_named_with_both_checksums(tmp_path: Path) -> None:
    path = Path(shutil.copy(RUN, tmp_path / "run.pt"))
    with zipfile.ZipFile(path) as archive:
        (info,) = [info for info in archive.infolist() if info.filename.endswith("/data/0")]
        content = archive.read(info)
    data = bytearray(path.read_bytes())
    data[data.index(content) + 5] ^= 16
    path.write_bytes(data)
    for target in (["w.safetensors"], ["k-1", "--template", FRESH], ["a", "--to", "neutral"]):
        (problem,) = refused(tmp_path, "convert", path, tmp_path / str(target[0]), *target[1:])
        assert problem["code"] == "checksum-mismatch"
        assert problem["message"].count("0x") == 2
        assert problem["loc"][0] == "run.pt"
    (problem,) = refused(tmp_path, "validate", path)
    assert problem["code"] == "checksum-mismatch"


def test_a_flipped_bit_in_a_bundle_tensor(tmp_path: Path) -> None:
    prefix = copied(FRESH, tmp_path / "in")
    file = Path(f"{prefix}.data-00000-of-00001")
    data = bytearray(file.read_bytes())
    data[3] ^= 1
    file.write_bytes(data)
    for arguments in attempts(prefix, tmp_path):
        (problem,) = refused(tmp_path, *arguments)
        assert problem["code"] == "checksum-mismatch"
        assert problem["loc"][0] == file.name


def test_a_flipped_bit_in_an_archive_is_found_whatever_becomes_of_the_tensor(tmp_path: Path) -> None:
    """Copied, turned, or brought back: the pass that reads it compares."""
    archive = convert_here(RUN, tmp_path / "archive", "--to", "neutral")
    for section in ("weights", "optimizer"):
        file = archive / f"{section}.safetensors"
        whole = file.read_bytes()
        file.write_bytes(whole[:-2] + bytes([whole[-2] ^ 8]) + whole[-1:])
        for target in (["k-1", "--template", FRESH], ["back.pt"], ["again", "--to", "neutral"]):
            (problem,) = refused(tmp_path, "convert", archive, tmp_path / str(target[0]), *target[1:])
            assert problem["code"] == "checksum-mismatch"
            assert problem["loc"][0] == file.name
            assert problem["message"].count("0x") == 2
        (problem,) = refused(tmp_path, "validate", archive)
        assert problem["code"] == "digest-mismatch"
        assert problem["message"].count("crc32c:") == 2
        file.write_bytes(whole)


# Templates.


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (OTHER_MODEL, {"shape-mismatch", "param-unmatched"}),
        (UNBUILT, {"template-unbuilt"}),
        (WITH_SGD, {"shape-mismatch", "param-unmatched", "optimizer-mismatch"}),
        (OTHER_NAMES, {"template-mismatch", "param-unmatched", "state-dropped"}),
        (FIXTURES / "keras3" / "record.py", {"unknown-format"}),
        (Path("nowhere"), {"missing-file"}),
        (Path("/"), {"unknown-format"}),
    ],
    ids=["other model", "unbuilt", "other optimizer", "other names", "no checkpoint", "missing", "root"],
)
def test_wrong_templates(template: Path, expected: set[str], tmp_path: Path) -> None:
    problems = refused(tmp_path, "convert", RUN, tmp_path / "out-1", "--template", template)
    assert {problem["code"] for problem in problems} == expected


@pytest.mark.parametrize("more", [["out.pt"], ["out-1", "--to", "pytorch"], ["out.safetensors"]])
def test_a_template_of_another_format_than_the_target(more: list[str], tmp_path: Path) -> None:
    target, *options = more
    (problem,) = refused(tmp_path, "convert", RUN, tmp_path / target, "--template", FRESH, *options)
    assert (problem["code"], problem["loc"]) == ("template-mismatch", ["--template"])


def test_a_missing_template_is_one_problem(tmp_path: Path) -> None:
    for dialect in ("tensorflow", "tensorflow:keras3"):
        (problem,) = refused(tmp_path, "convert", RUN, tmp_path / "out-1", "--to", dialect)
        assert (problem["code"], problem["loc"]) == ("template-required", ["--template"])


def test_a_source_spec_of_another_model(tmp_path: Path) -> None:
    target = tmp_path / "out"
    (problem,) = refused(tmp_path, "convert", RUN, target, "--to", "neutral", "--source-spec", OTHER_MODEL)
    assert problem["code"] == "template-mismatch"


@pytest.mark.parametrize("name", ["RMSprop", "NAdam", "Adagrad", "Adadelta", "Adamax", "RAdam", "Rprop"])
def test_an_optimizer_without_conversion(name: str, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    model = torch.nn.Sequential()
    model.add_module("fc1", torch.nn.Linear(8, 16))
    model.add_module("fc2", torch.nn.Linear(16, 4))
    optimizer = getattr(torch.optim, name)(model.parameters(), lr=0.01)
    model(torch.ones(2, 8)).sum().backward()
    optimizer.step()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "run.pt")
    source = tmp_path / "run.pt"
    (problem,) = refused(tmp_path, "convert", source, tmp_path / "out-1", "--template", FRESH)
    assert problem["code"] in ("optimizer-unknown", "optimizer-mismatch")
    assert problem["loc"][0] == "optimizers"
    # nothing is lost where no other framework has to read it
    convert_here(source, tmp_path / "archive", "--to", "neutral")
    convert_here(tmp_path / "archive", tmp_path / "back.pt")
    assert values(tmp_path / "back.pt") == values(source)


def test_an_optimizer_that_nobody_knows(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")

    class Own(torch.optim.Optimizer):  # type: ignore[name-defined,misc]
        def step(self) -> None:  # type: ignore[override]
            for group in self.param_groups:
                for parameter in group["params"]:
                    self.state[parameter]["wobble"] = torch.ones_like(parameter)

    model = torch.nn.Sequential()
    model.add_module("fc1", torch.nn.Linear(8, 16))
    model.add_module("fc2", torch.nn.Linear(16, 4))
    optimizer = Own(model.parameters(), {"lr": 0.01})
    optimizer.step()
    source = tmp_path / "run.pt"
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, source)
    options = ["--template", FRESH, "--set", "step=1"]
    (problem,) = refused(tmp_path, "convert", source, tmp_path / "out-1", *options)
    assert (problem["code"], problem["loc"][0]) == ("optimizer-unknown", "optimizers")
    assert "wobble" in problem["message"]
    convert_here(source, tmp_path / "weights.safetensors")


# Targets.


def targets(folder: Path) -> list[list[object]]:
    """One target of each kind: a file, files of a prefix, a directory."""
    return [
        [folder / "out.safetensors"],
        [folder / "out.pt"],
        [folder / "out-1", "--template", FRESH],
        [folder / "out", "--to", "neutral"],
    ]


def test_an_existing_target_is_refused_and_replaced_with_force(tmp_path: Path) -> None:
    for target in targets(tmp_path):
        invoke("convert", RUN, *target)
        (problem,) = refused(tmp_path, "convert", RUN, *target)
        assert problem["code"] == "target-exists"
        assert "--force" in problem["hint"]
        first = snapshot(tmp_path)
        code, shown = invoke("convert", RUN, *target, "--force")
        assert code == 0, shown
        assert snapshot(tmp_path).keys() == first.keys()


def test_force_replaces_nothing_that_is_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("x")
    (tmp_path / "out.pt").mkdir()
    os.mkfifo(tmp_path / "out.safetensors")
    for target in (["out", "--to", "neutral"], ["out.pt"], ["out.safetensors"]):
        arguments = ["convert", RUN, tmp_path / target[0], *target[1:], "--force"]
        (problem,) = refused(tmp_path, *arguments)
        assert problem["code"] == "target-exists"
        assert "--force" not in problem["hint"]


def test_no_directory_or_a_file_in_its_place(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for parent, hint in ((tmp_path / "none" / "deeper", "mkdir"), (tmp_path / "file", "file"),
                         (tmp_path / "file" / "below", "file")):  # fmt: skip
        for target in targets(parent):
            (problem,) = refused(tmp_path, "convert", RUN, *target)
            assert problem["code"] == "target-unwritable"
            assert hint in problem["hint"]


def test_a_directory_without_permission(tmp_path: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may write everywhere; see the test with another user")
    folder = tmp_path / "closed"
    folder.mkdir(mode=0o500)
    for target in targets(folder):
        (problem,) = refused(tmp_path, "convert", RUN, *target)
        assert problem["code"] == "target-unwritable"


def test_a_name_that_is_too_long(tmp_path: Path) -> None:
    long = "x" * 300
    (problem,) = refused(tmp_path, "convert", RUN, tmp_path / f"{long}.safetensors")
    assert problem["code"] == "target-unwritable"
    for command in (["inspect"], ["inspect", "--raw"], ["validate"]):
        (problem,) = refused(tmp_path, *command, tmp_path / long)
        assert problem["code"] == "missing-file"
    (problem,) = refused(tmp_path, "convert", tmp_path / long, tmp_path / "w.safetensors")
    assert problem["code"] == "missing-file"


def test_the_source_is_never_the_target(tmp_path: Path) -> None:
    source = Path(shutil.copy(RUN, tmp_path / "run.pt"))
    (tmp_path / "link.pt").symlink_to(source)
    os.link(source, tmp_path / "hard.pt")
    (problem,) = refused(tmp_path, "convert", source, source)
    assert problem["code"] == "target-exists"
    assert codes("convert", source, source, "--force", exit_code=2) == ["usage"]
    for target in ("link.pt", "hard.pt"):
        before = source.read_bytes()
        invoke("convert", source, tmp_path / target, "--force")
        assert source.read_bytes() == before
    archive = convert_here(source, tmp_path / "archive", "--to", "neutral")
    (problem,) = refused(tmp_path, "convert", archive, archive, "--to", "neutral", "--force", exit_code=2)
    assert problem["code"] == "usage"
    prefix = copied(FRESH, tmp_path / "in")
    (problem,) = refused(tmp_path, "convert", prefix, prefix, "--to", "tensorflow", "--force", exit_code=2)
    assert problem["code"] == "usage"


def _limited() -> None:
    """No file of this process may grow beyond 2000 bytes; the signal for it is ignored, as Python does."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))


def test_a_limit_on_file_sizes_is_as_a_full_disk(tmp_path: Path) -> None:
    for target in targets(tmp_path):
        done = subprocess.run(
            [*COMMAND, "convert", str(RUN), *map(str, target), "--json"],
            env=ENVIRONMENT, capture_output=True, text=True, check=False, preexec_fn=_limited,
        )  # fmt: skip
        assert done.returncode == 1, done.stdout + done.stderr
        (problem,) = problems_of(done.stdout)
        assert problem["code"] == "no-space"
        assert list(tmp_path.iterdir()) == []


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 KiB, where the system lets us mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)], capture_output=True, check=False
    )
    if mount.returncode:
        pytest.skip("no permission to mount a small file system")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk(small_disk: Path, tmp_path: Path) -> None:
    (small_disk / "filler").write_bytes(b"x" * (64 << 10))
    for target in targets(small_disk):
        (problem,) = refused(small_disk, "convert", RUN, *target)
        assert problem["code"] == "no-space"
        assert "bytes" in problem["message"]


def test_a_report_replaces_no_checkpoint(tmp_path: Path) -> None:
    source = Path(shutil.copy(RUN, tmp_path / "run.pt"))
    template = copied(FRESH, tmp_path / "fresh")
    target = tmp_path / "out-1"
    for report in (source, f"{template}.index", f"{template}.data-00000-of-00001", f"{target}.index"):
        (problem,) = refused(
            tmp_path, "convert", source, target, "--template", template, "--report", report, "--force",
            exit_code=2,
        )  # fmt: skip
        assert (problem["code"], problem["loc"]) == ("usage", ["--report"])
    (tmp_path / "report.json").write_text("mine")
    for report, code in (("report.json", "target-exists"), ("none/r.json", "target-unwritable"),
                         ("fresh", "target-unwritable")):  # fmt: skip
        (problem,) = refused(
            tmp_path, "convert", source, target, "--template", template, "--report", tmp_path / report
        )
        assert (problem["code"], problem["loc"]) == (code, ["--report"])


# Paths that are no checkpoints.


def no_checkpoints(folder: Path) -> dict[str, tuple[object, str]]:
    (folder / "directory").mkdir()
    (folder / "empty").write_bytes(b"")
    (folder / "text.txt").write_text("hello\nworld\n")
    (folder / "json.json").write_text('{"a": 1}')
    (folder / "dangling.pt").symlink_to(folder / "gone")
    (folder / "loop").symlink_to(folder / "loop")
    os.mkfifo(folder / "pipe")
    with zipfile.ZipFile(folder / "archive.zip", "w") as archive:
        archive.writestr("readme.txt", "hello")
    np.savez(folder / "arrays.npz", a=np.arange(3))
    return {
        "a directory": (folder / "directory", "unknown-format"),
        "an empty file": (folder / "empty", "unknown-format"),
        "a text": (folder / "text.txt", "unknown-format"),
        "a JSON file": (folder / "json.json", "unknown-format"),
        "a dangling link": (folder / "dangling.pt", "missing-file"),
        "a link to itself": (folder / "loop", "missing-file"),
        "a pipe": (folder / "pipe", "unknown-format"),
        "a device": ("/dev/null", "unknown-format"),
        "an endless device": ("/dev/zero", "unknown-format"),
        "another archive": (folder / "archive.zip", "unknown-format"),
        "arrays": (folder / "arrays.npz", "unknown-format"),
        "standard input": ("-", "missing-file"),
        "a URL": ("memory://bucket/run.pt", "missing-file"),
        "nothing": (folder / "nothing", "missing-file"),
        "below a file": (folder / "text.txt" / "run.pt", "missing-file"),
        "root": ("/", "unknown-format"),
    }


def test_paths_that_are_no_checkpoints(tmp_path: Path) -> None:
    for name, (path, expected) in no_checkpoints(tmp_path).items():
        for arguments in (
            ["inspect", path],
            ["inspect", path, "--raw"],
            ["validate", path],
            ["convert", path, tmp_path / "w.safetensors"],
            ["plan", path, tmp_path / "w.safetensors"],
            ["convert", RUN, tmp_path / "out-1", "--template", path],
            ["convert", RUN, tmp_path / "out", "--to", "neutral", "--source-spec", path],
        ):
            (problem,) = refused(tmp_path, *arguments)
            assert problem["code"] == expected, (name, arguments, problem)


def test_a_forced_format_that_it_is_not(tmp_path: Path) -> None:
    for format_ in ("neutral", "tensorflow", "safetensors"):
        (problem,) = refused(tmp_path, "convert", RUN, tmp_path / "w", "--to", "neutral", "--from", format_)
        assert problem["code"] == "unknown-format"
    (problem,) = refused(tmp_path, "inspect", tmp_path / "none", "--from", "pytorch")
    assert problem["code"] == "missing-file"


NAMES = [
    "with a space",
    "ünïcode-名前",
    "line\nbreak",
    "-dash",
    "'quotes\"",
    "a*b?[c]",
    "$HOME;ls",
    "x" * 200,
]


@pytest.mark.parametrize("name", NAMES)
def test_names_of_all_kinds(name: str, tmp_path: Path) -> None:
    shutil.copy(RUN, tmp_path / f"{name}.pt")
    (tmp_path / "link.pt").symlink_to(tmp_path / f"{name}.pt")
    for source in (tmp_path / f"{name}.pt", tmp_path / "link.pt"):
        for target in targets(tmp_path / "out"):
            (tmp_path / "out").mkdir(exist_ok=True)
            path, *options = target
            assert isinstance(path, Path)
            new = path.with_name(path.name.replace("out", name))
            code, shown = invoke("convert", source, new, *options)
            assert code == 0, shown
            for command in (["inspect"], ["validate"], ["inspect", "--raw"]):
                code, shown = invoke(*command, new)
                assert code == 0, shown
        shutil.rmtree(tmp_path / "out")


# Usage.


@pytest.mark.parametrize(
    "options",
    [
        ["--set", "step=-1"],
        ["--set", "step=1e3"],
        ["--set", "step=1_000"],
        ["--set", "step=9.5"],
        ["--set", "step=٩"],
        ["--set", "step=nan"],
        ["--set", "step=" + "9" * 5000],
        ["--set", "epochs=inf"],
        ["--set", "epochs=-1"],
        ["--set", "epoch_convention=other"],
        ["--set", "learning_rate=nan"],
        ["--set", "learning_rate=1e400"],
        ["--set", "nonsense=1"],
        ["--dtype", "float33"],
        ["--dtype", "int8"],
        ["--dtype", ""],
        ["--allow", "everything"],
        ["--allow", ""],
        ["--to", ""],
        ["--to", ":"],
        ["--to", "safetensors:other"],
        ["--from", ""],
        ["--from", "onnx"],
    ],
    ids=lambda options: " ".join(options)[:30],
)
def test_wrong_options(options: list[str], tmp_path: Path) -> None:
    (problem,) = refused(tmp_path, "convert", RUN, tmp_path / "out.safetensors", *options, exit_code=2)
    assert problem["code"] == "usage"
    assert len(problem["message"]) < 300


def test_selections_that_leave_nothing(tmp_path: Path) -> None:
    target = tmp_path / "out.safetensors"
    for options in (["--only", "zzz*"], ["--only", ""], ["--only", "["], ["--exclude", "*"],
                    ["--only", "fc1.*", "--exclude", "fc1*"]):  # fmt: skip
        (problem,) = refused(tmp_path, "convert", RUN, target, *options)
        assert problem["code"] == "mapping-invalid"


def test_a_target_that_tells_no_format(tmp_path: Path) -> None:
    for target in ("x", "x/y/z", "/", ".", "..", "", "run.unknown"):
        (problem,) = refused(tmp_path, "convert", RUN, target, exit_code=2)
        assert (problem["code"], problem["loc"]) == ("usage", ["--to"])
    (problem,) = refused(tmp_path, "convert", RUN, "-", "--to", "safetensors", exit_code=2)
    assert problem["code"] == "usage"
    (problem,) = refused(tmp_path, "convert", RUN, "nosuchthing://bucket/w.safetensors", exit_code=2)
    assert problem["code"] == "usage"


WRONG = [
    ["convert"],
    ["convert", "x"],
    ["inspect"],
    ["inspect", "a", "b"],
    ["validate"],
    ["--nonsense"],
    ["nope"],
    ["convert", "a", "b", "--jobs", "0"],
    ["convert", "a", "b", "--jobs", "x"],
    ["inspect", "a\0b"],
]


@pytest.mark.parametrize("arguments", WRONG, ids=" ".join)
def test_wrong_arguments(arguments: list[str]) -> None:
    code, shown = invoke(*arguments)
    assert code == 2
    assert "Traceback" not in shown


@pytest.mark.parametrize("step", [2**63, 2**64, 10**30])
def test_a_step_that_no_counter_holds(step: int, tmp_path: Path) -> None:
    options = ["--template", FRESH, "--set", f"step={step}"]
    problems = refused(tmp_path, "convert", RUN, tmp_path / "out-1", *options)
    assert {problem["code"] for problem in problems} == {"progress-range"}
    problems = refused(tmp_path, "convert", RUN, tmp_path / "out.pt", "--set", f"step={step + 1}")
    assert {problem["code"] for problem in problems} == {"progress-range"}


# Missing progress.


def test_progress_that_a_target_needs(tmp_path: Path) -> None:
    template = FIXTURES / "keras3" / "sequential-adam" / "artifact" / "ckpt-1"
    problems = refused(tmp_path, "convert", SGD, tmp_path / "out-1", "--template", template)
    assert problems
    (problem,) = refused(tmp_path, "validate", SGD, "--require", "step")
    assert (problem["code"], problem["loc"]) == ("requirement-missing", ["progress", "step"])
    (problem,) = refused(tmp_path, "validate", SGD, "--require", "steps", exit_code=2)
    assert problem["code"] == "usage"


# Signals and streams, in processes of their own.


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of 192 MiB that converts long enough to be interrupted."""
    torch = pytest.importorskip("torch")
    path = tmp_path_factory.mktemp("large") / "large.pt"
    torch.save({f"w{i}": torch.full((4 << 20,), float(i)) for i in range(12)}, path)
    return path


@pytest.mark.slow
@pytest.mark.parametrize("interrupt", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_in_the_middle(interrupt: signal.Signals, large: Path, tmp_path: Path) -> None:
    digest = hashlib.sha256(large.read_bytes()).hexdigest()
    command = [*COMMAND, "convert", str(large), str(tmp_path / "out.safetensors"), "--jobs", "1"]
    process = subprocess.Popen(
        command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 60
    while not any(path.stat().st_size for path in tmp_path.rglob("*.safetensors")):
        assert process.poll() is None, "it was over before it could be interrupted"
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(interrupt)
    shown, problems = process.communicate(timeout=60)
    assert "Traceback" not in problems
    assert list(tmp_path.iterdir()) == []
    assert shown == ""
    assert process.returncode == (130 if interrupt == signal.SIGINT else 143)
    assert hashlib.sha256(large.read_bytes()).hexdigest() == digest


def in_shell(line: str) -> subprocess.CompletedProcess[str]:
    words = " ".join(COMMAND)
    return subprocess.run(
        ["bash", "-c", f"set -o pipefail; {line.replace('CKPTCONV', words)}"],
        env=ENVIRONMENT, capture_output=True, text=True, check=False,
    )  # fmt: skip


@pytest.mark.parametrize("command", ["inspect {}", "inspect {} --raw", "inspect {} --json", "formats"])
def test_a_broken_pipe(command: str) -> None:
    done = in_shell(f"CKPTCONV {command.format(RUN)} | true")
    assert done.returncode in (0, 141), done.stderr
    assert done.stderr == ""
    done = in_shell(f"CKPTCONV {command.format(RUN)} > /dev/full")
    assert "Traceback" not in done.stderr
    assert done.returncode == 1


def test_a_broken_pipe_for_problems(tmp_path: Path) -> None:
    for redirect in ("2>&1 | true", "2> /dev/full", "2>&-"):
        done = in_shell(f"CKPTCONV inspect {tmp_path / 'none'} {redirect}")
        assert done.returncode in (1, 141)
        assert "Traceback" not in done.stderr


def _nobody() -> None:
    os.setgid(65534)
    os.setuid(65534)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_another_user_without_permission(tmp_path: Path) -> None:
    """Directories and files that may not be entered, read or written."""
    for folder in [tmp_path, *tmp_path.parents][:3]:
        folder.chmod(0o755)
    if not readable_by_others(ROOT) or not readable_by_others(Path(sys.executable)):
        pytest.skip("another user cannot run the tests' Python here")
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o700)
    hidden, unreadable = Path(shutil.copy(RUN, closed)), Path(shutil.copy(RUN, tmp_path / "unreadable.pt"))
    unreadable.chmod(0o600)
    before = snapshot(tmp_path)
    for arguments, code in (
        (["inspect", hidden], "missing-file"),
        (["inspect", unreadable], "missing-file"),
        (["validate", unreadable], "missing-file"),
        (["convert", RUN, tmp_path / "w.safetensors"], "target-unwritable"),
        (["convert", RUN, closed / "w.safetensors"], "target-unwritable"),
    ):
        done = subprocess.run(
            [*COMMAND, *map(str, arguments), "--json"],
            env=ENVIRONMENT, cwd="/", capture_output=True, text=True, check=False, preexec_fn=_nobody,
        )  # fmt: skip
        assert done.returncode == 1, done.stdout + done.stderr
        (problem,) = problems_of(done.stdout)
        assert problem["code"] == code, problem
    assert snapshot(tmp_path) == before


def readable_by_others(path: Path) -> bool:
    real = path.resolve()
    return all(p.stat().st_mode & 0o001 for p in [*real.parents, *path.absolute().parents]) and bool(
        real.stat().st_mode & 0o004
    )
