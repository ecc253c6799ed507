"""Optimizer state from one framework's form to another's: which op on which slot, and what stays different.

What differs between two forms, and how the numbers cross, stands in the tables of `data/optimizers`
(`transitions.py`): SGD's buffer times -lr, Adagrad's epsilon into its accumulator, an epsilon that stands
elsewhere. Weight decay moves between optimizer and model and is in `hyperparameters.py`.

What is refused has a code that `allow` may name; then the state is converted, the difference remains, and
the verdict is `lossy`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import zip_longest

from ckptconv.catalog.findings import Findings, exactly
from ckptconv.catalog.hyperparameters import Settings, settle
from ckptconv.catalog.optimizer_rows import Row, relatives
from ckptconv.catalog.pairing import rows_of
from ckptconv.catalog.residuals import Residual, fitted
from ckptconv.catalog.slots import SlotConversion, convert_slots, scalar_slots
from ckptconv.catalog.texts import helper_of, target_code
from ckptconv.catalog.transitions import Transition, between, numbers
from ckptconv.document import Fact, Group, Known, Optimizer, Value, value_of
from ckptconv.errors import Problem
from ckptconv.report import OptimizerVerdict
from ckptconv.tensor import Op

_FLOAT32_COUNTS = 1 << 24
"""Above this a float32 counter does not advance any more: n + 1 rounds to n."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversion:
    """How an optimizer's state crosses. `problems` must be empty before anything is written."""

    algorithm: str
    """Catalog name of the target's algorithm; the source's name where both are the same unknown class."""
    form: Mapping[str, str]
    """The target's form."""
    slots: tuple[SlotConversion, ...] = ()
    left: tuple[str, ...] = ()
    """Slots of the source that the target's rule does not read; a real loss among them is also a problem."""
    hyperparameters: tuple[Mapping[str, Fact], ...] = ()
    """Per group of the target."""
    step: Fact
    """The target's step."""
    param_steps: Mapping[str, int] = field(default_factory=dict)
    """Per parameter of the target, where it counts per parameter and the source has a state for it."""
    verdict: OptimizerVerdict
    target_requires: tuple[str, ...] = ()
    """What the target's code must say because its file does not hold it."""
    scalars: Mapping[str, Fact] = field(default_factory=dict)
    """The target's optimizer-wide numbers."""
    residual: Residual | None = None
    """Says how to compute the size of what stays different; None where it has none."""
    problems: tuple[Problem, ...] = ()

    def ops(self, slot: str, group: int) -> tuple[Op, ...]:
        """What happens to the slot's values of the parameters of a target group; KeyError: no such slot."""
        for conversion in self.slots:
            if conversion.slot == slot:
                return conversion.ops[group]
        raise KeyError(slot)


def convert(source: Optimizer, target: Optimizer, *, allow: frozenset[str] = frozenset()) -> Conversion:
    """How `source` becomes the state of `target`, the template's optimizer.

    Both name their parameters alike: the mapping has renamed the source's. What the source records wins;
    what it lacks comes from the template. Nothing is read and nothing is written.
    """
    findings = Findings(source.name, allow)
    pair = rows_of(source, target, findings)
    if pair is None:
        return _refused(source, target, findings)
    if isinstance(pair, str):
        return _same_class(source, target, pair, findings)
    ours, theirs = pair
    settings = settle(source, target, ours, theirs, findings.refuse)
    meant = ours.form(settings.source[0])
    theirs, form = nearest_form(meant, theirs, settings.target(0))
    if ours.other_keys:
        findings.refuse(
            "state-dropped",
            f"the state of {ours.class_name} is one for all parameters: it cannot go onto another file",
            "Write it back without --template, or allow state-dropped to begin anew.",
            "slots",
        )
    steps, lacking = between(theirs.family, meant, form)
    steps = tuple(each for each in steps if not _is_one_rule(each, settings))

    def apart(point: str, why: str = "", helper: str = "") -> None:
        findings.refuse(
            "form-mismatch",
            f"{point} is '{meant.get(point, 'none')}' in the source's rule and '{form.get(point, 'none')}' "
            f"in that of {theirs.class_name}, and no conversion closes that{why}",
            "Allow form-mismatch to convert the state all the same.",
            "form",
            point,
            helper=helper,
        )

    for point in lacking:
        apart(point)
    for each in steps:
        if each.verdict == "lossy":
            apart(each.point, f": {each.text}", helper_of(each, theirs, settings))
    slots, left = convert_slots(source, target, ours, theirs, settings, steps, findings)
    per_param, scalars = scalar_slots(source, theirs, len(settings.facts), findings)
    step, param_steps = _steps(source, theirs, findings)
    changed = _changed(source, target, theirs, settings, steps, findings)
    held = frozenset(slot.slot for slot in slots if not slot.created)
    residual = _differences(held, ours, theirs, settings, changed, step, steps, findings)
    settings = changed
    _unrecorded_switch(ours, meant, settings, steps, findings)
    return Conversion(
        algorithm=theirs.algorithm,
        form=form,
        slots=(*slots, *per_param),
        left=left,
        scalars=scalars,
        hyperparameters=settings.facts,
        step=step,
        param_steps=param_steps,
        verdict=_verdict(source, target, f"{theirs.algorithm} ({theirs.framework})", findings),
        target_requires=target_code(theirs, settings, form, step, exact=in_float64(source)),
        residual=residual,
        problems=tuple(findings.problems),
    )


def _same_class(source: Optimizer, target: Optimizer, name: str, findings: Findings) -> Conversion:
    """The same class in the same framework: every slot is copied, whatever it means."""
    groups = max(len(target.groups), 1)
    extra = [slot for slot in source.slots if target.slots and slot not in target.slots]
    for slot in extra:
        findings.refuse(
            "state-dropped",
            f"the target has no place for the slot '{slot}'",
            "Use a template of the same optimizer class and options.",
            "slots",
            slot,
        )
    if len(source.groups) != len(target.groups):
        findings.refuse(
            "groups-differ",
            f"the source has {len(source.groups)} parameter groups, the template {len(target.groups)}",
            "Use a template with the source's groups.",
            "groups",
        )
    facts = tuple(
        {**group.hyperparameters, **{k: v for k, v in own.hyperparameters.items() if isinstance(v, Known)}}
        for group, own in zip_longest(target.groups, source.groups[:groups], fillvalue=Group(params=()))
    )
    return Conversion(
        algorithm=name,
        form=source.form,
        slots=tuple(SlotConversion(slot=s, ops=((),) * groups) for s in source.slots if s not in extra),
        left=tuple(extra),
        hyperparameters=facts,
        step=source.step,
        param_steps=source.param_steps,
        verdict=_verdict(source, target, f"{name} ({target.framework})", findings),
        problems=tuple(findings.problems),
    )


def _refused(source: Optimizer, target: Optimizer, findings: Findings) -> Conversion:
    return Conversion(
        algorithm=target.algorithm,
        form=target.form,
        step=source.step,
        verdict=_verdict(source, target, f"{target.algorithm} ({target.framework})", findings),
        problems=tuple(findings.problems),
    )


def _verdict(source: Optimizer, target: Optimizer, name: str, findings: Findings) -> OptimizerVerdict:
    return OptimizerVerdict(
        optimizer=target.name,
        source=f"{source.algorithm} ({source.framework})",
        target=name,
        verdict=findings.verdict,
        residuals=tuple(findings.residuals),
    )


def nearest_form(
    meant: Mapping[str, str], theirs: Row, hyperparameters: Mapping[str, Value]
) -> tuple[Row, dict[str, str]]:
    """The target's class and form that come nearest to what the source means.

    A class of the same framework, family and decay may have the switch that the template's class lacks
    (tf_keras' Adam has `adaptive_epsilon`, its AdamW has not); their states have the same keys.
    """
    decay = theirs.base_form.get("weight_decay")
    classes = [theirs, *(r for r in relatives(theirs) if r.base_form.get("weight_decay") == decay)]
    for candidate in classes:
        for switches in ({}, *({name: True} for name in candidate.switches)):
            form = candidate.form({**hyperparameters, **switches})
            if form.get("epsilon") == meant.get("epsilon"):
                return candidate, form
    return theirs, theirs.form(hyperparameters)


def in_float64(source: Optimizer) -> bool:
    return any(t.dtype.name == "float64" for by_param in source.slots.values() for t in by_param.values())


def _is_one_rule(step: Transition, settings: Settings) -> bool:
    """Whether what differs is a term that is 0."""
    if step.moves is None:
        return False
    told = [{**settings.target(i), **values}.get(step.moves) for i, values in enumerate(settings.source)]
    return all(value == 0 and value is not None for value in told)


def _differences(
    held: frozenset[str],
    ours: Row,
    theirs: Row,
    settings: Settings,
    changed: Settings,
    step: Fact,
    steps: tuple[Transition, ...],
    findings: Findings,
) -> Residual | None:
    """States what stays different, and how its size is computed."""
    residual = None
    for each in steps:
        if each.verdict == "lossy" or (each.verdict == "exact" and not each.text):
            continue  # refused, or nothing to say
        if each.slots and not held & each.slots.keys():
            continue  # what would differ does not cross: a buffer of a run without momentum
        text = f"{each.point}: {each.before} here, {each.after} there"
        text = f"{text}; {each.text}" if each.text else text
        findings.differ(each.verdict, exactly(text, helper_of(each, theirs, settings)))
        if each.measure is not None:
            values = numbers(settings.target(0), settings.source[0])
            if each.fit is not None:
                values["fitted"] = numbers(changed.target(0)).get(each.moves or "", math.nan)
            amsgrad = settings.target(0).get("amsgrad") and "max_second_moment" in ours.slots
            residual = Residual.of(each, values, value_of(step), held, amsgrad=bool(amsgrad)) or residual
    return residual


def _changed(
    source: Optimizer,
    target: Optimizer,
    theirs: Row,
    settings: Settings,
    steps: tuple[Transition, ...],
    findings: Findings,
) -> Settings:
    """The settings after the transitions: an epsilon squared, 0 where it went elsewhere, or fitted."""
    facts = [dict(group) for group in settings.facts]
    for index, group in enumerate(facts):
        values = numbers(settings.target(index), settings.source[index])
        for each in steps:
            needed = {name for product in each.settings.values() for name in product.names}
            needed |= {each.moves} if each.fit is not None and each.moves is not None else set()
            if needed - values.keys():
                _not_told(sorted(needed - values.keys())[0], each, index, findings)
                continue
            changes = {
                name: (product.of(values), "as the other form needs it")
                for name, product in each.settings.items()
            }
            if each.fit is not None and each.moves is not None:
                changes[each.moves] = fitted(each.fit, source.slots, values[each.moves])
            for name, (number, formula) in changes.items():
                group[name] = Known(value=number, status="derived", formula=formula)
        for name, least in theirs.smallest.items():
            number = numbers({name: value_of(group.get(name))}).get(name, least)
            if number < least:
                formula = f"{theirs.class_name} takes {number:g} for 'not given'"
                group[name] = Known(value=least, status="derived", formula=formula)
        _need_places(group, index, target, theirs, findings)
    return replace(settings, facts=tuple(facts))


def _not_told(name: str, step: Transition, index: int, findings: Findings) -> None:
    findings.stop(
        "hyperparameter-missing",
        f"the {step.point} of the source becomes another in the target, and neither records {name}",
        f"Pass --set {name}=VALUE, the one that the source run had.",
        *("groups", index, "hyperparameters", name),
    )


def _need_places(
    facts: Mapping[str, Fact], index: int, target: Optimizer, theirs: Row, findings: Findings
) -> None:
    """A template whose value is None has no place for one (torch's Adafactor and Muon)."""
    held = target.groups[index].hyperparameters if index < len(target.groups) else {}
    for name, entry in theirs.hyperparameters.items():
        value = value_of(facts.get(name))
        if not held or name in held or not entry.may_be_none or value in (None, entry.none):
            continue
        shown = f"{value:g}" if isinstance(value, float) else f"{value!r}"
        findings.stop(
            "template-mismatch",
            f"the template leaves {name} to {theirs.class_name}, the run needs {shown}",
            f"Make the template with {entry.argument} given: {name} = {shown}.",
            *("groups", index, "hyperparameters", name),
        )


def _unrecorded_switch(
    ours: Row,
    meant: Mapping[str, str],
    settings: Settings,
    steps: tuple[Transition, ...],
    findings: Findings,
) -> None:
    """Says which choice of the source's code was taken for granted, because its file does not hold it."""
    for name, change in ours.switches.items():
        if name in settings.source[0] or settings.target(0).get("epsilon") == 0:
            continue
        if any(meant.get(point) != value for point, value in change.items()):
            points = ", ".join(f"{point} '{meant[point]}'" for point in change if point in meant)
            findings.residuals.append(
                f"taken for {points}, as the source does not record {name}; --set {name}=true if it was set"
            )


def _steps(source: Optimizer, theirs: Row, findings: Findings) -> tuple[Fact, Mapping[str, int]]:
    """The target's step, one for all or one per parameter."""
    step = source.step
    if theirs.step_key is None:
        return step, {}
    counted = set(source.param_steps.values())
    if len(counted) > 1 and not theirs.step_per_param:
        low, high = min(counted), max(counted)
        findings.refuse(
            "unequal-steps",
            f"the source's parameters have done between {low} and {high} updates, the target has one count",
            f"Allow unequal-steps to write {high}.",
            "param_steps",
        )
        step = Known(value=high, status="derived", formula="the largest of the parameters' steps")
    elif not isinstance(step, Known) and len(counted) == 1:
        step = Known(value=counted.pop(), status="derived", formula="every parameter's step")
    done = value_of(step)
    if isinstance(done, bool) or not isinstance(done, int):
        return step, source.param_steps if theirs.step_per_param else {}
    if not theirs.step_per_param:
        return step, {}
    if max([done, *source.param_steps.values()]) >= _FLOAT32_COUNTS:
        findings.refuse(
            "progress-range",
            f"step {done} is beyond {_FLOAT32_COUNTS}: torch's float32 counter does not advance from there",
            "Allow progress-range if the bias correction no longer matters to you (it is 1 there).",
            "step",
        )
    if source.param_steps:
        return step, source.param_steps
    owners = dict.fromkeys(name for by_param in source.slots.values() for name in by_param)
    return step, dict.fromkeys(owners, done)
