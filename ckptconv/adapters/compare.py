"""Two live models on one input, layer by layer: where their outputs part.

Weights that all arrived can still make another model: an epsilon, a padding, an activation, a query in the
place of a key. Both models run on the same batch; what each matched layer gives out is brought into one order
of axes and compared in the order in which the PyTorch model runs.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from ckptconv.adapters import keras, pytorch
from ckptconv.adapters.compare_axes import (
    Axes,
    channels_last,
    input_order,
    is_sequence_first,
    telling,
    told_order,
)
from ckptconv.adapters.compare_layers import matches
from ckptconv.adapters.compare_rows import Comparison, OutputComparison
from ckptconv.adapters.compare_runs import Inputs, run_keras, run_torch, running, takers
from ckptconv.adapters.torch_rules import torch_module
from ckptconv.document import Checkpoint
from ckptconv.errors import CkptError, MappingError
from ckptconv.fitting import parts
from ckptconv.mapping_file import MappingLike, mapping_of
from ckptconv.mapping_rules import Ruled, ruled
from ckptconv.matching import framework_of, matched
from ckptconv.report import Plan, Report

if TYPE_CHECKING:
    import torch


class KerasModel(keras.Model, keras.Layer, Protocol):
    """A Keras model, and the layers in it."""


_HARMLESS = frozenset({"flatten-layout", "tie-mismatch", "layout-ambiguous"})
"""Problems of a conversion that leave no doubt about which layer is which."""


def compare_outputs(
    torch_model: torch.nn.Module,
    keras_model: KerasModel,
    plan_or_mapping: Report | Plan | MappingLike | None = None,
    inputs: Inputs = None,
    *,
    axes: Axes | Sequence[Axes] | Mapping[str, Axes] | None = None,
    tolerance: float = 1e-5,
) -> OutputComparison:
    """Run both models on one batch, and compare what each layer gives out.

    `plan_or_mapping`: the report or the plan of a conversion between the two, or a mapping file; None matches
    them by `describe()`.
    `inputs`: as torch takes them: an array, a tuple of arguments, or a dictionary of those with names; Keras
    gets the array, a list, or the dictionary.
    `axes`: torch's and Keras' axes of the input, `("nchw", "nhwc")`; of each, where there are several. Where
    they are not given, the layers that take the input tell them, or it is an error.
    `tolerance`: how far outputs may be apart, relative to the largest value of the output.
    I/O: a temporary TensorFlow checkpoint; the outputs of all matched modules are held in memory.
    Raises: layout-ambiguous where the inputs' axes are not told; usage; mapping-invalid for a report of other
    models; param-unmatched and what else keeps the models from being matched.
    """
    torch_model = pytorch.unwrapped(torch_model)
    ours = _for_torch(torch_model, inputs)
    theirs = _for_keras(torch_model, keras_model, ours, axes)
    with running("torch"):
        source = pytorch.describe(torch_model, inputs=ours)
    with running("Keras"):
        template, holders = keras.layers_of(keras_model, theirs)
    pairs = _pairs(plan_or_mapping, source, template)
    matched = tuple(matches(pairs, torch_model, keras_model, holders))
    modules = {path: module for one in matched for path, module in one.modules.items()}
    layers = {name: layer for one in matched for name, layer in one.layers.items()}
    mine, its = run_torch(torch_model, ours, modules), run_keras(keras_model, theirs, layers)
    comparison = Comparison(tolerance, is_sequence_first(torch_model))
    ran = [one for one in matched if any(path in mine.last for path in one.modules)]
    ran.sort(key=lambda one: max(mine.last.get(path, 0) for path in one.modules))
    rows = [row for one in ran for row in comparison.of(one, mine, its)]
    return OutputComparison(rows=(*rows, *comparison.of_models(mine, its)), tolerance=tolerance)


def _for_torch(model: torch.nn.Module, inputs: Inputs) -> Inputs:
    """The inputs as tensors beside the model's parameters."""
    torch = torch_module()
    device = next((parameter.device for parameter in model.parameters()), "cpu")

    def one(value: Any) -> object:
        return torch.as_tensor(np.asarray(value) if not torch.is_tensor(value) else value).to(device)

    if inputs is None:
        raise CkptError.of("usage", "there is no input", "Pass a batch as inputs=.", loc=("inputs",))
    if isinstance(inputs, Mapping):
        return {name: one(value) for name, value in inputs.items()}
    return tuple(map(one, inputs)) if isinstance(inputs, tuple) else one(inputs)


def _for_keras(model: torch.nn.Module, keras_model: KerasModel, inputs: Inputs, axes: Any) -> Inputs:
    """The same inputs with their axes as Keras takes them."""
    named = inputs if isinstance(inputs, Mapping) else dict(enumerate(_several(inputs)))
    if axes is None or isinstance(axes, Mapping):
        told = dict(axes or {})
    else:
        told = dict(enumerate([axes] if all(isinstance(side, str) for side in axes) else axes))
    formats = {channels_last(layer) for layer in keras_model._flatten_layers()} - {None}
    last = formats.pop() if len(formats) == 1 else None
    found = takers(model, inputs, telling(model)) if len(told) < len(named) else {}
    result = {}
    for name, tensor in named.items():
        loc = ("inputs", str(name))
        if name in told:
            order = told_order(told[name], tensor.ndim, loc)
        else:
            order = input_order(tensor.ndim, found.get(id(tensor)), model, last, loc)
        result[name] = np.ascontiguousarray(tensor.detach().cpu().numpy().transpose(order))
    if isinstance(inputs, Mapping):
        return result
    return tuple(result.values()) if isinstance(inputs, tuple) else result[0]


def _several(inputs: Inputs) -> tuple[Any, ...]:
    return inputs if isinstance(inputs, tuple) else (inputs,)


def _pairs(
    told: Report | Plan | MappingLike | None, source: Checkpoint, template: Checkpoint
) -> Iterable[tuple[str, str]]:
    """Names of parameters of the torch and of the Keras model of which one makes the other."""
    if isinstance(told, (Report, Plan)):
        return tuple(_of_conversion(told, source, template))
    frameworks = (framework_of(source), framework_of(template))
    rules = Ruled() if told is None else ruled(mapping_of(told), source, template, frameworks)
    found = matched(source, template, frameworks, rules)
    problems = [p for p in (*rules.problems, *found.cover.problems) if p.code not in _HARMLESS]
    if problems:
        raise MappingError(*problems)
    return [
        (found.source.file_name(pair.source), found.target.file_name(pair.target))
        for pair in found.cover.pairs
    ]


def _of_conversion(
    told: Report | Plan, source: Checkpoint, template: Checkpoint
) -> Iterator[tuple[str, str]]:
    """The pairs of a conversion in either direction. Raises: mapping-invalid."""
    ours = {parts(name): name for name in source.params}
    theirs = {parts(name): name for name in template.params}
    for made_from, made in _of_plan(told) if isinstance(told, Plan) else _of_report(told):
        pair = parts(made_from), parts(made)
        for first, second in (pair, pair[::-1]):
            if first in ours and second in theirs:
                yield ours[first], theirs[second]
                break
        else:
            raise MappingError.of(
                "mapping-invalid",
                f"the conversion pairs '{made_from}' with '{made}', which these models do not have",
                "Pass the report of a conversion between these two, or None to match them by describe().",
                loc=("plan_or_mapping", made),
            )


def _of_report(report: Report) -> Iterator[tuple[str, str]]:
    for entry in report.ledger:
        if entry.item[0] == "param" and entry.target:
            yield str(entry.item[1]), entry.target


def _of_plan(plan: Plan) -> Iterator[tuple[str, str]]:
    for row in plan.rows:
        if row.target[0] == "param":
            yield from ((str(producer.item[-1]), str(row.target[1])) for producer in row.producers)
