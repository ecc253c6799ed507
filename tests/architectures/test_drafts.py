"""What `ckptconv map` writes of the architectures says what was matched without it, in few rules."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("tensorflow")

from ckptconv import Checkpoint
from ckptconv.mapping_draft import draft
from ckptconv.mapping_file import MappingFile, mapping_of, to_json
from ckptconv.mapping_rules import Ruled, ruled
from ckptconv.matching import Matching, framework_of, matched
from tests.architectures.both import Architecture, KerasSide, TorchSide
from tests.architectures.zoo import CONVOLUTIONAL, RECURRENT, SMALL_TRANSFORMERS

pytestmark = pytest.mark.slow

ARCHITECTURES = (
    *(a for a in CONVOLUTIONAL if a.name not in ("resnet50", "vgg")),
    *RECURRENT,
    *SMALL_TRANSFORMERS,
)
MOST_RULES = {"mobilenet_v2": 75}
"""Its blocks have no two numbers that go together."""


def matching(source: Checkpoint, template: Checkpoint, mapping: MappingFile | None = None) -> Matching:
    frameworks = (framework_of(source), framework_of(template))
    rules = Ruled() if mapping is None else ruled(mapping, source, template, frameworks)
    assert not rules.problems
    found = matched(source, template, frameworks, rules)
    assert not found.cover.problems
    return found


def pairs(found: Matching) -> set[tuple[str, str, Any]]:
    """Parameters of the files that belong together, with what is done to the source's."""
    return {
        (found.source.file_name(pair.source), found.target.file_name(pair.target), pair.ops)
        for pair in found.cover.pairs
    }


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=lambda architecture: architecture.name)
def test_a_draft_says_what_is_matched_by_itself(architecture: Architecture) -> None:
    batch = architecture.batch(np.random.default_rng(0))
    sides = TorchSide(architecture, 1).describe(batch), KerasSide(architecture, 2).describe(batch)
    for source, template in (sides, sides[::-1]):
        found = matching(source, template)
        drafted = draft(found)
        assert not drafted.left_unmatched
        assert not drafted.right_unmatched
        assert len(drafted.rules) <= MOST_RULES.get(architecture.name, 30)
        assert all(rule.note for rule in drafted.rules)
        again = mapping_of(to_json(drafted))
        for ours, theirs in ((source, template), (template, source)):
            told = matching(ours, theirs, again)
            assert pairs(told) == pairs(matching(ours, theirs))
            assert {p.matched_by for p in told.cover.pairs} <= {"mapping", "alias"}
