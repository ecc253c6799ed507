"""Second moments kept as two factors (Adafactor): which factor of the source is which of the target.

A factor is a mean over one of a matrix's two axes, in the layout that its framework gives the matrix. Where
the matrix is transposed on its way, rows and columns change places. A convolution's kernel is another matter:
torch factors over its window, Keras over its channels, and no op leads from one to the other.
"""

from __future__ import annotations

from collections.abc import Sequence

from ckptconv.ops import Permute
from ckptconv.tensor import Op

FACTORS = frozenset({"rows", "columns", "kept_rows", "kept_columns"})
"""Kinds of shape (`optimizer_rows.shape_of_slot`) that a factor has."""

_PARTNER = {"row_variance": "column_variance", "column_variance": "row_variance"}


def factor_of(slot: str, ops: Sequence[Op]) -> str | None:
    """The source's slot that becomes the target's under the parameter's layout ops; None: none does."""
    if not ops:
        return slot
    if len(ops) == 1 and isinstance(ops[0], Permute) and ops[0].order == (1, 0):
        return _PARTNER[slot]
    return None
