"""Which format and dialect a checkpoint is in, and its document."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from ckptconv import candidates
from ckptconv.candidates import Choice
from ckptconv.dialects.base import Detection, Dialect
from ckptconv.dialects.table import DIALECTS, dialects_of
from ckptconv.document import Checkpoint
from ckptconv.errors import CkptError, FormatError
from ckptconv.formats.base import Format
from ckptconv.formats.table import FORMATS, ROWS, format_at
from ckptconv.rawtree import RawTree
from ckptconv.remote import is_url, place
from ckptconv.selection import selected
from ckptconv.skeleton import is_skeleton_file, read_skeleton

PathLike = str | os.PathLike[str]


def format_named(name: str) -> Format:
    """The format of that name.

    Raises: unknown-format with the names there are.
    """
    if name in ROWS:
        return FORMATS[name]
    raise _no_such("unknown-format", "format", name, ROWS)


def dialect_named(format_name: str, name: str) -> Dialect:
    """The dialect of that name in a format.

    Raises: unknown-dialect with the names there are.
    """
    if (format_name, name) in DIALECTS:
        return DIALECTS[format_name, name]
    known = [dialect.name for dialect in dialects_of(format_name)]
    raise _no_such("unknown-dialect", f"{format_name} dialect", name, known)


def _no_such(code: str, what: str, name: str, known: Iterable[str]) -> CkptError:
    close = difflib.get_close_matches(name, list(known), n=1)
    return CkptError.of(
        "unknown-format" if code == "unknown-format" else "unknown-dialect",
        f"there is no {what} '{name}'" + (f" (did you mean '{close[0]}'?)" if close else ""),
        "Known: " + ", ".join(sorted(known)) + ".",
        loc=(name,),
    )


def parse_target(text: str | None) -> tuple[str | None, str | None]:
    """`FORMAT[:DIALECT]` in its two parts."""
    if text is None:
        return None, None
    format_name, _, dialect = text.partition(":")
    return format_name, dialect or None


def detect_format(path: PathLike) -> Format:
    """The format whose bytes these are.

    Raises: missing-file, unknown-format.
    """
    where = reachable(path)
    if found := format_at(where):
        return found
    if not where.exists():
        raise _missing(where)
    raise FormatError.of(
        "unknown-format",
        f"{_what_it_is(where)} is in none of the known formats ({', '.join(ROWS)})",
        "Check the path; see 'ckptconv formats' for what is read.",
        loc=(_called(where),),
    )


def reachable(path: PathLike) -> Path:
    """The path, which need not exist: a bundle's prefix does not.

    Raises: missing-file where the system refuses to look, such as for a name that is too long; usage for a
    name that no file can have.
    """
    where = place(path)
    if "\0" in str(where):
        raise CkptError.of("usage", "a path cannot have a null character", "Check the path.", loc=("PATH",))
    try:
        where.stat()
    except (FileNotFoundError, NotADirectoryError):
        pass
    except OSError as error:
        raise FormatError.of(
            "missing-file",
            f"cannot look at '{where}': {error.strerror}",
            "Check the path and the permissions of its directories.",
            loc=(_called(where),),
        ) from None
    return where


def _missing(where: Path) -> CkptError:
    hint = "Check the path; a TensorFlow checkpoint is named by its prefix, such as run/ckpt-9."
    if is_url(str(where)):
        hint = "Check the URL, and whether the credentials show what is there."
    elif str(where) == "-":
        hint = "A checkpoint cannot be read from a pipe: save it to a file first."
    return FormatError.of("missing-file", f"there is no checkpoint at '{where}'", hint, loc=(_called(where),))


def _what_it_is(where: Path) -> str:
    if where.is_dir():
        return f"the directory '{where}'"
    if not where.is_file():
        return f"'{where}', no regular file,"
    nbytes = where.stat().st_size
    return f"'{where}' ({nbytes} bytes)" if nbytes else f"'{where}', an empty file,"


def _called(where: Path) -> str:
    return where.name or str(where)


def read_raw(path: PathLike, format: str | None = None) -> RawTree:
    """The container's tree under its own keys. Reads headers and indexes, no tensor bytes.

    Raises: missing-file, unknown-format, and what the format finds wrong.
    """
    chosen = format_named(format) if format else detect_format(path)
    where = reachable(path)
    if format and not chosen.sniff(where):
        if not where.exists():
            raise _missing(where)
        raise FormatError.of(
            "unknown-format",
            f"'{where.name}' is not in the format '{format}'",
            "Leave --from out to have it detected.",
            loc=(_called(where),),
        )
    return chosen.read(where)


def detect_dialect(raw: RawTree, name: str | None = None) -> tuple[Dialect, Detection]:
    """The dialect that explains the tree best, or the named one.

    Raises: unknown-dialect where no dialect recognises it.
    """
    if name is not None:
        return dialect_named(raw.format, name), Detection(score=100, evidence="named by the caller")
    found = [
        (detection, dialect)
        for dialect in dialects_of(raw.format)
        if (detection := dialect.detect(raw)) is not None
    ]
    if not found:
        raise FormatError.of(
            "unknown-dialect",
            f"the {raw.format} container at '{raw.location}' follows none of the known conventions",
            "See it with 'ckptconv inspect --raw'.",
            loc=(raw.location,),
        )
    detection, dialect = max(found, key=lambda pair: pair[0].score)
    return dialect, detection


def open(
    path: PathLike, *, format: str | None = None, dialect: str | None = None, select: Sequence[str] = ()
) -> Checkpoint:
    """The document of a checkpoint in any format, or of a skeleton file. Tensors are lazy.

    `select` names a candidate of a folder that holds several, and parts of the document.
    I/O: reads headers, indexes and counters only.
    Raises: missing-file, unknown-format, unknown-dialect, checkpoint-ambiguous, usage for a name in `select`
    that means nothing, and what format and dialect find wrong.
    """
    return open_chosen(choose(path, select), format=format, dialect=dialect)


def choose(path: PathLike, select: Sequence[str] = ()) -> Choice:
    """The checkpoint that a path means: itself, or one of the folder's. Raises: see `candidates.choose`."""
    return candidates.choose(reachable(path), select)


def open_chosen(choice: Choice, *, format: str | None = None, dialect: str | None = None) -> Checkpoint:
    """The document of what was chosen."""
    why = choice.why
    if format is None and is_skeleton_file(choice.path):
        checkpoint = read_skeleton(choice.path)
    else:
        raw = read_raw(choice.path, format)
        chosen, _ = detect_dialect(raw, dialect)
        checkpoint = chosen.lift(raw)
        told = raw.attributes.get("chosen_by", "")
        why = " ".join(filter(None, (why, str(told))))
    checkpoint = selected(checkpoint, choice.names, choice.candidates)
    return replace(checkpoint, oddities=(why, *checkpoint.oddities)) if why else checkpoint
