"""Where the step of a checkpoint is, which restore would lose it, why, and what mends that."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from ckptconv.catalog.restores import (
    KindOfFile,
    Restore,
    TemplateRecipe,
    frameworks,
    kind_of_file,
    recipe_for,
    unmeasured,
)
from ckptconv.complaints import complaints
from ckptconv.detect import PathLike, choose, open_chosen
from ckptconv.dialects.graph_bundle import graph_of_bytes
from ckptconv.document import Absent, Checkpoint, Fact, Known, Unknown
from ckptconv.facts import fact_to_json
from ckptconv.formats.bundle_path import is_saved_model, locate
from ckptconv.formats.object_graph import OBJECT_GRAPH_KEY
from ckptconv.formats.table import FORMATS
from ckptconv.formats.weights_shards import index_of
from ckptconv.rawtree import DictNode, Lifted, walk
from ckptconv.report import REPORT_VERSION
from ckptconv.skeleton import is_skeleton_file
from ckptconv.strictjson import Json

_DESCRIBED = (
    "# in the program that wrote the checkpoint, with its model and optimizer:",
    'ckptconv.write_skeleton(ckptconv.{adapter}.describe(model, optimizer), "described.json")',
    "# in the program that goes on:",
)
_LAYERS = ("layer-", "layer_with_weights-", "_layers", "_operations", "_functional")
"""Edges that only a model has."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Mend:
    """Something to do about it: lines of Python, then a command, or one of both."""

    text: str
    code: tuple[str, ...] = ()
    command: str = ""


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
    unmeasured: str
    """Why there are no calls, where the table says so."""
    has_optimizer: bool
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
    choice = choose(path, select)
    checkpoint = open_chosen(choice, format=format, dialect=dialect)
    container, convention = _container(checkpoint, choice.path)
    optimizers = checkpoint.optimizers
    kind = kind_of_file(
        container,
        convention,
        variant=_variant(checkpoint, container, choice.path),
        optimizer=bool(optimizers),
        step=any(_is_recorded(optimizer.step) for optimizer in optimizers),
    )
    several = len(optimizers) > 1
    return Diagnosis(
        source=str(path),
        what=kind.what if kind is not None else _in_words(checkpoint),
        dialect=f"{container}:{convention}",
        step=checkpoint.progress.step,
        steps=tuple((optimizer.name, optimizer.step) for optimizer in optimizers) if several else (),
        restores=kind.restores if kind is not None else (),
        unmeasured=unmeasured().get((container, convention), "") if kind is None else "",
        has_optimizer=bool(optimizers),
        findings=complaints(checkpoint, container),
        mends=tuple(_mends(checkpoint, kind, _Named(choice.path, _options(format, dialect, choice.names)))),
    )


def _container(checkpoint: Checkpoint, path: Path) -> tuple[str, str]:
    """Format and dialect of the file itself: a document that was archived says those of its source."""
    if is_skeleton_file(path):
        return "neutral", "skeleton"
    if FORMATS["neutral"].sniff(path):
        return "neutral", "neutral"
    return checkpoint.provenance.format, checkpoint.provenance.dialect


def _is_recorded(step: Fact) -> bool:
    """Whether the file itself has the number: what a note or the caller says, no framework restores."""
    return isinstance(step, Known) and step.status == "recorded"


def _variant(checkpoint: Checkpoint, container: str, path: Path) -> str | None:
    """What tells it from other files of its dialect, as in `KindOfFile.variant`."""
    match container:
        case "tensorflow":
            return "saved-model" if is_saved_model(path) else _root(checkpoint)
        case "weights-h5":
            return "shards" if index_of(path) is not None else None
        case "dcp" if checkpoint.optimizers and checkpoint.provenance.dialect == "plain":
            return "by-name" if _goes_by_name(checkpoint) else "by-number"
        case "pytorch" if _has_texts_for_numbers(checkpoint):
            return "texts"
    return None


def _root(checkpoint: Checkpoint) -> str | None:
    """Whether the root of the object graph is a model or a checkpoint of named objects."""
    residue = checkpoint.residue
    data = residue.root.get(OBJECT_GRAPH_KEY) if residue and isinstance(residue.root, DictNode) else None
    if not isinstance(data, bytes):
        return None
    edges = graph_of_bytes(data).edges(0)
    return "model" if any(edge.startswith(_LAYERS) for edge in edges) else "checkpoint"


def _goes_by_name(checkpoint: Checkpoint) -> bool:
    """Whether the optimizer's groups list their parameters by name."""
    leaves = walk(checkpoint.residue.root) if checkpoint.residue else ()
    return any(isinstance(leaf, str) for path, leaf in leaves if len(path) > 1 and path[-2] == "params")


def _has_texts_for_numbers(checkpoint: Checkpoint) -> bool:
    """Whether the optimizer's groups list numbers and its state has texts in their place."""
    leaves = walk(checkpoint.residue.root) if checkpoint.residue else ()
    return not _goes_by_name(checkpoint) and any(
        len(path) > 2 and path[-3] == "state" and isinstance(path[-2], str) and path[-2].isdigit()
        for path, leaf in leaves
        if isinstance(leaf, Lifted)
    )


def _in_words(checkpoint: Checkpoint) -> str:
    kind = "a training run" if checkpoint.optimizers else "weights without an optimizer"
    if checkpoint.is_skeleton:
        return "the description of a training run, without its values"
    return f"{kind} ({checkpoint.provenance.evidence})" if checkpoint.provenance.evidence else kind


@dataclass(frozen=True, slots=True)
class _Named:
    """The checkpoint as a command names it."""

    path: Path
    options: tuple[str, ...]

    def command(self, name: str, *arguments: str, more: Sequence[str] = ()) -> str:
        return shlex.join(("ckptconv", name, str(self.path), *arguments, *self.options, *more))


def _options(format: str | None, dialect: str | None, names: Sequence[str]) -> tuple[str, ...]:
    """What the caller said of the source, for a command that reads it once more."""
    said = () if format is None else ("--from", format if dialect is None else f"{format}:{dialect}")
    return (*said, *(part for name in names for part in ("--select", name)))


def _mends(checkpoint: Checkpoint, kind: KindOfFile | None, named: _Named) -> Iterator[Mend]:
    best = next((restore for restore in kind.restores if restore.whole), None) if kind else None
    if best is not None:
        lines = best.call.split("; ")
        yield Mend(
            text=f"In {best.framework}, this brings all of it back:",
            code=tuple(_filled(line, _restorable(checkpoint, named.path)) for line in lines),
        )
    if checkpoint.is_skeleton:
        return
    unknown = isinstance(checkpoint.progress.step, Unknown)
    if len(checkpoint.optimizers) > 1:
        for position, optimizer in enumerate(checkpoint.optimizers):
            yield Mend(
                text=f"A conversion takes one optimizer at a time. For '{optimizer.name}':",
                command=named.command("doctor", more=("--select", f"optimizer:{position}")),
            )
        return
    for recipes in _recipes(checkpoint, kind):
        yield _conversion(recipes, checkpoint, named, unknown=unknown)
    if unknown and checkpoint.optimizers:
        yield Mend(
            text="If you know the step (from a log, a file name, or updates per epoch times epochs), say it "
            "once in place of N and keep the result:",
            command=named.command(
                "convert", f"{named.path.name}.neutral", more=("--to", "neutral", "--set", "step=N")
            ),
        )


def _filled(call: str, path: str) -> str:
    """A call with the paths of this checkpoint in place of the words that stand for them."""
    words = {"PATH": path, "FOLDER": str(Path(path).parent), "NAME": Path(path).name}
    return re.sub(r"\b(PATH|FOLDER|NAME)\b", lambda match: json.dumps(words[match[1]]), call)


def _recipes(checkpoint: Checkpoint, kind: KindOfFile | None) -> Iterator[tuple[TemplateRecipe, ...]]:
    """How the frameworks that a conversion is of use for make a template, those together that do it alike."""
    own = {optimizer.framework for optimizer in checkpoint.optimizers}
    others = tuple(name for name in frameworks() if own and name not in own)
    recipes = [recipe_for(name) for name in (others if kind is None else kind.goes_on_in)]
    for _, alike in groupby(recipes, key=lambda recipe: (recipe.target, recipe.template, recipe.code)):
        yield tuple(alike)


def _restorable(checkpoint: Checkpoint, path: Path) -> str:
    """The path that the framework's call takes."""
    if checkpoint.provenance.format == "tensorflow" and not is_saved_model(path):
        return str(locate(path).prefix)
    return str(path)


def _conversion(
    recipes: tuple[TemplateRecipe, ...], checkpoint: Checkpoint, named: _Named, *, unknown: bool
) -> Mend:
    """The lines and the command that carry the run, or its weights, into a framework."""
    recipe, labels = recipes[0], " or in ".join(recipe.label for recipe in recipes)
    code, arguments, notes = recipe.code, ["--template", recipe.template], []
    if any(optimizer.param_order == "unknown" and optimizer.slots for optimizer in checkpoint.optimizers):
        adapter = "pytorch" if checkpoint.optimizers[0].framework == "torch" else "keras"
        code = (*(line.format(adapter=adapter) for line in _DESCRIBED), *code)
        arguments += ["--source-spec", "described.json"]
        notes.append("Which state belongs to which weight, the program that wrote the file has to describe.")
    if classes := _classes(checkpoint):
        arguments += ["--set", "optimizer=CLASS"]
        notes.append(f"CLASS is the optimizer, which the file does not tell: {' or '.join(classes)}.")
    if unknown:
        arguments += ["--set", "step=N"]
        notes.append("N is the number of updates that were done.")
    if checkpoint.schedules:
        arguments += ["--allow", "schedule-unsupported"]
        notes.append("Leave --allow schedule-unsupported out if the new optimizer follows the same schedule.")
    if not checkpoint.optimizers:
        arguments += ["--allow", "slots-missing"]
        notes.append("The optimizer begins anew.")
    what = "To go on" if checkpoint.optimizers else "To use the weights"
    said = " ".join(("save a fresh model and its optimizer there once, then convert.", *notes))
    command = named.command("convert", recipe.target, more=arguments)
    return Mend(
        text=f"{what} in {labels}, {said}",
        code=code,
        command=f"mkdir -p {recipe.directory} && {command}",
    )


def _classes(checkpoint: Checkpoint) -> tuple[str, ...]:
    """The optimizers that the state may be of, where it may be of several."""
    several = (o.algorithm_candidates for o in checkpoint.optimizers if len(o.algorithm_candidates) > 1)
    return next(several, ())


def said(fact: Fact) -> str:
    """Whether a step is in the file, in a sentence."""
    if isinstance(fact, Known):
        if fact.status == "derived":
            return f"Not as a number, but it follows from what is there: {fact.value} ({fact.formula})."
        if fact.status == "supplied":
            return f"Not in the file's own content, but beside it: {fact.value}, from {fact.source}."
        return f"Yes: {fact.value}, under the name {fact.source}."
    if isinstance(fact, Absent):
        return f"There is none: {fact.reason}." if fact.reason else "There is none."
    readings = [f"{c.value} ({c.source}: {c.condition})" for c in fact.candidates]
    maybe = f" It may be {' or '.join(readings)}." if readings else ""
    return f"No: {fact.reason}.{maybe}"


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
                "source": restore.source,
            }
            for restore in diagnosis.restores
        ],
        "unmeasured": diagnosis.unmeasured,
        "findings": list(diagnosis.findings),
        "mends": [
            {"text": mend.text, "code": list(mend.code), "command": mend.command} for mend in diagnosis.mends
        ],
    }
