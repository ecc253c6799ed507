"""`.weights.json`: the weights file of a large Keras 3 model in several, with an index.

    X.weights.json      {"metadata": {"total_size": bytes},
                         "weight_map": {"/layers/dense/vars": ["X_00000.weights.h5", ...], ...}}
    X_00000.weights.h5  each a whole file of `weights-h5`, with some of the variables

A group's variables may be spread over several files, in their order. File names in an index are plain names;
every file of a group has it, no variable stands in two. The embedded note is in the first file.

Source: keras 3.15.1 `keras/src/saving/saving_lib.py` (`ShardedH5IOStore`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from ckptconv.errors import FormatError, Problem
from ckptconv.formats.base import Layout, Placement, TargetFile
from ckptconv.formats.hdf5_file import failure
from ckptconv.formats.hdf5_read import read_tree
from ckptconv.formats.hdf5_write import lay_out
from ckptconv.formats.safetensors import is_plain_name
from ckptconv.formats.safetensors_file import constant, split
from ckptconv.rawtree import DictNode, Node, walk
from ckptconv.source import open_source
from ckptconv.strictjson import dump, parse
from ckptconv.tensor import Extent, TensorRef

INDEX_SUFFIX = ".weights.json"
SUFFIX = ".weights.h5"
Steps = tuple[str, ...]
_MOST_INDEX_NBYTES = 1 << 30


def index_of(path: Path) -> Path | None:
    """The index that a path stands for: itself, or the one beside a weights file that is not there."""
    if path.name.endswith(INDEX_SUFFIX):
        return path
    if not path.name.endswith(SUFFIX) or path.exists():
        return None
    beside = path.with_name(path.name.removesuffix(SUFFIX) + INDEX_SUFFIX)
    return beside if beside.is_file() else None


def is_index(path: Path) -> bool:
    """Whether the file begins like an index: a JSON object."""
    try:
        if not path.is_file():
            return False
        with path.open("rb") as file:
            return file.read(64).lstrip()[:1] == b"{"
    except OSError:
        return False


def read_shards(path: Path) -> tuple[DictNode, str | None]:
    """The groups of all files of an index, as of one file, and the note.

    I/O: reads the index and the headers of every file.
    Raises: those of `read_tree` and `strictjson.parse`; missing-file, corrupt-file, duplicate-key,
    unsafe-path, limit-exceeded.
    """
    weight_map = _weight_map(path)
    files = list(dict.fromkeys(file for listed in weight_map.values() for file in listed))
    trees: dict[str, DictNode] = {}
    notes = set()
    for file in files:
        source = open_source(path.with_name(file))
        trees[file], note = read_tree(Extent(source=source, offset=0, nbytes=source.nbytes), file)
        notes |= {note} - {None}
    if len(notes) > 1:
        raise failure("corrupt-file", path.name, f"the files carry {len(notes)} notes")
    for group, listed in weight_map.items():
        for file in listed:
            if not isinstance(_below(trees[file], group), DictNode):
                raise failure(
                    "corrupt-file", path.name, f"'{group}' is not in '{file}', where the index has it", group
                )
    merged: Node = DictNode()
    for file, tree in trees.items():
        merged = _merged(merged, tree, path.name, (file,))
    assert isinstance(merged, DictNode)
    return merged, next(iter(notes), None)


def _weight_map(path: Path) -> Mapping[str, list[str]]:
    try:
        if path.stat().st_size > _MOST_INDEX_NBYTES:
            raise failure("limit-exceeded", path.name, f"an index of {path.stat().st_size} bytes")
        data = path.read_bytes()
    except OSError as error:
        raise failure("missing-file", path.name, f"it cannot be read: {error.strerror}") from None
    told = parse(data, path.name)
    listed = told.get("weight_map") if isinstance(told, dict) else None
    if not isinstance(listed, dict) or not listed:
        raise failure("corrupt-file", path.name, "there is no 'weight_map' of groups to files")
    found: dict[str, list[str]] = {}
    for group, files in listed.items():
        found[group] = [files] if isinstance(files, str) else files
        if not isinstance(found[group], list) or not all(isinstance(file, str) for file in found[group]):
            raise failure("corrupt-file", path.name, f"'{group}' is mapped to no file names", group)
    unsafe = {file for files in found.values() for file in files if not is_plain_name(file)}
    if unsafe:
        hint = "Names must stay in the directory: ask who wrote this file."
        raise FormatError(
            *(
                Problem(
                    code="unsafe-path",
                    loc=("weight_map", file),
                    message=f"'{file}' is no plain file name [{path.name}]",
                    hint=hint,
                )
                for file in sorted(unsafe)
            )
        )
    return found


def _below(tree: DictNode, group: str) -> Node:
    node: Node = tree
    for step in filter(None, group.split("/")):
        node = node.get(step) if isinstance(node, DictNode) else None
    return node


def _merged(one: Node, other: Node, name: str, path: Steps) -> Node:
    """Two trees in one. Raises: duplicate-key."""
    if not isinstance(one, DictNode) or not isinstance(other, DictNode):
        raise failure("duplicate-key", name, f"'{'/'.join(path[1:])}' is in two files", *path)
    items = dict(one.items)
    for key, node in other.items:
        items[key] = _merged(items[key], node, name, (*path, str(key))) if key in items else node
    states = [dict(node.state.items) for node in (other, one) if isinstance(node.state, DictNode)]
    state = {key: value for told in states for key, value in told.items()}
    attributes = {key: value for node in (one, other) for arg in node.args for key, value in _items(arg)}
    return DictNode(
        items=tuple(items.items()),
        args=(DictNode(items=tuple(attributes.items())),) if attributes else (),
        state=DictNode(items=tuple(state.items())) if state else None,
    )


def _items(node: Node) -> tuple[tuple[Node, Node], ...]:
    return node.items if isinstance(node, DictNode) else ()


def lay_out_shards(root: DictNode, note: str | None, limit: int | None, path: Path) -> Layout:
    """The files of at most `limit` bytes of tensors each, and their index last.

    Raises: those of `lay_out`.
    """
    stem = next(path.name.removesuffix(s) for s in (INDEX_SUFFIX, SUFFIX, "") if path.name.endswith(s))
    tensors = {"/".join(map(str, key)): leaf for key, leaf in walk(root) if isinstance(leaf, TensorRef)}
    files: list[TargetFile] = []
    weight_map: dict[str, list[str]] = {}
    for number, shard in enumerate(split(tensors, limit)):
        name = f"{stem}_{number:05}{SUFFIX}"
        part = _part(root, frozenset(shard), (), first=number == 0)
        assert isinstance(part, DictNode)
        new = lay_out(part, note if number == 0 else None, name)
        placements = tuple(
            Placement(key=f"{name}:{key}", offset=offset, tensor=tensor)
            for key, offset, tensor in new.tensors
        )
        files.append(TargetFile(name=name, placements=placements, finish=constant(list(new.literals))))
        for group in _groups(part, ""):
            weight_map.setdefault(group, []).append(name)
    total = sum(tensor.spec.nbytes for tensor in tensors.values())
    index = dump({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=4).encode()
    files.append(TargetFile(name=f"{stem}{INDEX_SUFFIX}", finish=constant([(0, index)])))
    names = {file.name for file in files}
    old = tuple(
        name for name in _files_of(path.with_name(f"{stem}{INDEX_SUFFIX}"), stem) if name not in names
    )
    return Layout(kind="prefix", files=tuple(files), replaces=old)


def _files_of(index: Path, stem: str) -> Iterator[str]:
    """The files of the set that is there now, by its index; others of such names may be somebody's own."""
    try:
        listed = _weight_map(index) if index.is_file() else {}
    except FormatError:
        return
    own = re.compile(re.escape(stem) + r"_\d{5}" + re.escape(SUFFIX))
    yield from sorted({file for files in listed.values() for file in files if own.fullmatch(file)})


def _part(node: DictNode, wanted: frozenset[str], path: Steps, *, first: bool) -> DictNode | None:
    """The groups with the wanted tensors; the first file has the groups without any too."""
    items: list[tuple[Node, Node]] = []
    for key, child in node.items:
        inner = (*path, str(key))
        if isinstance(child, TensorRef):
            if "/".join(inner) in wanted:
                items.append((key, child))
        elif isinstance(child, DictNode):
            part = _part(child, wanted, inner, first=first)
            if part is not None:
                items.append((key, part))
    empty = not any(isinstance(leaf, TensorRef) for _, leaf in walk(node))
    if not items and not (first and empty) and path:
        return None
    kept = {key for key, _ in items}
    told = tuple((key, value) for arg in node.args for key, value in _items(arg) if key in kept)
    return DictNode(items=tuple(items), args=(DictNode(items=told),) if told else (), state=node.state)


def _groups(node: DictNode, at: str) -> Iterator[str]:
    """The groups that hold variables, as Keras names them in an index."""
    if any(isinstance(child, TensorRef) for _, child in node.items):
        yield at
    for key, child in node.items:
        if isinstance(child, DictNode):
            yield from _groups(child, f"{at}/{key!s}")
