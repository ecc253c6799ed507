"""Which files a TensorFlow checkpoint is: from a prefix, one of its files, or the directory it stands in.

Of several checkpoints in a directory the state file names the newest; where it is missing or names one that
is gone, the number at the end of their common name does, and how it was chosen is said. A SavedModel means
its `variables/variables`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from ckptconv.errors import FormatError
from ckptconv.formats.checkpoint_state import STATE_FILE, base_name, read_state
from ckptconv.formats.sstable import MAGIC

INDEX_SUFFIX = ".index"
_SAVED_MODEL = "saved_model.pb"
_VARIABLES = "variables"
_SHARD_SUFFIX = re.compile(r"\.data-\d{5,}-of-\d{5,}$")

_NUMBERED = re.compile(r"(.*-)(\d{1,18})")


@dataclass(frozen=True, slots=True, kw_only=True)
class Located:
    """A checkpoint that was found."""

    prefix: Path
    why: str | None = None
    """How it was chosen, where the path did not name it."""


def index_path(prefix: Path) -> Path:
    return prefix.parent / (prefix.name + INDEX_SUFFIX)  # also of "." and "/", which have no name


def shard_name(prefix: Path, shard: int, num_shards: int) -> str:
    return f"{prefix.name}.data-{shard:05d}-of-{num_shards:05d}"


def prefix_of(path: Path) -> Path:
    """The prefix that a path means, which is to be written or may name one of the files."""
    name = path.name.removesuffix(INDEX_SUFFIX) or path.name
    return path.with_name(_SHARD_SUFFIX.sub("", name) or name) if path.name else path


def has_magic(path: Path) -> bool:
    """Whether a regular file ends as a table does."""
    if not path.is_file() or path.stat().st_size < len(MAGIC):
        return False
    with path.open("rb") as file:
        file.seek(-len(MAGIC), 2)
        return file.read() == MAGIC


def has_shard(prefix: Path) -> bool:
    """Whether a data file of that prefix is there."""
    stem = f"{prefix.name}.data-"
    return prefix.parent.is_dir() and any(
        entry.name.startswith(stem) and _SHARD_SUFFIX.search(entry.name) and entry.is_file()
        for entry in prefix.parent.iterdir()
    )


def indexes(directory: Path) -> list[Path]:
    """Every index of a directory, by name."""
    found = (entry for entry in directory.iterdir() if entry.name.endswith(INDEX_SUFFIX))
    return sorted(entry for entry in found if has_magic(entry) or has_shard(prefix_of(entry)))


def locate(path: Path) -> Located:
    """The checkpoint that a path means.

    Raises: missing-file, corrupt-file (of a state file), usage where a directory holds several.
    """
    if index_path(path).is_file():
        return Located(prefix=path)
    if path.is_file() and prefix_of(path) != path:
        return Located(prefix=prefix_of(path))
    if path.is_dir():
        return _in_directory(path)
    raise FormatError.of(
        "missing-file",
        f"'{index_path(path)}' is not there",
        "Name the prefix of a checkpoint: the path of its '.index' file without '.index'.",
        loc=(index_path(path).name,),
    )


def _highest(names: list[str]) -> str | None:
    """Of checkpoints of one name that end with different numbers, the one with the highest."""
    found = [_NUMBERED.fullmatch(name) for name in names]
    matches = [match for match in found if match is not None]
    numbers = {int(match[2]): match[0] for match in matches}
    if len(numbers) != len(names) or len({match[1] for match in matches}) != 1:
        return None
    return numbers[max(numbers)]


def saved_model_prefix(directory: Path) -> Path | None:
    """The prefix of a SavedModel's variables; None of any other directory."""
    return directory / _VARIABLES / _VARIABLES if (directory / _SAVED_MODEL).is_file() else None


def _in_directory(directory: Path) -> Located:
    prefix = saved_model_prefix(directory)
    if prefix is not None and index_path(prefix).is_file():
        return Located(prefix=prefix, why=f"the variables of the SavedModel ('{_SAVED_MODEL}')")
    state, found = read_state(directory), indexes(directory)
    names = [path.name.removesuffix(INDEX_SUFFIX) for path in found]
    if state is not None:
        newest = base_name(state.newest)
        if newest in names:
            how = "" if state.newest == newest else f", as '{state.newest}'"
            return Located(prefix=directory / newest, why=f"the newest that '{STATE_FILE}' names{how}")
    if len(names) == 1:
        absent = "no state file" if state is None else f"'{state.newest}' is gone"
        return Located(prefix=directory / names[0], why=f"the only one in the directory ({absent})")
    if (numbered := _highest(names)) is not None:
        told = "no state file" if state is None else f"'{state.newest}', which it names, is gone"
        return Located(
            prefix=directory / numbered, why=f"the highest number of {len(names)} in the directory ({told})"
        )
    if names:
        raise FormatError.of(
            "usage",
            f"'{directory}' holds {len(names)} checkpoints and its state file names none of them: "
            + ", ".join(names[:10]),
            f"Name one: {directory / names[-1]}",
            loc=(STATE_FILE,),
        )
    raise FormatError.of(
        "missing-file",
        f"'{directory}' holds no '*{INDEX_SUFFIX}' of a TensorFlow checkpoint",
        "Name the prefix of a checkpoint: the path of its '.index' file without '.index'.",
        loc=(STATE_FILE,),
    )
