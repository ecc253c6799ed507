"""The lines that the target's code must say, because its file does not hold them."""

from __future__ import annotations

import re
from collections.abc import Mapping

import numpy as np

from ckptconv.catalog.hyperparameters import Settings
from ckptconv.catalog.optimizer_rows import Row
from ckptconv.catalog.transitions import Transition, numbers
from ckptconv.document import Fact, Value, value_of


def target_code(
    theirs: Row, settings: Settings, form: Mapping[str, str], step: Fact, *, exact: bool = False
) -> tuple[str, ...]:
    """The constructor of the target's optimizer, and what goes beside it.

    `exact`: the run computes in float64, where 0.9 and its float32 are two numbers.
    """
    values = settings.target(0)
    for name, change in theirs.switches.items():
        if all(form.get(point) == value for point, value in change.items()):
            values[name] = True
    groups = len(settings.facts)
    per_group = any(row.stored and row.index is not None for row in theirs.hyperparameters.values())
    positional = ["model.parameters()"] if theirs.open_slots else []
    lines = [f"{theirs.class_name}({', '.join([*positional, *_arguments(theirs, values, exact)])})"]
    if groups > 1 and per_group:
        lines = [f"{theirs.class_name}  # with {groups} parameter groups; the file holds their settings"]
    lines += [
        f"optimizer = {_call(rule.call, numbers(values))}"
        for name, rule in theirs.rules.items()
        if values.get(name) is not None
    ]
    if settings.open:
        names = ", ".join(name for name in settings.open if theirs.hyperparameters[name].argument)
        lines.append(f"# recorded nowhere, as the source run had them: {names}")
    if settings.excluded:
        names = ", ".join(repr(name) for name in settings.excluded)
        lines.append(
            f"optimizer.exclude_from_weight_decay(var_list=[...])  # before its first update: {names}"
        )
    if settings.coupled_decay:
        lines.append(
            f"kernel_regularizer=keras.regularizers.L2({settings.coupled_decay / 2!r})"
            "  # and bias_regularizer, on every layer: the source's coupled weight decay"
        )
    if settings.maximize:
        lines.append("# the loss negated: the source run maximizes")
    done = value_of(step)
    lines += [line.replace("{step}", str(done)) for line in theirs.after_restore if done is not None]
    return tuple(lines)


def helper_of(step: Transition, theirs: Row, settings: Settings) -> str:
    """The call with which nothing of a transition remains; none where the groups would need several."""
    template = theirs.helper(step.point, step.before) or step.helper.get(theirs.framework)
    if not template:
        return ""
    calls = {_call(template, numbers(settings.target(i), values)) for i, values in enumerate(settings.source)}
    return calls.pop() if len(calls) == 1 else ""


def _call(template: str, values: Mapping[str, float]) -> str:
    """A helper's call with the source's numbers; one that is not known stays a name."""
    return re.sub(r"\{(\w+)\}", lambda m: repr(values[m[1]]) if m[1] in values else m[1], template)


def _arguments(theirs: Row, values: Mapping[str, Value], exact: bool) -> list[str]:
    """`name=value` in the order of the row; what stands at its neutral value is left out."""
    parts: dict[str, list[tuple[int, str]]] = {}
    active = [rule for name, rule in theirs.rules.items() if values.get(name) is not None]
    ruled = {point for rule in active for point in rule.form}
    for name, row in theirs.hyperparameters.items():
        if row.argument is None or name not in values or values[name] is None or name in ruled:
            continue
        value = values[name]
        if name in theirs.neutral and value == theirs.neutral[name] and value == (row.default or 0):
            continue
        parts.setdefault(row.argument, []).append(
            (0 if row.index is None else row.index, repr(value) if exact else number(value))
        )
    texts = []
    for argument, found in parts.items():
        indexed = any(
            row.argument == argument and row.index is not None for row in theirs.hyperparameters.values()
        )
        inner = ", ".join(text for _, text in sorted(found))
        texts.append(f"{argument}=({inner})" if indexed else f"{argument}={inner}")
    return texts


def number(value: Value) -> str:
    """A value as code; a float that came through float32 in the shortest form that gives the same float32."""
    if not isinstance(value, float) or abs(value) > float(np.finfo(np.float32).max):
        return repr(value)
    single = np.float32(value)
    return repr(float(str(single))) if float(single) == value else repr(value)
