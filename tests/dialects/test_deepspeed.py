"""DeepSpeed's folders against what its engine said of the runs; deepspeed itself is not needed."""

from __future__ import annotations

import contextlib
import hashlib
import json
import random
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import ckptconv
from ckptconv.detect import dialect_named, read_raw
from ckptconv.document import value_of
from ckptconv.errors import CkptError
from ckptconv.formats.torch_folder import layout_folder
from ckptconv.rawtree import DictNode, ListNode, Node, Opaque, RawTree, transform, walk
from ckptconv.rawtree import Path as Keys
from ckptconv.tensor import StoredTensor, TensorRef
from tests.support.command import FIXTURES
from tests.support.write_layout import write_layout

HOME = FIXTURES / "deepspeed"
CASES = (
    "stage0-bf16",
    "universal-zero1",
    "universal-zero3",
    "zero1-fp16",
    "zero2-fp32",
    "zero3-bf16",
    "zero3-mlp",
)
TAG = "global_step5"
OPAQUE = ("opaque-globals",)
OPTIMIZER = "zero_pp_rank_{}_mp_rank_00_optim_states.pt"


def truth_of(case: str) -> dict[str, Any]:
    truth: dict[str, Any] = json.loads((HOME / case / "expected.json").read_text(encoding="utf-8"))
    return truth


def digest(tensor: TensorRef) -> list[Any]:
    return [tensor.dtype.name, list(tensor.shape), hashlib.sha256(tensor.read().tobytes()).hexdigest()]


def leaves(folder: Path) -> list[tuple[Keys, Any]]:
    """Everything in the folder's files."""
    return [
        (path, digest(leaf) if isinstance(leaf, TensorRef) else repr(leaf))
        for path, leaf in walk(read_raw(folder).root)
    ]


@pytest.mark.parametrize("case", CASES)
def test_the_run_is_what_the_engine_told(case: str) -> None:
    truth, checkpoint = truth_of(case), ckptconv.open(HOME / case / "run")
    assert checkpoint.provenance.dialect == "deepspeed"
    for name, value in truth["progress"].items():
        assert value_of(getattr(checkpoint.progress, name)) == value, name
    (optimizer,) = checkpoint.optimizers
    assert optimizer.algorithm == "adamw"
    for slot, key in (("first_moment", "exp_avg"), ("second_moment", "exp_avg_sq")):
        assert {name: digest(tensor) for name, tensor in optimizer.slots[slot].items()} == truth[key]
    params = {name: digest(param.tensor) for name, param in checkpoint.params.items()}
    assert params.keys() == truth["module"].keys()
    masters = {name: digest(tensor) for name, tensor in optimizer.slots.get("master", {}).items()}
    if "zero3" in case:
        assert not masters
        assert {name: params[name] for name in truth["fp32"]} == truth["fp32"]
        untrained = set(params) - set(truth["fp32"]) - {"again.weight"}
        assert all(params[name] == truth["module"][name] for name in untrained)
    else:
        assert (params, masters) == (truth["module"], truth["fp32"])
    ties = {name: param.tied_to for name, param in checkpoint.params.items() if param.tied_to}
    assert ties == ({"again.weight": "mid.weight"} if "again.weight" in params else {})


@pytest.mark.parametrize("case", CASES)
def test_the_way_back_is_exact(case: str, tmp_path: Path) -> None:
    ckptconv.convert(HOME / case / "run", tmp_path / "neutral", to="neutral")
    ckptconv.convert(tmp_path / "neutral", tmp_path / "back", to="pytorch:deepspeed", allow=OPAQUE)
    assert leaves(tmp_path / "back") == leaves(HOME / case / "run" / TAG)


@pytest.mark.parametrize("case", CASES[1:])
def test_an_edited_step_reaches_every_rank(case: str, tmp_path: Path) -> None:
    truth = truth_of(case)
    edits = {"step": "9", "samples": "90"}
    ckptconv.convert(HOME / case / "run", tmp_path / "neutral", to="neutral", set_=edits)
    ckptconv.convert(tmp_path / "neutral", tmp_path / "back", to="pytorch:deepspeed", allow=OPAQUE)
    skipped = truth["progress"]["skipped_steps"]
    found = leaves(tmp_path / "back")
    assert {leaf for path, leaf in found if path[-1] == "global_steps"} == {repr(9 + skipped)}
    again = ckptconv.open(tmp_path / "back")
    assert set(again.optimizers[0].param_steps.values()) == {9}
    assert value_of(again.progress.samples) == 90


def test_samples_that_do_not_follow_are_stale(tmp_path: Path) -> None:
    ckptconv.convert(HOME / "zero3-mlp" / "run", tmp_path / "neutral", to="neutral", set_={"step": "9"})
    with pytest.raises(CkptError) as caught:
        ckptconv.convert(tmp_path / "neutral", tmp_path / "back", to="pytorch:deepspeed", allow=OPAQUE)
    assert [(p.code, p.loc) for p in caught.value.problems] == [("residue-stale", ("global_samples",))]


def test_another_run_is_cut_for_the_ranks_of_the_template(tmp_path: Path) -> None:
    ckptconv.convert(
        HOME / "zero3-bf16" / "run",
        tmp_path / "two",
        template=HOME / "zero2-fp32" / "run",
        set_={"epochs": "2", "epoch_convention": "count"},
        allow=(*OPAQUE, "precision-loss"),
    )
    ours, theirs = ckptconv.open(tmp_path / "two"), ckptconv.open(HOME / "zero3-bf16" / "run")
    for slot, by_param in theirs.optimizers[0].slots.items():
        for name, tensor in by_param.items():
            assert digest(ours.optimizers[0].slots[slot][name]) == digest(tensor)
            assert digest(ours.params[name].tensor) == digest(theirs.params[name].tensor)
            assert digest(ours.optimizers[0].slots["master"][name]) == digest(theirs.params[name].tensor)


def test_select_takes_another_tag(tmp_path: Path) -> None:
    run = shutil.copytree(HOME / "zero2-fp32" / "run", tmp_path / "run")
    shutil.copytree(HOME / "zero3-mlp" / "run" / TAG, run / "global_step4")
    assert "norm.weight" in ckptconv.open(run).params
    assert set(ckptconv.open(run, select=["global_step4"]).params) == {
        "0.weight",
        "0.bias",
        "2.weight",
        "2.bias",
    }


# Damaged and hostile folders


def changed(case: str, target: Path, change: Callable[[Keys, Node], Node]) -> Path:
    """The folder of a case with other nodes in it."""
    raw = read_raw(HOME / case / "run" / TAG)
    attributes = {**raw.attributes, "allow_opaque_globals": True}
    root = transform(raw.root, change)
    write_layout(layout_folder(RawTree(format="pytorch", root=root, attributes=attributes), target), target)
    return target


def refusal(folder: Path) -> tuple[str, Any]:
    with pytest.raises(CkptError) as caught:
        ckptconv.open(folder)
    (problem,) = caught.value.problems
    assert problem.hint
    return problem.code, problem.loc


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_a_ranks_file_is_missing(rank: int, tmp_path: Path) -> None:
    copy = shutil.copytree(HOME / "zero3-mlp" / "run" / TAG, tmp_path / "copy")
    (copy / OPTIMIZER.format(rank)).unlink()
    assert refusal(copy)[0] == "missing-file"


def test_no_rank_left_its_optimizer(tmp_path: Path) -> None:
    copy = shutil.copytree(HOME / "zero2-fp32" / "run" / TAG, tmp_path / "copy")
    for rank in (0, 1):
        (copy / OPTIMIZER.format(rank)).unlink()
    assert refusal(copy) == ("missing-file", (OPTIMIZER.format(0),))
    shutil.copy(HOME / "zero2-fp32" / "run" / TAG / OPTIMIZER.format(0), copy)
    assert refusal(copy) == ("missing-file", (OPTIMIZER.format(1),))


def test_a_vector_is_too_short(tmp_path: Path) -> None:
    where = (OPTIMIZER.format(1), "optimizer_state_dict", "base_optimizer_state", "state", 0, "exp_avg")

    def cut(path: Keys, node: Node) -> Node:
        return (
            StoredTensor.of_array(node.read()[:-9]) if path == where and isinstance(node, TensorRef) else node
        )

    code, loc = refusal(changed("zero2-fp32", tmp_path / "bad", cut))
    assert (code, loc) == ("corrupt-file", (OPTIMIZER.format(0), *where[1:]))


def test_ranks_of_different_moments(tmp_path: Path) -> None:
    where = (OPTIMIZER.format(1), "optimizer_state_dict", "base_optimizer_state", "state", 0, "step")

    def older(path: Keys, node: Node) -> Node:
        return (
            StoredTensor.of_array(node.read() - 1) if path == where and isinstance(node, TensorRef) else node
        )

    assert refusal(changed("zero2-fp32", tmp_path / "bad", older)) == ("progress-conflict", where)


def test_shapes_that_do_not_fit_the_vectors(tmp_path: Path) -> None:
    where = ("mp_rank_00_model_states.pt", "param_shapes", 0, "mid.weight")

    def wider(path: Keys, node: Node) -> Node:
        return ListNode(items=(700, 1 << 40), kind="torch.Size") if path == where else node

    assert refusal(changed("zero2-fp32", tmp_path / "bad", wider))[0] == "corrupt-file"


def test_an_order_that_the_mappings_contradict(tmp_path: Path) -> None:
    where = ("mp_rank_00_model_states.pt", "param_shapes", 1)

    def turned(path: Keys, node: Node) -> Node:
        if path == where and isinstance(node, DictNode):
            return DictNode(items=node.items[::-1], kind=node.kind)
        return node

    code, loc = refusal(changed("zero1-fp16", tmp_path / "bad", turned))
    assert code == "corrupt-file"
    assert "param_slice_mappings" in loc


@pytest.mark.parametrize(
    "name",
    [
        "mp_rank_01_model_states.pt",
        "zero_pp_rank_0_mp_rank_01_optim_states.pt",
        "layer_00-model_00-model_states.pt",
        "layer_0_expert_1_mp_rank_00_model_states.pt",
    ],
)
def test_parts_of_parallel_runs_are_not_guessed(name: str, tmp_path: Path) -> None:
    copy = shutil.copytree(HOME / "zero2-fp32" / "run" / TAG, tmp_path / "copy")
    shutil.copy(copy / "mp_rank_00_model_states.pt", copy / name)
    assert refusal(copy) == ("unsupported-feature", (name,))


def test_the_model_file_alone() -> None:
    run = HOME / "zero2-fp32" / "run" / TAG
    checkpoint = ckptconv.open(run / "mp_rank_00_model_states.pt")
    truth = truth_of("zero2-fp32")
    assert {name: digest(param.tensor) for name, param in checkpoint.params.items()} == truth["module"]
    assert value_of(checkpoint.progress.step) == truth["progress"]["step"]
    empty = HOME / "zero3-mlp" / "run" / TAG / "zero_pp_rank_0_mp_rank_00_model_states.pt"
    assert refusal(empty) == ("missing-file", ("module", "0.weight"))


HOSTILE: tuple[Node, ...] = (
    None,
    -1,
    1 << 70,
    "x",
    float("nan"),
    ListNode(items=(1, "a")),
    DictNode(items=(("a", 1),)),
    StoredTensor.of_array(np.zeros((3,), "f4")),
    Opaque(kind="object", name="os.system"),
)


@pytest.mark.parametrize("case", CASES)
def test_any_place_may_hold_anything(case: str) -> None:
    raw, dialect = read_raw(HOME / case / "run" / TAG), dialect_named("pytorch", "deepspeed")
    paths = [path for path, _ in walk(raw.root)]
    for number, target in enumerate(random.Random(case).choices(paths, k=60)):
        for depth in (len(target), max(1, len(target) - 1 - number % 3)):
            bad = HOSTILE[number % len(HOSTILE)]
            at = target[:depth]
            root = transform(raw.root, lambda path, node: bad if path == at else node)  # noqa: B023
            with contextlib.suppress(CkptError):
                dialect.lower(dialect.lift(replace(raw, root=root)))


def test_a_tracker_does_not_lead_out_of_the_folder(tmp_path: Path) -> None:
    run = shutil.copytree(HOME / "zero2-fp32" / "run", tmp_path / "run")
    shutil.copytree(run / TAG, tmp_path / "elsewhere5")
    (run / "latest").write_text("../elsewhere5", encoding="utf-8")
    assert refusal(run) == ("missing-file", ("run", "latest"))
