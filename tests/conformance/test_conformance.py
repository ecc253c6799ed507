"""The corpus of manifests: every valid one is accepted and comes back, every invalid one has its error."""

from __future__ import annotations

from pathlib import Path

import pytest

from ckptconv import schema
from ckptconv.errors import SchemaError
from ckptconv.strictjson import parse

HERE = Path(__file__).parent
VALID = sorted((HERE / "valid").glob("*.json"))
INVALID = sorted((HERE / "invalid").glob("*.json"))


def case(path: Path):
    content = parse(path.read_bytes(), path.name)
    assert set(content) == {"name", "input", "error"}
    return content


def test_the_corpus_is_not_empty():
    assert len(VALID) >= 15
    assert len(INVALID) >= 30
    names = [case(path)["name"] for path in VALID + INVALID]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("path", VALID, ids=lambda path: path.stem)
def test_valid(path):
    content = case(path)
    assert content["error"] is None
    assert schema.validate_manifest(content["input"]) == []
    manifest = content["input"]
    if manifest["residue"] is None or "inline" in manifest["residue"]:
        back = schema.to_json(schema.from_json(manifest), values=True)
        assert schema.validate_manifest(back) == []
        assert schema.to_json(schema.from_json(back), values=True) == back
        assert [item.get("value") for item in (*back["params"], *back["extras"])] == [
            item.get("value") for item in (*manifest["params"], *manifest["extras"])
        ]


@pytest.mark.parametrize("path", INVALID, ids=lambda path: path.stem)
def test_invalid(path):
    content = case(path)
    expected = (content["error"]["code"], tuple(content["error"]["loc"]))
    problems = schema.validate_manifest(content["input"])
    assert expected in [(problem.code, problem.loc) for problem in problems]
    assert all(problem.message and problem.hint for problem in problems)
    with pytest.raises(SchemaError):
        schema.from_json(content["input"])
