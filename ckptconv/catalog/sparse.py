"""Sparse gradients: where a framework's second moments of an embedding are not those of its whole gradient.

Keras 3 on TensorFlow gets an embedding's gradient as `tf.IndexedSlices`, one row per occurrence of a token,
and squares the rows before it sums them: a token twice in a batch, each time with g = 1, moves its second
moment by 1 + 1, where PyTorch and tf_keras have (1 + 1)^2. The state converts exactly all the same; what
follows parts in these rows, unless the gradient is made dense first.
Source: keras 3.15.1 keras/src/optimizers/adam.py and its siblings, `ops.square(gradient)`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from ckptconv.document import Param

LATE = frozenset({"keras3"})
"""Frameworks that square before they sum."""
SQUARES = frozenset({"second_moment", "accumulator", "variance"})
"""Canonical slots that average or sum squares of the gradient (or its largest size)."""
ROLE = "embeddings"


def residuals(
    source: str, target: str, slots: Iterable[str], trained: Iterable[str], params: Mapping[str, Param]
) -> tuple[str, ...]:
    """What to know of the target's embeddings and the call that helps; nothing where both sides do alike."""
    if target not in LATE or source in LATE or not SQUARES.intersection(slots):
        return ()
    names = [name for name in trained if name in params and params[name].role == ROLE]
    if not names:
        return ()
    shown = ", ".join(f"'{name}'" for name in names[:3]) + (
        f" and {len(names) - 3} more" if names[3:] else ""
    )
    return (
        f"sparse gradients: Keras 3 squares those of {shown} token by token, before it sums them; "
        "as in the source with ckptconv.keras.densified(optimizer)",
    )
