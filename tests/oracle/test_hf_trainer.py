"""Folders of a transformers Trainer: read as the Trainer holds them, and it goes on from what is written."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers", reason="needs transformers to go on from the folder")
pytest.importorskip("accelerate", reason="transformers' Trainer needs it")

import ckptconv  # noqa: E402
from ckptconv.document import Known  # noqa: E402
from ckptconv.errors import CkptError  # noqa: E402
from tests.support.hf_trainer import PER_EPOCH, bert, trainer  # noqa: E402
from tests.support.torch_equal import assert_same  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")
OPAQUE = ("opaque-globals",)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A finished run with a checkpoint every 8 updates."""
    made = trainer(tmp_path_factory.mktemp("run"))
    made.train()
    return made


@pytest.fixture(scope="module")
def of_bert(tmp_path_factory: pytest.TempPathFactory) -> Any:
    made = trainer(tmp_path_factory.mktemp("bert"), bert(), max_steps=8, save_steps=8)
    made.train()
    return made


def folder(run: Any, step: int) -> Path:
    return Path(run.args.output_dir) / f"checkpoint-{step}"


def resumed(path: Path, scratch: Path, **options: Any) -> Any:
    """A Trainer with other weights that went on from a folder."""
    made = trainer(scratch, seed=7, **options)
    made.train(resume_from_checkpoint=str(path))
    return made


def through_neutral(source: Path, folder: Path, **settings: str) -> Path:
    ckptconv.convert(source, folder / "neutral", to="neutral", set_=settings)
    ckptconv.convert(folder / "neutral", folder / "back", to="pytorch:hf-trainer", allow=OPAQUE)
    return folder / "back"


def test_what_is_read_is_what_the_trainer_holds(run: Any) -> None:
    checkpoint = ckptconv.open(folder(run, 24))
    state = run.state
    assert ckptconv.open(Path(run.args.output_dir)).provenance.source == "checkpoint-24"
    assert checkpoint.progress.step == Known(value=state.global_step, source="optimizer.pt.state.0.step")
    progress = checkpoint.progress
    assert isinstance(progress.epochs, Known)
    assert progress.epochs.value == state.epoch == 4.0
    assert isinstance(progress.accumulation, Known)
    assert progress.accumulation.value == 1
    (optimizer,) = checkpoint.optimizers
    names = {id(p): name for name, p in run.model.named_parameters()}
    held = [[names[id(p)] for p in group["params"]] for group in run.optimizer.param_groups]
    assert [list(group.params) for group in optimizer.groups] == held
    assert held[0] != list(names.values())[: len(held[0])], "index order is model order here: no test"
    for name, parameter in run.model.named_parameters():
        assert torch.equal(torch.from_numpy(checkpoint.params[name].read()), parameter.detach())
        theirs = run.optimizer.state[parameter]
        for slot, key in (("first_moment", "exp_avg"), ("second_moment", "exp_avg_sq")):
            assert torch.equal(torch.from_numpy(optimizer.slots[slot][name].read()), theirs[key])


def test_the_order_that_the_file_does_not_tell_is_the_skeletons(of_bert: Any, tmp_path: Path) -> None:
    checkpoint = ckptconv.open(folder(of_bert, 8))
    assert checkpoint.optimizers[0].param_order == "unknown"
    spec = ckptconv.pytorch.describe(of_bert.model, of_bert.optimizer)
    neutral = tmp_path / "neutral"
    ckptconv.convert(folder(of_bert, 8), neutral, to="neutral", source_spec=spec)
    assert_moments(of_bert, ckptconv.open(neutral))


def test_a_file_in_the_models_order_tells_the_groups(of_bert: Any, tmp_path: Path) -> None:
    copy = tmp_path / "checkpoint-8"
    copy.mkdir()
    for file in folder(of_bert, 8).iterdir():
        if file.suffix != ".safetensors":
            (copy / file.name).write_bytes(file.read_bytes())
    state = of_bert.model.state_dict()
    torch.save(state, copy / "pytorch_model.bin")
    assert_moments(of_bert, ckptconv.open(copy))
    names = list(state)
    shards = {"pytorch_model-00001-of-00002.bin": names[:9], "pytorch_model-00002-of-00002.bin": names[9:]}
    for file, part in shards.items():
        torch.save({name: state[name] for name in part}, copy / file)
    (copy / "pytorch_model.bin").unlink()
    weight_map = {name: file for file, part in shards.items() for name in part}
    index = {"metadata": {}, "weight_map": dict(sorted(weight_map.items()))}
    (copy / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    assert_moments(of_bert, ckptconv.open(copy))


def test_one_group_in_the_models_order(of_bert: Any, tmp_path: Path) -> None:
    copy = tmp_path / "checkpoint-8"
    copy.mkdir()
    (copy / "trainer_state.json").write_bytes((folder(of_bert, 8) / "trainer_state.json").read_bytes())
    torch.save(of_bert.model.state_dict(), copy / "pytorch_model.bin")
    state, named = of_bert.optimizer.state_dict(), dict(of_bert.model.named_parameters())
    group = {**state["param_groups"][0], "params": list(range(len(named)))}
    own = [of_bert.optimizer.state[parameter] for parameter in named.values()]
    torch.save({"state": dict(enumerate(own)), "param_groups": [group]}, copy / "optimizer.pt")
    assert_moments(of_bert, ckptconv.open(copy))


def assert_moments(run: Any, checkpoint: ckptconv.Checkpoint) -> None:
    (optimizer,) = checkpoint.optimizers
    assert optimizer.param_order in ("declaration-order", "skeleton")
    for name, parameter in run.model.named_parameters():
        ours = torch.from_numpy(optimizer.slots["first_moment"][name].read())
        assert torch.equal(ours, run.optimizer.state[parameter]["exp_avg"]), name


def test_moments_of_another_model_are_not_taken(run: Any, tmp_path: Path) -> None:
    copy = tmp_path / "checkpoint-8"
    copy.mkdir()
    for file in folder(run, 8).iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    state = torch.load(copy / "optimizer.pt")
    state["state"][0]["exp_avg"] = torch.zeros(6, 5)
    torch.save(state, copy / "optimizer.pt")
    assert ckptconv.open(copy).optimizers[0].param_order == "unknown"
    spec = ckptconv.pytorch.describe(run.model, run.optimizer)
    with pytest.raises(CkptError) as caught:
        ckptconv.convert(copy, tmp_path / "out", template=folder(run, 8), source_spec=spec)
    assert "slots-mismatch" in {problem.code for problem in caught.value.problems}


def test_the_way_through_neutral_changes_nothing(run: Any, tmp_path: Path) -> None:
    back = through_neutral(folder(run, 8), tmp_path)
    assert {file.name for file in back.iterdir()} == {file.name for file in folder(run, 8).iterdir()}
    for file in folder(run, 8).iterdir():
        if file.suffix in (".json", ".safetensors"):
            assert (back / file.name).read_bytes() == file.read_bytes(), file.name
        else:
            ours, theirs = (torch.load(f / file.name, weights_only=False) for f in (back, folder(run, 8)))
            if file.name == "training_args.bin":
                assert ours.to_dict() == theirs.to_dict()
            else:
                assert_same(theirs, ours)
    again = resumed(back, tmp_path / "again")
    assert again.watch.seen == run.watch.seen[8:]
    assert_same(dict(run.model.state_dict()), dict(again.model.state_dict()))
    assert_same(run.optimizer.state_dict(), again.optimizer.state_dict())
    assert_same(run.lr_scheduler.state_dict(), again.lr_scheduler.state_dict())


def test_arguments_are_written_only_where_that_is_allowed(run: Any, tmp_path: Path) -> None:
    ckptconv.convert(folder(run, 8), tmp_path / "neutral", to="neutral")
    with pytest.raises(CkptError) as caught:
        ckptconv.convert(tmp_path / "neutral", tmp_path / "back", to="pytorch:hf-trainer")
    (problem,) = caught.value.problems
    assert problem.code == "opaque-globals"
    assert "transformers.training_args.TrainingArguments" in problem.loc


@pytest.mark.parametrize("kind", ["cosine", "linear", "constant_with_warmup", "polynomial", "constant"])
def test_an_edited_step_goes_on_there(kind: str, tmp_path: Path) -> None:
    straight = trainer(tmp_path / "run", lr_scheduler_type=kind)
    straight.train()
    back = through_neutral(folder(straight, 8), tmp_path, step="15")
    state = json.loads((back / "trainer_state.json").read_text())
    assert (state["global_step"], state["epoch"]) == (15, 15 / PER_EPOCH)
    again = resumed(back, tmp_path / "again", lr_scheduler_type=kind)
    due = straight.watch.seen[15:]
    assert [(step, position, updates) for step, _, _, position, updates in again.watch.seen] == [
        (step, position, updates) for step, _, _, position, updates in due
    ]
    assert [rate for _, _, rate, _, _ in again.watch.seen] == pytest.approx(
        [rate for _, _, rate, _, _ in due], rel=1e-12, abs=0
    )


@pytest.mark.parametrize("kind", ["cosine", "linear", "constant_with_warmup", "polynomial", "constant"])
@pytest.mark.parametrize("warmup", [0, 3, 0.25])
def test_the_arguments_tell_the_rates(kind: str, warmup: float, tmp_path: Path) -> None:
    from ckptconv.catalog.schedule_rates import curve_of, rate

    made = trainer(tmp_path / "run", lr_scheduler_type=kind, warmup_steps=warmup, max_steps=20, save_steps=4)
    made.train()
    (schedule,) = ckptconv.open(folder(made, 4)).schedules
    assert schedule.unit == "update"
    ours = [rate(curve_of(schedule), 1e-2, tick) for tick in range(20)]
    assert ours == pytest.approx([seen[2] for seen in made.watch.seen], rel=1e-12, abs=1e-18)


def test_accumulation_is_told_and_the_epoch_follows_where_it_can(tmp_path: Path) -> None:
    made = trainer(tmp_path / "run", gradient_accumulation_steps=3, save_steps=2)
    made.train()
    checkpoint = ckptconv.open(folder(made, 2))
    assert checkpoint.progress.accumulation == Known(
        value=3, source="training_args.bin.gradient_accumulation_steps"
    )
    assert isinstance(checkpoint.progress.epochs, Known)
    assert checkpoint.progress.epochs.value == 1.0
    back = through_neutral(folder(made, 2), tmp_path, step="5")
    again = resumed(back, tmp_path / "again", gradient_accumulation_steps=3)
    assert again.watch.seen[0][0] == 5


def test_a_sharded_folder_goes_on(run: Any, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    copy = tmp_path / "checkpoint-8"
    copy.mkdir()
    for file in folder(run, 8).iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    state = load_file(copy / "model.safetensors")
    (copy / "model.safetensors").unlink()
    weight_map = {}
    for number, name in enumerate(sorted(state), 1):
        file_name = f"model-{number:05d}-of-{len(state):05d}.safetensors"
        save_file({name: state[name]}, copy / file_name, {"format": "pt"})
        weight_map[name] = file_name
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    back = through_neutral(copy, tmp_path)
    assert (back / "model.safetensors.index.json").read_bytes() == (
        copy / "model.safetensors.index.json"
    ).read_bytes()
    again = resumed(back, tmp_path / "again")
    assert_same(dict(run.model.state_dict()), dict(again.model.state_dict()))


def test_files_of_two_moments_are_refused(run: Any, tmp_path: Path) -> None:
    copy = tmp_path / "checkpoint-8"
    copy.mkdir()
    for file in folder(run, 8).iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    (copy / "optimizer.pt").write_bytes((folder(run, 16) / "optimizer.pt").read_bytes())
    with pytest.raises(CkptError) as caught:
        ckptconv.open(copy)
    assert [(p.code, p.loc) for p in caught.value.problems] == [
        ("progress-conflict", ("trainer_state.json", "global_step"))
    ]


def test_updates_that_a_loss_scaler_skipped(run: Any, tmp_path: Path) -> None:
    copy = tmp_path / "checkpoint-8"
    copy.mkdir()
    for file in folder(run, 8).iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    state = json.loads((copy / "trainer_state.json").read_text())
    (copy / "trainer_state.json").write_text(json.dumps({**state, "global_step": 10}))
    scaler = {"scale": 512.0, "growth_factor": 2.0, "backoff_factor": 0.5, "growth_interval": 2000,
              "_growth_tracker": 8}  # fmt: skip
    torch.save(scaler, copy / "scaler.pt")
    progress = ckptconv.open(copy).progress
    facts = (progress.step, progress.skipped_steps, progress.loss_scale)
    assert [fact.value for fact in facts if isinstance(fact, Known)] == [8, 2, 512.0]
    back = through_neutral(copy, tmp_path, step="12", epochs="2.5")
    told = json.loads((back / "trainer_state.json").read_text())
    assert (told["global_step"], told["epoch"]) == (14, 2.5)
    assert float(torch.load(back / "optimizer.pt")["state"][0]["step"]) == 12


def test_a_template_of_the_same_model_takes_the_run(run: Any, tmp_path: Path) -> None:
    other = trainer(tmp_path / "fresh", seed=3, max_steps=24, save_steps=1, save_total_limit=1)
    other.train()
    fresh = sorted((tmp_path / "fresh").glob("checkpoint-*"))[0]
    report = ckptconv.convert(folder(run, 8), tmp_path / "out", template=fresh, allow=OPAQUE)
    assert report.progress["step"] == 8
    state = json.loads((tmp_path / "out" / "trainer_state.json").read_text())
    assert (state["global_step"], state["epoch"]) == (8, 8 / PER_EPOCH)
    again = resumed(tmp_path / "out", tmp_path / "again")
    assert_same(dict(run.model.state_dict()), dict(again.model.state_dict()))


def test_a_template_whose_order_a_skeleton_tells(of_bert: Any, tmp_path: Path) -> None:
    other = trainer(tmp_path / "fresh", bert(), seed=3, max_steps=2, save_steps=1)
    other.train()
    fresh = tmp_path / "fresh" / "checkpoint-1"
    spec = ckptconv.pytorch.describe(of_bert.model, of_bert.optimizer)
    source = folder(of_bert, 8)
    with pytest.raises(CkptError) as caught:
        ckptconv.convert(source, tmp_path / "no", template=fresh, source_spec=spec, allow=OPAQUE)
    assert ("order-ambiguous", ("optimizers", "optimizer")) in {
        (p.code, p.loc) for p in caught.value.problems
    }
    ckptconv.write_skeleton(spec, tmp_path / "spec.json")
    ckptconv.convert(
        source,
        tmp_path / "out",
        template=fresh,
        source_spec=spec,
        template_spec=tmp_path / "spec.json",
        allow=(*OPAQUE, "schedule-unsupported"),
    )
    written = torch.load(tmp_path / "out" / "optimizer.pt")["state"]
    theirs = of_bert.optimizer.state_dict()["state"]
    assert_same(theirs, written)


def test_a_template_spec_completes_a_template(run: Any, tmp_path: Path) -> None:
    spec = ckptconv.pytorch.describe(run.model, run.optimizer)
    with pytest.raises(CkptError) as caught:
        ckptconv.convert(folder(run, 8), tmp_path / "out", to="neutral", template_spec=spec)
    assert [(p.code, p.loc) for p in caught.value.problems] == [("usage", ("--template-spec",))]


def test_a_template_under_another_schedule_is_refused(run: Any, tmp_path: Path) -> None:
    other = trainer(tmp_path / "fresh", max_steps=24, save_steps=24, lr_scheduler_type="linear")
    other.train()
    with pytest.raises(CkptError) as caught:
        ckptconv.convert(
            folder(run, 8), tmp_path / "out", template=tmp_path / "fresh" / "checkpoint-24", allow=OPAQUE
        )
    assert {problem.code for problem in caught.value.problems} == {"schedule-unsupported"}


def test_weights_alone_are_weights(run: Any, tmp_path: Path) -> None:
    run.save_model(str(tmp_path / "final"))
    checkpoint = ckptconv.open(tmp_path / "final")
    assert (checkpoint.kind, checkpoint.provenance.dialect) == ("weights", "hf-trainer")
    moved = replace(checkpoint, oddities=())
    ckptconv.save(moved, tmp_path / "w.safetensors", to="safetensors")
    assert set(ckptconv.open(tmp_path / "w.safetensors").params) == set(checkpoint.params)
