"""The architectures, at full size; those of transformers at a small one, too."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import ckptconv
from tests.architectures import (
    convnext,
    encoder,
    gpt2,
    mobilenet_v2,
    resnet,
    seq2seq,
    tagger,
    unet,
    vgg,
    vit,
)
from tests.architectures.both import Architecture, Array, images, tokens

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
    ),
)


def _sized(
    name: str, torch_model: Any, keras_model: Any, size: Any, batch: Callable[..., Array]
) -> Architecture:
    return Architecture(
        name=name, torch_model=partial(torch_model, size), keras_model=partial(keras_model, size), batch=batch
    )


def _transformers(encoders: encoder.Size, gpt: gpt2.Size, images_of: vit.Size) -> tuple[Architecture, ...]:
    sentences = tokens(encoders.vocabulary, encoders.length)
    pixels = images(images_of.image, images_of.image, 3)
    return (
        _sized("fused-encoder", encoder.FusedEncoder, encoder.keras_fused, encoders, sentences),
        _sized("split-encoder", encoder.SplitEncoder, encoder.keras_split, encoders, sentences),
        _sized("vit", vit.torch_model, vit.keras_model, images_of, pixels),
        _sized("gpt2", gpt2.torch_model, gpt2.keras_model, gpt, tokens(gpt.vocabulary, gpt.length)),
    )


ENCODERS = _transformers(encoder.BASE, gpt2.BASE, vit.BASE)[:2]
LARGE = tuple(replace(a, drift=1e-5) for a in _transformers(encoder.BASE, gpt2.BASE, vit.BASE)[2:])
SMALL_TRANSFORMERS = _transformers(encoder.SMALL, gpt2.SMALL, vit.SMALL)
