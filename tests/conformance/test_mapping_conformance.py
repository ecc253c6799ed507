"""The corpus of mapping files: every valid one is read and comes back, every invalid one has its error."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ckptconv.errors import CkptError
from ckptconv.mapping_file import mapping_of, text_of, to_json
from ckptconv.strictjson import parse

HERE = Path(__file__).parent
VALID = sorted((HERE / "mapping_valid").glob("*.json"))
INVALID = sorted((HERE / "mapping_invalid").glob("*.json"))


def case(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = parse(path.read_bytes(), path.name)
    assert set(content) == {"name", "input", "error"}
    return content


def test_the_corpus_is_not_empty() -> None:
    assert len(VALID) >= 10
    assert len(INVALID) >= 40
    names = [case(path)["name"] for path in VALID + INVALID]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("path", VALID, ids=lambda path: path.stem)
def test_valid(path: Path) -> None:
    content = case(path)
    assert content["error"] is None
    mapping = mapping_of(content["input"])
    assert to_json(mapping) == content["input"]
    assert parse(text_of(mapping), "text") == content["input"]


@pytest.mark.parametrize("path", INVALID, ids=lambda path: path.stem)
def test_invalid(path: Path, tmp_path: Path) -> None:
    content = case(path)
    expected = (content["error"]["code"], tuple(content["error"]["loc"]))
    with pytest.raises(CkptError) as caught:
        mapping_of(content["input"]) if isinstance(content["input"], dict) else mapping_of_file(
            content["input"], tmp_path
        )
    assert expected in [(problem.code, problem.loc) for problem in caught.value.problems]


def mapping_of_file(value: Any, folder: Path) -> None:
    import json

    file = folder / "names.json"
    file.write_text(json.dumps(value), encoding="utf-8")
    mapping_of(file)
