"""What a file does not tell of its optimizer, or its target cannot hold, stops till it is told or allowed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
tf = pytest.importorskip("tensorflow")
keras = pytest.importorskip("keras")

import ckptconv  # noqa: E402
from ckptconv.errors import CkptError  # noqa: E402

TOKENS = [[1, 1, 2], [1, 3, 3]]


def torch_run(place: Path, cls: str, **more: Any) -> Path:
    torch.manual_seed(3)
    model = torch.nn.Sequential(torch.nn.Embedding(5, 4), torch.nn.Linear(4, 2))
    optimizer = getattr(torch.optim, cls)(model.parameters(), lr=0.01, **more)
    for _ in range(4):
        optimizer.zero_grad()
        model(torch.tensor(TOKENS)).square().sum().backward()
        optimizer.step()
    path = place / "run.pt"
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, path)
    return path


def keras_model(cls: str, **more: Any) -> tuple[Any, Any]:
    model = keras.Sequential(
        [keras.Input((3,), dtype="int64"), keras.layers.Embedding(5, 4), keras.layers.Dense(2)]
    )
    optimizer = getattr(keras.optimizers, cls)(0.01, **more)
    optimizer.build(model.trainable_variables)
    return model, optimizer


def keras_template(place: Path, cls: str, **more: Any) -> str:
    model, optimizer = keras_model(cls, **more)
    return str(tf.train.Checkpoint(model=model, optimizer=optimizer).save(str(place / "fresh")))


def codes(caught: Any) -> set[tuple[str, tuple[Any, ...]]]:
    return {(problem.code, problem.loc) for problem in caught.value.problems}


def without_a_hint(path: Path, edit: Any = None) -> Path:
    """The file as torch wrote it before 2.7, whose groups do not tell Adam from AdamW."""
    state = torch.load(path, weights_only=True)
    for group in state["optimizer"]["param_groups"]:
        group.pop("decoupled_weight_decay")
        if edit is not None:
            edit(group)
    torch.save(state, path)
    return path


@pytest.mark.parametrize("target", ["Adam", "AdamW"])
def test_adam_or_adamw_is_for_the_caller_to_say(target: str, tmp_path: Path) -> None:
    source = without_a_hint(torch_run(tmp_path, "AdamW", weight_decay=0.05))
    template = keras_template(tmp_path, target)
    with pytest.raises(CkptError) as caught:
        ckptconv.convert(source, tmp_path / "out-1", template=template)
    assert codes(caught) == {("optimizer-unknown", ("optimizers", "optimizer", "algorithm"))}
    report = ckptconv.convert(source, tmp_path / "out-1", template=template, set_={"optimizer": "adamw"})
    assert report.verdicts[0].verdict == "approximate"
    assert any("weight_decay=0.05" in line for line in report.target_requires)
    with pytest.raises(CkptError) as caught:
        ckptconv.convert(source, tmp_path / "out-2", template=template, set_={"optimizer": "adam"})
    assert {code for code, _ in codes(caught)} == {"form-mismatch"}


def test_without_a_decay_both_are_one(tmp_path: Path) -> None:
    source = without_a_hint(torch_run(tmp_path, "Adam"))
    report = ckptconv.convert(source, tmp_path / "out-1", template=keras_template(tmp_path, "Adam"))
    assert report.verdicts[0].verdict == "approximate"


def test_a_source_spec_says_it_too(tmp_path: Path) -> None:
    source = without_a_hint(torch_run(tmp_path, "AdamW", weight_decay=0.05))
    model = torch.nn.Sequential(torch.nn.Embedding(5, 4), torch.nn.Linear(4, 2))
    spec = ckptconv.pytorch.describe(model, torch.optim.AdamW(model.parameters(), weight_decay=0.05))
    ckptconv.convert(source, tmp_path / "out-1", template=keras_template(tmp_path, "AdamW"), source_spec=spec)


def test_what_keras_does_not_store_must_be_told(tmp_path: Path) -> None:
    """The betas and epsilon that torch's groups hold are in no Keras checkpoint; all that lack are named."""
    model, optimizer = keras_model("Adam", epsilon=1e-3)
    optimizer.apply([tf.ones_like(v) for v in model.trainable_variables], model.trainable_variables)
    saved = tf.train.Checkpoint(model=model, optimizer=optimizer).save(str(tmp_path / "run"))
    template = torch_run(tmp_path, "Adam")
    state = torch.load(template, weights_only=True)
    state["optimizer"]["state"] = {}
    torch.save(state, tmp_path / "fresh.pt")
    report = ckptconv.convert(saved, tmp_path / "a.pt", template=tmp_path / "fresh.pt")
    supplied = {e.target: e.fate for e in report.ledger if e.item[0] == "hyperparameter"}
    assert supplied["optimizer.beta_1"] == supplied["optimizer.epsilon"] == "supplied"
    ckptconv.convert(
        saved, tmp_path / "b.pt", template=tmp_path / "fresh.pt", set_={"beta_1": "0.5", "epsilon": "0.001"}
    )
    (group,) = torch.load(tmp_path / "b.pt", weights_only=True)["optimizer"]["param_groups"]
    assert (group["betas"][0], group["eps"]) == (0.5, 0.001)


def test_steps_that_differ_need_a_word(tmp_path: Path) -> None:
    source = torch_run(tmp_path, "Adam")
    state = torch.load(source, weights_only=True)
    state["optimizer"]["state"][1]["step"] -= 2
    torch.save(state, source)
    template = keras_template(tmp_path, "Adam")
    with pytest.raises(CkptError) as caught:
        ckptconv.convert(source, tmp_path / "out-1", template=template)
    assert codes(caught) == {("unequal-steps", ("optimizers", "optimizer", "param_steps"))}
    report = ckptconv.convert(source, tmp_path / "out-1", template=template, allow=["unequal-steps"])
    assert report.verdicts[0].verdict == "lossy"
    key = "optimizer/_iterations/.ATTRIBUTES/VARIABLE_VALUE"
    assert tf.train.load_checkpoint(str(tmp_path / "out-1")).get_tensor(key) == 4


@pytest.mark.parametrize("name", ["lr", "eps"])
def test_groups_that_differ_need_a_word(name: str, tmp_path: Path) -> None:
    source = torch_run(tmp_path, "Adam")
    state = torch.load(source, weights_only=True)
    (group,) = state["optimizer"]["param_groups"]
    other = {**group, name: group[name] / 2, "params": group["params"][1:]}
    names = ["0.weight", "1.weight", "1.bias"]
    group["params"] = group["params"][:1]
    group["param_names"], other["param_names"] = names[:1], names[1:]
    state["optimizer"]["param_groups"] = [group, other]
    torch.save(state, source)
    template = keras_template(tmp_path, "Adam")
    with pytest.raises(CkptError) as caught:
        ckptconv.convert(source, tmp_path / "out-1", template=template)
    assert {code for code, _ in codes(caught)} == {"groups-differ"}
    report = ckptconv.convert(source, tmp_path / "out-1", template=template, allow=["groups-differ"])
    assert report.verdicts[0].verdict == "lossy"


@pytest.mark.parametrize(("cls", "target"), [("Adam", "Adam"), ("Adadelta", "Adadelta")])
def test_sparse_gradients_are_said_and_the_remedy_helps(cls: str, target: str, tmp_path: Path) -> None:
    """One update with repeated tokens: the stock class goes another way, the remedy does not."""
    source = torch_run(tmp_path, cls, **({"eps": 1e-12} if cls == "Adam" else {}))
    more = {"epsilon": 1e-12} if cls == "Adam" else {"epsilon": 1e-6, "rho": 0.9}
    template = keras_template(tmp_path, target, **more)
    report = ckptconv.convert(source, tmp_path / "out-1", template=template)
    (line,) = [text for text in report.verdicts[0].residuals if text.startswith("sparse gradients")]
    assert "ckptconv.keras.densified(optimizer)" in line
    model = torch.nn.Sequential(torch.nn.Embedding(5, 4), torch.nn.Linear(4, 2))
    optimizer = getattr(torch.optim, cls)(model.parameters(), lr=0.01)
    state = torch.load(source, weights_only=True)
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    model(torch.tensor(TOKENS)).square().sum().backward()
    optimizer.step()
    expected = model[0].weight.detach().numpy()

    def stepped(wrap: Any) -> np.ndarray:
        there, stock = keras_model(target, **more)
        fresh = wrap(type(stock).from_config(stock.get_config()))
        fresh.build(there.trainable_variables)
        tf.train.Checkpoint(model=there, optimizer=fresh).restore(str(tmp_path / "out-1")).assert_consumed()
        before = there.layers[0].embeddings.numpy()
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(tf.square(there(tf.constant(TOKENS))))
        gradients = tape.gradient(loss, there.trainable_variables)
        assert any(isinstance(each, tf.IndexedSlices) for each in gradients)
        fresh.apply(gradients, there.trainable_variables)
        after = there.layers[0].embeddings.numpy()
        difference: np.ndarray = np.abs(after - expected).max() / np.abs(before - expected).max()
        return difference

    assert stepped(ckptconv.keras.densified) < 1e-4
    assert stepped(lambda optimizer: optimizer) > 1e-2
