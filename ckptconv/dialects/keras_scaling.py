"""Loss scaling in Keras: what `LossScaleOptimizer` leaves no choice of, in files of every kind."""

from __future__ import annotations

from ckptconv.catalog.wrappers import wrappers
from ckptconv.document import Absent, Fact, Known

UNSCALED = Absent(reason="the optimizer is not in a LossScaleOptimizer")


def fixed_scaling(framework: str) -> dict[str, Fact]:
    """The settings that a framework's scaler has in its code."""
    table = wrappers(framework)
    if table is None:
        return {}
    formula = f"the one that {table.scaler.class_name} has"
    return {
        name: Known(value=value, status="derived", formula=formula)
        for name, value in table.scaler.fixed.items()
    }
