"""Recurrent modules trained as Keras trains them: with one bias where torch has two."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ckptconv.adapters.torch_rules import torch_module

if TYPE_CHECKING:
    import torch


def freeze_recurrent_bias(model: torch.nn.Module) -> torch.nn.Module:
    """Let the first bias of every LSTM and RNN hold the sum of both, and the second be 0 and stay it.

    The outputs are the same. Call it before the optimizer is made: torch trains both biases, whose sum then
    moves twice as fast as the one bias of Keras. Returns the model, changed in place.
    """
    torch = torch_module()
    nn = torch.nn
    for module in model.modules():
        if not isinstance(module, (nn.LSTM, nn.RNN, nn.LSTMCell, nn.RNNCell)):
            continue
        for name, second in module.named_parameters(recurse=False):
            if name.startswith("bias_hh"):
                with torch.no_grad():
                    getattr(module, name.replace("_hh", "_ih")).add_(second)
                    second.zero_()
                second.requires_grad_(False)
    return model
