"""What a run of a live PyTorch model tells: which parameters are applied to what others made.

The operations are those below autograd (`TorchDispatchMode`), so that functions, operators and modules are
followed alike. Tensors are known by their memory: a view is made of what its base is made of.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

from ckptconv.adapters.attention import Factor
from ckptconv.adapters.flow import CONSTANT, INPUT, Origin, Run

if TYPE_CHECKING:
    import torch

Inputs: TypeAlias = "torch.Tensor | tuple[object, ...] | Mapping[str, object]"
_RESHAPES = frozenset(
    f"aten::{name}" for name in ("view", "_unsafe_view", "reshape", "_reshape_alias", "squeeze", "unsqueeze")
)
_PRODUCTS = {"aten::mm": 0, "aten::addmm": 1, "aten::bmm": 0, "aten::baddbmm": 1}
"""Operation -> which of its tensors is the first factor; the second is the next."""
_SPLITS = frozenset({"aten::split", "aten::split_with_sizes"})
_SOFTMAX = frozenset({"aten::_softmax", "aten::_safe_softmax"})
_ATTENTION = "aten::_scaled_dot_product"
"""What the operations begin with that take query, key and value."""


def run_of(model: torch.nn.Module, inputs: Inputs, names: Collection[str]) -> Run:
    """One run of the model in evaluation mode, without gradients.

    `inputs`: its first argument; all of them, as a tuple; or those that have names, as a dictionary.
    `names`: parameters and buffers of the document.
    """
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    run = Run()
    origins: dict[int, Origin] = {}
    alive: list[torch.Tensor] = []

    def place(tensor: torch.Tensor) -> int:
        return tensor.untyped_storage().data_ptr()

    def note(tensor: torch.Tensor, origin: Origin) -> None:
        alive.append(tensor)  # what it is known by is its own as long as it lives
        if tensor.numel():
            origins[place(tensor)] = origin

    class Follow(TorchDispatchMode):  # type: ignore[no-untyped-call]
        def __torch_dispatch__(
            self,
            func: torch._ops.OpOverload,
            types: object,
            args: tuple[Any, ...] = (),
            kwargs: Mapping[str, object] | None = None,
        ) -> object:
            given = list(_tensors((args, kwargs or {})))
            known = [origins.get(place(tensor), CONSTANT) for tensor in given]
            taken = [_Taken(id(t), tuple(t.shape), o.given) for t, o in zip(given, known, strict=True)]
            result = func(*args, **(kwargs or {}))
            origin = run.through(known, map(id, given))
            for tensor in _tensors(result):
                note(tensor, origin)
                _follow(run, func._schema.name, args, taken, tensor)
            if func._schema.name in _SPLITS:
                _split(run, args, given[0], list(_tensors(result)))
            return result

    for name, tensor in (
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    ):
        if name in names and place(tensor) not in origins:
            note(tensor, Origin(frozenset({name})))
    for tensor in _tensors(inputs):
        note(tensor, INPUT)
    with evaluating(model), torch.no_grad(), Follow():  # type: ignore[no-untyped-call]
        if isinstance(inputs, Mapping):
            model(**inputs)
        elif isinstance(inputs, tuple):
            model(*inputs)
        else:
            model(inputs)
    return run


class _Taken(NamedTuple):
    """A tensor that an operation takes, as it is before one in place."""

    key: int
    shape: tuple[int, ...]
    given: frozenset[str] | None

    @property
    def factor(self) -> Factor | None:
        """As one of a product, where it depends on the input."""
        return None if self.given is None else Factor(self.key, self.given)


def _split(run: Run, args: tuple[Any, ...], tensor: torch.Tensor, made: list[torch.Tensor]) -> None:
    """Equal parts of a last axis."""
    axis = args[2] if len(args) > 2 else 0
    if axis % tensor.ndim == tensor.ndim - 1 and len({part.shape for part in made}) == 1:
        run.attention.split(id(tensor), [id(part) for part in made])


def _follow(run: Run, operation: str, args: tuple[Any, ...], taken: list[_Taken], made: torch.Tensor) -> None:
    """What an operation does to the axes of images, and to the scores of an attention."""
    shape, rank = tuple(made.shape), made.ndim
    if operation == "aten::convolution":
        run.images.convolved(id(made), rank, channels_last=False)
    elif operation.startswith(_ATTENTION):
        factors = [factor for one in taken[:3] if (factor := one.factor) is not None]
        if len(factors) == 3:
            run.attention.attended(*factors)
    elif operation in _PRODUCTS:
        one, other = (each.factor for each in taken[_PRODUCTS[operation] :][:2])
        if one is not None and other is not None:
            run.attention.multiplied((one, other), id(made), [*(None for _ in shape[:-2]), 0, 1])
    elif operation in _SOFTMAX:
        run.attention.normalized(taken[0].key, id(made), args[1])
    for follower in run.followers:
        if operation == "aten::permute":
            follower.permuted(taken[0].key, id(made), [axis % rank for axis in args[1]])
        elif operation == "aten::transpose":
            order = list(range(rank))
            order[args[1]], order[args[2]] = order[args[2]], order[args[1]]
            follower.permuted(taken[0].key, id(made), order)
        elif operation in _RESHAPES:
            follower.reshaped(taken[0].key, id(made), taken[0].shape, shape)
        elif operation != "aten::convolution" and operation not in _PRODUCTS:
            follower.passed(((one.key, one.shape) for one in taken), id(made), shape)


def _tensors(value: object) -> Iterator[torch.Tensor]:
    import torch

    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from _tensors(part)
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from _tensors(part)


@contextlib.contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """The model in evaluation mode, each module as it was afterwards; without attention's fused path."""
    import torch

    modes = {module: module.training for module in model.modules()}
    fused = torch.backends.mha.get_fastpath_enabled()
    try:
        model.eval()
        torch.backends.mha.set_fastpath_enabled(False)
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
        for module, mode in modes.items():
            module.training = mode
