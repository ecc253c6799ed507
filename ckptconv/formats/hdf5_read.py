"""The groups, datasets and attributes of an HDF5 file as a tree.

A group is a dictionary of its links, in the order in which their data were written, else by name; its
attributes are the dictionary's `state`, those of its datasets `args[0]`, by the dataset's name. A dataset
is a tensor. Texts are texts, arrays of texts lists; any other attribute is `Opaque(kind="hdf5.array",
name=<numpy dtype>, args=(shape, bytes))`.

Dtypes that HDF5 has no type for are opaque elements with an attribute `dtype` that names them, as Keras
writes bfloat16; that attribute is the tensor's dtype and does not appear as an attribute.

Refused: links to other files, datasets that lie in others or are put together from them (`unsafe-path`); soft
links, groups and datasets that stand in two places, filters that are plugins, datasets of texts or records,
integers of unusual width (`unsupported-feature`, `unknown-dtype`); datasets of fewer bytes than their shape
needs (`truncated-tensor`); those that would inflate more than deflate can, chunks of more than may be held in
memory, attributes larger than the file (`limit-exceeded`).

Source: HDF5 1.14 file format specification; keras 3.15.1 `keras/src/saving/saving_lib.py` (`H5Entry`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from ckptconv import dtypes
from ckptconv.errors import CkptError
from ckptconv.formats.hdf5_file import Handle, LibraryTensor, Object, failure, h5py, joined, reported
from ckptconv.rawtree import DictNode, ListNode, Node, Opaque
from ckptconv.tensor import Extent, StoredTensor, TensorRef, TensorSpec

ARRAY = "hdf5.array"
NOTE = "ckptconv"
"""Dataset of bytes at the root that is the embedded note; no loader of Keras looks for it."""
_MAX_DEPTH = 64
_MAX_RATIO = 1032
"""What deflate can inflate at most; a dataset that claims more than this is refused."""
_CHUNK_NBYTES = 64 << 20
"""A chunk is held in memory whole; one of more is read where the file is larger still."""
_FILTERS = frozenset({1, 2, 3, 4, 5, 6, 32000})
"""Of the library and h5py: deflate, shuffle, fletcher32, szip, nbit, scaleoffset, lzf. Others are plugins."""


def read_tree(extent: Extent, name: str) -> tuple[DictNode, str | None]:
    """The root group of the file in an extent, and its note.

    I/O: reads headers, tables and attributes, and the note.
    Raises: missing-dependency, corrupt-file, truncated-tensor, unknown-dtype, unsupported-feature,
    unsafe-path, limit-exceeded.
    """
    reader = _Reader(Handle(extent, name))
    tree = reader.group(reader.file["/"], ())
    stored = tree.get(NOTE)
    if not isinstance(stored, TensorRef):
        return tree, None
    items = tuple((key, node) for key, node in tree.items if key != NOTE)
    return DictNode(items=items, args=tree.args, state=tree.state), reader.note(stored)


class _Reader:
    def __init__(self, handle: Handle) -> None:
        self._handle = handle
        self._name = handle.name
        self._h5py = h5py()
        self._seen: set[int] = set()
        self.file = handle.file

    def note(self, tensor: TensorRef) -> str:
        if tensor.dtype.name != "uint8":
            raise failure("corrupt-file", self._name, f"the note is {tensor.dtype.name}, no text", NOTE)
        try:
            return tensor.read().tobytes().decode()
        except UnicodeDecodeError as error:
            raise failure(
                "corrupt-file", self._name, f"the note is not UTF-8: {error.reason}", NOTE
            ) from None

    def group(self, group: Object, path: tuple[str, ...]) -> DictNode:
        where = joined(path) or "/"
        with reported(self._name, *path):
            address = int(self._h5py.h5o.get_info(group.id).addr)
            names = [str(name) for name in group]
        self._once(address, f"the group '{where}'", path)
        if len(path) > _MAX_DEPTH:
            raise failure("limit-exceeded", self._name, f"groups are nested deeper than {_MAX_DEPTH}", *path)
        items: list[tuple[Node, Node]] = []
        attributes: list[tuple[Node, Node]] = []
        for name in names:
            inner = (*path, _text(name, self._name))
            child = self._child(group, name, inner)
            if isinstance(child, self._h5py.Group):
                items.append((name, self.group(child, inner)))
            elif isinstance(child, self._h5py.Dataset):
                tensor = self.dataset(child, inner)
                items.append((name, tensor))
                told = {k: v for k, v in self._attributes(child, inner) if not _names_dtype(k, v, tensor)}
                if told:
                    attributes.append((name, DictNode(items=tuple(told.items()))))
            else:
                raise failure(
                    "unsupported-feature", self._name, f"'{joined(inner)}' is a named type, no data", *inner
                )
        own = tuple(self._attributes(group, path))
        return DictNode(
            items=tuple(sorted(items, key=lambda item: _begin(item[1]))),
            args=(DictNode(items=tuple(attributes)),) if attributes else (),
            state=DictNode(items=own) if own else None,
        )

    def _once(self, address: int, what: str, path: tuple[str, ...]) -> None:
        """Raises: unsupported-feature where the object was met before."""
        if address in self._seen:
            raise failure("unsupported-feature", self._name, f"{what} stands in two places", *path)
        self._seen.add(address)

    def _child(self, group: Object, name: str, path: tuple[str, ...]) -> Object:
        with reported(self._name, *path):
            link = group.get(name, getlink=True)
            if isinstance(link, self._h5py.ExternalLink):
                raise failure(
                    "unsafe-path",
                    self._name,
                    f"'{joined(path)}' is a link into the file '{link.filename}'",
                    *path,
                )
            if not isinstance(link, self._h5py.HardLink):
                raise failure("unsupported-feature", self._name, f"'{joined(path)}' is a soft link", *path)
            return group[name]

    def _attributes(self, owner: Object, path: tuple[str, ...]) -> Iterator[tuple[str, Node]]:
        with reported(self._name, *path):
            names = [str(name) for name in owner.attrs]
        for name in names:
            _text(name, self._name)
            with reported(self._name, *path, f"@{name}"):
                stored = owner.attrs.get_id(name)
                nbytes = int(stored.get_space().get_simple_extent_npoints()) * stored.get_type().get_size()
                if nbytes > self._handle.extent.nbytes:
                    raise failure(
                        "limit-exceeded",
                        self._name,
                        f"the attribute '{name}' claims {nbytes} bytes, more than the file has",
                        *path,
                        f"@{name}",
                    )
                yield name, self._attribute(owner.attrs[name], path, name)

    def _attribute(self, value: Any, path: tuple[str, ...], name: str) -> Node:
        if isinstance(value, (str, bytes)) and not isinstance(value, np.bytes_):
            return value
        if isinstance(value, np.bytes_):
            return bytes(value)
        array = np.asarray(value) if isinstance(value, (np.ndarray, np.generic)) else None
        if array is not None and array.dtype.kind in "OS" and array.ndim == 1:
            texts = array.tolist()
            if all(isinstance(text, (str, bytes)) for text in texts):
                return ListNode(items=tuple(texts), kind="list" if array.dtype.kind == "O" else "tuple")
        if array is not None and array.dtype.kind in "biufc":
            little = array.astype(array.dtype.newbyteorder("<"), copy=False)
            shape = ListNode(items=tuple(array.shape), kind="tuple")
            return Opaque(kind=ARRAY, name=little.dtype.str, args=(shape, little.tobytes()))
        raise failure(
            "unsupported-feature",
            self._name,
            f"the attribute '{name}' of '{joined(path) or '/'}' is neither text nor numbers",
            *path,
        )

    def dataset(self, dataset: Object, path: tuple[str, ...]) -> TensorRef:
        """The tensor of a dataset, which is not read."""
        with reported(self._name, *path):
            row, big_endian = self._dtype(dataset, path)
            if dataset.shape is None:
                raise failure("unsupported-feature", self._name, f"'{joined(path)}' has no shape", *path)
            spec = TensorSpec(dtype=row, shape=tuple(int(size) for size in dataset.shape))
            made = dataset.id.get_create_plist()
            layout, external = made.get_layout(), made.get_external_count()
            offset, stored = dataset.id.get_offset(), int(dataset.id.get_storage_size())
            address = int(self._h5py.h5o.get_info(dataset.id).addr)
        self._once(address, f"'{joined(path)}'", path)
        if external or layout == self._h5py.h5d.VIRTUAL:
            raise failure("unsafe-path", self._name, f"'{joined(path)}' lies in another file", *path)
        whole = self._handle.extent
        if layout == self._h5py.h5d.CONTIGUOUS and offset is not None:
            if stored != spec.nbytes or offset + spec.nbytes > whole.nbytes:
                raise failure(
                    "truncated-tensor",
                    self._name,
                    f"'{joined(path)}' needs bytes {offset}..{offset + spec.nbytes}, it has {stored} and the "
                    f"file ends at {whole.nbytes}",
                    *path,
                )
            extent = Extent(
                source=whole.source,
                offset=whole.offset + int(offset),
                nbytes=spec.nbytes,
                big_endian=big_endian,
                within=whole if whole.checksum is not None else None,
            )
            return StoredTensor.dense(spec, extent)
        if not spec.nbytes:
            empty = Extent(source=whole.source, offset=whole.offset, nbytes=0)
            return StoredTensor.dense(spec, empty)
        if spec.nbytes > stored * _MAX_RATIO:
            raise failure(
                "limit-exceeded" if stored else "truncated-tensor",
                self._name,
                f"'{joined(path)}' claims {spec.nbytes} bytes, {stored} are stored",
                *path,
            )
        self._check_chunks(dataset, made, spec, path)
        return LibraryTensor(spec=spec, handle=self._handle, path=joined(path))

    def _check_chunks(self, dataset: Object, made: Object, spec: TensorSpec, path: tuple[str, ...]) -> None:
        """Raises: limit-exceeded, unsupported-feature."""
        with reported(self._name, *path):
            filters = {int(made.get_filter(number)[0]) for number in range(made.get_nfilters())}
            nbytes = math.prod(dataset.chunks or (0,)) * spec.dtype.itemsize
        if filters - _FILTERS:
            code = min(filters - _FILTERS)
            raise failure(
                "unsupported-feature",
                self._name,
                f"'{joined(path)}' needs the filter {code}, a plugin",
                *path,
            )
        limit = max(_CHUNK_NBYTES, self._handle.extent.nbytes)
        if nbytes > limit:
            raise failure(
                "limit-exceeded",
                self._name,
                f"'{joined(path)}' has chunks of {nbytes} bytes, {limit} are read at once",
                *path,
            )

    def _dtype(self, dataset: Object, path: tuple[str, ...]) -> tuple[dtypes.DType, bool]:
        """The row of a dataset's type, and whether its bytes are in the other order."""
        found, stored = dataset.dtype, dataset.id.get_type()
        plain = self._h5py.check_string_dtype(found) is None and found.names is None
        exact = plain and stored.get_size() == found.itemsize
        if exact and found.kind == "V" and found.subdtype is None:
            row = dtypes.BY_NAME.get(str(dataset.attrs.get("dtype", "")))
            if row is not None and row.itemsize == found.itemsize and is_opaque(row):
                return row, False
        elif exact and found.kind in "biufc":
            row = dtypes.BY_NUMPY.get(found.newbyteorder("<"))
            meant = self._h5py.h5t.py_create(found, logical=True)
            if row is not None and stored.equal(meant):
                return row, found.byteorder == ">"
        raise self._unknown(found, path)

    def _unknown(self, found: object, path: tuple[str, ...]) -> CkptError:
        return failure(
            "unknown-dtype", self._name, f"'{joined(path)}' has elements of the type {found}", *path
        )


def _text(name: str, file: str) -> str:
    """A name, which has to be text. Raises: corrupt-file."""
    try:
        name.encode()
    except UnicodeEncodeError:
        raise failure("corrupt-file", file, f"the name {name!r} is not UTF-8", repr(name)) from None
    return name


def _begin(node: Node) -> float:
    """Where the first dataset below a node lies, which was written first."""
    if isinstance(node, DictNode):
        return _begin(node.items[0][1]) if node.items else math.inf
    return node.extent.offset if isinstance(node, StoredTensor) and node.extent.nbytes else math.inf


def is_opaque(row: dtypes.DType) -> bool:
    """Whether HDF5 has no type of its own for these elements."""
    return row.numpy.type.__module__ == "ml_dtypes" and row.kind not in ("quantized", "packed", "bytes")


def _names_dtype(name: str, value: Node, tensor: TensorRef) -> bool:
    return name == "dtype" and is_opaque(tensor.dtype) and value == tensor.dtype.name
