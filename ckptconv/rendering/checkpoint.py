"""A checkpoint for people: progress first."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping

from rich.text import Text

from ckptconv.document import (
    NOT_RECORDED,
    PROGRESS_FIELDS,
    Absent,
    Checkpoint,
    Fact,
    Known,
    Optimizer,
    Param,
    Schedule,
    Unknown,
    value_of,
)
from ckptconv.rendering.text import (
    LISTED,
    Rows,
    View,
    clean,
    count,
    fields,
    heading,
    listed,
    shape_text,
    size,
    value_text,
)

TABLE_ROWS = 40
"""Parameters shown by `inspect` unless all are asked for."""

_GLOSS: Mapping[str, str] = {
    "step": "optimizer updates completed",
    "epochs": "epochs completed",
    "batch_in_epoch": "batches consumed since the epoch began",
    "micro_steps": "backward passes completed",
    "accumulation": "backward passes per optimizer update",
    "samples": "samples seen",
    "tokens": "tokens seen",
    "skipped_steps": "updates skipped by loss scaling",
    "loss_scale": "loss scale of the next update",
}

_EVIDENCE: Mapping[str, str] = {
    "declared": "a configuration or mapping says so",
    "named": "follows from the parameter's name",
    "matched": "follows from the layer it was matched with",
    "assumed": "by convention only; a square matrix may be the other way round",
    "unknown": "nothing in the file tells",
}

_ORDER: Mapping[str, str] = {
    "named": "by the names in the file",
    "declaration-order": "by position and shapes, in the only way that fits the model's parameters",
    "skeleton": "by the template or source spec",
    "unknown": "not yet: nothing in the file tells which state is of which parameter",
}


def _origin(fact: Known) -> str:
    if fact.status == "recorded":
        return f"recorded in {clean(fact.source)}" if fact.source else "recorded"
    if fact.status == "derived":
        formula = f": {clean(fact.formula)}" if fact.formula else ""
        return f"derived from {clean(fact.source)}{formula}" if fact.source else f"derived{formula}"
    return f"supplied by {clean(fact.source)}" if fact.source else "supplied"


def _unknown(name: str, fact: Unknown) -> str:
    text = clean(fact.reason)
    if not fact.candidates:
        return text
    readings = " or ".join(
        f"{value_text(c.value)} ({clean(c.source)}: {clean(c.condition)})" for c in fact.candidates
    )
    return f"{text}; it may be {readings}. Settle it with --set {name}=N"


def _fact(name: str, fact: Fact, gloss: str = "") -> tuple[Text, Text]:
    """(value, explanation) of a fact."""
    match fact:
        case Known():
            note = f"{gloss}; {_origin(fact)}" if gloss else _origin(fact)
            return Text(value_text(fact.value), style="bold green"), Text(note)
        case Unknown():
            return Text("unknown", style="bold yellow"), Text(_unknown(name, fact))
        case Absent():
            return Text("not in use", style="dim"), Text(clean(fact.reason))


def _short(name: str, fact: Fact) -> str:
    """A fact in a list of hyperparameters; only what is not simply recorded says where it is from."""
    match fact:
        case Known(status="recorded"):
            return f"{name} {value_text(fact.value)}"
        case Known():
            return f"{name} {value_text(fact.value)} ({_origin(fact)})"
        case Unknown():
            return f"{name} unknown ({_unknown(name, fact)})"
        case Absent():
            return f"{name} not in use"


def inspect_view(checkpoint: Checkpoint, *, path: str, all_params: bool = False) -> list[View]:
    """What a checkpoint is: progress first, then optimizers, schedules, parameters, and what is odd."""
    views: list[View] = [*_title(checkpoint, path), Text(), *_progress(checkpoint)]
    for optimizer in checkpoint.optimizers:
        views += [Text(), *_optimizer(optimizer, checkpoint, all_groups=all_params)]
    for schedule in checkpoint.schedules:
        views += [Text(), *_schedule(schedule)]
    if not checkpoint.optimizers:
        views += [Text(), Text("No optimizer state: weights only.")]
    views += [Text(), *_params(checkpoint, all_params=all_params)]
    views += _also(checkpoint)
    if checkpoint.oddities:
        views += [Text(), heading("Worth knowing")]
        views.append(_bullets(checkpoint.oddities))
    return views


def _bullets(sentences: Iterable[str]) -> Rows:
    rows = Rows(styles=("", ""), indent=2, whole=frozenset({0}))
    for sentence in sentences:
        rows.add("-", clean(sentence))
    return rows


def _title(checkpoint: Checkpoint, path: str) -> list[View]:
    origin = checkpoint.provenance
    what = "training run" if checkpoint.optimizers else "weights"
    if checkpoint.is_skeleton:
        what = f"skeleton of a {what}" if checkpoint.optimizers else "skeleton of weights"
    name = Text.assemble((clean(path), "bold"), f": {what}")
    rows: list[tuple[str, str | Text]] = []
    if origin.format:
        dialect = f", dialect {clean(origin.dialect)}" if origin.dialect else ""
        evidence = f" ({clean(origin.evidence)})" if origin.evidence else ""
        rows.append(("format", f"{clean(origin.format)}{dialect}{evidence}"))
    if origin.producer:
        rows.append(("written by", clean(origin.producer)))
    if origin.history:
        rows.append(("history", "; ".join(clean(line) for line in origin.history)))
    return [name, fields(rows)] if rows else [name]


def _progress(checkpoint: Checkpoint) -> list[View]:
    rows = Rows(styles=("cyan", "", ""), indent=2, whole=frozenset({0, 1}))
    silent = []
    for name in PROGRESS_FIELDS:
        fact: Fact = getattr(checkpoint.progress, name)
        if fact == NOT_RECORDED:
            silent.append(name)
            continue
        rows.add(name, *_fact(name, fact, _GLOSS[name]))
    if checkpoint.loss_scaling:
        told = ", ".join(_short(name, fact) for name, fact in checkpoint.loss_scaling.items())
        rows.add("loss_scaling", "", Text(told))
    if silent:
        rows.add("the rest", "not recorded", ", ".join(silent))
    return [heading("Progress"), rows]


def _optimizer(optimizer: Optimizer, checkpoint: Checkpoint, *, all_groups: bool) -> list[View]:
    name = "" if optimizer.name == "optimizer" else f" '{clean(optimizer.name)}'"
    title = f"Optimizer{name}: {clean(optimizer.algorithm)} (as in {clean(optimizer.framework)})"
    rows: list[tuple[str, str | Text]] = []
    if optimizer.algorithm_candidates:
        rows.append(("may be", ", ".join(clean(c) for c in optimizer.algorithm_candidates)))
    value, note = _fact("step", optimizer.step)
    if optimizer.step == checkpoint.progress.step:
        note = Text("that of the run, see above")
    rows.append(("step", Text.assemble(value, "  ", note)))
    steps = Counter(optimizer.param_steps.values())
    if len(steps) > 1:
        spread = ", ".join(f"{step} ({count(n, 'parameter')})" for step, n in sorted(steps.items()))
        rows.append(("steps differ", spread))
    if optimizer.form:
        rows.append(("update rule", ", ".join(f"{clean(k)} {clean(v)}" for k, v in optimizer.form.items())))
    rows += [(_short_label(i, optimizer), text) for i, text in _groups(optimizer, all_groups=all_groups)]
    covered = len(optimizer.params) or len(checkpoint.params)
    for slot, by_param in optimizer.slots.items():
        rows.append(("state", f"{clean(slot)} for {len(by_param):,} of {count(covered, 'parameter')}"))
    if not optimizer.slots:
        rows.append(("state", "no per-parameter arrays"))
    for key, fact in optimizer.scalars.items():
        rows.append(("number", _short(clean(key), fact)))
    if optimizer.params:
        rows.append(("matched", f"{_ORDER[optimizer.param_order]}"))
    return [heading(title), fields(rows)]


def _short_label(index: int, optimizer: Optimizer) -> str:
    if index < 0:
        return ""
    return "settings" if len(optimizer.groups) == 1 else f"group {index}"


def _groups(optimizer: Optimizer, *, all_groups: bool) -> list[tuple[int, str]]:
    shown = optimizer.groups if all_groups else optimizer.groups[:LISTED]
    lines = []
    for index, group in enumerate(shown):
        settings = ", ".join(_short(clean(k), fact) for k, fact in _by_interest(group.hyperparameters))
        lines.append(
            (index, f"{count(len(group.params), 'parameter')}; {settings or 'no settings recorded'}")
        )
    hidden = len(optimizer.groups) - len(shown)
    if hidden:
        lines.append((-1, f"... and {count(hidden, 'more group')}: --tensors shows all"))
    return lines


def _by_interest(hyperparameters: Mapping[str, Fact]) -> list[tuple[str, Fact]]:
    """The learning rate first, then as recorded."""
    return sorted(hyperparameters.items(), key=lambda item: item[0] != "learning_rate")


def _counted_in(unit: str) -> str:
    return "in a unit that the file does not tell" if unit == "unknown" else f"counted in {unit}s"


def _of_schedule(name: str, fact: Fact, *, origin: bool) -> str:
    """A setting of a schedule; its family is its name, and a table is told by its length."""
    value = value_of(fact)
    if name == "family":
        return clean(str(value))
    if isinstance(value, tuple) and len(value) > LISTED:
        return f"{clean(name)} {len(value)} numbers"
    if isinstance(fact, Known) and not origin:
        return f"{clean(name)} {value_text(fact.value)}"
    return _short(clean(name), fact)


def _schedule(schedule: Schedule) -> list[View]:
    value, note = _fact("position", schedule.position, _counted_in(schedule.unit))
    rows: list[tuple[str, str | Text]] = [("position", Text.assemble(value, "  ", note))]
    known = [fact for fact in schedule.parameters.values() if isinstance(fact, Known)]
    origins = {_origin(fact) for fact in known if fact.status != "recorded"}
    shared = origins.pop() if len(origins) == 1 and len(known) > 1 else ""
    told = dict[str, list[tuple[str, Fact]]]()
    for name, fact in schedule.parameters.items():
        part, dot, own = name.partition(".")
        place = part if dot and part.isdigit() else ""
        told.setdefault(place, []).append((own if place else name, fact))
    for place, facts in told.items():
        label = f"part {place}" if place else "settings"
        rows.append((label, ", ".join(_of_schedule(name, fact, origin=not shared) for name, fact in facts)))
    if shared:
        rows.append(("origin", shared))
    rows.append(("drives", clean(schedule.optimizer)))
    return [heading(f"Schedule '{clean(schedule.name)}': {clean(schedule.family)}"), fields(rows)]


def _params(checkpoint: Checkpoint, *, all_params: bool) -> list[View]:
    params = list(checkpoint.params.values())
    if not params:
        return [Text("No parameters.")]
    shown = params if all_params or len(params) <= TABLE_ROWS else params[:TABLE_ROWS]
    rows = Rows(
        titles=("parameter", "layer", "role", "axes and sizes", "dtype", "trained", "axes are"),
        styles=("cyan", "", "", "", "", "", ""),
        whole=frozenset({5, 6}),
    )
    for param in shown:
        rows.add(*_param_row(param))
    views: list[View] = [heading("Parameters"), rows]
    if len(shown) < len(params):
        views.append(Text(f"... and {len(params) - len(shown):,} more: --tensors shows all"))
    views.append(Text(_total(checkpoint)))
    evidence = dict.fromkeys(param.evidence for param in params)
    views += [Text(f"axes {name}: {_EVIDENCE[name]}.", style="dim") for name in evidence]
    return views


def _param_row(param: Param) -> tuple[str, ...]:
    tied = f" (tied to {clean(param.tied_to)})" if param.tied_to else ""
    trained = {True: "yes", False: "no", None: "?"}[param.trainable]
    unknown = {"unknown": "?"}
    return (
        f"{clean(param.name)}{tied}",
        unknown.get(param.layer, clean(param.layer)),
        unknown.get(param.role, clean(param.role)),
        shape_text(param.tensor.shape, param.axes),
        param.tensor.dtype.name,
        trained,
        param.evidence,
    )


def _total(checkpoint: Checkpoint) -> str:
    """Counts of parameters and state; what is tied is counted once."""
    own = [param.tensor.spec for param in checkpoint.params.values() if param.tied_to is None]
    tied = len(checkpoint.params) - len(own)
    parts = [
        count(len(checkpoint.params), "parameter") + (f" ({tied:,} tied)" if tied else ""),
        count(sum(spec.numel for spec in own), "element"),
        size(sum(spec.nbytes for spec in own)),
    ]
    slots = [
        tensor.spec
        for optimizer in checkpoint.optimizers
        for by_param in optimizer.slots.values()
        for tensor in by_param.values()
    ]
    if slots:
        parts.append(f"and {size(sum(spec.nbytes for spec in slots))} of optimizer state")
    return "Total: " + ", ".join(parts) + "."


def _also(checkpoint: Checkpoint) -> list[View]:
    rows: list[tuple[str, str | Text]] = [
        ("random state", f"{clean(block.name)} ({block.library}); stays in its framework")
        for block in checkpoint.rng
    ]
    rows += [("data loader", f"{clean(block.name)} ({block.library})") for block in checkpoint.data]
    for kind in dict.fromkeys(block.library for block in checkpoint.described):
        names = [block.name for block in checkpoint.described if block.library == kind]
        rows.append((clean(kind), f"{listed(names)}; no plain array: another kind of file cannot hold it"))
    owned = {
        name for block in (*checkpoint.rng, *checkpoint.data, *checkpoint.described) for name in block.tensors
    }
    others = [key for key in checkpoint.extras if key not in owned]
    if others:
        rows.append(("other arrays", listed(others)))
    return [Text(), heading("Also in the file"), fields(rows)] if rows else []
