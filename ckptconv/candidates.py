"""Which of several checkpoints in a folder is meant: what a tracker names, else the last one, never a guess.

A folder that is one checkpoint by itself is taken as it is; one that holds the weights alone beside numbered
folders of the run (an HF Trainer's output directory) stands for the newest of these. Otherwise, in order:

1. what `select` names: a candidate, its name without suffix, `.` the folder itself, `best` the run's best;
2. what a tracker file names (`TRACKERS`);
3. the only candidate;
4. the one called `last` or `latest`;
5. the only one that is not called `best`;
6. the highest number, where the names differ in that alone, or say `step` or `epoch`.

Candidates are files with a suffix of some format, and folders that one recognises whose names have a number
or say which one they are, or that are a part of the checkpoint that the folder is (DeepSpeed's of a trainer).
Names in trackers lead to candidates of the same folder and nowhere else. TensorFlow's state files are its
format's own business.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from ckptconv.errors import CkptError, FormatError
from ckptconv.formats.table import format_at, suffixes
from ckptconv.formats.torch_folder import members, only_file
from ckptconv.strictjson import parse

TRACKERS: tuple[tuple[str, str], ...] = (
    ("latest", "{}"),  # DeepSpeed: the tag
    ("latest_universal", "{}"),  # DeepSpeed: that of a universal checkpoint
    ("last_checkpoint", "{}"),  # Detectron2, MMEngine: a file's name or path
    ("latest_checkpointed_iteration.txt", "iter_{:0>7}"),  # Megatron-LM: the number, or "release"
)
"""Names of tracker files, and how what stands in one makes a candidate's name."""

_TRAINER_STATE = "trainer_state.json"
_MAX_NAMES = 1 << 16
_MAX_TRACKER_NBYTES = 4096
_MAX_STATE_NBYTES = 64 << 20
_MAX_LISTED = 20
_SHARD = re.compile(r"-\d{5}-of-\d{5}\.|\.index\.json$|\.data-\d{5,}-of-\d{5,}$")
_NUMBER = re.compile(r"\d+")
_LAST, _BEST = ("last", "latest"), ("best",)
_OTHERS = ("final", "release")
_COUNTERS = ("step", "steps", "iter", "epoch")


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """The checkpoint that a path means."""

    path: Path
    why: str = ""
    """How it was chosen, a sentence for people; empty where the path named it."""
    names: tuple[str, ...] = ()
    """Those of `select` that name no candidate: parts of the document."""
    candidates: tuple[str, ...] = field(default=())
    """What the folder holds, where it holds several."""


def choose(path: Path, select: Sequence[str] = ()) -> Choice:
    """The checkpoint that `path` means, with what `select` names in its folder.

    I/O: lists the folder, reads trackers, sniffs candidates.
    Raises: checkpoint-ambiguous with the candidates; missing-file where a tracker's is gone; limit-exceeded.
    """
    if not path.is_dir():
        return Choice(path=path, names=tuple(select))
    whole = _is_checkpoint(path)
    if whole and (only := only_file(path)) is not None:
        why = f"'{only.relative_to(path)}' was taken of '{path.name}': it is the only rank's."
        return Choice(path=only, why=why, names=tuple(select))
    if whole and not select and not _run_folders(path):
        return Choice(path=path)
    found = _candidates(path)
    best = _best(path, found)
    asked = {name: target for name in select if (target := _asked(name, found, best, whole)) is not None}
    left = tuple(name for name in select if name not in asked)
    chosen = dict.fromkeys(asked.values())
    if len(chosen) > 1:
        raise _ambiguous(path, found, f"--select names {len(chosen)} of them")
    if chosen:
        name, reason = next(iter(chosen)), "asked for"
    else:
        runs = _run_folders(path) if whole else found
        if not runs:
            return Choice(path=path, names=left, candidates=found)
        name, reason = _default(path, runs)
    if name == ".":
        return Choice(path=path, why=_said(path, name, reason, found), names=left, candidates=found)
    inner = choose(path / name, left)
    why = " ".join(filter(None, (_said(path, name, reason, found), inner.why)))
    return Choice(path=inner.path, why=why, names=inner.names, candidates=found)


def _is_checkpoint(path: Path) -> bool:
    return format_at(path) is not None


def _run_folders(path: Path) -> tuple[str, ...]:
    """The numbered checkpoints in a folder that holds a run's weights alone."""
    from ckptconv.formats.checkpoint_state import STATE_FILE

    entries = list(_entries(path))
    if any(entry.name.startswith("optimizer") or entry.name == STATE_FILE for entry in entries):
        return ()
    own = members(path, [entry.name for entry in entries])
    names = (entry.name for entry in entries if entry.is_dir() and entry.name not in own)
    numbered = (name for name in names if _NUMBER.search(name))
    return tuple(sorted((name for name in numbered if _is_checkpoint(path / name)), key=_by_numbers))


def _entries(path: Path) -> Iterator[Path]:
    for count, entry in enumerate(path.iterdir()):
        if count == _MAX_NAMES:
            raise FormatError.of(
                "limit-exceeded",
                f"'{path.name}' holds more than {_MAX_NAMES} names",
                "Name the checkpoint itself.",
                loc=(path.name,),
            )
        yield entry


def _candidates(path: Path) -> tuple[str, ...]:
    """Names of the checkpoints in a folder."""
    from ckptconv.formats.bundle_path import names_in  # only where a folder is listed: it needs protobuf

    known, names, entries = suffixes(), [], list(_entries(path))
    parts = members(path, [entry.name for entry in entries])
    for entry in entries:
        if entry.is_dir():
            fits = (_may_be_one(entry.name) or entry.name in parts) and _is_checkpoint(path / entry.name)
        else:
            fits = entry.name.endswith(known) and not _SHARD.search(entry.name) and entry.is_file()
        if fits:
            names.append(entry.name)
    return tuple(sorted({*names, *names_in(path)}, key=_by_numbers))


def _may_be_one(name: str) -> bool:
    """Whether a folder is called as one of several checkpoints is."""
    return _NUMBER.search(name) is not None or bool(set(_words(name)) & {*_LAST, *_BEST, *_OTHERS})


def _by_numbers(name: str) -> tuple[str, list[int], str]:
    return _NUMBER.sub("#", name), [int(number) for number in _NUMBER.findall(name)], name


def _asked(name: str, found: Sequence[str], best: str | None, whole: bool) -> str | None:
    """The candidate that a name of `--select` means, None where it means none."""
    if name == "." and whole:
        return "."
    if name in found:
        return name
    if name in _BEST and best is not None:
        return best
    stems = [candidate for candidate in found if _stem(candidate) == name]
    return stems[0] if len(stems) == 1 else None


def _stem(name: str) -> str:
    while stripped := next((name.removesuffix(s) for s in suffixes() if name.endswith(s)), ""):
        name = stripped
    return name


def _best(path: Path, found: Sequence[str]) -> str | None:
    """What an HF Trainer's newest state names the best of the run."""
    folders = [name for name in found if (path / name / _TRAINER_STATE).is_file()]
    if not folders or len({_NUMBER.sub("#", name) for name in folders}) > 1:
        return None
    state = path / folders[-1] / _TRAINER_STATE
    if state.stat().st_size > _MAX_STATE_NBYTES:
        return None
    told = parse(state.read_bytes(), _TRAINER_STATE, constants=True)
    named = told.get("best_model_checkpoint") if isinstance(told, dict) else None
    last = PurePosixPath(named).name if isinstance(named, str) else None
    return last if last in found else None


def _default(path: Path, found: tuple[str, ...]) -> tuple[str, str]:
    """The candidate that is taken unasked, and why."""
    tracked = _tracked(path, found)
    if tracked is not None:
        return tracked
    if len(found) == 1:
        return found[0], "the only one"
    last = [name for name in found if set(_words(name)) & set(_LAST)]
    if len(last) == 1:
        return last[0], "called the last"
    others = [name for name in found if not set(_words(name)) & set(_BEST)]
    if len(others) == 1:
        return others[0], "the only one not called the best"
    highest = _highest(others)
    if highest is None:
        raise _ambiguous(path, found, "no tracker and no counter tells which is the newest")
    return highest


def _words(name: str) -> list[str]:
    return [word for word in re.split(r"[^a-z]+", _stem(name).lower()) if word]


def _tracked(path: Path, found: Sequence[str]) -> tuple[str, str] | None:
    for tracker, pattern in TRACKERS:
        file = path / tracker
        if not file.is_file():
            continue
        with file.open("rb") as stream:
            text = stream.read(_MAX_TRACKER_NBYTES).decode("utf-8", "replace").strip()
        last = PurePosixPath(text.replace("\\", "/")).name
        name = pattern.format(last) if last.isdigit() else last
        if name in found:
            return name, f"named by '{tracker}'"
        raise FormatError.of(
            "missing-file",
            f"'{tracker}' names '{name[:80]}', which is not there or no checkpoint; there "
            + (f"are {_listed(found)}" if found else "is none"),
            "Pass --select with one of them, or copy the missing one.",
            loc=(path.name, tracker),
        )
    return None


def _highest(names: Sequence[str]) -> tuple[str, str] | None:
    """The one with the highest counter, where all names are of one family."""
    if len({_NUMBER.sub("#", name) for name in names}) != 1:
        return None
    counters: list[Mapping[str, int]] = [_counters(name) for name in names]
    for counter in (*_COUNTERS, ""):
        values = [count[counter] for count in counters if counter in count]
        if len(values) == len(names) and len(set(values)) == len(values):
            position = values.index(max(values))
            return names[position], f"the highest {counter or 'number'}"
    return None


def _counters(name: str) -> dict[str, int]:
    """The numbers of a name by the word before each; an only number also by none."""
    found = {word: int(number) for word, number in re.findall(r"([a-z]+)[=_-]?(\d+)", _stem(name).lower())}
    numbers = _NUMBER.findall(_stem(name))
    return {**found, "": int(numbers[0])} if len(numbers) == 1 else found


def _said(path: Path, name: str, reason: str, found: Sequence[str]) -> str:
    others = [other for other in found if other != name]
    if not others:
        return f"'{name}' was taken of '{path.name}': {reason}."
    return f"'{name}' was taken of '{path.name}': {reason}; --select takes another: {_listed(others)}."


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(names[:_MAX_LISTED])
    return f"{shown} and {len(names) - _MAX_LISTED} more" if len(names) > _MAX_LISTED else shown


def _ambiguous(path: Path, found: Sequence[str], why: str) -> CkptError:
    return FormatError.of(
        "checkpoint-ambiguous",
        f"'{path.name}' holds {len(found)} checkpoints, and {why}: {_listed(found)}",
        "Name one of them, or pass --select NAME.",
        loc=(path.name,),
    )
