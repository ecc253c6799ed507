"""Whether what was written reads back equal, and whether what is there holds what it says."""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path

import numpy as np

from ckptconv import engine
from ckptconv.detect import PathLike, choose, detect_format, open_chosen
from ckptconv.document import PROGRESS_FIELDS, Checkpoint, Fact, Known, Unknown
from ckptconv.errors import CkptError, FormatError, Problem, TargetError
from ckptconv.formats import neutral
from ckptconv.formats.base import Format, Layout
from ckptconv.formats.bundle_write import NOTE_KEY
from ckptconv.formats.string_tensor import EncodedTensor
from ckptconv.manifest import to_json
from ckptconv.note import EXTENSION, contradictions, read_note
from ckptconv.publish import below
from ckptconv.rawtree import DictNode, ListNode, Node, Opaque, RawTree, children
from ckptconv.rawtree import Path as TreePath
from ckptconv.rereading import check_sources, verify_written
from ckptconv.skeleton import is_skeleton_file
from ckptconv.strictjson import parse
from ckptconv.supply import settable_fields
from ckptconv.tensor import Extent, FileSource, StoredTensor, TensorRef, as_bytes
from ckptconv.validation import validate_manifest
from ckptconv.workers import Workers


def checker(
    format_: Format, raw: RawTree, layout: Layout, workers: Workers | None = None
) -> Callable[[Path, engine.WriteResult], None]:
    """What the engine calls on the written, not yet published target.

    It is read again with our own reader: every key, kind, value, dtype and shape must be those of `raw`, and
    every tensor's bytes must have the checksum that they had when they were written.
    """

    def check(staged: Path, result: engine.WriteResult) -> None:
        again = format_.read(staged)
        differing = next(_differences(raw.root, again.root, ()), None)
        if differing is not None:
            raise _failed(*differing)
        if again.note != raw.note:
            raise _failed((NOTE_KEY,), "the embedded note is another text")
        absolute = cache(os.path.abspath)
        keys = {
            (path, placement.offset): placement.key
            for file in layout.files
            for path in (absolute(below(layout.kind, staged, file.name)),)
            for placement in file.placements
            if placement.tensor.spec.nbytes  # one without bytes lies where the next one begins
        }
        found: dict[str, TensorRef] = {}
        for extent in _extents(again.root):
            if not extent.nbytes:
                continue
            source = extent.source
            if not isinstance(source, FileSource):
                continue  # an array within a pickle: _differences compares it
            key = keys.get((absolute(source.path), extent.offset))
            if key is None:
                raise _failed(
                    (source.name,), f"bytes at {extent.offset} belong to no tensor that was written"
                )
            found[key] = StoredTensor.raw(extent)
        # The note is no part of the tree; its text was compared above.
        placed = set(keys.values()) - {NOTE_KEY}
        expected = {key: content for key, content in result.contents.items() if key in placed}
        verify_written(expected, found.items(), workers=workers)

    return check


def _failed(path: TreePath, message: str) -> CkptError:
    return TargetError.of(
        "verify-failed",
        f"'{'/'.join(map(str, path))}' does not read back as it was written: {message}",
        "Nothing was published. Try another disk; if it happens again, report it.",
        loc=path,
    )


def _differences(written: Node, read: Node, path: TreePath) -> Iterator[tuple[TreePath, str]]:
    """(path, what) of everything in which two trees differ; the order of keys is not compared."""
    if isinstance(written, TensorRef) and isinstance(read, TensorRef):
        if written.spec != read.spec:
            yield path, f"{_named(written)} became {_named(read)}"
        elif not _is_in_file(read) and not np.array_equal(as_bytes(written.read()), as_bytes(read.read())):
            yield path, "its values are others"
    elif isinstance(written, (str, bytes)) and isinstance(read, TensorRef):
        # A bundle holds a text as a string tensor; its bytes are compared with the others.
        if read.dtype.name != "string":
            yield path, f"a text became {_named(read)}"
    elif isinstance(written, (DictNode, ListNode, Opaque)):
        if type(written) is not type(read) or written.kind != getattr(read, "kind", None):
            yield path, f"{written.kind} became {getattr(read, 'kind', type(read).__name__)}"
            return
        ours, theirs = dict(children(written)), dict(children(read))
        for step in {**ours, **theirs}:
            if step not in ours or step not in theirs:
                yield (*path, step), "it is there once only"
            else:
                yield from _differences(ours[step], theirs[step], (*path, step))
    elif type(written) is not type(read) or repr(written) != repr(read):
        yield path, f"{written!r} became {read!r}"


def _is_in_file(tensor: TensorRef) -> bool:
    return any(isinstance(extent.source, FileSource) for extent in tensor.extents)


def _named(tensor: TensorRef) -> str:
    return f"{tensor.dtype.name} {list(tensor.shape)}"


def _tensors(node: Node) -> Iterator[TensorRef]:
    pending = [node]
    while pending:
        current = pending.pop()
        if isinstance(current, TensorRef):
            yield current
        else:
            pending += [part for _, part in children(current)]


def _extents(node: Node) -> Iterator[Extent]:
    """Every run of stored bytes below a node, once."""
    extents = {extent.id: extent for tensor in _tensors(node) for extent in tensor.extents}
    yield from extents.values()


def _encoded(node: Node) -> Iterator[EncodedTensor]:
    return (tensor for tensor in _tensors(node) if isinstance(tensor, EncodedTensor))


def validate(path: PathLike, *, require: Sequence[str] = (), select: Sequence[str] = ()) -> list[Problem]:
    """Everything that is wrong with a checkpoint or document, and every required fact that it does not tell.

    I/O: streams every tensor that has a recorded checksum or digest.
    Raises: usage for a field that does not exist; missing-file, unknown-format.
    """
    _check_fields(require)
    choice = choose(path, select)
    where = choice.path
    if is_skeleton_file(where):
        problems = validate_manifest(parse(where.read_bytes(), where.name))
    else:
        format_ = detect_format(where)
        problems = neutral.check_directory(where) if format_.name == "neutral" else _container(format_, where)
    if problems:
        return problems
    checkpoint = open_chosen(choice)
    problems = [*validate_manifest(to_json(checkpoint)), *_stale_note(checkpoint)]
    return problems + [problem for name in require if (problem := _requirement(checkpoint, name)) is not None]


def _stale_note(checkpoint: Checkpoint) -> list[Problem]:
    """Where the file itself rules out what its embedded note says."""
    text = checkpoint.extensions.get(EXTENSION)
    return contradictions(checkpoint.progress, read_note(text)) if isinstance(text, str) else []


def _container(format_: Format, path: Path) -> list[Problem]:
    """What the container's own checksums say."""
    try:
        raw = format_.read(path)
        check_sources(_extents(raw.root))
    except FormatError as error:
        return list(error.problems)
    return [problem for tensor in _encoded(raw.root) for problem in _drained(tensor)]


def _drained(tensor: EncodedTensor) -> tuple[Problem, ...]:
    """What a pass over the tensor finds: its checksums do not cover raw bytes, so no extent has them."""
    try:
        for _ in tensor.windows():
            pass
    except FormatError as error:
        return error.problems
    return ()


def _check_fields(require: Sequence[str]) -> None:
    known = settable_fields()
    for name in require:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            raise CkptError.of(
                "usage",
                f"there is no field '{name}' to require"
                + (f" (did you mean '{close[0]}'?)" if close else ""),
                "Fields: " + ", ".join(known) + ".",
                loc=("--require", name),
            )


def _requirement(checkpoint: Checkpoint, name: str) -> Problem | None:
    facts = list(_facts(checkpoint, name))
    if facts and all(isinstance(fact, Known) for fact in facts):
        return None
    reason = next((f.reason for f in facts if isinstance(f, Unknown)), "the checkpoint has none")
    return Problem(
        code="requirement-missing",
        loc=("progress" if name in PROGRESS_FIELDS else "optimizers", name),
        message=f"'{name}' is required and not known: {reason}",
        hint=f"Convert it with --set {name}=VALUE, or save it with the checkpoint.",
    )


def _facts(checkpoint: Checkpoint, name: str) -> Iterator[Fact]:
    if name in PROGRESS_FIELDS:
        yield getattr(checkpoint.progress, name)
        return
    for optimizer in checkpoint.optimizers:
        if name == "optimizer":
            known = optimizer.algorithm != "unknown"
            yield Known(value=optimizer.algorithm) if known else Unknown(reason="its class is not recorded")
            continue
        for group in optimizer.groups:
            yield group.hyperparameters.get(name, Unknown(reason="the source does not record it"))
