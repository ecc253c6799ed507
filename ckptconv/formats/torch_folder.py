"""A folder of several files that are one PyTorch checkpoint, as one tree: file name -> what is in the file.

Which folders are such is told by the names in `torch_producers`; nothing else is looked at. The root is a
`DictNode(kind="directory")` in the order of names, `mp_rank_00/model_optim_rng.pt` for files of directories
below. A file's subtree is the root of the format that read it:

- `pytorch`: zip, legacy and tar files under any suffix;
- `safetensors`: one file; the shards of an index are a file each, and must be those of the index;
- `dcp`: a directory that is a folder of torch.distributed.checkpoint, under the directory's name;
- `json`: `json_tree`, also the indexes themselves;
- `bytes`: a uint8 tensor, for files of none of these formats (tokenizers, plain pickles).

`RawTree.attributes`: `container` is `directory`, `producer` a row of the table, `not_read` the directories
that were left alone; for each file its name -> its format, and `<name>:<key>` -> an attribute that its format
gave (`<name>:@note` an embedded note of its own, `<name>:style` of JSON). `RawTree.note` is the file
`ckptconv.json`. Written: every file as its format writes it, the producer's mark last, so that a folder
without it is unfinished. Refused: indexes that name other files than there are, names that leave the folder,
more than `MAX_FILES` files.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path

from ckptconv.errors import CkptError, Code, FormatError, Problem
from ckptconv.formats import json_tree
from ckptconv.formats.base import Layout, Placement, TargetFile
from ckptconv.formats.table import FORMATS
from ckptconv.formats.torch_producers import MEMBERS, PRODUCERS, Producer
from ckptconv.rawtree import DictNode, Node, RawTree, Scalar
from ckptconv.source import open_source
from ckptconv.strictjson import parse
from ckptconv.tensor import Extent, StoredTensor, TensorRef

DIRECTORY = "directory"
"""`DictNode.kind` of the root, and the attribute `container`."""
NOTE_FILE = "ckptconv.json"
MAX_FILES = 1 << 17
_MAX_JSON_NBYTES = 256 << 20
_INDEX = re.compile(r".*\.(safetensors|bin)\.index\.json")
_OTHERS = frozenset({".metadata", "manifest.json"})
"""Commit marks of folders that are other formats."""

Attributes = Mapping[str, Scalar | tuple[str, ...]]


def producer_of(path: Path) -> Producer | None:
    """Whose folder it is, by the names in it; None for any other. I/O: lists the directory."""
    try:
        names = {entry.name for entry in _entries(path)}
    except (OSError, CkptError):
        return None
    if names & _OTHERS:
        return None
    return next((p for p in PRODUCERS if any(_stands(mark, path, names) for mark in p.marks)), None)


def _stands(mark: str, path: Path, names: set[str]) -> bool:
    above, slash, last = mark.rpartition("/")
    if not slash:
        return any(fnmatchcase(name, mark) for name in names)
    within = (path / name for name in names if fnmatchcase(name, above) and (path / name).is_dir())
    return any(fnmatchcase(entry.name, last) for below in within for entry in _entries(below))


def members(path: Path, names: Iterable[str]) -> frozenset[str]:
    """Those of the names whose directories are parts of the checkpoint that the folder is. I/O: lists it."""
    producer = producer_of(path)
    patterns = () if producer is None else (*producer.below, *producer.parts)
    return frozenset(name for name in names if any(_same_depth(name, pattern) for pattern in patterns))


def only_file(path: Path) -> Path | None:
    """The one file that is a producer's whole folder; None where there are several, or more than that."""
    producer = producer_of(path)
    if producer is None or producer.only is None:
        return None
    files, _ = _files(path, producer)
    found = [file for file in files if _same_depth(file, producer.only)]
    return path / found[0] if len(found) == 1 else None


def read_folder(path: Path) -> RawTree:
    """The files of the folder, each read by its format. I/O: reads headers, indexes, JSON files and pickles.

    Raises: unknown-format, limit-exceeded, missing-file, corrupt-file, duplicate-key, and what the members'
    formats raise.
    """
    producer = producer_of(path)
    if producer is None:
        hint = "Name the file in it that is the checkpoint."
        raise _problem(
            "unknown-format", path.name, f"no producer is known that leaves '{path.name}' so", hint
        )
    files, left = _files(path, producer)
    items: list[tuple[Node, Node]] = []
    attributes: dict[str, Scalar | tuple[str, ...]] = {"container": DIRECTORY, "producer": producer.name}
    if left:
        attributes["not_read"] = left
    note: str | None = None
    for name in files:
        if name == NOTE_FILE:
            note = _text(path / name)
            continue
        kind = "dcp" if _is_part(name, producer) and (path / name).is_dir() else _kind(name, path / name)
        member = _read_member(kind, path / name, name)
        items.append((name, member.root))
        attributes[name] = kind
        attributes.update({f"{name}:{key}": value for key, value in member.attributes.items()})
        if member.note is not None:
            attributes[f"{name}:@note"] = member.note
    root = DictNode(items=tuple(items), kind=DIRECTORY)
    _check_indexes(root)
    return RawTree(format="pytorch", root=root, attributes=attributes, note=note, location=str(path))


def layout_folder(raw: RawTree, path: Path) -> Layout:
    """The folder, every file laid out by its format.

    Raises: what these raise; unsupported-feature for a tree that is no folder's.
    """
    if not isinstance(raw.root, DictNode):
        raise _problem("unsupported-feature", path.name, "a folder's tree is a dictionary of files")
    files: list[TargetFile] = []
    for name, node in raw.root.items:
        if not isinstance(name, str) or not is_member_name(name):
            raise _problem("unsupported-feature", path.name, f"{name!r:.80} is no name of a file in a folder")
        files += _lay_member(name, node, raw.attributes, path)
    if raw.note is not None:
        files.append(TargetFile(name=NOTE_FILE, finish=_constant(raw.note.encode())))
    files.sort(key=lambda file: _is_commit(file.name, raw.attributes))
    return Layout(kind="directory", files=tuple(files))


def format_of(raw: RawTree, name: str) -> str:
    """The format of a file in the tree: as it was read, else as its name says."""
    told = raw.attributes.get(name)
    return told if isinstance(told, str) else _named(name)


def sibling(name: str, other: str) -> str:
    """The name of a file beside another one."""
    above, slash, _ = name.rpartition("/")
    return f"{above}{slash}{other}"


def is_member_name(name: str) -> bool:
    """Whether it names a file in the folder or below, and nothing else."""
    parts = name.split("/")
    return all(p not in ("", ".", "..") and not any(c in "\\:" or ord(c) < 32 for c in p) for p in parts)


# Reading


def _entries(path: Path) -> Iterator[Path]:
    for count, entry in enumerate(path.iterdir()):
        if count == MAX_FILES:
            message = f"'{path.name}' holds more than {MAX_FILES} names"
            raise _problem("limit-exceeded", path.name, message, "Name one file of it.")
        yield entry


def _files(path: Path, producer: Producer) -> tuple[list[str], tuple[str, ...]]:
    """Names of the members: regular files and whole directories; and those that are not the producer's."""
    files: list[str] = []
    left: list[str] = []
    pending = [""]
    while pending:
        above = pending.pop()
        for entry in _entries(path / above):
            name = f"{above}/{entry.name}" if above else entry.name
            if entry.is_file() or (entry.is_dir() and _is_part(name, producer)):
                files.append(name)
            elif not entry.is_dir():
                left.append(name)
            elif any(_same_depth(name, pattern) for pattern in producer.below):
                pending.append(name)
            else:
                left.append(name)
        if len(files) > MAX_FILES:
            message = f"'{path.name}' holds more than {MAX_FILES} files"
            raise _problem("limit-exceeded", path.name, message, "Name one file of it.")
    return sorted(files), tuple(sorted(left))


def _is_part(name: str, producer: Producer) -> bool:
    return any(_same_depth(name, pattern) for pattern in producer.parts)


def _same_depth(name: str, pattern: str) -> bool:
    return name.count("/") == pattern.count("/") and fnmatchcase(name, pattern)


def _named(name: str) -> str:
    last = name.rpartition("/")[2]
    return next(kind for pattern, kind in MEMBERS if fnmatchcase(last, pattern))


def _kind(name: str, path: Path) -> str:
    kind = _named(name)
    return "bytes" if kind == "pytorch" and not FORMATS[kind].sniff(path) else kind


def _read_member(kind: str, path: Path, name: str) -> RawTree:
    if kind in FORMATS:
        return FORMATS[kind].read(path)
    source = open_source(path)
    extent = Extent(source=source, offset=0, nbytes=source.nbytes)
    if kind == "bytes":
        return RawTree(format=kind, root=StoredTensor.raw(extent))
    if extent.nbytes > _MAX_JSON_NBYTES:
        message = f"{extent.nbytes} bytes of JSON, at most {_MAX_JSON_NBYTES} are read"
        raise _problem("limit-exceeded", name, message)
    data = bytearray(extent.nbytes)
    source.read_into(0, memoryview(data))
    root, style = json_tree.read_text(bytes(data), name)
    return RawTree(format=kind, root=root, attributes={"style": style})


def _text(path: Path) -> str:
    source = open_source(path)
    if source.nbytes > _MAX_JSON_NBYTES:
        raise _problem("limit-exceeded", path.name, f"a note of {source.nbytes} bytes")
    data = bytearray(source.nbytes)
    source.read_into(0, memoryview(data))
    parse(bytes(data), path.name)
    return data.decode()


def _check_indexes(root: DictNode) -> None:
    """Every tensor of an index is in the file that the index names. Raises: all that do not fit."""
    members = {name: node for name, node in root.items if isinstance(name, str)}
    keys = {
        name: {key for key in node.keys if isinstance(key, str)}
        for name, node in members.items()
        if isinstance(node, DictNode)
    }
    problems = []
    hint = "Index and shards do not belong together: copy all of them again."
    for name, node in members.items():
        if not _INDEX.fullmatch(name):
            continue
        weight_map = node.get("weight_map") if isinstance(node, DictNode) else None
        if not isinstance(weight_map, DictNode) or not weight_map.items:
            message = f"'{name}' has no 'weight_map' of names to files"
            problems.append(Problem(code="corrupt-file", loc=(name,), message=message, hint=hint))
            continue
        for key, file in weight_map.items:
            shard = sibling(name, file) if isinstance(file, str) else ""
            if shard not in members:
                message = f"'{name}' has {key!r:.80} in {file!r:.80}, which is no file of the folder"
                problems.append(Problem(code="missing-file", loc=(name,), message=message, hint=hint))
            elif key not in keys.get(shard, ()):
                message = f"'{name}' has {key!r:.80} in {file!r:.80}, where it is not"
                problems.append(Problem(code="corrupt-file", loc=(name,), message=message, hint=hint))
    if problems:
        raise FormatError(*problems)


# Writing


def _lay_member(name: str, node: Node, attributes: Attributes, path: Path) -> Iterator[TargetFile]:
    kind = attributes.get(name) or _named(name)
    own = {k.removeprefix(f"{name}:"): v for k, v in attributes.items() if k.startswith(f"{name}:")}
    note = own.pop("@note", None)
    if kind == "json":
        yield TargetFile(name=name, finish=_constant(json_tree.text_of(node, own.get("style"), name)))
    elif isinstance(kind, str) and kind in FORMATS:
        if kind == "pytorch" and "allow_opaque_globals" in attributes:
            own["allow_opaque_globals"] = attributes["allow_opaque_globals"]
        text = note if isinstance(note, str) else None
        member = RawTree(format=kind, root=node, attributes=own, note=text)
        for file in FORMATS[kind].layout(member, path / name).files:
            yield _renamed(file, name)
    elif isinstance(node, TensorRef) and node.dtype.name == "uint8":
        whole = (Placement(key=name, offset=0, tensor=node),) if node.spec.nbytes else ()
        yield TargetFile(name=name, placements=whole, finish=_constant(b""))
    else:
        raise _problem("unsupported-feature", name, f"'{name}' is no file of bytes")


def _renamed(file: TargetFile, name: str) -> TargetFile:
    """A member's file as one of the folder's, its placements under keys of the folder's layout."""
    prefix = f"{name}/"

    def finish(checksums: Mapping[str, int]) -> Iterable[tuple[int, bytes]]:
        own = {k.removeprefix(prefix): value for k, value in checksums.items() if k.startswith(prefix)}
        return file.finish(own)

    placements = tuple(replace(p, key=prefix + p.key) for p in file.placements)
    within = f"{prefix}{file.name}" if file.name else name
    return TargetFile(name=within, placements=placements, finish=finish)


def _is_commit(name: str, attributes: Attributes) -> int:
    """How late a file is published: the producer's marks after the others, its first mark last."""
    producer = next((p for p in PRODUCERS if p.name == attributes.get("producer")), None)
    marks = producer.marks if producer is not None else ()
    found = [len(marks) - rank for rank, mark in enumerate(marks) if _same_depth(name, mark)]
    return max(found, default=0)


def _constant(data: bytes) -> Callable[[Mapping[str, int]], Iterable[tuple[int, bytes]]]:
    return lambda checksums: [(0, data)] if data else []


def _problem(code: Code, name: str, message: str, hint: str = "Copy the folder again.") -> CkptError:
    return FormatError.of(code, message, hint, loc=(name,))
