"""The embedded note of a training dictionary: a string under the key `ckptconv`.

What the dictionary itself records wins; the note tells what it cannot (the step of SGD, settled epochs).
"""

from __future__ import annotations

from dataclasses import replace

from ckptconv.dialects.residue import untold
from ckptconv.document import Checkpoint, Unknown
from ckptconv.note import EXTENSION, KEY, current_note, read_note, settled
from ckptconv.rawtree import DictNode


def lift_note(checkpoint: Checkpoint, root: DictNode) -> Checkpoint:
    """The document completed from the dictionary's note, if it has one.

    Raises: schema-invalid, schema-version, corrupt-file.
    """
    text = root.get(KEY)
    if not isinstance(text, str):
        return checkpoint
    note = read_note(text)
    progress, stale = settled(checkpoint.progress, note)
    optimizers = checkpoint.optimizers
    if len(optimizers) == 1 and isinstance(optimizers[0].step, Unknown):
        optimizers = (replace(optimizers[0], step=progress.step),)
    return replace(
        checkpoint,
        progress=progress,
        optimizers=optimizers,
        loss_scaling=checkpoint.loss_scaling if stale else {**note.loss_scaling, **checkpoint.loss_scaling},
        oddities=(*checkpoint.oddities, *stale),
        extensions={**checkpoint.extensions, EXTENSION: text},
    )


def note_of(checkpoint: Checkpoint, root: DictNode) -> str | None:
    """The note to write into a dictionary with this residue."""
    own = root.get(KEY)
    return current_note(
        checkpoint, own if isinstance(own, str) else None, untold=bool(untold(checkpoint, root))
    )


def with_note(root: DictNode, note: str | None) -> DictNode:
    """The dictionary with this note and no other."""
    if note is None:
        items = tuple((k, v) for k, v in root.items if k != KEY or not isinstance(v, str))
    elif KEY in root:
        items = tuple((k, note if k == KEY else v) for k, v in root.items)
    else:
        items = (*root.items, (KEY, note))
    return replace(root, items=items)
