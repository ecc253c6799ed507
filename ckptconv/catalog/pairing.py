"""Which classes a conversion is between: one of the source's candidates and one of the target's."""

from __future__ import annotations

from ckptconv.catalog.findings import Findings
from ckptconv.catalog.optimizer_rows import Row, row
from ckptconv.document import Optimizer, value_of


def rows_of(source: Optimizer, target: Optimizer, findings: Findings) -> tuple[Row, Row] | str | None:
    """The rows of both sides; a name where both are one class, whatever it is; None: no way, and it is said.

    Findings: optimizer-unknown where a side does not tell its class, the source may be of two that mean
    different rules, or has its slots by number for want of a class; optimizer-mismatch where no conversion is
    known.
    """
    ours = _candidates(source)
    theirs = _candidates(target)
    alike = source.framework == target.framework and ours == theirs
    if alike and (len(ours) != 1 or row(ours[0], source.framework) is None):
        return source.algorithm
    if not ours or not theirs:
        side, loc = ("source", source) if not ours else ("template", target)
        findings.stop(
            "optimizer-unknown",
            f"the {side} does not tell which optimizer its state belongs to ({loc.framework}; it holds "
            f"{', '.join(loc.slots) or 'no slots'})",
            "Pass --set optimizer=NAME with one that 'ckptconv formats' lists, or carry the weights alone: a "
            "template without optimizer and --allow state-dropped.",
            "algorithm",
        )
        return None
    if source.algorithm == "unknown" and source.slots and all(slot.isdecimal() for slot in source.slots):
        findings.stop(
            "optimizer-unknown",
            f"the source does not tell its optimizer's class: its {len(source.slots)} slots, by their order, "
            f"may be those of {' or '.join(ours)}",
            "Say which it was: " + " or ".join(f"--set optimizer={name}" for name in ours) + ".",
            "algorithm",
        )
        return None
    pairs = [
        (a, b)
        for name in ours
        for other in theirs
        if (a := row(name, source.framework)) and (b := row(other, target.framework)) and a.family == b.family
    ]
    able = _able(source, tuple(a for a, _ in pairs))
    pairs = [pair for pair in pairs if pair[0] in able]
    meanings = _meanings(source, able)
    if len(meanings) > 1:
        findings.stop(
            "optimizer-unknown",
            f"the source's state is that of {' or '.join(a.class_name for a in meanings)}, "
            f"to which its {', '.join(_differing(meanings, source))} is not the same",
            "Say which it was: " + " or ".join(f"--set optimizer={a.algorithm}" for a in meanings) + ".",
            "algorithm",
        )
        return None
    if pairs:
        return max(pairs, key=lambda pair: pair[0].algorithm == pair[1].algorithm)
    findings.stop(
        "optimizer-mismatch",
        f"the source is {' or '.join(ours)} ({source.framework}), the template {' or '.join(theirs)} "
        f"({target.framework}): no conversion is known{_why(source, ours)}",
        "Use a template with the same algorithm, or one without optimizer and --allow state-dropped, which "
        "carries the weights alone.",
        "algorithm",
    )
    return None


def _able(source: Optimizer, rows: tuple[Row, ...]) -> tuple[Row, ...]:
    """The classes that have every hyperparameter which is told and which any of them has; else all."""
    told = {name for group in source.groups for name in group.hyperparameters}
    known = {name for row in rows for name in row.hyperparameters if name in told}
    return tuple(row for row in rows if known <= row.hyperparameters.keys()) or rows


def _meanings(source: Optimizer, rows: tuple[Row, ...]) -> tuple[Row, ...]:
    """The classes that could have made the source's state, one where all mean the same by it."""
    different = tuple(dict.fromkeys(row.algorithm for row in rows))
    found = tuple(next(row for row in rows if row.algorithm == name) for name in different)
    return found if len(found) > 1 and _differing(found, source) else found[:1]


def _differing(rows: tuple[Row, ...], source: Optimizer) -> tuple[str, ...]:
    """Points at which the rules of classes differ, less those named as a hyperparameter that is 0."""
    groups = [{n: value_of(f) for n, f in group.hyperparameters.items()} for group in source.groups]
    forms = [row.form(values) for row in rows for values in groups or [{}]]
    points = dict.fromkeys(point for form in forms for point in form)
    return tuple(
        point
        for point in points
        if len({form.get(point) for form in forms}) > 1 and any(values.get(point) != 0 for values in groups)
    )


def _why(source: Optimizer, names: tuple[str, ...]) -> str:
    found = row(names[0], source.framework) if len(names) == 1 else None
    return f", {found.alone}" if found is not None and found.alone else ""


def _candidates(optimizer: Optimizer) -> tuple[str, ...]:
    if optimizer.algorithm != "unknown":
        return (optimizer.algorithm,)
    return optimizer.algorithm_candidates
