"""Epsilon and momentum of normalizations: the lines that the target's code needs make its outputs equal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
tf = pytest.importorskip("tensorflow")
pytest.importorskip("tf_keras")

import keras as keras3  # noqa: E402
import tf_keras  # noqa: E402
from torch import nn  # noqa: E402

import ckptconv  # noqa: E402
from ckptconv.catalog import layers  # noqa: E402
from tests.support.twins import framework  # noqa: E402

EPSILON, MOMENTUM = 0.05, 0.8
KINDS = ("batch_norm", "layer_norm", "group_norm", "instance_norm", "rms_norm")
X = np.random.default_rng(0).standard_normal((3, 5, 4)).astype(np.float32)


class Norm(nn.Module):
    """A normalization of the last axis, small inputs, so that epsilon counts."""

    def __init__(self, kind: str, **options: Any) -> None:
        super().__init__()
        make: dict[str, Any] = {
            "batch_norm": lambda: nn.BatchNorm1d(4, **options),
            "layer_norm": lambda: nn.LayerNorm(4, **options),
            "group_norm": lambda: nn.GroupNorm(2, 4, **options),
            "instance_norm": lambda: nn.InstanceNorm1d(4, affine=True, **options),
            "rms_norm": lambda: nn.RMSNorm(4, **options),
        }
        self.norm = make[kind]()
        self.moved = kind not in ("layer_norm", "rms_norm")

    def forward(self, x: Any) -> Any:
        x = x / 10
        return self.norm(x.movedim(-1, 1).contiguous()).movedim(1, -1) if self.moved else self.norm(x)


def keras_norm(k: Any, kind: str, **options: Any) -> Any:
    kl = k.layers
    layer = {
        "batch_norm": lambda: kl.BatchNormalization(**options),
        "layer_norm": lambda: kl.LayerNormalization(**options),
        "group_norm": lambda: kl.GroupNormalization(2, **options),
        "instance_norm": lambda: kl.GroupNormalization(-1, **options),
        "rms_norm": lambda: kl.RMSNormalization(**options),
    }[kind]()
    return k.Sequential([k.Input((5, 4)), kl.Rescaling(0.1), layer])


def options(kind: str, *, ours: bool) -> dict[str, float]:
    found = {"eps" if ours else "epsilon": EPSILON}
    if kind == "batch_norm":
        found["momentum"] = 1 - MOMENTUM if ours else MOMENTUM
    return found


def apart(ours: Any, theirs: Any) -> float:
    ours.eval()
    with torch.no_grad():
        expected = ours(torch.from_numpy(X)).numpy()
    return float(np.abs(expected - np.asarray(theirs(X))).max())


@pytest.mark.parametrize("kind", KINDS)
def test_to_keras(kind: str, tmp_path: Path) -> None:
    ours, theirs = Norm(kind, **options(kind, ours=True)), keras_norm(keras3, kind)
    template = Path(tf.train.Checkpoint(model=theirs).write(str(tmp_path / "fresh")))
    torch.save(ours.state_dict(), tmp_path / "w.pt")
    spec = ckptconv.pytorch.describe(ours)
    (line,) = ckptconv.convert(
        tmp_path / "w.pt", tmp_path / "w", template=template, source_spec=spec
    ).target_requires
    name, _, arguments = line.partition("  #")[0].partition("(")
    assert name == f"keras.layers.{type(theirs.layers[-1]).__name__}"
    needed: dict[str, float] = eval(f"dict({arguments}", {})
    assert needed == options(kind, ours=False)
    assert apart(ours, theirs) > 1e-3
    assert apart(ours, keras_norm(keras3, kind, **needed)) < 1e-6


@pytest.mark.parametrize("way", ["live", "keras", "h5"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("generation", ["keras3", "tf_keras"])
def test_to_pytorch(kind: str, generation: str, way: str, tmp_path: Path) -> None:
    """From live objects and from files that have a config."""
    if (kind, generation) == ("rms_norm", "tf_keras"):
        assert not hasattr(tf_keras.layers, "RMSNormalization")
        return
    theirs, ours = keras_norm(framework(generation), kind, **options(kind, ours=False)), Norm(kind)
    source: Any = ckptconv.keras.capture(theirs)
    if way != "live":
        theirs.save(source := tmp_path / f"m.{way}")
    (line,) = ckptconv.pytorch.restore(source, ours).target_requires
    assert apart(ours, theirs) > 1e-3
    exec(line, {"model": ours})
    assert apart(ours, theirs) < 1e-6
    if kind == "batch_norm":
        assert ours.norm.momentum == pytest.approx(1 - MOMENTUM)
    assert ckptconv.pytorch.restore(source, ours).target_requires == ()


def test_what_is_alike_needs_no_line() -> None:
    ours = Norm("batch_norm", eps=1e-3, momentum=0.01)
    theirs = keras_norm(keras3, "batch_norm")
    assert ckptconv.keras.restore(ckptconv.pytorch.capture(ours), theirs).target_requires == ()
    assert ckptconv.pytorch.restore(ckptconv.keras.capture(theirs), ours).target_requires == ()


def test_layers_with_the_same_settings_share_a_line(tmp_path: Path) -> None:
    ours = nn.Sequential(*(nn.LayerNorm(4) for _ in range(7)), nn.LayerNorm(4, eps=1e-4))
    theirs = keras3.Sequential([keras3.Input((4,)), *(keras3.layers.LayerNormalization() for _ in range(8))])
    common, last = ckptconv.keras.restore(ckptconv.pytorch.capture(ours), theirs).target_requires
    assert common.startswith("keras.layers.LayerNormalization(epsilon=1e-05)")
    assert common.endswith("and 2 more")
    assert last.startswith("keras.layers.LayerNormalization(epsilon=0.0001)")


def test_an_average_of_all_batches_is_not_taken_for_a_momentum() -> None:
    ours, theirs = Norm("batch_norm", momentum=None), keras_norm(keras3, "batch_norm")
    (line,) = ckptconv.keras.restore(ckptconv.pytorch.capture(ours), theirs).target_requires
    assert "momentum" not in line


def test_a_skeleton_keeps_them(tmp_path: Path) -> None:
    described = ckptconv.pytorch.describe(Norm("batch_norm", eps=EPSILON, momentum=1 - MOMENTUM))
    assert described.layer_settings == {"norm": {"epsilon": EPSILON, "momentum": MOMENTUM}}
    ckptconv.write_skeleton(described, tmp_path / "spec.json")
    assert ckptconv.read_skeleton(tmp_path / "spec.json").layer_settings == described.layer_settings


@pytest.mark.parametrize("kind", KINDS)
def test_the_table_has_the_defaults_of_the_classes(kind: str) -> None:
    torch_layer = Norm(kind).norm
    made: list[tuple[str, Any]] = [("torch", torch_layer)]
    made += [("keras3", keras_norm(keras3, kind).layers[-1])]
    if kind != "rms_norm":
        made += [("tf_keras", keras_norm(tf_keras, kind).layers[-1])]
    for column, layer in made:
        known = layers.kind_of_class(column, type(layer), layer)
        assert known is not None
        told = layers.told_settings(column, known, lambda key, layer=layer: getattr(layer, key))
        assert told == {name: one.usual for name, one in layers.settings(column, known).items()}
        assert told
