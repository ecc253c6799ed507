"""MobileNetV2: torchvision's modules and `keras.applications.MobileNetV2`."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

IMAGE = (64, 96, 3)
CLASSES = 10
EPSILON = 1e-3
SETTINGS = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)
"""Expansion, channels, blocks, stride of the first."""


def convolved(inplanes: int, planes: int, size: int = 1, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    """Convolution and normalization; at stride 2 padded right and below alone, as TensorFlow pads."""
    pad: list[nn.Module] = [nn.ZeroPad2d((0, 1, 0, 1))] if stride == 2 else []
    inner = size // 2 if stride == 1 else 0
    convolution = nn.Conv2d(inplanes, planes, size, stride, inner, groups=groups, bias=False)
    return [*pad, convolution, nn.BatchNorm2d(planes, EPSILON, 1e-3)]


class InvertedResidual(nn.Module):
    """Expand, convolve each channel, project; a shortcut where the shape stays."""

    def __init__(self, inplanes: int, planes: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = inplanes * expansion
        self.use_res_connect = stride == 1 and inplanes == planes
        layers: list[nn.Module] = []
        if expansion != 1:
            layers += [*convolved(inplanes, hidden), nn.ReLU6(inplace=True)]
        layers += [*convolved(hidden, hidden, 3, stride, hidden), nn.ReLU6(inplace=True)]
        self.conv = nn.Sequential(*layers, *convolved(hidden, planes))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x) if self.use_res_connect else self.conv(x)


class MobileNetV2(nn.Module):
    """torchvision's, with Keras' padding."""

    def __init__(self) -> None:
        super().__init__()
        features: list[nn.Module] = [nn.Sequential(*convolved(3, 32, 3, 2), nn.ReLU6(inplace=True))]
        inplanes = 32
        for expansion, planes, depth, stride in SETTINGS:
            for number in range(depth):
                features.append(InvertedResidual(inplanes, planes, 1 if number else stride, expansion))
                inplanes = planes
        features.append(nn.Sequential(*convolved(inplanes, 1280), nn.ReLU6(inplace=True)))
        self.features = nn.Sequential(*features)
        self.classifier = nn.Sequential(nn.Dropout(0.0), nn.Linear(1280, CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x).mean((2, 3)))


def torch_model() -> nn.Module:
    """As `torchvision.models.mobilenet_v2`."""
    return MobileNetV2()


def keras_model() -> Any:
    """`keras.applications.MobileNetV2`."""
    import keras

    return keras.applications.MobileNetV2(
        weights=None, input_shape=IMAGE, classes=CLASSES, classifier_activation=None
    )
