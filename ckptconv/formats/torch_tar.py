"""PyTorch's first format (torch 0.1.9 and before): a tar of three members.

Byte layout: an uncompressed tar (blocks of 512 bytes; ustar, pax or old header) with the members

- `storages`: the number n; n times the pickle `(key, location, class)`, the number of elements (int64) and
  the bytes; then the pickled list of views `(key, key of the storage it lies in, offset, numel)`, in
  elements;
- `tensors`: the number n; n times the pickle `(key, key of the storage, class)`, the number of axes (int32),
  four bytes without meaning, size and stride per axis and the offset (int64, in elements);
- `pickle`: the object, in which a tensor's persistent id is its key, a class's the tuple `(class, ...)`.

Numbers and elements are little-endian. Refused: members that are missing or stand twice, keys that name
nothing, header checksums that differ, sizes beyond the file, bytes behind a member's last item.

Source: torch 2.13 `torch/serialization.py` (`legacy_load` in `_legacy_load`); POSIX 1003.1 pax.
"""

from __future__ import annotations

from collections.abc import Iterator

from ckptconv.errors import CkptError
from ckptconv.formats.pickle_checks import short
from ckptconv.formats.torch_decode import Decoder, dtype_of_storage
from ckptconv.formats.torch_legacy import LegacyDecoder, window_of
from ckptconv.formats.torch_stream import PickleStream
from ckptconv.rawtree import ListNode, Node, Opaque, RawTree, Scalar
from ckptconv.source import ByteSource
from ckptconv.tensor import Extent, StoredTensor

_BLOCK = 512
_NAME, _SIZE, _CHECKSUM, _TYPE = slice(0, 100), slice(124, 136), slice(148, 156), slice(156, 157)
_MEMBERS = ("storages", "tensors", "pickle")
_FILE_TYPES = (b"0", b"\0")
_PAX_TYPES = (b"x", b"g")
_MAX_AXES = 64


def is_tar(source: ByteSource) -> bool:
    """Whether it is a tar whose first member is one of these."""
    try:
        return next((name in _MEMBERS for name, _, _ in _headers(source)), False)
    except CkptError:
        return False


def read_tar(source: ByteSource, location: str) -> RawTree:
    """The object that was saved; reads headers, pickles and tensor descriptions.

    Raises: truncated-file, truncated-tensor, corrupt-file, duplicate-key, malformed-pickle, and what
    `Decoder` raises.
    """
    members = _members(source)
    storages = _Storages(members["storages"])
    tensors = _tensors(members["tensors"], storages)
    stream = members["pickle"]
    parsed = stream.parsed("pickle")
    _refuse_rest(stream)
    decoder = _TarDecoder(tensors, source)
    attributes: dict[str, Scalar | tuple[str, ...]] = {
        "container": "tar",
        "protocol": parsed.protocol,
        "byteorder": "little",
    }
    if locations := tuple(place for place in storages.locations if place != "cpu"):
        attributes["locations"] = locations
    root = parsed.root(decoder.decode)
    return RawTree(format="pytorch", root=root, attributes=attributes, location=location)


class _TarDecoder(LegacyDecoder):
    """Decodes the object: a persistent id is a tensor's key."""

    def __init__(self, tensors: dict[int, StoredTensor], source: ByteSource) -> None:
        super().__init__(lambda key: None, name=source.name, file_nbytes=source.nbytes, member="pickle")
        self._tensors = tensors

    def persistent(self, identifier: Node) -> Node:
        match identifier:
            case ListNode(kind="tuple", items=(Opaque(kind="global") as class_, *_)):
                return class_
        key = _key(identifier)
        if key not in self._tensors:
            raise self.checks.error("corrupt-file", f"tensor {short(identifier)} is not in the file")
        return self._tensors[key]


class _Storages:
    """The storages of the file by key."""

    def __init__(self, stream: PickleStream) -> None:
        self.locations: dict[str, None] = {}
        self._extents: dict[str, Extent] = {}
        source = stream.source
        self.decoder = Decoder(
            self._extents.get, name=source.name, file_nbytes=source.nbytes, member="storages"
        )
        self._by_key: dict[int, Opaque] = {}
        for _ in range(_number(stream, "storages")):
            self._read(stream)
        views = stream.plain("storage views")
        if not isinstance(views, ListNode):
            raise stream.error("corrupt-file", f"the views are {short(views)}, no list")
        for view in views.items:
            self._view(stream, view)
        _refuse_rest(stream)

    def get(self, key: Node) -> Opaque | None:
        number = _key(key)
        return None if number is None else self._by_key.get(number)

    def _enter(self, stream: PickleStream, key: Node, storage: Opaque) -> None:
        number = _key(key)
        if number is None or number in self._by_key:
            raise stream.error("duplicate-key", f"storage {short(key)} has no key of its own")
        self._by_key[number] = storage

    def _read(self, stream: PickleStream) -> None:
        match stream.plain("storage"):
            case ListNode(kind="tuple", items=(int() | str() as key, location, Opaque(name=name) as class_)):
                pass
            case other:
                raise stream.error("malformed-pickle", f"a storage is described by {short(other)}")
        dtype = dtype_of_storage(name)
        if dtype is None:
            raise stream.error("unknown-dtype", f"storage {short(key)} is of the unknown class {name}")
        numel = stream.count(8, f"the length of storage {short(key)}")
        what = f"storage {short(key)} of {numel} elements"
        own = str(len(self._extents))  # keys may be numbers or text, these are the decoder's
        self._extents[own] = stream.extent(numel * dtype.itemsize, what)
        self.locations.setdefault(str(location))
        self._enter(stream, key, self.decoder.storage(class_, own, location, numel))

    def _view(self, stream: PickleStream, view: Node) -> None:
        items = view.items if isinstance(view, ListNode) else ()
        root = self.get(items[1]) if len(items) == 4 else None
        if root is None:
            raise stream.error("corrupt-file", f"the view {short(view)} stands on no storage")
        first = self.decoder.checks.count(items[2], "the offset of a view")
        count = self.decoder.checks.count(items[3], "the length of a view")
        flat = root.args[0]
        assert isinstance(flat, StoredTensor)
        if first + count > flat.shape[0]:
            raise stream.error(
                "corrupt-file",
                f"a view of elements {first}..{first + count} stands on a storage of {flat.shape[0]}",
            )
        window = Opaque(kind="torch.storage", name=root.name, args=(window_of(flat, first, count),))
        self._enter(stream, items[0], window)


def _tensors(stream: PickleStream, storages: _Storages) -> dict[int, StoredTensor]:
    tensors: dict[int, StoredTensor] = {}
    for _ in range(_number(stream, "tensors")):
        described = stream.plain("tensor")
        items = described.items if isinstance(described, ListNode) else ()
        storage = storages.get(items[1]) if len(items) == 3 else None
        key = _key(items[0]) if items else None
        if storage is None or key is None:
            raise stream.error("corrupt-file", f"a tensor {short(described)} stands on no storage")
        if key in tensors:
            raise stream.error("duplicate-key", f"tensor {key} stands twice in the file")
        axes = stream.count(4, "the number of axes")
        if axes > _MAX_AXES:
            raise stream.error("limit-exceeded", f"a tensor of {axes} axes, {_MAX_AXES} are possible")
        stream.take(4, "the gap behind the number of axes")
        sizes, strides = (
            ListNode(items=tuple(stream.count(8, what) for _ in range(axes)), kind="tuple")
            for what in ("a size", "a stride")
        )
        offset = stream.count(8, "the offset of a tensor")
        tensors[key] = storages.decoder.strided(storages.decoder.base(storage), offset, sizes, strides)
    _refuse_rest(stream)
    return tensors


def _key(value: Node) -> int | None:
    """A key as torch takes it: a number, or its digits."""
    if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) < 32:
        return int(value)
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _number(stream: PickleStream, what: str) -> int:
    value = stream.plain(f"number of {what}")
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise stream.error("malformed-pickle", f"the number of {what} is {short(value)}")
    return value


def _refuse_rest(stream: PickleStream) -> None:
    if stream.at != stream.end:
        raise stream.error("corrupt-file", f"{stream.end - stream.at} bytes stand behind the last item")


# The tar


def _members(source: ByteSource) -> dict[str, PickleStream]:
    """The three members. Raises: truncated-file, corrupt-file, duplicate-key."""
    found: dict[str, PickleStream] = {}
    for name, start, nbytes in _headers(source):
        if name in found:
            raise found[name].error("duplicate-key", f"'{name}' stands twice in the archive")
        if name in _MEMBERS:
            found[name] = PickleStream(source, start, start + nbytes, name)
    for name in _MEMBERS:
        if name not in found:
            raise PickleStream(source, 0, 0, name).error(
                "truncated-file", f"the archive has no member '{name}' in its {source.nbytes} bytes"
            )
    return found


def _headers(source: ByteSource) -> Iterator[tuple[str, int, int]]:
    """Name, first byte and length of every plain file."""
    stream = PickleStream(source, 0, source.nbytes, "")
    wide: int | None = None
    while stream.at < stream.end:
        at = stream.at
        block = stream.take(_BLOCK, "a tar header")
        if not block.strip(b"\0"):
            return
        if _recorded(block) != _sum(block):
            raise stream.error("checksum-mismatch", f"the tar header at {at} has another checksum")
        nbytes = _octal(block[_SIZE])
        if nbytes is None:
            raise stream.error("corrupt-file", f"the tar header at {at} has the size {block[_SIZE]!r}")
        kind = block[_TYPE]
        if kind in _FILE_TYPES and wide is not None:
            nbytes, wide = wide, None
        start = stream.at
        stream.need(nbytes, f"the member at {at}")
        if kind in _PAX_TYPES:
            wide = _pax_size(stream.take(min(nbytes, 1 << 16), "a pax record")) if kind == b"x" else wide
        elif kind in _FILE_TYPES:
            yield _name(block), start, nbytes
        stream.at = min(start + -(-nbytes // _BLOCK) * _BLOCK, stream.end)


def _name(block: bytes) -> str:
    return block[_NAME].partition(b"\0")[0].decode("latin1").removeprefix("./")


def _octal(field: bytes) -> int | None:
    """A number in octal digits, or in base 256 where its first bit is set."""
    if field[0] & 0x80:
        return int.from_bytes(bytes([field[0] & 0x7F]) + field[1:], "big")
    digits = field.strip(b" \0")
    return int(digits, 8) if digits and not digits.strip(b"01234567") else None


def _recorded(block: bytes) -> int | None:
    return _octal(block[_CHECKSUM])


def _sum(block: bytes) -> int:
    """Of all bytes, those of the checksum itself taken as blanks."""
    return sum(block) - sum(block[_CHECKSUM]) + 8 * 0x20


def _pax_size(record: bytes) -> int | None:
    """The size that a pax record gives, for members that octal digits cannot count."""
    for line in record.split(b"\n"):
        _, _, pair = line.partition(b" ")
        key, _, value = pair.partition(b"=")
        if key == b"size" and value.isdigit() and len(value) < 20:
            return int(value)
    return None
