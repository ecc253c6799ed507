"""A -> neutral -> A is exact; a step edited in the manifest in between reaches every place that holds it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
tf = pytest.importorskip("tensorflow")

from tests.support.command import FIXTURES, convert_here, inspect_here, refused_here  # noqa: E402
from tests.support.torch_equal import assert_same, bits, sharing  # noqa: E402

DICTIONARIES = sorted(FIXTURES.glob("plain/*/run.pt"))
BUNDLES = sorted(
    path.with_suffix("")
    for folder in ("keras3", "tf-keras", "tf-keras-legacy", "tf-module")
    for path in FIXTURES.glob(f"{folder}/**/*.index")
)
EDITED = 1077
VALUE = "/.ATTRIBUTES/VARIABLE_VALUE"
NOTE = "ckptconv/note"


MOVED: dict[str, dict[tuple[str, ...], int]] = {
    "plain/bf16-master": {("iteration",): EDITED - 1},
    "plain/epochs-adam": {},
    "plain/linear-adam-9-steps": {},
    "plain/mlp-adamw": {},
    "plain/mlp-adamw-named": {("global_step",): EDITED},
    "plain/never-stepped": {("step",): EDITED},
    "plain/schedule-free": {("optimizer", "param_groups", 0, "k"): EDITED},
    "plain/tied": {},
    "plain/two-groups": {("iter_num",): EDITED},
    "plain/two-groups-unnamed": {},
}
"""Case -> the loop's own places that count updates, beside each parameter's `step`; all else stays."""
NO_STEP = {"plain/conv-bn-embedding", "plain/linear-sgd-9-steps"}
STALE = {"plain/module-prefix"}

COUNTERS = {
    "keras3": "optimizer/_iterations",
    "tf-keras": "optimizer/_iterations",
    "tf-keras-legacy": "optimizer/iter",
}
INNER = {
    "keras3/loss-scale-adam": "optimizer/inner_optimizer/_iterations",
    "keras3/keras-3.3-amsgrad": "optimizer/iterations",
}
COUPLED = {"keras3/subclassed-lists": {"step": EDITED + 1}}
"""Case -> the run's own variables that count updates, this one from 1."""
NO_UPDATES = {"keras3/adam-accumulating", "tf-keras-legacy/adam-unbuilt", "tf-module/module"}


def case_of(path: Path) -> str:
    """`plain/tied`, `keras3/sequential-adam`."""
    return "/".join(path.relative_to(FIXTURES).parts[:2])


def identity(path: Path) -> str:
    return f"{case_of(path)}-{path.name}"


def archive(source: Path, folder: Path, *arguments: str) -> Path:
    return convert_here(source, folder / "archive", "--to", "neutral", *arguments)


def back(neutral: Path, source: Path) -> Path:
    if source.suffix == ".pt":
        return convert_here(neutral, neutral.parent / "back.pt")
    folder = neutral.parent / "back"
    folder.mkdir()
    return convert_here(neutral, folder / source.name, "--to", "tensorflow")


def edit_step(neutral: Path, value: int = EDITED) -> int:
    """Change `progress.step.value` in the manifest, as one does in an editor; the old value."""
    path = neutral / "manifest.json"
    manifest = json.loads(path.read_text())
    old: int = manifest["progress"]["step"]["value"]
    manifest["progress"]["step"]["value"] = value
    path.write_text(json.dumps(manifest, indent=2))
    return old


def leaves(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """Path and content of everything in what torch loads."""
    if isinstance(value, dict):
        for key, part in value.items():
            yield from leaves(part, (*path, key))
    elif isinstance(value, list | tuple):
        for position, part in enumerate(value):
            yield from leaves(part, (*path, position))
    elif isinstance(value, torch.Tensor):
        yield path, (str(value.dtype), tuple(value.shape), value.stride(), bits(value))
    else:
        yield path, value


def content(prefix: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Every key of a bundle, its dtype, shape and bytes, as TensorFlow reads them."""
    reader = tf.train.load_checkpoint(str(prefix))
    dtypes, shapes = reader.get_variable_to_dtype_map(), reader.get_variable_to_shape_map()
    result = {}
    for key, dtype in dtypes.items():
        value = reader.get_tensor(key)
        raw = value if isinstance(value, bytes) else np.ascontiguousarray(value).tobytes()
        result[key] = (dtype.name, tuple(shapes[key]), raw)
    return result


def number(prefix: Path, key: str) -> int:
    return int(tf.train.load_checkpoint(str(prefix)).get_tensor(key + VALUE))


def test_there_are_cases() -> None:
    assert len(DICTIONARIES) >= 12
    assert len(BUNDLES) >= 20


class TestTrainingDictionaries:
    @pytest.mark.parametrize("source", DICTIONARIES, ids=identity)
    def test_objects_come_back_equal(self, source: Path, tmp_path: Path) -> None:
        before = torch.load(source, weights_only=True)
        after = torch.load(back(archive(source, tmp_path), source), weights_only=True)
        assert_same(before, after)
        assert sharing(before) == sharing(after)

    def test_every_case_is_accounted_for(self) -> None:
        cases = {case_of(path) for path in DICTIONARIES}
        assert cases == {*MOVED, *NO_STEP, *STALE}

    def test_memory_formats_come_back(self, tmp_path: Path) -> None:
        torch.manual_seed(5)
        model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 2), torch.nn.Conv3d(4, 2, (1, 2, 3)))
        model[0].to(memory_format=torch.channels_last)
        optimizer = torch.optim.Adam(model[0].parameters())
        model[0](torch.randn(1, 3, 5, 5)).sum().backward()
        optimizer.step()
        assert optimizer.state[model[0].weight]["exp_avg"].stride() == (12, 1, 6, 3)
        views = {"t": torch.randn(3, 5).t(), "every_other": torch.randn(6)[::2], "one": torch.randn(1, 3).t()}
        run = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "buffers": views}
        torch.save(run, tmp_path / "run.pt")
        before = torch.load(tmp_path / "run.pt", weights_only=True)
        after = torch.load(
            back(archive(tmp_path / "run.pt", tmp_path), tmp_path / "run.pt"), weights_only=True
        )
        gaps = [side["buffers"].pop("every_other") for side in (before, after)]
        assert_same(before, after)
        # strides that leave gaps are of a larger storage, which is no content: the values come back
        assert torch.equal(*gaps)
        assert after["buffers"]["t"].stride() == (1, 5)

    @pytest.mark.parametrize("source", [p for p in DICTIONARIES if case_of(p) in MOVED], ids=identity)
    def test_an_edited_step_is_in_every_place(self, source: Path, tmp_path: Path) -> None:
        neutral = archive(source, tmp_path)
        edit_step(neutral)
        before = dict(leaves(torch.load(source, weights_only=True)))
        loaded = torch.load(back(neutral, source), weights_only=True)
        after = dict(leaves(loaded))
        assert list(before) == list(after)
        changed = {path for path in before if before[path] != after[path]}
        steps = {path for path in before if len(path) == 4 and path[1] == "state" and path[3] == "step"}
        expected = MOVED[case_of(source)]
        assert changed == steps | set(expected)
        assert {path: after[path] for path in expected} == expected
        for path in steps:
            tensor = loaded[path[0]]["state"][path[2]]["step"]
            assert (tensor.dtype, tensor.item()) == (torch.float32, EDITED)
            assert before[path][:3] == after[path][:3]
        if source.parent.name in ("never-stepped", "schedule-free"):  # counts per group
            assert not steps
        else:
            assert len(steps) >= 2

    @pytest.mark.parametrize("source", [p for p in DICTIONARIES if case_of(p) in NO_STEP], ids=identity)
    def test_what_stores_no_step_is_told_so(self, source: Path, tmp_path: Path) -> None:
        manifest = json.loads((archive(source, tmp_path) / "manifest.json").read_text())
        assert manifest["progress"]["step"]["status"] == "unknown"

    def test_a_second_counter_of_unknown_pace_is_stale(self, tmp_path: Path) -> None:
        neutral = archive(FIXTURES / "plain" / "module-prefix" / "run.pt", tmp_path)
        edit_step(neutral)
        (problem,) = refused_here("convert", neutral, tmp_path / "back.pt")
        assert (problem["code"], problem["loc"]) == ("residue-stale", ["steps"])
        assert not (tmp_path / "back.pt").exists()

    def test_a_scheduler_that_steps_with_every_update_moves_along(self, tmp_path: Path) -> None:
        model = torch.nn.Linear(2, 2)
        optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=2000, gamma=0.5)
        for _ in range(6):
            optimizer.zero_grad()
            model(torch.randn(3, 2)).sum().backward()
            optimizer.step()
            scheduler.step()
        run = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
        torch.save({**run, "scheduler": scheduler.state_dict()}, tmp_path / "run.pt")
        neutral = archive(tmp_path / "run.pt", tmp_path)
        assert edit_step(neutral) == 6
        after = torch.load(back(neutral, tmp_path / "run.pt"), weights_only=True)
        assert (after["scheduler"]["last_epoch"], after["scheduler"]["_step_count"]) == (EDITED, EDITED + 1)
        assert [float(entry["step"]) for entry in after["optimizer"]["state"].values()] == [EDITED] * 2
        scheduler.load_state_dict(after["scheduler"])
        assert scheduler.last_epoch == EDITED

    def test_a_learning_rate_follows_the_step_where_the_schedule_tells_it(self, tmp_path: Path) -> None:
        model = torch.nn.Linear(2, 2)
        optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=4, gamma=0.5)
        for _ in range(6):
            model(torch.randn(3, 2)).sum().backward()
            optimizer.step()
            scheduler.step()
        run = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
        torch.save({**run, "scheduler": scheduler.state_dict()}, tmp_path / "run.pt")
        neutral = archive(tmp_path / "run.pt", tmp_path)
        edit_step(neutral)
        after = torch.load(back(neutral, tmp_path / "run.pt"), weights_only=True)
        due = 0.1 * 0.5 ** (EDITED // 4)
        assert after["optimizer"]["param_groups"][0]["lr"] == pytest.approx(due, rel=1e-12)
        assert after["scheduler"]["_last_lr"] == [after["optimizer"]["param_groups"][0]["lr"]]


class TestBundles:
    @pytest.mark.parametrize("source", BUNDLES, ids=identity)
    def test_keys_come_back_equal_the_graph_included(self, source: Path, tmp_path: Path) -> None:
        before, after = content(source), content(back(archive(source, tmp_path), source))
        assert "_CHECKPOINTABLE_OBJECT_GRAPH" in before
        assert list(before) == list(after)
        assert before == after

    @pytest.mark.parametrize("source", [p for p in BUNDLES if case_of(p) not in NO_UPDATES], ids=identity)
    def test_an_edited_step_is_the_only_change(self, source: Path, tmp_path: Path) -> None:
        case = case_of(source)
        neutral = archive(source, tmp_path)
        counter = INNER.get(case, COUNTERS[case.split("/")[0]])
        assert edit_step(neutral) == number(source, counter)
        written = back(neutral, source)
        assert number(written, counter) == EDITED
        before, after = content(source), content(written)
        counters = {counter: EDITED, **COUPLED.get(case, {})}
        changed = {key for key in before | after if before.get(key) != after.get(key)}
        assert changed == {key + VALUE for key in counters}
        assert {key: number(written, key) for key in counters} == counters
        assert all(before[key][:2] == after[key][:2] for key in changed)

    @pytest.mark.parametrize("source", [p for p in BUNDLES if case_of(p) in NO_UPDATES], ids=identity)
    def test_what_records_no_updates_is_told_so(self, source: Path, tmp_path: Path) -> None:
        manifest = json.loads((archive(source, tmp_path) / "manifest.json").read_text())
        assert manifest["progress"]["step"]["status"] == "unknown"

    def test_a_variable_that_counts_with_the_optimizer_moves_along(self, tmp_path: Path) -> None:
        keras = pytest.importorskip("keras")
        model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(2)])
        optimizer = keras.optimizers.Adam(0.01)
        optimizer.build(model.trainable_variables)
        optimizer.iterations.assign(5)
        counters = {"step": tf.Variable(5, dtype=tf.int64), "seen": tf.Variable(5, dtype=tf.int64)}
        source = tf.train.Checkpoint(model=model, optimizer=optimizer, **counters).save(
            str(tmp_path / "ckpt")
        )
        neutral = archive(Path(source), tmp_path)
        assert edit_step(neutral) == 5
        written = back(neutral, Path(source))
        assert number(written, "optimizer/_iterations") == EDITED
        assert number(written, "step") == EDITED
        assert number(written, "seen") == 5


class TestNotes:
    """A container that carries our note keeps it, and it does not tell an old step."""

    def bundle(self, folder: Path) -> Path:
        fresh = FIXTURES / "keras3" / "mlp-adamw-fresh" / "ckpt-1"
        source = FIXTURES / "plain" / "mlp-adamw" / "run.pt"
        return convert_here(source, folder / "converted-1", "--template", fresh, "--set", "epochs=3")

    def dictionary(self, folder: Path) -> Path:
        return convert_here(
            self.bundle(folder),
            folder / "converted.pt",
            "--template",
            FIXTURES / "plain" / "mlp-adamw" / "run.pt",
            "--set",
            "epoch_convention=count",
        )

    def test_of_a_bundle(self, tmp_path: Path) -> None:
        source = self.bundle(tmp_path)
        before, after = content(source), content(back(archive(source, tmp_path), source))
        assert NOTE in before
        assert before == after

    def test_of_a_bundle_whose_step_was_edited(self, tmp_path: Path) -> None:
        source = self.bundle(tmp_path)
        neutral = archive(source, tmp_path)
        edit_step(neutral)
        written = back(neutral, source)
        before, after = content(source), content(written)
        changed = {key for key in before if before[key] != after[key]}
        assert changed == {NOTE, "optimizer/_iterations" + VALUE}
        self.assert_only_the_step_differs(before[NOTE][2].decode(), after[NOTE][2].decode())
        # the note and the counter agree: the file opens, and the rest of the note is told
        progress = inspect_here(written)["progress"]
        assert (progress["step"]["value"], progress["epochs"]["value"]) == (EDITED, 3)

    def test_of_a_dictionary(self, tmp_path: Path) -> None:
        source = self.dictionary(tmp_path)
        before = torch.load(source, weights_only=True)
        assert json.loads(before["ckptconv"])["progress"]["step"]["value"] == 9
        after = torch.load(back(archive(source, tmp_path), source), weights_only=True)
        assert_same(before, after)

    def test_of_a_dictionary_whose_step_was_edited(self, tmp_path: Path) -> None:
        source = self.dictionary(tmp_path)
        before = torch.load(source, weights_only=True)["ckptconv"]
        neutral = archive(source, tmp_path)
        edit_step(neutral)
        loaded = torch.load(back(neutral, source), weights_only=True)
        assert {float(s["step"]) for s in loaded["optimizer_state_dict"]["state"].values()} == {EDITED}
        self.assert_only_the_step_differs(before, loaded["ckptconv"])

    def test_of_weights(self, tmp_path: Path) -> None:
        from safetensors import safe_open

        source = convert_here(FIXTURES / "plain" / "mlp-adamw" / "run.pt", tmp_path / "w.safetensors")
        neutral = archive(source, tmp_path)
        exact = convert_here(neutral, tmp_path / "same.safetensors")
        assert exact.read_bytes() == source.read_bytes()
        edit_step(neutral)
        edited = convert_here(neutral, tmp_path / "edited.safetensors")
        with safe_open(source, "np") as before, safe_open(edited, "np") as after:
            self.assert_only_the_step_differs(before.metadata()["ckptconv"], after.metadata()["ckptconv"])

    def test_of_what_was_supplied_on_the_way(self, tmp_path: Path) -> None:
        """SGD of torch has no place for a step, a bundle none for epochs: they get a note, not lost."""
        source = FIXTURES / "plain" / "linear-sgd-9-steps" / "run.pt"
        neutral = archive(source, tmp_path)
        written = convert_here(neutral, tmp_path / "noted.pt", "--set", "step=77")
        assert inspect_here(written)["progress"]["step"]["value"] == 77
        loaded = torch.load(written, weights_only=True)
        assert json.loads(loaded.pop("ckptconv"))["progress"]["step"]["value"] == 77
        assert_same(torch.load(source, weights_only=True), loaded)

        source = FIXTURES / "keras3" / "sequential-adam" / "artifact" / "ckpt-1"
        written = convert_here(source, tmp_path / "noted-1", "--to", "tensorflow", "--set", "epochs=4")
        assert inspect_here(written)["progress"]["epochs"]["value"] == 4
        after = content(written)
        assert json.loads(after.pop(NOTE)[2])["progress"]["epochs"]["value"] == 4
        assert content(source) == after

        torch.save(torch.nn.Linear(2, 2).state_dict(), tmp_path / "weights.pt")
        target = tmp_path / "again.pt"
        (problem,) = refused_here("convert", tmp_path / "weights.pt", target, "--set", "step=77")
        assert (problem["code"], problem["loc"]) == ("state-dropped", ["progress", "step"])
        assert not target.exists()

    @staticmethod
    def assert_only_the_step_differs(before: str, after: str) -> None:
        old, new = json.loads(before), json.loads(after)
        assert old["progress"].pop("step")["value"] == 9
        assert new["progress"].pop("step")["value"] == EDITED
        # an optimizer's step is either that of the run, or it is brought up to date as well
        for optimizer in (*old["optimizers"], *new["optimizers"]):
            step = optimizer.pop("step")
            assert step["status"] == "same" or step["value"] in (9, EDITED)
        assert all(o.get("step", {}).get("value") != 9 for o in json.loads(after)["optimizers"])
        assert old == new
