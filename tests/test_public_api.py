"""The public names: a list that does not change by accident, and an import that costs nothing."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import ckptconv

ROOT = Path(__file__).resolve().parent.parent

PUBLIC = {
    "__version__",
    # verbs
    "LayerOutput",
    "OutputComparison",
    "compare_outputs",
    "convert", "open", "save", "validate", "read_skeleton", "skeleton_of", "write_skeleton",
    # mapping files
    "Coverage", "MappingFile", "check_mapping", "draft_mapping", "mapping_of", "write_mapping",
    # live objects
    "keras", "pytorch",
    # the document
    "Absent", "Block", "Candidate", "Checkpoint", "Group", "Known", "Layout", "Optimizer", "Param",
    "Progress", "Provenance", "Residue", "Schedule", "TensorRef", "TensorSpec", "Unknown",
    # the report
    "Entry", "OptimizerVerdict", "Report",
    # errors
    "CkptError", "FormatError", "LossError", "MappingError", "MissingDependencyError", "Problem",
    "SchemaError", "TargetError", "UnsafeContentError",
}  # fmt: skip


def python(statement: str) -> object:
    """What a fresh interpreter prints as JSON."""
    done = subprocess.run(
        [sys.executable, "-c", statement], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_the_names_are_these() -> None:
    assert set(ckptconv.__all__) == PUBLIC
    assert list(ckptconv.__all__) == sorted(ckptconv.__all__)
    assert set(dir(ckptconv)) == PUBLIC


@pytest.mark.parametrize("name", sorted(PUBLIC))
def test_every_name_is_there_and_stays_itself(name: str) -> None:
    assert getattr(ckptconv, name) is getattr(ckptconv, name)


def test_everything_can_be_imported_at_once() -> None:
    names = python("from ckptconv import *; import json; print(json.dumps([n for n in globals()]))")
    assert isinstance(names, list)
    assert set(names) >= PUBLIC


def test_other_names_are_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="restor"):
        ckptconv.restor  # noqa: B018
    assert not hasattr(ckptconv, "_nothing")


def test_importing_the_package_loads_nothing_else() -> None:
    loaded = python(
        "import sys, json; before = set(sys.modules); import ckptconv\n"
        "print(json.dumps(sorted(set(sys.modules) - before)))"
    )
    assert isinstance(loaded, list)
    assert [name for name in loaded if name.startswith("ckptconv")] == ["ckptconv"]
    assert not {"numpy", "typer", "jsonschema_rs", "msgpack"} & set(loaded)


@pytest.mark.parametrize(
    "statement",
    [
        "import ckptconv; ckptconv.pytorch.restore, ckptconv.keras.restore",
        "import ckptconv.pytorch, ckptconv.keras; ckptconv.pytorch.describe, ckptconv.keras.describe",
        "from ckptconv import keras, pytorch; keras.capture, pytorch.capture",
        "from ckptconv.pytorch import capture, describe, restore",
        "from ckptconv.keras import capture, describe, restore",
        "from ckptconv import *",
    ],
)
def test_live_objects_are_a_module_each_and_import_no_framework(statement: str) -> None:
    loaded = python(f"{statement}\nimport sys, json; print(json.dumps(sorted(sys.modules)))")
    assert isinstance(loaded, list)
    assert not {"torch", "tensorflow", "keras", "tf_keras", "jax"} & set(loaded)


def test_a_missing_framework_is_named_with_its_extra() -> None:
    """As in an environment with the core dependencies alone."""
    for module, package in (("pytorch", "torch"), ("keras", "tensorflow")):
        code = python(
            f"import sys, json; sys.modules['{package}'] = None\n"
            "import ckptconv\n"
            "class Model:\n"
            "    name, built, optimizer = 'm', True, None\n"
            f"try: ckptconv.{module}.describe(Model())\n"
            "except ckptconv.MissingDependencyError as error:\n"
            "    (problem,) = error.problems\n"
            "    print(json.dumps([problem.code, problem.loc, problem.hint]))"
        )
        assert code == ["missing-dependency", [package], f"Run: pip install 'ckptconv[{package}]'."]


def test_the_version_is_that_of_the_project() -> None:
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert ckptconv.__version__ in (project["version"], "0+unknown")
