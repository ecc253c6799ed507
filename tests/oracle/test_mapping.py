"""Models that nobody named alike cross by one mapping file, in both directions, with AdamW's state."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
tf = pytest.importorskip("tensorflow")
pytest.importorskip("keras")

import ckptconv  # noqa: E402
from ckptconv import difference  # noqa: E402
from ckptconv.errors import MappingError  # noqa: E402
from tests.support.command import invoke  # noqa: E402
from tests.support.live_twins import (  # noqa: E402
    apart,
    keras_adamw,
    random_keras,
    random_torch,
    train_keras,
    train_torch,
)
from tests.support.mapped import BLOCKS, HEADS, NAMES, TWIN, WIDTH, frozen, named_adamw, save  # noqa: E402
from tests.support.twins import framework  # noqa: E402

UPDATES = 3


class Runs:
    """A trained run of each framework as files."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.torch_model = frozen(random_torch(TWIN.torch(), 1))
        self.torch_optimizer = named_adamw(self.torch_model)
        train_torch(TWIN, self.torch_model, self.torch_optimizer, UPDATES)
        self.run = save(folder / "run.pt", self.torch_model, self.torch_optimizer)
        self.keras_model = random_keras(TWIN.keras(framework("keras3")), 2)
        self.keras_optimizer = keras_adamw("keras3", self.keras_model)
        train_keras(TWIN, self.keras_model, self.keras_optimizer, UPDATES, seed=7)
        self.fresh = self.saved("fresh")

    def saved(self, name: str) -> Path:
        checkpoint = tf.train.Checkpoint(model=self.keras_model, optimizer=self.keras_optimizer)
        return Path(checkpoint.write(str(self.folder / name)))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("runs"))


@pytest.mark.slow
def test_pytorch_to_keras_and_back_by_the_same_file(runs: Runs, tmp_path: Path) -> None:
    there = tmp_path / "there"
    report = ckptconv.convert(runs.run, there, to="tensorflow", template=runs.fresh, mapping=NAMES)
    assert report.verified
    model = TWIN.keras(framework("keras3"))
    optimizer = keras_adamw("keras3", model)
    tf.train.Checkpoint(model=model, optimizer=optimizer).read(str(there)).assert_consumed()
    assert apart(TWIN, runs.torch_model, model) < 1e-5
    assert int(optimizer.iterations) == UPDATES
    slots = {v.path.split("/", 1)[1]: np.asarray(v) for v in optimizer.variables if "velocity" in v.path}
    ours = runs.torch_optimizer.state_dict()["state"]
    names = [name for name, p in runs.torch_model.named_parameters() if p.requires_grad]
    square = ours[names.index("blocks.10.attn.in_proj_weight")]["exp_avg_sq"].numpy()
    expected = square[WIDTH : 2 * WIDTH].T.reshape(WIDTH, HEADS, WIDTH // HEADS)
    assert any(np.array_equal(expected, slot) for slot in slots.values())
    # And it goes on as the other does.
    other, its = frozen(TWIN.torch()), None
    other.load_state_dict(runs.torch_model.state_dict())
    its = named_adamw(other)
    its.load_state_dict(runs.torch_optimizer.state_dict())
    train_torch(TWIN, other, its, UPDATES, seed=50)
    train_keras(TWIN, model, optimizer, UPDATES, seed=50)
    assert apart(TWIN, other, model) < 2e-4
    cold = TWIN.keras(framework("keras3"))
    tf.train.Checkpoint(model=cold).read(str(there)).expect_partial()
    train_keras(TWIN, cold, keras_adamw("keras3", cold), UPDATES, seed=50)
    assert apart(TWIN, other, cold) > 2e-2

    back = tmp_path / "back.pt"
    ckptconv.convert(there, back, template=runs.run, mapping=NAMES)
    found = difference.compare(runs.run, back)
    assert found.same, found
    assert found.compared > 3 * 100


@pytest.mark.slow
def test_keras_to_pytorch_and_back_by_the_same_file(runs: Runs, tmp_path: Path) -> None:
    model = frozen(TWIN.torch())
    optimizer = named_adamw(model)
    ckptconv.pytorch.restore(runs.fresh, model, optimizer, mapping=NAMES)
    assert apart(TWIN, model, runs.keras_model) < 1e-5
    converted = tmp_path / "converted.pt"
    ckptconv.convert(runs.fresh, converted, template=runs.run, mapping=json.loads(NAMES.read_text()))
    back = tmp_path / "back"
    ckptconv.convert(converted, back, to="tensorflow", template=runs.fresh, mapping=NAMES)
    assert difference.compare(runs.fresh, back).same


def test_check_says_what_it_covers(runs: Runs) -> None:
    code, shown = invoke("map", runs.run, runs.fresh, "--check", NAMES, "--json")
    assert code == 0, shown
    coverage = json.loads(shown)
    assert coverage["source"] == "left"
    assert coverage["by_itself"] == []
    assert coverage["problems"] == []
    assert {rule["applies"] for rule in coverage["rules"]} == {1, BLOCKS}
    assert coverage["rules"][2]["axes"] == ["heads*width in -> in heads width"]
    code, shown = invoke("map", runs.fresh, runs.run, "--check", NAMES, "--json")
    assert code == 0, shown
    assert json.loads(shown)["source"] == "right"


def test_without_it_nothing_is_guessed(runs: Runs, tmp_path: Path) -> None:
    with pytest.raises(MappingError):
        ckptconv.convert(runs.run, tmp_path / "x", to="tensorflow", template=runs.fresh)


def edited(text: str, *pairs: tuple[str, str]) -> dict[str, Any]:
    for before, after in pairs:
        assert before in text
        text = text.replace(before, after)
    content: dict[str, Any] = json.loads(text)
    return content


@pytest.mark.parametrize(
    ("change", "code"),
    [
        (("blocks.{i}.ff.bias", "blocks.{i}.ff.bais"), "mapping-invalid"),
        (("b{i+1}/ln/beta", "b{i}/ln/beta"), "param-unmatched"),
        (("out in w -> w in out", "out in w -> in w out"), "shape-mismatch"),
        (("gates in -> in gates", "in gates -> in gates"), "shape-mismatch"),
    ],
)
def test_slips_of_the_pen(runs: Runs, tmp_path: Path, change: tuple[str, str], code: str) -> None:
    with pytest.raises(MappingError) as caught:
        ckptconv.convert(
            runs.run,
            tmp_path / "x",
            to="tensorflow",
            template=runs.fresh,
            mapping=edited(NAMES.read_text(), change),
        )
    assert code in {problem.code for problem in caught.value.problems}
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_draft_is_edited_and_serves_both_ways(runs: Runs, tmp_path: Path) -> None:
    """Rules of the blocks are there; `map` lists the rest, the rules for it are written, and it is whole."""
    begun = json.loads(NAMES.read_text())
    begun["rules"] = [rule for rule in begun["rules"] if "blocks" in str(rule["left"])]
    (tmp_path / "begun.json").write_text(json.dumps(begun))
    drafted = tmp_path / "names.json"
    code, shown = invoke(
        "map", runs.run, runs.fresh, "--mapping", tmp_path / "begun.json", "--output", drafted
    )
    assert code == 0, shown
    content = json.loads(drafted.read_text())
    unmatched = {one["name"] for one in content.get("unmatched", {}).get("left", [])}
    nearest = {one["name"]: one["nearest"] for one in content.get("unmatched", {}).get("left", [])}
    assert "head.weight" in unmatched
    assert nearest["stem.weight"][0] == "first/kernel"
    content["rules"] += [
        rule for rule in json.loads(NAMES.read_text())["rules"] if "blocks" not in str(rule["left"])
    ]
    del content["unmatched"]
    drafted.write_text(json.dumps(content))
    there, back = tmp_path / "there", tmp_path / "back.pt"
    ckptconv.convert(runs.run, there, to="tensorflow", template=runs.fresh, mapping=drafted)
    ckptconv.convert(there, back, template=runs.run, mapping=drafted)
    assert difference.compare(runs.run, back).same


@pytest.mark.parametrize("said", [True, False])
def test_what_is_left_out_is_said_so_in_the_ledger(runs: Runs, tmp_path: Path, said: bool) -> None:
    state = torch.load(runs.run, weights_only=True)
    state["model"]["blocks.3.attn.mask"] = torch.ones(5, 5)
    torch.save(state, tmp_path / "run.pt")
    names = {**json.loads(NAMES.read_text()), "left_only": ["blocks.{i}.attn.mask"] if said else []}
    arguments = {"to": "tensorflow", "template": runs.fresh, "mapping": names, "dry_run": True}
    report = ckptconv.convert(tmp_path / "run.pt", tmp_path / "x", **arguments)
    assert [(p.code, p.loc[-1]) for p in report.problems] == (
        [] if said else [("param-unmatched", "blocks.3.attn.mask")]
    )
    entries = [entry for entry in report.ledger if entry.item == ("param", "blocks.3.attn.mask")]
    assert [(e.fate, e.allowed_by) for e in entries] == [("left", "--mapping" if said else "param-unmatched")]


def test_a_mapping_needs_a_template(runs: Runs, tmp_path: Path) -> None:
    with pytest.raises(ckptconv.CkptError) as caught:
        ckptconv.convert(runs.run, tmp_path / "x.safetensors", mapping=NAMES)
    assert [(p.code, p.loc) for p in caught.value.problems] == [("usage", ("--mapping",))]


class Projections(torch.nn.Module):
    """Query, key and value as three layers."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (torch.nn.Linear(4, 6) for _ in range(3))


class SideBySide(torch.nn.Module):
    """The same as one, side by side for each of three heads, as GPT-NeoX has it."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = torch.nn.Linear(4, 18)


def stepped(model: Any, path: Path) -> Path:
    optimizer = torch.optim.AdamW(model.named_parameters(), 0.1)
    for seed in range(2):
        torch.manual_seed(seed)
        loss = sum((torch.randn_like(p) * p * p).sum() for p in model.parameters())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return save(path, model, optimizer)


def test_query_key_and_value_side_by_side_for_each_head(tmp_path: Path) -> None:
    one, three = stepped(SideBySide(), tmp_path / "one.pt"), stepped(Projections(), tmp_path / "three.pt")
    names = {
        "schema": "ckptconv/mapping",
        "schema_version": "1.0.0",
        "rules": [
            {
                "left": f"qkv.{name}",
                "right": [f"{part}.{name}" for part in "qkv"],
                "cut": "part",
                "axes": axes,
            }
            for name, axes in (
                ("weight", "heads=3*part*width in -> heads*width in"),
                ("bias", "heads=3*part*width -> heads*width"),
            )
        ],
    }
    there, back = tmp_path / "there.pt", tmp_path / "back.pt"
    ckptconv.convert(one, there, template=three, mapping=names)
    before, after = (torch.load(path, weights_only=True) for path in (one, there))
    for which, key in (("q", 0), ("k", 1), ("v", 2)):
        whole = before["model"]["qkv.weight"].reshape(3, 3, 2, 4)
        assert torch.equal(after["model"][f"{which}.weight"], whole[:, key].reshape(6, 4))
        square = before["optimizer"]["state"][1]["exp_avg_sq"].reshape(3, 3, 2)
        assert torch.equal(after["optimizer"]["state"][2 * key + 1]["exp_avg_sq"], square[:, key].reshape(6))
    ckptconv.convert(there, back, template=one, mapping=names)
    assert difference.compare(one, back).same
    report = ckptconv.convert(one, tmp_path / "x.pt", template=three, mapping=names, dry_run=True)
    (entry,) = [e for e in report.ledger if e.item == ("param", "qkv.bias") and e.target == "k.bias"]
    assert [op["op"] for op in entry.ops][:2] == ["reshape", "slice"]


def test_the_page_shows_the_file_and_its_commands() -> None:
    page = (NAMES.parent / "mapping.md").read_text(encoding="utf-8")
    rules = re.findall(r"```json\n(.*?)```", page, re.DOTALL)
    assert json.loads(rules[0]) == json.loads(NAMES.read_text())
