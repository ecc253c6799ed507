"""Optimizer state from one framework's form to another's: which op on which slot, and what stays different.

    SGD     m = mu m + (1 - d) g, p -= lr m              torch, the form `gradient`
            v = mu v - lr g,      p += v                 Keras, the form `velocity`
            hence v = -lr m with lr the rate of the next update, and Keras' lr' = lr (1 - d).
            They part when the rate changes: Keras keeps the old rate inside v.
    Adam    the moments are the same numbers everywhere; only epsilon's place differs (`corrected`, `raw`).
    decay   `coupled` (g += wd p) and `decoupled` (p -= lr wd p) are different rules where wd is not 0.

Sources: the rows of `data/optimizers`. What is refused has a code that `allow` may name; then the state
is converted, the difference remains, and the verdict is `lossy`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import zip_longest

from ckptconv.catalog.findings import Findings
from ckptconv.catalog.hyperparameters import Settings, settle
from ckptconv.catalog.optimizer_rows import Row, relatives, row
from ckptconv.catalog.residuals import EpsilonResidual
from ckptconv.catalog.slots import SlotConversion, convert_slots
from ckptconv.catalog.texts import target_code
from ckptconv.document import Fact, Group, Known, Optimizer, value_of
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
    residual: EpsilonResidual | None = None
    """Says how to compute the size of epsilon's displacement; None where there is none."""
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
    pair = _rows(source, target, findings)
    if pair is None:
        return _refused(source, target, findings)
    if isinstance(pair, str):
        return _same_class(source, target, pair, findings)
    ours, theirs = pair
    settings = settle(source, target, ours, theirs, findings.refuse)
    meant = ours.form(settings.source[0])
    theirs, form = _nearest_form(meant, theirs)
    slots, left = convert_slots(source, target, ours, theirs, settings, (meant, form), findings)
    step, param_steps = _steps(source, theirs, findings)
    residual = _epsilon(ours, settings, step, (meant, form), findings)
    return Conversion(
        algorithm=theirs.algorithm,
        form=form,
        slots=slots,
        left=left,
        hyperparameters=settings.facts,
        step=step,
        param_steps=param_steps,
        verdict=_verdict(source, target, f"{theirs.algorithm} ({theirs.framework})", findings),
        target_requires=target_code(theirs, settings, form),
        residual=residual,
        problems=tuple(findings.problems),
    )


def _rows(source: Optimizer, target: Optimizer, findings: Findings) -> tuple[Row, Row] | str | None:
    """The rows of both sides; a name where both are one class, whatever it is; None: no way."""
    ours = _candidates(source)
    theirs = _candidates(target)
    alike = source.framework == target.framework and ours == theirs
    if alike and (len(ours) != 1 or row(ours[0], source.framework) is None):
        return source.algorithm
    if not ours or not theirs:
        side, loc = ("source", source) if not ours else ("template", target)
        findings.stop(
            "optimizer-unknown",
            f"the {side} does not tell which optimizer its state belongs to ({loc.framework})",
            "Supply it with a --source-spec or a template that has this optimizer.",
            "algorithm",
        )
        return None
    pairs = [
        (a, b)
        for name in ours
        for other in theirs
        if (a := row(name, source.framework)) and (b := row(other, target.framework)) and a.family == b.family
    ]
    if pairs:
        return max(pairs, key=lambda pair: pair[0].algorithm == pair[1].algorithm)
    findings.stop(
        "optimizer-mismatch",
        f"the source is {' or '.join(ours)} ({source.framework}), the template {' or '.join(theirs)} "
        f"({target.framework}): no conversion is known",
        "Use a template with the same algorithm, or export the weights alone.",
        "algorithm",
    )
    return None


def _candidates(optimizer: Optimizer) -> tuple[str, ...]:
    if optimizer.algorithm != "unknown":
        return (optimizer.algorithm,)
    return optimizer.algorithm_candidates


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


def _nearest_form(meant: Mapping[str, str], theirs: Row) -> tuple[Row, dict[str, str]]:
    """The target's class and form that come nearest to what the source means.

    A class of the same framework, family and decay may have the switch that the template's class lacks
    (tf_keras' Adam has `adaptive_epsilon`, its AdamW has not); their states have the same keys.
    """
    decay = theirs.base_form.get("weight_decay")
    classes = [theirs, *(r for r in relatives(theirs) if r.base_form.get("weight_decay") == decay)]
    for candidate in classes:
        for switches in ({}, *({name: True} for name in candidate.switches)):
            form = candidate.form(switches)
            if form.get("epsilon") == meant.get("epsilon"):
                return candidate, form
    return theirs, theirs.form({})


def _epsilon(
    ours: Row,
    settings: Settings,
    step: Fact,
    forms: tuple[Mapping[str, str], Mapping[str, str]],
    findings: Findings,
) -> EpsilonResidual | None:
    """States epsilon's displacement, where there is one."""
    mine, other = forms[0].get("epsilon"), forms[1].get("epsilon")
    values = settings.target(0)
    epsilon = values.get("epsilon")
    open_switch = next((name for name in ours.switches if name not in settings.source[0]), None)
    if mine == other or epsilon == 0:
        if mine != "corrected" and open_switch and "epsilon" in forms[0] and epsilon != 0:
            findings.residuals.append(
                f"epsilon: taken for '{mine}', as the source does not record {open_switch}; "
                f"--set {open_switch}=true if it was set"
            )
        return None
    text = f"epsilon stands in another place of the update ({mine} here, {other} there)"
    if mine != "corrected" and open_switch:
        text += f", unless the source run had {open_switch}=True, which it does not record"
    findings.differ("approximate", text)
    beta_2, done = values.get("beta_2"), value_of(step)
    if not isinstance(epsilon, float) or not isinstance(beta_2, float) or not isinstance(done, int):
        return None
    if 0 <= beta_2 < 1 and 0 <= epsilon < math.inf and 0 <= done < 1 << 63:
        return EpsilonResidual(
            slot="max_second_moment" if values.get("amsgrad") else "second_moment",
            step=done,
            beta_2=beta_2,
            epsilon=epsilon,
            direction=f"{mine}-to-{other}",
        )
    return None


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
