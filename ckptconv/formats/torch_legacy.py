"""PyTorch's format of before 1.6, which `_use_new_zipfile_serialization=False` still writes.

Byte layout: pickles one behind the other, without padding: the number 0x1950a86a20f9469cfc6c; the number
1001; a dictionary with `protocol_version`, `little_endian`, `type_sizes`; the object; the list of the
storages' keys. Then for each key in that order the storage: its number of elements (int64), and its bytes.
Numbers and elements are little-endian on every machine, whatever `little_endian` says: PyTorch swaps when it
writes.

A persistent id is `('storage', class, key, location, numel, view)`, or `('module', class, file, source)` for
a module's class (protocol 2 pickles it as `cls.__new__`): the class is what it stands for, its source text is
not kept. A view `(key, offset, numel)`, in elements, is a storage of its own that lies inside the other one
(torch before 0.4).

Storages of the dtypes without a storage class (uint16, float8 and so on) are read: torch writes them and
cannot load them again. Refused: another protocol version, keys without a use and uses without a key, lengths
that disagree, anything but zeros behind the last storage.

Source: torch 2.13 `torch/serialization.py` (`_legacy_save`, `_legacy_load`),
`torch/csrc/serialization.cpp` (`THPStorage_writeFileRaw`); torch 0.3 `torch/serialization.py`.
"""

from __future__ import annotations

from collections.abc import Iterable

from ckptconv.errors import CkptError
from ckptconv.formats.pickle_checks import short
from ckptconv.formats.pickle_reader import unpickle
from ckptconv.formats.torch_decode import Decoder, dtype_of_storage
from ckptconv.formats.torch_stream import PickleStream
from ckptconv.rawtree import DictNode, ListNode, Node, Opaque, RawTree, Scalar
from ckptconv.source import ByteSource
from ckptconv.tensor import Extent, StoredTensor, TensorSpec

MAGIC = 0x1950A86A20F9469CFC6C
_PROTOCOL_VERSION = 1001
_ZEROS_NBYTES = 1 << 16


def is_legacy(head: bytes) -> bool:
    """Whether a file with these first bytes is one: its first pickle is the magic number."""
    if not head.startswith((b"\x80", b"L")):  # protocol 2 and above; 0 and 1
        return False
    try:
        return unpickle(head[:64], decode=lambda node: node, name="").root == MAGIC
    except CkptError:
        return False


class LegacyDecoder(Decoder):
    """Decodes the object: persistent ids of six parts, and those of classes."""

    def persistent(self, identifier: Node) -> Node:
        """A storage, a view of one, or the class of a module."""
        match identifier:
            case ListNode(kind="tuple", items=("module", Opaque(kind="global") as class_, _, _)):
                return class_
            case ListNode(kind="tuple", items=("storage", class_, key, location, numel, view)):
                root = self.storage(class_, key, location, numel)
                return root if view is None else self._view(root, view)
        raise self.checks.error(
            "malformed-pickle",
            f"a persistent id should be that of a storage or a module, it is {short(identifier)}",
        )

    def decode(self, node: Opaque) -> Node:
        """As `Decoder.decode`; what was made of a persistent class is an object of it.

        Raises: see `Decoder.decode`.
        """
        match node:
            case Opaque(kind="apply", args=(Opaque(kind="global") as class_, ListNode(items=args))):
                return Opaque(
                    kind="object",
                    name=class_.name,
                    args=args,
                    state=node.state,
                    items=node.items,
                    pairs=node.pairs,
                )
        return super().decode(node)

    def _view(self, root: Opaque, view: Node) -> Opaque:
        """A window of a storage, as torch makes it: a storage of its own."""
        flat = root.args[0]
        assert isinstance(flat, StoredTensor)
        if not isinstance(view, ListNode) or len(view.items) != 3:
            raise self.checks.error(
                "malformed-pickle", f"a view should be (key, offset, length), it is {short(view)}"
            )
        first = self.checks.count(view.items[1], "the offset of a view")
        count = self.checks.count(view.items[2], "the length of a view")
        if first + count > flat.shape[0]:
            raise self.checks.error(
                "corrupt-file",
                f"a view of elements {first}..{first + count} stands on a storage of {flat.shape[0]}",
            )
        return Opaque(kind="torch.storage", name=root.name, args=(window_of(flat, first, count),))


def window_of(flat: StoredTensor, first: int, count: int) -> StoredTensor:
    """Elements of a storage as a storage with bytes of its own."""
    item = flat.dtype.itemsize
    extent = Extent(source=flat.extent.source, offset=flat.extent.offset + first * item, nbytes=count * item)
    spec = TensorSpec(dtype=flat.dtype, shape=(count,))
    return StoredTensor.dense(spec, extent)


def read_legacy(source: ByteSource, location: str) -> RawTree:
    """The object that was saved; reads the pickles and each storage's length.

    Raises: truncated-file, truncated-tensor, corrupt-file, unsupported-feature, malformed-pickle, and what
    `Decoder` raises.
    """
    stream = PickleStream(source, 0, source.nbytes, "object")
    if stream.plain("magic number") != MAGIC:
        raise stream.error("corrupt-file", "the first pickle is not the magic number")
    version = stream.plain("protocol version")
    if version != _PROTOCOL_VERSION:
        raise stream.error(
            "unsupported-feature", f"protocol version {short(version)}, {_PROTOCOL_VERSION} is read"
        )
    told = stream.plain("system information")
    if not isinstance(told, DictNode):
        raise stream.error("corrupt-file", f"the system information is {short(told)}, no dictionary")
    parsed = stream.parsed("object")
    extents = _storages(stream, _classes(parsed.identifiers()))
    decoder = LegacyDecoder(extents.get, name=source.name, file_nbytes=source.nbytes, member="object")
    root = parsed.root(decoder.decode)
    _refuse_rest(stream)
    attributes: dict[str, Scalar | tuple[str, ...]] = {
        "container": "legacy",
        "protocol": parsed.protocol,
        "byteorder": "little" if told.get("little_endian") is not False else "big",
    }
    if locations := tuple(place for place in decoder.locations if place != "cpu"):
        attributes["locations"] = locations
    return RawTree(format="pytorch", root=root, attributes=attributes, location=location)


def _classes(identifiers: Iterable[Node]) -> dict[str, str]:
    """Storage class by key, of the first id that has the key; what is no such id the decoder refuses."""
    classes: dict[str, str] = {}
    for identifier in identifiers:
        match identifier:
            case ListNode(items=("storage", Opaque(kind="global") as class_, str(key), *_)):
                classes.setdefault(key, class_.name)
    return classes


def _storages(stream: PickleStream, classes: dict[str, str]) -> dict[str, Extent]:
    """Where each storage's bytes lie."""
    keys = stream.plain("storage keys")
    if not isinstance(keys, ListNode):
        raise stream.error("corrupt-file", f"the storage keys are {short(keys)}, no list")
    extents: dict[str, Extent] = {}
    for key in keys.items:
        if not isinstance(key, str) or key not in classes:
            raise stream.error("corrupt-file", f"storage {short(key)} is not used: its type is not known")
        if key in extents:
            raise stream.error("duplicate-key", f"storage '{key}' stands twice in the file")
        dtype = dtype_of_storage(classes[key])
        if dtype is None:
            raise stream.error("unknown-dtype", f"storage '{key}' is of the unknown class {classes[key]}")
        numel = stream.count(8, f"the length of storage '{key}'")
        extents[key] = stream.extent(numel * dtype.itemsize, f"storage '{key}' of {numel} elements")
    return extents


def _refuse_rest(stream: PickleStream) -> None:
    """Zeros may follow, as where a copy was padded to whole blocks."""
    rest = stream.end - stream.at
    if rest > _ZEROS_NBYTES or stream.take(rest, "the rest").strip(b"\0"):
        raise stream.error("corrupt-file", f"{rest} bytes stand behind the last storage")
