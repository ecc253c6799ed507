"""U-Net with transposed convolutions, as milesial/Pytorch-UNet and the tutorials of Keras have it."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

IMAGE = (48, 32, 3)
WIDTHS = (64, 128, 256, 512, 1024)
CLASSES = 4


class DoubleConv(nn.Module):
    """Twice convolution, normalization, ReLU."""

    def __init__(self, inplanes: int, planes: int) -> None:
        super().__init__()
        self.double_conv = nn.Sequential(
            nn.Conv2d(inplanes, planes, 3, padding=1, bias=False),
            nn.BatchNorm2d(planes),
            nn.ReLU(inplace=True),
            nn.Conv2d(planes, planes, 3, padding=1, bias=False),
            nn.BatchNorm2d(planes),
            nn.ReLU(inplace=True),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.double_conv(x)


class Up(nn.Module):
    """Upscale, concatenate what the way down left, convolve."""

    def __init__(self, inplanes: int, planes: int) -> None:
        super().__init__()
        self.up = nn.ConvTranspose2d(inplanes, planes, 2, 2)
        self.conv = DoubleConv(inplanes, planes)

    def forward(self, x: Tensor, skipped: Tensor) -> Tensor:
        return self.conv(torch.cat([skipped, self.up(x)], dim=1))


class UNet(nn.Module):
    """Four levels."""

    def __init__(self) -> None:
        super().__init__()
        self.inc = DoubleConv(3, WIDTHS[0])
        pairs = list(pairwise(WIDTHS))
        self.down = nn.ModuleList(nn.Sequential(nn.MaxPool2d(2), DoubleConv(a, b)) for a, b in pairs)
        self.up = nn.ModuleList(Up(b, a) for a, b in reversed(pairs))
        self.outc = nn.Conv2d(WIDTHS[0], CLASSES, 1)

    def forward(self, x: Tensor) -> Tensor:
        levels = [self.inc(x)]
        for down in self.down:
            levels.append(down(levels[-1]))
        x = levels.pop()
        for up in self.up:
            x = up(x, levels.pop())
        return self.outc(x)


def torch_model() -> nn.Module:
    return UNet()


def keras_model() -> Any:
    """Functional."""
    import keras
    from keras import layers

    def double(x: Any, planes: int) -> Any:
        for _ in range(2):
            x = layers.Conv2D(planes, 3, padding="same", use_bias=False)(x)
            x = layers.ReLU()(layers.BatchNormalization(momentum=0.9, epsilon=1e-5)(x))
        return x

    inputs = keras.Input(IMAGE)
    x, levels = inputs, []
    for width in WIDTHS[:-1]:
        x = double(x, width)
        levels.append(x)
        x = layers.MaxPooling2D()(x)
    x = double(x, WIDTHS[-1])
    for width in reversed(WIDTHS[:-1]):
        x = layers.Conv2DTranspose(width, 2, 2)(x)
        x = double(layers.Concatenate()([levels.pop(), x]), width)
    return keras.Model(inputs, layers.Conv2D(CLASSES, 1)(x))
