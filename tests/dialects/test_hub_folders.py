"""Adapters of PEFT's and pipelines of diffusers', from fixtures that these libraries wrote."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import ckptconv
from ckptconv import doctor
from ckptconv.dialects import torch_adapter
from ckptconv.document import Known, Unknown
from ckptconv.errors import CkptError
from tests.dialects.test_trainer_folders import digest, expected
from tests.support.command import FIXTURES

LORA = FIXTURES / "peft" / "lora"
PIPELINE = FIXTURES / "diffusers" / "pipeline"
TRUTH = expected(LORA)


def params(checkpoint: ckptconv.Checkpoint) -> dict[str, Any]:
    return {name: digest(param.tensor) for name, param in checkpoint.params.items()}


def slots(checkpoint: ckptconv.Checkpoint) -> dict[str, Any]:
    (optimizer,) = checkpoint.optimizers
    return {slot: {n: digest(t) for n, t in held.items()} for slot, held in optimizer.slots.items()}


def test_an_adapter_is_weights_with_what_its_config_says() -> None:
    checkpoint = ckptconv.open(LORA / "adapter")
    assert (checkpoint.provenance.dialect, checkpoint.kind) == ("peft", "weights")
    assert params(checkpoint) == TRUTH["loop"]["params"]
    told = checkpoint.extensions["peft/adapter"]
    assert isinstance(told, dict)
    assert (told["peft_type"], told["r"], told["lora_alpha"]) == ("LORA", 2, 6)
    assert told["base_model_name_or_path"] == "acme/tiny"
    assert isinstance(checkpoint.progress.step, Unknown)


def test_an_adapter_goes_through_neutral_and_back(tmp_path: Path) -> None:
    ckptconv.convert(LORA / "adapter", tmp_path / "kept", to="neutral")
    assert ckptconv.open(tmp_path / "kept").extensions["peft/adapter"]
    ckptconv.convert(tmp_path / "kept", tmp_path / "back", to="pytorch:peft")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "back" / name).read_bytes() == (LORA / "adapter" / name).read_bytes()


def test_a_loop_that_trains_an_adapter() -> None:
    """Parameters are called as peft saves them; its optimizer holds those that it trains, in their order."""
    checkpoint, truth = ckptconv.open(LORA / "run.pt"), TRUTH["loop"]
    found = params(checkpoint)
    assert {name: found[name] for name in truth["params"]} == truth["params"]
    assert checkpoint.optimizers[0].param_order == "declaration-order"
    assert slots(checkpoint) == truth["slots"]
    assert all(checkpoint.params[name].trainable for name in truth["params"])
    others = [param for name, param in checkpoint.params.items() if name not in truth["params"]]
    assert {param.trainable for param in others} == {False, None}
    assert all(param.trainable is False for param in others if not param.name.endswith("bias"))
    assert "transformer.h.0.attn.c_attn.weight" in checkpoint.params  # the base model's name of a base layer
    assert "transformer.ln_f.original_module.weight" in checkpoint.params


def test_several_adapters_keep_their_names(tmp_path: Path) -> None:
    names = ["q.base_layer.weight", *(f"q.lora_A.{adapter}.weight" for adapter in ("one", "two"))]
    torch.save({f"base_model.model.{name}": torch.ones(2, 2) for name in names}, tmp_path / "x.pt")
    assert list(ckptconv.open(tmp_path / "x.pt").params) == names


def test_the_folder_of_a_trainer_that_trains_an_adapter() -> None:
    checkpoint, truth = ckptconv.open(LORA / "trainer"), TRUTH["trainer"]
    assert checkpoint.provenance.dialect == "hf-trainer"
    assert params(checkpoint) == truth["params"]
    assert checkpoint.progress.step == Known(value=truth["step"], source="optimizer.pt.state.0.step")
    assert isinstance(checkpoint.progress.epochs, Known)
    assert checkpoint.progress.epochs.value == truth["epochs"]
    assert checkpoint.extensions["peft/adapter"]


def test_its_state_is_matched_by_a_skeleton_and_never_by_guess(tmp_path: Path) -> None:
    """safetensors sorts by name, and both layers' arrays have equal shapes."""
    assert ckptconv.open(LORA / "trainer").optimizers[0].param_order == "unknown"
    report = ckptconv.convert(
        LORA / "trainer", tmp_path / "kept", to="neutral", source_spec=LORA / "spec.json"
    )
    assert report is not None
    checkpoint = ckptconv.open(tmp_path / "kept")
    assert checkpoint.optimizers[0].param_order == "skeleton"
    assert slots(checkpoint) == TRUTH["trainer"]["slots"]


def to_keras(path: Path) -> list[str]:
    """The commands of `doctor` that carry a file into Keras."""
    return [mend.command for mend in doctor.diagnose(path).mends if "Keras" in mend.text and mend.command]


LOW_RANK = ("lora_A", "lora_B")


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("peft/lora/run.pt", (*LOW_RANK, "modules_to_save")),
        ("peft/lora/adapter", LOW_RANK),
        ("peft/lora/trainer", LOW_RANK),
        ("hf-trainer/fsdp-adapter-full/checkpoint", LOW_RANK),
        ("hf-trainer/fsdp-adapter-sharded/checkpoint", LOW_RANK),  # has no adapter_config.json
    ],
)
def test_the_doctor_carries_no_adapter_into_keras_by_itself(name: str, parts: tuple[str, ...]) -> None:
    assert torch_adapter.parts(ckptconv.open(FIXTURES / name)) == parts
    assert to_keras(FIXTURES / name) == []


@pytest.mark.parametrize(
    ("names", "parts"),
    [
        (("net.base_model.model.q.weight", "net.base_model.model.q.ia3_l.default"), ("ia3_l",)),
        (("q.base_layer.weight", "q.vera_lambda_b.default"), ("vera_lambda_b",)),  # inject_adapter_in_model
        (("base_model.model.e.lora_embedding_A",), ("lora_embedding_A",)),
        (("q.weight", "q.lora_A", "q.lora_B"), LOW_RANK),  # loralib
        (("road_net.weight", "poly_head.0.weight", "lora_gateway.weight"), ()),
    ],
)
def test_an_adapter_is_known_by_its_names(
    names: tuple[str, ...], parts: tuple[str, ...], tmp_path: Path
) -> None:
    torch.save({name: torch.ones(2, 3) for name in names}, tmp_path / "x.pt")
    assert torch_adapter.parts(ckptconv.open(tmp_path / "x.pt")) == parts
    assert bool(to_keras(tmp_path / "x.pt")) == (not parts)


def test_the_models_of_a_pipeline() -> None:
    checkpoint, truth = ckptconv.open(PIPELINE / "pipeline"), expected(PIPELINE)["components"]
    assert (checkpoint.provenance.dialect, checkpoint.kind) == ("diffusers", "weights")
    both = {f"{part}.{name}": value for part, held in truth.items() for name, value in held.items()}
    assert params(checkpoint) == both


@pytest.mark.parametrize("select", ["unet", "model:vqvae"])
def test_one_model_of_a_pipeline(select: str, tmp_path: Path) -> None:
    truth = expected(PIPELINE)["components"][select.removeprefix("model:")]
    assert params(ckptconv.open(PIPELINE / "pipeline", select=[select])) == truth
    ckptconv.convert(PIPELINE / "pipeline", tmp_path / "one.safetensors", select=[select])
    assert params(ckptconv.open(tmp_path / "one.safetensors")) == truth


def test_a_model_that_the_pipeline_has_not() -> None:
    with pytest.raises(CkptError) as caught:
        ckptconv.open(PIPELINE / "pipeline", select=["text_encoder"])
    assert [(p.code, p.loc) for p in caught.value.problems] == [("usage", ("--select", "text_encoder"))]


@pytest.mark.parametrize("name", ["diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin"])
def test_the_folder_of_one_component_is_weights(name: str, tmp_path: Path) -> None:
    shutil.copytree(PIPELINE / "pipeline" / "unet", tmp_path / "unet")
    if name.endswith(".bin"):
        (tmp_path / "unet" / "diffusion_pytorch_model.safetensors").unlink()
        state = ckptconv.open(PIPELINE / "pipeline" / "unet").params
        torch.save(
            {n: torch.from_numpy(np.asarray(p.read())) for n, p in state.items()}, tmp_path / "unet" / name
        )
    assert params(ckptconv.open(tmp_path / "unet")) == expected(PIPELINE)["components"]["unet"]


def test_a_component_in_shards(tmp_path: Path) -> None:
    folder = tmp_path / "pipeline"
    shutil.copytree(PIPELINE / "pipeline", folder)
    whole = folder / "unet" / "diffusion_pytorch_model.safetensors"
    ckptconv.convert(whole, folder / "unet" / "shards", to="safetensors", shard_size="8KB")
    whole.unlink()
    (index,) = (folder / "unet" / "shards").glob("*.index.json")
    named = json.loads(index.read_text())
    for shard in (folder / "unet" / "shards").glob("*.safetensors"):
        shard.rename(folder / "unet" / shard.name)
    shutil.rmtree(folder / "unet" / "shards")
    (folder / "unet" / f"{whole.name}.index.json").write_text(json.dumps(named))
    truth = expected(PIPELINE)["components"]["unet"]
    assert len(set(named["weight_map"].values())) > 1
    assert params(ckptconv.open(folder, select=["unet"])) == truth


@pytest.mark.parametrize("folder", [LORA / "adapter", PIPELINE / "pipeline"])
def test_a_folder_needs_a_template(folder: Path, tmp_path: Path) -> None:
    dialect = ckptconv.open(folder).provenance.dialect
    torch.save({"weight": torch.ones(2, 3)}, tmp_path / "x.pt")
    with pytest.raises(CkptError) as caught:
        ckptconv.convert(tmp_path / "x.pt", tmp_path / "y", to=f"pytorch:{dialect}")
    assert caught.value.problems[0].code == "template-required"


@pytest.mark.parametrize("mark", ["adapter_config.json", "model_index.json"])
def test_a_folder_without_weights(mark: str, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / mark).write_text("{}")
    with pytest.raises(CkptError) as caught:
        ckptconv.open(tmp_path / "run")
    assert [(p.code, p.loc) for p in caught.value.problems] == [("unknown-dialect", ("run",))]


def test_a_pipeline_goes_through_neutral_and_back(tmp_path: Path) -> None:
    ckptconv.convert(PIPELINE / "pipeline", tmp_path / "kept", to="neutral")
    ckptconv.convert(tmp_path / "kept", tmp_path / "back", to="pytorch:diffusers")
    there = {p.relative_to(PIPELINE / "pipeline"): p for p in (PIPELINE / "pipeline").rglob("*.*")}
    assert {p: (tmp_path / "back" / p).read_bytes() for p in there} == {
        p: q.read_bytes() for p, q in there.items()
    }
