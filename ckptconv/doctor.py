"""Where the step of a checkpoint is, which restore would lose it, why, and what mends that."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ckptconv.catalog.restores import KindOfFile, Restore, kind_of_file, recipe_for
from ckptconv.detect import PathLike, open
from ckptconv.dialects.graph_bundle import graph_of_bytes
from ckptconv.document import Absent, Checkpoint, Fact, Known, Optimizer, Unknown
from ckptconv.facts import fact_to_json
from ckptconv.formats.object_graph import OBJECT_GRAPH_KEY
from ckptconv.rawtree import DictNode
from ckptconv.report import REPORT_VERSION
from ckptconv.strictjson import Json

_LAYERS = ("layer-", "layer_with_weights-", "_layers", "_operations", "_functional")
"""Edges that only a model has."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Mend:
    """Something to do about it."""

    text: str
    command: str = ""
    code: tuple[str, ...] = ()
    """Python that has to run before the command."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Diagnosis:
    """What is found."""

    source: str
    what: str
    """What kind of file it is, in words."""
    dialect: str
    """`format:dialect`."""
    step: Fact
    steps: tuple[tuple[str, Fact], ...]
    """Of each optimizer, where there are several."""
    restores: tuple[Restore, ...]
    findings: tuple[str, ...]
    """What may go wrong with this file whoever restores it."""
    mends: tuple[Mend, ...]


def diagnose(
    path: PathLike, *, format: str | None = None, dialect: str | None = None, select: Sequence[str] = ()
) -> Diagnosis:
    """Look at a checkpoint and say what becomes of its step.

    I/O: reads headers, indexes and counters only.
    Raises: as `open`.
    """
    checkpoint = open(path, format=format, dialect=dialect, select=select)
    provenance, optimizers = checkpoint.provenance, checkpoint.optimizers
    kind = kind_of_file(
        provenance.format,
        provenance.dialect,
        root=_root(checkpoint),
        optimizer=bool(optimizers),
        step=any(_is_told(optimizer.step) for optimizer in optimizers),
    )
    several = len(optimizers) > 1
    return Diagnosis(
        source=str(path),
        what=kind.what if kind is not None else _in_words(checkpoint),
        dialect=f"{provenance.format}:{provenance.dialect}",
        step=checkpoint.progress.step,
        steps=tuple((optimizer.name, optimizer.step) for optimizer in optimizers) if several else (),
        restores=kind.restores if kind is not None else (),
        findings=tuple(_findings(checkpoint)),
        mends=tuple(_mends(checkpoint, kind, str(path))),
    )


def _is_told(step: Fact) -> bool:
    """Whether the file itself has it: what an embedded note or the caller says, no framework restores."""
    return isinstance(step, Known) and step.status != "supplied"


def _root(checkpoint: Checkpoint) -> str | None:
    """Whether the root of the object graph is a model or a checkpoint of named objects."""
    residue = checkpoint.residue
    data = residue.root.get(OBJECT_GRAPH_KEY) if residue and isinstance(residue.root, DictNode) else None
    if not isinstance(data, bytes):
        return None
    edges = graph_of_bytes(data).edges(0)
    return "model" if any(edge.startswith(_LAYERS) for edge in edges) else "checkpoint"


def _in_words(checkpoint: Checkpoint) -> str:
    kind = "a training run" if checkpoint.optimizers else "weights without an optimizer"
    return f"{kind} ({checkpoint.provenance.evidence})" if checkpoint.provenance.evidence else kind


def _findings(checkpoint: Checkpoint) -> list[str]:
    found: list[str] = []
    progress, optimizers = checkpoint.progress, checkpoint.optimizers
    if not optimizers:
        found.append("There is no optimizer in the file: whoever goes on from it starts its moments at zero.")
    for optimizer in optimizers:
        found += _of_optimizer(optimizer)
    if isinstance(progress.epochs, Unknown) and progress.epochs.candidates:
        readings = " or ".join(f"{c.value} ({c.condition})" for c in progress.epochs.candidates)
        found.append(
            f"How many epochs are done is ambiguous: {readings}. Whoever starts the loop at the wrong one "
            "repeats an epoch or leaves one out."
        )
    for schedule in checkpoint.schedules:
        position = schedule.position
        if isinstance(position, Unknown):
            found.append(f"Where the learning-rate schedule stands is not in the file: {position.reason}.")
        elif checkpoint.provenance.format == "pytorch":
            found.append(
                "The learning-rate schedule has a counter of its own, in the scheduler's state: without "
                "scheduler.load_state_dict(...) it starts over, whatever the optimizer's step is."
            )
    return [*found, *checkpoint.oddities]


def _of_optimizer(optimizer: Optimizer) -> list[str]:
    found = []
    if optimizer.param_order == "declaration-order":
        found.append(
            f"The state of '{optimizer.name}' is kept by position, without names: it is right only for an "
            "optimizer that gets the same parameters in the same order. torch checks neither."
        )
    if optimizer.param_order == "unknown":
        found.append(f"Which parameter each state of '{optimizer.name}' belongs to is not in the file.")
    if optimizer.param_steps:
        low, high = min(optimizer.param_steps.values()), max(optimizer.param_steps.values())
        found.append(
            f"The parameters of '{optimizer.name}' have had {low} to {high} updates, not all the same."
        )
    return found


def _mends(checkpoint: Checkpoint, kind: KindOfFile | None, path: str) -> list[Mend]:
    mends = []
    best = (
        next((r for r in kind.restores if r.step == r.weights == r.state == "restored"), None)
        if kind
        else None
    )
    if best is not None:
        mends.append(Mend(text=f"In {best.framework}, this call brings all of it back.", command=best.call))
    unknown = isinstance(checkpoint.progress.step, Unknown)
    for framework in kind.goes_on_in if kind is not None else ():
        recipe = recipe_for(framework)
        command = f"ckptconv convert {shlex.quote(path)} {recipe.target} --template {recipe.template}"
        mends.append(
            Mend(
                text=f"To go on in {recipe.label}: save a fresh model and optimizer once, then convert.",
                code=recipe.code,
                command=f"mkdir -p {recipe.directory} && {command}{' --set step=N' if unknown else ''}",
            )
        )
    if unknown:
        mends.append(
            Mend(
                text="The step is not in the file. If you know it (from a log, a file name, or updates per "
                "epoch times epochs), say it once and keep the result.",
                command=f"ckptconv convert {shlex.quote(path)} {shlex.quote(Path(path).name)}.neutral "
                "--to neutral --set step=N",
            )
        )
    return mends


def said(fact: Fact) -> str:
    """Whether a step is in the file, in a sentence."""
    if isinstance(fact, Known):
        if fact.status == "derived":
            return f"It is not in the file as a number, but follows from it: {fact.value} ({fact.formula})."
        if fact.status == "supplied":
            return f"The file tells it beside its own content: {fact.value}, in {fact.source}."
        return f"It is in the file: {fact.value}, under the name {fact.source}."
    if isinstance(fact, Absent):
        return f"There is none: {fact.reason}." if fact.reason else "There is none."
    readings = [f"{c.value} ({c.source}: {c.condition})" for c in fact.candidates]
    maybe = f" It may be {' or '.join(readings)}." if readings else ""
    return f"It is not in the file: {fact.reason}.{maybe}"


def to_json(diagnosis: Diagnosis) -> dict[str, Json]:
    """The diagnosis, valid against the definition `diagnosis` of the report schema."""
    return {
        "schema": "ckptconv/diagnosis",
        "schema_version": REPORT_VERSION,
        "source": diagnosis.source,
        "what": diagnosis.what,
        "dialect": diagnosis.dialect,
        "step": fact_to_json(diagnosis.step),
        "steps": {name: fact_to_json(step) for name, step in diagnosis.steps},
        "restores": [
            {
                "framework": restore.framework,
                "call": restore.call,
                "step": restore.step,
                "weights": restore.weights,
                "state": restore.state,
                "signal": restore.signal,
                "why": restore.why,
            }
            for restore in diagnosis.restores
        ],
        "findings": list(diagnosis.findings),
        "mends": [
            {"text": mend.text, "code": list(mend.code), "command": mend.command} for mend in diagnosis.mends
        ],
    }
