"""A folder with several checkpoints: which one is taken, what is said of it, what another is called."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

import ckptconv
from ckptconv.detect import choose
from ckptconv.errors import CkptError
from tests.support.command import run


def weights(path: Path, value: float = 0.0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({"w": np.full((2, 3), value, np.float32)}, path, {"format": "pt"})


def trainer(folder: Path, step: int, best: str | None = None) -> None:
    """One checkpoint-N of an HF Trainer, without its pickles."""
    weights(folder / f"checkpoint-{step}" / "model.safetensors", step)
    state = {"global_step": step, "best_model_checkpoint": best}
    (folder / f"checkpoint-{step}" / "trainer_state.json").write_text(json.dumps(state))


def many(folder: Path, *names: str) -> Path:
    for name in names:
        weights(folder / name)
    return folder


@pytest.mark.parametrize(
    ("names", "taken"),
    [
        (("best.ckpt", "last.ckpt"), "last.ckpt"),
        (("model_best.pth.tar", "checkpoint.pth.tar"), "checkpoint.pth.tar"),
        (("epoch=0-step=9.ckpt", "epoch=1-step=12.ckpt"), "epoch=1-step=12.ckpt"),
        (("model_9.pt", "model_10.pt"), "model_10.pt"),
        (("loss0.9-epoch2.pt", "loss0.7-epoch10.pt"), "loss0.7-epoch10.pt"),
        (("only.pt",), "only.pt"),
        (("model_0004999.pth", "model_final.pth", "last_checkpoint.pth"), "last_checkpoint.pth"),
    ],
)
def test_the_newest_by_name(tmp_path: Path, names: tuple[str, ...], taken: str) -> None:
    choice = choose(many(tmp_path, *names))
    assert choice.path.name == taken
    assert choice.why
    assert set(choice.candidates) == set(names)


@pytest.mark.parametrize(
    "names",
    [
        ("a.pt", "b.pt"),
        ("model_1.pt", "other_2.pt"),
        ("loss0.1.pt", "loss0.2.pt"),
        ("last.pt", "last.safetensors"),
        ("epoch=1-step=3.ckpt", "epoch=1-step=3-v1.ckpt"),
    ],
)
def test_what_no_counter_tells_is_an_error_with_the_candidates(
    tmp_path: Path, names: tuple[str, ...]
) -> None:
    with pytest.raises(CkptError) as caught:
        choose(many(tmp_path / "run", *names))
    (problem,) = caught.value.problems
    assert (problem.code, problem.loc) == ("checkpoint-ambiguous", ("run",))
    assert all(name in problem.message for name in names)


@pytest.mark.parametrize(
    ("tracker", "text", "name"),
    [
        ("latest", "global_step10\n", "global_step10"),
        ("last_checkpoint", "/data/elsewhere/model_0000009.pth", "model_0000009.pth"),
        ("last_checkpoint", "C:\\runs\\model_0000009.pth", "model_0000009.pth"),
        ("latest_checkpointed_iteration.txt", "10", "iter_0000010"),
        ("latest_checkpointed_iteration.txt", "release", "release"),
    ],
)
def test_a_tracker_wins(tmp_path: Path, tracker: str, text: str, name: str) -> None:
    for folder in ("global_step10", "global_step20", "iter_0000010", "iter_0000020", "release"):
        many(tmp_path / folder, "a.safetensors")
        (tmp_path / folder / "model_index.json").write_text("{}")
    many(tmp_path, "model_0000009.pth", "model_0000019.pth")
    (tmp_path / tracker).write_text(text)
    assert choose(tmp_path).path.relative_to(tmp_path).parts[0] == name


def test_a_tracker_of_what_is_gone_is_an_error(tmp_path: Path) -> None:
    many(tmp_path / "run", "model_1.pth")
    (tmp_path / "run" / "last_checkpoint").write_text("../../etc/passwd")
    with pytest.raises(CkptError) as caught:
        choose(tmp_path / "run")
    assert [(p.code, p.loc) for p in caught.value.problems] == [("missing-file", ("run", "last_checkpoint"))]


def test_an_output_directory_stands_for_its_newest_checkpoint(tmp_path: Path) -> None:
    out = tmp_path / "out"
    for step in (500, 1000):
        trainer(out, step, best="/home/someone/out/checkpoint-500")
    assert choose(out).path.name == "checkpoint-1000"
    weights(out / "model.safetensors")
    (out / "training_args.bin").write_bytes(b"")
    assert choose(out).path.name == "checkpoint-1000"
    assert choose(out, ("checkpoint-500",)).path.name == "checkpoint-500"
    assert choose(out, ("best",)).path.name == "checkpoint-500"
    assert choose(out, (".",)).path == out
    assert choose(out / "checkpoint-500").why == ""


def test_a_folder_of_one_rank_stands_for_its_file(tmp_path: Path) -> None:
    for number in (10, 20):
        weights(tmp_path / f"iter_{number:07d}" / "mp_rank_00" / "model_optim_rng.pt", number)
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("10")
    choice = choose(tmp_path)
    assert choice.path == tmp_path / "iter_0000010" / "mp_rank_00" / "model_optim_rng.pt"
    assert choose(tmp_path, ("iter_0000020", "ema")).names == ("ema",)
    weights(tmp_path / "iter_0000010" / "mp_rank_01" / "model_optim_rng.pt", 10)
    assert choose(tmp_path).path == tmp_path / "iter_0000010"


def test_names_that_are_no_candidates_are_left_for_the_document(tmp_path: Path) -> None:
    choice = choose(many(tmp_path, "a.pt", "b.pt"), ("ema", "b"))
    assert (choice.path.name, choice.names) == ("b.pt", ("ema",))
    assert choose(tmp_path / "a.pt", ("ema",)).names == ("ema",)


def test_two_of_one_folder_are_too_many(tmp_path: Path) -> None:
    with pytest.raises(CkptError) as caught:
        choose(many(tmp_path / "run", "a.pt", "b.pt"), ("a", "b"))
    assert [p.code for p in caught.value.problems] == ["checkpoint-ambiguous"]


def test_shards_and_indexes_are_no_candidates(tmp_path: Path) -> None:
    folder = many(tmp_path, "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "one.pt")
    (folder / "model.safetensors.index.json").write_text("{}")
    assert choose(folder, ("one",)).candidates == ("one.pt",)


def test_the_choice_is_said_in_document_and_report(tmp_path: Path) -> None:
    folder = many(tmp_path / "run", "model_1.safetensors", "model_2.safetensors")
    why = choose(folder).why
    assert ckptconv.open(folder).oddities[0] == why
    report = ckptconv.convert(folder, tmp_path / "out.safetensors")
    assert (report.source, report.chosen) == ("model_2.safetensors", why)
    report = ckptconv.convert(folder, tmp_path / "one.safetensors", select=("model_1",))
    assert report.source == "model_1.safetensors"


def test_a_name_that_nobody_consumes_is_wrong_usage(tmp_path: Path) -> None:
    folder = many(tmp_path / "run", "model_1.safetensors", "model_2.safetensors")
    for call in (
        lambda: ckptconv.open(folder, select=("model_3",)),
        lambda: ckptconv.convert(folder, tmp_path / "out", to="neutral", select=("model_3",)),
        lambda: ckptconv.validate(folder, select=("model_3",)),
    ):
        with pytest.raises(CkptError) as caught:
            call()
        assert [(p.code, p.loc) for p in caught.value.problems] == [("usage", ("--select", "model_3"))]


@pytest.mark.parametrize("command", [["inspect"], ["inspect", "--raw"], ["validate"]])
def test_the_option_of_each_command(tmp_path: Path, command: list[str]) -> None:
    folder = many(tmp_path / "run", "model_1.safetensors", "other.safetensors")
    assert run(*command, str(folder)).returncode == 1
    assert run(*command, str(folder), "--select", "other").returncode == 0
    assert run(*command, str(folder), "--select", "nothing").returncode != 0
