"""Parameter groups of PyTorch against Keras' one group: exclusions, differences, and groups without names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("tensorflow")
keras = pytest.importorskip("keras")

from torch import nn  # noqa: E402

from ckptconv.adapters.pytorch import describe  # noqa: E402
from ckptconv.skeleton import write_skeleton  # noqa: E402
from tests.support.command import convert_here, refused_here  # noqa: E402
from tests.support.twins import (  # noqa: E402
    STEP,
    assert_equal,
    codes,
    keras_run,
    linear,
    steps,
    torch_run,
)

DENSE = linear("0", 0) + linear("1", 1) + linear("2", 2)


def two_groups(first: dict[str, Any], second: dict[str, Any], *, named: bool = True) -> Any:
    """A run of AdamW whose weights are trained with `first` and whose biases with `second`."""
    model = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3), nn.Linear(3, 2))
    items = list(model.named_parameters())
    members = [[(n, p) if named else p for n, p in items if (p.ndim > 1) == w] for w in (True, False)]
    groups = [{"params": members[0][::-1], **first}, {"params": members[1], **second}]
    return torch_run(model, 1, optimizer=torch.optim.AdamW(groups, lr=0.01, weight_decay=0.03))


def adamw(seed: int, step: int = STEP) -> Any:
    optimizer = keras.optimizers.AdamW(0.003, weight_decay=0.004, epsilon=1e-8)
    model = keras.Sequential([keras.Input((4,)), *(keras.layers.Dense(n) for n in (5, 3, 2))])
    return keras_run("keras3", model, seed, step=step, optimizer=optimizer)


class TestGroups:
    """Parameter groups of PyTorch and Keras' one."""

    def test_a_group_without_decay_becomes_an_exclusion(self, tmp_path: Path) -> None:
        ours = two_groups({"weight_decay": 0.1}, {"weight_decay": 0.0})
        fresh = adamw(2, step=0).save(tmp_path / "k" / "ckpt")
        report = tmp_path / "report"
        run = ours.save(tmp_path / "run.pt")
        converted = convert_here(run, tmp_path / "out-1", "--template", fresh, "--report", report)
        assert_equal(ours, adamw(3).load(converted), DENSE)
        requires = json.loads(report.read_text())["target_requires"]
        assert any("weight_decay=0.1" in line for line in requires)
        (exclusion,) = [line for line in requires if "exclude_from_weight_decay" in line]
        assert all(f"dense-{n}/bias" in exclusion for n in range(3))
        assert "kernel" not in exclusion

    @pytest.mark.parametrize(
        ("first", "second", "name"),
        [
            ({"lr": 0.1}, {"lr": 0.2}, "learning_rate"),
            ({"weight_decay": 0.1}, {"weight_decay": 0.2}, "weight_decay"),
            ({"eps": 1e-8}, {"eps": 1e-6}, "epsilon"),
        ],
    )
    def test_other_differences_stop(
        self, first: dict[str, Any], second: dict[str, Any], name: str, tmp_path: Path
    ) -> None:
        run = two_groups(first, second).save(tmp_path / "run.pt")
        fresh = adamw(2, step=0).save(tmp_path / "k" / "ckpt")
        problems = refused_here("convert", run, tmp_path / "out", "--template", fresh)
        assert codes(problems) == [("groups-differ", name)]

    def test_unnamed_ones_need_a_spec(self, tmp_path: Path) -> None:
        ours = two_groups({}, {}, named=False)
        run = ours.save(tmp_path / "run.pt")
        fresh = adamw(2, step=0).save(tmp_path / "k" / "ckpt")
        problems = refused_here("convert", run, tmp_path / "out", "--template", fresh)
        assert codes(problems) == [("order-ambiguous", "optimizer")]
        spec = tmp_path / "described.json"
        write_skeleton(describe(ours.model, ours.optimizer), spec)
        converted = convert_here(run, tmp_path / "out-1", "--template", fresh, "--source-spec", spec)
        assert_equal(ours, adamw(3).load(converted), DENSE)

    def test_so_do_those_of_a_template(self, tmp_path: Path) -> None:
        ours = two_groups({"weight_decay": 0.1}, {"weight_decay": 0.0}, named=False)
        fresh = ours.save(tmp_path / "fresh.pt")
        theirs = adamw(4)
        source = theirs.save(tmp_path / "k" / "ckpt")
        problems = refused_here("convert", source, tmp_path / "out.pt", "--template", fresh)
        assert codes(problems) == [("order-ambiguous", "optimizer")]
        assert "--template" in problems[0]["hint"]
        spec = tmp_path / "described.json"
        write_skeleton(describe(ours.model, ours.optimizer), spec)
        ours.load(convert_here(source, tmp_path / "out.pt", "--template", spec))
        assert_equal(ours, theirs, DENSE)
        assert [group["weight_decay"] for group in ours.optimizer.param_groups] == [0.1, 0.0]
        assert {group["lr"] for group in ours.optimizer.param_groups} == {float(np.float32(0.003))}

    def test_named_ones_of_a_template_are_filled_by_name(self, tmp_path: Path) -> None:
        fresh = two_groups({"weight_decay": 0.1}, {"weight_decay": 0.0}).save(tmp_path / "fresh.pt")
        theirs = adamw(4)
        source = theirs.save(tmp_path / "k" / "ckpt")
        resumed = two_groups({}, {}).load(convert_here(source, tmp_path / "out.pt", "--template", fresh))
        assert_equal(resumed, theirs, DENSE)
        assert steps(resumed) == {STEP}
