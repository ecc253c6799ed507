"""Every dtype that a checkpoint can hold: one row each, with its name in each container.

Sources: torch 2.13 `torch/storage.py`, `torch/serialization.py`; TensorFlow 2.21
`tensorflow/core/framework/types.proto`; safetensors 0.8 `src/tensor.rs`.
"""

from __future__ import annotations

from dataclasses import dataclass

import ml_dtypes as ml
import numpy as np


@dataclass(frozen=True, slots=True, kw_only=True)
class DType:
    """One element type."""

    name: str
    """Canonical name, as in the neutral document."""
    itemsize: int
    """Bytes per element in memory and in every file; 0 where elements differ in length."""
    numpy: np.dtype[np.generic]
    """The array type that `read()` gives: little-endian; unsigned bytes where numpy has no type."""
    swap: int
    """Bytes that are reversed together in a big-endian file (half an element for complex types)."""
    torch_storage: str | None = None
    """Typed storage class of a pickle, e.g. `FloatStorage`; None: an untyped storage plus `torch_dtype`."""
    torch: str | None = None
    """Attribute of the `torch` module, e.g. `float32`."""
    tensorflow: int | None = None
    """`DataType` enum of TensorFlow."""
    safetensors: str | None = None
    """Tag in a safetensors header."""
    kind: str
    """`float`, `int`, `uint`, `complex`, `bool`, `quantized`, `packed` or `bytes`."""


def _row(
    name: str,
    numpy: object,
    kind: str,
    *,
    swap: int | None = None,
    storage: str | None = None,
    torch: str | None = None,
    tf: int | None = None,
    st: str | None = None,
    itemsize: int | None = None,
) -> DType:
    array_dtype = np.dtype(numpy)  # type: ignore[call-overload]
    size = array_dtype.itemsize if itemsize is None else itemsize
    return DType(
        name=name,
        itemsize=size,
        numpy=array_dtype,
        swap=size if swap is None else swap,
        torch_storage=storage,
        torch=torch,
        tensorflow=tf,
        safetensors=st,
        kind=kind,
    )


ROWS: tuple[DType, ...] = (
    _row("float64", "<f8", "float", storage="DoubleStorage", torch="float64", tf=2, st="F64"),
    _row("float32", "<f4", "float", storage="FloatStorage", torch="float32", tf=1, st="F32"),
    _row("float16", "<f2", "float", storage="HalfStorage", torch="float16", tf=19, st="F16"),
    _row("bfloat16", ml.bfloat16, "float", storage="BFloat16Storage", torch="bfloat16", tf=14, st="BF16"),
    _row("float8_e4m3fn", ml.float8_e4m3fn, "float", torch="float8_e4m3fn", tf=25, st="F8_E4M3"),
    _row("float8_e5m2", ml.float8_e5m2, "float", torch="float8_e5m2", tf=24, st="F8_E5M2"),
    _row("float8_e4m3fnuz", ml.float8_e4m3fnuz, "float", torch="float8_e4m3fnuz", tf=26, st="F8_E4M3FNUZ"),
    _row("float8_e5m2fnuz", ml.float8_e5m2fnuz, "float", torch="float8_e5m2fnuz", tf=28, st="F8_E5M2FNUZ"),
    _row("float8_e4m3b11fnuz", ml.float8_e4m3b11fnuz, "float", tf=27),
    _row("float8_e8m0fnu", ml.float8_e8m0fnu, "float", torch="float8_e8m0fnu", st="F8_E8M0"),
    _row("float4_e2m1fn", ml.float4_e2m1fn, "float", tf=33),
    _row("float4_e2m1fn_x2", "u1", "packed", torch="float4_e2m1fn_x2"),
    _row("complex128", "<c16", "complex", swap=8, storage="ComplexDoubleStorage", torch="complex128", tf=18),
    _row(
        "complex64",
        "<c8",
        "complex",
        swap=4,
        storage="ComplexFloatStorage",
        torch="complex64",
        tf=8,
        st="C64",
    ),
    _row("complex32", "V4", "complex", swap=2, torch="complex32"),
    _row("int64", "<i8", "int", storage="LongStorage", torch="int64", tf=9, st="I64"),
    _row("int32", "<i4", "int", storage="IntStorage", torch="int32", tf=3, st="I32"),
    _row("int16", "<i2", "int", storage="ShortStorage", torch="int16", tf=5, st="I16"),
    _row("int8", "i1", "int", storage="CharStorage", torch="int8", tf=6, st="I8"),
    _row("uint8", "u1", "uint", storage="ByteStorage", torch="uint8", tf=4, st="U8"),
    _row("uint16", "<u2", "uint", torch="uint16", tf=17, st="U16"),
    _row("uint32", "<u4", "uint", torch="uint32", tf=22, st="U32"),
    _row("uint64", "<u8", "uint", torch="uint64", tf=23, st="U64"),
    _row("bool", "?", "bool", storage="BoolStorage", torch="bool", tf=10, st="BOOL"),
    # One byte per element in numpy and in a bundle.
    _row("int4", ml.int4, "int", tf=29),
    _row("uint4", ml.uint4, "uint", tf=30),
    _row("int2", ml.int2, "int", tf=31),
    _row("uint2", ml.uint2, "uint", tf=32),
    # Quantized storages: the integers are here, the scale stands elsewhere.
    _row("qint8", "i1", "quantized", storage="QInt8Storage", torch="qint8", tf=11),
    _row("quint8", "u1", "quantized", storage="QUInt8Storage", torch="quint8", tf=12),
    _row("qint32", "<i4", "quantized", storage="QInt32Storage", torch="qint32", tf=13),
    _row("qint16", "<i2", "quantized", tf=15),
    _row("quint16", "<u2", "quantized", tf=16),
    # Several elements in a byte: counted in bytes here.
    _row("quint4x2", "u1", "packed", storage="QUInt4x2Storage", torch="quint4x2"),
    _row("quint2x4", "u1", "packed", storage="QUInt2x4Storage", torch="quint2x4"),
    _row("bits8", "u1", "packed", torch="bits8"),
    _row("bits16", "<u2", "packed", torch="bits16"),
    _row("bits1x8", "u1", "packed", torch="bits1x8"),
    _row("bits2x4", "u1", "packed", torch="bits2x4"),
    _row("bits4x2", "u1", "packed", torch="bits4x2"),
    # Elements of differing length: the bytes are TensorFlow's encoding of the whole tensor.
    _row("string", "u1", "bytes", tf=7, itemsize=0, swap=1),
    _row("variant", "u1", "bytes", tf=21, itemsize=0, swap=1),
)

BY_NAME: dict[str, DType] = {row.name: row for row in ROWS}
BY_TORCH_STORAGE: dict[str, DType] = {row.torch_storage: row for row in ROWS if row.torch_storage}
BY_TORCH: dict[str, DType] = {row.torch: row for row in ROWS if row.torch}
BY_TENSORFLOW: dict[int, DType] = {row.tensorflow: row for row in ROWS if row.tensorflow is not None}
BY_SAFETENSORS: dict[str, DType] = {row.safetensors: row for row in ROWS if row.safetensors}
BY_NUMPY: dict[np.dtype[np.generic], DType] = {
    row.numpy: row for row in reversed(ROWS) if row.kind not in ("quantized", "packed", "bytes")
}


def of_array(array: np.ndarray[tuple[int, ...], np.dtype[np.generic]]) -> DType:
    """The row of a numpy array's dtype, whatever its byte order."""
    return BY_NUMPY[array.dtype.newbyteorder("<")]
