"""A class that trains some of its parameters by another algorithm: Keras 3's Muon and its AdamW.

A row's `part` says what the other algorithm's slots and hyperparameters are called in it. Either part has a
row of its own, as if it were a class: `muon.muon` and `muon.adamw`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ckptconv.catalog.loading import Record

if TYPE_CHECKING:
    from ckptconv.catalog.optimizer_rows import Row


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """The other algorithm within a class."""

    algorithm: str
    slots: Mapping[str, str]
    """Slot of the algorithm -> slot of the class."""
    told_by: str
    """Slot of the class that the part's parameters alone have."""
    hyperparameters: Mapping[str, str]
    """Hyperparameter of the algorithm -> that of the class."""
    rate: str
    """Hyperparameter of the class: the part's learning rate in units of the class's. Its decay acts with the
    class's own rate, so that it is the algorithm's times this."""

    divided_by: tuple[str, ...]
    """Arguments of the class that say which parameters are the part's."""

    @property
    def own(self) -> frozenset[str]:
        """Hyperparameters of the class that are none of the rest's."""
        return frozenset({*self.hyperparameters.values(), self.rate})


def read(record: Record) -> Part | None:
    """A row's `part`, where it has one."""
    if not record.has("part"):
        return None
    inner = record.record("part")
    part = Part(
        algorithm=inner.text("algorithm"),
        slots=inner.text_map("slots"),
        told_by=inner.text("told_by"),
        hyperparameters=inner.text_map("hyperparameters"),
        rate=inner.text("rate"),
        divided_by=inner.texts("divided_by"),
    )
    inner.close()
    return part


def row_of_part(whole: Row, name: str, alone: Row | None) -> Row | None:
    """The row of one part of a class; `alone`: the algorithm's own class in the framework."""
    part = whole.part
    if part is None:
        return None
    if name == whole.algorithm:
        return replace(
            whole,
            part=None,
            slots={slot: key for slot, key in whole.slots.items() if slot != part.told_by},
            hyperparameters={n: h for n, h in whole.hyperparameters.items() if n not in part.own},
        )
    if name != part.algorithm or alone is None:
        return None
    names = {"learning_rate": "learning_rate", **part.hyperparameters}
    return replace(
        alone,
        class_name=whole.class_name,
        source=whole.source,
        slots={slot: whole.slots[ours] for slot, ours in part.slots.items()},
        slot_conditions={},
        slot_readers={},
        hyperparameters={name: whole.hyperparameters[ours] for name, ours in names.items()},
        rules={},
    )
