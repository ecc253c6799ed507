"""Where a torchdata `StatefulDataLoader` stands: batches since its epoch began.

    without workers  {"_num_yielded": batches, "_iterator_finished": bool, ..}
    with workers     {"_snapshot": {"_snapshot_step": a, ..}, "_steps_since_snapshot": b, ..}: a + b batches

A finished iterator stands at the end of its epoch: the next batch is the first of another one. Source:
torchdata 0.11 `stateful_dataloader/stateful_dataloader.py`.
"""

from __future__ import annotations

from ckptconv.dialects.torch_values import count_of, dotted
from ckptconv.document import Fact, Known
from ckptconv.rawtree import DictNode, Node, Path

_YIELDED, _SNAPSHOT, _SINCE, _FINISHED = (
    "_num_yielded",
    "_snapshot",
    "_steps_since_snapshot",
    "_iterator_finished",
)


def batch_of(node: Node, path: Path) -> Fact | None:
    """Batches since the epoch began; None where the state does not tell. I/O: reads 0-d counters."""
    if not isinstance(node, DictNode):
        return None
    if node.get(_FINISHED) is True:
        return Known(
            value=0, status="derived", source=dotted((*path, _FINISHED)), formula="the epoch is done"
        )
    if (yielded := count_of(node.get(_YIELDED))) is not None:
        return Known(value=yielded[0], source=dotted((*path, _YIELDED)))
    snapshot = node.get(_SNAPSHOT)
    at = count_of(snapshot.get("_snapshot_step")) if isinstance(snapshot, DictNode) else None
    since = count_of(node.get(_SINCE))
    if at is None or since is None:
        return None
    return Known(
        value=at[0] + since[0],
        status="derived",
        source=dotted((*path, _SNAPSHOT, "_snapshot_step")),
        formula=f"{_SNAPSHOT}._snapshot_step + {_SINCE}",
    )
