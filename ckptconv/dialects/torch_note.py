"""The embedded note of a training dictionary: a string under the key `ckptconv`.

What the dictionary itself records wins; the note tells what it cannot (the step of SGD, settled epochs), and
a note that says otherwise is reported as odd: the dictionary was saved again after the note was written.
"""

from __future__ import annotations

from dataclasses import replace

from ckptconv.dialects.residue import untold
from ckptconv.document import PROGRESS_FIELDS, Checkpoint, Fact, Known, Unknown, value_of
from ckptconv.note import KEY, edit_note, read_note, write_note
from ckptconv.rawtree import DictNode

EXTENSION = "ckptconv/note"
"""Where the document carries the note's text between dialects."""


def lift_note(checkpoint: Checkpoint, root: DictNode) -> Checkpoint:
    """The document completed from the dictionary's note, if it has one.

    Raises: schema-invalid, schema-version, corrupt-file.
    """
    text = root.get(KEY)
    if not isinstance(text, str):
        return checkpoint
    told = read_note(text).progress
    facts: dict[str, Fact] = {}
    odd: list[str] = []
    for name in PROGRESS_FIELDS:
        noted, own = getattr(told, name), getattr(checkpoint.progress, name)
        if not isinstance(noted, Known):
            continue
        if isinstance(own, Unknown) and _is_reading(noted, own):
            facts[name] = noted
        elif value_of(own) != noted.value:
            odd.append(f"The embedded note says {name} {noted.value}, the dictionary does not: it is newer.")
    optimizers = checkpoint.optimizers
    if "step" in facts and len(optimizers) == 1 and isinstance(optimizers[0].step, Unknown):
        optimizers = (replace(optimizers[0], step=facts["step"]),)
    return replace(
        checkpoint,
        progress=replace(checkpoint.progress, **facts),
        optimizers=optimizers,
        oddities=(*checkpoint.oddities, *odd),
        extensions={**checkpoint.extensions, EXTENSION: text},
    )


def _is_reading(noted: Known, own: Unknown) -> bool:
    """Whether a noted value is one of those that the dictionary leaves open."""
    return not own.candidates or noted.value in {candidate.value for candidate in own.candidates}


def note_of(checkpoint: Checkpoint, root: DictNode) -> str | None:
    """The note to write: the dictionary's own, brought up to date where the document was edited, or a new."""
    text = checkpoint.extensions.get(EXTENSION)
    if not isinstance(text, str):
        return write_note(checkpoint) if untold(checkpoint, root) else None
    if text != root.get(KEY):
        return text
    told = read_note(text).progress
    pairs = [(getattr(told, name), getattr(checkpoint.progress, name)) for name in PROGRESS_FIELDS]
    edited = any(value_of(now) not in (None, value_of(then)) for then, now in pairs)
    return edit_note(text, checkpoint) if edited else text


def with_note(root: DictNode, note: str | None) -> DictNode:
    """The dictionary with this note and no other."""
    if note is None:
        items = tuple((k, v) for k, v in root.items if k != KEY or not isinstance(v, str))
    elif KEY in root:
        items = tuple((k, note if k == KEY else v) for k, v in root.items)
    else:
        items = (*root.items, (KEY, note))
    return replace(root, items=items)
