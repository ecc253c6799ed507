"""`Trainer.fit(ckpt_path=...)` really goes on from what is written, where the document says it stands."""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from tests.support.command import convert_here, refused_here  # noqa: E402
from tests.support.torch_equal import assert_same  # noqa: E402

FIXTURES = Path(__file__).parents[2] / "fixtures"
LIGHTNING = FIXTURES / "lightning"
RESUMED = ("mid-epoch", "epoch-end", "after-fit", "validated", "last-batch", "sgd", "accumulating", "gan")
EPOCHS = 4


@pytest.fixture(scope="module")
def cases() -> ModuleType:
    """The models and trainers that made the fixtures."""
    pytest.importorskip("lightning", reason="needs Lightning to go on from the file")
    spec = importlib.util.spec_from_file_location("lightning_cases", LIGHTNING / "common.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def file_of(case: str) -> Path:
    return LIGHTNING / case / "run.ckpt"


def truth_of(case: str) -> dict[str, Any]:
    truth: dict[str, Any] = json.loads((LIGHTNING / case / "expected.json").read_text(encoding="utf-8"))
    return truth


def resume(
    cases: ModuleType, case: str, file: Path, folder: Path, **limits: int
) -> tuple[Any, dict[str, Any]]:
    """The model after the rest of the run, and what the trainer held when it started."""
    import lightning

    held: dict[str, Any] = {}

    class Watch(lightning.Callback):
        def on_train_start(self, trainer: Any, module: Any) -> None:
            held["global_step"] = trainer.global_step
            held["epoch"] = trainer.current_epoch
            states = [o.state_dict()["state"] for o in trainer.optimizers]
            held["steps"] = [{int(s["step"]) for s in state.values() if "step" in s} for state in states]
            held["positions"] = [c.scheduler.last_epoch for c in trainer.lr_scheduler_configs]
            held["rates"] = [group["lr"] for o in trainer.optimizers for group in o.param_groups]

    options: dict[str, Any] = {"accumulate_grad_batches": 2} if case == "accumulating" else {}
    model: Any = cases.Net(
        algorithm="sgd" if case == "sgd" else "adam", interval="epoch" if case == "after-fit" else "step"
    )
    if case == "gan":
        model = cases.Gan()
    loaders = [cases.loader()] + ([cases.loader(4)] if case == "validated" else [])
    trainer = cases.trainer(folder, Watch(), enable_checkpointing=False, **options, **limits)
    trainer.fit(model, *loaders, ckpt_path=str(file), weights_only=False)
    held["after"] = trainer.global_step
    return model, held


@pytest.mark.parametrize("case", RESUMED)
@pytest.mark.filterwarnings("ignore")
def test_lightning_goes_on_where_the_document_says(cases: ModuleType, case: str, tmp_path: Path) -> None:
    neutral = convert_here(file_of(case), tmp_path / "neutral", "--to", "neutral")
    back = convert_here(neutral, tmp_path / "run.ckpt", "--to", "pytorch:lightning")
    truth = truth_of(case)
    model, held = resume(cases, case, back, tmp_path, max_epochs=EPOCHS)
    assert held["global_step"] == sum(truth["optimizers"])
    assert held["epoch"] == truth["progress"]["epochs"]
    assert held["steps"] == [{step} if case != "sgd" else set() for step in truth["optimizers"]]
    consumed = truth["progress"]["epochs"] * cases.BATCHES + truth["progress"]["batch_in_epoch"]
    assert len(model.seen) == EPOCHS * cases.BATCHES - consumed
    assert model.seen[0] == truth["progress"]["batch_in_epoch"]
    same, _ = resume(cases, case, file_of(case), tmp_path, max_epochs=EPOCHS)
    assert_same(dict(same.state_dict()), dict(model.state_dict()))


@pytest.mark.filterwarnings("ignore")
def test_an_edited_step_is_the_one_that_lightning_resumes_at(cases: ModuleType, tmp_path: Path) -> None:
    neutral = convert_here(file_of("mid-epoch"), tmp_path / "neutral", "--to", "neutral")
    rate = 0.01 * 0.5**10
    back = convert_here(
        neutral, tmp_path / "run.ckpt", "--to", "pytorch:lightning",
        "--set", "step=40", "--set", f"learning_rate={rate!r}",
    )  # fmt: skip
    model, held = resume(cases, "mid-epoch", back, tmp_path, max_steps=46)
    assert held["global_step"] == 40
    assert held["steps"] == [{40}]
    assert held["positions"] == [40]
    assert held["rates"] == [rate]
    assert held["after"] == 46
    assert len(model.seen) == 6


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("template", ["epoch-end", "last-batch", "validated"])
def test_from_keras_onto_another_run_it_goes_on_as_the_source(
    cases: ModuleType, template: str, tmp_path: Path
) -> None:
    twin = FIXTURES / "keras3" / "lightning-net" / "artifact" / "ckpt-1"
    keras = convert_here(file_of("mid-epoch"), tmp_path / "ckpt-1", "--template", twin)
    back = convert_here(keras, tmp_path / "run.ckpt", "--template", file_of(template))
    model, held = resume(cases, "mid-epoch", back, tmp_path, max_epochs=EPOCHS)
    same, before = resume(cases, "mid-epoch", file_of("mid-epoch"), tmp_path, max_epochs=EPOCHS)
    assert held == before
    assert model.seen == same.seen
    assert_same(dict(same.state_dict()), dict(model.state_dict()))


@pytest.mark.filterwarnings("ignore")
def test_edited_epochs_are_the_ones_that_lightning_resumes_at(cases: ModuleType, tmp_path: Path) -> None:
    neutral = convert_here(file_of("last-batch"), tmp_path / "neutral", "--to", "neutral")
    for batch, rest in ((0, 6), (2, 4)):
        back = convert_here(
            neutral, tmp_path / f"{batch}.ckpt", "--to", "pytorch:lightning",
            "--set", "epochs=7", "--set", f"batch_in_epoch={batch}",
        )  # fmt: skip
        model, held = resume(cases, "last-batch", back, tmp_path, max_epochs=9)
        assert (held["epoch"], held["global_step"]) == (7, 6)
        assert len(model.seen) == rest
        assert model.seen[0] == batch


@pytest.mark.filterwarnings("ignore")
def test_with_weight_averaging_the_trained_weights_are_not_those_of_state_dict(
    cases: ModuleType, tmp_path: Path
) -> None:
    from lightning.pytorch.callbacks import EMAWeightAveraging

    import ckptconv

    source = tmp_path / "run.ckpt"
    save = cases.lightning.pytorch.callbacks.LambdaCallback(
        on_train_epoch_end=lambda trainer, module: trainer.save_checkpoint(source)
    )
    callbacks = (EMAWeightAveraging(decay=0.8), save)
    trainer = cases.trainer(tmp_path, *callbacks, enable_checkpointing=False, max_epochs=2)
    trainer.fit(cases.Net(), cases.loader())
    saved = torch.load(source, weights_only=False)
    whole, average = ckptconv.open(source), ckptconv.open(source, select=["ema"])
    for name, tensor in saved["current_model_state"].items():
        assert whole.params[name].read().tobytes() == tensor.numpy().tobytes()
        assert average.params[name].read().tobytes() == saved["state_dict"][name].numpy().tobytes()
        assert not torch.equal(tensor, saved["state_dict"][name])
    assert whole.optimizers[0].param_order == "declaration-order"
    neutral = convert_here(source, tmp_path / "neutral", "--to", "neutral")
    back = convert_here(neutral, tmp_path / "back.ckpt", "--to", "pytorch:lightning")
    assert_same(saved, torch.load(back, weights_only=False))


def test_objects_of_the_user_survive_where_that_is_allowed(tmp_path: Path) -> None:
    run = torch.load(file_of("epoch-end"), weights_only=False)
    run["hyper_parameters"]["arguments"] = argparse.Namespace(width=4, name="net")
    source = tmp_path / "source.ckpt"
    torch.save(run, source)
    neutral = convert_here(source, tmp_path / "neutral", "--to", "neutral", "--allow", "opaque-globals")
    problems = refused_here("convert", neutral, tmp_path / "no.ckpt", "--to", "pytorch:lightning")
    assert {problem["code"] for problem in problems} == {"opaque-globals"}
    back = convert_here(
        neutral, tmp_path / "run.ckpt", "--to", "pytorch:lightning", "--allow", "opaque-globals"
    )
    after = torch.load(back, weights_only=False)
    assert after["hyper_parameters"]["arguments"] == run["hyper_parameters"]["arguments"]
    assert_same(
        {k: v for k, v in run.items() if k != "hyper_parameters"},
        {k: v for k, v in after.items() if k != "hyper_parameters"},
    )
