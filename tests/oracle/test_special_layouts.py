"""Layers whose shapes do not tell their axes, and those whose axes move, against a table made by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("tensorflow")
pytest.importorskip("tf_keras")

from torch import nn  # noqa: E402

from ckptconv.adapters.pytorch import describe  # noqa: E402
from ckptconv.catalog.layers import declared  # noqa: E402
from ckptconv.detect import open as open_checkpoint  # noqa: E402
from ckptconv.document import Checkpoint  # noqa: E402
from ckptconv.skeleton import write_skeleton  # noqa: E402
from tests.support.command import convert_here, refused_here  # noqa: E402
from tests.support.twins import (  # noqa: E402
    KINDS,
    Row,
    assert_equal,
    both_ways,
    codes,
    conv1d,
    conv2d,
    conv3d,
    depthwise,
    framework,
    keras_run,
    layer,
    ledger,
    linear,
    same,
    torch_run,
)


class Conv1D(nn.Module):
    """The layout of transformers' class of this name: (in, out)."""

    def __init__(self, rows: int, columns: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rows, columns))
        self.bias = nn.Parameter(torch.empty(columns))


def dense_chain(kind: str, inputs: int, *widths: int) -> Any:
    keras = framework(kind)
    return lambda: keras.Sequential([keras.Input((inputs,)), *(keras.layers.Dense(n) for n in widths)])


def squares() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))


SQUARES = linear("0", 0) + linear("1", 1) + linear("2", 2)
WEIGHTS = [("layout-ambiguous", f"{n}.weight") for n in range(3)]


def untransposed(*numbers: int) -> list[Row]:
    return [
        row
        for n in numbers
        for row in (Row(f"{n}.weight", layer(n, "kernel"), same), Row(f"{n}.bias", layer(n, "bias")))
    ]


class TestSquareMatrices:
    """Three equal-shaped square layers: neither a shape nor an order tells a transpose."""

    def test_they_stop_in_both_directions(self, tmp_path: Path) -> None:
        run = torch_run(squares(), 1).save(tmp_path / "run.pt")
        keras = keras_run("keras3", dense_chain("keras3", 4, 4, 4, 4)(), 2).save(tmp_path / "k" / "ckpt")
        problems = refused_here("convert", run, tmp_path / "out", "--template", keras)
        assert codes(problems) == WEIGHTS
        assert all("--source-spec" in problem["hint"] for problem in problems)
        problems = refused_here("convert", keras, tmp_path / "out.pt", "--template", run)
        assert codes(problems) == WEIGHTS
        assert all("--template" in problem["hint"] for problem in problems)
        assert not list(tmp_path.glob("out*"))

    def test_without_biases_they_stop_too(self, tmp_path: Path) -> None:
        keras = framework("keras3")
        kl = keras.layers
        build = lambda: nn.Sequential(*(nn.Linear(4, 4, bias=False) for _ in range(2)))  # noqa: E731
        theirs = lambda: keras.Sequential(  # noqa: E731
            [keras.Input((4,)), *(kl.Dense(4, use_bias=False) for _ in range(2))]
        )
        run = torch_run(build(), 1).save(tmp_path / "run.pt")
        fresh = keras_run("keras3", theirs(), 2).save(tmp_path / "k" / "ckpt")
        assert codes(refused_here("convert", run, tmp_path / "out", "--template", fresh)) == WEIGHTS[:2]
        rows = linear("0", 0, bias=False) + linear("1", 1, bias=False)
        both_ways(build, theirs, rows, tmp_path / "allowed", allow=["assumed-layout"])

    @pytest.mark.parametrize("kind", KINDS)
    def test_the_convention_of_linear_has_to_be_allowed(self, kind: str, tmp_path: Path) -> None:
        both_ways(
            squares, dense_chain(kind, 4, 4, 4, 4), SQUARES, tmp_path, kind=kind, allow=["assumed-layout"]
        )

    def test_every_assumed_parameter_is_listed_and_no_other(self, tmp_path: Path) -> None:
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 5), nn.Linear(5, 5))
        run = torch_run(model, 1).save(tmp_path / "run.pt")
        fresh = keras_run("keras3", dense_chain("keras3", 4, 4, 5, 5)(), 2).save(tmp_path / "k" / "ckpt")
        arguments = ("--template", fresh, "--allow", "assumed-layout", "--report", tmp_path / "report")
        convert_here(run, tmp_path / "out-1", *arguments)
        entries = ledger(tmp_path / "report")
        allowed = {item for item, entry in entries.items() if entry["allowed_by"]}
        assert allowed == {"param/0.weight", "param/2.weight"}
        assert {entries[item]["evidence"] for item in allowed} == {"assumed, by structure"}
        assert entries["param/1.weight"]["evidence"].startswith("matched")

    def test_nothing_is_left_behind_because_a_layout_is_allowed(self, tmp_path: Path) -> None:
        """A parameter without a partner is a problem of its own beside an ambiguous layout."""

        class Model(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.mid, self.head = nn.Linear(4, 4), nn.Linear(4, 4, bias=False)

        torch.save({"model": torch_run(Model(), 1).model.state_dict()}, tmp_path / "run.pt")
        short = Model()
        del short.head
        torch.save({"model": torch_run(short, 2).model.state_dict()}, tmp_path / "short.pt")
        keras = framework("keras3")
        model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(4, name="mid")])
        fresh = keras_run("keras3", model, 2).save(tmp_path / "k" / "ckpt")
        allow = ("--allow", "assumed-layout", "--allow", "slots-missing", "--set", "step=3")
        arguments = ("convert", tmp_path / "run.pt", tmp_path / "out", "--template", fresh, *allow)
        assert ("param-unmatched", "head.weight") in codes(refused_here(*arguments))
        convert_here(tmp_path / "short.pt", tmp_path / "out", "--template", fresh, *allow)

    def test_a_described_model_makes_it_unnecessary(self, tmp_path: Path) -> None:
        ours = torch_run(squares(), 1)
        run, spec = ours.save(tmp_path / "run.pt"), tmp_path / "described.json"
        write_skeleton(describe(ours.model, ours.optimizer), spec)
        build = dense_chain("keras3", 4, 4, 4, 4)
        fresh = keras_run("keras3", build(), 2, step=0).save(tmp_path / "k" / "ckpt")
        report = tmp_path / "report"
        arguments = ("--template", fresh, "--source-spec", spec, "--report", report)
        converted = convert_here(run, tmp_path / "out-1", *arguments)
        assert_equal(ours, keras_run("keras3", build(), 3).load(converted), SQUARES)
        entries = ledger(report)
        assert entries["param/0.weight"]["evidence"].startswith("named")
        assert not any(entry["allowed_by"] for entry in entries.values())

        theirs = keras_run("keras3", build(), 4)
        source = theirs.save(tmp_path / "kr" / "ckpt")
        converted = convert_here(source, tmp_path / "out.pt", "--template", spec)
        assert_equal(torch_run(squares(), 5).load(converted), theirs, SQUARES)


class TestConv1DOfTransformers:
    """(in, out) under the names of `nn.Linear`."""

    def test_shapes_tell_where_no_matrix_is_square(self, tmp_path: Path) -> None:
        build = lambda: nn.Sequential(Conv1D(4, 5), Conv1D(5, 3))  # noqa: E731
        both_ways(build, dense_chain("keras3", 4, 5, 3), untransposed(0, 1), tmp_path)

    @pytest.mark.parametrize("mixed", [False, True])
    def test_a_square_one_needs_a_spec_and_is_not_transposed(self, mixed: bool, tmp_path: Path) -> None:
        """`mixed`: beside a `nn.Linear` of the same shape, which is."""
        last = nn.Linear(4, 4) if mixed else Conv1D(4, 4)
        ours = torch_run(nn.Sequential(Conv1D(4, 4), last), 1)
        run = ours.save(tmp_path / "run.pt")
        build = dense_chain("keras3", 4, 4, 4)
        fresh = keras_run("keras3", build(), 2, step=0).save(tmp_path / "k" / "ckpt")
        problems = refused_here("convert", run, tmp_path / "out", "--template", fresh)
        assert codes(problems) == WEIGHTS[:2]
        kinds = ["gpt2_conv1d", "dense" if mixed else "gpt2_conv1d"]
        spec = tmp_path / "spec.json"
        write_skeleton(with_kinds(open_checkpoint(run), kinds), spec)
        converted = convert_here(run, tmp_path / "out-1", "--template", fresh, "--source-spec", spec)
        rows = untransposed(0) + (linear("1", 1) if mixed else untransposed(1))
        assert_equal(ours, keras_run("keras3", build(), 3).load(converted), rows)


def with_kinds(checkpoint: Checkpoint, kinds: list[str]) -> Checkpoint:
    """The document with the kind of its numbered layers declared."""
    from dataclasses import replace

    params = {}
    for name, param in checkpoint.params.items():
        number, _, suffix = name.partition(".")
        found = declared("torch", kinds[int(number)], suffix, param.tensor.shape)
        assert found is not None
        role, axes = found
        params[name] = replace(param, layer=kinds[int(number)], role=role, axes=axes, evidence="declared")
    return replace(checkpoint, params=params)


def affine(number: int, weight: str, bias: str) -> list[Row]:
    return [Row(f"{number}.weight", layer(number, weight)), Row(f"{number}.bias", layer(number, bias))]


@pytest.mark.parametrize("kind", KINDS)
def test_convolutions_with_as_many_inputs_as_outputs_and_norms(kind: str, tmp_path: Path) -> None:
    keras = framework(kind)
    kl = keras.layers

    def ours() -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(64, 64, 3),
            nn.Conv2d(64, 6, 3, bias=False),
            nn.BatchNorm2d(6),
            nn.Conv2d(6, 6, 3, groups=6),
            nn.GroupNorm(2, 6),
            nn.Conv2d(6, 12, 3, groups=6),
            nn.LayerNorm(12),
            nn.ConvTranspose2d(12, 12, 3),
            nn.Conv2d(12, 12, (3, 12), bias=False),
        )

    def theirs() -> Any:
        layers = [
            kl.Conv2D(64, 3),
            kl.Conv2D(6, 3, use_bias=False),
            kl.BatchNormalization(),
            kl.DepthwiseConv2D(3),
            kl.GroupNormalization(2),
            kl.DepthwiseConv2D(3, depth_multiplier=2),
            kl.LayerNormalization(),
            kl.Conv2DTranspose(12, 3),
            kl.Conv2D(12, (3, 12), use_bias=False),
        ]
        return keras.Sequential([keras.Input((24, 24, 64)), *layers])

    deep = "kernel" if kind == "keras3" else "depthwise_kernel"
    rows = [
        Row("0.weight", layer(0, "kernel"), conv2d),
        Row("0.bias", layer(0, "bias")),
        Row("1.weight", layer(1, "kernel"), conv2d),
        *affine(2, "gamma", "beta"),
        Row("2.running_mean", layer(2, "moving_mean")),
        Row("2.running_var", layer(2, "moving_variance")),
        Row("3.weight", layer(3, deep), depthwise(6)),
        Row("3.bias", layer(3, "bias")),
        *affine(4, "gamma", "beta"),
        Row("5.weight", layer(5, deep), depthwise(6)),
        Row("5.bias", layer(5, "bias")),
        *affine(6, "gamma", "beta"),
        Row("7.weight", layer(7, "kernel"), conv2d),
        Row("7.bias", layer(7, "bias")),
        Row("8.weight", layer(8, "kernel"), conv2d),
    ]
    both_ways(ours, theirs, rows, tmp_path, kind=kind)


@pytest.mark.parametrize("kind", ["keras3", "tf_keras"])
@pytest.mark.parametrize("rank", [1, 3])
def test_convolutions_of_other_ranks(rank: int, kind: str, tmp_path: Path) -> None:
    keras = framework(kind)
    names = ("Conv1d", "ConvTranspose1d") if rank == 1 else ("Conv3d", "ConvTranspose3d")
    twins = ("Conv1D", "Conv1DTranspose") if rank == 1 else ("Conv3D", "Conv3DTranspose")
    way = conv1d if rank == 1 else conv3d
    both_ways(
        lambda: nn.Sequential(*(getattr(nn, name)(5, 5, 3) for name in names)),
        lambda: keras.Sequential(
            [keras.Input((9,) * rank + (5,)), *(getattr(keras.layers, name)(5, 3) for name in twins)]
        ),
        [
            row
            for n in (0, 1)
            for row in (Row(f"{n}.weight", layer(n, "kernel"), way), Row(f"{n}.bias", layer(n, "bias")))
        ],
        tmp_path,
        kind=kind,
    )


def kernel(way: Any) -> list[Row]:
    return [Row("0.weight", layer(0, "kernel"), way)]


@pytest.mark.parametrize(
    ("ours", "theirs", "channels", "rows"),
    [
        (
            lambda: nn.ConvTranspose2d(6, 1, 3, bias=False),
            lambda kl: kl.Conv2DTranspose(1, 3, use_bias=False),
            6,
            kernel(conv2d),
        ),
        (
            lambda: nn.Conv2d(1, 6, 3, bias=False),
            lambda kl: kl.DepthwiseConv2D(3, depth_multiplier=6, use_bias=False),
            1,
            kernel(depthwise(1)),
        ),
        (
            lambda: nn.Conv2d(6, 6, 3, groups=2, bias=False),
            lambda kl: kl.Conv2D(6, 3, groups=2, use_bias=False),
            6,
            kernel(conv2d),
        ),
        (
            lambda: nn.BatchNorm2d(6, affine=False),
            lambda kl: kl.BatchNormalization(center=False, scale=False),
            6,
            [
                Row("0.running_mean", layer(0, "moving_mean")),
                Row("0.running_var", layer(0, "moving_variance")),
            ],
        ),
        (
            lambda: nn.LayerNorm(6, bias=False),
            lambda kl: kl.LayerNormalization(center=False),
            6,
            [Row("0.weight", layer(0, "gamma"))],
        ),
    ],
    ids=["one-output", "one-input", "grouped", "no-affine", "no-beta"],
)
def test_what_two_kinds_explain_alike_is_no_ambiguity(
    ours: Any, theirs: Any, channels: int, rows: list[Row], tmp_path: Path
) -> None:
    """A dense layer behind gives the optimizer something to train where the layer has nothing."""
    keras = framework("keras3")
    kl = keras.layers

    def build() -> Any:
        layers = [theirs(kl), kl.GlobalAveragePooling2D(), kl.Dense(5)]
        return keras.Sequential([keras.Input((9, 9, channels)), *layers])

    width = build().layers[-1].kernel.shape[0]
    both_ways(lambda: nn.Sequential(ours(), nn.Linear(width, 5)), build, rows + linear("1", 2), tmp_path)


class TestBatchCount:
    """`num_batches_tracked`, which only PyTorch has."""

    def test_it_is_left_and_listed_one_way_and_kept_the_other(self, tmp_path: Path) -> None:
        keras = framework("keras3")
        build = lambda: nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5))  # noqa: E731
        theirs = lambda: keras.Sequential(  # noqa: E731
            [keras.Input((4,)), keras.layers.Dense(5), keras.layers.BatchNormalization()]
        )
        ours = torch_run(build(), 1)
        run = ours.save(tmp_path / "run.pt")
        fresh = keras_run("keras3", theirs(), 2).save(tmp_path / "k" / "ckpt")
        convert_here(run, tmp_path / "out-1", "--template", fresh, "--report", tmp_path / "one")
        entry = ledger(tmp_path / "one")["param/1.num_batches_tracked"]
        assert (entry["fate"], entry["allowed_by"]) == ("left", "")

        convert_here(fresh, tmp_path / "back.pt", "--template", run, "--report", tmp_path / "two")
        assert ledger(tmp_path / "two")["template/1.num_batches_tracked"]["fate"] == "kept-from-template"
        back = torch.load(tmp_path / "back.pt", weights_only=True)["model"]
        assert back["1.num_batches_tracked"] == ours.model[1].num_batches_tracked >= 1000


def test_what_a_kernel_of_rank_4_may_be_is_said(tmp_path: Path) -> None:
    """Keras 3 calls the kernels of transposed and of depthwise convolutions alike."""
    keras = framework("keras3")
    kl = keras.layers
    model = keras.Sequential(
        [
            keras.Input((9, 9, 6)),
            kl.Conv2DTranspose(6, 3, use_bias=False),
            kl.DepthwiseConv2D(3, use_bias=False),
        ]
    )
    document = open_checkpoint(keras_run("keras3", model, 1).save(tmp_path / "k" / "ckpt"))
    kernels = [param for param in document.params.values() if len(param.tensor.shape) == 4]
    assert len(kernels) == 2
    for param in kernels:
        assert param.axes is None
        assert {(layout.layer, layout.axes) for layout in param.candidates} == {
            ("conv_transpose2d", ("h", "w", "out", "in")),
            ("depthwise_conv2d", ("h", "w", "in", "multiplier")),
        }
