"""`docs/doctor.md` shows what `ckptconv doctor` really says.

A block between `<!-- doctor: PATH -->` and `<!-- /doctor -->` is the whole answer; `PATH | HEADING` is one
section of it, `PATH | HEADING | TEXT` the entries of the section that have the text. Sentences are folded.
`python -m tests.test_doctor_page` writes the blocks anew.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator
from functools import cache
from itertools import pairwise
from pathlib import Path

import pytest

from tests.support.command import ROOT, run

PAGE = ROOT / "docs" / "doctor.md"
BLOCK = re.compile(r"<!-- doctor: (.+?) -->\n(.*?)<!-- /doctor -->", re.DOTALL)
WIDTH = 100
HEADINGS = (
    "Is the step in this file?",
    "What brings all of it back",
    "What loses some of it",
    "What comes of loading it",
    "Worth knowing",
    "What to do",
)


@cache
def answer(path: str) -> list[str]:
    done = run("doctor", path, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.rstrip().splitlines()


def section(lines: list[str], heading: str) -> list[str]:
    """The heading and what stands below it, up to the next."""
    first = next(i for i, line in enumerate(lines) if line.startswith(heading))
    rest = lines[first + 1 :]
    after = next((i for i, line in enumerate(rest) if not line), len(rest))
    return lines[first : first + 1 + after]


def entries(lines: list[str], text: str) -> list[str]:
    """The heading and those entries below it that have the text."""
    heading, *rest = lines
    found: list[list[str]] = []
    for line in rest:
        begins = line.startswith("  -  ") or re.match(r"  \S", line)
        if begins or not found:
            found.append([])
        found[-1].append(line)
    chosen = [entry for entry in found if any(text in line for line in entry)]
    assert chosen, text
    return [heading, *(line for entry in chosen for line in entry)]


def folded(lines: list[str]) -> Iterator[str]:
    for line in lines:
        if line.startswith(" " * 6):  # to be copied
            yield line
            continue
        indent = re.match(r" *(-  )?", line)
        below = " " * len(indent[0] if indent else "")
        yield from textwrap.wrap(
            line, WIDTH, subsequent_indent=below, break_long_words=False, break_on_hyphens=False
        ) or [""]


def block(what: str) -> str:
    path, *parts = what.split(" | ")
    lines = answer(path)
    if parts:
        lines = section(lines, parts[0])
    if len(parts) > 1:
        lines = entries(lines, parts[1])
    shown = "\n".join(folded(lines))
    return f"```text\n$ ckptconv doctor {path}\n{shown}\n```\n" if not parts else f"```text\n{shown}\n```\n"


def blocks() -> list[tuple[str, str]]:
    return BLOCK.findall(PAGE.read_text(encoding="utf-8"))


@pytest.mark.parametrize(("what", "written"), blocks(), ids=[what for what, _ in blocks()])
def test_what_the_page_shows_is_what_the_doctor_says(what: str, written: str) -> None:
    assert written == block(what), "python -m tests.test_doctor_page writes it anew"


def test_every_heading_is_explained() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert [heading for heading in HEADINGS if f"**{heading}**" not in text] == []
    for path in {what.split(" | ")[0] for what, _ in blocks()}:
        lines = answer(path)
        begins = [line for before, line in pairwise(lines) if not before]
        assert begins
        assert all(line.startswith(HEADINGS) for line in begins)


def test_the_readme_leads_to_it_and_its_files_exist() -> None:
    assert "docs/doctor.md" in (ROOT / "README.md").read_text(encoding="utf-8")
    for what, _ in blocks():
        path = what.split(" | ")[0]
        assert (ROOT / path).exists() or Path(f"{ROOT / path}.index").exists()


def main() -> None:
    text = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(
        BLOCK.sub(lambda m: f"<!-- doctor: {m[1]} -->\n{block(m[1])}<!-- /doctor -->", text), encoding="utf-8"
    )


if __name__ == "__main__":
    main()
