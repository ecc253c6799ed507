"""The header of a safetensors file: parsed with every check of the reference library, and made.

Layout, little-endian: `u64` N (at most 100,000,000), N bytes of UTF-8 JSON, then the tensor bytes. The JSON
is one object: name -> `{"dtype", "shape", "data_offsets": [begin, end)}` relative to byte 8 + N, and maybe
`__metadata__`, a flat object of strings. Tensors are dense and C-order; together they cover the data exactly.
Writers pad the header with spaces to a multiple of 8, order tensors by dtype and then by name.

Refused: holes, overlaps, a first tensor not at 0, trailing bytes, sizes that are not shape times dtype, a key
twice (the library keeps the last), padding other than JSON white space, unknown dtypes (F6 too).
Producers: safetensors 0.3 to 0.8. Source: huggingface/safetensors `safetensors/src/tensor.rs` (0.8.0).
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from ckptconv import dtypes
from ckptconv.dtypes import DType
from ckptconv.errors import Code, FormatError, Problem
from ckptconv.strictjson import Json, dump, parse
from ckptconv.tensor import ByteSource, TensorSpec

MAX_HEADER_NBYTES = 100_000_000
METADATA = "__metadata__"
_PREFIX = struct.Struct("<Q")
_MAX_SIZE = (1 << 64) - 1

_FP4 = dtypes.BY_NAME["float4_e2m1fn_x2"]
"""F4 counts values, two in a byte; this dtype counts bytes."""
_BY_TAG: dict[str, DType] = {**dtypes.BY_SAFETENSORS, "F4": _FP4}
_TAG: dict[str, str] = {row.name: tag for tag, row in _BY_TAG.items()}
# The library's enum: its descending order is the order of the tensors in a file.
_ORDER = """
    BOOL F4 U8 I8 F8_E5M2 F8_E4M3 F8_E8M0 F8_E4M3FNUZ F8_E5M2FNUZ I16 U16 F16 BF16 I32 U32 F32 C64 F64 I64 U64
"""
_RANK = {tag: rank for rank, tag in enumerate(_ORDER.split())}


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """What a header says, checked against the file's size."""

    tensors: Mapping[str, tuple[TensorSpec, int]]
    """Name -> spec and absolute offset in the file, in the header's order."""
    metadata: Mapping[str, str]
    nbytes: int
    """Where the tensors begin."""


def _problem(code: Code, loc: tuple[str | int, ...], message: str) -> Problem:
    hint = "Copy the file again; nothing was written."
    if code == "unknown-dtype":
        hint = "This element type is not supported; convert the file with the program that wrote it."
    return Problem(code=code, loc=loc, message=message, hint=hint)


def looks_like_header(head: bytes, file_nbytes: int) -> bool:
    """Whether a file's first bytes could begin a safetensors file of that size."""
    if len(head) < 10:
        return False
    (nbytes,) = _PREFIX.unpack_from(head)
    return 2 <= nbytes <= file_nbytes - 8 and head[8:].lstrip(b" \t\r\n")[:1] in (b"{", b"")


def read_header(source: ByteSource) -> Header:
    """The header of a file, with all that is wrong collected.

    I/O: reads the header only.
    Raises: truncated-file, limit-exceeded, corrupt-file, duplicate-key, unknown-dtype, truncated-tensor.
    """
    name = source.name
    if source.nbytes < _PREFIX.size:
        raise FormatError(
            _problem("truncated-file", (name,), f"expected 8 bytes at least, got {source.nbytes} [{name}]")
        )
    (nbytes,) = _PREFIX.unpack(_read(source, 0, _PREFIX.size))
    if nbytes > MAX_HEADER_NBYTES:
        message = f"a header of {nbytes} bytes, at most {MAX_HEADER_NBYTES} are allowed [{name}]"
        raise FormatError(_problem("limit-exceeded", (name,), message))
    base = _PREFIX.size + nbytes
    if base > source.nbytes:
        message = f"the header needs bytes 8..{base}, the file ends at {source.nbytes} [{name}]"
        raise FormatError(_problem("truncated-file", (name,), message))
    obj = parse(_read(source, _PREFIX.size, nbytes), name)
    if not isinstance(obj, dict):
        raise FormatError(_problem("corrupt-file", (name,), f"the header is no JSON object [{name}]"))
    problems: list[Problem] = []
    metadata = _metadata(obj.pop(METADATA, {}), name, problems)
    entries = {key: _entry(key, value, name, problems) for key, value in obj.items()}
    if not problems:
        _check_cover(entries, source.nbytes - base, base, name, problems)
    if problems:
        raise FormatError(*problems)
    return Header(
        tensors={key: (entry[0], base + entry[1]) for key, entry in entries.items() if entry is not None},
        metadata=metadata,
        nbytes=base,
    )


def _read(source: ByteSource, offset: int, nbytes: int) -> bytes:
    buffer = bytearray(nbytes)
    source.read_into(offset, memoryview(buffer))
    return bytes(buffer)


def _metadata(value: Json, name: str, problems: list[Problem]) -> dict[str, str]:
    if not isinstance(value, dict):
        problems.append(_problem("corrupt-file", (METADATA,), f"{METADATA} is no JSON object [{name}]"))
        return {}
    for key, text in value.items():
        if not isinstance(text, str):
            message = f"expected text, got {type(text).__name__} [{name}]"
            problems.append(_problem("corrupt-file", (METADATA, key), message))
    return {key: text for key, text in value.items() if isinstance(text, str)}


def _is_size(value: Json) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= _MAX_SIZE


def _entry(key: str, value: Json, name: str, problems: list[Problem]) -> tuple[TensorSpec, int, int] | None:
    """Spec, begin and end of one tensor; None where it is wrong."""
    try:
        return _parse_entry(value)
    except _WrongEntryError as wrong:
        problems.append(_problem(wrong.code, (key, *wrong.loc), f"'{key}': {wrong.message} [{name}]"))
        return None


class _WrongEntryError(Exception):
    def __init__(self, code: Code, message: str, *loc: str) -> None:
        self.code, self.message, self.loc = code, message, loc


def _parse_entry(value: Json) -> tuple[TensorSpec, int, int]:
    if not isinstance(value, dict):
        raise _WrongEntryError("corrupt-file", "the entry is no JSON object")
    tag, shape, offsets = value.get("dtype"), value.get("shape"), value.get("data_offsets")
    if not isinstance(tag, str):
        raise _WrongEntryError("corrupt-file", "the entry has no dtype", "dtype")
    if tag not in _BY_TAG:
        raise _WrongEntryError("unknown-dtype", f"dtype {tag!r}", "dtype")
    if not isinstance(shape, list) or not all(_is_size(size) for size in shape):
        raise _WrongEntryError("corrupt-file", "the shape is no list of sizes", "shape")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(_is_size(offset) for offset in offsets):
        raise _WrongEntryError("corrupt-file", "data_offsets is no pair of offsets", "data_offsets")
    begin, end = offsets
    dtype = _BY_TAG[tag]
    if dtype is _FP4:
        if math.prod(shape) % 2:
            raise _WrongEntryError("corrupt-file", f"{math.prod(shape)} 4-bit values fill no bytes", "shape")
        if not shape or shape[-1] % 2:
            raise _WrongEntryError("unsupported-feature", f"F4 of shape {shape}: an odd last axis", "shape")
        shape = [*shape[:-1], shape[-1] // 2]
    spec = TensorSpec(dtype=dtype, shape=tuple(shape))
    if begin > end or spec.nbytes != end - begin:
        message = f"{tag} {shape} needs {spec.nbytes} bytes, data_offsets give {begin}..{end}"
        raise _WrongEntryError("corrupt-file", message, "data_offsets")
    return spec, begin, end


def _check_cover(
    entries: Mapping[str, tuple[TensorSpec, int, int] | None],
    data_nbytes: int,
    base: int,
    name: str,
    problems: list[Problem],
) -> None:
    """The tensors must cover the data without holes, overlaps or a rest."""
    ranges = sorted((entry[1], entry[2], key) for key, entry in entries.items() if entry is not None)
    reached = 0
    for begin, end, key in ranges:
        if begin != reached:
            what = "overlaps the tensor before it" if begin < reached else "leaves a hole before it"
            message = f"'{key}' begins at {begin}, expected {reached}: it {what} [{name}]"
            problems.append(_problem("corrupt-file", (key, "data_offsets"), message))
        if end > data_nbytes:
            needed = f"needs bytes {base + begin}..{base + end}, file ends at {base + data_nbytes}"
            message = f"'{key}' {needed} [{name}]"
            problems.append(_problem("truncated-tensor", (key, "data_offsets"), message))
        reached = max(reached, end)
    if reached < data_nbytes:
        message = f"{data_nbytes - reached} bytes follow the last tensor, expected none [{name}]"
        problems.append(_problem("corrupt-file", (name,), message))


def tag_of(spec: TensorSpec) -> str | None:
    """The dtype's tag; None where safetensors has none for it."""
    if spec.dtype is _FP4 and not spec.shape:
        return None
    return _TAG.get(spec.dtype.name) if spec.encoded_nbytes is None else None


def file_order(tensors: Mapping[str, TensorSpec]) -> list[str]:
    """The names in the order of the library's writer: dtype descending, then name."""
    return sorted(tensors, key=lambda name: (-_RANK[tag_of(tensors[name]) or ""], name))


def make_header(
    tensors: Iterable[tuple[str, TensorSpec]], metadata: Mapping[str, str], name: str
) -> tuple[bytes, dict[str, int]]:
    """Header bytes with their length before them, and the absolute offset of each tensor.

    Raises: limit-exceeded for a header that no reader takes; schema-invalid for text that is not Unicode.
    """
    obj: dict[str, Json] = {METADATA: dict(metadata)} if metadata else {}
    offsets: dict[str, int] = {}
    end = 0
    for key, spec in tensors:
        begin, end = end, end + spec.nbytes
        shape = list(spec.shape)
        if spec.dtype is _FP4:
            shape[-1] *= 2
        obj[key] = {"dtype": tag_of(spec), "shape": shape, "data_offsets": [begin, end]}
        offsets[key] = begin
    text = dump(obj).encode("utf-8")
    text += b" " * (-len(text) % 8)
    if len(text) > MAX_HEADER_NBYTES:
        raise FormatError.of(
            "limit-exceeded",
            f"names and note need a header of {len(text)} bytes, readers take {MAX_HEADER_NBYTES} [{name}]",
            "Write in shards, or in another format.",
            loc=(name,),
        )
    base = _PREFIX.size + len(text)
    return _PREFIX.pack(len(text)) + text, {key: base + offset for key, offset in offsets.items()}
