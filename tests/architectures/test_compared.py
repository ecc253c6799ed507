"""Real architectures in both frameworks, layer by layer on one batch: equal where the weights have crossed.

One number that is changed in a layer in the middle is found at that layer, not at the output.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("tensorflow")
pytest.importorskip("keras")

import torch

import ckptconv
from tests.architectures.both import Architecture, KerasSide, TorchSide, channels_first
from tests.architectures.zoo import CONVOLUTIONAL, RECURRENT, SMALL_TRANSFORMERS


def crossed(architecture: Architecture, where: Path) -> tuple[Any, Any, Any, Any]:
    """Both models with one model's weights, the report, and a batch as torch takes it."""
    origin, resumed = TorchSide(architecture, 1), KerasSide(architecture, 2)
    x = architecture.batch(np.random.default_rng(3))
    run, converted = origin.save(where), resumed.target(where)
    report = ckptconv.convert(
        run,
        converted,
        template=resumed.describe(x),
        source_spec=origin.describe(x),
        set_={"step": "1"},
        allow=["slots-missing"],
    )
    resumed.load(converted)
    batch = tuple(map(channels_first, x)) if isinstance(x, tuple) else channels_first(x)
    return origin.model, resumed.model, report, batch


def is_found(architecture: Architecture, where: Path) -> None:
    ours, theirs, report, batch = crossed(architecture, where)
    axes = ("nchw", "nhwc") if not isinstance(batch, tuple) and batch.ndim > 3 else None
    for told in (report, None):
        found = ckptconv.compare_outputs(ours, theirs, told, batch, axes=axes)
        assert found.equal, str(found)
        compared = [row for row in found.rows if not row.untold]
        assert len(compared) > 0.9 * len(found.rows)
    row = compared[len(compared) // 2]
    with torch.no_grad():
        next(ours.get_submodule(row.torch).parameters()).mul_(1.001)
    found = ckptconv.compare_outputs(ours, theirs, report, batch, axes=axes)
    assert found.first is not None
    assert found.first.torch == row.torch


@pytest.mark.parametrize("architecture", SMALL_TRANSFORMERS, ids=lambda one: one.name)
def test_small_transformers(architecture: Architecture, tmp_path: Path) -> None:
    is_found(architecture, tmp_path)


SOME = [one for one in (*CONVOLUTIONAL, *RECURRENT) if one.name in ("resnet18", "unet", "bilstm-tagger")]
"""The others take minutes, and were seen to do the same."""


@pytest.mark.slow
@pytest.mark.parametrize("architecture", SOME, ids=lambda one: one.name)
def test_others(architecture: Architecture, tmp_path: Path) -> None:
    is_found(architecture, tmp_path)
