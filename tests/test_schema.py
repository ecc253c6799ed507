"""The document as JSON: round trips, schema against types, versions, residues, notes, skeletons."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import struct
from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ckptconv import (
    document,
    dtypes,
    errors,
    facts,
    mapping_file,
    note,
    ops,
    packing,
    report,
    schema,
    validation,
)
from ckptconv.bitcast import AsBytes, FromBytes
from ckptconv.document import PROGRESS_FIELDS, Known, Unknown
from ckptconv.errors import CkptError, FormatError, Problem
from ckptconv.rawtree import DictNode, Lifted, ListNode, Opaque
from ckptconv.skeleton import skeleton_of
from ckptconv.strictjson import dump, dump_document, parse
from tests.support.documents import VALUES, array_tensor, documents, full_document

CHECKPOINT = schema.load_schema("checkpoint")
REPORT = schema.load_schema("report")
MAPPING = schema.load_schema("mapping")


def code_and_loc(error: CkptError) -> list[tuple[str, tuple[str | int, ...]]]:
    return [(problem.code, problem.loc) for problem in error.problems]


# -- round trips ---------------------------------------------------------------------------------------


@settings(max_examples=150, deadline=None)
@given(documents())
def test_from_json_undoes_to_json(checkpoint):
    obj = parse(dump(schema.to_json(checkpoint)), "x")
    assert schema.validate_manifest(obj) == []
    back = schema.from_json(obj)
    assert replace(back, params={}, optimizers=()) == replace(checkpoint, params={}, optimizers=())
    for a, b in zip(back.params.values(), checkpoint.params.values(), strict=True):
        assert a == b
    for a, b in zip(back.optimizers, checkpoint.optimizers, strict=True):
        assert a == b
        assert list(a.slots) == list(b.slots)
        assert a.params == b.params


def test_a_full_document_comes_back_with_its_tensors():
    checkpoint = full_document()
    obj = parse(dump(schema.to_json(checkpoint)), "x")
    assert schema.validate_manifest(obj) == []
    back = schema.from_json(obj, dict(checkpoint.tensors()))
    assert back == checkpoint
    assert list(back.params) == list(checkpoint.params)
    assert not back.is_skeleton
    assert schema.from_json(obj).is_skeleton


def test_tensors_of_another_spec_are_refused():
    checkpoint = full_document()
    tensors = {**dict(checkpoint.tensors()), ("param", "bias"): array_tensor((4,))}
    with pytest.raises(CkptError) as caught:
        schema.from_json(schema.to_json(checkpoint), tensors)
    assert code_and_loc(caught.value) == [("reference-broken", ("param", "bias"))]


@given(VALUES)
def test_values_are_exact(value):
    back = facts.value_from_json(parse(dump(facts.value_to_json(value)), "x"))
    assert back == value
    assert repr(back) == repr(value)  # tells 0.0 from -0.0, 1 from 1.0 and True


@pytest.mark.parametrize("bits", [0x7FF8000000000000, 0xFFF8000000000001, 0x7FF800000000BEEF])
def test_nan_keeps_its_bits(bits):
    (value,) = struct.unpack(">d", bits.to_bytes(8, "big"))
    back = facts.value_from_json(facts.value_to_json(value))
    assert isinstance(back, float)
    assert math.isnan(back)
    assert struct.pack(">d", back) == struct.pack(">d", value)


def test_a_long_integer_is_exact():
    value = 7**6000  # more digits than Python converts to decimal
    assert facts.value_from_json(json.loads(json.dumps(facts.value_to_json(value)))) == value


def test_an_edit_of_the_step_reaches_every_place():
    checkpoint = full_document()
    single = replace(checkpoint, optimizers=checkpoint.optimizers[:1])
    obj = schema.to_json(single)
    obj["progress"]["step"]["value"] = 20
    back = schema.from_json(obj)
    assert back.optimizers[0].step == Known(value=20, source="optimizer.state.*.step")
    assert back.optimizers[0].param_steps == {"dense/kernel": 20, "bias": 4}


def test_many_parameters_stay_small():
    params, slot = {}, {}
    names = [f"model.layers.{i}.self_attn.q_proj.weight" for i in range(20_000)]
    tensor = array_tensor((1, 2))
    for name in names:
        params[name] = document.Param(name=name, tensor=tensor)
        slot[name] = tensor
    optimizer = document.Optimizer(
        name="optimizer",
        algorithm="adam",
        framework="torch",
        step=Known(value=1, source="s"),
        param_steps=dict.fromkeys(names, 1),
        groups=(document.Group(params=tuple(names)),),
        slots={"first_moment": slot, "second_moment": slot},
    )
    checkpoint = document.Checkpoint(
        progress=document.Progress(step=optimizer.step), params=params, optimizers=(optimizer,)
    )
    text = dump_document(schema.to_json(checkpoint))
    assert len(text) < 300 * len(names)
    assert schema.validate_manifest(parse(text, "x")) == []


# -- drift: schema against types -----------------------------------------------------------------------


def properties(name: str, schema_=CHECKPOINT) -> set[str]:
    return set((schema_["$defs"][name] if name else schema_)["properties"])


SAME_FIELDS = [
    ("progress", document.Progress, {}),
    ("param", document.Param, {"tensor": {"dtype", "shape", "encoded_nbytes", "value"}}),
    ("optimizer", document.Optimizer, {}),
    ("group", document.Group, {}),
    ("schedule", document.Schedule, {"unit": set()}),
    ("block", document.Block, {}),
    ("candidate", document.Candidate, {"condition": {"if"}}),
    ("provenance", document.Provenance, {}),
    ("residue", document.Residue, {"root": {"file", "inline"}, "attributes": set()}),
    (
        "",
        document.Checkpoint,
        {"extensions": {"extensions", "schema", "schema_version", "kind", "files"}},
    ),
]


@pytest.mark.parametrize(
    ("name", "type_", "renamed"), SAME_FIELDS, ids=lambda x: getattr(x, "__name__", None)
)
def test_types_and_schema_have_the_same_fields(name, type_, renamed):
    expected = set()
    for field in dataclasses.fields(type_):
        expected |= renamed.get(field.name, {field.name})
    assert properties(name) == expected


def test_facts_have_the_fields_of_the_schema():
    own = {f.name for t in (document.Known, document.Unknown, document.Absent) for f in dataclasses.fields(t)}
    assert properties("fact") == own | {"status"} - {"condition"}
    assert properties("position") == properties("fact") | {"unit"}


RENAMED = {
    "is_sum": {"sum"},
    "line": set(),
    **{f"{side}_unmatched": {"unmatched", "schema", "schema_version"} for side in ("left", "right")},
}


@pytest.mark.parametrize(
    ("name", "type_"),
    [("", mapping_file.MappingFile), ("rule", mapping_file.Rule)],
    ids=["file", "rule"],
)
def test_mapping_and_schema_have_the_same_fields(name, type_):
    fields = [RENAMED.get(field.name, {field.name}) for field in dataclasses.fields(type_)]
    assert properties(name, MAPPING) == set().union(*fields)


REPORT_FIELDS = [
    ("", report.Report, {"verified": {"verified", "schema", "schema_version", "extensions"}}),
    ("entry", report.Entry, {}),
    ("verdict", report.OptimizerVerdict, {}),
    ("problem", errors.Problem, {}),
]


@pytest.mark.parametrize(
    ("name", "type_", "renamed"), REPORT_FIELDS, ids=lambda x: getattr(x, "__name__", None)
)
def test_report_and_schema_have_the_same_fields(name, type_, renamed):
    expected = set()
    for field in dataclasses.fields(type_):
        expected |= renamed.get(field.name, {field.name})
    assert properties(name, REPORT) == expected


def literals(type_, field: str) -> list[str]:
    hints = {f.name: f.type for f in dataclasses.fields(type_)}
    return list(get_args(eval(hints[field], vars(document) | vars(report))))


ENUMS = [
    (CHECKPOINT["$defs"]["dtype"]["enum"], [row.name for row in dtypes.ROWS]),
    (CHECKPOINT["$defs"]["param"]["properties"]["evidence"]["enum"], list(get_args(document.Evidence))),
    (CHECKPOINT["$defs"]["position"]["properties"]["unit"]["enum"], literals(document.Schedule, "unit")),
    (
        CHECKPOINT["$defs"]["optimizer"]["properties"]["param_order"]["enum"],
        literals(document.Optimizer, "param_order"),
    ),
    (
        CHECKPOINT["$defs"]["fact"]["properties"]["status"]["enum"],
        [*literals(document.Known, "status"), "absent", "unknown"],
    ),
    (CHECKPOINT["$defs"]["progress"]["required"], list(PROGRESS_FIELDS)),
    (REPORT["$defs"]["code"]["enum"], list(get_args(errors.Code))),
    (REPORT["$defs"]["entry"]["properties"]["fate"]["enum"], list(get_args(report.Fate))),
    (REPORT["$defs"]["verdict"]["properties"]["verdict"]["enum"], list(get_args(report.Verdict))),
]


@pytest.mark.parametrize(("in_schema", "in_code"), ENUMS)
def test_types_and_schema_have_the_same_words(in_schema, in_code):
    assert in_schema == in_code


@pytest.mark.parametrize("which", [CHECKPOINT, REPORT, MAPPING], ids=["checkpoint", "report", "mapping"])
def test_every_field_is_described_and_no_other_is_allowed(which):
    assert which["$id"].endswith("-1.0.0")
    assert which["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    for name, definition in {"": which, **which["$defs"]}.items():
        assert definition["description"], name
        closed = definition.get("additionalProperties") is False or "$ref" in definition
        assert closed or "properties" not in definition, name
        for field, value in definition.get("properties", {}).items():
            assert value["description"], (name, field)


def test_all_versions_are_those_of_the_code():
    assert CHECKPOINT["properties"]["schema_version"]["const"] == document.SCHEMA_VERSION
    assert REPORT["properties"]["schema_version"]["const"] == report.REPORT_VERSION
    assert MAPPING["properties"]["schema_version"]["const"] == mapping_file.MAPPING_VERSION


# -- versions ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", ["0.9.0", "1.0.1", "2.0.0", 1, None, [], "1.0"])
def test_an_unknown_version_is_refused(version):
    obj = schema.to_json(full_document())
    obj["schema_version"] = version
    with pytest.raises(CkptError) as caught:
        schema.from_json(obj)
    assert code_and_loc(caught.value) == [("schema-version", ("schema_version",))]
    assert [p.code for p in schema.validate_manifest(obj)] == ["schema-version"]


def test_a_listed_version_is_migrated_step_by_step(monkeypatch):
    def first(obj):
        return {**obj, "schema_version": "0.9.0", "remarks": obj["notes"]}

    def second(obj):
        rest = {k: v for k, v in obj.items() if k not in ("notes", "remarks")}
        return {**rest, "schema_version": "1.0.0", "oddities": obj["remarks"]}

    monkeypatch.setitem(validation.MIGRATIONS, "0.8.0", first)
    monkeypatch.setitem(validation.MIGRATIONS, "0.9.0", second)
    checkpoint = full_document()
    old = {**schema.to_json(checkpoint), "schema_version": "0.8.0", "notes": ["x"]}
    del old["oddities"]
    before = dump(old)
    assert schema.from_json(old, dict(checkpoint.tensors())) == replace(checkpoint, oddities=("x",))
    assert dump(old) == before


# -- packing -------------------------------------------------------------------------------------------

LEAVES = (
    st.none()
    | st.booleans()
    | st.integers(-(2**90), 2**90)
    | st.floats(allow_nan=False)
    | st.complex_numbers(allow_nan=False)
    | st.binary(max_size=4)
    | st.text(max_size=4)
    | st.just("\ud800")
    | st.builds(
        Lifted,
        to=st.lists(st.text(max_size=3) | st.integers(0, 9), max_size=3).map(tuple),
        encoding=st.dictionaries(
            st.text(max_size=3), st.none() | st.integers() | st.just((1, 2)) | st.text(max_size=2), max_size=2
        ),
    )
)


def _containers(part):
    some = st.lists(part, max_size=3).map(tuple)
    pairs = st.lists(st.tuples(part, part), max_size=3).map(tuple)
    return (
        st.builds(DictNode, items=pairs, kind=st.text(max_size=3), args=some, state=part)
        | st.builds(ListNode, items=some, kind=st.text(max_size=3))
        | st.builds(
            Opaque,
            kind=st.text(max_size=3),
            name=st.text(max_size=3),
            args=some,
            state=part,
            items=some,
            pairs=pairs,
        )
    )


NODES = st.recursive(LEAVES, _containers, max_leaves=8)


@settings(max_examples=150, deadline=None)
@given(NODES)
def test_unpack_undoes_pack(node):
    data = packing.pack(node)
    assert packing.unpack(data, "x") == node
    assert repr(packing.unpack(data, "x")) == repr(node)


def test_every_truncation_of_a_residue_is_an_error():
    data = packing.pack(full_document().residue.root)
    for end in range(len(data)):
        with pytest.raises(CkptError) as caught:
            packing.unpack(data[:end], "state.msgpack")
        assert caught.value.problems[0].code in ("truncated-file", "corrupt-file")
        assert caught.value.problems[0].loc == ("state.msgpack",)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_a_damaged_residue_is_a_tree_or_an_error(data):
    packed = bytearray(packing.pack(full_document().residue.root))
    for _ in range(data.draw(st.integers(1, 3))):
        packed[data.draw(st.integers(0, len(packed) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(FormatError):  # and nothing else
        packing.unpack(bytes(packed), "state.msgpack")


def test_a_deep_residue_is_no_problem():
    node = None
    for _ in range(20_000):
        node = ListNode(items=(node,))
    back = packing.unpack(packing.pack(node), "x")
    for _ in range(20_000):
        (back,) = back.items
    assert back is None


def test_a_tensor_is_never_in_a_residue():
    with pytest.raises(CkptError) as caught:
        packing.pack(ListNode(items=(array_tensor(),)))
    assert caught.value.problems[0].code == "unsupported-feature"


# -- note ----------------------------------------------------------------------------------------------


def test_a_note_tells_all_but_tensors():
    checkpoint = full_document()
    read = note.read_note(note.write_note(checkpoint))
    assert read.progress.step == Known(value=9, source="embedded note")
    assert read.progress.micro_steps == Known(
        value=18, status="derived", source="embedded note", formula="step * 2"
    )
    assert read.progress.epochs == checkpoint.progress.epochs
    assert read.ties == {"head.kernel": "dense/kernel"}
    assert read.provenance == checkpoint.provenance
    assert read.noted_slots == {
        "optimizer": ("first_moment", "second_moment", "master"),
        "gen/sgd": (),
    }
    first = read.optimizers[0]
    assert first.params == ("dense/kernel", "bias")
    assert first.param_steps == {"dense/kernel": 9, "bias": 4}
    assert first.groups[0].hyperparameters["betas"] == Known(value=(0.9, 0.999), source="embedded note")
    assert first.slots == {}
    assert read.schedules[0].position == Known(value=9, source="embedded note")


NOTE = json.loads(note.write_note(full_document()))
BAD_NOTES = [
    ("{", "corrupt-file", ("ckptconv",)),
    ("[]", "schema-invalid", ("ckptconv",)),
    (json.dumps({**NOTE, "schema_version": "9.0.0"}), "schema-version", ("ckptconv", "schema_version")),
    (json.dumps({**NOTE, "extra": 1}), "schema-invalid", ("ckptconv",)),
    (
        json.dumps({**NOTE, "progress": {**NOTE["progress"], "step": {"status": "recorded", "source": ""}}}),
        "schema-invalid",
        ("ckptconv", "progress", "step"),
    ),
    (
        json.dumps(
            {
                **NOTE,
                "progress": {**NOTE["progress"], "step": {"status": "unknown", "reason": ""}},
                "optimizers": [
                    {**NOTE["optimizers"][0], "step": {"status": "same", "of": "progress.step", "source": ""}}
                ],
            }
        ),
        "reference-broken",
        ("ckptconv", "optimizers", 0, "step"),
    ),
]


@pytest.mark.parametrize(("text", "code", "loc"), BAD_NOTES)
def test_a_bad_note_is_an_error(text, code, loc):
    with pytest.raises(CkptError) as caught:
        note.read_note(text)
    assert (code, loc) in code_and_loc(caught.value)


# -- skeletons -----------------------------------------------------------------------------------------


def test_a_skeleton_file_comes_back(tmp_path: Path):
    checkpoint = full_document()
    path = tmp_path / "spec.json"
    schema.write_skeleton(checkpoint, path)
    assert schema.is_skeleton_file(path)
    back = schema.read_skeleton(path)
    assert back.is_skeleton
    assert back.residue == checkpoint.residue
    assert schema.to_json(back) == schema.to_json(skeleton_of(checkpoint))
    assert schema.to_json(back, values=True) == schema.to_json(skeleton_of(checkpoint), values=True)
    assert sorted(tmp_path.iterdir()) == [path]


SKELETON_FILES = [
    (b"{", "corrupt-file", ("spec.json",)),
    (b"\xff", "corrupt-file", ("spec.json",)),
    (b'{"a": 1, "a": 2}', "duplicate-key", ("spec.json",)),
    (b'{"a": NaN}', "corrupt-file", ("spec.json",)),
    (b'{"a": "\\ud800"}', "corrupt-file", ("spec.json",)),
    (b"[" * 100_000, "limit-exceeded", ("spec.json",)),
    (b"1" * 5000, "limit-exceeded", ("spec.json",)),
    (b"[]", "schema-invalid", ()),
    (b"{}", "schema-invalid", ()),
]


@pytest.mark.parametrize(("data", "code", "loc"), SKELETON_FILES, ids=range(len(SKELETON_FILES)))
def test_a_bad_skeleton_file_is_an_error(tmp_path, data, code, loc):
    path = tmp_path / "spec.json"
    path.write_bytes(data)
    with pytest.raises(CkptError) as caught:
        schema.read_skeleton(path)
    assert (code, loc) in code_and_loc(caught.value)


def test_a_missing_skeleton_file_is_an_error(tmp_path):
    with pytest.raises(CkptError) as caught:
        schema.read_skeleton(tmp_path / "none.json")
    assert code_and_loc(caught.value) == [("missing-file", ("none.json",))]


def test_a_name_that_is_not_unicode_cannot_be_written(tmp_path):
    checkpoint = replace(full_document(), oddities=("\ud800",))
    with pytest.raises(CkptError) as caught:
        schema.write_skeleton(checkpoint, tmp_path / "x.json")
    assert caught.value.problems[0].code == "schema-invalid"
    assert list(tmp_path.iterdir()) == []


# -- report --------------------------------------------------------------------------------------------


def test_a_report_is_valid():
    every_op = (
        ops.Permute((1, 0)),
        ops.Reshape((2, 3), (6,)),
        ops.Slice(0, 0, 1),
        ops.Concat(0),
        ops.Reorder(0, (1, 0)),
        ops.Add(),
        ops.Scale(0.5),
        ops.Shift(0.25),
        ops.Cast("float16"),
        AsBytes(),
        FromBytes("float32", (2,)),
    )
    full = report.Report(
        source="run.pt",
        target="ckpt-1",
        progress={"step": 9, "loss_scale": float("inf")},
        ledger=(
            report.Entry(
                item=("slot", "optimizer", "first_moment", "fc.weight"),
                fate="transformed",
                target="m/0",
                ops=tuple(op.to_json() for op in every_op),
            ),
        ),
        verdicts=(report.OptimizerVerdict(optimizer="o", source="a", target="b", verdict="exact"),),
        problems=(Problem(code="usage", loc=("x", 0), message="m", hint="h"),),
        plan=report.Plan(
            rows=(
                report.Row(
                    target=("param", "k"),
                    dtype="float32",
                    shape=(2, 3),
                    axes=(("out", "in"), ("in", "out")),
                    producers=(report.Producer(item=("param", "w"), ops=(ops.Permute((1, 0)).to_json(),)),),
                    fate="transformed",
                    evidence="declared, by name",
                ),
            ),
            left_in_source=(("extra", "x"),),
            left_in_target=(),
        ),
        allowed=("state-dropped",),
        files=(("ckpt-1.index", 3),),
    )
    obj = json.loads(json.dumps(schema.report_to_json(full), allow_nan=False))
    assert schema.schema_problems(obj, "report") == []
    obj["ledger"][0]["fate"] = "lost"
    assert [(p.code, p.loc) for p in schema.schema_problems(obj, "report")] == [
        ("schema-invalid", ("ledger", 0, "fate"))
    ]


def test_an_unknown_step_is_no_default():
    checkpoint = full_document()
    unknown = replace(checkpoint.progress, step=Unknown(reason="none stored"))
    obj = schema.to_json(replace(checkpoint, progress=unknown))
    assert obj["progress"]["step"] == {"status": "unknown", "reason": "none stored"}
