"""What an optimizer's state means: the tables, recognition, and conversion between forms, under one name."""

from __future__ import annotations

from ckptconv.catalog.completion import as_algorithm, hyperparameter_names, with_form
from ckptconv.catalog.conversion import Conversion, convert
from ckptconv.catalog.optimizer_rows import FRAMEWORKS, HyperRow, Row, algorithms, infer, row, shape_of_slot
from ckptconv.catalog.residuals import Residual, measure
from ckptconv.catalog.slots import SlotConversion

__all__ = [
    "FRAMEWORKS",
    "Conversion",
    "HyperRow",
    "Residual",
    "Row",
    "SlotConversion",
    "algorithms",
    "as_algorithm",
    "convert",
    "hyperparameter_names",
    "infer",
    "measure",
    "row",
    "shape_of_slot",
    "with_form",
]
