"""The globals of PyTorch pickles: which ones may be written, and the op behind conj and neg flags.

Nothing here is imported or called; the names are what a pickle says and what a new one may say.
Source: torch 2.13 `torch/_weights_only_unpickler.py` (`_get_allowed_globals`), `torch/_utils.py`,
`torch/storage.py`; numpy 2.4 `numpy/_core/src/multiarray/methods.c` (`array_reduce`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from ckptconv.dtypes import BY_TORCH, BY_TORCH_STORAGE, DType
from ckptconv.formats import numpy_pickle
from ckptconv.tensor import Array, Bytes, Index, PlainOp, StoredTensor, TensorRef, TensorSpec, as_bytes

TENSOR_V2 = "torch._utils._rebuild_tensor_v2"
TENSOR_V3 = "torch._utils._rebuild_tensor_v3"
PARAMETER = "torch._utils._rebuild_parameter"
PARAMETER_STATE = "torch._utils._rebuild_parameter_with_state"
QUANTIZED = "torch._utils._rebuild_qtensor"
FROM_TYPE = "torch._tensor._rebuild_from_type_v2"
UNTYPED_STORAGE = "torch.storage.UntypedStorage"

_TENSOR_CLASSES = ("BFloat16", "Byte", "Char", "Double", "Float", "Half", "Int", "Long", "Short")

WEIGHTS_ONLY: frozenset[str] = frozenset(
    {
        "_codecs.encode",
        "builtins.bytearray",
        "builtins.complex",
        "builtins.set",
        "collections.Counter",
        "collections.OrderedDict",
        FROM_TYPE,
        "torch.Size",
        "torch.Tensor",
        "torch.device",
        "torch.nn.parameter.Parameter",
        "torch.serialization._get_layout",
        "torch.storage.TypedStorage",
        UNTYPED_STORAGE,
    }
    | {
        f"torch._utils._rebuild_{name}"
        for name in (
            "tensor",
            "tensor_v2",
            "tensor_v3",
            "parameter",
            "parameter_with_state",
            "qtensor",
            "sparse_tensor",
            "nested_tensor",
            "meta_tensor_no_storage",
            "wrapper_subclass",
            "device_tensor_from_cpu_tensor",
            "device_tensor_from_numpy",
        )
    }
    | {
        f"torch.per_{name}"
        for name in (
            "tensor_affine",
            "tensor_symmetric",
            "channel_affine",
            "channel_symmetric",
            "channel_affine_float_qparams",
        )
    }
    | {f"torch.{name}" for name in BY_TORCH}
    | {f"torch.{sign}int{bits}" for sign in ("", "u") for bits in range(1, 8)}
    | {f"torch.{name}" for name in BY_TORCH_STORAGE}
    | {f"torch.cuda.{name}" for name in BY_TORCH_STORAGE if not name.startswith("Q")}
    | {f"torch.{place}{name}Tensor" for name in (*_TENSOR_CLASSES, "Bool") for place in ("", "cuda.")}
    | {f"torch.{place}sparse.{name}Tensor" for name in _TENSOR_CLASSES for place in ("", "cuda.")}
)
"""What `torch.load(weights_only=True)` accepts of itself."""

HARMLESS: frozenset[str] = frozenset(
    {
        f"builtins.{name}"
        for name in ("bool", "bytes", "dict", "float", "frozenset", "int", "list", "str", "tuple")
    }
    | {
        "collections.defaultdict",
        "numpy.dtype",
        "numpy.ndarray",
        numpy_pickle.RECONSTRUCT,
        numpy_pickle.SCALAR,
        "numpy.core.multiarray._reconstruct",
        "numpy.core.multiarray.scalar",
    }
)
"""Types that do nothing but hold values; `torch.load` needs `weights_only=False` for them."""


@dataclass(frozen=True, slots=True)
class ResolveBits(PlainOp):
    """Apply the conj and neg flags of a tensor whose stored bytes are as before them."""

    conj: bool
    neg: bool

    def spec(self, inputs: tuple[TensorSpec, ...]) -> TensorSpec:
        return inputs[0]

    def view(self, tensor: StoredTensor) -> StoredTensor | None:
        return None

    def block(self, inputs: tuple[TensorRef, ...], start: Index, stop: Index) -> Array:
        """Flips the sign bits, as PyTorch does: exact for NaN and zero too."""
        return self._applied(inputs[0].block(start, stop), inputs[0].dtype)

    def windows(self, inputs: tuple[TensorRef, ...], nbytes: int, panel_nbytes: int) -> Iterator[Bytes]:
        dtype = inputs[0].dtype
        for window in inputs[0].windows(nbytes, panel_nbytes):
            yield as_bytes(self._applied(window.view(dtype.numpy), dtype))

    def _applied(self, part: Array, dtype: DType) -> Array:
        """The flags applied to an array of our own, in place where that is possible."""
        kind, size = dtype.kind, dtype.itemsize
        if kind == "complex":
            halves = part.reshape(-1).view(f"<u{size // 2}").reshape(-1, 2)
            sign = halves.dtype.type(1 << (4 * size - 1))
            halves[:, 0] ^= sign * self.neg
            halves[:, 1] ^= sign * (self.neg != self.conj)
        elif kind == "float" and self.neg:
            words = part.reshape(-1).view(f"<u{size}")
            words ^= words.dtype.type(1 << (8 * size - 1))
        elif self.neg:
            part = np.negative(part)
        return part

    def to_json(self) -> dict[str, object]:
        return {"op": "resolve-bits", "conj": self.conj, "neg": self.neg}
