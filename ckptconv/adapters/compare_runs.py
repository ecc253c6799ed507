"""What matched layers give out in one run of a live model: every call of each, in order.

PyTorch's modules are seen through forward hooks. Keras calls a layer's `call`, which is replaced on the
object while the model runs. Both models run in evaluation mode and are afterwards as they were.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ckptconv.adapters.torch_flow import evaluating
from ckptconv.errors import CkptError

if TYPE_CHECKING:
    import torch

Output = npt.NDArray[Any]
Inputs = Any
"""An array, a sequence of arrays, or a dictionary of them."""


class Outputs:
    """The first array of each call of a layer, and the order in which layers ran."""

    def __init__(self) -> None:
        self.calls: dict[str, list[Output]] = {}
        self.last: dict[str, int] = {}
        """Layer -> when it last ended."""
        self.whole: list[Output] = []
        """Those of the model itself."""
        self._count = 0

    def note(self, name: str, found: Sequence[Output]) -> None:
        """A layer has run."""
        self._count += 1
        self.last[name] = self._count
        if found:
            self.calls.setdefault(name, []).append(found[0])


def run_torch(model: torch.nn.Module, inputs: Inputs, modules: Mapping[str, torch.nn.Module]) -> Outputs:
    """One run without gradients. Raises: usage where the model does not take the inputs."""
    import torch

    outputs = Outputs()

    def hook(name: str) -> Callable[..., None]:
        return lambda module, args, out: outputs.note(name, list(map(_of_torch, _flat(out))))

    handles = [module.register_forward_hook(hook(name)) for name, module in modules.items()]
    try:
        with evaluating(model), torch.no_grad(), running("torch"):
            result = called(model, inputs)
    finally:
        for handle in handles:
            handle.remove()
    outputs.whole = list(map(_of_torch, _flat(result)))
    return outputs


def called(model: Callable[..., object], inputs: Inputs) -> object:
    """The model's result: of several inputs, of those with names, or of one."""
    if isinstance(inputs, Mapping):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, tuple) else model(inputs)


def takers(
    model: torch.nn.Module, inputs: Inputs, telling: Iterable[torch.nn.Module]
) -> dict[int, torch.nn.Module]:
    """Identity of an input -> the first of these modules that takes it."""
    import torch

    wanted = {id(tensor) for tensor in _flat(inputs)}
    found: dict[int, torch.nn.Module] = {}

    def hook(module: torch.nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
        for tensor in _flat((args, kwargs)):
            if id(tensor) in wanted:
                found.setdefault(id(tensor), module)

    handles = [module.register_forward_pre_hook(hook, with_kwargs=True) for module in telling]
    try:
        with evaluating(model), torch.no_grad(), running("torch"):
            called(model, inputs)
    finally:
        for handle in handles:
            handle.remove()
    return found


def run_keras(model: Callable[..., object], inputs: Inputs, layers: Mapping[str, object]) -> Outputs:
    """One run. Raises: usage where the model does not take the inputs."""
    outputs = Outputs()
    with contextlib.ExitStack() as stack:
        for name, layer in layers.items():
            stack.enter_context(_watched(name, layer, outputs))
        with running("Keras"):
            given = list(inputs) if isinstance(inputs, tuple) else inputs
            result = model(given, training=False)
    outputs.whole = list(map(np.asarray, _flat(result)))
    return outputs


@contextlib.contextmanager
def _watched(name: str, layer: object, outputs: Outputs) -> Iterator[None]:
    call = layer.call  # type: ignore[attr-defined]  # of every layer
    own = "call" in vars(layer)

    def watched(*args: object, **kwargs: object) -> object:
        result = call(*args, **kwargs)
        outputs.note(name, list(map(np.asarray, _flat(result))))
        return result

    object.__setattr__(layer, "call", watched)  # past Keras' own, which tracks what it is given
    try:
        yield
    finally:
        if own:
            object.__setattr__(layer, "call", call)
        else:
            object.__delattr__(layer, "call")


@contextlib.contextmanager
def running(framework: str) -> Iterator[None]:
    """What a model raises, as our error. Raises: usage."""
    try:
        yield
    except CkptError:
        raise
    except Exception as error:  # whatever a model raises
        raise CkptError.of(
            "usage",
            f"the {framework} model does not run on these inputs: {type(error).__name__}: {str(error)[:500]}",
            "Give a batch in torch's order of axes and of the models' types; axes= names Keras' order.",
            loc=("inputs",),
        ) from error


def _of_torch(tensor: torch.Tensor) -> Output:
    tensor = tensor.detach().cpu()
    array: Output = (tensor.float() if tensor.is_floating_point() and tensor.itemsize < 4 else tensor).numpy()
    return array.copy()  # a module may write over what another has given out


def _flat(value: object) -> Iterator[Any]:
    """The arrays in a structure of any kind."""
    if isinstance(value, Mapping):
        for part in value.values():
            yield from _flat(part)
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from _flat(part)
    elif hasattr(value, "shape") and hasattr(value, "dtype"):
        yield value
