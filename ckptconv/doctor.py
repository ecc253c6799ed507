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
from ckptconv.document import Absent, Checkpoint, Fact, Known, Optimizer, Unknown, value_of
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
_OF_TORCH = ("pytorch", "dcp", "safetensors")
"""Formats whose weights are laid out as PyTorch has them."""
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
    steps = (checkpoint.progress.step, *(o.step for o in checkpoint.optimizers if not o.param_steps))
    unknown = any(isinstance(step, Unknown) for step in steps)
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
        setting, meaning = _told_step(checkpoint)
        yield Mend(
            text="To say it once and keep the result. "
            f"{meaning} A log, a file name, or updates per epoch times epochs may tell it:",
            command=named.command(
                "convert", f"{named.path.name}.neutral", more=("--to", "neutral", "--set", setting)
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
    if untold := tuple(_untold(checkpoint, recipe.framework)):
        adapter = "pytorch" if checkpoint.provenance.format in _OF_TORCH else "keras"
        code = (*(line.format(adapter=adapter) for line in _DESCRIBED), *code)
        arguments += ["--source-spec", "described.json"]
        notes.append(f"The program that wrote the file has to describe {' and '.join(untold)}.")
    if any(len(optimizer.groups) > 1 for optimizer in checkpoint.optimizers):
        notes.append("Give its optimizer the same groups of parameters.")
    if any(map(_lacks_rate, checkpoint.optimizers)):
        arguments += ["--set", "learning_rate=RATE"]
        notes.append("RATE is the learning rate, which the file does not tell.")
    if classes := _classes(checkpoint):
        arguments += ["--set", "optimizer=CLASS"]
        notes.append(f"CLASS is the optimizer, which the file does not tell: {' or '.join(classes)}.")
    if unknown:
        setting, meaning = _told_step(checkpoint)
        arguments += ["--set", setting]
        notes.append(meaning)
    if recipe.framework != "torch" and any(map(_decays_in_the_gradient, checkpoint.optimizers)):
        arguments += ["--allow", "form-mismatch"]
        notes.append("Weight decay becomes a regularizer of the layers, as the conversion prints it.")
    if any("moving_average" in optimizer.slots for optimizer in checkpoint.optimizers):
        arguments += ["--allow", "state-dropped"]
        notes.append("Leave --allow state-dropped out if the new optimizer averages the weights, too.")
    if recipe.framework != "torch" and any(map(_has_several_rates, checkpoint.optimizers)):
        arguments += ["--allow", "groups-differ"]
        notes.append("Keras has one learning rate for all parameters: that of the first group is taken.")
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


def _untold(checkpoint: Checkpoint, framework: str) -> Iterator[str]:
    """What a conversion into a framework needs to know and the file does not tell."""
    if any(optimizer.param_order == "unknown" and optimizer.slots for optimizer in checkpoint.optimizers):
        yield "which state belongs to which weight"
    kernels = [p for p in checkpoint.params.values() if p.role == "kernel" and not p.axes]
    square = [p for p in kernels if len(p.tensor.shape) == 2 and p.tensor.shape[0] > 1]
    if checkpoint.provenance.format in _OF_TORCH and framework != "torch" and square:
        yield "which side of a square weight is its input"


def _lacks_rate(optimizer: Optimizer) -> bool:
    """Whether a momentum may have to be rescaled by a learning rate that is not there."""
    return "momentum" in optimizer.slots and not any(
        "learning_rate" in group.hyperparameters for group in optimizer.groups
    )


def _has_several_rates(optimizer: Optimizer) -> bool:
    rates = (value_of(group.hyperparameters.get("learning_rate")) for group in optimizer.groups)
    return len(set(rates)) > 1


def _decays_in_the_gradient(optimizer: Optimizer) -> bool:
    decays = (value_of(group.hyperparameters.get("weight_decay")) for group in optimizer.groups)
    return optimizer.form.get("weight_decay") == "coupled" and any(decays)


def _told_step(checkpoint: Checkpoint) -> tuple[str, str]:
    """How the caller says a step that the file does not tell, and what that means."""
    progress = checkpoint.progress
    if isinstance(progress.micro_steps, Known) and isinstance(progress.accumulation, Unknown):
        return "accumulation=B", "B is the number of batches per update (gradient_accumulation_steps)."
    facts = (progress.step, *(optimizer.step for optimizer in checkpoint.optimizers))
    hints = [hint for fact in facts if isinstance(fact, Unknown) for hint in fact.candidates]
    maybe = " or ".join(dict.fromkeys(f"{hint.value} if {hint.condition}" for hint in hints))
    return "step=N", f"N is the number of updates that were done{maybe and f', perhaps {maybe}'}."


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
