"""The plain training dictionary and the bare state_dict, from live torch objects, without files."""

from __future__ import annotations

import json
from collections import OrderedDict
from dataclasses import replace
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

from ckptconv.conversion import validate  # noqa: E402
from ckptconv.dialects.torch_plain import Plain  # noqa: E402
from ckptconv.dialects.torch_scheduler import rate_at  # noqa: E402
from ckptconv.dialects.torch_state_dict import StateDict  # noqa: E402
from ckptconv.document import Checkpoint, Known, Unknown, value_of  # noqa: E402
from ckptconv.errors import CkptError  # noqa: E402
from ckptconv.note import write_note  # noqa: E402
from ckptconv.rawtree import DictNode, walk  # noqa: E402
from ckptconv.tensor import StoredTensor, TensorRef  # noqa: E402
from tests.support.torch_nodes import comparable, tree  # noqa: E402

FIXTURES = Path(__file__).parents[2] / "fixtures" / "plain"
CASES = sorted(
    path.parent.name
    for path in FIXTURES.glob("*/expected.json")
    if "param_order" in json.loads(path.read_text())
)
"""Those that `common.py` made."""


def run(case: str) -> dict[str, object]:
    return torch.load(FIXTURES / case / "run.pt", weights_only=True)


def lifted(value: object) -> Checkpoint:
    return Plain().lift(tree(value))


def lowered(checkpoint: Checkpoint) -> DictNode:
    root = Plain().lower(checkpoint).root
    assert isinstance(root, DictNode)
    return root


def number(root: DictNode, *path: object) -> object:
    node = root
    for key in path:
        node = node.items[key] if not isinstance(node, DictNode) else node.get(key)  # type: ignore[assignment,index,arg-type]
    return node.read().item() if isinstance(node, TensorRef) else node


def trained(optimizer_class: type = torch.optim.Adam, steps: int = 3, **options: object) -> dict[str, object]:
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 3)
    optimizer = optimizer_class(model.parameters(), lr=0.1, **options)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(4, 3)).pow(2).mean().backward()
        optimizer.step()
    return {"model": model.state_dict(), "optimizer": optimizer.state_dict()}


def code_of(checkpoint: Checkpoint) -> tuple[str, tuple[object, ...]]:
    with pytest.raises(CkptError) as caught:
        Plain().lower(checkpoint)
    return caught.value.problems[0].code, caught.value.problems[0].loc


def test_there_are_cases() -> None:
    assert len(CASES) >= 11


@pytest.mark.parametrize("case", CASES)
def test_cases_say_what_is_expected(case: str) -> None:
    expected = json.loads((FIXTURES / case / "expected.json").read_text())
    checkpoint = lifted(run(case))
    (optimizer,) = checkpoint.optimizers
    assert (optimizer.algorithm, optimizer.param_order) == (expected["algorithm"], expected["param_order"])
    for name, fact in expected["progress"].items():
        got = getattr(checkpoint.progress, name)
        if isinstance(got, Known):
            assert fact == {"status": got.status, "value": got.value, "source": got.source}
        else:
            assert fact == {"status": "unknown", "candidates": [c.value for c in got.candidates]}
    ties = {p.name: p.tied_to for p in checkpoint.params.values() if p.tied_to}
    assert ties == expected.get("tied", {})
    assert sorted(checkpoint.extras) == expected.get("extras", [])
    if "slots" in expected:
        assert sorted(optimizer.slots) == expected["slots"]
    if "params" in expected:
        assert list(checkpoint.params) == expected["params"]
    if "schedule" in expected:
        (schedule,) = checkpoint.schedules
        assert (schedule.family, value_of(schedule.position)) == tuple(expected["schedule"].values())


@pytest.mark.parametrize("case", CASES)
def test_the_way_back_is_exact_and_no_tensor_is_left_in_the_residue(case: str) -> None:
    raw = tree(run(case))
    before = comparable(raw.root)
    checkpoint = Plain().lift(raw)
    assert checkpoint.residue is not None
    assert not [path for path, leaf in walk(checkpoint.residue.root) if isinstance(leaf, TensorRef)]
    assert comparable(Plain().lower(checkpoint).root) == before
    assert comparable(raw.root) == before


@pytest.mark.parametrize(
    "key", ["model", "model_state_dict", "state_dict", "net", "network", "module", "weights"]
)
def test_models_under_every_spelling(key: str) -> None:
    parts = trained()
    checkpoint = lifted({key: parts["model"], "opt": parts["optimizer"], "note": "x"})
    assert list(checkpoint.params) == ["weight", "bias"]
    assert checkpoint.optimizers[0].name == "optimizer"


@pytest.mark.parametrize("key", ["step", "global_step", "iteration", "iter_num", "n_iter"])
def test_a_counter_that_agrees_with_the_optimizer_moves_with_it(key: str) -> None:
    checkpoint = lifted({**trained(), key: 3})
    assert checkpoint.progress.step == Known(value=3, source="optimizer.state.0.step")
    edited = replace(checkpoint, progress=replace(checkpoint.progress, step=Known(value=12, source="edit")))
    root = lowered(edited)
    assert [number(root, "optimizer", "state", i, "step") for i in (0, 1)] == [12.0, 12.0]
    assert number(root, key) == 12


def test_a_counter_that_names_the_last_update_keeps_its_convention() -> None:
    checkpoint = lifted({**trained(), "step": 2})
    assert value_of(checkpoint.progress.step) == 3
    edited = replace(checkpoint, progress=replace(checkpoint.progress, step=Known(value=12)))
    assert number(lowered(edited), "step") == 11


def test_a_counter_of_something_else_stops_an_edited_step() -> None:
    checkpoint = lifted({**trained(), "step": 30})
    assert value_of(checkpoint.progress.step) == 3
    assert isinstance(checkpoint.progress.micro_steps, Unknown)
    assert number(lowered(checkpoint), "step") == 30
    edited = replace(checkpoint, progress=replace(checkpoint.progress, step=Known(value=12)))
    assert code_of(edited) == ("residue-stale", ("step",))


@pytest.mark.parametrize(("supplied", "ok"), [(2, True), (1, True), (7, False)])
def test_a_bare_epoch_is_settled_by_its_two_readings_only(supplied: int, ok: bool) -> None:
    checkpoint = lifted({**trained(), "epoch": 1})
    assert isinstance(checkpoint.progress.epochs, Unknown)
    told = Known(value=supplied, status="supplied", source="--set")
    settled = replace(checkpoint, progress=replace(checkpoint.progress, epochs=told))
    if ok:
        assert number(lowered(settled), "epoch") == 1
    else:
        assert code_of(settled) == ("residue-stale", ("epoch",))


def test_a_template_does_not_keep_its_own_epoch_for_another_run() -> None:
    template = lifted({**trained(), "epoch": 5})
    foreign = replace(template, progress=replace(template.progress, epochs=Unknown(reason="not recorded")))
    assert code_of(foreign) == ("progress-unknown", ("epoch",))


@pytest.mark.parametrize("options", [{}, {"momentum": 0.9}])
def test_sgd_stores_no_step(options: dict[str, object]) -> None:
    checkpoint = lifted(trained(torch.optim.SGD, **options))
    assert isinstance(checkpoint.progress.step, Unknown)
    assert checkpoint.progress.step.candidates == ()
    assert set(checkpoint.optimizers[0].slots) == ({"momentum"} if options else set())


def test_an_edited_optimizer_step_and_an_edited_progress_must_agree() -> None:
    checkpoint = lifted(trained())
    (optimizer,) = checkpoint.optimizers
    only_own = replace(checkpoint, optimizers=(replace(optimizer, step=Known(value=8)),))
    assert number(lowered(only_own), "optimizer", "state", 0, "step") == 8.0
    both = replace(only_own, progress=replace(checkpoint.progress, step=Known(value=9)))
    assert code_of(both)[0] == "progress-conflict"


def test_slots_are_created_in_a_fresh_template_in_torchs_order() -> None:
    source = lifted(trained())
    template = lifted(trained(steps=0))
    (fresh,) = template.optimizers
    assert fresh.slots == {}
    filled = replace(
        template,
        progress=replace(template.progress, step=Known(value=9)),
        optimizers=(replace(fresh, step=Known(value=9), slots=source.optimizers[0].slots),),
    )
    root = lowered(filled)
    state = root.get("optimizer").get("state")  # type: ignore[union-attr]
    assert state.keys == (0, 1)
    assert state.get(0).keys == ("step", "exp_avg", "exp_avg_sq")
    step = state.get(0).get("step")
    assert isinstance(step, StoredTensor)
    assert (step.dtype.name, step.shape, step.read().item()) == ("float32", (), 9.0)


def test_slots_that_the_document_lacks_are_removed_with_their_step() -> None:
    checkpoint = lifted(trained())
    (optimizer,) = checkpoint.optimizers
    only = {slot: {"weight": by["weight"]} for slot, by in optimizer.slots.items()}
    root = lowered(replace(checkpoint, optimizers=(replace(optimizer, slots=only),)))
    assert root.get("optimizer").get("state").keys == (0,)  # type: ignore[union-attr]


def test_a_slot_that_torchs_class_does_not_have_is_refused() -> None:
    template = lifted(trained(steps=0))
    (fresh,) = template.optimizers
    extra = {"velocity": {"weight": template.params["weight"].tensor}}
    code, _ = code_of(replace(template, optimizers=(replace(fresh, step=Known(value=1), slots=extra),)))
    assert code == "state-dropped"


def test_a_step_that_float32_cannot_hold_is_refused() -> None:
    checkpoint = lifted(trained())
    edited = replace(checkpoint, progress=replace(checkpoint.progress, step=Known(value=(1 << 24) + 1)))
    assert code_of(edited)[0] == "progress-range"


def test_parameters_without_state_have_no_slots_and_come_back_without() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    optimizer = torch.optim.Adam(model.parameters())
    model[0](torch.randn(3, 2)).sum().backward()
    optimizer.step()
    raw = tree({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    checkpoint = Plain().lift(raw)
    assert list(checkpoint.optimizers[0].param_steps) == ["0.weight", "0.bias"]
    assert comparable(Plain().lower(checkpoint).root) == comparable(raw.root)


def test_different_steps_are_all_kept_and_the_largest_is_the_runs() -> None:
    parts = trained()
    parts["optimizer"]["state"][1]["step"] = torch.tensor(2.0)  # type: ignore[index]
    checkpoint = lifted(parts)
    assert value_of(checkpoint.progress.step) == 3
    assert checkpoint.optimizers[0].param_steps == {"weight": 3, "bias": 2}
    assert checkpoint.oddities
    assert number(lowered(checkpoint), "optimizer", "state", 1, "step") == 2.0


def test_old_integer_steps_stay_integers() -> None:
    parts = trained()
    for entry in parts["optimizer"]["state"].values():  # type: ignore[index]
        entry["step"] = 3
    root = lowered(lifted(parts))
    assert type(number(root, "optimizer", "state", 0, "step")) is int


def test_frozen_gaps_are_accepted_where_one_order_fits_only() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Linear(3, 4))
    optimizer = torch.optim.Adam(model[1].parameters())
    model(torch.randn(3, 2)).sum().backward()
    optimizer.step()
    checkpoint = lifted({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    assert checkpoint.optimizers[0].params == ("1.weight", "1.bias")
    square = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 3))
    optimizer = torch.optim.Adam(square[1].parameters())
    square(torch.randn(3, 3)).sum().backward()
    optimizer.step()
    checkpoint = lifted({"model": square.state_dict(), "optimizer": optimizer.state_dict()})
    assert checkpoint.optimizers[0].param_order == "unknown"
    assert checkpoint.optimizers[0].params == ("#0", "#1")


def test_names_whose_state_has_another_shape_are_not_believed() -> None:
    parts = trained()
    parts["optimizer"]["param_groups"][0]["param_names"] = ["bias", "weight"]  # type: ignore[index]
    checkpoint = lifted(parts)
    assert checkpoint.optimizers[0].param_order == "unknown"
    assert comparable(Plain().lower(checkpoint).root) == comparable(tree(parts).root)


@pytest.mark.parametrize("spoil", ["param_names", "params", "twice"])
def test_groups_that_contradict_themselves_are_corrupt(spoil: str) -> None:
    parts = trained()
    group = parts["optimizer"]["param_groups"][0]  # type: ignore[index]
    if spoil == "param_names":
        group["param_names"] = ["weight"]
    else:
        group["params"] = [0, 0] if spoil == "twice" else [0, None]
    with pytest.raises(CkptError) as caught:
        lifted(parts)
    assert caught.value.problems[0].code == "corrupt-file"
    assert caught.value.problems[0].loc[0] == "optimizer"


@pytest.mark.parametrize(
    "name",
    ["RMSprop", "Adagrad", "Adadelta", "Adamax", "NAdam", "RAdam", "Rprop", "ASGD", "Adafactor", "LBFGS"],
)
def test_optimizers_outside_the_catalog_are_kept_whole(name: str) -> None:
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 2)
    optimizer = getattr(torch.optim, name)(model.parameters())

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        value = model(torch.ones(4, 3)).pow(2).mean()
        value.backward()
        return value

    for _ in range(2):
        optimizer.step(loss)
    raw = tree({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    checkpoint = Plain().lift(raw)
    assert checkpoint.optimizers[0].algorithm not in ("adam", "adamw", "sgd")
    assert comparable(Plain().lower(checkpoint).root) == comparable(raw.root)
    if name not in ("LBFGS",):
        assert value_of(checkpoint.progress.step) == 2


def test_amsgrad_and_learning_rates_as_tensors() -> None:
    parts = trained(amsgrad=True)
    parts["optimizer"]["param_groups"][0]["lr"] = torch.tensor(0.25)  # type: ignore[index]
    checkpoint = lifted(parts)
    assert "max_second_moment" in checkpoint.optimizers[0].slots
    rate = checkpoint.optimizers[0].groups[0].hyperparameters["learning_rate"]
    assert value_of(rate) == 0.25
    assert isinstance(number(lowered(checkpoint), "optimizer", "param_groups", 0, "lr"), float)


def test_several_models_and_optimizers_keep_their_names() -> None:
    first, second = trained(), trained(steps=2)
    raw = tree(
        {
            "generator": first["model"],
            "discriminator": second["model"],
            "optimizer_g": first["optimizer"],
            "optimizer_d": second["optimizer"],
        }
    )
    checkpoint = Plain().lift(raw)
    assert next(iter(checkpoint.params)) == "generator.weight"
    assert [o.name for o in checkpoint.optimizers] == ["optimizer_g", "optimizer_d"]
    assert checkpoint.optimizers[1].params == ("discriminator.weight", "discriminator.bias")
    assert isinstance(checkpoint.progress.step, Unknown)
    assert {c.value for c in checkpoint.progress.step.candidates} == {2, 3}
    assert comparable(Plain().lower(checkpoint).root) == comparable(raw.root)


def test_scaler_generators_averages_and_the_rest_are_kept() -> None:
    raw = tree(
        {
            **trained(),
            "scaler": {"scale": 1024.0, "growth_factor": 2.0, "_growth_tracker": 3},
            "rng_state": torch.get_rng_state(),
            "rng": {"python": (3, (1, 2), None), "torch": torch.get_rng_state()},
            "ema": {"weight": torch.ones(3, 3)},
            "args": {"lr": 0.1, "layers": [1, 2], "name": "x", "none": None},
            "history": [(0, 0.5), (1, 0.25)],
            7: {"a": 1.5},
        }
    )
    checkpoint = Plain().lift(raw)
    assert checkpoint.progress.loss_scale == Known(value=1024.0, source="scaler.scale")
    assert [(b.name, b.library) for b in checkpoint.rng] == [
        ("rng_state", "torch-cpu"),
        ("rng/python", "python"),
        ("rng/torch", "torch-cpu"),
    ]
    assert {"ema/weight", "rng_state", "rng/torch"} == set(checkpoint.extras)
    assert value_of(checkpoint.loss_scaling["growth_tracker"]) == 3
    assert list(checkpoint.params) == ["weight", "bias"]
    assert comparable(Plain().lower(checkpoint).root) == comparable(raw.root)


def test_the_note_stands_in_the_dictionary_and_never_in_a_state_dict() -> None:
    checkpoint = lifted(trained())
    noted = replace(checkpoint, extensions={"ckptconv/note": write_note(checkpoint)})
    root = lowered(noted)
    assert root.keys[-1] == "ckptconv"
    again = Plain().lift(replace(tree({}), root=root))
    assert again.extensions == noted.extensions
    assert comparable(lowered(again)) == comparable(root)
    assert "ckptconv" not in lowered(replace(again, extensions={}))
    bare = StateDict().lower(replace(noted, residue=None)).root
    assert isinstance(bare, DictNode)
    assert bare.keys == ("weight", "bias")


def test_the_note_tells_what_the_dictionary_cannot() -> None:
    checkpoint = lifted({**trained(torch.optim.SGD), "epoch": 1})
    told = replace(
        checkpoint.progress, step=Known(value=9, status="supplied"), epochs=Known(value=2, status="supplied")
    )
    note = write_note(replace(checkpoint, progress=told))
    again = lifted({**trained(torch.optim.SGD), "epoch": 1, "ckptconv": note})
    assert again.progress.step == Known(value=9, status="supplied", source="embedded note")
    assert value_of(again.progress.epochs) == 2
    assert value_of(again.optimizers[0].step) == 9
    root = lowered(again)
    assert (number(root, "epoch"), number(root, "ckptconv")) == (1, note)
    saved_later = lifted({**trained(torch.optim.SGD), "epoch": 6, "ckptconv": note})
    assert isinstance(saved_later.progress.epochs, Unknown)
    assert any("note" in odd for odd in saved_later.oddities)
    step = saved_later.progress.step
    assert isinstance(step, Unknown)
    assert [(c.value, c.source) for c in step.candidates][-1:] == [(9, "embedded note")]


def test_a_note_older_than_its_file_is_a_problem_of_the_file(tmp_path: Path) -> None:
    checkpoint = lifted({**trained(torch.optim.SGD), "epoch": 1})
    note = write_note(replace(checkpoint, progress=replace(checkpoint.progress, epochs=Known(value=2))))
    for epoch in (1, 6):
        torch.save({**trained(torch.optim.SGD), "epoch": epoch, "ckptconv": note}, tmp_path / f"{epoch}.pt")
    assert validate(tmp_path / "1.pt") == []
    problems = [(p.code, p.loc) for p in validate(tmp_path / "6.pt")]
    assert problems == [("progress-conflict", ("progress", "epochs"))]


def test_an_edited_step_is_edited_in_the_note() -> None:
    parts = trained()
    note = write_note(lifted(parts))
    checkpoint = lifted({**parts, "ckptconv": note})
    edited = replace(checkpoint, progress=replace(checkpoint.progress, step=Known(value=12)))
    again = Plain().lift(replace(tree({}), root=lowered(edited)))
    assert value_of(again.progress.step) == 12
    assert not again.oddities


def scheduled(position: int) -> dict[str, object]:
    """A run of 3 updates whose StepLR (a decay after 10) stands at `position`."""
    parts = trained()
    optimizer = torch.optim.Adam(torch.nn.Linear(3, 3).parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 10, gamma=0.5)
    parts["optimizer"]["param_groups"][0]["initial_lr"] = 0.1  # type: ignore[index]
    state = {**scheduler.state_dict(), "last_epoch": position, "_step_count": position + 1}
    return {**parts, "scheduler": state}


def with_step(checkpoint: Checkpoint, step: int) -> Checkpoint:
    return replace(checkpoint, progress=replace(checkpoint.progress, step=Known(value=step)))


def test_a_schedule_that_moves_with_the_step_is_rewritten_where_its_rate_stays() -> None:
    checkpoint = lifted(scheduled(3))
    root = lowered(with_step(checkpoint, 8))
    assert (number(root, "scheduler", "last_epoch"), number(root, "scheduler", "_step_count")) == (8, 9)
    root = lowered(with_step(checkpoint, 12))
    assert number(root, "scheduler", "last_epoch") == 12
    assert number(root, "scheduler", "_last_lr", 0) == 0.05
    assert number(root, "optimizer", "param_groups", 0, "lr") == 0.05
    (optimizer,) = checkpoint.optimizers
    facts = optimizer.groups[0].hyperparameters
    for status, rate in (("recorded", 0.07), ("supplied", 0.07)):
        fact = Known(value=rate, status=status, source="edit")  # type: ignore[arg-type]
        group = replace(optimizer.groups[0], hyperparameters={**facts, "learning_rate": fact})
        other = with_step(replace(checkpoint, optimizers=(replace(optimizer, groups=(group,)),)), 12)
        if status == "recorded":
            loc = ("optimizers", "optimizer", "groups", 0, "hyperparameters", "learning_rate")
            assert code_of(other) == ("residue-stale", loc)
        else:
            assert number(lowered(other), "scheduler", "_last_lr", 0) == 0.07


def test_a_schedule_of_another_pace_stops_an_edited_step() -> None:
    checkpoint = lifted(scheduled(1))
    edited = with_step(checkpoint, 8)
    assert code_of(edited) == ("residue-stale", ("scheduler", "last_epoch"))
    (schedule,) = checkpoint.schedules
    told = replace(schedule, position=Known(value=4, status="supplied"))
    assert number(lowered(replace(edited, schedules=(told,))), "scheduler", "_step_count") == 5


@pytest.mark.parametrize(
    ("name", "options", "family"),
    [
        ("StepLR", {"step_size": 3, "gamma": 0.5}, "step"),
        ("ExponentialLR", {"gamma": 0.9}, "exponential"),
        ("CosineAnnealingLR", {"T_max": 9, "eta_min": 0.01}, "cosine"),
        ("LinearLR", {"start_factor": 0.2, "total_iters": 4}, "linear"),
        ("ConstantLR", {"factor": 0.5, "total_iters": 4}, "constant"),
        ("PolynomialLR", {"total_iters": 9, "power": 2.0}, "polynomial"),
        ("MultiStepLR", {"milestones": [2, 4]}, "multi-step"),
        ("CosineAnnealingWarmRestarts", {"T_0": 4}, "cosine-restarts"),
        ("OneCycleLR", {"max_lr": 0.5, "total_steps": 20}, "one-cycle"),
        ("CyclicLR", {"base_lr": 0.1, "max_lr": 0.5, "cycle_momentum": False}, "cyclic"),
        ("LambdaLR", {"lr_lambda": float}, "lambda"),
        ("ReduceLROnPlateau", {}, "plateau"),
    ],
)
def test_families_of_schedules(name: str, options: dict[str, object], family: str) -> None:
    model = torch.nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = getattr(torch.optim.lr_scheduler, name)(optimizer, **options)
    for _ in range(5):
        optimizer.step()
        scheduler.step(1.0) if family == "plateau" else scheduler.step()
    state = {k: v for k, v in scheduler.state_dict().items() if not callable(v)}
    raw = tree({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "scheduler": dict(state)})
    checkpoint = Plain().lift(raw)
    (schedule,) = checkpoint.schedules
    assert (schedule.family, value_of(schedule.position)) == (family, 5)
    due = rate_at(schedule, 0.1, 5)
    if due is not None:
        assert due == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-9)
    assert comparable(Plain().lower(checkpoint).root) == comparable(raw.root)


def test_an_edited_rate_is_edited_in_the_scheduler_too() -> None:
    torch.manual_seed(0)
    model = torch.nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    checkpoint = lifted(
        {
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "scheduler": scheduler.state_dict(),
        }
    )
    (old,) = checkpoint.optimizers
    group = old.groups[0]
    rates = {**group.hyperparameters, "learning_rate": Known(value=0.5)}
    root = lowered(
        replace(checkpoint, optimizers=(replace(old, groups=(replace(group, hyperparameters=rates),)),))
    )
    assert number(root, "optimizer", "param_groups", 0, "lr") == 0.5
    assert number(root, "scheduler", "_last_lr", 0) == 0.5


def test_without_a_template_there_is_nothing_to_write() -> None:
    checkpoint = replace(lifted(trained()), residue=None)
    assert code_of(checkpoint) == ("template-required", ("residue",))


def test_a_template_of_other_groups_is_refused() -> None:
    checkpoint = lifted(trained())
    (optimizer,) = checkpoint.optimizers
    fewer = replace(optimizer.groups[0], params=("weight",))
    assert (
        code_of(replace(checkpoint, optimizers=(replace(optimizer, groups=(fewer,)),)))[0]
        == "template-mismatch"
    )


def test_a_bare_state_dict_round_trips_and_is_written_from_a_document_alone() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3))
    state = model.state_dict(prefix="module.")
    raw = tree(state)
    assert Plain().detect(raw) is None or StateDict().detect(raw).score > Plain().detect(raw).score  # type: ignore[union-attr]
    checkpoint = StateDict().lift(raw)
    assert list(checkpoint.params) == list(model.state_dict())
    assert checkpoint.params["1.running_mean"].trainable is False
    assert comparable(StateDict().lower(checkpoint).root) == comparable(raw.root)
    written = StateDict().lower(replace(checkpoint, residue=None)).root
    assert isinstance(written, DictNode)
    assert written.kind == "collections.OrderedDict"
    assert list(written.keys) == list(model.state_dict())


def test_names_that_would_fall_together_keep_their_prefix() -> None:
    state = OrderedDict([("a._orig_mod.w", torch.ones(1)), ("a.w", torch.zeros(1))])
    assert list(StateDict().lift(tree(state)).params) == ["a._orig_mod.w", "a.w"]
    partly = OrderedDict([("module.w", torch.ones(1)), ("w", torch.zeros(1))])
    assert list(StateDict().lift(tree(partly)).params) == ["module.w", "w"]


def test_a_name_twice_is_refused() -> None:
    raw = tree({"w": torch.ones(1)})
    assert isinstance(raw.root, DictNode)
    with pytest.raises(CkptError) as caught:
        StateDict().lift(replace(raw, root=replace(raw.root, items=raw.root.items * 2)))
    assert caught.value.problems[0].code == "duplicate-key"
