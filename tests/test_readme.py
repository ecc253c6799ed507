"""The README says what the code does: commands, options, formats, error codes and outputs.

Blocks between `<!-- generated: NAME -->` or `<!-- output: ARGUMENTS -->` markers are made from the code.
`python -m tests.test_readme` writes them anew.
"""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import get_args

import pytest
import typer

from ckptconv.cli import app
from ckptconv.dialects.torch_table import TABLE
from ckptconv.errors import CODES, Code
from ckptconv.rendering.registry import dialect_rows
from ckptconv.report import ALLOWABLE

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
BLOCK = re.compile(r"<!-- (generated|output): (.+?) -->\n(.*?)<!-- /\1 -->", re.DOTALL)


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "ckptconv", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def options() -> Iterator[tuple[str, str, str]]:
    """(command, flag, help) of every option of the command line."""
    for name, command in typer.main.get_command(app).commands.items():  # type: ignore[attr-defined]
        for parameter in command.params:
            flags = [flag for flag in parameter.opts if flag.startswith("--")]
            if flags and "--help" not in flags:
                metavar = parameter.metavar or ""
                yield name, f"{flags[0]} {metavar}".strip(), parameter.help


def table(*rows: tuple[str, ...]) -> str:
    head, *body = rows
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in body]
    return "\n".join(lines) + "\n"


def options_block() -> str:
    used: dict[tuple[str, str], list[str]] = {}
    for command, flag, text in options():
        used.setdefault((flag, text), []).append(command)
    rows = [(f"`{flag}`", ", ".join(commands), text) for (flag, text), commands in used.items()]
    return table(("option", "of", "what it does"), *rows)


def formats_block() -> str:
    listing = json.loads(run("formats", "--json").stdout)["formats"]
    rows = []
    for entry in listing:
        suffixes = ", ".join(f"`{suffix}`" for suffix in entry["suffixes"])
        rows.append((f"`{entry['name']}`", entry["summary"], suffixes))
        rows += [(f"`{name}`", summary, "") for name, summary in dialect_rows(entry, listing)]
    return table(("name", "what it is", "suffixes"), *rows)


def torch_dialects_block() -> str:
    """The table of PyTorch dialects: how each is told, what its counters count, where that was read."""
    rows = [
        (
            f"`pytorch:{row.name}`",
            str(row.signature),
            "; ".join(str(counter) for counter in row.counters),
            f"[{row.producer}]({row.source})",
        )
        for row in TABLE
    ]
    return table(("dialect", "told by", "counters", "as written by"), *rows)


def optimizers_block() -> str:
    listing = json.loads(run("formats", "--json").stdout)["optimizers"]
    rows = [
        (f"`{entry['algorithm']}`", ", ".join(f"`{name}`" for name in entry["classes"].values()))
        for entry in listing
    ]
    return table(("algorithm", "classes"), *rows)


def codes_block() -> str:
    """The codes with the comments that stand beside them in `ckptconv/errors.py`."""
    source = (ROOT / "ckptconv" / "errors.py").read_text(encoding="utf-8")
    comments = dict(re.findall(r'^    "([a-z-]+)",(?:  # (.+))?$', source, re.MULTILINE))
    assert comments.keys() == CODES
    return table(("code", "meaning"), *((f"`{code}`", comments[code]) for code in get_args(Code)))


def allowable_block() -> str:
    return table(("code", "what is accepted"), *((f"`{code}`", text) for code, text in ALLOWABLE.items()))


GENERATED: dict[str, Callable[[], str]] = {
    "options": options_block,
    "formats": formats_block,
    "torch-dialects": torch_dialects_block,
    "optimizers": optimizers_block,
    "codes": codes_block,
    "allowable": allowable_block,
}


def output_block(arguments: str) -> str:
    done = run(*shlex.split(arguments))
    assert done.returncode == 0, done.stderr
    return f"```text\n$ ckptconv {arguments}\n{done.stdout}```\n"


def made(kind: str, name: str) -> str:
    return GENERATED[name]() if kind == "generated" else output_block(name)


def blocks() -> list[tuple[str, str, str]]:
    return BLOCK.findall(README.read_text(encoding="utf-8"))


def test_every_generated_block_is_there() -> None:
    assert {name for kind, name, _ in blocks() if kind == "generated"} == GENERATED.keys()
    assert any(kind == "output" for kind, _, _ in blocks())


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, name, _ in blocks()])
def test_block_is_what_the_code_says(kind: str, name: str) -> None:
    (written,) = [text for k, n, text in blocks() if (k, n) == (kind, name)]
    assert written == made(kind, name), "python -m tests.test_readme writes it anew"


def test_commands_and_options_that_are_named_exist() -> None:
    text = README.read_text(encoding="utf-8")
    known = {flag.split()[0] for _, flag, _ in options()} | {"--version", "--help"}
    commands = set(typer.main.get_command(app).commands)  # type: ignore[attr-defined]
    used = re.findall(r"(?:^|`|&& |\$ )ckptconv ([a-z]+)((?: [^\n`|]*)?)", text, re.MULTILINE)
    named = {name for name, _ in used}
    assert commands <= named
    assert named <= commands
    for _, rest in used:
        assert set(re.findall(r"(?<= )--[a-z-]+", rest)) <= known


def test_it_begins_with_three_lines_and_two_commands() -> None:
    text = README.read_text(encoding="utf-8")
    title, description, *_ = text.split("\n\n")
    assert title == "# ckptconv"
    assert len(description.splitlines()) == 3
    first = re.findall(r"```sh\n(.+?)\n```", text)[:2]
    assert [line.partition(" && ")[0] for line in first] == ["pip install .", "pip install -e '.[test]'"]
    assert re.findall(r"<!-- ci:(.+?) -->", text) == ["install-and-run", "install-and-test"]


def test_files_that_are_named_exist() -> None:
    text = README.read_text(encoding="utf-8")
    for path in re.findall(r"(?:fixtures|schema)/[\w./-]+\w", text):
        assert (ROOT / path).exists() or (ROOT / f"{path}.index").exists(), path


def main() -> None:
    text = README.read_text(encoding="utf-8")
    README.write_text(
        BLOCK.sub(lambda m: f"<!-- {m[1]}: {m[2]} -->\n{made(m[1], m[2])}<!-- /{m[1]} -->", text),
        encoding="utf-8",
    )


if __name__ == "__main__":
    main()
