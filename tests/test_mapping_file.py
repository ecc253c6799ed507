"""Mapping files as files: names with counters, where an error stands, and what is written comes back."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptconv.errors import CkptError
from ckptconv.mapping_file import mapping_of, text_of, write_mapping
from ckptconv.name_pattern import Counter, NamePattern, parse_pattern
from ckptconv.strictjson import lines

HEAD = '{"schema": "ckptconv/mapping", "schema_version": "1.0.0",\n'


def pattern(text: str) -> NamePattern:
    found = parse_pattern(text)
    assert isinstance(found, NamePattern), found
    return found


MATCHES = [
    ("layers.{i}.weight", "layers.0.weight", {"i": 0}),
    ("layers.{i}.weight", "layers.11.weight", {"i": 11}),
    ("layers.{i}.weight", "layers.01.weight", None),
    ("layers.{i}.weight", "layers.1.1.weight", None),
    ("layers.{i}.weight", "layers.x.weight", None),
    ("layers.{i}.weight", "layers.-1.weight", None),
    ("layers.{i}.weight", "layers.².weight", None),
    ("layers.{i}.weight", "xlayers.1.weight", None),
    ("layers.{i}.weight", "layersX1.weight", None),  # a dot is a dot
    ("layers.{i}.weight", "layers.12345678901.weight", None),
    ("b{i+1}/k", "b1/k", {"i": 0}),
    ("b{i+1}/k", "b0/k", None),
    ("b{i-1}/k", "b0/k", {"i": 1}),
    ("b{2*i}", "b6", {"i": 3}),
    ("b{2*i}", "b7", None),
    ("b{3*i+1}", "b7", {"i": 2}),
    ("dense{_i}/kernel", "dense/kernel", {"i": 0}),
    ("dense{_i}/kernel", "dense_3/kernel", {"i": 3}),
    ("dense{_i}/kernel", "dense_0/kernel", None),
    ("a{i}.b{j}.c{i}", "a1.b2.c1", {"i": 1, "j": 2}),
    ("a{i}.b{j}.c{i}", "a1.b2.c2", None),
    ("w", "w", {}),
    ("w", "w.w", None),
]


@pytest.mark.parametrize(("text", "name", "indices"), MATCHES)
def test_what_a_pattern_stands_for(text: str, name: str, indices: dict[str, int] | None) -> None:
    found = pattern(text)
    assert found.match(name) == indices
    if indices is not None:
        assert found.fill(indices) == name


def test_a_number_below_zero_has_no_name() -> None:
    assert pattern("b{i-1}").fill({"i": 0}) is None


COUNTERS = st.builds(
    Counter,
    variable=st.sampled_from("ijk"),
    factor=st.integers(1, 4),
    offset=st.integers(-3, 9),
    is_suffix=st.booleans(),
)


@given(
    st.lists(st.tuples(st.sampled_from([".", "/", "a.", ".b_", "c"]), COUNTERS), min_size=1, max_size=4),
    st.fixed_dictionaries(dict.fromkeys("ijk", st.integers(0, 99))),
)
def test_a_pattern_is_its_text_and_finds_what_it_fills(parts, indices) -> None:
    made = NamePattern(tuple(part for pair in parts for part in pair))
    assert parse_pattern(str(made)) == made
    name = made.fill(indices)
    if name is not None:
        found = made.match(name)
        assert found == {variable: indices[variable] for variable in made.variables}


BROKEN = [
    ('"rules": [\n {"left": "a",\n  "right": "b",\n  "axes": "x y"}]}', 5, ("rules", 0, "axes")),
    ('"rules": [\n {"left": "a", "right": "b"},\n {"left": "a"}]}', 4, ("rules", 1)),
    ('"left_only": [\n"a",\n"b{"\n], "rules": []}', 4, ("left_only", 1)),
    ('"rules": [\n {"left": ["a", "b"],\n "right": ["c{i}", "d{i}"],\n "cut": 0}]}', 3, ("rules", 0)),
]


@pytest.mark.parametrize(("text", "line", "loc"), BROKEN)
def test_an_error_names_its_line(tmp_path: Path, text: str, line: int, loc: tuple[str | int, ...]) -> None:
    file = tmp_path / "names.json"
    file.write_text(HEAD + text, encoding="utf-8")
    with pytest.raises(CkptError) as caught:
        mapping_of(file)
    problems = [problem for problem in caught.value.problems if problem.loc == loc]
    assert problems
    assert all(f"line {line}]" in problem.message for problem in problems)


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (b"", "corrupt-file"),
        (b"{", "corrupt-file"),
        (b"\xff{}", "corrupt-file"),
        (HEAD.encode() + b'"rules": [], "rules": []}', "duplicate-key"),
        (b"[" * 100_000, "limit-exceeded"),
        (b"{}", "schema-invalid"),
        (b"7", "schema-invalid"),
    ],
)
def test_what_is_no_mapping_file(tmp_path: Path, data: bytes, code: str) -> None:
    file = tmp_path / "names.json"
    file.write_bytes(data)
    with pytest.raises(CkptError) as caught:
        mapping_of(file)
    assert code in {problem.code for problem in caught.value.problems}


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(CkptError) as caught:
        mapping_of(tmp_path / "none.json")
    assert [problem.code for problem in caught.value.problems] == ["missing-file"]


def test_a_rule_knows_its_line_and_is_written_field_by_field(tmp_path: Path) -> None:
    file = tmp_path / "names.json"
    file.write_text(HEAD + '"rules": [{"left": "a", "right": "b"},\n\n{"left": "c", "right": "d"}]}')
    mapping = mapping_of(file)
    assert [rule.line for rule in mapping.rules] == [2, 4]
    again = tmp_path / "again.json"
    write_mapping(mapping, again)
    assert [rule.line for rule in mapping_of(again).rules] == [5, 7]
    with pytest.raises(CkptError) as caught:
        write_mapping(mapping, again)
    assert [problem.code for problem in caught.value.problems] == ["target-exists"]
    write_mapping(mapping, again, force=True)
    assert mapping_of(mapping) is mapping
    assert text_of(mapping_of(json.loads(again.read_text()))) == again.read_text()


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])), inner),
)


@given(JSON)
def test_lines_of_every_value(value) -> None:
    """Each value begins on the line of its own that `indent` gives it."""
    text = json.dumps(value, indent=1)
    found = lines(text)
    expected = {}
    number = 1

    def walk(part, path) -> None:
        nonlocal number
        expected[path] = number
        inner = part.items() if isinstance(part, dict) else enumerate(part) if isinstance(part, list) else ()
        for key, one in inner:
            number += 1
            walk(one, (*path, key))
        if isinstance(part, dict | list) and part:
            number += 1

    walk(value, ())
    assert found == expected
