"""What `doctor` says of real files, and that the commands it spells out mend them."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("tensorflow")
pytest.importorskip("tf_keras")
pytest.importorskip("h5py")

from ckptconv import doctor  # noqa: E402
from ckptconv.catalog.restores import kinds_of_file, recipe_for  # noqa: E402
from ckptconv.detect import load_registries  # noqa: E402
from ckptconv.document import Known, Unknown  # noqa: E402
from ckptconv.formats.base import FORMATS  # noqa: E402
from ckptconv.schema import schema_problems  # noqa: E402
from tests.restores.calls import CALLS, Kept, load_weights, restore  # noqa: E402
from tests.restores.files import FILES, STEPS, Run, fresh, slots  # noqa: E402
from tests.support.command import run as run_command  # noqa: E402

Made = Callable[[str], tuple[Path, Run]]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    @cache
    def make(file: str) -> tuple[Path, Run]:
        return FILES[file](tmp_path_factory.mktemp(file))

    return make


load_registries()


@pytest.mark.parametrize(
    "kind",
    [kind for kind in kinds_of_file() if kind.format in FORMATS and kind.format != "pytorch"],
    ids=lambda kind: kind.name,
)
def test_a_file_is_known_for_its_kind(kind: object, made: Made) -> None:
    files = {CALLS[row.name][0] for row in kind.restores}
    assert len(files) == 1
    path, _ = made(files.pop())
    found = doctor.diagnose(path)
    assert found.restores == kind.restores
    assert found.what == kind.what
    if kind.step:
        assert isinstance(found.step, Known)
        assert found.step.value == STEPS
    else:
        assert isinstance(found.step, Unknown)
    assert schema_problems(doctor.to_json(found), "report", "diagnosis") == []


def torch_run(optimizer: str = "Adam") -> tuple[torch.nn.Module, torch.optim.Optimizer, dict[str, object]]:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.Linear(5, 4, bias=False))
    made = getattr(torch.optim, optimizer)(model.parameters(), lr=0.01)
    for _ in range(STEPS):
        made.zero_grad()
        model(torch.randn(8, 4)).square().mean().backward()
        made.step()
    return model, made, {"model": model.state_dict(), "optimizer": made.state_dict()}


@pytest.mark.parametrize(("optimizer", "kind"), [("Adam", "torch-adam"), ("SGD", "torch-stateless")])
def test_a_torch_file_is_known_for_its_kind(optimizer: str, kind: str, tmp_path: Path) -> None:
    *_, saved = torch_run(optimizer)
    torch.save({**saved, "epoch": 2}, tmp_path / "run.pt")
    found = doctor.diagnose(tmp_path / "run.pt")
    assert found.restores == next(k.restores for k in kinds_of_file() if k.name == kind)
    assert isinstance(found.step, Known if optimizer == "Adam" else Unknown)
    assert any("epochs" in finding for finding in found.findings)
    assert any("--set step=N" in mend.command for mend in found.mends) == (optimizer == "SGD")
    assert schema_problems(doctor.to_json(found), "report", "diagnosis") == []


def test_what_the_table_says_of_torch() -> None:
    """torch-load, torch-model-only, torch-other-order, torch-sgd-load."""
    _, _, saved = torch_run()
    shapes = (torch.nn.Linear(4, 5), torch.nn.Linear(5, 4, bias=False))
    model = torch.nn.Sequential(*shapes)
    model.load_state_dict(saved["model"])
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    assert not optimizer.state  # model alone: nothing of the optimizer
    optimizer.load_state_dict(saved["optimizer"])
    states = [optimizer.state[p] for p in model.parameters()]
    for position, state in enumerate(states):
        assert state["step"] == STEPS
        assert torch.equal(state["exp_avg"], saved["optimizer"]["state"][position]["exp_avg"])
    other = torch.optim.Adam(list(model.parameters())[::-1], lr=0.01)
    other.load_state_dict(saved["optimizer"])  # shapes do not even fit, and nothing is said
    assert other.state[next(model.parameters())]["exp_avg"].shape == (4, 5)
    last = other.state[list(model.parameters())[-1]]["exp_avg"]
    assert torch.equal(last, saved["optimizer"]["state"][0]["exp_avg"])
    _, sgd, saved = torch_run("SGD")
    assert not any("step" in state for state in sgd.state_dict()["state"].values())


@pytest.mark.parametrize("file", ["checkpoint-legacy", "checkpoint-tf-keras", "weights-prefix-legacy"])
def test_the_command_that_it_spells_out_mends_a_keras_2_run_for_keras_3(
    file: str, made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import tensorflow as tf

    path, saved = made(file)
    found = doctor.diagnose(path)
    mend = next(m for m in found.mends if m.code == recipe_for("keras3").code)
    monkeypatch.chdir(tmp_path)
    template = fresh("keras3", 7)
    names = {"model": template.model, "optimizer": template.optimizer, "tf": tf}
    exec("\n".join(mend.code[1:]), names)  # the first line stands for the user's own model
    make_directory, _, command = mend.command.partition(" && ")
    assert make_directory == f"mkdir -p {recipe_for('keras3').directory}"
    Path(recipe_for("keras3").directory).mkdir()
    done = run_command(*shlex.split(command)[1:])
    assert done.returncode == 0, done.stderr
    restored = restore("keras3", built=True)(Path(recipe_for("keras3").target), Kept())
    assert int(np.array(restored.optimizer.iterations)) == STEPS
    for mine, theirs in (
        (restored.model.get_weights(), saved.weights),
        (slots(restored), saved.slots),
    ):
        assert all(np.array_equal(a, b) for a, b in zip(mine, theirs, strict=True))


def test_the_call_that_it_names_brings_all_of_it_back(made: Made) -> None:
    path, saved = made("weights-h5-keras3")
    best = doctor.diagnose(path).mends[0]
    assert "optimizer.build" in best.command
    run = load_weights("keras3", built=True)(path, Kept())
    assert int(np.array(run.optimizer.iterations)) == STEPS
    assert all(np.array_equal(a, b) for a, b in zip(slots(run), saved.slots, strict=True))


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
