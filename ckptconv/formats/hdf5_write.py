"""A new HDF5 file, laid out before a tensor byte is read.

h5py makes the file without data: every dataset contiguous, its space reserved and not filled, in a sparse
temporary file. Where the datasets lie is where the engine places the tensors; what is between them are the
literal bytes. The same tree gives the same bytes: no times are recorded.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ckptconv import dtypes
from ckptconv.errors import CkptError, Code, FormatError, Problem
from ckptconv.formats.hdf5_file import Object, h5py
from ckptconv.formats.hdf5_read import ARRAY, NOTE, is_opaque
from ckptconv.rawtree import DictNode, ListNode, Node, Opaque
from ckptconv.tensor import StoredTensor, TensorRef


@dataclass(frozen=True, slots=True, kw_only=True)
class NewFile:
    """Where everything goes."""

    nbytes: int
    literals: tuple[tuple[int, bytes], ...]
    """(offset, bytes), ascending; together with the tensors they are the whole file."""
    tensors: tuple[tuple[str, int, TensorRef], ...]
    """(path, offset, tensor) of every tensor that has bytes, by offset."""


def lay_out(root: DictNode, note: str | None, name: str) -> NewFile:
    """The file of a tree.

    I/O: a temporary file of the headers alone.
    Raises: missing-dependency, unknown-dtype, unsupported-feature, duplicate-key, no-space.
    """
    package = h5py()
    tensors = _checked(root, name)
    if note is not None:
        if NOTE in root:
            raise _refused("duplicate-key", (NOTE,), f"'{NOTE}' is the note's name", name)
        tensors[NOTE] = StoredTensor.of_array(np.frombuffer(note.encode(), np.uint8))
    try:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "headers"
            with package.File(path, "w", libver="earliest") as file:
                _Writer(package).group(file, root)
                for key, tensor in tensors.items():
                    _Writer(package).dataset(file, key, tensor)
                _Writer(package).attributes_of_datasets(file, root)
                offsets = {key: file[key].id.get_offset() for key in tensors}
            return _gathered(path, tensors, offsets, note)
    except OSError as error:
        raise FormatError.of(
            "no-space",
            f"the headers of '{name}' cannot be laid out: {error}",
            "Set TMPDIR to a place with room that allows sparse files.",
            loc=(name,),
        ) from error


def _gathered(
    path: Path, tensors: dict[str, TensorRef], offsets: dict[str, int | None], note: str | None
) -> NewFile:
    placed = sorted(
        (int(offset), key)
        for key, offset in offsets.items()
        if offset is not None and tensors[key].spec.nbytes
    )
    literals, at = [], 0
    with path.open("rb") as file:
        end = file.seek(0, 2)
        for offset, key in [*placed, (end, "")]:
            if offset > at:
                file.seek(at)
                literals.append((at, file.read(offset - at)))
            at = offset + (tensors[key].spec.nbytes if key else 0)
            if note is not None and key == NOTE:
                literals.append((offset, note.encode()))
    return NewFile(
        nbytes=max(at, end),
        literals=tuple(literals),
        tensors=tuple((key, offset, tensors[key]) for offset, key in placed if note is None or key != NOTE),
    )


def _checked(root: DictNode, name: str) -> dict[str, TensorRef]:
    """Every dataset by its path, in the tree's order, which is that of the data.

    Raises: all that the format cannot hold, together.
    """
    problems: list[Problem] = []
    found: dict[str, TensorRef] = {}
    groups: set[str] = set()

    def visit(path: tuple[str, ...], node: DictNode) -> None:
        for key, child in node.items:
            inner = (*path, str(key))
            where = "/".join(inner)
            parts = where.split("/")
            if not isinstance(key, str) or any(part in ("", ".", "..") for part in parts) or "\0" in where:
                problems.extend(
                    _refused("unsupported-feature", inner, f"{key!r} is no name of HDF5", name).problems
                )
            elif where in found or where in groups:
                problems.extend(_refused("duplicate-key", inner, f"'{where}' stands twice", name).problems)
            elif isinstance(child, DictNode):
                groups.add(where)
                visit(inner, child)
            elif not isinstance(child, TensorRef):
                what = type(child).__name__
                problems.extend(_refused("unsupported-feature", inner, f"'{where}' is {what}", name).problems)
            elif not _holds(child.dtype) or child.spec.encoded_nbytes is not None:
                what = f"'{where}' is {child.dtype.name}, for which there is no type"
                problems.extend(_refused("unknown-dtype", inner, what, name).problems)
            else:
                found[where] = child

    visit((), root)
    if problems:
        raise FormatError(*problems)
    return found


def _holds(row: dtypes.DType) -> bool:
    return is_opaque(row) or (
        row.kind in ("float", "int", "uint", "bool", "complex") and row.numpy.kind != "V"
    )


def _refused(code: Code, loc: tuple[str, ...], message: str, name: str) -> CkptError:
    return FormatError.of(
        code,
        f"{message} [{name}]",
        "Write to neutral, which holds everything, or leave it out with --exclude.",
        loc=loc,
    )


class _Writer:
    def __init__(self, package: Object) -> None:
        self._h5py = package

    def group(self, group: Object, node: DictNode) -> None:
        """The groups below one, with their attributes; datasets come later."""
        self._attributes(group, node.state)
        for key, child in node.items:
            if isinstance(child, DictNode):
                self.group(group.require_group(str(key)), child)

    def dataset(self, file: Object, path: str, tensor: TensorRef) -> None:
        """A dataset whose space is reserved and not filled."""
        low, row = self._h5py, tensor.dtype
        opaque = is_opaque(row)
        kind = low.h5t.py_create(np.dtype(f"V{row.itemsize}") if opaque else row.numpy, logical=True)
        made = low.h5p.create(low.h5p.DATASET_CREATE)
        made.set_layout(low.h5d.CONTIGUOUS)
        made.set_alloc_time(low.h5d.ALLOC_TIME_EARLY)
        made.set_fill_time(low.h5d.FILL_TIME_NEVER)
        made.set_obj_track_times(False)
        parent, _, leaf = path.rpartition("/")
        group = file.require_group(parent) if parent else file
        space = low.h5s.create_simple(tensor.shape) if tensor.shape else low.h5s.create(low.h5s.SCALAR)
        dataset = low.Dataset(low.h5d.create(group.id, leaf.encode(), kind, space, made))
        if opaque:
            dataset.attrs["dtype"] = row.name

    def attributes_of_datasets(self, group: Object, node: DictNode) -> None:
        """The attributes that datasets have beside their dtype."""
        for args in node.args:
            for name, told in args.items if isinstance(args, DictNode) else ():
                self._attributes(group[str(name)], told)
        for key, child in node.items:
            if isinstance(child, DictNode):
                self.attributes_of_datasets(group[str(key)], child)

    def _attributes(self, owner: Object, told: Node) -> None:
        for name, value in told.items if isinstance(told, DictNode) else ():
            owner.attrs[str(name)] = self._value(str(name), value)

    def _value(self, name: str, value: Node) -> object:
        if isinstance(value, str):
            return value
        if isinstance(value, bytes):
            return np.bytes_(value)
        if isinstance(value, ListNode):
            texts = list(value.items)
            if value.kind == "tuple" and texts:
                return np.array(texts, dtype="S")
            return np.array(texts, dtype=self._h5py.string_dtype())
        if isinstance(value, Opaque) and value.kind == ARRAY and len(value.args) == 2:
            shape, data = value.args
            if isinstance(shape, ListNode) and isinstance(data, bytes):
                sizes = tuple(size for size in shape.items if isinstance(size, int))
                return np.frombuffer(data, value.name).reshape(sizes)
        raise _refused("unsupported-feature", (f"@{name}",), f"the attribute '{name}' is no text", "HDF5")
