"""`docs/matching.md`: its Python and its commands run in their order, and show what the page says.

`python -m tests.oracle.test_matching_page` writes the outputs of its commands anew.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import shlex
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.command import invoke

ROOT = Path(__file__).resolve().parent.parent.parent
PAGE = ROOT / "docs" / "matching.md"
BLOCK = re.compile(r"^```(python|console)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
TIMED = "convert"
"""A command whose output says how long it took: none is shown of one that succeeds."""


def shown(block: str) -> str:
    """The block's commands with what they print now: their output, or the codes of what stops them."""
    lines = []
    for line in block.splitlines():
        if not line.startswith("$ "):
            continue
        lines.append(line)
        _, command, *words = shlex.split(line[2:])
        code, text = invoke(command, *words)
        if code:
            with contextlib.redirect_stderr(io.StringIO()):
                _, told = invoke(command, *words, "--json")
            lines += dict.fromkeys(re.findall(r'"code": "(.+)"', told))
        elif command != TIMED:
            lines += text.rstrip("\n").split("\n")
    return "".join(f"{line}\n" for line in lines)


def blocks(text: str) -> Iterator[tuple[str, str]]:
    """Each block of the page after those before it have run: what the page has, and what there is now."""
    names: dict[str, Any] = {}
    for found in BLOCK.finditer(text):
        kind, body = found.groups()
        if kind == "python":
            exec(compile(body, PAGE.name, "exec"), names)
        else:
            yield body, shown(body)


@pytest.mark.slow
def test_the_page_says_what_happens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch")
    pytest.importorskip("tensorflow")
    monkeypatch.chdir(tmp_path)
    with contextlib.redirect_stdout(io.StringIO()):
        found = list(blocks(PAGE.read_text(encoding="utf-8")))
    assert len(found) == 4
    for written, now in found:
        assert written == now, "python -m tests.oracle.test_matching_page writes it anew"


def rewrite() -> None:
    text = PAGE.read_text(encoding="utf-8")
    os.chdir(tempfile.mkdtemp())
    for written, now in blocks(text):
        text = text.replace(written, now)
    PAGE.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    sys.exit(rewrite())
