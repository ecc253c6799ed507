"""What layer a TF1 variable belongs to: its name's last part and shape, and the scope's default name.

`tf.layers` and Keras call variables `kernel`, `bias`, `embeddings`, `gamma`; contrib.layers and slim
`weights`, `biases`. A kernel with two axes may be a recurrent cell's as well, whose gates stand in an order
of their own: it is a dense layer's by name only where the scope has such a layer's default name, elsewhere
that is *assumed*; within a cell's scope nothing is said.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace

from ckptconv.dialects.keras_layers import Reading, read_layer
from ckptconv.dialects.tf1_names import numbered, parents
from ckptconv.document import Layout
from ckptconv.tensor import TensorRef

_COLUMN = "tf_keras"
_EDGES = {"weights": "kernel", "biases": "bias", "depthwise_weights": "depthwise_kernel"}
"""Names of contrib.layers and slim -> those of the layer catalog."""
_SCOPES = {
    "dense": "dense",
    "fully_connected": "dense",
    "logits": "dense",
    "conv1d": "conv1d",
    "conv2d": "conv2d",
    "conv3d": "conv3d",
    "Conv": "conv2d",
    "conv2d_transpose": "conv_transpose2d",
    "Conv2d_transpose": "conv_transpose2d",
}
"""Default name of a layer's scope -> its kind."""
_CELL = re.compile(r"(^|/)([^/]*cell(_\d+)?|gates|candidate|rnn|bidirectional_rnn)(/|$)")


def readings(params: Mapping[str, TensorRef]) -> dict[str, Reading]:
    """The reading of each variable, by its name."""
    result: dict[str, Reading] = {}
    for scope, members in parents(params):
        prefix = f"{scope}/" if scope else ""
        if _CELL.search(scope):
            result.update((prefix + leaf, Reading()) for leaf in members)
            continue
        shapes = {_EDGES.get(leaf, leaf): tensor.shape for leaf, tensor in members.items()}
        read = read_layer(_COLUMN, shapes)
        kind = _SCOPES.get(numbered(scope.rpartition("/")[2])[0])
        for leaf in members:
            result[prefix + leaf] = _settled(read[_EDGES.get(leaf, leaf)], kind)
    return result


def _settled(reading: Reading, kind: str | None) -> Reading:
    """The reading that the scope's name decides, or the only one marked as assumed."""
    chosen = [option for option in reading.candidates if option.layer == kind]
    if len(chosen) == 1:
        (option,) = chosen
        return Reading(layer=option.layer, role=option.role, axes=option.axes, evidence="named")
    if reading.evidence == "named" and reading.layer in _SCOPES.values() and reading.layer != kind:
        assert reading.axes is not None
        option = Layout(layer=reading.layer, role=reading.role, axes=reading.axes)
        return replace(reading, evidence="assumed", candidates=(option,))
    return reading
