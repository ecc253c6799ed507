"""The calls of the catalog's table on what training programs save: their layouts, folders, single variables.

Programs that are not installed here have rows that name the source they were read in; what torch itself does
with their files is measured.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tests.restores.files import X, Y
from tests.restores.outcome import STEPS, Call, Held, Make, Outcome, judged
from tests.restores.torch_calls import Program, folder, fresh, load_weights, one_file_of, saved
from tests.restores.trainer_calls import data, lightning_trainer
from tests.support.command import FIXTURES

_EPOCHS, _BATCHES = 2, 4
assert _EPOCHS * _BATCHES == STEPS


# layouts of single files


def in_layout(layout: Callable[[Program], dict[str, Any]]) -> Callable[[Program, Path], None]:
    """`torch.save` of the dictionary that a program makes."""

    def save(program: Program, path: Path) -> None:
        import torch

        torch.save(layout(program), path)

    return save


def fairseq(program: Program) -> dict[str, Any]:
    """fairseq/trainer.py state_dict, at the end of the second epoch."""
    history = {"criterion_name": "MSE", "optimizer_name": "Adam", "num_updates": STEPS}
    iterator = {"version": 2, "epoch": _EPOCHS + 1, "iterations_in_epoch": 0, "shuffle": True}
    return {
        "args": None,
        "cfg": {},
        "model": program.model.state_dict(),
        "criterion": None,
        "optimizer_history": [{**history, "lr_scheduler_state": {}}],
        "task_state": {},
        "extra_state": {"train_iterator": iterator, "val_loss": 1.5},
        "last_optimizer_state": program.optimizer.state_dict(),
    }


def composer(program: Program) -> dict[str, Any]:
    """composer/core/state.py state_dict: the optimizer by parameter name."""
    names = [name for name, _ in program.model.named_parameters()]
    state = program.optimizer.state_dict()
    optimizer = {
        "state": {names[number]: entry for number, entry in state["state"].items()},
        "param_groups": [{**g, "params": [names[i] for i in g["params"]]} for g in state["param_groups"]],
    }
    timestamp = {"epoch": _EPOCHS, "batch": STEPS, "sample": 16 * STEPS, "token": 0, "iteration": 0}
    within = {"batch_in_epoch": 0, "sample_in_epoch": 0, "token_in_epoch": 0}
    return {
        "state": {
            "model": program.model.state_dict(),
            "optimizers": {"Adam": optimizer},
            "timestamp": {"Timestamp": {**timestamp, **within}},
        },
        "rng": [],
    }


def detectron2(program: Program) -> dict[str, Any]:
    """DefaultTrainer with its PeriodicCheckpointer: three places have the last iteration, from 0."""
    last = STEPS - 1
    inner = {"iteration": last, "optimizer": program.optimizer.state_dict()}
    trainer = {"iteration": last, "hooks": {}, "_trainer": inner}
    return {"model": program.model.state_dict(), "trainer": trainer, "iteration": last}


def ultralytics(program: Program) -> dict[str, Any]:
    """ultralytics/engine/trainer.py save_model: the average as a whole module."""
    return {
        "epoch": _EPOCHS - 1,
        "best_fitness": 0.5,
        "model": None,
        "ema": copy.deepcopy(program.model),
        "updates": STEPS,
        "optimizer": program.optimizer.state_dict(),
        "train_args": {"epochs": 9},
        "date": "2024-01-01T00:00:00",
        "version": "8.3.0",
    }


def part(*keys: str) -> Call:
    """`model.load_state_dict` of what stands there in the file."""

    def read(path: Path) -> Any:
        import torch

        found = torch.load(path, weights_only=False)
        for key in keys:
            found = found[key]
        return found

    return load_weights(read)


# torchtitan


def flat() -> Any:
    from torch.distributed.checkpoint.state_dict import StateDictOptions

    return StateDictOptions(flatten_optimizer_state_dict=True)


def titan_state(program: Program) -> dict[str, Any]:
    """The weights at the root, the optimizer flat, counters in `train_state`."""
    from torch.distributed.checkpoint.state_dict import get_state_dict

    weights, state = get_state_dict(program.model, program.optimizer, options=flat())
    return {
        **weights,
        "optimizer": state,
        "lr_scheduler": {"last_epoch": STEPS},
        "dataloader": {"dp_rank_0": b"position", "world_size": 1},
        "train_state": {"step": STEPS, "ntokens_seen": 99},
    }


def titan_folder(program: Program, path: Path) -> None:
    import torch.distributed.checkpoint as dcp

    dcp.save(titan_state(program), checkpoint_id=path)


def titan_file(program: Program, path: Path) -> None:
    titan_folder(program, path.with_name("folder"))
    one_file_of(path.with_name("folder"), path)


def titan_load(path: Path) -> Held:
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    program = fresh()
    weights, state = get_state_dict(program.model, program.optimizer, options=flat())
    dcp.load({**weights, "optimizer": state}, checkpoint_id=path)
    set_state_dict(
        program.model, program.optimizer, model_state_dict=weights, optim_state_dict=state, options=flat()
    )
    return program.held()


def titan_under_model(path: Path) -> Held:
    import torch.distributed.checkpoint as dcp

    program = fresh()
    dcp.load({"model": program.model.state_dict()}, checkpoint_id=path)
    return program.held()


def titan_file_set_state(path: Path) -> Held:
    import torch
    from torch.distributed.checkpoint.state_dict import set_model_state_dict, set_optimizer_state_dict

    program, run = fresh(), torch.load(path)
    set_model_state_dict(program.model, {name: run[name] for name in program.model.state_dict()})
    set_optimizer_state_dict(program.model, program.optimizer, run["optimizer"], options=flat())
    return program.held()


def titan_file_load(path: Path) -> Held:
    import torch

    program = fresh()
    program.optimizer.load_state_dict(torch.load(path)["optimizer"])
    return program.held()


# a folder of Lightning's


def sharded_model(seed: int) -> Any:
    import lightning
    import torch
    from torch.distributed.fsdp import fully_shard

    class Net(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net: Any = None

        def configure_model(self) -> None:
            if self.net is None:
                self.net = fresh(seed=seed).model
                fully_shard(self.net, mesh=self.device_mesh["data_parallel"])

        def training_step(self, batch: list[Any], index: int) -> Any:
            return torch.nn.functional.mse_loss(self.net(batch[0]), batch[1])

        def configure_optimizers(self) -> Any:
            return torch.optim.Adam(self.net.parameters(), lr=0.01)

    return Net()


def sharded_held(trainer: Any, model: Any) -> Held:
    (optimizer,) = trainer.optimizers
    parameters = list(model.net.parameters())
    states = [optimizer.state.get(parameter, {}) for parameter in parameters]
    slots = [s[slot].full_tensor() for slot in ("exp_avg", "exp_avg_sq") for s in states if slot in s]
    return Held(
        trainer.global_step,
        [parameter.full_tensor().detach().numpy().copy() for parameter in parameters],
        [slot.numpy().copy() for slot in slots],
    )


def sharded_trainer(folder: Path, *callbacks: Any, epochs: int) -> Any:
    from lightning.pytorch.strategies import ModelParallelStrategy

    strategy = ModelParallelStrategy(data_parallel_size=1, tensor_parallel_size=1)
    return lightning_trainer(folder, *callbacks, devices=1, strategy=strategy, max_epochs=epochs)


def alone() -> None:
    import torch.distributed

    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def lightning_folder(here: Path) -> tuple[Path, Held]:
    """`trainer.save_checkpoint` of a model in shards, of one rank."""
    model = sharded_model(0)
    trainer = sharded_trainer(here, epochs=_EPOCHS)
    try:
        trainer.fit(model, data())
        trainer.save_checkpoint(here / "run")
        return here / "run", sharded_held(trainer, model)
    finally:
        alone()


def lightning_folder_fit(path: Path) -> Held:
    import lightning

    held: list[Held] = []

    class Watch(lightning.Callback):
        def on_train_start(self, trainer: Any, module: Any) -> None:
            held.append(sharded_held(trainer, module))
            trainer.should_stop = True

    try:
        trainer = sharded_trainer(path.parent, Watch(), epochs=_EPOCHS + 1)
        trainer.fit(sharded_model(1), data(), ckpt_path=str(path))
    finally:
        alone()
    return held[0]


def lightning_folder_load_from(path: Path) -> Held:
    type(sharded_model(1)).load_from_checkpoint(str(path))
    raise AssertionError("it loads folders")


# DeepSpeed


def engine(seed: int) -> Any:
    """DeepSpeed's engine on one rank, with ZeRO 1."""
    import os

    os.environ["DS_ACCELERATOR"] = "cpu"
    alone_on_this_machine = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_PORT": "29611"}
    os.environ.update(alone_on_this_machine, MASTER_ADDR="127.0.0.1")
    import deepspeed

    program = fresh(seed=seed)
    settings = {
        "train_micro_batch_size_per_gpu": len(X),
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {"stage": 1},
    }
    return deepspeed.initialize(model=program.model, optimizer=program.optimizer, config=settings)[0]


def engine_held(engine: Any) -> Held:
    states = list(engine.optimizer.state.values())
    return Held(
        engine.global_steps,
        [parameter.detach().numpy().copy() for parameter in engine.module.parameters()],
        [s[slot].numpy().copy() for slot in ("exp_avg", "exp_avg_sq") for s in states if slot in s],
    )


def deepspeed_folder(here: Path) -> tuple[Path, Held]:
    """`engine.save_checkpoint` after eight updates."""
    import torch

    run = engine(0)
    for _ in range(STEPS):
        run.backward((run(torch.from_numpy(X)) - torch.from_numpy(Y)).square().mean())
        run.step()
    run.save_checkpoint(str(here))
    return here / f"global_step{STEPS}", engine_held(run)


def load_checkpoint(**options: bool) -> Call:
    def call(path: Path) -> Held:
        run = engine(1)
        run.load_checkpoint(str(path.parent), tag=path.name, **options)
        return engine_held(run)

    return call


def zero_to_fp32(path: Path) -> Held:
    from deepspeed.utils.zero_to_fp32 import load_state_dict_from_zero_checkpoint

    program = fresh()
    load_state_dict_from_zero_checkpoint(program.model, str(path.parent), tag=path.name)
    return program.held()


# adapters and pipelines


def adapter_folder(here: Path) -> tuple[Path, Held]:
    """`save_pretrained` of LoRA on both layers."""
    import peft

    made = peft.get_peft_model(fresh(seed=0).model, peft.LoraConfig(r=2, target_modules=["0", "1"]))
    for value in adapter_of(made):
        value.data.normal_()
    made.save_pretrained(str(here / "adapter"))
    return here / "adapter", Held(0, [value.detach().numpy().copy() for value in adapter_of(made)])


def adapter_of(model: Any) -> list[Any]:
    return [value for name, value in model.named_parameters() if "lora" in name]


def adapted(*, trainable: bool) -> Call:
    """`PeftModel.from_pretrained` of another base; whether its parameters can be trained is looked at."""

    def call(path: Path) -> Held:
        import peft

        options = {"is_trainable": True} if trainable else {}
        model = peft.PeftModel.from_pretrained(fresh(seed=0).model, str(path), **options)
        assert {value.requires_grad for value in adapter_of(model)} == {trainable}
        return Held(0, [value.detach().numpy() for value in adapter_of(model)])

    return call


def pipeline_folder(here: Path) -> tuple[Path, Held]:
    from safetensors.torch import load_file

    path = FIXTURES / "diffusers" / "pipeline" / "pipeline"
    weights = [load_file(path / part / "diffusion_pytorch_model.safetensors") for part in ("unet", "vqvae")]
    return path, Held(0, [part[name].numpy() for part in weights for name in sorted(part)])


def load_pipeline(path: Path) -> Held:
    from diffusers import DiffusionPipeline

    found = DiffusionPipeline.from_pretrained(str(path))
    weights = [part.state_dict() for part in (found.unet, found.vqvae)]
    return Held(0, [part[name].numpy() for part in weights for name in sorted(part)])


# TensorFlow without Keras


def variables(seed: int) -> tuple[Any, Any]:
    """A module of two matrices, and a variable that counts."""
    import tensorflow as tf

    draw = np.random.default_rng(seed)
    module = tf.Module()
    module.first = tf.Variable(draw.normal(size=(4, 5)).astype("f4"))
    module.second = tf.Variable(draw.normal(size=(5, 4)).astype("f4"))
    return module, tf.Variable(0, dtype=tf.int64)


def module_held(module: Any, step: Any) -> Held:
    return Held(int(step.numpy()), [module.first.numpy(), module.second.numpy()])


def module_checkpoint(here: Path) -> tuple[Path, Held]:
    import tensorflow as tf

    module, step = variables(0)
    step.assign(STEPS)
    path = tf.train.Checkpoint(net=module, global_step=step).write(str(here / "ckpt"))
    return Path(path), module_held(module, step)


def restore_module(module_name: str, step_name: str) -> Callable[[Path], tuple[Held, Any]]:
    def call(path: Path) -> tuple[Held, Any]:
        import tensorflow as tf

        module, step = variables(1)
        status = tf.train.Checkpoint(**{module_name: module, step_name: step}).restore(str(path))
        return module_held(module, step), status

    return call


def module_saved(here: Path) -> tuple[Path, Held]:
    import tensorflow as tf

    module, step = variables(0)
    step.assign(STEPS)
    module.global_step = step
    tf.saved_model.save(module, str(here / "saved"))
    return here / "saved", module_held(module, step)


def load_saved(path: Path) -> Held:
    import tensorflow as tf

    module = tf.saved_model.load(str(path))
    return module_held(module, module.global_step)


def fixture(*parts: str) -> Make:
    """What the real program saved once, where the program is not installed here."""

    def make(here: Path) -> tuple[Path, Held]:
        return FIXTURES.joinpath(*parts), Held(None, [])

    return make


BY_FIXTURE = ("deepspeed", "megatron", "megatron-folder", "megatron-buckets", "megatron-folder-buckets")
"""Kinds whose file is a fixture: its run is not that of the others."""

FILES: Mapping[str, Make] = {
    "fairseq": saved("checkpoint_last.pt", in_layout(fairseq)),
    "composer": saved("ep2-ba8-rank0.pt", in_layout(composer)),
    "composer-folder": saved("ep2-ba8", folder(composer)),
    "detectron2": saved("model_0000007.pth", in_layout(detectron2)),
    "ultralytics": saved("last.pt", in_layout(ultralytics)),
    "torchtitan": saved("step-8", titan_folder),
    "torchtitan-file": saved("step-8.pt", titan_file),
    "lightning-folder": lightning_folder,
    "module": module_checkpoint,
    "module-saved": module_saved,
    "peft": fixture("peft", "lora", "adapter"),
    "diffusers": fixture("diffusers", "pipeline", "pipeline"),
    "deepspeed": fixture("deepspeed", "zero1-fp16", "run"),
    "megatron": fixture("megatron", "mlp", "run"),
    "megatron-folder": fixture("megatron", "gpt-2-ranks"),
    "megatron-buckets": fixture("megatron", "gpt-distributed-optimizer", "flat"),
    "megatron-folder-buckets": fixture("megatron", "gpt-distributed-optimizer", "in-buckets"),
}

CALLS: Mapping[str, tuple[str, Call]] = {
    "fairseq-model": ("fairseq", part("model")),
    "composer-model": ("composer", part("state", "model")),
    "detectron2-model": ("detectron2", part("model")),
    "torchtitan-torch": ("torchtitan", titan_load),
    "torchtitan-under-model": ("torchtitan", titan_under_model),
    "torchtitan-file-set-state": ("torchtitan-file", titan_file_set_state),
    "torchtitan-file-load": ("torchtitan-file", titan_file_load),
    "lightning-folder-fit": ("lightning-folder", lightning_folder_fit),
    "module-saved-load": ("module-saved", load_saved),
    "lightning-folder-load-from": ("lightning-folder", lightning_folder_load_from),
}

OF_DEEPSPEED: Mapping[str, Call] = {
    "deepspeed-load": load_checkpoint(),
    "deepspeed-without-optimizer": load_checkpoint(load_optimizer_states=False),
    "deepspeed-module": load_checkpoint(load_module_only=True),
    "deepspeed-zero-to-fp32": zero_to_fp32,
}

OF_PEFT: Mapping[str, Call] = {
    "peft-from-pretrained": adapted(trainable=False),
    "peft-trainable": adapted(trainable=True),
}

OF_DIFFUSERS: Mapping[str, Call] = {"diffusers-from-pretrained": load_pipeline}

OF_MODULES: Mapping[str, Callable[[Path], tuple[Held, Any]]] = {
    "module-same": restore_module("net", "global_step"),
    "module-renamed": restore_module("model", "step"),
}


def observed(name: str, path: Path, saved: Held) -> Outcome:
    return judged(CALLS[name][1], path, saved)
