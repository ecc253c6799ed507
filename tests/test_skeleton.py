"""A skeleton is as good a template as the checkpoint that it is of; what it cannot tell is said."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import ckptconv
from ckptconv.errors import CkptError
from ckptconv.extras import own_param
from ckptconv.schema import to_json
from ckptconv.tensor import MissingTensor
from tests.support.command import FIXTURES, convert, inspect, refused

RUN = FIXTURES / "plain" / "mlp-adamw" / "run.pt"
FRESH = FIXTURES / "keras3" / "mlp-adamw-fresh" / "ckpt-1"
CONV = FIXTURES / "plain" / "conv-bn-embedding" / "run.pt"
COUNTER = "save_counter/.ATTRIBUTES/VARIABLE_VALUE"


def without_values(manifest: dict[str, object]) -> dict[str, object]:
    """The manifest as one without inline values was."""
    for key in ("params", "extras"):
        items = manifest[key]
        assert isinstance(items, list)
        for item in items:
            item.pop("value", None)
    return manifest


def made_with(template: Path, folder: Path) -> list[bytes]:
    """Every file of the converted run."""
    folder.mkdir()
    prefix = convert(RUN, folder / "ckpt-1", "--template", template)
    return [path.read_bytes() for path in sorted(folder.glob(f"{prefix.name}.*"))]


def test_a_skeleton_file_and_a_printed_document_make_what_the_checkpoint_makes(tmp_path: Path) -> None:
    ckptconv.write_skeleton(ckptconv.open(FRESH), tmp_path / "skeleton.json")
    (tmp_path / "printed.json").write_text(json.dumps(inspect(FRESH)))
    truth = made_with(FRESH, tmp_path / "truth")
    assert len(truth) == 2
    for name in ("skeleton", "printed"):
        assert made_with(tmp_path / f"{name}.json", tmp_path / name) == truth


def test_a_skeleton_tells_no_step_and_no_epoch() -> None:
    skeleton = ckptconv.skeleton_of(ckptconv.open(RUN))
    assert skeleton.is_skeleton
    assert isinstance(skeleton.progress.step, ckptconv.Unknown)
    assert [o.param_steps for o in skeleton.optimizers] == [{}]
    rate = skeleton.optimizers[0].groups[0].hyperparameters["learning_rate"]
    assert isinstance(rate, ckptconv.Known)
    assert rate.value == 0.01


def test_a_skeleton_is_no_source(tmp_path: Path) -> None:
    skeleton = ckptconv.skeleton_of(ckptconv.open(RUN))
    with pytest.raises(CkptError) as caught:
        ckptconv.save(skeleton, tmp_path / "out.safetensors")
    assert caught.value.problems[0].code == "reference-broken"
    assert not list(tmp_path.iterdir())


def test_a_value_that_no_source_has_is_missed(tmp_path: Path) -> None:
    manifest = without_values(to_json(ckptconv.open(FRESH)))
    (tmp_path / "bare.json").write_text(json.dumps(manifest))
    problems = refused("convert", RUN, tmp_path / "ckpt-1", "--template", tmp_path / "bare.json")
    assert [(p["code"], p["loc"]) for p in problems] == [("template-mismatch", ["template", COUNTER])]


def test_a_count_that_begins_alike_in_every_model_is_created() -> None:
    """`num_batches_tracked` of a template without values: 0, and the ledger says so."""
    skeleton = ckptconv.skeleton_of(ckptconv.open(CONV))
    (param,) = (p for p in skeleton.params.values() if p.role == "batch_count")
    kept, entry, problems = own_param(param.name, param.role, param.tensor)
    assert (kept.read().tolist(), entry.fate, problems) == (param.read().tolist(), "kept-from-template", ())
    missing = MissingTensor(spec=param.tensor.spec, name=param.name)
    made, entry, problems = own_param(param.name, param.role, missing)
    assert (made.read().tolist(), entry.fate, problems) == (0, "created", ())
    _, _, (problem,) = own_param("x", "unknown", missing)
    assert (problem.code, problem.loc) == ("template-mismatch", ("params", "x"))
