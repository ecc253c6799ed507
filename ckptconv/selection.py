"""The parts of a document that `--select` names."""

from __future__ import annotations

from collections.abc import Sequence

from ckptconv.document import Checkpoint
from ckptconv.errors import CkptError


def selected(checkpoint: Checkpoint, names: Sequence[str], candidates: Sequence[str] = ()) -> Checkpoint:
    """The document of what `names` says; `candidates` are what the folder offered, for the message.

    Raises: usage for a name that means nothing here, with what there is.
    """
    if not names:
        return checkpoint
    there = [*candidates, *(f"optimizer:{i}" for i in range(len(checkpoint.optimizers)))]
    raise CkptError.of(
        "usage",
        f"there is no '{names[0]}' to select",
        f"There is: {', '.join(there)}." if there else "There is only one checkpoint: leave --select out.",
        loc=("--select", names[0]),
    )
