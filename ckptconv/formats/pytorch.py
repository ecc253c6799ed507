"""PyTorch's formats: the zip that `torch.save` has written since 1.6, and the three beside it that are read.

A folder that is one checkpoint is `torch_folder`. What stands in a file is told by its bytes: `torch_legacy`
(torch before 1.6), `torch_tar` (0.1.9 and before), `torch_script` (`torch.jit.save`), else this one. Of files
only the zip is written. Byte layout: a zip (`zip_container`) whose records all stand under one prefix, the
archive's name: `data.pkl` (the object, `pickle_reader`), `data/<key>` (the raw bytes of one storage each),
`byteorder` (`little` or `big`; absent means little), `.format_version`, `.storage_alignment`, `version` (1 to
10), `.data/serialization_id`. In the pickle a storage is a persistent id `('storage', class, key, location,
numel)` and a tensor a call on it; offset and strides count elements. Written are torch 2.13's records in its
order, pickle protocol 2, little-endian.

The tree of the object:

- dict: `DictNode(kind="dict")`; OrderedDict, Counter, defaultdict: `DictNode(kind="collections.OrderedDict")`
  and so on, attributes (`_metadata`) in `state`, the factory in `args`;
- list, tuple, set, frozenset, torch.Size: `ListNode` of that kind;
- numbers, text, None, bytes, complex: themselves;
- tensor: `StoredTensor`, strided, equal `storage_id` where storages are shared; one with a conj or neg flag:
  `DerivedTensor(op=ResolveBits)` of the stored one, which reads as the values that torch shows;
- tensor with requires_grad, hooks or other metadata: `Opaque("torch.tensor", args=(tensor,), state=dict)`
  with the keys `requires_grad`, `backward_hooks`, `metadata` as far as set;
- nn.Parameter: `Opaque("torch.parameter", args=(tensor, requires_grad))`, its attributes in `state`;
- tensor of a subclass or with attributes: `Opaque("torch.subclass", name=class, args=(inner,),
  state=attributes)`;
- quantized tensor: `Opaque("torch.quantized", args=(integers, quantizer, requires_grad, hooks))`;
- bare storage: `Opaque("torch.storage", name=class, args=(1-D tensor,))`;
- dtype, class, function: `Opaque("global", name="torch.float32")`;
- numpy array, numpy scalar: `Opaque("numpy.ndarray")`, `Opaque("numpy.scalar")`, args `(tensor,)` over the
  pickled bytes;
- sparse, nested, meta and wrapper tensors, devices, everything else: `Opaque` of kind `call`, `object`,
  `apply` or `global` as in `pickle_reader`; the tensors in it are reachable.

`RawTree.attributes`: `container` (`zip`, `torchscript`, `legacy`, `tar`), `protocol`, `byteorder`; of zips
also `archive`, `version`, `alignment`; where they occur `locations` (devices other than cpu; written as cpu)
and `other_records`. `RawTree.note` is the record `ckptconv.json`. A big-endian file's tensors are swapped by
their own dtype. (torch does not swap the dtypes that have no typed storage class, such as uint16, and so
reads them wrongly on another machine.)

Refused: records shorter than their storage, tensors beyond their storage, storages that are claimed under two
classes or lengths. Globals that are neither torch's own (its `weights_only` list) nor plain containers are
written only where `attributes["allow_opaque_globals"]` is True.

Source: torch 2.13 `torch/serialization.py`, `caffe2/serialize/inline_container.cc`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

from ckptconv.errors import CkptError, Code, FormatError, UnsafeContentError
from ckptconv.formats import torch_names
from ckptconv.formats.base import ChecksumKind, Layout, Placement, TargetFile, register
from ckptconv.formats.pickle_reader import unpickle
from ckptconv.formats.pickle_writer import pickle_tree
from ckptconv.formats.torch_decode import Decoder
from ckptconv.formats.torch_encode import Encoder, Storage
from ckptconv.formats.torch_folder import DIRECTORY, layout_folder, producer_of, read_folder
from ckptconv.formats.torch_idiom import TensorIdiom
from ckptconv.formats.torch_legacy import is_legacy, read_legacy
from ckptconv.formats.torch_script import flattened
from ckptconv.formats.torch_tar import is_tar, read_tar
from ckptconv.formats.zip_container import (
    LOCAL_SIGNATURE,
    Archive,
    read_archive,
)
from ckptconv.formats.zip_layout import NewRecord, PlannedRecord, archive_frame, plan_archive
from ckptconv.rawtree import Node, RawTree, Scalar
from ckptconv.source import ByteSource, open_source
from ckptconv.tensor import Extent

NOTE_RECORD = "ckptconv.json"
"""Record of the embedded note; torch passes over records that it does not know."""

_ALIGNMENT = 64
_MAX_ALIGNMENT = 1 << 15
_VERSIONS = range(1, 11)
_KNOWN_RECORDS = frozenset(
    {
        "data.pkl",
        ".format_version",
        ".storage_alignment",
        "byteorder",
        "version",
        ".data/version",
        ".data/serialization_id",
        NOTE_RECORD,
    }
)
_ID_DIGITS = 40


class PyTorchFormat:
    """`torch.save` files of every age, and TorchScript archives."""

    name = "pytorch"
    summary = "PyTorch checkpoint: torch.save of any version, TorchScript, folders of HF Trainer and others"
    checksums: tuple[ChecksumKind, ...] = ("crc32",)
    shards = False

    def sniff(self, path: Path) -> bool:
        """Whether it is a zip with `<prefix>/data.pkl`, an older format, or a known producer's folder.

        A zip is judged by its first record, which that is in torch's; where it is another one the directory
        tells, and where that is lost the first record again.
        """
        if path.is_dir():
            return producer_of(path) is not None
        if not path.is_file():
            return False
        source = open_source(path)
        head = _head(source)
        if not head.startswith(LOCAL_SIGNATURE):
            return is_legacy(head) or is_tar(source)
        first = head[30 : 30 + int.from_bytes(head[26:28], "little")]
        if first.count(b"/") == 1 and first.endswith(b"/data.pkl"):
            return True
        try:
            return any(
                name.count("/") == 1 and name.endswith("/data.pkl") for name in read_archive(source).records
            )
        except CkptError:
            return first.endswith((b"/data.pkl", b"/version", b"/data/0"))

    def read(self, path: Path) -> RawTree:
        """The object that was saved, or a folder's files; reads directories, headers, pickles, no storage.

        Raises: see `zip_container.read_archive`, `pickle_reader.unpickle`, `torch_decode.Decoder`.
        """
        if path.is_dir():
            return read_folder(path)
        return read_source(open_source(path), str(path))

    def layout(self, raw: RawTree, path: Path) -> Layout:
        """Where each record goes; reads arrays that stand inside the pickle, no storage.

        Raises: unknown-dtype, opaque-globals, limit-exceeded, unsupported-feature, reference-broken.
        """
        if raw.attributes.get("container") == DIRECTORY:
            return layout_folder(raw, path)
        alignment = _attribute_int(raw.attributes, "alignment", _ALIGNMENT)
        if not 1 <= alignment <= _MAX_ALIGNMENT:
            raise FormatError.of(
                "unsupported-feature",
                f"an alignment of {alignment} bytes, 1 to {_MAX_ALIGNMENT} are possible",
                "Leave the attribute 'alignment' out.",
            )
        planned, storages = plan_object(
            raw.root,
            _archive_name(raw, path),
            note=raw.note,
            alignment=alignment,
            opaque_globals=raw.attributes.get("allow_opaque_globals") is True,
        )
        offsets = {place.record.name: place.offset for place in planned}
        placements = tuple(
            Placement(
                key=f"data/{storage.key}",
                offset=offsets[f"data/{storage.key}"],
                tensor=storage.tensor,
                checksum="crc32",
            )
            for storage in storages
            if storage.tensor.spec.nbytes
        )
        target = TargetFile(name="", placements=placements, finish=partial(_finish, planned))
        return Layout(kind="file", files=(target,))


def _finish(planned: tuple[PlannedRecord, ...], checksums: Mapping[str, int]) -> Iterable[tuple[int, bytes]]:
    return archive_frame(planned, checksums)


# Reading


def _problem(code: Code, source: ByteSource, member: str, message: str, hint: str = "") -> FormatError:
    error = FormatError.of(
        code,
        f"{message} [{source.name}]",
        hint or "Copy or save the file again; nothing was written.",
        loc=(source.name, member) if member else (source.name,),
    )
    assert isinstance(error, FormatError)
    return error


def _head(source: ByteSource) -> bytes:
    head = bytearray(min(source.nbytes, 1024))
    source.read_into(0, memoryview(head))
    return bytes(head)


def read_source(source: ByteSource, location: str) -> RawTree:
    """The object that one file holds, wherever its bytes lie."""
    head = _head(source)
    if head.startswith(LOCAL_SIGNATURE):
        return _read_zip(source, location)
    if is_legacy(head):
        return read_legacy(source, location)
    if is_tar(source):
        return read_tar(source, location)
    raise _problem("unknown-format", source, "", f"the file begins with {head[:4]!r}, not as a PyTorch file")


def _read_zip(source: ByteSource, location: str) -> RawTree:
    archive = read_archive(source)
    prefix = _prefix(archive)
    names = {name.removeprefix(f"{prefix}/") for name in archive.records}
    script = "constants.pkl" in names

    def small(name: str) -> bytes | None:
        record = archive.records.get(f"{prefix}/{name}")
        return None if record is None else archive.data(record)

    order = small("byteorder") or b"little"
    if order not in (b"little", b"big"):
        raise _problem("corrupt-file", source, "byteorder", f"byteorder is {order[:20]!r}, not little or big")
    version = _number(source, "version", small("version") or small(".data/version"))
    if version not in _VERSIONS:
        raise _problem("unsupported-feature", source, "version", f"version {version}, 1 to 10 are read")
    alignment = _number(source, ".storage_alignment", small(".storage_alignment") or b"64")
    pickled = small("data.pkl")
    if pickled is None:
        raise _problem("corrupt-file", source, "data.pkl", "the archive has no record data.pkl")

    def find(key: str) -> Extent | None:
        record = archive.records.get(f"{prefix}/data/{key}")
        return None if record is None else archive.extent(record, big_endian=order == b"big")

    decoder = Decoder(find, name=source.name, file_nbytes=source.nbytes)
    at_once = replace(decoder.at_once, idiom=TensorIdiom(decoder))
    result = unpickle(pickled, decode=decoder.decode, name=f"{source.name}!data.pkl", at_once=at_once)
    if result.end != len(pickled):
        raise _problem(
            "malformed-pickle",
            source,
            "data.pkl",
            f"the pickle ends at {result.end} of {len(pickled)} bytes",
        )
    root: Node = result.root
    described: dict[str, tuple[str, ...]] = {}
    if script:
        root, described = flattened(root, small, source.name)
    attributes: dict[str, Scalar | tuple[str, ...]] = {
        "container": "torchscript" if script else "zip",
        "archive": prefix,
        "protocol": result.protocol,
        "byteorder": order.decode(),
        "version": version,
        "alignment": alignment,
        **described,
    }
    if locations := tuple(place for place in decoder.locations if place != "cpu"):
        attributes["locations"] = locations
    others = tuple(sorted(names - _KNOWN_RECORDS - {f"data/{key}" for key in decoder.storages}))
    if others and not script:
        attributes["other_records"] = others
    return RawTree(
        format="pytorch",
        root=root,
        attributes=attributes,
        note=_note(source, small(NOTE_RECORD)),
        location=location,
    )


def _prefix(archive: Archive) -> str:
    """The archive's name: text before the first slash of the first record, and the same for all."""
    prefixes = {name.partition("/")[0] if "/" in name else "" for name in archive.records}
    if len(prefixes) == 1 and (prefix := prefixes.pop()):
        return prefix
    raise _problem(
        "corrupt-file",
        archive.source,
        "",
        "the records do not stand under one name",
    )


def _number(source: ByteSource, name: str, raw: bytes | None) -> int:
    text = (raw or b"").strip()
    if not text.isdigit() or len(text) > 9:
        found = "missing" if raw is None else repr(raw[:20])
        raise _problem("corrupt-file", source, name, f"'{name}' should hold a number, it is {found}")
    return int(text)


def _note(source: ByteSource, raw: bytes | None) -> str | None:
    if raw is None:
        return None
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        raise _problem("corrupt-file", source, NOTE_RECORD, "the embedded note is not UTF-8") from None


# Writing


def plan_object(
    root: Node,
    archive: str,
    *,
    note: str | None = None,
    alignment: int = _ALIGNMENT,
    opaque_globals: bool = False,
) -> tuple[tuple[PlannedRecord, ...], list[Storage]]:
    """The archive of one saved object: where each record goes, and the storages whose bytes are to be placed.

    Raises: unknown-dtype, opaque-globals, limit-exceeded, unsupported-feature, reference-broken.
    """
    encoder = Encoder(root)
    pickled, names = pickle_tree(root, encoder.encode)
    if not opaque_globals:
        _refuse_opaque(names)
    records = _records(pickled, encoder.storages, note, alignment)
    return plan_archive(archive, records, alignment), encoder.storages


def _records(
    pickled: bytes, storages: Iterable[Storage], note: str | None, alignment: int
) -> Iterator[NewRecord]:
    """torch's records in torch's order; the note before the version."""

    def known(name: str, data: bytes) -> NewRecord:
        return NewRecord(name=name, nbytes=len(data), data=data)

    yield known("data.pkl", pickled)
    yield known(".format_version", b"1")
    yield known(".storage_alignment", str(alignment).encode())
    yield known("byteorder", b"little")
    for storage in storages:
        yield NewRecord(name=f"data/{storage.key}", nbytes=storage.tensor.spec.nbytes)
    if note is not None:
        yield known(NOTE_RECORD, note.encode())
    yield known("version", b"3\n")

    def serialization_id(checksums: Mapping[str, int]) -> bytes:
        """40 digits that follow from the content, as torch's do; nothing checks them."""
        told = hashlib.sha256(pickled)
        for key in sorted(key for key in checksums if key.startswith("data/")):
            told.update(f"{key}:{checksums[key]:08x}\n".encode())
        return str(int.from_bytes(told.digest(), "big") % 10**_ID_DIGITS).zfill(_ID_DIGITS).encode()

    yield NewRecord(name=".data/serialization_id", nbytes=_ID_DIGITS, data=serialization_id)


def _archive_name(raw: RawTree, path: Path) -> str:
    """The name that was read; for a new archive the one that torch gives a file at `path`."""
    name = raw.attributes.get("archive")
    if not isinstance(name, str):
        name = path.name.rpartition(".")[0] or path.name
    plain = name.isascii() and name.isprintable() and not set(name) & set("/\\") and name.strip(".")
    return name if plain and len(name) < 256 else "archive"


def _attribute_int(attributes: Mapping[str, Scalar | tuple[str, ...]], key: str, default: int) -> int:
    value = attributes.get(key)
    return value if isinstance(value, int) and not isinstance(value, bool) else default


def _refuse_opaque(names: frozenset[str]) -> None:
    """Whoever loads the pickle calls what it names: only harmless names are written unasked."""
    opaque = sorted(names - torch_names.WEIGHTS_ONLY - torch_names.HARMLESS)
    if opaque:
        raise UnsafeContentError.of(
            "opaque-globals",
            f"the new pickle would name {', '.join(opaque[:20])}{' ...' if len(opaque) > 20 else ''}",
            "Pass --allow opaque-globals if you trust the source; whoever loads the target calls them.",
            loc=tuple(opaque),
        )


register(PyTorchFormat())
