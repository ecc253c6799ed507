"""Comparing what torch loads: types, order, attributes, bits, strides and who shares memory with whom."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch


def bits(tensor: torch.Tensor) -> bytes:
    """C-order bytes of a strided tensor, whatever its dtype; conj and neg applied."""
    plain = tensor.detach().resolve_conj().resolve_neg().contiguous()
    if plain.numel() == 0:
        return b""
    return plain.reshape(-1).view(torch.uint8).numpy().tobytes()


def tensors(value: Any) -> Iterator[torch.Tensor]:
    """Every tensor, in order."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from tensors(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from tensors(item)


def assert_same(a: Any, b: Any, path: str = "$") -> None:
    """Equal down to types and bits."""
    assert type(a) is type(b), (path, type(a), type(b))
    if isinstance(a, torch.Tensor):
        if a.is_nested:
            assert b.is_nested, path
            assert str(a) == str(b), path
            return
        assert (a.dtype, a.shape, a.layout) == (b.dtype, b.shape, b.layout), path
        assert a.requires_grad == b.requires_grad, path
        if a.is_quantized:
            assert str(a) == str(b), path
            return
        if a.layout is not torch.strided:
            assert torch.equal(a.to_dense(), b.to_dense()), path
            return
        if a.device.type == "meta":
            assert str(a) == str(b), path
            return
        assert (a.stride(), a.storage_offset()) == (b.stride(), b.storage_offset()), path
        assert (a.is_conj(), a.is_neg()) == (b.is_conj(), b.is_neg()), path
        assert a.untyped_storage().nbytes() == b.untyped_storage().nbytes(), path
        assert bits(a) == bits(b), path
        assert_same(dict(a.__dict__), dict(b.__dict__), f"{path}.__dict__")
    elif isinstance(a, dict):
        assert list(a) == list(b), path
        for key in a:
            assert_same(a[key], b[key], f"{path}.{key}")
        if hasattr(a, "__dict__"):
            assert_same(vars(a), vars(b), f"{path}@")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), path
        for position, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{path}[{position}]")
    elif isinstance(a, (np.ndarray, np.generic)):
        assert (a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes()), path
        assert np.asarray(a).flags.f_contiguous == np.asarray(b).flags.f_contiguous, path
    elif isinstance(a, float):
        assert np.float64(a).tobytes() == np.float64(b).tobytes(), path
    elif isinstance(a, (torch.storage.UntypedStorage, torch.storage.TypedStorage)):
        assert a.tolist() == b.tolist(), path
    else:
        assert a == b, path


def sharing(value: Any) -> list[int]:
    """For each tensor the position of the first that it shares its storage with."""
    seen: dict[int, int] = {}
    groups = []
    for position, tensor in enumerate(tensors(value)):
        if tensor.layout is not torch.strided or tensor.numel() == 0 or tensor.is_nested:
            groups.append(position)
            continue
        groups.append(seen.setdefault(tensor.untyped_storage().data_ptr(), position))
    return groups
