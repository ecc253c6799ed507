"""ResNet-18 and ResNet-50: torchvision's modules; functional Keras, Keras Applications where it has it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

IMAGE = (64, 48, 3)
CLASSES = 10


class BasicBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut."""

    expansion = 1

    def __init__(self, inplanes: int, planes: int, stride: int, bias: bool, eps: float) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inplanes, planes, 3, stride, 1, bias=bias)
        self.bn1 = nn.BatchNorm2d(planes, eps)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(planes, planes, 3, 1, 1, bias=bias)
        self.bn2 = nn.BatchNorm2d(planes, eps)
        self.downsample = shortcut(inplanes, planes, stride, bias, eps)

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += identity
        return self.relu(out)


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 beside a shortcut; the stride in the first, as in Keras Applications and the paper."""

    expansion = 4

    def __init__(self, inplanes: int, planes: int, stride: int, bias: bool, eps: float) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inplanes, planes, 1, stride, bias=bias)
        self.bn1 = nn.BatchNorm2d(planes, eps)
        self.conv2 = nn.Conv2d(planes, planes, 3, 1, 1, bias=bias)
        self.bn2 = nn.BatchNorm2d(planes, eps)
        self.conv3 = nn.Conv2d(planes, planes * 4, 1, bias=bias)
        self.bn3 = nn.BatchNorm2d(planes * 4, eps)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = shortcut(inplanes, planes * 4, stride, bias, eps)

    def forward(self, x: Tensor) -> Tensor:
        identity = x
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return self.relu(out)


def shortcut(inplanes: int, planes: int, stride: int, bias: bool, eps: float) -> nn.Module | None:
    """A 1x1 convolution where the shape changes."""
    if stride == 1 and inplanes == planes:
        return None
    return nn.Sequential(nn.Conv2d(inplanes, planes, 1, stride, bias=bias), nn.BatchNorm2d(planes, eps))


class ResNet(nn.Module):
    """torchvision's, with its biases and epsilon to be chosen."""

    def __init__(self, block: Any, depths: tuple[int, ...], *, bias: bool, eps: float) -> None:
        super().__init__()
        self.inplanes, self.bias, self.eps = 64, bias, eps
        self.conv1 = nn.Conv2d(3, 64, 7, 2, 3, bias=bias)
        self.bn1 = nn.BatchNorm2d(64, eps)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        self.layer1 = self._stage(block, 64, depths[0], 1)
        self.layer2 = self._stage(block, 128, depths[1], 2)
        self.layer3 = self._stage(block, 256, depths[2], 2)
        self.layer4 = self._stage(block, 512, depths[3], 2)
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(512 * block.expansion, CLASSES)

    def _stage(self, block: Any, planes: int, depth: int, stride: int) -> nn.Sequential:
        blocks = []
        for number in range(depth):
            blocks.append(block(self.inplanes, planes, stride if number == 0 else 1, self.bias, self.eps))
            self.inplanes = planes * block.expansion
        return nn.Sequential(*blocks)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(torch.flatten(self.avgpool(x), 1))


def torch_resnet18() -> nn.Module:
    """As `torchvision.models.resnet18`."""
    return ResNet(BasicBlock, (2, 2, 2, 2), bias=False, eps=1e-5)


def torch_resnet50() -> nn.Module:
    """As `torchvision.models.resnet50`, the stride, the biases and the epsilon as in Keras Applications."""
    return ResNet(Bottleneck, (3, 4, 6, 3), bias=True, eps=1.001e-5)


def keras_resnet18() -> Any:
    """Functional Keras, padded as PyTorch pads."""
    import keras
    from keras import layers

    def convolved(x: Any, planes: int, size: int, stride: int, name: str) -> Any:
        if size > 1:
            x = layers.ZeroPadding2D(size // 2)(x)
        x = layers.Conv2D(planes, size, stride, use_bias=False, name=f"{name}_conv")(x)
        return layers.BatchNormalization(momentum=0.9, epsilon=1e-5, name=f"{name}_bn")(x)

    inputs = keras.Input(IMAGE)
    x = layers.ReLU()(convolved(inputs, 64, 7, 2, "stem"))
    x = layers.MaxPooling2D(3, 2)(layers.ZeroPadding2D(1)(x))
    for stage, planes in enumerate((64, 128, 256, 512)):
        for block in range(2):
            name, stride = f"stage{stage}_block{block}", 2 if stage and not block else 1
            entry = x
            x = layers.ReLU()(convolved(x, planes, 3, stride, f"{name}_a"))
            x = convolved(x, planes, 3, 1, f"{name}_b")
            if stride == 2:
                entry = convolved(entry, planes, 1, 2, f"{name}_shortcut")
            x = layers.ReLU()(layers.Add()([x, entry]))
    x = layers.GlobalAveragePooling2D()(x)
    return keras.Model(inputs, layers.Dense(CLASSES, name="logits")(x))


def keras_resnet50() -> Any:
    """`keras.applications.ResNet50`."""
    import keras

    return keras.applications.ResNet50(
        weights=None, input_shape=IMAGE, classes=CLASSES, classifier_activation=None
    )
