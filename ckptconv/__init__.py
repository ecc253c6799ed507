"""Moves a training run between frameworks: weights, optimizer state and progress.

    checkpoint = ckptconv.open("run/ckpt-9")
    report = ckptconv.convert("run/ckpt-9", "run.pt", template="fresh.pt")
    ckptconv.pytorch.restore("run/ckpt-9", model, optimizer)

Importing this package imports nothing else; each name is loaded when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ckptconv import keras, pytorch
    from ckptconv.adapters.compare import compare_outputs
    from ckptconv.adapters.compare_rows import LayerOutput, OutputComparison
    from ckptconv.conversion import convert, save, validate
    from ckptconv.correspondence import Coverage, check_mapping, draft_mapping
    from ckptconv.detect import open
    from ckptconv.document import (
        Absent,
        Block,
        Candidate,
        Checkpoint,
        Group,
        Known,
        Layout,
        Optimizer,
        Param,
        Progress,
        Provenance,
        Residue,
        Schedule,
        Unknown,
    )
    from ckptconv.errors import (
        CkptError,
        FormatError,
        LossError,
        MappingError,
        MissingDependencyError,
        Problem,
        SchemaError,
        TargetError,
        UnsafeContentError,
    )
    from ckptconv.mapping_file import MappingFile, mapping_of, write_mapping
    from ckptconv.report import Entry, OptimizerVerdict, Report
    from ckptconv.skeleton import read_skeleton, skeleton_of, write_skeleton
    from ckptconv.tensor import TensorRef, TensorSpec

    __version__: str

__all__ = [
    "Absent",
    "Block",
    "Candidate",
    "Checkpoint",
    "CkptError",
    "Coverage",
    "Entry",
    "FormatError",
    "Group",
    "Known",
    "LayerOutput",
    "Layout",
    "LossError",
    "MappingError",
    "MappingFile",
    "MissingDependencyError",
    "Optimizer",
    "OptimizerVerdict",
    "OutputComparison",
    "Param",
    "Problem",
    "Progress",
    "Provenance",
    "Report",
    "Residue",
    "Schedule",
    "SchemaError",
    "TargetError",
    "TensorRef",
    "TensorSpec",
    "Unknown",
    "UnsafeContentError",
    "__version__",
    "check_mapping",
    "compare_outputs",
    "convert",
    "draft_mapping",
    "keras",
    "mapping_of",
    "open",
    "pytorch",
    "read_skeleton",
    "save",
    "skeleton_of",
    "validate",
    "write_mapping",
    "write_skeleton",
]

_SUBMODULES = ("keras", "pytorch")

_HOMES = {
    "adapters.compare": ("compare_outputs",),
    "adapters.compare_rows": ("LayerOutput", "OutputComparison"),
    "conversion": ("convert", "save", "validate"),
    "correspondence": ("Coverage", "check_mapping", "draft_mapping"),
    "detect": ("open",),
    "document": (
        "Absent",
        "Block",
        "Candidate",
        "Checkpoint",
        "Group",
        "Known",
        "Layout",
        "Optimizer",
        "Param",
        "Progress",
        "Provenance",
        "Residue",
        "Schedule",
        "Unknown",
    ),
    "errors": (
        "CkptError",
        "FormatError",
        "LossError",
        "MappingError",
        "MissingDependencyError",
        "Problem",
        "SchemaError",
        "TargetError",
        "UnsafeContentError",
    ),
    "mapping_file": ("MappingFile", "mapping_of", "write_mapping"),
    "report": ("Entry", "OptimizerVerdict", "Report"),
    "skeleton": ("read_skeleton", "skeleton_of", "write_skeleton"),
    "tensor": ("TensorRef", "TensorSpec"),
}
"""Module -> the public names that stand in it."""


def __getattr__(name: str) -> object:
    value: object
    if name == "__version__":
        value = _version()
    elif name in _SUBMODULES:
        value = importlib.import_module(f"{__name__}.{name}")
    else:
        home = next((home for home, names in _HOMES.items() if name in names), None)
        if home is None:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(f"{__name__}.{home}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)


def _version() -> str:
    from importlib import metadata

    try:
        return metadata.version(__name__)
    except metadata.PackageNotFoundError:
        return "0+unknown"  # run from a checkout that is not installed
