"""The architectures that both frameworks' users write with layers that correspond one to one."""

from __future__ import annotations

from tests.architectures import convnext, mobilenet_v2, resnet, unet, vgg
from tests.architectures.both import Architecture, images

CONVOLUTIONAL = (
    Architecture(
        name="resnet18",
        torch_model=resnet.torch_resnet18,
        keras_model=resnet.keras_resnet18,
        batch=images(*resnet.IMAGE),
    ),
    Architecture(
        name="resnet50",
        torch_model=resnet.torch_resnet50,
        keras_model=resnet.keras_resnet50,
        batch=images(*resnet.IMAGE),
        drift=3e-3,
        control=5,
    ),
    *(
        Architecture(
            name=module.__name__.rpartition(".")[2],
            torch_model=module.torch_model,
            keras_model=module.keras_model,
            batch=images(*module.IMAGE),
        )
        for module in (mobilenet_v2, vgg, unet, convnext)
    ),
)
