"""A universal checkpoint: a directory for each parameter, which any number of ranks can take a part of.

    zero/<parameter>/{fp32,exp_avg,exp_avg_sq}.pt   {"param": tensor, "cat_dim": 0, ..}; ZeRO 3: a flat tensor
    zero/<parameter>/step.pt                        the step; of ZeRO 3 it stands in the next file alone
    zero/optimizer_state.pt                         the settings of the groups, the loss scaler

`param_shapes` of the model file has the shapes, and the parameters of each group in its order. What is not
trained may be there as well (`--inject_missing_state`): copies in float32 of the model's arrays. Of ZeRO 3
the last file has the vectors of the first rank as well, which no one reads.
Source: deepspeed 0.19 `checkpoint/ds_to_universal.py`, `checkpoint/universal_checkpoint.py`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from ckptconv.dialects.deepspeed_files import COMMON, Files
from ckptconv.dialects.deepspeed_parts import Found, Shapes, damaged, tensor_at
from ckptconv.dialects.deepspeed_places import FP32, MODULE, STATE, place
from ckptconv.dialects.deepspeed_settings import (
    BASES,
    STEP,
    Base,
    entry_of,
    is_decoupled,
    join_settings,
    numbers_of,
)
from ckptconv.dialects.torch_values import tensor_of
from ckptconv.ops import Cast, Reshape
from ckptconv.rawtree import DictNode, Node, Path


def take_universal(folder: DictNode, files: Files, groups: Sequence[Shapes], config: Node) -> Found:
    """The optimizer of a universal checkpoint.

    I/O: reads 0-d numbers. Raises: missing-file, corrupt-file.
    """
    found = Found(entries={name: [] for shapes in groups for name in shapes})
    for index, (name, shape) in enumerate((n, s) for shapes in groups for n, s in shapes.items()):
        kept = files.universal.get(name, {})
        if FP32 not in kept:
            raise damaged("missing-file", (f"zero/{name}/{FP32}.pt",), f"nothing is there of '{name}'")
        for key, file in kept.items():
            node = folder.get(file)
            path: Path = (file,)
            if isinstance(node, DictNode):
                node, path = node.get("param"), (file, "param")
            if key == STEP:
                found.entries[name].append((key, found.once([(path, node)], (*STATE, index, key))))
                continue
            tensor, where = tensor_at(node, path)
            if tensor.shape not in (shape, (math.prod(shape),)):
                message = f"'{name}' has shape {list(shape)}, here {list(tensor.shape)}"
                raise damaged("corrupt-file", where, message)
            is_flat = tensor.shape != shape
            found.moved[where] = place("slot", key, index, tensor.dtype.name, is_flat)
            made = tensor.apply(Reshape(tensor.shape, shape)) if is_flat else tensor
            if key == FP32:
                found.weights[name] = made
            else:
                found.entries[name].append((key, made))
    _take_common(found, folder.get(COMMON), groups, is_decoupled(config))
    return found


def _take_common(found: Found, common: Node, groups: Sequence[Shapes], decoupled: bool | None) -> None:
    """Settings of a universal checkpoint, and the steps that stand there alone (ZeRO 3)."""
    if not isinstance(common, DictNode):
        raise damaged("missing-file", (COMMON,), "the optimizer's settings are not there")
    bases: list[Base] = [((COMMON,), common)] if "param_groups" in common else []
    bases += [((COMMON, key), common.get(key)) for key in BASES if isinstance(common.get(key), DictNode)]
    if not bases:
        raise damaged("corrupt-file", (COMMON,), "the settings of the optimizer are not there")
    numbers = numbers_of(bases[0], len(groups))
    first = 0
    for number, shapes in zip(numbers, groups, strict=True):
        entry = next((entry for base in bases if (entry := entry_of(base, number)) is not None), None)
        told = any(key == STEP for name in shapes for key, _ in found.entries[name])
        if entry is not None and STEP in entry[1] and not told:
            node = found.once([((*entry[0], STEP), entry[1].get(STEP))], (*STATE, first, STEP))
            for name in shapes:
                found.entries[name].insert(0, (STEP, node))
        first += len(shapes)
    join_settings(found, bases, numbers, groups, decoupled)


def place_copies(found: Found, folder: DictNode, files: Files, module: DictNode) -> None:
    """What a universal checkpoint has of the model's other arrays: copies in float32."""
    for name, kept in files.universal.items():
        file, own = kept.get(FP32), tensor_of(module.get(name))
        node = folder.get(file) if file is not None else None
        copy = tensor_of(node.get("param")) if isinstance(node, DictNode) else None
        if name in found.entries or file is None or copy is None or own is None:
            continue
        if copy[0].shape == own[0].shape and Cast(copy[0].dtype.name).is_exact(own[0].dtype):
            where = (file, "param", *copy[1])
            found.moved[where] = place("cast", copy[0].dtype.name, MODULE, name)
