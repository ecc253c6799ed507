"""Where the step of a checkpoint is, which restore would lose it, why, and what mends that."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ckptconv.catalog.restores import (
    Restore,
    kind_of_file,
    unmeasured,
)
from ckptconv.complaints import complaints
from ckptconv.detect import PathLike, choose, open_chosen
from ckptconv.dialects.graph_bundle import graph_of_bytes
from ckptconv.dialects.graph_export import lists_of_export
from ckptconv.dialects.keras_optimizers import has_unlisted_slots, is_bare_counter, optimizer_nodes
from ckptconv.dialects.object_paths import Graph
from ckptconv.document import Absent, Checkpoint, Fact, Known
from ckptconv.facts import fact_to_json
from ckptconv.formats.bundle_path import is_saved_model
from ckptconv.formats.object_graph import OBJECT_GRAPH_KEY
from ckptconv.formats.table import FORMATS
from ckptconv.formats.weights_shards import index_of
from ckptconv.mends import Mend, Named, mends, options
from ckptconv.note import SOURCE as NOTE
from ckptconv.rawtree import DictNode, Lifted, walk
from ckptconv.report import REPORT_VERSION
from ckptconv.skeleton import is_skeleton_file
from ckptconv.strictjson import Json

_LAYERS = ("layer-", "layer_with_weights-", "_layers", "_operations", "_functional")
"""Edges that only a model has."""


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
        mends=tuple(mends(checkpoint, kind, Named(choice.path, options(format, dialect, choice.names)))),
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
    """What tells it from other files of its dialect, as in `KindOfFile.variants`."""
    match container:
        case "tensorflow":
            return _saved_model(checkpoint) if is_saved_model(path) else _root(checkpoint)
        case "weights-h5":
            return "shards" if index_of(path) is not None else None
        case "dcp" if checkpoint.optimizers and checkpoint.provenance.dialect == "plain":
            return "by-name" if _goes_by_name(checkpoint) else "by-number"
        case "pytorch" if _has_texts_for_numbers(checkpoint):
            return "texts"
    return None


def _root(checkpoint: Checkpoint) -> str | None:
    """What the object graph begins with, or what is odd about its optimizer."""
    graph = _graph(checkpoint)
    if graph is None:
        return None
    if any(edge.startswith(_LAYERS) for edge in graph.edges(0)):
        return "model"
    for node in optimizer_nodes(graph):
        if is_bare_counter(graph, node):
            return "counter"
        if has_unlisted_slots(graph, node):
            return "unlisted"
    return "checkpoint"


def _saved_model(checkpoint: Checkpoint) -> str:
    """Whether a SavedModel is a model, or lists of variables for inference alone."""
    graph = _graph(checkpoint)
    return "export" if graph is not None and lists_of_export(graph) else "saved-model"


def _graph(checkpoint: Checkpoint) -> Graph | None:
    residue = checkpoint.residue
    data = residue.root.get(OBJECT_GRAPH_KEY) if residue and isinstance(residue.root, DictNode) else None
    return graph_of_bytes(data) if isinstance(data, bytes) else None


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


def said(fact: Fact) -> str:
    """Whether a step is in the file, in a sentence."""
    if isinstance(fact, Known):
        if fact.status == "derived":
            return f"Not as a number, but it follows from what is there: {fact.value} ({fact.formula})."
        if fact.status == "supplied":
            return f"Not in the file's own content, but beside it: {fact.value}, from {fact.source}."
        if fact.source == NOTE:
            return f"Yes: {fact.value}, in the note of ckptconv that is in it, which no framework reads."
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
