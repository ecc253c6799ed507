"""Rules of mapping files on small documents: what they name, what they do to axes, and all that is wrong."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from ckptconv.correspondence import Coverage, check_mapping
from ckptconv.document import Checkpoint, Param, Progress, Provenance, Unknown
from ckptconv.errors import Loc
from ckptconv.mapping_file import mapping_of
from ckptconv.mapping_rules import ruled
from ckptconv.matching import framework_of, matched
from tests.support.documents import array_tensor

Shapes = dict[str, tuple[int, ...]]

NOTHING = Progress(step=Unknown(reason="weights alone"))


def torch(shapes: Shapes) -> Checkpoint:
    return document(shapes, "pytorch", "plain")


def keras(shapes: Shapes) -> Checkpoint:
    return document(shapes, "tensorflow", "keras3")


def document(shapes: Shapes, format_: str, dialect: str) -> Checkpoint:
    params = {name: Param(name=name, tensor=array_tensor(shape)) for name, shape in shapes.items()}
    return Checkpoint(progress=NOTHING, params=params, provenance=Provenance(format=format_, dialect=dialect))


def mapping(*rules: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"schema": "ckptconv/mapping", "schema_version": "1.0.0", "rules": list(rules), **more}


def rule(left: str | list[str], right: str | list[str], **more: Any) -> dict[str, Any]:
    return {"left": left, "right": right, **more}


def found(coverage: Coverage) -> list[tuple[str, Loc]]:
    return [(problem.code, problem.loc) for problem in coverage.problems]


def made(value: dict[str, Any], source: Checkpoint, template: Checkpoint) -> dict[str, np.ndarray[Any, Any]]:
    """Each piece of the template with what the mapping makes of the source's values."""
    frameworks = (framework_of(source), framework_of(template))
    rules = ruled(mapping_of(value), source, template, frameworks)
    assert not rules.problems
    result = matched(source, template, frameworks, rules)
    assert not result.cover.problems
    values = {}
    for pair in result.cover.pairs:
        tensor = result.source_pieces.params[pair.source].tensor
        for op in pair.ops:
            tensor = tensor.apply(op)
        values[pair.target] = tensor.read()
    return values


LAYERS = 12


def test_twelve_layers_that_are_counted_from_one_stand_in_the_order_of_their_numbers() -> None:
    ours = torch({f"enc.{i}.w": (3, 2) for i in range(LAYERS)})
    theirs = keras({f"block_{i + 1}/k": (2, 3) for i in reversed(range(LAYERS))})
    value = mapping(rule("enc.{i}.w", "block_{i+1}/k", axes="out in -> in out"))
    for n, array in ((i, made(value, ours, theirs)[f"block_{i + 1}/k"]) for i in range(LAYERS)):
        assert array.tobytes() == np.ascontiguousarray(ours.params[f"enc.{n}.w"].read().T).tobytes()
    uses = ruled(mapping_of(value), ours, theirs, ("torch", "keras3")).uses[0]
    assert [left for (left,), _ in uses] == [f"enc.{i}.w" for i in range(LAYERS)]


def test_the_same_file_serves_the_way_back() -> None:
    ours, theirs = torch({"a.0.w": (3, 2), "a.1.w": (3, 2)}), keras({"b1/k": (2, 3), "b2/k": (2, 3)})
    value = mapping(rule("a.{i}.w", "b{i+1}/k", axes="out in -> in out"))
    assert not check_mapping(value, ours, theirs).source_is_right
    assert check_mapping(value, theirs, ours).source_is_right
    assert made(value, theirs, ours)["a.1.w"].tobytes() == theirs.params["b2/k"].read().T.tobytes()


def test_a_cut_is_made_of_pieces_of_any_size() -> None:
    ours = torch({"qkv": (10, 4)})
    theirs = keras({"q": (4, 3, 2), "k": (4, 1, 2), "v": (4, 1, 2)})
    value = mapping(rule("qkv", ["q", "k", "v"], cut=0, axes="heads*width in -> in heads width"))
    whole = ours.params["qkv"].read()
    values = made(value, ours, theirs)
    for name, low, high in (("q", 0, 6), ("k", 6, 8), ("v", 8, 10)):
        shape = theirs.params[name].tensor.shape
        assert values[name].tobytes() == whole[low:high].T.reshape(shape).tobytes()


def test_an_axis_within_another_one_is_cut() -> None:
    """GPT-NeoX has query, key and value side by side for each head."""
    heads, width, inputs = 3, 2, 4
    ours = torch({"qkv.weight": (heads * 3 * width, inputs), "qkv.bias": (heads * 3 * width,)})
    theirs = keras(dict.fromkeys("qkv", (inputs, heads, width)) | {f"{n}b": (heads, width) for n in "qkv"})
    value = mapping(
        rule("qkv.weight", list("qkv"), cut="part", axes="heads*part*width in -> in heads width"),
        rule("qkv.bias", ["qb", "kb", "vb"], cut="part", axes="heads*part*width -> heads width"),
    )
    values = made(value, ours, theirs)
    whole = ours.params["qkv.weight"].read().reshape(heads, 3, width, inputs)
    bias = ours.params["qkv.bias"].read().reshape(heads, 3, width)
    for n, name in enumerate("qkv"):
        assert values[name].tobytes() == np.ascontiguousarray(whole[:, n].transpose(2, 0, 1)).tobytes()
        assert values[f"{name}b"].tobytes() == np.ascontiguousarray(bias[:, n]).tobytes()
    wrong = mapping(rule("qkv.weight", ["q", "k"], cut="part", axes="heads*part*width in -> in heads width"))
    assert ("shape-mismatch", ("params", "qkv.weight")) in found(check_mapping(wrong, ours, theirs))


def test_a_flattened_image_is_said_by_its_sizes() -> None:
    ours, theirs = torch({"fc.weight": (5, 3 * 2 * 4)}), keras({"out/kernel": (2 * 4 * 3, 5)})
    value = mapping(rule("fc.weight", "out/kernel", axes="out in*h=2*w=4 -> h=2*w=4*in out"))
    expected = ours.params["fc.weight"].read().reshape(5, 3, 2, 4).transpose(2, 3, 1, 0)
    assert made(value, ours, theirs)["out/kernel"].tobytes() == np.ascontiguousarray(expected).tobytes()


def test_what_no_rule_names_is_matched_by_itself_and_the_rest_of_a_layer_follows() -> None:
    ours = torch({"x.weight": (3, 2), "x.bias": (3,), "y.weight": (3, 2), "y.bias": (3,)})
    theirs = keras({"b/_kernel": (2, 3), "b/bias": (3,), "a/_kernel": (2, 3), "a/bias": (3,)})
    value = mapping(rule("x.weight", "a/_kernel", axes="out in -> in out"))
    coverage = check_mapping(value, ours, theirs)
    assert found(coverage) == []
    assert set(coverage.by_itself) == {
        ("x.bias", "a/bias", "mapping"),
        ("y.weight", "b/_kernel", "structure"),
        ("y.bias", "b/bias", "structure"),
    }


def test_a_rule_wins_over_equal_names() -> None:
    ours = torch({"a.w": (2,), "b.w": (2,)})
    theirs = torch({"a.w": (2,), "b.w": (2,)})
    crossed = mapping(rule("a.w", "b.w"), rule("b.w", "a.w"))
    assert made(crossed, ours, theirs)["a.w"].tobytes() == ours.params["b.w"].read().tobytes()


SQUARE = ({"m.weight": (4, 4)}, {"m/_kernel": (4, 4)})


def test_axes_that_are_said_decide_a_square() -> None:
    ours, theirs = torch(SQUARE[0]), keras(SQUARE[1])
    assert found(check_mapping(mapping(rule("m.weight", "m/_kernel")), ours, theirs)) == [
        ("layout-ambiguous", ("params", "m.weight"))
    ]
    for axes, expected in (("o i -> i o", lambda x: x.T), ("i o -> i o", lambda x: x)):
        values = made(mapping(rule("m.weight", "m/_kernel", axes=axes)), ours, theirs)
        wanted = np.ascontiguousarray(expected(ours.params["m.weight"].read()))
        assert values["m/_kernel"].tobytes() == wanted.tobytes()


GRU = "gate(reset,update,new)*units in -> in gate(update,reset,new)*units"


def test_axes_that_contradict_the_layers_kinds_are_an_error_unless_the_rule_overrides_them() -> None:
    shapes = {"weight_ih": (6, 3), "weight_hh": (6, 2), "bias_ih": (6,), "bias_hh": (6,)}
    ours = document({f"r.{name}": shape for name, shape in shapes.items()}, "pytorch", "plain")
    theirs = keras({"g/kernel": (3, 6), "g/recurrent_kernel": (2, 6), "g/bias": (2, 6)})

    def told(axes: str, **more: Any) -> list[tuple[str, Loc]]:
        value = mapping(
            rule("r.weight_ih", "g/kernel", axes=axes, **more),
            rule("r.weight_hh", "g/recurrent_kernel", axes=GRU.replace("in", "units'")),
            rule(["r.bias_ih", "r.bias_hh"], "g/bias", cut=0, axes=_BIAS),
        )
        return found(check_mapping(value, ours, theirs))

    assert told(GRU) == []
    assert told("out in -> in out") == [("mapping-invalid", ("rules", 0))]
    assert told("out in -> in out", overrides=True) == []


_BIAS = "gate(reset,update,new)*units -> 1 gate(update,reset,new)*units"

PROBLEMS: list[tuple[str, Shapes, Shapes, dict[str, Any], list[tuple[str, Loc]]]] = [
    (
        "a rule that names nothing",
        {"a.w": (2,)},
        {"b/k": (2,)},
        mapping(rule("a.w", "b/k"), rule("c.{i}.w", "d{i}/k")),
        [("mapping-invalid", ("rules", 1))],
    ),
    (
        "a rule of which one side is there",
        {"a.0.w": (2,), "a.1.w": (2,)},
        {"b0/k": (2,), "b1/k": (2,)},
        mapping(rule("a.{i}.w", "c{i}/k")),
        [("mapping-invalid", ("rules", 0))],
    ),
    (
        "a number without a partner",
        {"a.0.w": (2,), "a.1.w": (2,)},
        {"b0/k": (2,)},
        mapping(rule("a.{i}.w", "b{i}/k")),
        [("param-unmatched", ("params", "a.1.w"))],
    ),
    (
        "a template's number without a partner",
        {"a.0.w": (2,)},
        {"b0/k": (2,), "b1/k": (2,)},
        mapping(rule("a.{i}.w", "b{i}/k")),
        [("param-unmatched", ("params", "b1/k"))],
    ),
    (
        "a shift beyond the first",
        {"a.0.w": (2,), "a.1.w": (2,)},
        {"b0/k": (2,), "b1/k": (2,)},
        mapping(rule("a.{i+1}.w", "b{i}/k")),
        [("param-unmatched", ("params", "b1/k")), ("param-unmatched", ("params", "a.0.w"))],
    ),
    (
        "two rules for one parameter",
        {"a.w": (2,), "b.w": (2,)},
        {"c/k": (2,), "d/k": (2,)},
        mapping(rule("a.w", "c/k"), rule("a.w", "d/k"), rule("b.w", "d/k")),
        [("mapping-invalid", ("rules", 1)), ("mapping-invalid", ("rules", 2))],
    ),
    (
        "a rule with counters and one of its numbers again",
        {"a.0.w": (2,), "a.1.w": (2,)},
        {"b0/k": (2,), "b1/k": (2,)},
        mapping(rule("a.{i}.w", "b{i}/k"), rule("a.1.w", "b1/k")),
        [("mapping-invalid", ("rules", 1)), ("mapping-invalid", ("rules", 1))],
    ),
    (
        "pieces that meet within one rule",
        {"q0": (2,), "q1": (2,), "q2": (2,)},
        {"w0": (4,), "w1": (4,)},
        mapping(rule(["q{i}", "q{i+1}"], "w{i}", cut=0)),
        [("mapping-invalid", ("rules", 0))],
    ),
    (
        "sizes that are not the same",
        {"a.w": (3, 2)},
        {"b/k": (3, 2)},
        mapping(rule("a.w", "b/k", axes="out in -> in out")),
        [("shape-mismatch", ("params", "b/k"))],
    ),
    (
        "axes of another rank",
        {"a.w": (3, 2)},
        {"b/k": (2, 3)},
        mapping(rule("a.w", "b/k", axes="out in x -> in out x")),
        [("shape-mismatch", ("params", "b/k"))],
    ),
    (
        "other shapes and no axes",
        {"a.w": (3, 2)},
        {"b/k": (2, 3)},
        mapping(rule("a.w", "b/k")),
        [("shape-mismatch", ("params", "b/k"))],
    ),
    (
        "unknown axes and no word of them",
        {"a.w": (3, 2)},
        {"b/k": (3, 2)},
        mapping(rule("a.w", "b/k")),
        [("layout-ambiguous", ("params", "b/k"))],
    ),
    (
        "pieces that do not make up the whole",
        {"qkv": (9, 4)},
        {"q": (4, 3), "k": (4, 3), "v": (4, 4)},
        mapping(rule("qkv", ["q", "k", "v"], cut=0, axes="out in -> in out")),
        [("shape-mismatch", ("params", "qkv"))],
    ),
    (
        "a cut along an axis that is not there",
        {"qkv": (9, 4)},
        {"q": (4, 3), "k": (4, 3), "v": (4, 3)},
        mapping(rule("qkv", ["q", "k", "v"], cut=2, axes="out in -> in out")),
        [("shape-mismatch", ("params", "qkv"))],
    ),
    (
        "a sum of two shapes",
        {"a": (3,), "b": (4,)},
        {"c": (3,)},
        mapping(rule(["a", "b"], "c", sum="first")),
        [("shape-mismatch", ("params", "a"))],
    ),
    (
        "nothing to leave out",
        {"a.w": (2,)},
        {"b/k": (2,)},
        mapping(rule("a.w", "b/k"), left_only=["mask.{i}"]),
        [("mapping-invalid", ("left_only", 0))],
    ),
    (
        "left out and named by a rule",
        {"a.w": (2,)},
        {"b/k": (2,)},
        mapping(rule("a.w", "b/k"), right_only=["b/k"]),
        [("mapping-invalid", ("right_only", 0))],
    ),
    (
        "what is left out is no problem",
        {"a.w": (2,), "h.0.mask": (9,), "h.1.mask": (9,)},
        {"b/k": (2,), "seed": (1,)},
        mapping(rule("a.w", "b/k"), left_only=["h.{i}.mask"], right_only=["seed"]),
        [],
    ),
]


@pytest.mark.parametrize(
    ("ours", "theirs", "value", "expected"), [p[1:] for p in PROBLEMS], ids=[p[0] for p in PROBLEMS]
)
def test_problems(
    ours: Shapes, theirs: Shapes, value: dict[str, Any], expected: list[tuple[str, Loc]]
) -> None:
    problems = found(check_mapping(value, torch(ours), keras(theirs)))
    assert problems[: len(expected)] == expected
    assert bool(problems) == bool(expected)
    backwards = found(check_mapping(value, keras(theirs), torch(ours)))
    assert {code for code, _ in backwards} == {code for code, _ in problems}


def test_sides_that_the_names_do_not_tell() -> None:
    ours, theirs = torch({"a": (2,), "b": (2,)}), keras({"a": (2,), "b": (2,)})
    value = mapping(rule("a", "b", axes="x -> x"))
    assert found(check_mapping(value, ours, theirs))[0] == ("mapping-invalid", ("mapping",))
    for sides, is_right in ((("torch", "keras3"), False), (("keras3", "torch"), True)):
        told = check_mapping({**value, "left": sides[0], "right": sides[1]}, ours, theirs)
        assert told.source_is_right == is_right
        assert told.rules[0].count == 1


def test_the_same_names_on_both_sides_are_no_question() -> None:
    ours, theirs = torch({"a": (2,), "b": (2,)}), keras({"a": (2,), "b": (2,)})
    assert found(check_mapping(mapping(rule("a", "a"), rule("b", "b")), ours, theirs)) == []


def test_patterns_may_overlap_where_each_name_has_one_rule() -> None:
    """Of `Sequential`'s numbers some are convolutions and some are not."""
    ours = torch({"0.weight": (3,), "1.weight": (4,), "2.weight": (3,), "3.weight": (4,)})
    theirs = keras({"conv0": (3,), "norm1": (4,), "conv2": (3,), "norm3": (4,)})
    value = mapping(rule("{i}.weight", "conv{i}"), rule("{i}.weight", "norm{i}"))
    assert found(check_mapping(value, ours, theirs)) == []
