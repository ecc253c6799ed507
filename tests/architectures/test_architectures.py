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
from ckptconv.document import Checkpoint
from ckptconv.mapping import match
from tests.architectures.both import Architecture, KerasSide, TorchSide, batches, distance
from tests.architectures.variants import keras_variant, torch_variant
from tests.architectures.zoo import CONVOLUTIONAL

SIDES = {"torch": TorchSide, "keras": KerasSide}
BEFORE, BEHIND = 2, 3
OUTPUT = 1e-5

each = pytest.mark.parametrize("architecture", CONVOLUTIONAL, ids=[a.name for a in CONVOLUTIONAL])


@pytest.mark.slow
@pytest.mark.parametrize("way", [("torch", "keras"), ("keras", "torch")], ids="-to-".join)
@each
def test_a_run_goes_on_in_the_other_framework(
    architecture: Architecture, way: tuple[str, str], tmp_path: Path
) -> None:
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


def relative(losses: list[float], expected: list[float]) -> float:
    return max(abs(a - b) / abs(b) for a, b in zip(losses, expected, strict=True))


@pytest.mark.slow
@each
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
        assert {old[source]: before[target] for source, target in found.items()} == pairs


def matched(
    source: Checkpoint, target: Checkpoint, frameworks: tuple[str, str] = ("torch", "keras3")
) -> dict[str, str]:
    cover = match(source, target, frameworks=frameworks)
    assert cover.problems == ()
    return {pair.source: pair.target for pair in cover.pairs}
