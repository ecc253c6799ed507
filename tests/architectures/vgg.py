"""VGG-16 with its Flatten: torchvision's modules and `keras.applications.VGG16`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

IMAGE = (64, 96, 3)
CLASSES = 10
PLAN = (64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512, 0)
"""Channels of each convolution; 0 is a pooling."""


class VGG(nn.Module):
    """torchvision's, for smaller images."""

    def __init__(self) -> None:
        super().__init__()
        features: list[nn.Module] = []
        inplanes = 3
        for planes in PLAN:
            if planes:
                features += [nn.Conv2d(inplanes, planes, 3, padding=1), nn.ReLU(inplace=True)]
                inplanes = planes
            else:
                features.append(nn.MaxPool2d(2, 2))
        self.features = nn.Sequential(*features)
        self.classifier = nn.Sequential(
            nn.Linear(512 * 2 * 3, 4096),
            nn.ReLU(True),
            nn.Linear(4096, 4096),
            nn.ReLU(True),
            nn.Linear(4096, CLASSES),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(torch.flatten(self.features(x), 1))


def torch_model() -> nn.Module:
    """As `torchvision.models.vgg16`."""
    return VGG()


def keras_model() -> Any:
    """`keras.applications.VGG16`."""
    import keras

    return keras.applications.VGG16(
        weights=None, input_shape=IMAGE, classes=CLASSES, classifier_activation=None
    )
