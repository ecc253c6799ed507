"""The model of a DeepSpeed run: the first rank's file, and what stands in those of all ranks alone.

ZeRO 3 leaves of each parameter a tensor of no elements in `module`. Those that are trained are made of the
optimizer's vectors; those that are not, of each rank's `frozen_param_fragments`. ZeRO 2 has these whole:
copies. `shared_params` tells which names are one parameter.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from ckptconv.dialects.deepspeed_layout import Cut, joined, padding_of
from ckptconv.dialects.deepspeed_parts import Found, Located, Shape, Shapes, damaged
from ckptconv.dialects.deepspeed_places import MASTER, MODULE, place
from ckptconv.dialects.torch_values import tensor_of
from ckptconv.rawtree import DictNode, ListNode, Node, Path
from ckptconv.tensor import TensorRef

FRAGMENTS = "frozen_param_fragments"


@dataclass(frozen=True, slots=True)
class Model:
    """The model of the first rank, with what its own file does not hold."""

    models: Sequence[Located]

    found: Found
    groups: Sequence[Shapes]

    def module(self) -> DictNode:
        """The model's dictionary; what it gathers stands among its entries' state as well."""
        path, states = self.models[0]
        module, aliases = states.get(MODULE), states.get("shared_params")
        assert isinstance(module, DictNode)
        targets = dict(aliases.items) if isinstance(aliases, DictNode) else {}
        trained = {name: shape for shapes in self.groups for name, shape in shapes.items()}
        untrained = shapes_of(states, "frozen_param_shapes", path)
        frozen = {name: shape for shapes in untrained for name, shape in shapes.items()}
        made: dict[Node, Node] = {}
        emptied: dict[str, str] = {}
        for name, value in module.items:
            tensor = tensor_of(value)
            made[name] = value
            if tensor is None or not isinstance(name, str):
                continue
            target = targets.get(name, name)
            target = name if target not in {**trained, **frozen} else str(target)
            shape = trained.get(target, frozen.get(target, tensor[0].shape))
            if tensor[0].shape == shape:
                continue
            if tensor[0].spec.numel:
                message = f"it has shape {list(tensor[0].shape)}, {list(shape)} is told of it"
                raise damaged("corrupt-file", (*path, MODULE, name), message)
            emptied[name] = tensor[0].dtype.name
            made[name] = self.found.weights[target] if target in trained else self._frozen(target, shape)
        for name, weight in self.found.weights.items():
            if name in emptied:
                continue
            if name in made:
                self.found.entries[name].append((MASTER, weight))
            else:
                made[name] = weight
        self._place(emptied, made, whole=len(made) == len(module.items))
        self._place_fragments(emptied, made)
        return replace(module, items=tuple(made.items()))

    def _frozen(self, name: str, shape: Shape) -> TensorRef:
        """A parameter that no optimizer trains, of the parts that the ranks have."""
        vectors = []
        for path, states in self.models:
            parts = states.get(FRAGMENTS)
            part = tensor_of(parts.get(name)) if isinstance(parts, DictNode) else None
            if part is None or len(part[0].shape) != 1:
                raise damaged("corrupt-file", (*path, FRAGMENTS, name), "the rank's part is not there")
            vectors.append(part[:2])
        cut = Cut(numels=(math.prod(shape),), ranks=len(vectors), by_param=True)
        tensors = [tensor for tensor, _ in vectors]
        misfit = cut.misfit([tensor.shape[0] for tensor in tensors])
        if misfit or len({tensor.dtype.name for tensor in tensors}) > 1:
            where = (*self.models[0][0], FRAGMENTS, name)
            raise damaged("corrupt-file", where, misfit or "the ranks have parts of different dtypes")
        for rank, (tensor, inside) in enumerate(vectors):
            begin = rank * tensor.shape[0]
            padding = padding_of(cut, rank, begin, tensor)
            args = (name, rank, len(vectors), tensor.dtype.name, padding if padding.spec.numel else None)
            self.found.moved[(*self.models[rank][0], FRAGMENTS, name, *inside)] = place("part", *args)
        return joined(cut, tensors, [shape])[0]

    def _place(self, emptied: Mapping[str, str], made: Mapping[Node, Node], *, whole: bool) -> None:
        moved = self.found.moved
        for rank, (path, states) in enumerate(self.models):
            module = states.get(MODULE)
            if not rank and not emptied and whole:
                moved[(*path, MODULE)] = place("at", MODULE)
                continue
            for name, value in module.items if isinstance(module, DictNode) else ():
                tensor = tensor_of(value)
                if not isinstance(name, str) or tensor is None:
                    continue
                where = (*path, MODULE, name)
                first = tensor_of(made.get(name))
                if name in emptied and not tensor[0].spec.numel:
                    moved[where] = place("none", emptied[name])
                elif not rank:
                    moved[where] = place("at", MODULE, name)
                elif first is not None and first[0].spec == tensor[0].spec:
                    moved[(*where, *tensor[1])] = place("own", tensor[0], MODULE, name)

    def _place_fragments(self, emptied: Mapping[str, str], made: Mapping[Node, Node]) -> None:
        """Parameters that no optimizer trains stand twice where they are not cut."""
        for path, states in self.models:
            fragments = states.get(FRAGMENTS)
            for name, value in fragments.items if isinstance(fragments, DictNode) else ():
                tensor, own = tensor_of(value), tensor_of(made.get(name))
                if not isinstance(name, str) or name in emptied or tensor is None:
                    continue
                if own is None or own[0].spec != tensor[0].spec:
                    raise damaged("corrupt-file", (*path, FRAGMENTS, name), "it is no copy of the model's")
                self.found.moved[(*path, FRAGMENTS, name)] = place("at", MODULE, name)


def shapes_of(states: DictNode, key: str, path: Path) -> list[Shapes]:
    """The dictionaries of names and shapes under a key: a list of them, or one."""
    node = states.get(key)
    listed = node.items if isinstance(node, ListNode) else () if node is None else (node,)
    found: list[Shapes] = []
    for position, item in enumerate(listed):
        if not isinstance(item, DictNode):
            raise damaged("corrupt-file", (*path, key, position), "names and shapes are not there")
        shapes: dict[str, Shape] = {}
        for name, shape in item.items:
            sizes = shape.items if isinstance(shape, ListNode) else (None,)
            plain = tuple(n for n in sizes if isinstance(n, int) and not isinstance(n, bool) and n >= 0)
            if not isinstance(name, str) or len(plain) != len(sizes) or any(name in other for other in found):
                raise damaged("corrupt-file", (*path, key, position), f"{name!r:.80} has no shape of its own")
            shapes[name] = plain
        found.append(shapes)
    return found
