"""Runs that ranks share: read as they stand, written back, and really resumed on two ranks.

One group of processes makes every run, another resumes every one of ours.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("lightning", reason="needs Lightning to go on from its folders")
pytest.importorskip("accelerate", reason="needs accelerate to go on from its folders")
pytest.importorskip("transformers", reason="needs transformers to go on from its folders")

import ckptconv  # noqa: E402
from ckptconv.document import value_of  # noqa: E402
from ckptconv.errors import CkptError  # noqa: E402
from tests.support import fsdp  # noqa: E402
from tests.support.torch_equal import assert_same, bits  # noqa: E402

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.slow]
AT, LAST = 5, 9
TRAINED, SAVED = 18, 8
"""Updates of the Trainer's whole run, and of the folder that is resumed."""
LOOPS = {
    "loop-2-sharded": (2, "SHARDED_STATE_DICT"),
    "loop-2-full": (2, "FULL_STATE_DICT"),
    "loop-1-sharded": (1, "SHARDED_STATE_DICT"),
}
TRAINERS = {"trainer-sharded": "SHARDED_STATE_DICT", "trainer-full": "FULL_STATE_DICT"}
LIGHTNING = {"lightning-parallel": "parallel", "lightning-file": "parallel-file", "lightning-fsdp": "fsdp"}
EPOCHS, UPDATES = 2, 6
"""Of Lightning's run where it is saved, and of one epoch."""
CASES = (*LOOPS, *TRAINERS, *LIGHTNING, "dcp", "dcp-from-file")
DIALECTS = {"loop": "accelerate", "trainer": "hf-trainer", "lightning": "lightning", "dcp": "plain"}
OPAQUE = ("opaque-globals",)


def make_all(root: Path) -> None:
    fsdp.save_flattened(root / "flattened")
    fsdp.save_sharded(root / "dcp", AT, LAST)
    for name, (version, kind) in LOOPS.items():
        fsdp.save_loop(root / name, version, kind, AT, LAST)
    for name, kind in TRAINERS.items():
        fsdp.run_trainer(root / name, kind)
    for name, strategy in LIGHTNING.items():
        fsdp.run_lightning(root / name, strategy, epochs=EPOCHS)
        fsdp.run_lightning(root / f"{name}-whole", strategy)


def resume_all(root: Path) -> None:
    for name in ("dcp", "dcp-from-file"):
        fsdp.resume_sharded(root / name, AT, LAST)
    for name, (version, kind) in LOOPS.items():
        fsdp.resume_loop(root / name, version, kind, AT, LAST)
    for name, kind in TRAINERS.items():
        fsdp.run_trainer(root / f"{name}-out", kind, resume=root / name)
    for name, strategy in LIGHTNING.items():
        fsdp.run_lightning(root / f"{name}-out", strategy, resume=root / name)


def saved(root: Path, case: str) -> Path:
    return root / case / "run" / f"checkpoint-{SAVED}" if case in TRAINERS else root / case


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("theirs")
    fsdp.on_ranks(make_all, root)
    return root


@pytest.fixture(scope="module")
def ours(theirs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every folder through neutral and back, and resumed."""
    root = tmp_path_factory.mktemp("ours")
    for case in CASES[:-1]:
        source = saved(theirs, case)
        neutral = root / f"{case}-neutral"
        ckptconv.convert(source, neutral, to="neutral")
        to = "dcp" if (source / ".metadata").exists() else f"pytorch:{DIALECTS[case.partition('-')[0]]}"
        ckptconv.convert(neutral, root / case, to=to, allow=OPAQUE)
    ckptconv.convert(saved(theirs, "dcp"), root / "run.pt")
    ckptconv.convert(root / "run.pt", root / "dcp-from-file", to="dcp")
    fsdp.on_ranks(resume_all, root)
    return root


def end(root: Path, case: str) -> Any:
    return torch.load(root / f"{case}.pt", weights_only=False)


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_go_on_from_what_is_written(theirs: Path, ours: Path, case: str) -> None:
    """As the run that never stopped."""
    kept = "dcp" if case.startswith("dcp") else f"{case}-whole" if case in LIGHTNING else case
    resumed = end(ours, f"{case}-out" if case in TRAINERS or case in LIGHTNING else case)
    assert_same(by_name(resumed), by_name(end(theirs, kept)))


def by_name(state: dict[str, Any]) -> dict[str, Any]:
    """A run's end without the order of its dictionaries; torch makes lists of tuples that it broadcasts."""
    entries = {name: dict(sorted(entry.items())) for name, entry in state["optimizer"]["state"].items()}
    groups = [{**group, "betas": tuple(group["betas"])} for group in state["optimizer"]["param_groups"]]
    optimizer = {"state": dict(sorted(entries.items())), "param_groups": groups}
    return {**state, "model": dict(state["model"]), "optimizer": optimizer}


@pytest.mark.parametrize("case", CASES[:-1])
def test_the_run_is_what_the_ranks_hold(theirs: Path, case: str) -> None:
    """Against what torch itself makes of the folder's parts."""
    source = saved(theirs, case)
    checkpoint = ckptconv.open(source)
    assert checkpoint.provenance.dialect == DIALECTS[case.partition("-")[0]]
    steps = dict.fromkeys(TRAINERS, SAVED) | dict.fromkeys(LIGHTNING, EPOCHS * UPDATES)
    assert value_of(checkpoint.progress.step) == steps.get(case, AT)
    (optimizer,) = checkpoint.optimizers
    assert optimizer.algorithm == "adamw"
    assert optimizer.param_order == ("declaration-order" if case == "lightning-file" else "named")
    truth = loaded(source)
    held = {name: param.tensor.read().tobytes() for name, param in checkpoint.params.items()}
    assert held == {name: bits(tensor) for name, tensor in truth["model"].items()}
    for slot, key in (("first_moment", "exp_avg"), ("second_moment", "exp_avg_sq")):
        held = {name: tensor.read().tobytes() for name, tensor in optimizer.slots[slot].items()}
        assert held == {name: bits(entry[key]) for name, entry in truth["optimizer"]["state"].items()}
    names = [list(group.params) for group in optimizer.groups]
    assert names == [group["params"] for group in truth["optimizer"]["param_groups"]]
    if case in TRAINERS:
        assert value_of(checkpoint.progress.epochs) == pytest.approx(SAVED / (TRAINED / 3), abs=1e-12)
    if case in LIGHTNING:
        progress = checkpoint.progress
        assert (value_of(progress.epochs), value_of(progress.batch_in_epoch)) == (EPOCHS, 0)


def loaded(folder: Path) -> dict[str, Any]:
    """The model and the optimizer of a folder or Lightning's file, by torch."""
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    if folder.is_file():
        state = torch.load(folder, weights_only=False)
        names = list(state["state_dict"])
        (optimizer,) = state["optimizer_states"]
        entries = {names[number]: entry for number, entry in optimizer["state"].items()}
        groups = [
            {**group, "params": [names[n] for n in group["params"]]} for group in optimizer["param_groups"]
        ]
        return {"model": state["state_dict"], "optimizer": {"state": entries, "param_groups": groups}}
    if not (folder / ".metadata").exists() and (folder / "optimizer.bin").exists():
        files = {"model": "pytorch_model_fsdp.bin", "optimizer": "optimizer.bin"}
        return {key: torch.load(folder / file, weights_only=True) for key, file in files.items()}
    parts = [folder] if (folder / ".metadata").exists() else sorted(folder.glob("*_0/"))
    found: dict[str, Any] = {}
    for part in parts:
        scratch = folder.parent / f"{folder.name}-{part.name}-whole.pt"
        dcp_to_torch_save(part, scratch)
        found |= torch.load(scratch, weights_only=False)
    called = {"state_dict": "model", "optimizer_0": "optimizer"}
    return {called.get(key, key): part for key, part in found.items()}


@pytest.mark.parametrize("case", [*LOOPS, *TRAINERS])
def test_the_way_back_leaves_the_same_files(theirs: Path, ours: Path, case: str) -> None:
    """But for the number of a subfolder's data files."""

    def names(root: Path) -> set[str]:
        found = {str(file.relative_to(root)) for file in root.rglob("*") if file.is_file()}
        return {name for name in found if not name.endswith("__1_0.distcp")}

    assert names(ours / case) == names(saved(theirs, case))


def test_an_edited_step_is_in_every_place(theirs: Path, tmp_path: Path) -> None:
    source = saved(theirs, "trainer-sharded")
    edits = {"step": "11", "learning_rate": "0.004"}  # the folder does not tell its schedule
    ckptconv.convert(source, tmp_path / "neutral", to="neutral", set_=edits)
    ckptconv.convert(tmp_path / "neutral", tmp_path / "back", to="pytorch:hf-trainer")
    again = ckptconv.open(tmp_path / "back")
    assert value_of(again.progress.step) == value_of(again.schedules[0].position) == 11
    entries = loaded(tmp_path / "back")["optimizer"]["state"].values()
    assert {float(entry["step"]) for entry in entries} == {11.0}


@pytest.mark.parametrize("name", ["named-True", "named-False", "numbered"])
def test_full_states_of_fsdp_1(theirs: Path, name: str) -> None:
    """By name as FSDP has them, whatever order its dictionaries are in; by number in the model's order."""
    folder = theirs / "flattened"
    kind = "True" if name == "numbered" else name.partition("-")[2]
    truth = torch.load(folder / f"truth-{kind}.pt", weights_only=False)
    checkpoint = ckptconv.open(folder / f"{name}.pt")
    (optimizer,) = checkpoint.optimizers
    assert optimizer.param_order == ("declaration-order" if name == "numbered" else "named")
    held = {key: param.tensor.read().tobytes() for key, param in checkpoint.params.items()}
    assert held == {key: bits(tensor) for key, tensor in truth["model"].items()}
    for slot, key in (("first_moment", "exp_avg"), ("second_moment", "exp_avg_sq")):
        held = {param: tensor.read().tobytes() for param, tensor in optimizer.slots[slot].items()}
        assert held == {param: bits(entry[key]) for param, entry in truth["optimizer"]["state"].items()}
    assert value_of(checkpoint.progress.step) == AT


@pytest.mark.parametrize("file", [f"rank-{kind}-{rank}.pt" for kind in (True, False) for rank in range(2)])
def test_what_one_rank_of_fsdp_1_keeps_is_refused(theirs: Path, file: str) -> None:
    with pytest.raises(CkptError) as caught:
        ckptconv.open(theirs / "flattened" / file)
    assert [(p.code, p.loc[0]) for p in caught.value.problems] == [("unsupported-feature", "model")]
