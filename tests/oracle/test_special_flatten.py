"""A dense layer behind a flatten: its rows are in another order where images have channels elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("tensorflow")
pytest.importorskip("tf_keras")

from torch import nn  # noqa: E402

from tests.support.command import convert_here, refused_here  # noqa: E402
from tests.support.twins import (  # noqa: E402
    Row,
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
