"""What a machine does to a conversion: a full disk, a source that is cut or changed, two runs at once."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from ckptconv.conversion import convert
from ckptconv.errors import CkptError
from ckptconv.source import FileSource

ROOT = Path(__file__).resolve().parent.parent.parent
TARGETS = {
    "pytorch": ("run.pt", "pytorch:state-dict"),
    "safetensors": ("w.safetensors", None),
    "shards": ("w.safetensors.index.json", None),
    "neutral": ("archived", "neutral"),
    "tensorflow": ("ckpt-1", "tensorflow:tf-module"),
    "dcp": ("folder", "dcp"),
}


def source_of(folder: Path, seed: int = 1) -> Path:
    generator = np.random.default_rng(seed)
    path = folder / f"source-{seed}.safetensors"
    save_file({f"layers.{i}.weight": generator.random((256, 256), np.float32) for i in range(12)}, path)
    return path


def state(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(f.relative_to(folder)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 2 MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(disk)]
    try:
        subprocess.run(command, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("only root mounts a disk, and not everywhere")
    try:
        yield disk
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


@pytest.mark.parametrize("kind", TARGETS)
@pytest.mark.parametrize("told", [True, False])
def test_a_disk_that_is_full(
    kind: str, told: bool, tmp_path: Path, small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """3 MB of tensors; `told`: whether the system says before how much is free."""
    source, (name, to) = source_of(tmp_path), TARGETS[kind]
    before = state(source.parent)
    if not told:
        monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 1 << 40})())
    with pytest.raises(CkptError) as caught:
        convert(source, small_disk / name, to=to)
    assert [problem.code for problem in caught.value.problems] == ["no-space"]
    assert list(small_disk.iterdir()) == []
    assert state(source.parent) == before


@pytest.mark.parametrize("kind", TARGETS)
@pytest.mark.parametrize("change", ["cut", "written"])
def test_a_source_that_is_not_what_it_was(
    kind: str, change: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, (name, to) = source_of(tmp_path), TARGETS[kind]
    (tmp_path / "out").mkdir()
    read_into, reads = FileSource.read_into, [0]

    def reading(self: FileSource, offset: int, out: memoryview) -> None:
        reads[0] += len(out) > 100_000
        if reads[0] == 4:
            if change == "cut":
                os.truncate(source, 1 << 20)
            else:
                with source.open("r+b") as file:
                    file.seek(-8, os.SEEK_END)
                    file.write(b"changed!")
        read_into(self, offset, out)

    monkeypatch.setattr(FileSource, "read_into", reading)
    with pytest.raises(CkptError) as caught:
        convert(source, tmp_path / "out" / name, to=to)
    assert {problem.code for problem in caught.value.problems} <= {"source-changed", "truncated-tensor"}
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("kind", TARGETS)
@pytest.mark.parametrize("force", [False, True])
def test_of_two_conversions_to_one_target_one_wins_whole(kind: str, force: bool, tmp_path: Path) -> None:
    sources, (name, to) = [source_of(tmp_path, seed) for seed in (1, 2)], TARGETS[kind]
    whole = []
    for source in sources:
        alone = tmp_path / f"alone-{source.stem}"
        alone.mkdir()
        convert(source, alone / name, to=to)
        whole.append(state(alone))
    script = (
        "import sys, time\nfrom ckptconv.conversion import convert\nfrom ckptconv.errors import CkptError\n"
        "print('ready', flush=True)\nsys.stdin.readline()\n"
        f"try:\n    convert(sys.argv[1], sys.argv[2], to={to!r}, force={force})\n    print('done')\n"
        "except CkptError as error:\n    print(*(problem.code for problem in error.problems))\n"
    )
    for turn in range(2):
        out = tmp_path / f"out-{turn}"
        out.mkdir()
        runs = [
            subprocess.Popen(
                [sys.executable, "-c", script, str(source), str(out / name)],
                cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            )
            for source in sources
        ]  # fmt: skip
        for run in runs:
            assert run.stdout is not None
            assert run.stdout.readline() == "ready\n"
        for run in runs:
            assert run.stdin is not None
            run.stdin.write("\n")
            run.stdin.flush()
        said = sorted(run.communicate()[0].strip() for run in runs)
        now = {file: sha for file, sha in state(out).items() if file != "checkpoint"}
        ends = [{file: sha for file, sha in one.items() if file != "checkpoint"} for one in whole]
        assert now in ends, (said, now.keys())
        assert said in (["done", "target-exists"], ["done", "done"] if force else [])


@pytest.mark.slow
@pytest.mark.parametrize("kind", TARGETS)
def test_ctrl_c_ends_within_a_second_and_leaves_nothing(kind: str, tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    source, (name, to) = tmp_path / "source.safetensors", TARGETS[kind]
    save_file({f"{i}.weight": generator.random((1024, 4096), np.float32) for i in range(24)}, source)
    (tmp_path / "out").mkdir()
    to_format = ["--to", to] if to else []
    command = [
        sys.executable,
        "-m",
        "ckptconv",
        "convert",
        str(source),
        str(tmp_path / "out" / name),
        *to_format,
    ]
    run = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while run.poll() is None and not any((tmp_path / "out").iterdir()):
        time.sleep(0.005)
    run.send_signal(signal.SIGINT)
    interrupted = time.monotonic()
    _, error = run.communicate()
    if run.returncode == 0:
        pytest.skip("the conversion was faster than the signal")
    assert run.returncode == 130, error
    assert time.monotonic() - interrupted < 5  # a second on an idle machine
    assert error == "interrupted; nothing was written\n"
    assert list((tmp_path / "out").iterdir()) == []
