"""Folders of trainers as dialects, from fixtures: neither transformers nor accelerate is needed."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import ckptconv
from ckptconv.document import Known, value_of
from ckptconv.errors import CkptError
from ckptconv.tensor import TensorRef
from tests.support.command import FIXTURES

TRAINER = FIXTURES / "hf-trainer"
ACCELERATE = FIXTURES / "accelerate" / "two-models"
OPAQUE = ("opaque-globals",)


def expected(case: Path) -> dict[str, Any]:
    truth: dict[str, Any] = json.loads((case / "expected.json").read_text(encoding="utf-8"))
    return truth


def digest(tensor: TensorRef) -> list[Any]:
    return [tensor.dtype.name, list(tensor.shape), hashlib.sha256(tensor.read().tobytes()).hexdigest()]


def json_of(folder: Path) -> dict[str, Any]:
    state: dict[str, Any] = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))
    return state


FSDP = ["fsdp-sharded", "fsdp-full", "fsdp-adapter-sharded", "fsdp-adapter-full"]


@pytest.mark.parametrize("case", ["two-groups", "sharded", *FSDP])
def test_the_run_is_what_the_trainer_told(case: str) -> None:
    truth, checkpoint = expected(TRAINER / case), ckptconv.open(TRAINER / case / "checkpoint")
    assert checkpoint.provenance.dialect == "hf-trainer"
    for name, value in truth["progress"].items():
        assert value_of(getattr(checkpoint.progress, name)) == value, name
    missing = set(truth["params"]) - set(checkpoint.params)
    assert missing == ({"lm_head.weight"} if case == "sharded" else set())
    for name, param in checkpoint.params.items():
        assert digest(param.tensor) == truth["params"][name]
    (optimizer,) = checkpoint.optimizers
    assert [len(group.params) for group in optimizer.groups] == [len(group) for group in truth["groups"]]
    assert value_of(optimizer.groups[0].hyperparameters["learning_rate"]) == truth["learning_rate"]
    slots = [digest(tensor) for tensor in optimizer.slots["first_moment"].values()]
    assert sorted(slots) == sorted(truth["slots"]["first_moment"].values())


def test_the_groups_are_told_by_their_shapes() -> None:
    truth = expected(TRAINER / "two-groups")
    (optimizer,) = ckptconv.open(TRAINER / "two-groups" / "checkpoint").optimizers
    assert [list(group.params) for group in optimizer.groups] == truth["groups"]
    for slot, by_param in truth["slots"].items():
        assert {name: digest(tensor) for name, tensor in optimizer.slots[slot].items()} == by_param


def named_slots(checkpoint: ckptconv.Checkpoint) -> dict[str, dict[str, Any]]:
    (optimizer,) = checkpoint.optimizers
    assert optimizer.param_order == "named"
    return {
        slot: {name: digest(tensor) for name, tensor in by_param.items()}
        for slot, by_param in optimizer.slots.items()
    }


@pytest.mark.parametrize("case", FSDP)
def test_a_trainer_with_fsdp_names_its_parameters(case: str) -> None:
    truth, checkpoint = expected(TRAINER / case), ckptconv.open(TRAINER / case / "checkpoint")
    assert [list(group.params) for group in checkpoint.optimizers[0].groups] == truth["groups"]
    assert named_slots(checkpoint) == truth["slots"]
    assert not [name for name in checkpoint.extras if "model" in name], "the export is the model again"


@pytest.mark.parametrize("case", ["fsdp1-sharded", "fsdp2-sharded"])
def test_accelerate_with_fsdp_is_one_run(case: str, tmp_path: Path) -> None:
    folder = FIXTURES / "accelerate" / case
    truth, checkpoint = expected(folder), ckptconv.open(folder / "state")
    assert checkpoint.provenance.dialect == "accelerate"
    assert value_of(checkpoint.progress.step) == truth["step"]
    assert {name: digest(param.tensor) for name, param in checkpoint.params.items()} == truth["params"]
    assert named_slots(checkpoint) == truth["slots"]
    rate = checkpoint.optimizers[0].groups[0].hyperparameters["learning_rate"]
    assert value_of(rate) == truth["learning_rate"]
    assert value_of(checkpoint.schedules[0].position) == truth["scheduler"]
    ckptconv.convert(folder / "state", tmp_path / "neutral", to="neutral")
    ckptconv.convert(tmp_path / "neutral", tmp_path / "back", to="pytorch:accelerate")
    again = ckptconv.open(tmp_path / "back")
    assert [(a, digest(t)) for a, t in again.tensors()] == [(a, digest(t)) for a, t in checkpoint.tensors()]
    assert again.residue is not None
    assert checkpoint.residue is not None
    assert again.residue.root == checkpoint.residue.root


def test_a_run_of_one_process_goes_onto_a_sharded_folder(tmp_path: Path) -> None:
    """A file whose optimizer has numbers where the folder has names."""
    source = FIXTURES / "accelerate" / "fsdp2-sharded"
    checkpoint = ckptconv.open(source / "state")
    torch = pytest.importorskip("torch")
    (optimizer,), names = checkpoint.optimizers, list(checkpoint.params)
    group = {key: f.value for key, f in optimizer.groups[0].hyperparameters.items() if isinstance(f, Known)}
    slots = [optimizer.slots[slot] for slot in ("first_moment", "second_moment")]
    state = {
        number: dict(
            zip(
                ("exp_avg", "exp_avg_sq"),
                (torch.from_numpy(slot[name].read()) for slot in slots),
                strict=True,
            ),
            step=torch.tensor(7.0),
        )
        for number, name in enumerate(names)
    }
    settings = {
        "lr": group["learning_rate"], "betas": (group["beta_1"], group["beta_2"]), "eps": group["epsilon"],
        "weight_decay": group["weight_decay"], "amsgrad": False, "maximize": False, "foreach": None,
        "capturable": False, "differentiable": False, "fused": None, "decoupled_weight_decay": True,
        "params": list(range(len(names))),
    }  # fmt: skip
    model = {name: torch.from_numpy(param.tensor.read()) for name, param in checkpoint.params.items()}
    torch.save(
        {"model": model, "optimizer": {"state": state, "param_groups": [settings]}}, tmp_path / "run.pt"
    )
    allowed = ("schedule-unsupported",)
    ckptconv.convert(tmp_path / "run.pt", tmp_path / "out", template=source / "state", allow=allowed)
    again = ckptconv.open(tmp_path / "out")
    assert (again.provenance.dialect, value_of(again.progress.step)) == ("accelerate", 7)
    assert named_slots(again) == expected(source)["slots"]


@pytest.mark.parametrize(
    ("damage", "code", "loc"),
    [
        ("rank", "unsupported-feature", ("pytorch_model_fsdp_0_rank1.bin",)),
        ("unfinished", "missing-file", (".metadata",)),
        ("swapped", "unknown-dialect", ("optimizer_0",)),
        ("lost", "missing-file", ("__1_0.distcp",)),
    ],
)
def test_a_sharded_folder_that_is_not_whole(
    damage: str, code: str, loc: tuple[str, ...], tmp_path: Path
) -> None:
    state = shutil.copytree(FIXTURES / "accelerate" / "fsdp2-sharded" / "state", tmp_path / "state")
    if damage == "rank":
        shutil.copy(state / "scheduler.bin", state / "pytorch_model_fsdp_0_rank1.bin")
    elif damage == "unfinished":
        (state / "optimizer_0" / ".metadata").unlink()
    elif damage == "lost":
        (state / "optimizer_0" / "__1_0.distcp").unlink()
    else:
        shutil.rmtree(state / "optimizer_0")
        shutil.copytree(state / "pytorch_model_fsdp_0", state / "optimizer_0")
    with pytest.raises(CkptError) as caught:
        ckptconv.open(state)
    problem = caught.value.problems[0]
    assert (problem.code, problem.loc[: len(loc)]) == (code, loc)


def test_what_shapes_do_not_tell_is_not_guessed(tmp_path: Path) -> None:
    source = TRAINER / "sharded" / "checkpoint"
    (optimizer,) = ckptconv.open(source).optimizers
    assert optimizer.param_order == "unknown"
    ckptconv.convert(source, tmp_path / "neutral", to="neutral")
    ckptconv.convert(tmp_path / "neutral", tmp_path / "back", to="pytorch:hf-trainer", allow=OPAQUE)
    for file in source.glob("*.safetensors*"):
        assert (tmp_path / "back" / file.name).read_bytes() == file.read_bytes()


def test_an_edited_step_and_what_moves_with_it(tmp_path: Path) -> None:
    source = TRAINER / "two-groups" / "checkpoint"
    ckptconv.convert(source, tmp_path / "neutral", to="neutral", set_={"step": "11"})
    ckptconv.convert(tmp_path / "neutral", tmp_path / "back", to="pytorch:hf-trainer", allow=OPAQUE)
    before, after = json_of(source), json_of(tmp_path / "back")
    assert {key for key in before if before[key] != after[key]} == {"global_step", "epoch"}
    assert (after["global_step"], after["epoch"]) == (11, 11 / 6)
    again = ckptconv.open(tmp_path / "back")
    assert value_of(again.progress.step) == value_of(again.schedules[0].position) == 11
    assert set(again.optimizers[0].param_steps.values()) == {11}


def test_an_epoch_that_does_not_follow_is_stale(tmp_path: Path) -> None:
    source = shutil.copytree(TRAINER / "two-groups" / "checkpoint", tmp_path / "checkpoint")
    state = json_of(source)
    (source / "trainer_state.json").write_text(json.dumps({**state, "epoch": 1.3}), encoding="utf-8")
    checkpoint = ckptconv.open(source)
    edited = replace(checkpoint, progress=replace(checkpoint.progress, step=Known(value=11)))
    with pytest.raises(CkptError) as caught:
        ckptconv.save(edited, tmp_path / "out", to="pytorch:hf-trainer", allow=OPAQUE)
    assert [(p.code, p.loc) for p in caught.value.problems] == [
        ("residue-stale", ("trainer_state.json", "epoch"))
    ]
    told = replace(edited.progress, epochs=Known(value=1.75, status="supplied"))
    ckptconv.save(replace(edited, progress=told), tmp_path / "out", to="pytorch:hf-trainer", allow=OPAQUE)
    assert json_of(tmp_path / "out")["epoch"] == 1.75


def test_a_file_without_the_models_weights_is_no_run(tmp_path: Path) -> None:
    source = shutil.copytree(TRAINER / "two-groups" / "checkpoint", tmp_path / "checkpoint")
    (source / "model.safetensors").unlink()
    with pytest.raises(CkptError) as caught:
        ckptconv.open(source)
    assert [(p.code, p.loc) for p in caught.value.problems] == [("unknown-dialect", ("checkpoint",))]


def test_a_folder_needs_a_template_to_be_written(tmp_path: Path) -> None:
    for dialect in ("hf-trainer", "accelerate"):
        with pytest.raises(CkptError) as caught:
            ckptconv.convert(
                FIXTURES / "plain" / "linear-adam-9-steps" / "run.pt",
                tmp_path / "out",
                to=f"pytorch:{dialect}",
            )
        assert {problem.code for problem in caught.value.problems} == {"template-required"}


def test_two_models_of_accelerate() -> None:
    truth, checkpoint = expected(ACCELERATE), ckptconv.open(ACCELERATE / "state")
    assert checkpoint.provenance.dialect == "accelerate"
    assert {name: digest(param.tensor) for name, param in checkpoint.params.items()} == truth["params"]
    assert [value_of(o.step) for o in checkpoint.optimizers] == truth["steps"]
    rates = [value_of(o.groups[0].hyperparameters["learning_rate"]) for o in checkpoint.optimizers]
    assert rates == truth["learning_rates"]
    assert [o.algorithm for o in checkpoint.optimizers] == ["adamw", "rmsprop"]
    assert [o.params for o in checkpoint.optimizers] == [
        ("weight", "bias"),
        ("model_1.weight", "model_1.bias"),
    ]


def test_the_way_back_to_accelerate_is_exact(tmp_path: Path) -> None:
    ckptconv.convert(ACCELERATE / "state", tmp_path / "neutral", to="neutral")
    ckptconv.convert(tmp_path / "neutral", tmp_path / "back", to="pytorch:accelerate")
    theirs, ours = (ckptconv.open(folder) for folder in (ACCELERATE / "state", tmp_path / "back"))
    assert [(a, digest(t)) for a, t in theirs.tensors()] == [(a, digest(t)) for a, t in ours.tensors()]
    assert theirs.optimizers[1].param_steps == ours.optimizers[1].param_steps
    assert theirs.residue is not None
    assert ours.residue is not None
    assert theirs.residue.root == ours.residue.root


# DeepSpeed within

ENGINES = {
    "hf-trainer/deepspeed-zero2": "global_step8",
    "hf-trainer/deepspeed-zero3": "global_step8",
    "accelerate/deepspeed-zero2": "pytorch_model",
}


@pytest.mark.parametrize("case", ENGINES)
def test_a_trainer_and_its_engine_are_one_run(case: str) -> None:
    truth, checkpoint = expected(FIXTURES / case), ckptconv.open(FIXTURES / case / "run")
    assert checkpoint.provenance.dialect == case.partition("/")[0]
    for name, value in truth["progress"].items():
        assert value_of(getattr(checkpoint.progress, name)) == value, name
    assert {name: digest(param.tensor) for name, param in checkpoint.params.items()} == truth["fp32"]
    slots = named_slots(checkpoint)
    assert (slots["first_moment"], slots["second_moment"]) == (truth["exp_avg"], truth["exp_avg_sq"])
    rates = {value_of(g.hyperparameters["learning_rate"]) for g in checkpoint.optimizers[0].groups}
    assert rates == {truth["learning_rate"]}
    (schedule,) = checkpoint.schedules
    assert value_of(schedule.position) == truth["progress"]["step"]
    assert not [name for name in checkpoint.extras if name.startswith("model.safetensors")]


@pytest.mark.parametrize("case", ENGINES)
def test_the_way_back_to_both_is_exact(case: str, tmp_path: Path) -> None:
    source, dialect = FIXTURES / case / "run", case.partition("/")[0]
    ckptconv.convert(source, tmp_path / "neutral", to="neutral")
    ckptconv.convert(tmp_path / "neutral", tmp_path / "back", to=f"pytorch:{dialect}", allow=OPAQUE)
    theirs, ours = ckptconv.open(source), ckptconv.open(tmp_path / "back")
    assert [(a, digest(t)) for a, t in theirs.tensors()] == [(a, digest(t)) for a, t in ours.tensors()]
    assert theirs.residue is not None
    assert ours.residue is not None
    assert theirs.residue.root == ours.residue.root

    def names(root: Path) -> set[str]:
        return {str(file.relative_to(root)) for file in root.rglob("*") if file.is_file()}

    assert names(tmp_path / "back") == names(source)


@pytest.mark.parametrize("case", ENGINES)
def test_the_engine_alone_is_selected(case: str) -> None:
    source, tag = FIXTURES / case / "run", ENGINES[case]
    whole, alone = ckptconv.open(source), ckptconv.open(source, select=[tag])
    assert alone.provenance.dialect == "deepspeed"
    assert any(tag in oddity and "--select" in oddity for oddity in whole.oddities)
    assert {n: digest(p.tensor) for n, p in alone.params.items()} == {
        n: digest(p.tensor) for n, p in whole.params.items()
    }


def test_an_edited_step_moves_the_trainer_and_its_engine(tmp_path: Path) -> None:
    source = FIXTURES / "hf-trainer" / "deepspeed-zero2" / "run"
    edits = {"step": "6", "samples": "48"}
    ckptconv.convert(source, tmp_path / "neutral", to="neutral", set_=edits)
    ckptconv.convert(tmp_path / "neutral", tmp_path / "back", to="pytorch:hf-trainer", allow=OPAQUE)
    assert json_of(tmp_path / "back")["global_step"] == 6
    engine = ckptconv.open(tmp_path / "back", select=["global_step8"])
    assert (value_of(engine.progress.step), value_of(engine.progress.samples)) == (6, 48)
    again = ckptconv.open(tmp_path / "back")
    assert value_of(again.progress.step) == value_of(again.schedules[0].position) == 6


def test_of_several_engines_the_tracker_names_the_runs(tmp_path: Path) -> None:
    source = shutil.copytree(FIXTURES / "hf-trainer" / "deepspeed-zero2" / "run", tmp_path / "run")
    shutil.copytree(source / "global_step8", source / "global_step6")
    assert any("'global_step8'" in oddity for oddity in ckptconv.open(source).oddities)
    (source / "latest").unlink()
    with pytest.raises(CkptError) as caught:
        ckptconv.open(source)
    assert [(p.code, p.loc) for p in caught.value.problems] == [("checkpoint-ambiguous", ("latest",))]


def test_an_engine_of_another_moment_is_a_conflict(tmp_path: Path) -> None:
    source = shutil.copytree(FIXTURES / "hf-trainer" / "deepspeed-zero3" / "run", tmp_path / "run")
    state = json_of(source)
    (source / "trainer_state.json").write_text(json.dumps({**state, "global_step": 9}), encoding="utf-8")
    with pytest.raises(CkptError) as caught:
        ckptconv.open(source)
    assert [(p.code, p.loc) for p in caught.value.problems] == [
        ("progress-conflict", ("trainer_state.json", "global_step"))
    ]


def test_an_engine_without_a_rank_is_not_whole(tmp_path: Path) -> None:
    source = shutil.copytree(FIXTURES / "accelerate" / "deepspeed-zero2" / "run", tmp_path / "run")
    gone = "zero_pp_rank_1_mp_rank_00_optim_states.pt"
    (source / "pytorch_model" / gone).unlink()
    with pytest.raises(CkptError) as caught:
        ckptconv.open(source)
    assert [(p.code, p.loc) for p in caught.value.problems] == [("missing-file", ("pytorch_model", gone))]


def test_an_export_in_another_dtype_is_no_copy(tmp_path: Path) -> None:
    """It is said, and stays as it stands."""
    source = shutil.copytree(FIXTURES / "hf-trainer" / "deepspeed-zero2" / "run", tmp_path / "run")
    name, file = "fc1.weight", source / "model.safetensors"
    torch, library = pytest.importorskip("torch"), pytest.importorskip("safetensors.torch")
    library.save_file({k: v.half() for k, v in library.load_file(file).items()}, file, {"format": "pt"})
    checkpoint = ckptconv.open(source)
    assert checkpoint.params[name].tensor.dtype.name == "float32"
    assert checkpoint.extras[f"model.safetensors/{name}"].dtype.name == str(torch.float16)[6:]
    assert any("'model.safetensors'" in oddity for oddity in checkpoint.oddities)
