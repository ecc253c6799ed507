"""Tests do not vanish unnoticed: by deletion, by a rename that collection misses, or by a skipped module.

Raise the floors when tests are added; lower one only together with the tests that were removed on purpose.
"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parent
FUNCTION_FLOOR = 1200
"""Test functions written in the tree, each counted once however it is parametrized."""
COLLECTED_FLOOR = 6000
"""Tests that pytest collects from the whole suite with every framework installed."""


def count_tests(tree: ast.AST) -> int:
    return sum(
        isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and node.name.startswith("test_")
        for node in ast.walk(tree)
    )


def test_the_tree_holds_at_least_so_many_test_functions() -> None:
    written = {path: count_tests(ast.parse(path.read_text(encoding="utf-8"))) for path in TESTS.rglob("*.py")}
    assert sum(written.values()) >= FUNCTION_FLOOR
    misnamed = [str(p) for p, count in written.items() if count and not collected_by_name(p)]
    assert not misnamed, "pytest does not look into these files"


def collected_by_name(path: Path) -> bool:
    """Whether pytest looks into the file: `test_*.py`, or a base class that such files subclass."""
    return path.name.startswith("test_") or "contract" in path.parts or "support" in path.parts


def test_the_whole_suite_collects_at_least_so_many_tests(request: pytest.FixtureRequest) -> None:
    options = request.config.option
    chosen = {
        (request.config.invocation_params.dir / a.split("::")[0]).resolve() for a in request.config.args
    }
    narrowing = ("keyword", "markexpr", "lf", "deselect", "ignore", "ignore_glob")
    narrowed = any(getattr(options, name, None) for name in narrowing)
    whole = bool(chosen & {TESTS, TESTS.parent}) and not narrowed
    if not whole:
        pytest.skip("only a part of the suite was asked for")
    assert len(request.session.items) >= COLLECTED_FLOOR
