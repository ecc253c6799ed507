"""Which files a TensorFlow checkpoint is: from a prefix, one of its files, or the directory it stands in.

Of several checkpoints in a directory the state file names the newest; where it is missing or names one that
is gone, the number at the end of their common name does, and how it was chosen is said. A SavedModel means
its `variables/variables`.

A checkpoint of the first format (see `saved_slices`) is a file with no suffix, or its shards
`P-00000-of-00002`; a state file names these `P-?????-of-00002`, which stands for P here. In a directory it is
seen where the state file names it. A prefix may end with its directory (`run/`): its index is `run/.index`.
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

_SLICES_SUFFIX = re.compile(r"-(\d{5,}|\?{5})-of-(\d{5,})$")
_NUMBERED = re.compile(r"(.*-)(\d{1,18})")


@dataclass(frozen=True, slots=True)
class Prefix:
    """What the names of a checkpoint's files begin with; a path cannot say it where the name is empty."""

    directory: Path
    name: str

    @classmethod
    def at(cls, path: Path) -> Prefix:
        """The prefix that a path is, as it stands."""
        return cls(path.parent, path.name)

    def __str__(self) -> str:
        return str(self.directory / self.name) if self.name else f"{self.directory}/"

    @property
    def index(self) -> Path:
        return self.directory / f"{self.name}{INDEX_SUFFIX}"

    def shard(self, shard: int, num_shards: int) -> Path:
        return self.directory / f"{self.name}.data-{shard:05d}-of-{num_shards:05d}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Located:
    """A checkpoint that was found."""

    prefix: Prefix
    slices: tuple[Path, ...] = ()
    """The files of a checkpoint of the first format; none of a bundle."""
    why: str | None = None
    """How it was chosen in a directory, a sentence for people."""


def prefix_of(path: Path) -> Prefix:
    """The prefix that a path means, which is to be written or may name one of the files."""
    return Prefix(path.parent, _SHARD_SUFFIX.sub("", path.name.removesuffix(INDEX_SUFFIX)))


def has_magic(path: Path) -> bool:
    """Whether a regular file ends as a table does."""
    if not path.is_file() or path.stat().st_size < len(MAGIC):
        return False
    with path.open("rb") as file:
        file.seek(-len(MAGIC), 2)
        return file.read() == MAGIC


def has_shard(prefix: Prefix) -> bool:
    """Whether a data file of that prefix is there."""
    stem = f"{prefix.name}.data-"
    return prefix.directory.is_dir() and any(
        entry.name.startswith(stem) and _SHARD_SUFFIX.search(entry.name) and entry.is_file()
        for entry in prefix.directory.iterdir()
    )


def indexes(directory: Path) -> list[Path]:
    """Every index of a directory, by name."""
    found = (entry for entry in directory.iterdir() if entry.name.endswith(INDEX_SUFFIX))
    return sorted(entry for entry in found if has_magic(entry) or has_shard(prefix_of(entry)))


def slice_files(path: Path) -> tuple[Path, ...]:
    """The files of a checkpoint of the first format that a path means: itself, or the shards; else none.

    Raises: missing-file where some of the shards are there, checkpoint-ambiguous.
    """
    if not path.name or path.is_dir():
        return ()
    prefix = path.with_name(slices_prefix(path.name))
    if prefix == path and has_magic(path) and prefix_of(path) == Prefix.at(path):
        return (path,)
    if not path.parent.is_dir():
        return ()
    shards = [
        _SLICES_SUFFIX.fullmatch(name, len(prefix.name))
        for name in (entry.name for entry in path.parent.iterdir())
        if name.startswith(prefix.name) and has_magic(path.with_name(name))
    ]
    counts = {int(match[2]): int(match[2]) for match in shards if match is not None}
    if not counts:
        return ()
    if len(counts) > 1:
        raise FormatError.of(
            "checkpoint-ambiguous",
            f"'{prefix}' is there in {' and in '.join(map(str, sorted(counts)))} shards",
            "Delete those of the older one.",
            loc=(prefix.name,),
        )
    (count,) = counts
    present = {int(match[1]) for match in shards if match is not None}
    missing = next((number for number in range(count) if number not in present), None)
    if missing is not None or len(present) > count:
        raise FormatError.of(
            "missing-file",
            f"shard {missing} of {count} of '{prefix}' is not there, {len(present)} are",
            "Copy all files of the checkpoint.",
            loc=(prefix.name,),
        )
    return tuple(path.with_name(f"{prefix.name}-{number:05d}-of-{count:05d}") for number in range(count))


def slices_prefix(name: str) -> str:
    """Name of a checkpoint of the first format, of that of a shard or of the pattern of all."""
    return _SLICES_SUFFIX.sub("", name)


def names_in(directory: Path) -> list[str]:
    """Every checkpoint of a directory: those with an index by name, then those that the state file names.

    Raises: as `read_state` and `slice_files`.
    """
    names = [path.name.removesuffix(INDEX_SUFFIX) for path in indexes(directory)]
    state = read_state(directory)
    told = [] if state is None else [slices_prefix(base_name(path)) for path in (*state.paths, state.newest)]
    others = (name for name in dict.fromkeys(told) if name and name not in names)
    return [*names, *(name for name in others if slice_files(directory / name))]


def locate(path: Path) -> Located:
    """The checkpoint that a path means.

    Raises: missing-file, checkpoint-ambiguous, corrupt-file (of a state file); usage where a directory holds
    several.
    """
    own = Prefix.at(path)
    if own.index.is_file():
        return Located(prefix=own)
    if path.is_file() and prefix_of(path) != own:
        return Located(prefix=prefix_of(path))
    if path.is_dir():
        return _in_directory(path)
    if slices := slice_files(path):
        return Located(prefix=Prefix(path.parent, slices_prefix(path.name)), slices=slices)
    raise FormatError.of(
        "missing-file",
        f"'{own.index}' is not there",
        "Name the prefix of a checkpoint: the path of its '.index' file without '.index'.",
        loc=(own.index.name,),
    )


def _highest(names: list[str]) -> str | None:
    """Of checkpoints of one name that end with different numbers, the one with the highest."""
    found = [_NUMBERED.fullmatch(name) for name in names]
    matches = [match for match in found if match is not None]
    numbers = {int(match[2]): match[0] for match in matches}
    if len(numbers) != len(names) or len({match[1] for match in matches}) != 1:
        return None
    return numbers[max(numbers)]


def saved_model_prefix(directory: Path) -> Prefix | None:
    """The prefix of a SavedModel's variables; None of any other directory."""
    return Prefix(directory / _VARIABLES, _VARIABLES) if (directory / _SAVED_MODEL).is_file() else None


def is_saved_model(path: Path) -> bool:
    """Whether a path means the variables of a SavedModel: its directory, or the prefix in it."""
    return saved_model_prefix(path) is not None or saved_model_prefix(path.parent.parent) == prefix_of(path)


def _in_directory(directory: Path) -> Located:
    prefix = saved_model_prefix(directory)
    if prefix is not None and prefix.index.is_file():
        return Located(prefix=prefix)
    state, names = read_state(directory), names_in(directory)
    gone = "there is no state file" if state is None else f"'{state.newest}', which it names, is gone"
    name, why = None, ""
    if state is not None and (newest := slices_prefix(base_name(state.newest))) in names:
        how = "" if state.newest == newest else f", as '{state.newest}'"
        name, why = newest, f"the newest that '{STATE_FILE}' names{how}"
    elif len(names) == 1:
        name, why = names[0], f"the only one; {gone}"
    elif (name := _highest(names)) is not None:
        why = f"the highest number; {gone}"
    if name is not None:
        prefix = Prefix(directory, name)
        slices = () if prefix.index.is_file() else slice_files(directory / name)
        others = ", ".join(other for other in names if other != name)
        other = f"; --select takes another: {others}" if others else ""
        why = f"'{name or INDEX_SUFFIX}' was taken: it is {why}{other}."
        return Located(prefix=prefix, slices=slices, why=why)
    if names:
        raise FormatError.of(
            "usage",
            f"'{directory}' holds {len(names)} checkpoints and its state file names none of them: "
            + ", ".join(names[:10]),
            f"Name one: {Prefix(directory, names[-1])}",
            loc=(STATE_FILE,),
        )
    raise FormatError.of(
        "missing-file",
        f"'{directory}' holds no '*{INDEX_SUFFIX}' of a TensorFlow checkpoint",
        "Name the prefix of a checkpoint: the path of its '.index' file without '.index'.",
        loc=(STATE_FILE,),
    )
