"""What stands in the files of a DeepSpeed folder where a value was gathered from: descriptions of places.

The gathered dictionary holds each parameter, moment, counter and setting once. The folder's own tree stands
in it under `FILES`, with an `Opaque` of one of these kinds in every place that a gathered value fills:

| kind | args | what it becomes |
|---|---|---|
| `at` | path | the gathered value |
| `count` | path | the gathered count as a plain number |
| `cast` | dtype, path | the gathered tensor in that dtype |
| `slot` | key, index, dtype, whether it is flat | what a parameter has under the key |
| `bare` | | the optimizer without the masters |
| `own` | tensor, path | the rank's own tensor, or the gathered one where another run is written |
| `none` | dtype | the tensor of no elements that ZeRO 3 leaves for a parameter |
| `vector` | key, group, rank, begin, length, dtype, padding | a rank's vector of a group of parameters |
| `part` | name, rank, ranks, dtype, padding | a rank's part of one parameter |
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Final

import numpy as np

from ckptconv import dtypes
from ckptconv.dialects.deepspeed_layout import Cut, vector_of
from ckptconv.dialects.torch_values import count_of, dotted, number_of, tensor_of
from ckptconv.errors import LossError, MappingError
from ckptconv.ops import Cast, Reshape
from ckptconv.rawtree import DictNode, ListNode, Node, Opaque, Path, at, transform
from ckptconv.tensor import StoredTensor, TensorRef

FILES: Final = "deepspeed.files"
GROUPS: Final = "deepspeed.groups"
SCALER: Final = "deepspeed.scaler"
"""Keys of the gathered dictionary that no file has."""
FP32: Final = "fp32"
"""Key of a group's vector of float32 weights: the masters, or the weights where there is no copy of them."""
MASTER: Final = "master"
MODULE: Final = "module"
STATE: Path = ("optimizer", "state")
HYPER: Path = ("optimizer", "param_groups")

_KIND = "deepspeed."
_HINT = "Pass a folder of the same model, optimizer and stage as template, saved after one update."


def place(kind: str, *args: Node) -> Opaque:
    """The description of a place."""
    return Opaque(kind=_KIND + kind, args=args)


def is_emptied(node: Node) -> bool:
    """Whether a place is of a parameter that ZeRO 3 left no elements of."""
    return isinstance(node, Opaque) and node.kind == f"{_KIND}none"


def group_node(cut: Cut) -> DictNode:
    """How a group is cut, as the gathered dictionary keeps it."""
    return DictNode(
        items=(
            ("count", len(cut.numels)),
            ("ranks", cut.ranks),
            ("by_param", cut.by_param),
            ("paddings", ListNode(items=cut.paddings)),
        )
    )


def scattered(gathered: DictNode, *, carried: bool) -> DictNode:
    """The folder's tree, every place filled from the gathered dictionary; `carried`: with another run's.

    Raises: template-mismatch, slots-missing, unequal-steps, precision-loss.
    """
    files = gathered.get(FILES)
    filling = _Filling(gathered, carried)

    def put(path: Path, node: Node) -> Node:
        if not isinstance(node, Opaque) or not node.kind.startswith(_KIND):
            return node
        make: Callable[[tuple[Node, ...], Path], Node] = getattr(filling, node.kind.removeprefix(_KIND))
        return make(node.args, path)

    filled = transform(files, put)
    assert isinstance(filled, DictNode)
    return filled


@dataclass(frozen=True)
class _Filling:
    """The gathered dictionary, by what places ask of it; a method for each kind."""

    gathered: DictNode
    carried: bool
    checked: dict[Path, Node] = field(default_factory=dict)
    """Numbers of a group that are the same for all its parameters."""

    def at(self, args: tuple[Node, ...], where: Path) -> Node:
        return self._value(_path(args), where)

    def count(self, args: tuple[Node, ...], where: Path) -> Node:
        number = count_of(self._value(_path(args), where))
        if number is None:
            raise _mismatch(where, f"'{dotted(_path(args))}' is no count")
        return number[0]

    def cast(self, args: tuple[Node, ...], where: Path) -> Node:
        return _in_dtype(self._tensor(_path(args[1:]), where), str(args[0]), where)

    def own(self, args: tuple[Node, ...], where: Path) -> Node:
        return self._tensor(_path(args[1:]), where) if self.carried else args[0]

    def none(self, args: tuple[Node, ...], where: Path) -> Node:
        return StoredTensor.of_array(np.empty((0,), dtypes.BY_NAME[str(args[0])].numpy))

    def vector(self, args: tuple[Node, ...], where: Path) -> Node:
        key, group, rank, begin, length, dtype, padding = args
        assert isinstance(group, int)
        assert isinstance(rank, int)
        assert isinstance(begin, int)
        assert isinstance(length, int)
        first, cut = self._groups[group]
        needed = {span.param for span in cut.spans(rank, begin, length)}
        params = {p: self._of(str(key), first + p, str(dtype), cut.numels[p], where) for p in needed}
        return vector_of(cut, rank, begin, length, params, _padding(padding, str(dtype)))

    def slot(self, args: tuple[Node, ...], where: Path) -> Node:
        key, index, dtype, is_flat = args
        assert isinstance(index, int)
        tensor = self._of(str(key), index, str(dtype), None, where)
        return tensor.apply(Reshape(tensor.shape, (tensor.spec.numel,))) if is_flat is True else tensor

    def bare(self, args: tuple[Node, ...], where: Path) -> Node:
        def without(path: Path, node: Node) -> Node:
            if len(path) == 2 and path[0] == STATE[-1] and isinstance(node, DictNode):
                return replace(node, items=tuple((k, v) for k, v in node.items if k != MASTER))
            return node

        return transform(self.gathered.get(STATE[0]), without)

    def part(self, args: tuple[Node, ...], where: Path) -> Node:
        name, rank, ranks, dtype, padding = args
        assert isinstance(rank, int)
        assert isinstance(ranks, int)
        tensor = _in_dtype(self._tensor((MODULE, str(name)), where), str(dtype), where)
        cut = Cut(numels=(tensor.spec.numel,), ranks=ranks, by_param=True)
        length = cut.length // ranks
        return vector_of(cut, rank, rank * length, length, {0: tensor}, _padding(padding, str(dtype)))

    def _of(self, key: str, index: int, dtype: str, numel: int | None, where: Path) -> TensorRef:
        """A parameter's tensor under the key of its vector."""
        entry = self._state.get(index)
        name = self._names[index] if index < len(self._names) else f"#{index}"
        node = entry.get(MASTER if key == FP32 else key) if isinstance(entry, DictNode) else None
        if node is None and key == FP32:
            node = self._value((MODULE, name), where)
        found = tensor_of(node)
        if found is None:
            raise MappingError.of(
                "slots-missing",
                f"'{name}' has no {key} for the vector at '{dotted(where)}'",
                _HINT,
                loc=where,
            )
        if numel is not None and found[0].spec.numel != numel:
            raise _mismatch(where, f"{key} of '{name}' has {found[0].spec.numel} elements, expected {numel}")
        return _in_dtype(found[0], dtype, where)

    def _value(self, path: Path, where: Path) -> Node:
        try:
            if path[0] == MODULE:
                return at(self._module[path[1]], path[2:]) if len(path) > 1 else self.gathered.get(MODULE)
            if path[:2] != STATE:
                return at(self.gathered, path)
            if path not in self.checked:
                node = at(self._state[path[2]], path[3:])
                self._refuse_differing(path, node, where)
                self.checked[path] = node
            return self.checked[path]
        except KeyError:
            raise _mismatch(where, f"the document has nothing for '{dotted(path)}'") from None

    def _refuse_differing(self, path: Path, node: Node, where: Path) -> None:
        """A number that stands once for a group must be the same for all its parameters."""
        index, mine = path[2], number_of(node)
        for first, cut in self._groups:
            if first != index or mine is None:
                continue
            for other in range(first, first + len(cut.numels)):
                entry = self._state.get(other)
                theirs = number_of(entry.get(path[3])) if isinstance(entry, DictNode) else None
                if theirs is not None and theirs[0] != mine[0]:
                    raise MappingError.of(
                        "unequal-steps",
                        f"'{self._names[other]}' has {path[3]} {theirs[0]}, '{self._names[first]}' has "
                        f"{mine[0]}: DeepSpeed keeps one for all parameters of a group",
                        "Write to a target that counts per parameter.",
                        loc=where,
                    )

    def _tensor(self, path: Path, where: Path) -> TensorRef:
        found = tensor_of(self._value(path, where))
        if found is None:
            raise _mismatch(where, f"'{dotted(path)}' is no tensor")
        return found[0]

    @cached_property
    def _module(self) -> Mapping[Node, Node]:
        module = self.gathered.get(MODULE)
        return dict(module.items) if isinstance(module, DictNode) else {}

    @cached_property
    def _state(self) -> Mapping[Node, Node]:
        state = at(self.gathered, STATE)
        return dict(state.items) if isinstance(state, DictNode) else {}

    @cached_property
    def _names(self) -> list[str]:
        groups = at(self.gathered, HYPER)
        listed = (
            [g.get("param_names") for g in groups.items if isinstance(g, DictNode)]
            if isinstance(groups, ListNode)
            else []
        )
        return [str(name) for names in listed if isinstance(names, ListNode) for name in names.items]

    @cached_property
    def _groups(self) -> list[tuple[int, Cut]]:
        """The first parameter of each group, and how it is cut."""
        listed = self.gathered.get(GROUPS)
        found: list[tuple[int, Cut]] = []
        first = 0
        for node in listed.items if isinstance(listed, ListNode) else ():
            assert isinstance(node, DictNode)
            count, ranks, paddings = node.get("count"), node.get("ranks"), node.get("paddings")
            assert isinstance(count, int)
            assert isinstance(ranks, int)
            assert isinstance(paddings, ListNode)
            shapes = [self._shape(name) for name in self._names[first : first + count]]
            cut = Cut(
                numels=tuple(math.prod(shape) for shape in shapes),
                paddings=tuple(p for p in paddings.items if isinstance(p, int)),
                ranks=ranks,
                by_param=node.get("by_param") is True,
            )
            found.append((first, cut))
            first += count
        return found

    def _shape(self, name: str) -> tuple[int, ...]:
        return self._tensor((MODULE, name), (MODULE, name)).shape


def _path(args: tuple[Node, ...]) -> Path:
    return tuple(step for step in args if isinstance(step, (str, int)))


def _padding(node: Node, dtype: str) -> TensorRef:
    if isinstance(node, TensorRef):
        return node
    return StoredTensor.of_array(np.empty((0,), dtypes.BY_NAME[dtype].numpy))


def _in_dtype(tensor: TensorRef, dtype: str, where: Path) -> TensorRef:
    """The tensor in the dtype of its place, which must hold every value."""
    if tensor.dtype.name == dtype:
        return tensor
    cast = Cast(dtype)
    if not cast.is_exact(tensor.dtype):
        raise LossError.of(
            "precision-loss",
            f"'{dotted(where)}' is {dtype}, which does not hold every {tensor.dtype.name}",
            "Use a template in the run's precision.",
            loc=where,
        )
    return tensor.apply(cast)


def _mismatch(where: Path, message: str) -> MappingError:
    error = MappingError.of(
        "template-mismatch", f"{message}, which '{dotted(where)}' needs", _HINT, loc=where
    )
    assert isinstance(error, MappingError)
    return error
