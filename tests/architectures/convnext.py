"""ConvNeXt-Tiny: torchvision's modules and `keras.applications.ConvNeXtTiny`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

IMAGE = (64, 32, 3)
CLASSES = 10
DEPTHS, WIDTHS = (3, 3, 9, 3), (96, 192, 384, 768)


class LayerNorm2d(nn.LayerNorm):
    """Over the channels of channels-first images."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Permute(nn.Module):
    """Another order of axes."""

    def __init__(self, dims: list[int]) -> None:
        super().__init__()
        self.dims = dims

    def forward(self, x: Tensor) -> Tensor:
        return x.permute(self.dims)


class CNBlock(nn.Module):
    """A depthwise convolution and two dense layers, scaled."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.block = nn.Sequential(
            nn.Conv2d(width, width, 7, padding=3, groups=width),
            Permute([0, 2, 3, 1]),
            nn.LayerNorm(width, eps=1e-6),
            nn.Linear(width, 4 * width),
            nn.GELU(),
            nn.Linear(4 * width, width),
            Permute([0, 3, 1, 2]),
        )
        self.layer_scale = nn.Parameter(torch.ones(width, 1, 1) * 1e-6)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer_scale * self.block(x) + x


class ConvNeXt(nn.Module):
    """torchvision's."""

    def __init__(self) -> None:
        super().__init__()
        features: list[nn.Module] = [
            nn.Sequential(nn.Conv2d(3, WIDTHS[0], 4, 4), LayerNorm2d(WIDTHS[0], eps=1e-6))
        ]
        for stage, (depth, width) in enumerate(zip(DEPTHS, WIDTHS, strict=True)):
            features.append(nn.Sequential(*(CNBlock(width) for _ in range(depth))))
            if stage < 3:
                norm = LayerNorm2d(width, eps=1e-6)
                features.append(nn.Sequential(norm, nn.Conv2d(width, WIDTHS[stage + 1], 2, 2)))
        self.features = nn.Sequential(*features)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Sequential(
            LayerNorm2d(WIDTHS[-1], eps=1e-6), nn.Flatten(1), nn.Linear(WIDTHS[-1], CLASSES)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.avgpool(self.features(x)))


def torch_model() -> nn.Module:
    """As `torchvision.models.convnext_tiny`, without stochastic depth."""
    return ConvNeXt()


def keras_model() -> Any:
    """`keras.applications.ConvNeXtTiny`."""
    import keras

    return keras.applications.ConvNeXtTiny(
        weights=None,
        include_preprocessing=False,
        input_shape=IMAGE,
        classes=CLASSES,
        classifier_activation=None,
    )
