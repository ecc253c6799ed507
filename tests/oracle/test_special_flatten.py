"""A dense layer behind a flatten: its rows are in another order where images have channels elsewhere."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("tensorflow")
pytest.importorskip("tf_keras")

from torch import nn  # noqa: E402

import ckptconv  # noqa: E402
from tests.support.command import convert_here, refused_here  # noqa: E402
from tests.support.twins import (  # noqa: E402
    KerasRun,
    Row,
    assert_equal,
    both_ways,
    codes,
    conv2d,
    dense,
    framework,
    keras_run,
    layer,
    linear,
    torch_run,
)

CONVOLUTION = [Row("0.weight", layer(0, "kernel"), conv2d), Row("0.bias", layer(0, "bias"))]


class TestFlatten:
    """Rows of a dense layer behind a flatten are in another order for channels-last images."""

    def models(self, *, flat: bool) -> tuple[Any, Any]:
        keras = framework("keras3")
        kl = keras.layers
        width = 6 * 3 * 3 if flat else 6
        ours = lambda: nn.Sequential(nn.Conv2d(2, 6, 3), nn.Linear(width, 12), nn.Linear(12, 5))  # noqa: E731
        middle = kl.Flatten if flat else kl.GlobalAveragePooling2D
        theirs = lambda: keras.Sequential(  # noqa: E731
            [keras.Input((5, 5, 2)), kl.Conv2D(6, 3), middle(), kl.Dense(12), kl.Dense(5)]
        )
        return ours, theirs

    def test_it_stops_in_both_directions(self, tmp_path: Path) -> None:
        ours, theirs = self.models(flat=True)
        run = torch_run(ours(), 1).save(tmp_path / "run.pt")
        keras = keras_run("keras3", theirs(), 2).save(tmp_path / "k" / "ckpt")
        problems = refused_here("convert", run, tmp_path / "out", "--template", keras)
        assert codes(problems) == [("flatten-layout", "dense-0/kernel")]
        problems = refused_here("convert", keras, tmp_path / "out.pt", "--template", run)
        assert codes(problems) == [("flatten-layout", "1.weight")]

    @pytest.mark.parametrize("name", ["Conv1d", "ConvTranspose2d", "depthwise"])
    @pytest.mark.parametrize("kind", ["keras3", "tf_keras"])
    def test_so_it_does_behind_other_convolutions(self, kind: str, name: str, tmp_path: Path) -> None:
        keras = framework(kind)
        kl = keras.layers
        first, second, positions, shape = {
            "Conv1d": (nn.Conv1d(2, 6, 3), kl.Conv1D(6, 3), 3, (5, 2)),
            "ConvTranspose2d": (nn.ConvTranspose2d(2, 6, 3), kl.Conv2DTranspose(6, 3), 49, (5, 5, 2)),
            "depthwise": (
                nn.Conv2d(2, 6, 3, groups=2, bias=False),
                kl.DepthwiseConv2D(3, depth_multiplier=3, use_bias=False),
                9,
                (5, 5, 2),
            ),
        }[name]
        ours = nn.Sequential(first, nn.Linear(6 * positions, 4))
        theirs = keras.Sequential([keras.Input(shape), second, kl.Flatten(), kl.Dense(4)])
        run = torch_run(ours, 1).save(tmp_path / "run.pt")
        source = keras_run(kind, theirs, 2).save(tmp_path / "k" / "ckpt")
        problems = refused_here("convert", run, tmp_path / "out", "--template", source)
        assert codes(problems) == [("flatten-layout", "dense-0/kernel")]
        problems = refused_here("convert", source, tmp_path / "out.pt", "--template", run)
        assert codes(problems) == [("flatten-layout", "1.weight")]

    def test_pooling_and_a_dense_layer_behind_a_dense_one_do_not(self, tmp_path: Path) -> None:
        """12 inputs are twice the 6 channels, and what the layer before gives out."""
        ours, theirs = self.models(flat=False)
        rows = [*CONVOLUTION, *linear("1", 2), *linear("2", 3)]
        both_ways(ours, theirs, rows, tmp_path)

    def test_allowed_it_keeps_the_rows(self, tmp_path: Path) -> None:
        ours, theirs = self.models(flat=True)
        rows = [*CONVOLUTION, Row("1.weight", layer(2, "kernel"), dense), Row("1.bias", layer(2, "bias"))]
        both_ways(ours, theirs, rows + linear("2", 3), tmp_path, allow=["flatten-layout"])

    def test_between_files_of_one_framework_there_is_nothing_to_stop(self, tmp_path: Path) -> None:
        ours = torch_run(self.models(flat=True)[0](), 1)
        fresh = torch_run(self.models(flat=True)[0](), 2).save(tmp_path / "fresh.pt")
        convert_here(ours.save(tmp_path / "run.pt"), tmp_path / "out.pt", "--template", fresh)
        state = torch.load(tmp_path / "out.pt", weights_only=True)["model"]
        assert all(torch.equal(value, state[name]) for name, value in ours.model.state_dict().items())


C, H, W = 4, 3, 2


def chw(x: Any) -> Any:
    """(out, c*h*w) -> (h*w*c, out)."""
    return x.reshape(-1, C, H, W).transpose(2, 3, 1, 0).reshape(H * W * C, -1)


def chw1(x: Any) -> Any:
    """(c*h*w) -> (h*w*c)."""
    return chw(x)[:, 0]


class TestDeclared:
    """Where a config or a run of a live model tells the image, the rows and their slots are reordered."""

    ROWS = (
        *CONVOLUTION,
        Row("2.weight", layer(3, "gamma"), chw1),
        Row("2.bias", layer(3, "beta"), chw1),
        Row("2.running_mean", layer(3, "moving_mean"), chw1),
        Row("2.running_var", layer(3, "moving_variance"), chw1),
        Row("4.weight", layer(5, "kernel"), chw),
        Row("4.bias", layer(5, "bias")),
        *linear("5", 6),
    )

    def ours(self) -> Any:
        width = C * H * W
        return nn.Sequential(
            nn.Conv2d(2, C, 2),
            nn.Flatten(),
            nn.BatchNorm1d(width, 1e-3),
            nn.Dropout(0.0),
            nn.Linear(width, 2 * C),
            nn.Linear(2 * C, 3),
        )

    def theirs(self, kind: str, *, functional: bool = False) -> Any:
        keras = framework(kind)
        kl = keras.layers
        inputs = keras.Input((H + 1, W + 1, 2))
        inner = [kl.Conv2D(C, 2), kl.MaxPooling2D(1), kl.Flatten(), kl.BatchNormalization(), kl.Dropout(0.0)]
        parts = [*inner, kl.Dense(2 * C), kl.Dense(3)]
        if not functional:
            return keras.Sequential([inputs, *parts])
        x = inputs
        for part in parts:
            x = part(x)
        return keras.Model(inputs, x)

    def rows(self, *, functional: bool) -> list[Row]:
        """The table; a functional model counts its input among its layers."""
        shift = 1 if functional else 0
        return [
            Row(row.torch, lambda model, way=row.keras: way(Shifted(model, shift)), row.to_keras)
            for row in self.ROWS
        ]

    @pytest.mark.parametrize("suffix", [".keras", ".h5"])
    @pytest.mark.parametrize("functional", [False, True])
    @pytest.mark.parametrize("kind", ["keras3", "tf_keras"])
    def test_in_keras_files(self, kind: str, functional: bool, suffix: str, tmp_path: Path) -> None:
        rows = self.rows(functional=functional)
        x = np.random.default_rng(0).normal(size=(3, H + 1, W + 1, 2)).astype(np.float32)
        ours = torch_run(self.ours(), 1)
        there = keras_run(kind, self.theirs(kind, functional=functional), 2, step=0)
        fresh = saved(there, tmp_path / f"f{suffix}")
        run = ours.save(tmp_path / "run.pt")
        spec: list[Any] = []
        if suffix == ".h5":  # its config has no shapes
            problems = refused_here("convert", run, tmp_path / "o.h5", "--template", fresh)
            assert [problem["code"] for problem in problems] == ["flatten-layout"]
            given = torch.from_numpy(x.transpose(0, 3, 1, 2).copy())
            ckptconv.write_skeleton(
                ckptconv.pytorch.describe(ours.model, inputs=given), tmp_path / "spec.json"
            )
            spec = ["--source-spec", tmp_path / "spec.json"]
        made = convert_here(run, tmp_path / f"o{suffix}", "--template", fresh, *spec)
        resumed = loaded(kind, made)
        if suffix == ".keras":  # Keras builds the optimizer of an .h5 file when it trains
            assert_equal(ours, resumed, rows)
        ours.model.eval()
        with torch.no_grad():
            expected = ours.model(torch.from_numpy(x.transpose(0, 3, 1, 2).copy())).numpy()
        np.testing.assert_allclose(np.asarray(resumed.model(x)), expected, rtol=1e-4, atol=1e-4)

        template = torch_run(self.ours(), 5).save(tmp_path / "fresh.pt")
        spec = [str(word).replace("source", "template") for word in spec]
        back = convert_here(made, tmp_path / "back.pt", "--template", template, *spec)
        again = torch_run(self.ours(), 6).load(back)
        for name, value in ours.arrays.items():
            assert name.endswith("num_batches_tracked") or np.array_equal(again.arrays[name], value), name
        for name, _ in ours.model.named_parameters():
            for slot, array in ours.slots(name).items():
                np.testing.assert_array_equal(again.slots(name)[slot], array)

    @pytest.mark.parametrize("told_by", ["torch", "keras", "both"])
    def test_by_a_run_of_either_live_model(self, told_by: str, tmp_path: Path) -> None:
        rows = self.rows(functional=False)
        x = np.zeros((1, H + 1, W + 1, 2), np.float32)
        ours, theirs = torch_run(self.ours(), 1), keras_run("keras3", self.theirs("keras3"), 2)
        given = torch.from_numpy(x.transpose(0, 3, 1, 2).copy())
        spec = ckptconv.pytorch.describe(
            ours.model, ours.optimizer, inputs=given if told_by != "keras" else None
        )
        template = ckptconv.keras.describe(
            theirs.model, theirs.optimizer, inputs=x if told_by != "torch" else None
        )
        ckptconv.convert(
            ours.save(tmp_path / "run.pt"), tmp_path / "o-1", template=template, source_spec=spec
        )
        assert_equal(ours, theirs.load(tmp_path / "o-1"), rows)

    def test_images_of_other_sizes_do_not_fit(self, tmp_path: Path) -> None:
        """Equal widths of 24: 4x3x2 here, 4x2x3 there."""
        ours = torch_run(self.ours(), 1)
        given = torch.zeros(1, 2, W + 1, H + 1)
        spec = ckptconv.pytorch.describe(ours.model, ours.optimizer, inputs=given)
        theirs = keras_run("keras3", self.theirs("keras3"), 2)
        x = np.zeros((1, H + 1, W + 1, 2), np.float32)
        template = ckptconv.keras.describe(theirs.model, theirs.optimizer, inputs=x)
        with pytest.raises(ckptconv.CkptError) as caught:
            ckptconv.convert(
                ours.save(tmp_path / "run.pt"), tmp_path / "o-1", template=template, source_spec=spec
            )
        assert caught.value.problems[0].code == "shape-mismatch"

    @pytest.mark.parametrize("kind", ["keras3", "tf_keras"])
    def test_a_flattened_sequence_is_no_image(self, kind: str, tmp_path: Path) -> None:
        """LSTM layers have their features last in both frameworks: nothing is said, and nothing reordered."""
        keras = framework(kind)
        kl = keras.layers
        model = keras.Sequential(
            [keras.Input((3, 2)), kl.LSTM(4, return_sequences=True), kl.Flatten(), kl.Dense(5)]
        )
        model.save(tmp_path / "m.keras")
        axes = {
            param.axes
            for param in ckptconv.open(tmp_path / "m.keras").params.values()
            if param.layer == "dense"
        }
        assert axes == {("in", "out"), ("out",)}


class Shifted:
    """A model whose layers are counted from another one on."""

    def __init__(self, model: Any, shift: int) -> None:
        self.layers = model.layers[shift:]


def saved(run: KerasRun, path: Path) -> Path:
    run.model.compile(optimizer=run.optimizer, loss=framework(run.kind).losses.MeanSquaredError())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Keras advises against .h5
        run.model.save(path)
    return path


def loaded(kind: str, path: Path) -> KerasRun:
    model = framework(kind).models.load_model(path)
    return KerasRun(kind=kind, model=model, optimizer=model.optimizer)
