"""AdamWScheduleFree: the schedulefree package's state, its way back, and why Keras 3's goes another way."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import ckptconv  # noqa: E402
from ckptconv.document import value_of  # noqa: E402
from ckptconv.errors import CkptError  # noqa: E402

RUN = Path(__file__).resolve().parents[2] / "fixtures/plain/schedule-free/run.pt"


def fresh(place: Path) -> Path:
    """The run as it was before the first update: no state, counters at 0."""
    state = torch.load(RUN, weights_only=True)
    state["optimizer"]["state"] = {}
    for group in state["optimizer"]["param_groups"]:
        group.update(k=0, weight_sum=0.0, lr_max=-1.0, scheduled_lr=0.0, lr=0.5)
    torch.save(state, place / "fresh.pt")
    return place / "fresh.pt"


def test_what_it_holds() -> None:
    (optimizer,) = ckptconv.open(RUN).optimizers
    state = torch.load(RUN, weights_only=True)["optimizer"]
    assert optimizer.algorithm == "schedule_free_adamw"
    assert value_of(optimizer.step) == state["param_groups"][0]["k"] == 3
    for slot, key in (("first_moment", "z"), ("second_moment", "exp_avg_sq")):
        for number, name in enumerate(optimizer.params):
            np.testing.assert_array_equal(optimizer.slots[slot][name].read(), state["state"][number][key])
    facts = optimizer.groups[0].hyperparameters
    assert value_of(facts["train_mode"]) is True
    assert value_of(facts["weight_sum"]) == state["param_groups"][0]["weight_sum"]


def test_onto_a_fresh_file_and_back(tmp_path: Path) -> None:
    template = fresh(tmp_path)
    report = ckptconv.convert(RUN, tmp_path / "out.pt", template=template)
    assert report.verdicts[0].verdict == "exact"
    ours, theirs = (torch.load(path, weights_only=True)["optimizer"] for path in (tmp_path / "out.pt", RUN))
    assert ours["param_groups"] == theirs["param_groups"]
    for number, entry in theirs["state"].items():
        assert set(ours["state"][number]) == set(entry)
        for key, value in entry.items():
            assert torch.equal(ours["state"][number][key], value)


def test_an_edited_step_is_that_of_the_groups(tmp_path: Path) -> None:
    ckptconv.convert(RUN, tmp_path / "out.pt", set_={"step": "7"})
    state = torch.load(tmp_path / "out.pt", weights_only=True)["optimizer"]
    assert state["param_groups"][0]["k"] == 7
    assert all("step" not in entry for entry in state["state"].values())


def keras_template(place: Path) -> str:
    keras = pytest.importorskip("keras")
    tf = pytest.importorskip("tensorflow")
    layers = [keras.Input((3,)), keras.layers.Dense(4, activation="tanh"), keras.layers.Dense(2)]
    model = keras.Sequential(layers)
    optimizer = keras.optimizers.ScheduleFreeAdamW(0.01)
    optimizer.build(model.trainable_variables)
    return str(tf.train.Checkpoint(model=model, optimizer=optimizer).save(str(place / "k")))


def test_keras_has_another_average(tmp_path: Path) -> None:
    template = keras_template(tmp_path)
    with pytest.raises(CkptError) as caught:
        ckptconv.convert(RUN, tmp_path / "out-1", template=template)
    found = {(problem.code, problem.loc) for problem in caught.value.problems}
    assert ("form-mismatch", ("optimizers", "optimizer", "form", "average")) in found
    report = ckptconv.convert(RUN, tmp_path / "out-1", template=template, allow=["form-mismatch"])
    assert report.verdicts[0].verdict == "lossy"


def test_weights_of_eval_mode_are_not_those_that_are_trained(tmp_path: Path) -> None:
    state = torch.load(RUN, weights_only=True)
    state["optimizer"]["param_groups"][0]["train_mode"] = False
    torch.save(state, tmp_path / "eval.pt")
    with pytest.raises(CkptError) as caught:
        ckptconv.convert(
            tmp_path / "eval.pt",
            tmp_path / "out-1",
            template=keras_template(tmp_path),
            allow=["form-mismatch"],
        )
    found = {(problem.code, problem.loc[-1]) for problem in caught.value.problems}
    assert ("hyperparameter-unsupported", "train_mode") in found


def test_the_package_goes_on(tmp_path: Path) -> None:
    """Where the package is installed: five updates at once, and three and two with a conversion between."""
    schedulefree = pytest.importorskip("schedulefree")

    def made() -> tuple[Any, Any]:
        torch.manual_seed(5)
        model = torch.nn.Linear(3, 2)
        optimizer = schedulefree.AdamWScheduleFree(model.parameters(), lr=0.01)
        optimizer.train()
        return model, optimizer

    def updated(model: Any, optimizer: Any, first: int, count: int) -> None:
        for number in range(first, first + count):
            torch.manual_seed(number)
            optimizer.zero_grad()
            model(torch.randn(4, 3)).square().sum().backward()
            optimizer.step()

    one = made()
    updated(*one, 0, 3)
    torch.save({"model": one[0].state_dict(), "optimizer": one[1].state_dict()}, tmp_path / "a.pt")
    other = made()
    torch.save({"model": other[0].state_dict(), "optimizer": other[1].state_dict()}, tmp_path / "t.pt")
    ckptconv.convert(tmp_path / "a.pt", tmp_path / "b.pt", template=tmp_path / "t.pt")
    state = torch.load(tmp_path / "b.pt", weights_only=True)
    other[0].load_state_dict(state["model"])
    other[1].load_state_dict(state["optimizer"])
    for side in (one, other):
        updated(*side, 3, 2)
    assert torch.equal(one[0].weight, other[0].weight)
