"""The architectures that both frameworks' users write with layers that correspond one to one."""

from __future__ import annotations

from dataclasses import replace

import ckptconv
from tests.architectures import convnext, mobilenet_v2, resnet, seq2seq, tagger, unet, vgg
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

TWO_BIASES = Architecture(
    name="bilstm-tagger",
    torch_model=tagger.Tagger,
    keras_model=tagger.keras_model,
    batch=tagger.batch,
    rate=1e-3,
)
"""As it is written: torch trains two biases, Keras one."""

RECURRENT = (
    replace(TWO_BIASES, prepared=ckptconv.pytorch.freeze_recurrent_bias),
    Architecture(
        name="gru-seq2seq",
        torch_model=seq2seq.Seq2Seq,
        keras_model=seq2seq.keras_model,
        batch=seq2seq.batch,
        rate=1e-3,
        control=5,  # the mean over 6,000 outputs leaves gradients beside which epsilon counts
    ),
)
