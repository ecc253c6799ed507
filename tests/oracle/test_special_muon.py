"""What is special about parameters, with Muon: one optimizer in Keras 3, two in torch."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("tensorflow")
pytest.importorskip("keras")
torch = pytest.importorskip("torch")
pytest.importorskip("h5py")

import ckptconv  # noqa: E402
from ckptconv.account import Account  # noqa: E402
from ckptconv.conversion import convert  # noqa: E402
from ckptconv.document import Known, value_of  # noqa: E402
from ckptconv.optimizer_parts import divide  # noqa: E402
from tests.oracle.test_muon import (  # noqa: E402
    ALLOWED,
    MATRICES,
    PLACES,
    STEPS,
    as_torch,
    keras_file,
    keras_run,
    loaded_keras,
    loaded_torch,
    problems_of,
    torch_file,
    torch_run,
)


def test_a_frozen_head_crosses_without_state(tmp_path: Path) -> None:
    run = torch_run(frozen=True)
    template = keras_file(keras_run(0, frozen=True), "checkpoint", tmp_path / "t")
    convert(torch_file(run, tmp_path / "a.pt"), tmp_path / "b-1", template=template, allow=ALLOWED)
    model, optimizer = loaded_keras(tmp_path / "b-1", "checkpoint", frozen=True)
    named = dict(run[0].named_parameters())
    for name, variable in zip(PLACES[3:], model.layers[-1].variables, strict=True):
        np.testing.assert_array_equal(as_torch(name, variable), named[name].detach().numpy())
    assert len(optimizer.momentums) == 3
    moment = run[2].state[named["dense.bias"]]["exp_avg"]
    np.testing.assert_array_equal(optimizer.momentums[2].numpy(), moment.numpy())

    on = keras_file(keras_run(frozen=True), "checkpoint", tmp_path / "c")
    onto = torch_file(torch_run((0, 0), frozen=True), tmp_path / "d.pt")
    convert(on, tmp_path / "e.pt", template=onto, allow=ALLOWED)
    assert len(loaded_torch(tmp_path / "e.pt", frozen=True)[2].state) == 2


def test_bfloat16_parameters_keep_float32_momenta(tmp_path: Path) -> None:
    run = torch_run()
    was = {key: value.numpy().copy() for key, value in moments(run).items()}
    run[0].bfloat16()
    source = torch_file(run, tmp_path / "a.pt")
    convert(
        source, tmp_path / "b.keras", template=keras_file(keras_run(0), "file", tmp_path / "t"), allow=ALLOWED
    )
    model, optimizer = loaded_keras(tmp_path / "b.keras", "file")
    for number, name in enumerate(PLACES):
        value = dict(run[0].named_parameters())[name].detach().float().numpy()
        np.testing.assert_array_equal(as_torch(name, model.trainable_variables[number]), value)
        scale = np.float32(1 - optimizer.momentum) if name in MATRICES else np.float32(1)
        kept = as_torch(name, optimizer.momentums[number]) * scale
        np.testing.assert_array_max_ulp(kept, was[name], maxulp=2 if name in MATRICES else 0)
    found = problems_of(tmp_path / "b.keras", tmp_path / "c.pt", source)
    assert found == {("precision-loss", ("params", name)) for name in PLACES}
    convert(tmp_path / "b.keras", tmp_path / "c.pt", template=source, allow=[*ALLOWED, "precision-loss"])
    state = torch.load(tmp_path / "c.pt")
    assert {value.dtype for value in state["model"].values()} == {torch.bfloat16}
    assert state["muon"]["state"][0]["momentum_buffer"].dtype == torch.float32


def moments(run: tuple[Any, Any, Any]) -> dict[str, Any]:
    named = dict(run[0].named_parameters())
    return {
        name: run[1].state[p]["momentum_buffer"] if name in MATRICES else run[2].state[p]["exp_avg"]
        for name, p in named.items()
    }


def test_groups_of_their_own_rates(tmp_path: Path) -> None:
    model, muon, adamw = torch_run()
    items = list(adamw.param_groups[0]["params"])
    named = [(name, p) for name, p in model.named_parameters() if name not in MATRICES]
    assert [p is item for (_, p), item in zip(named, items, strict=True)]
    groups = [{"params": named[:2], "lr": 0.25}, {"params": named[2:], "lr": 0.5}]
    divided = torch.optim.AdamW(groups, weight_decay=0.3)
    divided.state.update(adamw.state)
    source = torch_file((model, muon, divided), tmp_path / "a.pt")
    template = keras_file(keras_run(0), "file", tmp_path / "t")
    rate = ("optimizers", "adamw", "groups", 0, "hyperparameters", "learning_rate")
    assert problems_of(source, tmp_path / "b.keras", template) == {("groups-differ", rate)}
    convert(source, tmp_path / "b.keras", template=template, allow=[*ALLOWED, "groups-differ"])
    optimizer = loaded_keras(tmp_path / "b.keras", "file")[1]
    assert optimizer.adam_lr_ratio == pytest.approx(0.25 / 0.02)


def test_steps_that_differ(tmp_path: Path) -> None:
    """AdamW counts, torch's Muon does not; parameters of AdamW that differ are told."""
    run = torch_run()
    run[2].state[dict(run[0].named_parameters())["head.bias"]]["step"] += 2
    source = torch_file(run, tmp_path / "a.pt")
    template = keras_file(keras_run(0), "file", tmp_path / "t")
    found = problems_of(source, tmp_path / "b.keras", template)
    assert found == {("unequal-steps", ("optimizers", "adamw", "param_steps"))}
    whole = ckptconv.open(torch_file(torch_run(), tmp_path / "c.pt"))
    (muon, adamw), target = whole.optimizers, ckptconv.open(template)
    counted = replace(whole, optimizers=(replace(muon, step=Known(value=STEPS + 2)), adamw))
    refused, allowed = Account(frozenset()), Account(frozenset({"unequal-steps"}))
    divide(counted, target, {}, refused)
    assert [(p.code, p.loc) for p in refused.problems] == [("unequal-steps", ("optimizers", "muon", "step"))]
    division = divide(counted, target, {}, allowed)
    assert division is not None
    assert not allowed.problems
    assert [value_of(one.step) for one in division.source.optimizers] == [STEPS + 2] * 2
