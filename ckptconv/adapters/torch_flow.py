"""What a run of a live PyTorch model tells: which module takes the output of which, and what is flattened.

The operations are those below autograd (`TorchDispatchMode`), so that functions, operators and modules are
followed alike. Tensors are known by their memory: a view is made of what its base is made of.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Mapping
from typing import TYPE_CHECKING, Any, TypeAlias

from ckptconv.adapters.flow import CONSTANT, INPUT, Origin, Run, module_of
from ckptconv.adapters.images import Images
from ckptconv.catalog.compounds import home

if TYPE_CHECKING:
    import torch

Inputs: TypeAlias = "torch.Tensor | tuple[object, ...] | Mapping[str, object]"
_RESHAPES = frozenset({"aten::view", "aten::_unsafe_view", "aten::reshape", "aten::_reshape_alias"})
_PRODUCTS = frozenset({"aten::mm", "aten::addmm", "aten::linear", "aten::matmul", "aten::bmm"})


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
            sized = [(id(tensor), tuple(tensor.shape)) for tensor in given]  # before one in place
            result = func(*args, **(kwargs or {}))
            origin = run.through(known, map(id, given))
            for tensor in _tensors(result):
                note(tensor, origin)
                _image(run.images, func._schema.name, args, sized, tensor)
            return result

    for name, tensor in (
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    ):
        if name in names and place(tensor) not in origins:
            note(tensor, Origin(frozenset({module_of(home("torch", name))})))
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


def _image(
    images: Images,
    operation: str,
    args: tuple[Any, ...],
    given: list[tuple[int, tuple[int, ...]]],
    made: torch.Tensor,
) -> None:
    """What an operation does to the axes of images; `given`: its tensors with their shapes."""
    shape, rank = tuple(made.shape), made.ndim
    if operation == "aten::convolution":
        images.convolved(id(made), rank, channels_last=False)
    elif operation == "aten::permute":
        images.permuted(given[0][0], id(made), [axis % rank for axis in args[1]])
    elif operation == "aten::transpose":
        order = list(range(rank))
        order[args[1]], order[args[2]] = order[args[2]], order[args[1]]
        images.permuted(given[0][0], id(made), order)
    elif operation in _RESHAPES:
        images.reshaped(given[0][0], id(made), given[0][1], shape)
    elif operation not in _PRODUCTS:
        images.passed(given, id(made), shape)


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
