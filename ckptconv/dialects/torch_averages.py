"""Averages of the weights that stand beside a model (EMA, SWA, `AveragedModel`), matched to its parameters.

They are extras of the document (`state_dict_ema/conv.weight`, `model_ema/module.conv.weight`), parts of a
pickled module, or parameters of the same state_dict (`model_ema.`). An average has one tensor of the same
shape for every trained parameter of the model; buffers that it does not hold are the model's own. Names are
compared without dots, as those of latent-diffusion's `LitEma` are; a bare list (`shadow_params` of
`torch_ema` and diffusers) goes by the order of `model.parameters()`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from ckptconv.dialects import torch_keys
from ckptconv.dialects.torch_modules import PARTS, bare_names, optimizable
from ckptconv.dialects.torch_survey import words
from ckptconv.document import Checkpoint, Param
from ckptconv.tensor import TensorRef

_INSIDE = frozenset({*PARTS, "@state", "@args0"})
"""Steps of a path that a pickled module's state_dict does not have."""
_MOST_OUTER = 2
"""Components that a wrapper may put before the model's own names."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Average:
    """One average of a model's weights."""

    key: str
    """Where it stands."""
    tensors: Mapping[str, TensorRef]
    """Parameter's name -> its average, for every trained parameter of the model and some buffers."""
    params: Mapping[str, Param]
    """The model that it is of."""


def averages(checkpoint: Checkpoint) -> tuple[Average, ...]:
    """Every average of the document's weights. I/O: none."""
    own: dict[str, dict[str, TensorRef]] = {}
    for name, tensor in _named(checkpoint):
        steps = name.split("/")
        depth = next((i for i, step in enumerate(steps) if words((step,)) & torch_keys.AVERAGE_WORDS), None)
        if depth is None or depth + 1 == len(steps):
            continue
        rest = [step for step in steps[depth + 1 :] if step not in _INSIDE]
        own.setdefault("/".join(steps[: depth + 1]), {})[".".join(rest)] = tensor
    found = []
    for key, tensors in own.items():
        params = {n: p for n, p in checkpoint.params.items() if not n.startswith(f"{key}.")}
        stripped = bare_names(list(tensors))
        fit = _fit({stripped[name]: tensor for name, tensor in tensors.items()}, params)
        if fit is not None:
            found.append(Average(key=key, tensors=fit[0], params=fit[1]))
    return tuple(found)


def with_averages(checkpoint: Checkpoint) -> Checkpoint:
    """The document that says which averages of its weights there are, and how one is taken."""
    found = averages(checkpoint)
    said = [
        f"An average of the weights stands under '{average.key}': --select "
        f"{'ema' if len(found) == 1 else average.key} takes it instead of the trained ones."
        for average in found
    ]
    return replace(checkpoint, oddities=(*checkpoint.oddities, *said))


def _named(checkpoint: Checkpoint) -> Iterator[tuple[str, TensorRef]]:
    yield from checkpoint.extras.items()
    for name, param in checkpoint.params.items():
        head, _, rest = name.partition(".")
        if words((head,)) & torch_keys.AVERAGE_WORDS:
            yield f"{head}/{rest}", param.tensor


def _fit(
    tensors: Mapping[str, TensorRef], params: Mapping[str, Param]
) -> tuple[dict[str, TensorRef], dict[str, Param]] | None:
    """The tensors by parameter, and the model whose trained parameters they all are."""
    for prefix in dict.fromkeys(["", *(f"{name.partition('.')[0]}." for name in params)]):
        model = {name: param for name, param in params.items() if name.startswith(prefix)}
        trained = optimizable(model)
        if not trained:
            continue
        for outer in range(_outer(tensors) + 1):
            matched = _by_name(tensors, model, prefix, outer)
            if matched.keys() >= set(trained):
                return matched, model
    return _in_order(tensors, params)


def _outer(tensors: Mapping[str, TensorRef]) -> int:
    """How many components all names share that have more: those that a wrapper put before them."""
    split = [name.split(".") for name in tensors if "." in name]
    depth = 0
    while depth < _MOST_OUTER and len({tuple(parts[: depth + 1]) for parts in split}) == 1:
        depth += 1
    return depth


def _by_name(
    tensors: Mapping[str, TensorRef], model: Mapping[str, Param], prefix: str, outer: int
) -> dict[str, TensorRef]:
    squashed: dict[str, list[str]] = {}
    for name in model:
        squashed.setdefault(name.removeprefix(prefix).replace(".", ""), []).append(name)
    matched = {}
    for name, tensor in tensors.items():
        names = squashed.get("".join(name.split(".")[outer:]), [])
        if len(names) == 1 and model[names[0]].tensor.shape == tensor.shape:
            matched[names[0]] = tensor
    return matched


def _in_order(
    tensors: Mapping[str, TensorRef], params: Mapping[str, Param]
) -> tuple[dict[str, TensorRef], dict[str, Param]] | None:
    """A list of as many tensors as there are trained parameters, each of its parameter's shape."""
    listed = {name: tensor for name, tensor in tensors.items() if name.rpartition(".")[2].isdigit()}
    lists = {name.rpartition(".")[0] for name in listed}
    trained = optimizable(params)
    if len(lists) != 1 or len(listed) != len(trained):
        return None
    pairs = list(zip(trained, listed.values(), strict=True))
    if any(params[name].tensor.shape != tensor.shape for name, tensor in pairs):
        return None
    return dict(pairs), dict(params)
