"""Parameters that are no plain arrays: said, kept for the way back, and never left behind in silence."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

import ckptconv  # noqa: E402
from ckptconv import convert  # noqa: E402
from tests.support.command import refused_here  # noqa: E402
from tests.support.torch_equal import assert_same  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")


class Own(torch.Tensor):  # type: ignore[misc]
    """A class of the user's own."""


class Two(torch.Tensor):  # type: ignore[misc]
    """A tensor whose values are in two others."""

    @staticmethod
    def __new__(cls, low: Any, high: Any) -> Any:
        return torch.Tensor._make_wrapper_subclass(cls, low.shape, dtype=low.dtype)

    def __init__(self, low: Any, high: Any) -> None:
        self.low, self.high = low, high

    def __repr__(self) -> str:
        return f"Two({self.low}, {self.high})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any, kwargs: Any = None) -> Any:
        if func is not torch.ops.aten.detach.default:
            raise NotImplementedError(func)
        return cls(args[0].low, args[0].high)


def every_kind() -> OrderedDict[str, Any]:
    torch.manual_seed(0)
    eye = torch.eye(4)
    scales, zeros = torch.rand(3) + 0.1, torch.arange(3)
    return OrderedDict(
        weight=torch.randn(2, 3),
        affine=torch.quantize_per_tensor(torch.randn(4, 3), 0.1, 3, torch.qint8),
        channels=torch.quantize_per_channel(torch.randn(3, 2), scales, zeros, 0, torch.quint8),
        coo=torch.tensor([[0, 1.5], [2.5, 0]]).to_sparse(),
        csr=eye.to_sparse_csr(),
        csc=eye.to_sparse_csc(),
        bsr=eye.to_sparse_bsr((2, 2)),
        nested=torch.nested.nested_tensor([torch.randn(2, 3), torch.randn(1, 3)]),
        own=torch.randn(3).as_subclass(Own),
        trained=torch.nn.Parameter(torch.eye(3).to_sparse()),
        meta=torch.empty(2, device="meta"),
        bias=torch.randn(2),
    )


def packed() -> Any:
    """The state_dict of a quantized module, as post-training quantization leaves it."""
    module = torch.ao.nn.quantized.Linear(3, 2)
    weight = torch.quantize_per_tensor(torch.randn(2, 3), 0.05, 0, torch.qint8)
    module.set_weight_bias(weight, torch.randn(2))
    return module.state_dict()


def saved(value: Any, path: Path) -> Path:
    torch.save(value, path)
    return path


@pytest.mark.parametrize("make", [every_kind, packed])
@pytest.mark.parametrize("in_run", [False, True])
def test_they_are_named_and_come_back_as_torch_loads_them(make: Any, in_run: bool, tmp_path: Path) -> None:
    value = {"model": make(), "epoch": 3} if in_run else make()
    source = saved(value, tmp_path / "a.pt")
    checkpoint = ckptconv.open(source)
    held = make()
    plain = {k for k, v in held.items() if type(v) is torch.Tensor and v.layout is torch.strided}
    plain -= {k for k in plain if held[k].is_quantized or held[k].is_nested or held[k].is_meta}
    assert {block.name for block in checkpoint.described} == {
        k for k, v in held.items() if k not in plain and not isinstance(v, torch.dtype)
    }
    assert set(checkpoint.params) == plain
    for block in checkpoint.described:
        assert set(block.tensors) <= set(checkpoint.extras)
    dialect = "pytorch:plain" if in_run else "pytorch:state-dict"
    convert(source, tmp_path / "n", to="neutral", allow=["opaque-globals"])
    assert ckptconv.open(tmp_path / "n").described == checkpoint.described
    convert(tmp_path / "n", tmp_path / "b.pt", to=dialect, allow=["opaque-globals"])
    assert_same(torch.load(source, weights_only=False), torch.load(tmp_path / "b.pt", weights_only=False))


def test_wrapped_tensors_are_their_parts(tmp_path: Path) -> None:
    source = saved(OrderedDict(w=Two(torch.randn(3), torch.randn(3)), b=torch.randn(2)), tmp_path / "a.pt")
    (block,) = ckptconv.open(source).described
    assert block.name == "w"
    assert sorted(name.rpartition("/")[2] for name in block.tensors) == ["high", "low"]


@pytest.mark.parametrize("target", ["safetensors", "tensorflow:tf-module"])
def test_another_kind_of_file_cannot_hold_them(target: str, tmp_path: Path) -> None:
    source = saved(every_kind(), tmp_path / "a.pt")
    problems = refused_here("convert", source, tmp_path / "out", "--to", target)
    names = [block.name for block in ckptconv.open(source).described]
    assert [(p["code"], p["loc"]) for p in problems] == [("state-dropped", ["params", n]) for n in names]
    assert not (tmp_path / "out").exists()
    report = convert(source, tmp_path / "out", to=target, allow=["state-dropped"])
    left = {entry.item for entry in report.ledger if entry.allowed_by == "state-dropped"}
    assert {("param", name) for name in names} == left


def test_a_template_neither_takes_nor_lends_them(tmp_path: Path) -> None:
    full, plain = tmp_path / "full.pt", tmp_path / "plain.pt"
    saved({"model": every_kind()}, full)
    saved({"model": {k: torch.randn(v) for k, v in {"weight": (2, 3), "bias": (2,)}.items()}}, plain)
    left = refused_here("convert", full, tmp_path / "out.pt", "--template", plain)
    assert {p["code"] for p in left} == {"state-dropped"}
    unfilled = refused_here("convert", plain, tmp_path / "out.pt", "--template", full)
    assert {(p["code"], p["loc"][-1]) for p in unfilled} == {
        ("param-unmatched", block.name) for block in ckptconv.open(full).described
    }
