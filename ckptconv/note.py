"""The embedded note: one JSON text in every container we write, with what the container cannot hold itself.

It tells progress, algorithms, groups, hyperparameters, steps, schedules, tie groups and provenance; never a
tensor. Its form is the definition `note` of the checkpoint schema. Where it stands: safetensors
`__metadata__["ckptconv"]`, a string key of a bundle or training dictionary, an HDF5 attribute.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from ckptconv import facts
from ckptconv.document import (
    PROGRESS_FIELDS,
    SCHEMA_VERSION,
    Candidate,
    Checkpoint,
    Fact,
    Known,
    Optimizer,
    Param,
    Progress,
    Provenance,
    Schedule,
    Unknown,
    value_of,
)
from ckptconv.errors import Problem, SchemaError
from ckptconv.manifest import (
    progress_from_json,
    progress_to_json,
    provenance_from_json,
    provenance_to_json,
    schedule_from_json,
    schedule_to_json,
)
from ckptconv.optimizer_json import optimizer_from_json, optimizer_to_json
from ckptconv.rawtree import Path
from ckptconv.strictjson import Json, dump, parse
from ckptconv.tensor import TensorRef, TensorSpec
from ckptconv.validation import validate_note

KEY = "ckptconv"
"""Under which the note stands, wherever the container lets us choose."""

EXTENSION = "ckptconv/note"
"""Under which a document that is about to be written carries its note's text, for the dialect to place."""

SOURCE = "embedded note"
"""What `Known.source` says of a fact that was read from a note."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Note:
    """What a note tells. Facts keep the status they had; their source is `embedded note`."""

    progress: Progress
    optimizers: tuple[Optimizer, ...] = ()
    """Without tensors: `slots` is empty, `noted_slots` has the names."""
    noted_slots: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Optimizer -> the slots that the run had, whether or not the container holds them."""
    schedules: tuple[Schedule, ...] = ()
    loss_scaling: Mapping[str, Fact] = field(default_factory=dict)
    ties: Mapping[str, str] = field(default_factory=dict)
    """Parameter -> the first of its tie group."""
    provenance: Provenance = field(default_factory=Provenance)


def write_note(checkpoint: Checkpoint) -> str:
    """The note of a document, under the document's own names."""
    ties = {p.name: p.tied_to for p in checkpoint.params.values() if p.tied_to is not None}
    return dump(
        {
            "schema": "ckptconv/note",
            "schema_version": SCHEMA_VERSION,
            "progress": progress_to_json(checkpoint.progress),
            "optimizers": [_optimizer(optimizer, checkpoint) for optimizer in checkpoint.optimizers],
            "schedules": [schedule_to_json(schedule) for schedule in checkpoint.schedules],
            **(
                {"loss_scaling": facts.facts_to_json(checkpoint.loss_scaling)}
                if checkpoint.loss_scaling
                else {}
            ),
            "ties": ties,
            "provenance": provenance_to_json(checkpoint.provenance),
        }
    )


def _optimizer(optimizer: Optimizer, checkpoint: Checkpoint) -> dict[str, Json]:
    """The optimizer's JSON; its slots by name only."""
    result = optimizer_to_json(replace(optimizer, slots={}), checkpoint)
    result["slots"] = [{"slot": slot, "params": []} for slot in optimizer.slots]
    return result


def read_note(text: str, location: str = KEY) -> Note:
    """What a note tells; `location` is where it was found, for messages.

    Raises: corrupt-file, duplicate-key, schema-version, schema-invalid; the note's problems are located
    below `location`.
    """
    obj = parse(text, location)
    version = obj.get("schema_version") if isinstance(obj, dict) else None
    if version != SCHEMA_VERSION and isinstance(version, str):
        raise SchemaError.of(
            "schema-version",
            f"the embedded note has version {version!r}, known is {SCHEMA_VERSION}",
            "Update ckptconv.",
            loc=(location, "schema_version"),
        )
    problems = validate_note(obj)
    if problems:
        raise SchemaError(*(_below(location, problem) for problem in problems))
    progress = progress_from_json(obj["progress"])
    bare = [{**item, "slots": []} for item in obj["optimizers"]]
    optimizers = tuple(optimizer_from_json(item, progress, {}, _no_tensor) for item in bare)
    return Note(
        progress=replace(progress, **{f: _noted(getattr(progress, f)) for f in PROGRESS_FIELDS}),
        optimizers=tuple(_noted_optimizer(optimizer) for optimizer in optimizers),
        noted_slots={o["name"]: tuple(slot["slot"] for slot in o["slots"]) for o in obj["optimizers"]},
        schedules=tuple(_noted_schedule(schedule_from_json(item)) for item in obj["schedules"]),
        loss_scaling=_noted_facts(facts.facts_from_json(obj.get("loss_scaling", {}))),
        ties=dict(obj["ties"]),
        provenance=provenance_from_json(obj["provenance"]),
    )


def settled(native: Progress, note: Note) -> tuple[Progress, tuple[str, ...]]:
    """A file's own progress completed from its note, or what makes the note stale.

    What the file records wins. A note that contradicts it anywhere is of an earlier state of the run (the
    file was saved again by code that carried the note along): nothing is taken from it, and its values are
    candidates of what the file leaves unknown.
    """
    stale = contradictions(native, note)
    facts: dict[str, Fact] = {}
    for name in PROGRESS_FIELDS:
        own, noted = getattr(native, name), getattr(note.progress, name)
        if not isinstance(noted, Known) or isinstance(own, Known):
            continue
        if not stale:
            facts[name] = noted
        elif isinstance(own, Unknown):
            old = Candidate(value=noted.value, source=SOURCE, condition="the run has not moved on since")
            facts[name] = replace(own, candidates=(*own.candidates, old))
    return replace(native, **facts), tuple(problem.message for problem in stale)


def contradictions(native: Progress, note: Note) -> list[Problem]:
    """Where a file's own progress rules out what its note says."""
    problems = []
    for name in PROGRESS_FIELDS:
        own, noted = getattr(native, name), getattr(note.progress, name)
        if not isinstance(noted, Known):
            continue
        if isinstance(own, Known):
            said = [own.value]
        else:
            candidates = own.candidates if isinstance(own, Unknown) else ()
            said = [candidate.value for candidate in candidates if candidate.source != SOURCE]
        if said and noted.value not in said:
            there = " or ".join(str(value) for value in said)
            problems.append(
                Problem(
                    code="progress-conflict",
                    loc=("progress", name),
                    message=f"the embedded note says {name} {noted.value}, the file itself {there}: the file "
                    "was saved again after the note was written, so nothing is taken from the note",
                    hint="Convert it, which writes a new note, or leave the note's key out when saving.",
                )
            )
    return problems


def current_note(checkpoint: Checkpoint, own: str | None, *, untold: bool) -> str | None:
    """The note to write into a file whose own note is `own`.

    The file's own is brought up to date where progress was edited; one that a conversion brings is written as
    it is; and a new one where the document has what the file cannot tell (`untold`).
    """
    text = checkpoint.extensions.get(EXTENSION)
    if not isinstance(text, str):
        return write_note(checkpoint) if untold else None
    if text != own:
        return text
    stated, now = read_note(text).progress, checkpoint.progress
    same = all(value_of(getattr(now, f)) in (None, value_of(getattr(stated, f))) for f in PROGRESS_FIELDS)
    return text if same else edit_note(text, checkpoint)


def edit_note(text: str, checkpoint: Checkpoint) -> str:
    """The note `text` brought up to date with a document that was lifted with it and may have been edited.

    What the document does not hold (optimizers of a weights-only container) stays as it was.
    """
    note = read_note(text)
    ties = {p.name: p.tied_to for p in checkpoint.params.values() if p.tied_to is not None}
    if checkpoint.progress == note.progress and ties == note.ties:
        return text
    old = parse(text, KEY)
    fields = {
        name: facts.fact_to_json(getattr(checkpoint.progress, name))
        if _edited(getattr(note.progress, name), getattr(checkpoint.progress, name))
        else old["progress"][name]
        for name in PROGRESS_FIELDS
    }
    return dump({**old, "progress": fields, "ties": ties})


def _edited(noted: Fact, now: Fact) -> bool:
    """Whether the document tells another value, or none where the note has one.

    Why neither of them knows a value is told by the note: it is of the run that was converted.
    """
    return value_of(noted) != value_of(now)


def _below(location: str, problem: Problem) -> Problem:
    return replace(problem, loc=(location, *problem.loc))


def _no_tensor(address: Path, spec: TensorSpec) -> TensorRef:
    raise AssertionError("a note has no slots")


def _noted(fact: Fact) -> Fact:
    return replace(fact, source=SOURCE) if isinstance(fact, Known) else fact


def _noted_facts(by_name: Mapping[str, Fact]) -> dict[str, Fact]:
    return {name: _noted(fact) for name, fact in by_name.items()}


def _noted_optimizer(optimizer: Optimizer) -> Optimizer:
    groups = tuple(replace(g, hyperparameters=_noted_facts(g.hyperparameters)) for g in optimizer.groups)
    return replace(
        optimizer, step=_noted(optimizer.step), groups=groups, scalars=_noted_facts(optimizer.scalars)
    )


def _noted_schedule(schedule: Schedule) -> Schedule:
    return replace(schedule, position=_noted(schedule.position), parameters=_noted_facts(schedule.parameters))


def tied(params: Mapping[str, Param], ties: Mapping[str, str]) -> dict[str, Param]:
    """The parameters, tied as a note says where both names are there and neither tie is known yet."""
    return {
        name: replace(param, tied_to=ties[name])
        if param.tied_to is None and ties.get(name) in params and params[ties[name]].tied_to is None
        else param
        for name, param in params.items()
    }
