"""What `doctor` says of real files of every kind, in JSON and to people."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
for needed in ("tensorflow", "tf_keras", "h5py", "lightning", "transformers", "accelerate"):
    pytest.importorskip(needed)

import ckptconv  # noqa: E402
from ckptconv import doctor  # noqa: E402
from ckptconv.catalog.restores import KindOfFile, kinds_of_file  # noqa: E402
from ckptconv.document import Known  # noqa: E402
from ckptconv.note import SOURCE  # noqa: E402
from ckptconv.schema import schema_problems  # noqa: E402
from tests.restores.calls import Kept, load_weights  # noqa: E402
from tests.restores.files import slots  # noqa: E402
from tests.restores.outcome import STEPS  # noqa: E402
from tests.restores.program_calls import BY_FIXTURE  # noqa: E402
from tests.restores.test_restores import FILES  # noqa: E402
from tests.support.command import FIXTURES, invoke  # noqa: E402
from tests.support.command import run as run_command  # noqa: E402
from tests.support.producers import PRODUCERS  # noqa: E402
from tests.support.producers import Run as TorchRun  # noqa: E402

Made = Callable[[str], tuple[Path, Any]]
TOLD = {"lightning-weights", "hf-trainer-without-optimizer"}
"""Kinds whose trainer keeps the step, though the optimizer does not."""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    @cache
    def make(file: str) -> tuple[Path, Any]:
        return FILES[file](tmp_path_factory.mktemp(file))

    return make


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", kinds_of_file(), ids=lambda kind: kind.name)
def test_a_file_is_known_for_its_kind(kind: KindOfFile, made: Made) -> None:
    path, _ = made(kind.name)
    found = doctor.diagnose(path)
    assert found.restores == kind.of_variant(next(iter(kind.variants), None)).restores
    assert found.what == kind.what
    if kind.name in BY_FIXTURE:
        assert isinstance(found.step, Known)
    elif kind.step is not False or kind.name in TOLD:
        assert isinstance(found.step, Known)
        assert found.step.status == "recorded"
        assert found.step.value == STEPS
    else:
        assert not isinstance(found.step, Known) or found.step.status == "derived"
    assert schema_problems(doctor.to_json(found), "report", "diagnosis") == []


def checkpoints() -> list[Path]:
    """The checkpoint of every fixture."""
    found: list[Path] = []
    for expected in sorted(FIXTURES.glob("*/*/expected.json")):
        case, told = expected.parent, json.loads(expected.read_text(encoding="utf-8"))
        if "checkpoint" in told:
            found.append(case / told["checkpoint"])
            continue
        files, folders = (
            ("run.pt", "run.ckpt", "bundle.index", "ckpt-1.index"),
            ("run/both", "run", "state", "pipeline"),
        )
        names = (*files, *folders, "checkpoint", "flat", "")  # itself, where its make.py writes beside it
        found.append(next(case / name for name in names if (case / name).exists()))
    return found


def step_in(fixture: dict[str, Any]) -> object:
    """What the framework says of the step: a number, None where there is none, `...` where not noted."""
    step = fixture.get("step", fixture.get("progress", {}).get("step", ...))
    return step.get("value") if isinstance(step, dict) else step


@pytest.mark.parametrize("path", checkpoints(), ids=lambda path: "/".join(path.parts[-4:]))
def test_of_every_fixture_it_says_what_the_framework_says(path: Path) -> None:
    code, shown = invoke("doctor", path, "--json")
    assert code == 0, shown
    told = json.loads(shown)
    assert schema_problems(told, "report", "diagnosis") == []
    case = next(parent for parent in (path, *path.parents) if (parent / "expected.json").exists())
    truth = step_in(json.loads((case / "expected.json").read_text(encoding="utf-8")))
    if truth is not ...:
        assert told["step"].get("value") == truth
    code, text = invoke("doctor", path)
    assert code == 0
    answer = next(line for line in text.splitlines()[1:] if line)  # the first thing after what the file is
    assert answer.startswith("Is the step in this file?")
    assert str(told["step"].get("value", "No")) in answer


def test_whatever_it_is_given_there_is_an_answer_or_a_problem() -> None:
    """Each file and folder of the fixtures, whether it is a checkpoint or not."""
    answered = 0
    for path in sorted(FIXTURES.rglob("*")):
        if "__pycache__" in path.parts:
            continue
        code, shown = invoke("doctor", path, "--json")
        told = json.loads(shown)
        if code == 0:
            answered += 1
            assert schema_problems(told, "report", "diagnosis") == [], path
        else:
            assert {problem["code"] for problem in told["problems"]}, path
            assert code == (2 if all(p["code"] == "usage" for p in told["problems"]) else 1), path
    assert answered > 100


def torch_file(path: Path, optimizer: str = "Adam", **more: Any) -> Path:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.Linear(5, 4, bias=False))
    made = getattr(torch.optim, optimizer)(model.parameters(), lr=0.01)
    for _ in range(STEPS):
        made.zero_grad()
        model(torch.randn(8, 4)).square().mean().backward()
        made.step()
    torch.save({"model": model.state_dict(), "optimizer": made.state_dict(), **more}, path)
    return path


def test_an_sgd_of_torch_has_no_step(tmp_path: Path) -> None:
    found = doctor.diagnose(torch_file(tmp_path / "run.pt", "SGD"))
    assert not isinstance(found.step, Known)
    assert {restore.step for restore in found.restores} == {"absent"}
    assert [mend for mend in found.mends if "--to neutral --set step=N" in mend.command]


def test_what_torch_numbers_is_said(tmp_path: Path) -> None:
    found = doctor.diagnose(torch_file(tmp_path / "run.pt"))
    assert [finding for finding in found.findings if "numbered, not named" in finding]
    (wrong,) = [restore for restore in found.restores if restore.state == "wrong"]
    assert wrong.signal == "none"


def test_an_ambiguous_epoch_of_torch_is_said(tmp_path: Path) -> None:
    (said,) = [f for f in doctor.diagnose(torch_file(tmp_path / "run.pt", epoch=2)).findings if "epoch" in f]
    assert "2 (" in said
    assert "3 (" in said


@pytest.mark.parametrize("case", ["torchvision", "imagenet", "timm", "timm-1", "fairseq", "open-clip"])
def test_an_epoch_that_is_one_off_is_said(case: str, tmp_path: Path) -> None:
    """Where the program that resumes does not begin at the very number that the file has."""
    dialect, save, resume, per_epoch = PRODUCERS[case]
    run = TorchRun(per_epoch=per_epoch)
    path = save(run, tmp_path)
    found = doctor.diagnose(path)
    assert found.dialect == f"pytorch:{dialect}"
    saved = torch.load(path, weights_only=False)
    assert resume(saved)["epochs"] == run.epochs
    stored = saved["extra_state"]["train_iterator"]["epoch"] if case == "fairseq" else saved["epoch"]
    said = [finding for finding in found.findings if f"says {stored}, but {run.epochs} epochs" in finding]
    assert len(said) == (stored != run.epochs)


@pytest.mark.parametrize(("case", "stored", "done"), [("epoch-end", 0, 1), ("after-fit", 2, 2)])
def test_lightning_s_epoch_is_one_off_at_an_epoch_s_end(case: str, stored: int, done: int) -> None:
    path = FIXTURES / "lightning" / case / "run.ckpt"
    assert torch.load(path, weights_only=False)["epoch"] == stored
    said = [finding for finding in doctor.diagnose(path).findings if "epoch' says" in finding]
    assert len(said) == (stored != done)
    assert all(f"says {stored}, but {done} epoch" in finding for finding in said)


def test_accelerate_s_step_is_not_the_run_s() -> None:
    path = FIXTURES / "accelerate/two-models/state"
    theirs = torch.load(path / "random_states_0.pkl", weights_only=False)["step"]
    assert theirs not in {step.value for _, step in doctor.diagnose(path).steps}
    (said,) = [finding for finding in doctor.diagnose(path).findings if "is not the run's step" in finding]
    assert f"'random_states_0.pkl.step' is {theirs}" in said


def test_an_order_that_only_the_program_knows_is_described(tmp_path: Path) -> None:
    mends = doctor.diagnose(FIXTURES / "plain/two-groups-unnamed/run.pt").mends
    conversions = [mend for mend in mends if "--template" in mend.command]
    assert conversions
    for mend in conversions:
        assert any("describe(model, optimizer)" in line for line in mend.code)
        assert "--source-spec described.json" in mend.command


def test_a_schedule_is_left_to_the_program() -> None:
    mends = doctor.diagnose(FIXTURES / "lightning/mid-epoch/run.ckpt").mends
    conversions = [mend.command for mend in mends if "--template" in mend.command]
    assert conversions
    assert all("--allow schedule-unsupported" in command for command in conversions)


def test_the_call_that_it_names_is_for_this_file(made: Made) -> None:
    """It can be pasted: of a folder it names the checkpoint in it."""
    path, saved = made("weights-h5-keras3")
    best = doctor.diagnose(path).mends[0]
    build, load = best.code
    assert "optimizer.build" in build
    assert json.dumps(str(path)) in load
    assert best.command == ""
    run = load_weights("keras3", built=True)(path, Kept())
    exec("\n".join(best.code), {"model": run.model, "optimizer": run.optimizer})
    assert int(np.array(run.optimizer.iterations)) == STEPS
    assert all(np.array_equal(a, b) for a, b in zip(slots(run), saved.slots, strict=True))
    folder = FIXTURES / "tf-keras-legacy/sequential-adam/artifact"
    assert json.dumps(str(folder / "ckpt-1")) in doctor.diagnose(folder).mends[0].code[0]


def test_a_step_in_a_note_is_one_that_no_framework_reads(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    ckptconv.convert(torch_file(tmp_path / "run.pt"), path, allow=["state-dropped"])
    found = doctor.diagnose(path)
    assert isinstance(found.step, Known)
    assert (found.step.value, found.step.source) == (STEPS, SOURCE)
    assert {restore.step for restore in found.restores} == {"zero"}
    assert doctor.said(found.step) != doctor.said(replace(found.step, source="step"))


PLAIN = next(kind for kind in kinds_of_file() if kind.name == "torch-adam")
WRAPPED = {"imagenet": "module", "open-clip": "module", "nanogpt": "_orig_mod"}
"""Programs that save a model inside of another module."""


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", [case for case, row in PRODUCERS.items() if row[0] in PLAIN.dialects])
def test_the_lines_for_torch_are_those_of_the_file(case: str, tmp_path: Path) -> None:
    """They name its parts, and are run as they are."""
    _, save, _, per_epoch = PRODUCERS[case]
    run, again = TorchRun(per_epoch=per_epoch), TorchRun(seed=1)
    path = save(run, tmp_path)
    best = doctor.diagnose(path).mends[0]
    assert best.text.startswith("In PyTorch")
    model: Any = again.model
    if wrapper := WRAPPED.get(case):
        model = torch.nn.Module()
        model.add_module(wrapper, again.model)
    exec("\n".join(best.code), {"torch": torch, "model": model, "optimizer": again.optimizer})
    for mine, theirs in zip(again.model.parameters(), run.model.parameters(), strict=True):
        assert torch.equal(mine, theirs)
        ours, wanted = again.optimizer.state[mine], run.optimizer.state[theirs]
        assert torch.equal(ours["exp_avg"], wanted["exp_avg"])
        assert ours["step"] == wanted["step"] > 0


def test_the_command_line_shows_both_forms(made: Made) -> None:
    path, _ = made("checkpoint-legacy")
    text = run_command("doctor", str(path))
    assert text.returncode == 0
    assert "optimizer/iter" in text.stdout
    told = json.loads(run_command("doctor", str(path), "--json").stdout)
    assert told["step"]["value"] == STEPS
    assert {row["step"] for row in told["restores"]} == {"restored", "zero", "refused"}
    missing = run_command("doctor", "nowhere.pt")
    assert missing.returncode == 1
