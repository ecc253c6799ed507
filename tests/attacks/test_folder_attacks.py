"""Damaged and hostile folders of trainers: an error of ours or a document, never a traceback or a hang."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import ckptconv
from ckptconv.errors import CODES, CkptError
from tests.support.command import FIXTURES

FOLDERS = (
    FIXTURES / "hf-trainer" / "two-groups" / "checkpoint",
    FIXTURES / "hf-trainer" / "sharded" / "checkpoint",
    FIXTURES / "accelerate" / "two-models" / "state",
)
FILES = [(folder, file.name) for folder in FOLDERS for file in sorted(folder.iterdir())]
HOSTILE: dict[str, bytes] = {
    "empty": b"",
    "object": b"{}",
    "list": b"[]",
    "nesting": b"[" * 100_000 + b"]" * 100_000,
    "digits": b'{"global_step": ' + b"9" * 5000 + b"}",
    "twice": b'{"global_step": 1, "global_step": 2}',
    "text": "{\ud800}".encode("utf-8", "surrogatepass"),
    "numbers": b'{"weight_map": 7, "global_step": -3, "epoch": -Infinity, "max_steps": true}',
}


def opened(folder: Path) -> ckptconv.Checkpoint | None:
    """The document, None where it is refused as it must be."""
    refused: CkptError | None = None
    checkpoint = None
    try:
        checkpoint = ckptconv.open(folder)
    except CkptError as error:
        refused = error
    if refused is not None:
        assert refused.problems
        assert all(problem.code in CODES and problem.hint for problem in refused.problems)
    return checkpoint


@pytest.mark.parametrize("name", sorted(HOSTILE))
@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.parent.name)
def test_any_file_may_hold_anything(folder: Path, name: str, tmp_path: Path) -> None:
    for number, file in enumerate(sorted(folder.iterdir())):
        copy = shutil.copytree(folder, tmp_path / str(number))
        (copy / file.name).write_bytes(HOSTILE[name])
        opened(copy)


@pytest.mark.parametrize(("folder", "name"), FILES, ids=lambda value: getattr(value, "name", value))
def test_a_file_may_end_anywhere_and_be_gone(folder: Path, name: str, tmp_path: Path) -> None:
    data = (folder / name).read_bytes()
    copy = shutil.copytree(folder, tmp_path / "copy")
    for end in sorted({0, 1, len(data) // 3, len(data) // 2, len(data) - 1}):
        (copy / name).write_bytes(data[:end])
        opened(copy)
    (copy / name).unlink()
    opened(copy)


def changed(key: str, value: object) -> Callable[[dict[str, Any]], None]:
    return lambda state: state.update({key: value})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("global_step", None),
        ("global_step", -1),
        ("global_step", 8.5),
        ("global_step", "8"),
        ("global_step", 1 << 70),
        ("epoch", None),
        ("epoch", "1"),
        ("epoch", -1),
        ("epoch", 1e308),
        ("epoch", float("nan")),
        ("epoch", 1e-320),
        ("epoch", 10**400),
        ("global_step", 10**400),
        ("num_input_tokens_seen", 10**400),
        ("num_input_tokens_seen", -5),
        ("max_steps", 1 << 80),
        ("max_steps", 0),
        ("max_steps", "many"),
    ],
)
def test_no_counter_is_taken_for_what_it_is_not(key: str, value: object, tmp_path: Path) -> None:
    copy = shutil.copytree(FOLDERS[0], tmp_path / "copy")
    state = json.loads((copy / "trainer_state.json").read_text(encoding="utf-8"))
    (copy / "trainer_state.json").write_text(json.dumps({**state, key: value}), encoding="utf-8")
    checkpoint = opened(copy)
    if checkpoint is not None:
        ckptconv.convert(copy, tmp_path / "neutral", to="neutral")
        again = ckptconv.open(tmp_path / "neutral")
        assert again.progress == checkpoint.progress


def test_links_and_pipes(tmp_path: Path) -> None:
    import os

    copy = shutil.copytree(FOLDERS[0], tmp_path / "copy")
    os.mkfifo(copy / "pipe.pt")
    (copy / "loop").symlink_to(copy)
    (copy / "gone.pt").symlink_to(tmp_path / "nowhere")
    (copy / "model.safetensors").rename(tmp_path / "elsewhere.safetensors")
    (copy / "model.safetensors").symlink_to(tmp_path / "elsewhere.safetensors")
    checkpoint = opened(copy)
    assert checkpoint is not None
    assert set(checkpoint.params) == {"fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias"}
    assert any("loop" in text for text in checkpoint.oddities)


@pytest.mark.parametrize("tracker", ["latest", "last_checkpoint", "latest_checkpointed_iteration.txt"])
@pytest.mark.parametrize("text", [b"", b"..", b"/", b"\x00", b"\xff\xfe", b"9" * 9000, b"a\nb", b"../copy"])
def test_a_tracker_names_nothing_outside(tracker: str, text: bytes, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(FOLDERS[0], folder / "checkpoint-8")
    (folder / tracker).write_bytes(text)
    with pytest.raises(CkptError) as caught:
        ckptconv.open(folder)
    assert [(p.code, p.loc) for p in caught.value.problems] == [("missing-file", ("run", tracker))]
