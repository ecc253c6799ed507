"""`plan`: every array of the target with what makes it, as a table and as JSON; nothing is left unsaid."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from ckptconv import convert, open
from ckptconv.document import Checkpoint, Param, Progress, Unknown
from ckptconv.ops import Add, Cast, Concat, Permute, Reorder, Reshape, Scale, Shift, Slice
from ckptconv.rendering.plan import WIDTH, expression
from ckptconv.rendering.report import report_view
from ckptconv.rendering.text import plain
from ckptconv.report import Producer, Report
from ckptconv.schema import report_to_json, schema_problems
from ckptconv.skeleton import skeleton_of
from ckptconv.tensor import StoredTensor
from tests.support.command import FIXTURES, invoke

RUN = FIXTURES / "plain" / "mlp-adamw" / "run.pt"
TEMPLATE = FIXTURES / "keras3" / "mlp-adamw-fresh" / "ckpt-1"
IMAGES = FIXTURES / "plain" / "conv-bn-embedding" / "run.pt"


def planned(source: Path | Checkpoint, target: Path, **options: object) -> Report:
    report = convert(source, target, dry_run=True, **options)
    assert schema_problems(report_to_json(report), "report") == []
    assert report.plan is not None
    return report


def test_every_array_of_the_target_has_a_row(tmp_path: Path) -> None:
    report = planned(RUN, tmp_path / "ckpt-1", template=TEMPLATE)
    assert report.plan is not None
    rows = {row.target: row for row in report.plan.rows}
    assert rows.keys() == {address for address, _ in open(TEMPLATE).tensors()}
    kernel = rows["param", "fc1/kernel"]
    assert (kernel.shape, kernel.dtype, kernel.axes) == ((8, 16), "float32", (("out", "in"), ("in", "out")))
    assert kernel.evidence == "matched, by name"
    assert [(p.item, list(p.ops)) for p in kernel.producers] == [
        (("param", "fc1.weight"), [{"op": "permute", "order": [1, 0]}])
    ]
    (slot,) = rows["slot", "optimizer", "second_moment", "fc2/kernel"].producers
    assert slot.item == ("slot", "optimizer", "second_moment", "fc2.weight")
    assert report.plan.left_in_source == ()
    assert report.plan.left_in_target == (("extra", "save_counter/.ATTRIBUTES/VARIABLE_VALUE"),)


def test_what_is_written_is_what_was_planned(tmp_path: Path) -> None:
    target = tmp_path / "ckpt-1"
    plan = planned(RUN, target, template=TEMPLATE).plan
    assert convert(RUN, target, template=TEMPLATE).plan is None
    written = {address: (t.dtype.name, t.shape) for address, t in open(target).tensors()}
    assert plan is not None
    assert written == {row.target: (row.dtype, row.shape) for row in plan.rows}


def test_what_an_export_leaves_behind_is_left_over_in_the_source(tmp_path: Path) -> None:
    plan = planned(RUN, tmp_path / "weights.safetensors").plan
    assert plan is not None
    assert Counter(row.target[0] for row in plan.rows) == {"param": 4}
    assert {address[0] for address in plan.left_in_source} == {"slot"}
    assert (len(plan.left_in_source), plan.left_in_target) == (8, ())


def test_a_plan_that_is_stopped_says_what_has_no_producer(tmp_path: Path) -> None:
    report = planned(RUN, tmp_path / "other.pt", template=skeleton_of(open(IMAGES)))
    assert report.problems
    assert report.plan is not None
    names = set(open(IMAGES).params)
    assert names <= {str(a[1]) for a in report.plan.left_in_target if a[0] == "param"}
    assert {str(a[1]) for a in report.plan.left_in_source if a[0] == "param"} == set(open(RUN).params)


@pytest.mark.parametrize(
    ("producers", "expected"),
    [
        ((("w", ()),), "w"),
        ((("w", (Permute((1, 0)),)),), "transpose(w)"),
        ((("w", (Reshape((2, 3), (6,)), Permute((0,)), Reshape((6,), (3, 2)))),), "transpose(w)"),
        ((("w", (Reshape((2, 3), (6,)),)),), "reshape(w)"),
        ((("w", (Slice(0, 4, 8), Permute((1, 0)))),), "transpose(w[4:8])"),
        ((("w", (Slice(1, 4, 8),)),), "w[:, 4:8]"),
        ((("w", (Reorder(0, (1, 0)), Permute((1, 0)))),), "transpose(reorder(w))"),
        ((("w", (Cast("bfloat16"),)),), "cast(w)"),
        ((("w", (Scale(0.5), Shift(1.0))),), "(0.5 * w + 1.0)"),
        ((("a", (Add(),)), ("b", (Add(),))), "sum(a, b)"),
        ((("a", (Slice(0, 0, 2), Add(), Reorder(0, (1, 0)))), ("b", (Slice(0, 0, 2), Add()))),
         "reorder(sum(a[0:2], b[0:2]))"),
    ],
)  # fmt: skip
def test_ops_read_as_code_does(producers: tuple, expected: str) -> None:
    made = [
        Producer(item=("param", name), ops=tuple(op.to_json() for op in each)) for name, each in producers
    ]
    assert expression(made) == expected


def test_parts_are_joined_in_their_order() -> None:
    def part(name: str, number: int) -> Producer:
        ops = (Permute((1, 0)).to_json(), {**Concat(0).to_json(), "part": number, "of": 11})
        return Producer(item=("param", name), ops=ops)

    made = [part(f"p{number}", number) for number in reversed(range(11))]
    assert expression(made) == f"concat({', '.join(f'transpose(p{number})' for number in range(11))})"


def shown(report: Report, *, verbose: bool = False) -> list[str]:
    return plain(report_view(report, verbose=verbose)).splitlines()


def test_a_row_stands_in_one_line_and_slots_are_summarized(tmp_path: Path) -> None:
    template = replace(open(TEMPLATE), extras={})
    report = planned(RUN, tmp_path / "ckpt-1", template=template)
    rows = [line.split() for line in shown(report) if "<-" in line]
    line = "fc1/kernel (8, 16) float32 <- transpose(fc1.weight) out in -> in out matched, by name"
    assert rows[0] == line.split()
    assert len(rows) == 4
    assert any("first_moment (4), second_moment (4)" in line for line in shown(report))
    assert sum("<-" in line for line in shown(report, verbose=True)) == 12


def test_long_names_take_two_lines_of_the_width(tmp_path: Path) -> None:
    def document(stem: str) -> Checkpoint:
        names = [f"{stem}.layers.{i}.self_attention.output_projection.weight" for i in range(2)]
        tensor = StoredTensor.of_array(np.ones((2, 3), np.float32))
        params = {name: Param(name=name, tensor=tensor) for name in names}
        provenance = open(RUN).provenance
        return Checkpoint(progress=Progress(step=Unknown(reason="-")), params=params, provenance=provenance)

    source = document("encoder")
    report = planned(source, tmp_path / "other.safetensors")
    lines = [line for line in shown(report) if "self_attention" in line]
    assert len(lines) == 4
    assert max(map(len, lines)) <= WIDTH


def test_a_slot_that_goes_another_way_than_its_parameter_has_a_row_of_its_own(tmp_path: Path) -> None:
    source = open(RUN)
    optimizer = source.optimizers[0]
    slots = {"first_moment": {**optimizer.slots["first_moment"]}, "second_moment": {}}
    slots["second_moment"] = dict(optimizer.slots["second_moment"])
    del slots["first_moment"]["fc2.bias"]
    partial = replace(source, optimizers=(replace(optimizer, slots=slots),), residue=None)
    report = planned(partial, tmp_path / "ckpt-1", template=TEMPLATE, allow=["slots-missing"])
    assert report.plan is not None
    assert ("slot", "optimizer", "first_moment", "fc2/bias") in report.plan.left_in_target


def test_the_command_prints_it(tmp_path: Path) -> None:
    code, text = invoke("plan", RUN, tmp_path / "ckpt-1", "--template", TEMPLATE)
    assert code == 0
    assert "<- transpose(fc1.weight)" in text
    code, text = invoke("plan", RUN, tmp_path / "ckpt-1", "--template", TEMPLATE, "--json")
    told = json.loads(text)["plan"]
    assert told["counts"] == {
        "rows": 13,
        "copied": 6,
        "created": 1,
        "transformed": 6,
        "left_in_source": 0,
        "left_in_target": 1,
    }
    assert not list(tmp_path.iterdir())
