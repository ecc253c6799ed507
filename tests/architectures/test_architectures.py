"""Real architectures cross in both directions, matched without a name or an order in common.

Everything is random: weights, biases, statistics, and the moments of a few updates. Outputs are equal, and
training goes on as in the source; with a fresh optimizer it does not. Then the same models under random
names, with their modules declared in a random order, are matched as before.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("tensorflow")
pytest.importorskip("keras")

import ckptconv
from ckptconv.compounds import compounds
from ckptconv.document import Checkpoint
from ckptconv.mapping import match
from ckptconv.pieces import apart
from ckptconv.telling import Side
from tests.architectures.both import Architecture, KerasSide, TorchSide, batches, distance
from tests.architectures.variants import keras_variant, torch_variant
from tests.architectures.zoo import (
    CONVOLUTIONAL,
    ENCODERS,
    LARGE,
    RECURRENT,
    SMALL_TRANSFORMERS,
    TWO_BIASES,
)

SIDES = {"torch": TorchSide, "keras": KerasSide}
BEFORE, BEHIND = 2, 3
OUTPUT = 1e-5


def each(*architectures: Architecture) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("architecture", architectures, ids=[a.name for a in architectures])


ways = pytest.mark.parametrize("way", [("torch", "keras"), ("keras", "torch")], ids="-to-".join)


@pytest.mark.slow
@ways
@each(*CONVOLUTIONAL, *RECURRENT, *ENCODERS, *LARGE)
def test_a_run_goes_on_in_the_other_framework(
    architecture: Architecture, way: tuple[str, str], tmp_path: Path
) -> None:
    goes_on(architecture, way, tmp_path)


@ways
@each(*SMALL_TRANSFORMERS)
def test_a_small_one_goes_on(architecture: Architecture, way: tuple[str, str], tmp_path: Path) -> None:
    goes_on(architecture, way, tmp_path)


def goes_on(architecture: Architecture, way: tuple[str, str], tmp_path: Path) -> None:
    origin, resumed = SIDES[way[0]](architecture, 1), SIDES[way[1]](architecture, 2)
    x = architecture.batch(np.random.default_rng(3))
    steps = list(batches(architecture, origin.output(x), BEFORE + BEHIND))
    origin.train(steps[:BEFORE])
    run, converted = origin.save(tmp_path), resumed.target(tmp_path)
    ckptconv.convert(run, converted, template=resumed.describe(x), source_spec=origin.describe(x))
    resumed.load(converted)
    assert distance(resumed.output(x), origin.output(x)) <= OUTPUT
    expected = origin.train(steps[BEFORE:])
    drift = relative(resumed.train(steps[BEFORE:]), expected)
    assert drift <= architecture.drift
    resumed.load(converted)
    resumed.forget()
    assert relative(resumed.train(steps[BEFORE:]), expected) >= architecture.control * drift


@pytest.mark.slow
@ways
def test_two_biases_that_both_train_go_on_within_their_verdict(way: tuple[str, str], tmp_path: Path) -> None:
    """The outputs are equal; what is trained on parts from the source, less than after a fresh start."""
    origin, resumed = SIDES[way[0]](TWO_BIASES, 1), SIDES[way[1]](TWO_BIASES, 2)
    x = TWO_BIASES.batch(np.random.default_rng(3))
    steps = list(batches(TWO_BIASES, origin.output(x), BEFORE + BEHIND))
    origin.train(steps[:BEFORE])
    run, converted = origin.save(tmp_path), resumed.target(tmp_path)
    report = ckptconv.convert(run, converted, template=resumed.describe(x), source_spec=origin.describe(x))
    (verdict,) = report.verdicts
    assert verdict.verdict == "approximate"
    assert any("freeze_recurrent_bias" in line for line in verdict.residuals)
    resumed.load(converted)
    assert distance(resumed.output(x), origin.output(x)) <= OUTPUT
    expected = origin.train(steps[BEFORE:])
    drift = relative(resumed.train(steps[BEFORE:]), expected)
    resumed.load(converted)
    resumed.forget()
    control = relative(resumed.train(steps[BEFORE:]), expected)
    assert TWO_BIASES.drift / 2 < drift < control / 4


def relative(losses: list[float], expected: list[float]) -> float:
    return max(abs(a - b) / abs(b) for a, b in zip(losses, expected, strict=True))


@pytest.mark.slow
@each(*CONVOLUTIONAL, *RECURRENT, *SMALL_TRANSFORMERS)
def test_names_and_the_order_of_declaration_do_not_matter(architecture: Architecture) -> None:
    ours, theirs = TorchSide(architecture, 1), KerasSide(architecture, 2)
    x = architecture.batch(np.random.default_rng(3))
    here, there = ours.describe(x), theirs.describe(x)
    pairs = matched(here, there)
    assert matched(there, here, ("keras3", "torch")) == {target: source for source, target in pairs.items()}
    base, layers = ours.model, theirs.model
    for seed in range(2):
        ours.model, old = torch_variant(base, seed)
        theirs.model = keras_variant(layers, seed)
        ours.forget()
        theirs.forget()
        variant = theirs.describe(x)
        before = dict(
            zip(variant.params, there.params, strict=True)
        )  # a copy has its layers in the same order
        assert before.keys() - there.params.keys()
        found = matched(ours.describe(x), variant)
        assert {(old[ours], i): (before[its], j) for (ours, i), (its, j) in found.items()} == pairs


Piece = tuple[str, int]
"""A parameter of a file, and which of its pieces."""


def matched(
    source: Checkpoint, target: Checkpoint, frameworks: tuple[str, str] = ("torch", "keras3")
) -> dict[Piece, Piece]:
    ours, theirs = compounds(source, target, frameworks)
    cover = match(apart(source, ours), apart(target, theirs), frameworks=frameworks)
    assert cover.problems == ()
    here, there = Side(whole=source, rewrites=ours), Side(whole=target, rewrites=theirs)
    pairs = (pair for pair in cover.pairs if pair.matched_by != "alias")
    return {_piece(here, pair.source): _piece(there, pair.target) for pair in pairs}


def _piece(side: Side, name: str) -> Piece:
    return side.file_name(name), side.made[name][1] if name in side.made else 0
