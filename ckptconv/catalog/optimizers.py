"""What an optimizer's state means: the tables, recognition, and conversion between forms, under one name."""

from __future__ import annotations

from ckptconv.catalog.completion import as_algorithm, hyperparameter_names, with_form
from ckptconv.catalog.conversion import Conversion, convert
from ckptconv.catalog.optimizer_rows import FRAMEWORKS, HyperRow, Row, algorithms, infer, row
from ckptconv.catalog.residuals import EpsilonResidual, epsilon_residual
from ckptconv.catalog.slots import SlotConversion

__all__ = [
    "FRAMEWORKS",
    "Conversion",
    "EpsilonResidual",
    "HyperRow",
    "Row",
    "SlotConversion",
    "algorithms",
    "as_algorithm",
    "convert",
    "epsilon_residual",
    "hyperparameter_names",
    "infer",
    "row",
    "with_form",
]
