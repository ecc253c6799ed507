"""Runs that ranks share, on CPUs: torch's FSDP 2 by itself, in an accelerate loop (FSDP 1 too), in a Trainer.

A run is made on every rank of a group by `on_ranks`; batches depend on their number and the rank alone, so
that a run that goes on has those of one that never stopped. accelerate 1.15 turns FSDP on for accelerators
only: the state that tells so is set by hand.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    FullOptimStateDictConfig,
    FullStateDictConfig,
    FullyShardedDataParallel,
    OptimStateKeyType,
    StateDictType,
    fully_shard,
)

RANKS = 2
ITEMS, BATCH = 48, 4


class Net(nn.Module):
    """Rows that two ranks share unevenly; every shape once but for those of the norm."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(5, 7)
        self.norm = nn.LayerNorm(7)
        self.fc2 = nn.Linear(7, 3)

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        logits = self.fc2(self.norm(torch.tanh(self.fc1(x))))
        return {"loss": nn.functional.mse_loss(logits, labels), "logits": logits}


def net(seed: int) -> Net:
    torch.manual_seed(seed)
    made = Net()
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.4)
    return made


def batch(number: int) -> tuple[torch.Tensor, torch.Tensor]:
    """This rank's items of an update."""
    generator = torch.Generator().manual_seed(RANKS * number + dist.get_rank())
    return torch.randn(BATCH, 5, generator=generator), torch.randn(BATCH, 3, generator=generator)


def on_ranks(run: Callable[..., None], *args: Any) -> None:
    """Call `run` on every rank of a new group."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(_rank, args=(port, run, args), nprocs=RANKS)


def _rank(rank: int, port: int, run: Callable[..., None], args: tuple[Any, ...]) -> None:
    told = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": RANKS, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in told.items()})
    os.environ.update(MASTER_ADDR="127.0.0.1", ACCELERATE_USE_CPU="true", OMP_NUM_THREADS="1")
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    run(*args)
    dist.barrier()
    dist.destroy_process_group()


def keep(model: nn.Module, optimizer: torch.optim.Optimizer, file: Path, **more: Any) -> None:
    """What the run stands at, whole, as a file of the first rank."""
    model_state, optimizer_state = get_state_dict(
        model, optimizer, options=StateDictOptions(full_state_dict=True)
    )
    if not dist.get_rank():
        torch.save({"model": model_state, "optimizer": optimizer_state, **more}, file)


# FSDP 2 by itself


class Sharded:
    """A model and an optimizer with two groups, all of whose parameters the ranks share."""

    def __init__(self, seed: int) -> None:
        self.model = net(seed)
        fully_shard(self.model, mesh=init_device_mesh("cpu", (RANKS,)))
        decayed = [p for p in self.model.parameters() if p.ndim > 1]
        rest = [p for p in self.model.parameters() if p.ndim == 1]
        groups = [{"params": rest, "weight_decay": 0.0}, {"params": decayed, "weight_decay": 0.1}]
        self.optimizer = torch.optim.AdamW(groups, lr=0.02)

    def train(self, first: int, last: int) -> None:
        for number in range(first, last):
            self.optimizer.zero_grad()
            self.model(*batch(number))["loss"].backward()
            self.optimizer.step()

    def state(self) -> dict[str, Any]:
        model_state, optimizer_state = get_state_dict(self.model, self.optimizer)
        return {"model": model_state, "optimizer": optimizer_state}


def save_sharded(folder: Path, at: int, last: int) -> None:
    """Train, save after `at` updates, go on to `last`; `folder.pt` is where that ends."""
    run = Sharded(0)
    run.train(0, at)
    dcp.save(run.state(), checkpoint_id=folder)
    run.train(at, last)
    keep(run.model, run.optimizer, folder.with_suffix(".pt"))


def resume_sharded(folder: Path, at: int, last: int) -> None:
    """Go on from a folder, with a run of other weights that has made an update."""
    run = Sharded(1)
    run.train(100, 101)
    state = run.state()
    dcp.load(state, checkpoint_id=folder)
    set_state_dict(
        run.model, run.optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"]
    )
    run.train(at, last)
    keep(run.model, run.optimizer, folder.with_suffix(".pt"))


# FSDP 1 in files


def save_flattened(folder: Path) -> None:
    """`named-*.pt` as `FSDP.optim_state_dict` has it, `numbered.pt` of it, `rank-*.pt` what a rank keeps.

    `*-True` with `use_orig_params`; `truth-*.pt` is what `get_state_dict` makes of the same run.
    """
    if not dist.get_rank():
        folder.mkdir()
    dist.barrier()
    for original in (True, False):
        whole = net(0)
        device = torch.device("cpu")
        whole.fc1 = FullyShardedDataParallel(whole.fc1, use_orig_params=original, device_id=device)  # type: ignore[assignment]
        model = FullyShardedDataParallel(whole, use_orig_params=original, device_id=device)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
        for number in range(5):
            optimizer.zero_grad()
            model(*batch(number))["loss"].backward()
            optimizer.step()
        here = FullStateDictConfig(offload_to_cpu=False), FullOptimStateDictConfig(offload_to_cpu=False)
        with FullyShardedDataParallel.state_dict_type(model, StateDictType.FULL_STATE_DICT, *here):
            state: dict[str, Any] = {"model": model.state_dict()}
            state["optimizer"] = FullyShardedDataParallel.optim_state_dict(model, optimizer)
        shares = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        own = {"model": shares, "optimizer": optimizer.state_dict()}
        torch.save(own, folder / f"rank-{original}-{dist.get_rank()}.pt")
        if not dist.get_rank():
            torch.save(state, folder / f"named-{original}.pt")
        if original:  # torch gives flat parameters no numbers
            kind = OptimStateKeyType.PARAM_ID
            again = FullyShardedDataParallel.rekey_optim_state_dict(state["optimizer"], kind, model)
            if not dist.get_rank():
                torch.save({**state, "optimizer": again}, folder / "numbered.pt")
        keep(model, optimizer, folder / f"truth-{original}.pt")


# In an accelerate loop


class Loop:
    """accelerate's FSDP of a version, saving in a form (`SHARDED_STATE_DICT`, ..)."""

    def __init__(self, seed: int, version: int, kind: str) -> None:
        from accelerate import Accelerator
        from accelerate.state import AcceleratorState, GradientState
        from accelerate.utils import FullyShardedDataParallelPlugin

        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        plugin = FullyShardedDataParallelPlugin(
            fsdp_version=version,
            state_dict_type=kind,
            reshard_after_forward=True if version > 1 else "FULL_SHARD",
            cpu_ram_efficient_loading=False,
        )
        self.accelerator = Accelerator(cpu=True, fsdp_plugin=plugin)
        turn_on(self.accelerator.state, plugin)
        model: nn.Module = net(seed)
        if version == 1:  # accelerate names a device that FSDP 1 does not take
            model = FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 6, 0.7)
        self.model, self.optimizer, self.scheduler = self.accelerator.prepare(model, optimizer, scheduler)

    def train(self, first: int, last: int) -> None:
        for number in range(first, last):
            self.accelerator.backward(self.model(*batch(number))["loss"])
            self.optimizer.step()
            self.scheduler.step()
            self.optimizer.zero_grad()

    def keep(self, file: Path) -> None:
        rate = self.optimizer.param_groups[0]["lr"]
        keep(self.model, self.optimizer.optimizer, file, scheduler=self.scheduler.state_dict(), rate=rate)


def turn_on(state: Any, plugin: Any) -> None:
    """What accelerate does where there is an accelerator."""
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType

    PartialState().distributed_type = DistributedType.FSDP
    state.distributed_type = DistributedType.FSDP
    state.fsdp_plugin = plugin


def save_loop(folder: Path, version: int, kind: str, at: int, last: int) -> None:
    """Train, save after `at` updates, go on to `last`; `folder.pt` is where that ends."""
    loop = Loop(0, version, kind)
    loop.train(0, at)
    loop.accelerator.save_state(str(folder))
    loop.train(at, last)
    loop.keep(folder.with_suffix(".pt"))


def resume_loop(folder: Path, version: int, kind: str, at: int, last: int) -> None:
    """Go on from a folder, with a run of other weights that has made an update.

    accelerate asks the optimizer for its state to know what to load: of one that was never stepped FSDP 1
    has none, and so loads none.
    """
    loop = Loop(1, version, kind)
    loop.train(100, 101)
    loop.accelerator.load_state(str(folder))
    loop.train(at, last)
    loop.keep(folder.with_suffix(".pt"))


# In a Trainer


def run_trainer(output: Path, kind: str, resume: Path | None = None, stop: int = 0) -> None:
    """A Trainer's run of 18 updates, saved every 8; `output.pt` is where it ends, or stops after `stop`."""
    from accelerate.state import AcceleratorState, GradientState
    from accelerate.utils import FullyShardedDataParallelPlugin
    from torch.utils.data import SequentialSampler
    from transformers import Trainer, TrainerCallback, TrainingArguments

    class Stop(TrainerCallback):  # type: ignore[misc]  # untyped
        def on_step_end(self, args: Any, state: Any, control: Any, **parts: Any) -> None:
            control.should_training_stop = state.global_step == stop

    class InOrder(Trainer):  # type: ignore[misc]  # untyped
        def create_accelerator_and_postprocess(self) -> None:
            super().create_accelerator_and_postprocess()
            turn_on(self.accelerator.state, FullyShardedDataParallelPlugin(**self.args.fsdp_plugin_args))
            self.is_fsdp_enabled = True

        def _get_train_sampler(self, *_: Any) -> Any:
            return SequentialSampler(self.train_dataset)

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    model = net(0 if resume is None else 1)
    generator = torch.Generator().manual_seed(2)
    items = [
        {"x": torch.randn(5, generator=generator), "labels": torch.randn(3, generator=generator)}
        for _ in range(ITEMS)
    ]
    settings = {
        "per_device_train_batch_size": BATCH, "num_train_epochs": 3, "save_steps": 8, "weight_decay": 0.1,
        "learning_rate": 1e-2, "lr_scheduler_type": "cosine", "warmup_steps": 3, "max_grad_norm": 0.0,
        "report_to": [], "use_cpu": True, "disable_tqdm": True, "ddp_backend": "gloo", "fsdp": True,
        "fsdp_config": {
            "fsdp_version": 2, "state_dict_type": kind, "auto_wrap_policy": "NO_WRAP",
            "reshard_after_forward": True, "cpu_ram_efficient_loading": False,
        },
    }  # fmt: skip
    before = Path.cwd()
    output.mkdir(parents=True, exist_ok=True)
    os.chdir(output)
    arguments = TrainingArguments("run", **settings)
    trainer = InOrder(model, arguments, train_dataset=items, callbacks=[Stop()])
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    os.chdir(before)
    told = {"step": trainer.state.global_step, "epoch": trainer.state.epoch}
    keep(trainer.model, trainer.optimizer.optimizer, output.with_suffix(".pt"), **told)


# In Lightning


def run_lightning(output: Path, strategy: str, resume: Path | None = None, epochs: int = 3) -> None:
    """Epochs of six updates; saved in `output`, `output.pt` is where the run stands."""
    import lightning
    from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
    from torch.utils.data import DataLoader

    class OnCPU(FSDPStrategy):  # type: ignore[misc]  # untyped
        """Lightning refuses FSDPStrategy itself without a GPU."""

    class Regression(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net: nn.Module | None = None

        def configure_model(self) -> None:
            if self.net is not None:
                return
            self.net = net(0 if resume is None else 1)
            if strategy.startswith("fsdp"):  # by hand: Lightning names no device, and FSDP 1 then wants a GPU
                device = torch.device("cpu")
                self.net = FullyShardedDataParallel(self.net, use_orig_params=True, device_id=device)
            else:
                fully_shard(self.net, mesh=self.device_mesh["data_parallel"])

        def training_step(self, number: torch.Tensor, index: int) -> torch.Tensor:
            loss: torch.Tensor = self.net(*batch(int(number)))["loss"]
            return loss

        def configure_optimizers(self) -> dict[str, Any]:
            optimizer = torch.optim.AdamW(self.parameters(), lr=0.02)
            return {
                "optimizer": optimizer,
                "lr_scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.7),
            }

    strategies: dict[str, Callable[[], Any]] = {
        "fsdp": lambda: OnCPU(state_dict_type="sharded"),
        "fsdp-file": lambda: OnCPU(state_dict_type="full"),
        "parallel": lambda: ModelParallelStrategy(data_parallel_size=RANKS, tensor_parallel_size=1),
        "parallel-file": lambda: ModelParallelStrategy(
            data_parallel_size=RANKS, tensor_parallel_size=1, save_distributed_checkpoint=False
        ),
    }
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=RANKS,
        strategy=strategies[strategy](),
        max_epochs=epochs,
        use_distributed_sampler=False,
        logger=False,
        enable_progress_bar=False,
        enable_checkpointing=False,
        enable_model_summary=False,
    )
    module = Regression()
    loader = DataLoader(torch.arange(6), batch_size=None)  # type: ignore[arg-type,var-annotated]
    trainer.fit(module, loader, ckpt_path=None if resume is None else str(resume))
    trainer.save_checkpoint(output)
    optimizer = trainer.optimizers[0]
    told = {
        "step": trainer.global_step,
        "epoch": trainer.current_epoch,
        "rate": optimizer.param_groups[0]["lr"],
    }
    keep(module, optimizer, output.with_suffix(".pt"), **told)
