"""`torch.amp.GradScaler.state_dict()`: what it holds beside the scale.

    {"scale": 65536.0, "growth_factor": 2.0, "backoff_factor": 0.5, "growth_interval": 2000,
     "_growth_tracker": 17}

`_growth_tracker` counts the updates since the scale last changed; it is no count of steps. The state of a
disabled scaler is `{}`. Source: torch 2.13 `torch/amp/grad_scaler.py`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from ckptconv.catalog.wrappers import SCALE, loss_scaling, wrappers
from ckptconv.dialects.residue import Lifter
from ckptconv.dialects.torch_values import dotted, number_of
from ckptconv.document import Fact, Known
from ckptconv.rawtree import DictNode, Node, Path


def lift_scaling(found: Iterable[tuple[Path, Node]], lifter: Lifter) -> Mapping[str, Fact]:
    """The counter and the settings of the first of these that is a scaler's state, by canonical name.

    I/O: reads 0-d numbers.
    """
    table = wrappers("torch")
    keys = table.scaler.keys if table is not None else {}
    for path, node in found:
        if not isinstance(node, DictNode) or keys[SCALE] not in node:
            continue
        facts: dict[str, Fact] = {}
        for name in loss_scaling():
            number = number_of(node.get(keys[name]))
            if number is not None and not isinstance(number[0], bool) and number[0] >= 0:
                lifter.take((*path, keys[name]), ("loss_scaling", name), **number[1])
                facts[name] = Known(value=number[0], source=dotted((*path, keys[name])))
        return facts
    return {}
