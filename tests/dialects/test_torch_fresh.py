"""`--to pytorch:plain` of another PyTorch program's run: no template is needed, and torch goes on from it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import ckptconv  # noqa: E402
from ckptconv.document import Checkpoint, Known, value_of  # noqa: E402
from ckptconv.errors import CkptError  # noqa: E402
from tests.support.command import FIXTURES  # noqa: E402
from tests.support.producers import PRODUCERS, Net, Run  # noqa: E402
from tests.support.torch_equal import assert_same  # noqa: E402

ROW_CASES = sorted(
    case
    for case, (dialect, *_) in PRODUCERS.items()
    if dialect in ("timm", "imagenet", "torchvision", "nanogpt")
)
FOLDERS = [
    "lightning/mid-epoch/run.ckpt",
    "lightning/sgd/run.ckpt",
    "accelerate/two-models/state",
    "deepspeed/zero2-fp32/run",
    "deepspeed/zero3-bf16/run",
    "dcp/titan-2-ranks/run",
]


def plain(source: Path, folder: Path, **options: Any) -> Path:
    ckptconv.convert(source, folder / "plain.pt", to="pytorch:plain", **options)
    return folder / "plain.pt"


def settings(checkpoint: Checkpoint) -> list[dict[str, Any]]:
    return [
        {name: value_of(fact) for name, fact in group.hyperparameters.items() if isinstance(fact, Known)}
        for optimizer in checkpoint.optimizers
        for group in optimizer.groups
    ]


@pytest.mark.parametrize("name", FOLDERS)
def test_the_run_is_the_same_one(name: str, tmp_path: Path) -> None:
    source = ckptconv.open(FIXTURES / name)
    found = ckptconv.open(plain(FIXTURES / name, tmp_path))
    assert found.provenance.dialect == "plain"
    assert found.progress.step == source.progress.step or value_of(found.progress.step) == value_of(
        source.progress.step
    )
    assert value_of(found.progress.epochs) == value_of(source.progress.epochs)
    assert list(found.params) == list(source.params)
    assert [o.groups and [g.params for g in o.groups] for o in found.optimizers] == [
        o.groups and [g.params for g in o.groups] for o in source.optimizers
    ]
    assert settings(found) == settings(source)
    assert [(s.family, value_of(s.position)) for s in found.schedules] == [
        (s.family, value_of(s.position)) for s in source.schedules
    ]
    for ours, theirs in zip(found.optimizers, source.optimizers, strict=True):
        assert (ours.algorithm, ours.param_steps) == (theirs.algorithm, theirs.param_steps)
        wanted = {slot: held for slot, held in theirs.slots.items() if slot != "master"}
        assert ours.slots.keys() == wanted.keys()
        for slot, held in wanted.items():
            for param, tensor in held.items():
                np.testing.assert_array_equal(ours.slots[slot][param].read(), tensor.read())


@pytest.mark.parametrize("case", ROW_CASES)
def test_torch_goes_on_from_it(case: str, tmp_path: Path) -> None:
    """A loop of one's own makes the same next updates as the program would have."""
    _, save, _, per_epoch = PRODUCERS[case]
    run = Run(per_epoch=per_epoch)
    for _ in range(3):
        run.update()
    run.finish_epoch()
    path = plain(save(run, tmp_path), tmp_path, allow=["state-dropped"])  # of averages
    written = torch.load(path, weights_only=True)
    model = Net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=7.0)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    model.load_state_dict(written["model"])
    optimizer.load_state_dict(written["optimizer"])
    if "scheduler" in written:
        scheduler.load_state_dict(written["scheduler"])
    assert_same(run.optimizer.state_dict()["state"], optimizer.state_dict()["state"])
    for _ in range(3):
        batch = torch.randn(4, 3)
        for net, rule in ((run.model, run.optimizer), (model, optimizer)):
            rule.zero_grad()
            net(batch).pow(2).mean().backward()
            rule.step()
    assert_same(run.model.state_dict(), model.state_dict())


def test_an_edited_step_is_in_every_place(tmp_path: Path) -> None:
    path = plain(FIXTURES / "lightning" / "sgd" / "run.ckpt", tmp_path, set_={"step": "8"})
    assert torch.load(path, weights_only=True)["step"] == 8
    assert value_of(ckptconv.open(path).progress.step) == 8


def test_one_of_two_models_with_its_optimizer(tmp_path: Path) -> None:
    run, other = Run(), Run("SGD", seed=1)
    run.update()
    other.update()
    saved = {
        f"{key}{part}": thing.state_dict()
        for part, each in (("G", run), ("D", other))
        for key, thing in (("net", each.model), ("optimizer", each.optimizer))
    }
    torch.save(saved, tmp_path / "gan.pt")
    written = torch.load(plain(tmp_path / "gan.pt", tmp_path, select=["model:netG"]), weights_only=True)
    assert_same(dict(run.model.state_dict()), dict(written["model"]))
    state = next(value for key, value in written.items() if "optimizer" in key)["state"]
    assert_same(run.optimizer.state_dict()["state"], state)


def refused(source: Path, tmp_path: Path) -> list[tuple[str, tuple[Any, ...]]]:
    with pytest.raises(CkptError) as caught:
        plain(source, tmp_path)
    return [(problem.code, problem.loc) for problem in caught.value.problems]


def test_parameters_that_are_not_known_by_name(tmp_path: Path) -> None:
    assert refused(FIXTURES / "peft" / "lora" / "trainer", tmp_path) == [
        ("template-required", ("--template",))
    ]


def test_another_frameworks_run(tmp_path: Path) -> None:
    bundle = next(path for path in sorted((FIXTURES / "keras3").rglob("*.index")))
    assert refused(bundle.with_suffix(""), tmp_path) == [("template-required", ("--template",))]
