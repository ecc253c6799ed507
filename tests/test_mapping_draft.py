"""What `draft_mapping` writes of small documents: rules with evidence, choices, what is left to do."""

from __future__ import annotations

from typing import Any

import pytest

from ckptconv.correspondence import check_mapping, draft_mapping
from ckptconv.document import Checkpoint
from ckptconv.errors import CkptError
from ckptconv.mapping_file import to_json
from tests.test_mapping_rules import found, keras, mapping, rule, torch


def rules(source: Checkpoint, template: Checkpoint, **options: Any) -> list[dict[str, Any]]:
    written: list[dict[str, Any]] = to_json(draft_mapping(source, template, **options))["rules"]
    return written


def test_layers_are_one_rule_with_their_evidence() -> None:
    ours = torch({f"enc.{i}.{n}": s for i in range(12) for n, s in (("weight", (3, 2)), ("bias", (3,)))})
    theirs = keras(
        {f"block{i + 1}/{n}": s for i in range(12) for n, s in (("_kernel", (2, 3)), ("bias", (3,)))}
    )
    note = "matched by structure, axes matched"
    assert rules(ours, theirs) == [
        {"left": "enc.{i}.weight", "right": "block{i+1}/_kernel", "axes": "out in -> in out", "note": note},
        {"left": "enc.{i}.bias", "right": "block{i+1}/bias", "note": note},
    ]
    assert to_json(draft_mapping(ours, theirs))["left"] == "torch"
    assert "unmatched" not in to_json(draft_mapping(ours, theirs))


def test_a_square_has_choices_and_no_axes_until_one_is_taken() -> None:
    ours, theirs = torch({"m.weight": (4, 4)}), keras({"m/_kernel": (4, 4)})
    drafted = to_json(draft_mapping(ours, theirs))
    (written,) = drafted["rules"]
    assert "axes" not in written
    assert written["choices"] == ["out in -> in out", "in out -> in out"]
    assert found(check_mapping(drafted, ours, theirs)) == [("layout-ambiguous", ("params", "m.weight"))]
    for choice in written["choices"]:
        written["axes"] = choice
        assert found(check_mapping(drafted, ours, theirs)) == []


def test_what_has_no_partner_is_listed_once_for_all_layers_with_the_nearest() -> None:
    ours = torch({f"a.{i}.weight": (3, 2) for i in range(4)} | {"mask": (7, 7), "scale": (5,)})
    theirs = keras({f"b{i}/q/w": (2, 3) for i in range(3)} | {"other": (9,), "weights": (5,)})
    drafted = draft_mapping(ours, theirs)
    assert not drafted.rules
    left = {str(one.name): one for one in drafted.left_unmatched}
    assert set(left) == {"a.{i}.weight", "mask", "scale"}
    assert left["a.{i}.weight"].shape == (3, 2)
    assert left["a.{i}.weight"].nearest[0] == "b{i}/q/w"
    assert left["scale"].nearest[0] == "weights"


def test_one_that_is_begun_is_gone_on_with_on_its_own_sides() -> None:
    ours = torch({"x.weight": (3, 2), "x.bias": (3,), "y.weight": (5, 3), "y.bias": (5,)})
    theirs = keras({"p/_kernel": (2, 3), "p/bias": (3,), "q/_kernel": (3, 5), "q/bias": (5,)})
    begun = mapping(rule("x.weight", "p/_kernel", axes="out in -> in out", note="mine"))
    for source, template in ((ours, theirs), (theirs, ours)):
        written = rules(source, template, mapping=begun)
        assert written[0] == begun["rules"][0]
        assert {(one["left"], one["right"], one.get("axes")) for one in written[1:]} == {
            ("x.bias", "p/bias", None),
            ("y.weight", "q/_kernel", "out in -> in out"),
            ("y.bias", "q/bias", None),
        }
    with pytest.raises(CkptError) as caught:
        draft_mapping(ours, theirs, mapping=mapping(rule("z", "p/bias")))
    assert [(p.code, p.loc) for p in caught.value.problems] == [("mapping-invalid", ("rules", 0))]
