"""Megatron-LM's checkpoints as megatron-core wrote them: what is lifted, what is left, what is refused."""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

import ckptconv  # noqa: E402
from ckptconv.document import Checkpoint, Known, Unknown, value_of  # noqa: E402
from ckptconv.errors import CkptError  # noqa: E402

FIXTURES = Path(__file__).parents[2] / "fixtures"
MEGATRON = FIXTURES / "megatron"
MLP = MEGATRON / "mlp" / "run"
FILE = MLP / "iter_0000005" / "mp_rank_00" / "model_optim_rng.pt"
TWO_RANKS = MEGATRON / "gpt-2-ranks" / "iter_0000003"
SHARED = MEGATRON / "gpt-distributed-optimizer"
CASES = [MLP, MEGATRON / "mlp-bf16" / "iter_0000003", TWO_RANKS, SHARED / "iter_0000002"]


def told(checkpoint: Checkpoint) -> dict[str, list[Any]]:
    (optimizer,) = checkpoint.optimizers
    tensors = {name: param.tensor for name, param in checkpoint.params.items()}
    for slot, by_param in optimizer.slots.items():
        tensors |= {f"{name}/{slot}": tensor for name, tensor in by_param.items()}
    return {
        name: [tensor.dtype.name, list(tensor.shape), hashlib.sha256(tensor.read().tobytes()).hexdigest()]
        for name, tensor in tensors.items()
    }


@pytest.mark.parametrize("path", CASES, ids=lambda path: path.parent.name)
def test_a_run_is_what_megatron_holds(path: Path) -> None:
    """Weights of all ranks, moments and float32 copies by name; the counters; the rate of the next update."""
    truth = json.loads((path.parent / "expected.json").read_text(encoding="utf-8"))
    checkpoint = ckptconv.open(path)
    assert checkpoint.provenance.dialect == "megatron"
    assert told(checkpoint) == truth["tensors"]
    assert value_of(checkpoint.progress.step) == truth["step"]
    assert value_of(checkpoint.progress.samples) == truth["samples"]
    (optimizer,) = checkpoint.optimizers
    assert optimizer.algorithm == "adamw"
    assert set(optimizer.param_steps.values()) == {truth["step"]}
    decays = [value_of(group.hyperparameters["weight_decay"]) for group in optimizer.groups]
    assert decays == [0.1, 0.0]
    for group, decayed in zip(optimizer.groups, (True, False), strict=True):
        rate = value_of(group.hyperparameters["learning_rate"])
        assert rate == truth["learning_rate"]
        shapes = {name: checkpoint.params[name].tensor.shape for name in group.params}
        assert {len(shape) > 1 for shape in shapes.values()} == {decayed}


def test_the_schedule_counts_samples_and_is_told_in_updates() -> None:
    checkpoint = ckptconv.open(MLP)
    (schedule,) = checkpoint.schedules
    assert (schedule.family, schedule.unit, value_of(schedule.position)) == ("sequential", "update", 5)
    assert value_of(schedule.parameters["1.length"]) == 18
    assert value_of(schedule.parameters["milestones"]) == (2,)


@pytest.mark.parametrize("kind", ["in-buckets", "flat"])
def test_a_state_that_nothing_cuts_into_parameters_is_left_and_said(kind: str, tmp_path: Path) -> None:
    checkpoint = ckptconv.open(SHARED / kind)
    whole = ckptconv.open(SHARED / "iter_0000002")
    assert len(checkpoint.params) == len(whole.params)
    assert checkpoint.optimizers == ()
    assert value_of(checkpoint.progress.step) == 2
    assert any("--dist-ckpt-optim-fully-reshardable" in sentence for sentence in checkpoint.oddities)
    weights = tmp_path / "weights.safetensors"
    ckptconv.convert(SHARED / kind, weights, allow=("state-dropped",))
    assert weights.is_file()


def test_onto_an_optimizer_such_a_run_would_start_cold(tmp_path: Path) -> None:
    saved = torch.load(FILE, weights_only=False)
    del saved["optimizer"]["state"]
    for group in saved["optimizer"]["param_groups"]:
        group["step"] = 5
        del group["params"]
    saved["optimizer"] = {"optimizer": saved["optimizer"]}
    folder = tmp_path / "iter_0000005" / "mp_rank_00"
    folder.mkdir(parents=True)
    torch.save(saved, folder / "model_optim_rng.pt")
    with pytest.raises(CkptError) as caught:
        ckptconv.convert(folder.parent, tmp_path / "out.pt", template=FILE, allow=("opaque-globals",))
    assert "slots-missing" in {problem.code for problem in caught.value.problems}


def changed(tmp_path: Path, **edits: Any) -> Path:
    saved = torch.load(FILE, weights_only=False)
    path = tmp_path / "iter_0000005" / "mp_rank_00" / "model_optim_rng.pt"
    path.parent.mkdir(parents=True)
    torch.save({**saved, **edits}, path)
    return path


def arguments(**own: Any) -> argparse.Namespace:
    return argparse.Namespace(consumed_train_samples=20, global_batch_size=4, **own)


@pytest.mark.parametrize("argument", ["tensor", "pipeline", "expert"])
def test_one_ranks_part_of_a_model_is_refused(argument: str, tmp_path: Path) -> None:
    own = {f"{argument}_model_parallel_size": 2}
    path = changed(tmp_path, args=arguments(**own))
    for given in (path, path.parent.parent):
        with pytest.raises(CkptError) as caught:
            ckptconv.open(given)
        (problem,) = caught.value.problems
        assert (problem.code, problem.loc) == (
            "unsupported-feature",
            ("args", "@state", f"{argument}_model_parallel_size"),
        )


def test_a_folder_of_several_ranks_is_refused(tmp_path: Path) -> None:
    path = changed(tmp_path)
    shutil.copytree(path.parent, path.parent.parent / "mp_rank_01")
    with pytest.raises(CkptError) as caught:
        ckptconv.open(path.parent.parent)
    (problem,) = caught.value.problems
    assert (problem.code, problem.loc) == ("unsupported-feature", ("iter_0000005",))


def test_a_release_counts_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "release" / "mp_rank_00"
    folder.mkdir(parents=True)
    saved = torch.load(FILE, weights_only=False)
    torch.save({k: v for k, v in saved.items() if k != "optimizer"}, folder / "model_optim_rng.pt")
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("release")
    checkpoint = ckptconv.open(tmp_path)
    assert checkpoint.provenance.dialect == "megatron"
    assert isinstance(checkpoint.progress.step, Unknown)
    assert isinstance(checkpoint.progress.samples, Unknown)
    assert len(checkpoint.params) == 8


def test_the_tracker_names_the_iteration(tmp_path: Path) -> None:
    shutil.copytree(MLP, tmp_path / "run")
    shutil.copytree(tmp_path / "run" / "iter_0000005", tmp_path / "run" / "iter_0000009")
    checkpoint = ckptconv.open(tmp_path / "run")
    assert any("latest_checkpointed_iteration.txt" in sentence for sentence in checkpoint.oddities)
    (tmp_path / "run" / "latest_checkpointed_iteration.txt").write_text("7")
    with pytest.raises(CkptError) as caught:
        ckptconv.open(tmp_path / "run")
    assert caught.value.problems[0].code == "missing-file"


def test_an_optimizer_that_counts_in_its_groups(tmp_path: Path) -> None:
    """FusedAdam of Transformer Engine and Apex."""
    saved = torch.load(FILE, weights_only=False)["optimizer"]
    for entry in saved["state"].values():
        del entry["step"]
    for group in saved["param_groups"]:
        group["step"] = 5
        del group["decoupled_weight_decay"]
    path = changed(tmp_path, optimizer=saved)
    checkpoint = ckptconv.open(path)
    assert value_of(checkpoint.progress.step) == 5
    assert set(checkpoint.optimizers[0].param_steps.values()) == {5}
    edits = {"step": "7", "samples": "28"}
    out = tmp_path / "out.pt"
    options = {"to": "pytorch:megatron", "allow": ("opaque-globals",)}
    ckptconv.convert(path, out, set_=edits, **options)
    again = torch.load(out, weights_only=False)["optimizer"]
    assert [group["step"] for group in again["param_groups"]] == [7, 7]
    assert all(set(entry) == {"exp_avg", "exp_avg_sq"} for entry in again["state"].values())


def test_two_optimizers_in_a_chain(tmp_path: Path) -> None:
    """ChainedOptimizer of a mixture of experts: a list."""
    saved = torch.load(FILE, weights_only=False)
    chain = [saved["optimizer"], {"optimizer": saved["optimizer"], "fp32_from_fp16_params": [[], []]}]
    checkpoint = ckptconv.open(changed(tmp_path, optimizer=chain))
    assert [optimizer.name for optimizer in checkpoint.optimizers] == ["optimizer.0", "optimizer.1.optimizer"]


def test_copies_of_some_parameters_only_are_refused(tmp_path: Path) -> None:
    (file,) = (MEGATRON / "mlp-bf16").rglob("model_optim_rng.pt")
    saved = torch.load(file, weights_only=False)
    del saved["optimizer"]["fp32_from_fp16_params"][0][1]
    with pytest.raises(CkptError) as caught:
        ckptconv.open(changed(tmp_path, **saved))
    (problem,) = caught.value.problems
    assert (problem.code, problem.loc) == ("order-ambiguous", ("optimizer", "optimizer"))


def test_a_step_that_is_edited_alone_leaves_stale_samples(tmp_path: Path) -> None:
    options = {"to": "pytorch:megatron", "allow": ("opaque-globals",)}
    with pytest.raises(CkptError) as caught:
        ckptconv.convert(MLP, tmp_path / "out.pt", set_={"step": "9"}, **options)
    assert {problem.code for problem in caught.value.problems} == {"residue-stale"}
    edits = {"step": "9", "samples": "36"}
    ckptconv.convert(MLP, tmp_path / "out.pt", set_=edits, **options)
    saved = torch.load(tmp_path / "out.pt", weights_only=False)
    assert (saved["iteration"], saved["args"].consumed_train_samples) == (9, 36)
    assert saved["opt_param_scheduler"]["num_steps"] == 36
    assert {float(entry["step"]) for entry in saved["optimizer"]["state"].values()} == {9.0}


def test_rows_of_an_early_version_are_said_to_be_in_another_order(tmp_path: Path) -> None:
    checkpoint = ckptconv.open(changed(tmp_path, checkpoint_version=1.0))
    assert any("query_key_value" in sentence for sentence in checkpoint.oddities)


# Folders


def with_common(tmp_path: Path, change: Any) -> Path:
    folder = tmp_path / "iter_0000003"
    shutil.copytree(TWO_RANKS, folder)
    common = torch.load(folder / "common.pt", weights_only=False)
    change(common)
    torch.save(common, folder / "common.pt")
    return folder


def test_groups_that_the_rule_does_not_fill_leave_the_state(tmp_path: Path) -> None:
    def double(common: dict[str, Any]) -> None:
        common["optimizer"]["param_groups"] *= 2

    checkpoint = ckptconv.open(with_common(tmp_path, double))
    assert checkpoint.optimizers == ()
    assert len(checkpoint.params) == 29
    assert any("is not lifted" in sentence for sentence in checkpoint.oddities)


def test_names_that_stand_in_both_places_are_refused(tmp_path: Path) -> None:
    def repeat(common: dict[str, Any]) -> None:
        common["model"] = {"output_layer.weight": torch.zeros(1)}

    with pytest.raises(CkptError) as caught:
        ckptconv.open(with_common(tmp_path, repeat))
    (problem,) = caught.value.problems
    assert (problem.code, problem.loc) == ("duplicate-key", ("common.pt", "output_layer.weight"))


@pytest.mark.parametrize("name", ["common.pt", "metadata.json"])
def test_a_broken_file_beside_the_entries_is_refused(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "iter_0000003"
    shutil.copytree(TWO_RANKS, folder)
    (folder / name).write_bytes((folder / name).read_bytes()[:-20])
    with pytest.raises(CkptError):
        ckptconv.open(folder)


def test_an_edited_step_reaches_every_place_of_a_folder(tmp_path: Path) -> None:
    edits = {"step": "9", "samples": "36"}
    ckptconv.convert(TWO_RANKS, tmp_path / "out", to="dcp", set_=edits, allow=("opaque-globals",))
    common = torch.load(tmp_path / "out" / "common.pt", weights_only=False)
    assert (common["iteration"], common["args"].consumed_train_samples) == (9, 36)
    assert float(common["optimizer"]["state"]["common_step"]) == 9.0
    assert common["opt_param_scheduler"]["num_steps"] == 36
    again = ckptconv.open(tmp_path / "out")
    assert again.progress.step == Known(value=9, source=again.progress.step.source)  # type: ignore[union-attr]
