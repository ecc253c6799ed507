"""An optimizer's state <-> its JSON form, compact enough for 100,000 parameters.

Slots name their parameters as `all`; a slot's dtype and shape are its parameter's unless said otherwise;
steps that are the run's step refer to it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence

from ckptconv import dtypes
from ckptconv.document import Checkpoint, Fact, Group, Known, Optimizer, Progress
from ckptconv.facts import (
    fact_from_json,
    fact_to_json,
    facts_from_json,
    facts_to_json,
    value_from_json,
    value_to_json,
)
from ckptconv.rawtree import Path
from ckptconv.strictjson import Json
from ckptconv.tensor import TensorRef, TensorSpec


def spec_to_json(spec: TensorSpec) -> dict[str, Json]:
    result: dict[str, Json] = {"dtype": spec.dtype.name, "shape": list(spec.shape)}
    if spec.encoded_nbytes is not None:
        result["encoded_nbytes"] = spec.encoded_nbytes
    return result


def spec_from_json(item: Mapping[str, Json]) -> TensorSpec:
    return TensorSpec(
        dtype=dtypes.BY_NAME[item["dtype"]],
        shape=tuple(int(size) for size in item["shape"]),
        encoded_nbytes=item.get("encoded_nbytes"),
    )


def optimizer_to_json(optimizer: Optimizer, checkpoint: Checkpoint) -> dict[str, Json]:
    """One optimizer; steps and specs that stand elsewhere in the document are referred to."""
    specs = {name: param.tensor.spec for name, param in checkpoint.params.items()}
    everyone = optimizer.params
    return {
        "name": optimizer.name,
        "algorithm": optimizer.algorithm,
        "algorithm_candidates": list(optimizer.algorithm_candidates),
        "framework": optimizer.framework,
        "form": dict(optimizer.form),
        "step": _step_to_json(optimizer, checkpoint),
        "param_steps": _param_steps_to_json(optimizer),
        "groups": [
            {"params": list(group.params), "hyperparameters": facts_to_json(group.hyperparameters)}
            for group in optimizer.groups
        ],
        "slots": [_slot_to_json(name, slot, everyone, specs) for name, slot in optimizer.slots.items()],
        "scalars": facts_to_json(optimizer.scalars),
        "param_order": optimizer.param_order,
    }


def optimizer_from_json(
    item: Mapping[str, Json],
    progress: Progress,
    specs: Mapping[str, TensorSpec],
    find: Callable[[Path, TensorSpec], TensorRef],
) -> Optimizer:
    """The inverse; `specs` are those of the parameters."""
    name = item["name"]
    groups = tuple(
        Group(params=tuple(group["params"]), hyperparameters=facts_from_json(group["hyperparameters"]))
        for group in item["groups"]
    )
    everyone = tuple(param for group in groups for param in group.params)
    step = _step_from_json(item["step"], progress)
    slots: dict[str, dict[str, TensorRef]] = {}
    for entry in item["slots"]:
        slot = entry["slot"]
        slots[slot] = {
            param: find(("slot", name, slot, param), spec)
            for param, spec in _slot_specs(entry, everyone, specs).items()
        }
    return Optimizer(
        name=name,
        algorithm=item["algorithm"],
        algorithm_candidates=tuple(item["algorithm_candidates"]),
        framework=item["framework"],
        form=dict(item["form"]),
        step=step,
        param_steps=_param_steps_from_json(item["param_steps"], step, everyone),
        groups=groups,
        slots=slots,
        scalars=facts_from_json(item["scalars"]),
        param_order=item["param_order"],
    )


def _step_to_json(optimizer: Optimizer, checkpoint: Checkpoint) -> dict[str, Json]:
    own, of_run = optimizer.step, checkpoint.progress.step
    if (
        isinstance(own, Known)
        and isinstance(of_run, Known)
        and (own.value, own.status) == (of_run.value, of_run.status)
        and (len(checkpoint.optimizers) == 1 or own.source == of_run.source)
    ):
        same: dict[str, Json] = {"status": "same", "of": "progress.step", "source": own.source}
        if own.formula is not None:
            same["formula"] = own.formula
        return same
    return fact_to_json(own)


def _step_from_json(step: Mapping[str, Json], progress: Progress) -> Fact:
    of_run = progress.step
    if step["status"] == "same" and isinstance(of_run, Known):
        return Known(
            value=of_run.value, status=of_run.status, source=step["source"], formula=step.get("formula")
        )
    return fact_from_json(step)


def _names_to_json(names: Sequence[str], everyone: Sequence[str]) -> Json:
    return "all" if tuple(names) == tuple(everyone) else list(names)


def _param_steps_to_json(optimizer: Optimizer) -> Json:
    steps = optimizer.param_steps
    if not steps:
        return None
    own = optimizer.step.value if isinstance(optimizer.step, Known) else None
    common = own if own in steps.values() else Counter(steps.values()).most_common(1)[0][0]
    result: dict[str, Json] = {
        "params": _names_to_json(tuple(steps), optimizer.params),
        "common": "step" if common == own else value_to_json(common),
    }
    differ = [{"param": n, "step": value_to_json(step)} for n, step in steps.items() if step != common]
    if differ:
        result["differ"] = differ
    return result


def _param_steps_from_json(item: Json, step: Fact, everyone: tuple[str, ...]) -> dict[str, int]:
    if item is None:
        return {}
    own = step.value if isinstance(step, Known) else None
    common = own if item["common"] == "step" else value_from_json(item["common"])
    differ = {entry["param"]: value_from_json(entry["step"]) for entry in item.get("differ", ())}
    names = everyone if item["params"] == "all" else item["params"]
    steps = {name: differ.get(name, common) for name in names}
    return {name: int(count) for name, count in steps.items() if isinstance(count, (int, float))}


def _slot_to_json(
    name: str, slot: Mapping[str, TensorRef], everyone: tuple[str, ...], specs: Mapping[str, TensorSpec]
) -> dict[str, Json]:
    result: dict[str, Json] = {"slot": name, "params": _names_to_json(tuple(slot), everyone)}
    kinds = {tensor.dtype.name for tensor in slot.values()}
    if len(kinds) == 1 and any(slot[p].dtype != specs[p].dtype for p in slot if p in specs):
        result["dtype"] = kinds.pop()
    expected = _slot_specs({**result, "differ": []}, everyone, specs)
    differ = [
        {"param": param, **spec_to_json(tensor.spec)}
        for param, tensor in slot.items()
        if tensor.spec != expected.get(param)
    ]
    if differ:
        result["differ"] = differ
    return result


def _slot_specs(
    entry: Mapping[str, Json], everyone: tuple[str, ...], specs: Mapping[str, TensorSpec]
) -> dict[str, TensorSpec]:
    """Spec of each array of a slot entry, by parameter."""
    names = everyone if entry["params"] == "all" else entry["params"]
    result = {name: specs[name] for name in names if name in specs}
    if "dtype" in entry:
        dtype = dtypes.BY_NAME[entry["dtype"]]
        result = {name: TensorSpec(dtype=dtype, shape=spec.shape) for name, spec in result.items()}
    for item in entry.get("differ", ()):
        result[item["param"]] = spec_from_json(item)
    return result
